"""Saving a model as a plain Hugging Face directory, for engines that know nothing about sparsity."""

from __future__ import annotations

import copy
import os
from typing import Any

from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.architecture import blank_model
from gossamer.models.gguf import clear_quantised_mark, quiet_transformers
from gossamer.storage.atomic import atomic_directory
from gossamer.storage.models import check_saveable


def save_dense(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> None:
    """Save a transformers model with all its zeros as configuration, safetensors and tokenizer.

    The directory appears whole or not at all. If feed-forward layers were shrunk, all by the same amount, the
    stored configuration says so, and every engine can load the smaller model.

    Parameters
    ----------
    model
        A transformers model; a mark of GGUF on it is cleared.
    tokenizer
        Anything with ``save_pretrained``, or None.
    directory
        Where; must not exist or be empty unless `overwrite`.
    overwrite
        Replace a directory that has something in it.
    max_shard_size
        Largest file of weights.

    Raises
    ------
    ConfigurationError
        If layers were shrunk unevenly, which a stock configuration cannot express.
    ModelError
        If it is not a transformers model, transformers cannot save it, or it is rotated.
    OutputError
        If the directory is in use or cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} is not a transformers model; save it packed with gossamer.storage.save"
        )
    check_saveable(model)
    clear_quantised_mark(model)
    config = model.config
    model.config = _shrunk_config(model)
    try:
        with atomic_directory(directory, overwrite) as part, quiet_transformers():
            _save(model, tokenizer, part, max_shard_size)
    finally:
        model.config = config


def _save(model: Any, tokenizer: Any, directory: os.PathLike[str], max_shard_size: str | int) -> None:
    try:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{type(model).__name__} cannot be saved ({reason}); save it packed instead") from error


def _shrunk_config(model: Any) -> Any:
    """Return the configuration that describes the model as it is now.

    Compared with a model built from the configuration without memory, a shrunk feed-forward layer shows as
    linear weights whose one dimension differs from ``intermediate_size``.
    """
    config = copy.deepcopy(model.config)
    expected = {name: p.shape for name, p in blank_model(config, type(model)).named_parameters()}
    changed: set[tuple[int, int]] = set()
    for name, parameter in model.named_parameters():
        before = expected.get(name)
        if before is None or len(before) != parameter.dim():
            raise ConfigurationError(
                f"{name} is not in a {type(model).__name__} of this configuration; save it with gossamer.storage.save"
            )
        changed |= {(old, new) for old, new in zip(before, parameter.shape) if old != new}
    if not changed:
        return config
    old_sizes, new_sizes = {old for old, _ in changed}, {new for _, new in changed}
    known = getattr(config, "intermediate_size", None)
    trial = copy.deepcopy(config)
    if old_sizes == {known} and len(new_sizes) == 1:
        trial.intermediate_size = new_sizes.pop()
        shapes = {name: p.shape for name, p in blank_model(trial, type(model)).named_parameters()}
        if all(shapes[name] == p.shape for name, p in model.named_parameters()):
            return trial
    raise ConfigurationError(
        "the layers were shrunk to different sizes, which a Hugging Face configuration cannot express; "
        "save the model in the packed format with gossamer.storage.save"
    )
