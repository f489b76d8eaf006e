"""Masks on a living model: for a moment, for the length of a training run, or put together from single matrices.

Also the scores of all its matrices, as one mapping that holds none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


class LazyScores(Mapping[str, Tensor]):
    """Scores of all targets, computed when they are asked for and never held together.

    Parameters
    ----------
    targets
        The matrices.
    function
        What gives the scores of one, ``(out, in)`` or with kernel dimensions; they are moved to the CPU.
    """

    def __init__(self, targets: Iterable[Target], function: Callable[[Target], Tensor]):
        self.targets = {target.name: target for target in targets}
        self.function = function

    def __getitem__(self, name: str) -> Tensor:
        return self.function(self.targets[name]).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)


def parameter_masks(targets: Iterable[Target], masks: Mapping[str, Tensor]) -> MaskSet:
    """Turn masks of matrices into masks of parameters.

    Parameters
    ----------
    targets
        The matrices.
    masks
        Target name → bool of the shape of its matrix; transposed ones are turned back, stacked experts put together.
        The packed bits of a :class:`MaskSet` are taken over where nothing has to be turned.
    """
    by_parameter: dict[str, list[Target]] = {}
    for target in targets:
        by_parameter.setdefault(target.parameter_name, []).append(target)
    packed = masks.state_dict() if isinstance(masks, MaskSet) else {}
    state: dict[str, Tensor] = {}
    for name, parts in by_parameter.items():
        if f"{name}:bits" in packed and not parts[0].transposed:
            state |= {key: packed[key] for key in (f"{name}:bits", f"{name}:shape")}
            continue
        whole = torch.ones(parts[0].parameter.shape, dtype=torch.bool)
        for target in parts:
            mask = masks[target.name].cpu()
            whole[... if target.index is None else target.index] = mask.transpose(0, 1) if target.transposed else mask
        state |= MaskSet({name: whole}).state_dict()
    return MaskSet.from_state_dict(state)
