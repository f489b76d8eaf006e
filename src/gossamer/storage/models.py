"""Whole models: saving one packed, filling one that is built already, and dense export for other programs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from gossamer.errors import CheckpointError, ModelError
from gossamer.storage.atomic import PathLike, atomic_directory, write_json
from gossamer.storage.checkpoint import MAX_SHARD_BYTES, CheckpointWriter, read_index, read_model_state
from gossamer.storage.index import INDEX_NAME, Index
from gossamer.storage.shards import ShardWriter

ACTIVATIONS = "activations"  # the key of a checkpoint's settings for those that its configuration cannot name


def save(
    model: nn.Module,
    directory: PathLike,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Index:
    """Save a model packed, with its configuration and tokenizer; the directory appears whole or not at all.

    Parameters
    ----------
    model
        Any module. Parameters and persistent buffers are stored, tied ones once; what accelerate has offloaded is
        fetched module by module.
    directory
        Where; must not exist or be empty unless `overwrite`.
    tokenizer
        Anything with ``save_pretrained``, or a list of such things.
    settings
        How the model was made; anything that JSON can hold.
    overwrite
        Replace a directory that has something in it.
    max_shard_bytes
        Largest file of weights.

    Returns
    -------
    Index
        What was written; ``index.totals`` has the sizes.

    Raises
    ------
    OutputError
        If the directory is in use or cannot be written.
    ModelError
        If the model has state that is not a tensor, tensors without values, or a configuration that cannot be saved;
        or if it computes with more than its weights (rotated models).
    """
    # torch.compile wraps the model and prefixes every name
    model = getattr(model, "_orig_mod", model)
    check_saveable(model)
    with atomic_directory(directory, overwrite) as part:
        _save_configuration(model, tokenizer, part)
        writer = CheckpointWriter(part, max_shard_bytes)
        stored: dict[tuple[Any, ...], str] = {}
        for name, tensor, memory in _state(model):
            if memory in stored:
                writer.add_alias(name, stored[memory])
            else:
                writer.add(name, tensor)
                if memory is not None:
                    stored[memory] = name
        return writer.finish({**(settings or {}), **_activations(model)})


def check_saveable(model: nn.Module) -> None:
    """Refuse a model that computes with more than its parameters and buffers, so that a file of them is not the model.

    Whoever makes one of it says so by an attribute ``_unsaved``, the reason in words.

    Raises
    ------
    ModelError
        With that reason.
    """
    for module in model.modules():
        reason = vars(module).get("_unsaved")
        if reason is not None:
            raise ModelError(reason)


@torch.no_grad()
def load_state(module: nn.Module, directory: PathLike, verify: bool = True) -> None:
    """Fill a module that is built already, in place, tensor by tensor.

    As with ``load_state_dict``, values are converted where the module has another dtype or device.

    Parameters
    ----------
    module
        Has exactly the names and shapes of the checkpoint.
    directory
        Of the checkpoint.
    verify
        Compare the checksums of all shards first.

    Raises
    ------
    CheckpointError
        If the checkpoint is broken, or names or shapes differ; the module is unchanged unless a tensor turns out to
        be broken on the way.
    ModelError
        If the module is on the meta device and so has no memory to fill.
    """
    index, state = read_index(directory), module.state_dict(keep_vars=True)
    missing, unexpected = set(state) - set(index.names), set(index.names) - set(state)
    if missing or unexpected:
        raise CheckpointError(
            f"{directory} does not fit the module: {_listed('missing', missing)}, {_listed('unexpected', unexpected)}; "
            f"build the module as it was when it was saved"
        )
    for name in index.names:
        target, shape = state[name], index.tensors[index.resolve(name)].shape
        if tuple(target.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {shape} in {directory} and {tuple(target.shape)} in the module; "
                f"build the module as it was when it was saved"
            )
        if target.is_meta:
            raise ModelError(
                f"{name} is on the meta device; build the module on a real one, such as with to_empty('cpu')"
            )
    for name, tensor in read_model_state(directory, verify):
        state[name].copy_(tensor)


def export_dense(
    checkpoint: PathLike,
    directory: PathLike,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Unpack a checkpoint into the plain Hugging Face layout that other engines read, tensor by tensor.

    Parameters
    ----------
    checkpoint
        A packed directory; its other files (configuration, tokenizer) are copied.
    directory
        Where; must not exist or be empty unless `overwrite`.
    overwrite
        Replace a directory that has something in it.
    max_shard_bytes
        Largest file of weights.

    Raises
    ------
    CheckpointError
        If the checkpoint is broken.
    OutputError
        If the directory is in use or cannot be written.
    """
    source, index = Path(checkpoint), read_index(checkpoint)
    with atomic_directory(directory, overwrite, needed=index.totals["dense_bytes"]) as part:
        for path in source.iterdir():
            if path.is_file() and path.name not in index.shards and path.name != INDEX_NAME:
                shutil.copyfile(path, part / path.name)
        shards, places = ShardWriter(part, max_shard_bytes, {"format": "pt"}), {}
        for name, tensor in read_model_state(source):
            # tied weights are stored once; the configuration says that they are tied
            if name not in index.aliases:
                places[name] = shards.add({name: tensor})
        paths = shards.finish(single="model.safetensors")
        if len(paths) > 1:
            weight_map = {name: paths[number].name for name, number in places.items()}
            metadata = {"total_size": index.totals["dense_bytes"]}
            write_json(part / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[Any, ...] | None]]:
    """Name, values and place in memory of parameters and persistent buffers.

    Offloaded ones are fetched for as long as they are looked at. They have no lasting place: the next one may get
    the same.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name} is a {type(tensor).__name__}, not a tensor; remove this extra state before saving"
            )
        if not tensor.is_meta:
            yield name, tensor, _memory(tensor)
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not hasattr(module, "_hf_hook"):
            raise ModelError(f"{name} is on the meta device and has no values; load the weights before saving")
        with align_module_device(module, torch.device("cpu")):
            fetched = getattr(module, leaf)
            if fetched.is_meta:
                raise ModelError(f"{name} is offloaded and cannot be fetched; load the model without offloading")
            yield name, fetched.detach().clone(), None


def _activations(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What activations that no configuration knows say of themselves, by the name of the module."""
    found = {name: module.stored_as() for name, module in model.named_modules() if hasattr(module, "stored_as")}
    return {ACTIVATIONS: found} if found else {}


def _memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two tied tensors have in common; None for a tensor without memory of its own."""
    if tensor.layout != torch.strided or not tensor.numel():
        return None
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _save_configuration(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    try:
        if config is not None and hasattr(config, "save_pretrained"):
            config = _plain_configuration(config)
            config.architectures = [type(model).__name__]
            if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
                config.dtype = str(dtype).removeprefix("torch.")
            config.save_pretrained(directory)
        if generation is not None and hasattr(generation, "save_pretrained"):
            generation.save_pretrained(directory)
        for each in tokenizer if isinstance(tokenizer, list | tuple) else [tokenizer]:
            if each is not None:
                each.save_pretrained(str(directory))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the configuration of {type(model).__name__} cannot be saved ({reason}); correct it"
        ) from error


def _plain_configuration(config: Any) -> Any:
    """A copy without the mark of a GGUF file: what is stored are ordinary floating-point weights."""
    config = copy.deepcopy(config)
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    if getattr(method, "value", method) == "gguf":
        del config.quantization_config
    return config


def _listed(what: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} {what}" + (f" ({shown}{', …' if len(names) > 3 else ''})" if names else "")
