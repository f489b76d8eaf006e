"""Loading a model, from wherever it is: a demo model, a directory, a GGUF file, the hub, or a packed checkpoint."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from gossamer.errors import CheckpointError, ConfigurationError, GossamerError, ModelError, UnknownNameError
from gossamer.models.architecture import blank_model, json_object, model_class, read_config
from gossamer.models.blocks import find_stacks
from gossamer.models.demo import DEMO_MODELS, demo_gguf, demo_model
from gossamer.models.gguf import clear_quantised_mark, converted, from_gguf, quiet_transformers
from gossamer.models.hub import download
from gossamer.models.packed import load_packed

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.*")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be used.

    Attributes
    ----------
    model
        In evaluation mode.
    tokenizer
        Its tokenizer; None if none came with it.
    source
        What was asked for.
    licence
        The line about the licence that a user must see; None if none is known.
    parameters
        Number of parameters, tied ones counted once.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    licence: str | None = None
    parameters: int = field(default=0)


def load(
    source: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    source
        ``"demo"`` (the same as ``"smollm2"``), ``"gemma"``, a Hugging Face directory, a directory written by
        gossamer, a GGUF file, or a hub id such as ``"owner/name"``.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. Default, as ``"auto"``: as stored.
    device
        Where the model computes.
    offload
        ``"cpu"`` or ``"disk"`` keeps the weights there and brings them to `device` when they are needed; from disk
        they are read straight out of the checkpoint. Default: everything is on `device`.
    revision
        Branch, tag or commit on the hub.

    Returns
    -------
    LoadedModel

    Raises
    ------
    UnknownNameError
        If `source` is neither a path, a hub id nor the name of a demo model; suggests the nearest.
    ModelError
        If it cannot be found or reached, or its architecture is not supported.
    CheckpointError
        If its files are missing, broken, or do not fit its configuration.
    ConfigurationError
        If `dtype`, `device` or `offload` is not one of the above.
    """
    wanted = _as_dtype(dtype)
    target = _as_device(device)
    if offload not in (None, "cpu", "disk"):
        raise ConfigurationError(f"offload is {offload!r}; it must be 'cpu', 'disk' or None")
    directory, licence = _locate(str(source), revision)
    _check_directory(directory)
    with quiet_transformers():
        if (directory / "gossamer.json").is_file():
            model = load_packed(directory, wanted, target, offload)
        else:
            _check_weights(directory)
            model = _from_directory(directory, wanted, target, offload)
        tokenizer = _tokenizer(directory)
    clear_quantised_mark(model)
    return LoadedModel(model.eval(), tokenizer, str(source), licence, sum(p.numel() for p in model.parameters()))


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; it must be one of: auto, {', '.join(_DTYPES)}")
    return _DTYPES[str(dtype)]


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigurationError(f"device {str(device)!r} cannot be used ({reason}); try 'cpu'") from error


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the directory to read, downloading or converting where necessary, and the licence line."""
    path = Path(source).expanduser()
    # an installed demo model has the last word only if nothing of that name lies here
    if source in DEMO_MODELS and not (path / "config.json").is_file():
        demo = demo_model(source)
        return converted(demo.sha256, demo.title, lambda folder: demo_gguf(demo, folder)), demo.licence
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file; give its directory, or a file that ends in .gguf")
        return from_gguf(path), None
    if _HUB_ID.fullmatch(source) and path.suffix.lower() != ".gguf":
        return download(source, revision), None
    if path.name == source and path.suffix.lower() != ".gguf":
        raise UnknownNameError("model", source, DEMO_MODELS)
    raise ModelError(f"{source} does not exist; give a model directory, a GGUF file, a hub id, or 'demo'")


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; give a Hugging Face model directory")


def _check_weights(directory: Path) -> None:
    """Find missing, truncated and damaged files before transformers does, to be able to name them."""
    files = sorted(directory.glob("*.safetensors"))
    for index in directory.glob("*.safetensors.index.json"):
        try:
            listed = set(json_object(index)["weight_map"].values())
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again") from error
        for name in sorted(listed - {file.name for file in files}):
            raise CheckpointError(f"{directory / name} is missing although {index.name} lists it; fetch it again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch or write it again") from error
    if not files and not any(directory.glob("*.bin")):
        raise CheckpointError(f"{directory} has a config.json but no weights (*.safetensors); fetch it again")


def _from_directory(directory: Path, dtype: torch.dtype | None, device: torch.device, offload: str | None) -> nn.Module:
    config = read_config(directory)
    chosen = model_class(config, directory)
    placement: dict[str, Any] = {}
    folder: str | None = None
    if offload == "disk" or (offload == "cpu" and device.type != "cpu"):
        folder = tempfile.mkdtemp(prefix="gossamer-")
        placement = {"device_map": _device_map(config, chosen, device, offload), "offload_folder": folder}
    elif device.type != "cpu":
        placement = {"device_map": {"": device}}
    try:
        model, info = chosen.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **placement,
        )
        _check_complete(info, directory)
    except Exception as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        explained = _loading_failure(directory, chosen, error)
        if explained is error:
            raise
        raise explained from error
    if folder is not None:
        # the dispatched model may read from there for as long as it lives
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def _loading_failure(directory: Path, chosen: type, error: Exception) -> Exception:
    """Say in one line what transformers could not do; errors that are not about the model are passed on."""
    reason = f"{directory} cannot be loaded as {chosen.__name__}: {_one_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(f"{directory} does not fit on the device; load it with offload='cpu' or offload='disk'")
    if isinstance(error, ImportError):
        return ModelError(f"{reason}; install what it asks for")
    known = SafetensorError | OSError | ValueError | RuntimeError | KeyError
    if isinstance(error, GossamerError) or not isinstance(error, known):
        return error
    return CheckpointError(reason)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _check_complete(info: dict[str, Any], directory: Path) -> None:
    """Refuse a checkpoint of which a part would stay random: transformers only warns."""
    for name in sorted(info["missing_keys"]):
        raise CheckpointError(f"{directory} has no weight {name!r}, which its config.json asks for; fetch it again")
    for name, stored, asked in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{directory} has weight {name!r} of shape {tuple(stored)}, but its config.json asks for {tuple(asked)}; "
            "correct config.json, or fetch it again"
        )


def _device_map(config: Any, chosen: Any, device: torch.device, offload: str) -> dict[str, str | torch.device]:
    """Say where each part lives: everything on disk for the CPU; for a GPU the blocks elsewhere, the rest on it."""
    if device.type == "cpu":
        return {"": offload}
    model = blank_model(config, chosen)
    blocks = [name for stack in find_stacks(model) for name in stack.blocks]
    rest: dict[str, str | torch.device] = {}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not any(name.startswith(f"{block}.") for block in blocks):
            rest[name.rpartition(".")[0] or name] = device
    return rest | dict.fromkeys(blocks, offload)


def _tokenizer(directory: Path) -> Any:
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # each tokenizer library has exceptions of its own, down to bare Exception
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {_one_line(error)}") from error
