"""From a directory's config.json to the model class that it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from gossamer.errors import CheckpointError, ModelError


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    CheckpointError
        If it is not one.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch or write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; fetch or write it again")
    return value


def read_config(directory: Path) -> Any:
    """Return the transformers configuration of a directory.

    Raises
    ------
    CheckpointError
        If config.json is broken.
    ModelError
        If this version of transformers does not know the architecture.
    """
    raw = json_object(directory / "config.json")
    try:
        return transformers.AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, OSError, TypeError) as error:
        kind = raw.get("model_type")
        raise ModelError(
            f"{directory} has architecture {kind!r}, which transformers {transformers.__version__} "
            "cannot read; update transformers, or give another model"
        ) from error


def model_class(config: Any, directory: Path) -> Any:
    """Return the class that a configuration names, else one for causal language modelling, else the bare model.

    Raises
    ------
    ModelError
        If transformers has no class for it.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    # an encoder also has a causal class, but with a head that its checkpoint does not have
    encodes = getattr(config, "is_encoder_decoder", False) or type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    mappings = [] if encodes else [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING]
    for mapping in [*mappings, modeling_auto.MODEL_MAPPING]:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    names = ", ".join(config.architectures or [config.model_type])
    raise ModelError(f"{directory} has architecture {names}, for which transformers has no class; give another model")


def blank_model(config: Any, chosen: Any) -> Any:
    """Build a model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return chosen._from_config(config)


def unfilled_model(config: Any, chosen: Any, dtype: torch.dtype | None) -> Any:
    """Build a model on the CPU whose weights are yet to be filled in; what is computed, such as rotary tables, is."""
    with no_init_weights():
        model = chosen._from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
    return model
