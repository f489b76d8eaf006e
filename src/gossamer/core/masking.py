"""Masks on a living model: for a moment, for the length of a training run, or put together from single matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError


@contextmanager
def zeroed(model: nn.Module, masks: MaskSet) -> Iterator[None]:
    """Zero what the masks remove while the block lasts; afterwards every weight has its old bits again.

    Only the removed entries are copied, never the model. Whatever the block itself writes to them is lost; what it
    writes to other weights stays.

    Parameters
    ----------
    model
        The model that the masks belong to.
    masks
        True where a weight remains.

    Raises
    ------
    TargetError
        If a name or shape does not fit the model; nothing is changed then.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 1)
    >>> with zeroed(layer, MaskSet({"weight": torch.tensor([[True, False]])})):
    ...     int((layer.weight == 0).sum())
    1
    >>> int((layer.weight == 0).sum())
    0
    """
    masks.violations(model)  # raises before anything is touched
    saved: dict[int, tuple[Tensor, str, Tensor]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        for name in masks:
            weight = parameters[name].detach()
            if id(parameters[name]) not in saved:
                removed = ~masks[name].to(weight.device)
                saved[id(parameters[name])] = (weight, name, weight[removed])
                weight.masked_fill_(removed, 0)
        yield
    finally:
        for weight, name, values in saved.values():
            weight.masked_scatter_(~masks[name].to(weight.device), values)


@contextmanager
def static_masks(model: nn.Module, masks: MaskSet) -> Iterator[None]:
    """Zero what the masks remove, and hold it at zero through whatever training happens in the block.

    Gradients of removed weights are zeroed as they arrive. Any optimiser that starts inside the block and moves a
    weight only by its gradient, its momentum and its decay then leaves them at zero, with no change to the loop.

    Parameters
    ----------
    model
        Changed in place, for good.
    masks
        True where a weight remains.

    Raises
    ------
    TargetError
        If a name or shape does not fit the model.
    ConfigurationError
        At the end, if a removed weight is no longer zero.
    """
    masks.apply_(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameters[name]): name for name in masks}
    hooks = [_silence(parameters[name], masks[name]) for name in tied.values() if parameters[name].requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    moved = masks.violations(model)
    if moved:
        name, count = next(iter(moved.items()))
        raise ConfigurationError(
            f"training moved {count} pruned weights of {name} away from zero; make the optimiser inside the training "
            f"function, and do not replace or unfreeze parameters there"
        )


def _silence(parameter: nn.Parameter, mask: Tensor) -> torch.utils.hooks.RemovableHandle:
    removed = ~mask.to(parameter.device)
    return parameter.register_hook(lambda gradient: gradient.masked_fill(removed, 0))


def parameter_masks(targets: Iterable[Target], masks: Mapping[str, Tensor]) -> MaskSet:
    """Turn masks of matrices into masks of parameters.

    Parameters
    ----------
    targets
        The matrices.
    masks
        Target name → bool of the shape of its matrix; transposed ones are turned back, stacked experts put together.
    """
    whole: dict[str, Tensor] = {}
    for target in targets:
        mask = masks[target.name].cpu()
        mask = mask.transpose(0, 1) if target.transposed else mask
        if target.index is None:
            whole[target.parameter_name] = mask
        else:
            stacked = whole.setdefault(target.parameter_name, torch.ones(target.parameter.shape, dtype=torch.bool))
            stacked[target.index] = mask
    return MaskSet(whole)
