"""N:M models in the form that multiplies them fastest where they are: sparse tensor cores, or packed rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, PatternError, TargetError
from gossamer.kernels.nm import NMMatrix
from gossamer.storage.layers import SparseLinear

Form = Literal["packed", "semi-structured"]
_CORES = (8, 0)  # the first NVIDIA processors with sparse tensor cores
_TYPES = (torch.float16, torch.bfloat16, torch.int8)
_ROWS = 64  # of which torch's semi-structured matrices need a multiple, in both directions


def compress_nm(
    model: nn.Module,
    pattern: NM | str = "2:4",
    format: str | None = None,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
) -> dict[str, Form]:
    """Store every linear layer that follows an N:M pattern without its zeros, in place.

    A layer on a GPU with sparse tensor cores, of 2:4, in half precision and of a size that they take, becomes a weight
    of ``torch.sparse.to_sparse_semi_structured``; every other one a :class:`~gossamer.storage.layers.SparseLinear` in
    packed N:M, on the CPU. Layers that do not follow the pattern stay as they are.

    Parameters
    ----------
    model
        After training, with its masks applied.
    pattern
        N:M along the inputs.
    format
        What packed values become: ``float32``, ``bfloat16``, ``int8``; by default what they are.
    include, exclude
        Globs on the names of layers.

    Returns
    -------
    dict
        Name of a layer → its form.

    Raises
    ------
    PatternError
        If the pattern is not N:M along the inputs.
    TargetError
        If no layer follows it.
    """
    wanted = NM.parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(wanted, NM) or wanted.dim != 1:
        raise PatternError(f"pattern is {pattern}; layers are stored in N:M along their inputs, such as 2:4")
    found: dict[str, Form] = {}
    for target in find_targets(model, include, exclude, heads=True):
        name, layer = target.module_name, target.module
        if type(layer) is not nn.Linear or not follows(layer.weight, wanted):
            continue
        found[name] = form = form_for(layer.weight, wanted)
        if form == "semi-structured":
            if format is not None:
                raise ConfigurationError(f"format is {format!r}; on a GPU weights keep their type, so leave it out")
            compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(compressed, requires_grad=False)
        else:
            dtype = layer.weight.dtype
            packed = NMMatrix.from_dense(layer.weight.detach().cpu(), format, wanted)
            model.set_submodule(name, SparseLinear(packed, layer.bias, dtype))
    if not found:
        raise TargetError(f"no linear layer of the model follows {wanted}; finalize the training first")
    return found


def follows(weight: Tensor, pattern: NM) -> bool:
    """Whether at most N of every M adjacent weights of a row are not zero."""
    groups = nn.functional.pad(weight.detach() != 0, (0, -weight.shape[1] % pattern.m)).unflatten(1, (-1, pattern.m))
    return bool((groups.sum(-1) <= pattern.n).all())


def form_for(weight: Tensor, pattern: NM) -> Form:
    """What :func:`compress_nm` makes of a weight that follows the pattern."""
    fits = (pattern.n, pattern.m) == (2, 4) and weight.dtype in _TYPES and not any(s % _ROWS for s in weight.shape)
    cores = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= _CORES
    return "semi-structured" if fits and cores else "packed"
