"""Models from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gossamer.errors import ModelError

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def download(name: str, revision: str | None = None) -> Path:
    """Return the local snapshot of a model on the hub, downloading what is not there yet.

    Weights are taken as safetensors; only a model without them is downloaded as PyTorch pickles.

    Parameters
    ----------
    name
        Such as ``"owner/name"``.
    revision
        Branch, tag or commit. Default: the main branch.

    Raises
    ------
    ModelError
        If there is no such model, no access to it, or no network; says what to do.
    """
    try:
        for weights in ("*.safetensors", "*.bin"):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, weights]))
            if any(path.glob(weights)):
                break
        return path
    except GatedRepoError as error:
        raise ModelError(f"{name} needs its licence accepted on the hub first; accept it there, then log in") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the hub; leave it out, or give another") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name} is neither a directory here nor a model on the hub; check the spelling") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"{name} is not a directory here, and {cause}; go online, give a local directory, or use 'demo'"
        ) from error
