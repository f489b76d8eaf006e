"""Blocks of a model that lives elsewhere: brought in to be worked on, and taken back with their changes.

A model dispatched by accelerate keeps its weights on the CPU or on disk and loads each layer for every call. For
block-by-block work that would read everything many times; :func:`onloaded` brings a block in once. Changed weights of
a model on disk go to files of their own, beside and never into the checkpoint that they came from. What a walk over
the blocks gathers on its way, :func:`spilled` moves to disk as well.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_OWN_MAP_FROM = 1 << 20  # bytes


@contextmanager
def onloaded(
    module: nn.Module, device: torch.device | str | None = None, workspace: str | Path | None = None
) -> Iterator[nn.Module]:
    """Have all weights of `module` on the execution device inside the context, and back where they were after it.

    Parameters
    ----------
    module
        A block, dispatched by accelerate or not.
    device
        Where to work; by default where the module is (or its dispatch says).
    workspace
        Directory for the changed weights of a module that lives on disk; by default a temporary one that goes with
        the process.
    """
    hooks = _offloading_hooks(module)
    if not hooks:
        home = next((p.device for p in module.parameters()), None)
        if device is not None and home is not None and home != torch.device(device):
            module.to(device)
            try:
                yield module
            finally:
                module.to(home)
        else:
            yield module
        return
    _give_back_what_is_freed()
    before: dict[int, dict[str, tuple[int, int]]] = {}
    for part, hook in hooks:
        target = device or hook.execution_device
        for name, _ in list(part.named_parameters(recurse=False)):
            # a copy of its own: the file behind the map must never change
            value = hook.weights_map[name].clone()
            set_module_tensor_to_device(part, name, target, value=value)
        before[id(part)] = {n: (id(p), p._version) for n, p in part.named_parameters(recurse=False)}
        hook.offload = False
    try:
        yield module
    finally:
        changed = []
        for part, hook in hooks:
            for name, parameter in list(part.named_parameters(recurse=False)):
                if (id(parameter), parameter._version) != before[id(part)].get(name):
                    changed.append((hook.weights_map, name, parameter.detach().cpu()))
        _write_back(changed, workspace)
        for part, hook in hooks:
            for name, _ in list(part.named_parameters(recurse=False)):
                set_module_tensor_to_device(part, name, "meta")
            hook.offload = True


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps any of the module's weights elsewhere."""
    return bool(_offloading_hooks(module))


def spilled(tensors: Mapping[str, Tensor], workspace: str | Path | None = None) -> dict[str, Tensor]:
    """Move bytes to a file on disk and return them as maps of it, which take memory only while they are read.

    The file has no name: it goes when the last of the tensors does.

    Parameters
    ----------
    tensors
        Name → uint8, of any shape.
    workspace
        An existing directory on the disk to use; by default the one for temporary files.
    """
    with tempfile.NamedTemporaryFile(dir=workspace, prefix="gossamer-") as file:
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().numpy())
        file.flush()
        size = file.tell()
        whole = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8) if size else torch.empty(0)
    parts = whole.to(torch.uint8).split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts)}


@cache
def _give_back_what_is_freed() -> None:
    """Have malloc take every tensor from the system and return it at once.

    glibc learns from each large allocation that is freed and then serves the next ones, of up to 32 MB, from its
    heap. There a small one that lives on pins the large ones freed around it, so that a walk over many blocks holds
    several times what is in use. A threshold that the user has set stays.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries have none, and no such habit
            mallopt(_M_MMAP_THRESHOLD, _OWN_MAP_FROM)


def _offloading_hooks(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    found = []
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for candidate in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(candidate, AlignDevicesHook) and candidate.offload:
                found.append((part, candidate))
    return found


_scratch: list[tempfile.TemporaryDirectory] = []  # live as long as the process


def _write_back(changed: list[tuple[Any, str, torch.Tensor]], workspace: str | Path | None) -> None:
    on_disk: dict[str, tuple[OffloadedWeightsLoader, torch.Tensor]] = {}
    for weights, name, value in changed:
        source, key = weights, name
        if isinstance(weights, PrefixedDataset):
            source, key = weights.dataset, weights.prefix + name
        if isinstance(source, OffloadedWeightsLoader) and key not in source.state_dict:
            on_disk[key] = (source, value.contiguous())
        elif isinstance(source, OffloadedWeightsLoader):
            source.state_dict[key] = value
        else:
            source[key] = value
    if not on_disk:
        return
    if workspace is None:
        _scratch.append(tempfile.TemporaryDirectory(prefix="gossamer-"))
        workspace = _scratch[-1].name
    Path(workspace).mkdir(parents=True, exist_ok=True)
    file = Path(workspace) / f"{next(iter(on_disk))}.safetensors"
    save_file({key: value for key, (_, value) in on_disk.items()}, file)
    for key, (source, value) in on_disk.items():
        dtype = str(value.dtype).removeprefix("torch.")
        source.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype}
