"""Units of a hidden layer have no order: bring those of one network into the order of another.

Two networks that compute the same may look far apart because their units are numbered differently. Weight matching
[Ainsworth, Hayase & Srinivasa, 2023, arXiv 2209.04836, algorithm 1] goes through the groups of channels that can only
move together, and assigns the units of each so that the weights of both networks agree best, until nothing changes.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import Axis, ChannelGroup, find_channel_groups
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, MissingDependencyError, TargetError

_M = TypeVar("_M", bound=nn.Module)


def align_permutation(model_a: nn.Module, model_b: _M, *, passes: int = 100, seed: int = 0) -> _M:
    """Renumber the hidden units of `model_b` so that its weights lie as near to `model_a`'s as they can.

    Parameters
    ----------
    model_a
        Whose order is taken.
    model_b
        Of the same shape; it stays as it is.
    passes
        At most how many times all groups are gone through.
    seed
        Of the order in which they are.

    Returns
    -------
    nn.Module
        A copy of `model_b` that computes the same function. Its distance from `model_a` is never larger than before.

    Raises
    ------
    ModelError
        If torch.fx cannot trace the model.
    TargetError
        If the models differ in shape.
    ConfigurationError
        If `passes` is below 1.
    MissingDependencyError
        If scipy is not installed.
    """
    if passes < 1:
        raise ConfigurationError(f"passes is {passes}; at least 1 is needed")
    first = dict(model_a.named_parameters())
    aligned = copy.deepcopy(model_b)
    second = dict(aligned.named_parameters())
    for name in sorted(first.keys() | second.keys()):
        shapes = [tuple(p[name].shape) if name in p else None for p in (first, second)]
        if shapes[0] != shapes[1]:
            raise TargetError(f"{name!r} is {shapes[0]} and {shapes[1]}: units of different networks do not correspond")
    groups = [group for group in find_channel_groups(aligned) if group.free and group.outputs()]
    generator = generator_for("order of weight matching", seed)
    for _ in range(passes):
        moved = False
        for place in torch.randperm(len(groups), generator=generator).tolist():
            order = _best_order(groups[place], first, second)
            if not torch.equal(order, torch.arange(len(order))):
                groups[place].permute_(aligned, order)
                moved = True
        if not moved:
            break
    return aligned


def _best_order(group: ChannelGroup, first: dict[str, nn.Parameter], second: dict[str, nn.Parameter]) -> Tensor:
    """Which unit of the second network comes to each place; the present order wherever it is as good."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependencyError("scipy", "graphs", "matching the units of two networks") from None
    agreement = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        if axis.name in first:
            agreement += _rows(first[axis.name], axis, group.size) @ _rows(second[axis.name], axis, group.size).T
    rows, columns = linear_sum_assignment(agreement.numpy(), maximize=True)
    order = torch.as_tensor(columns)
    gained = float(agreement[rows, order].sum() - agreement.diagonal().sum())
    # rounding must not keep equal units changing places for ever
    return order if gained > 1e-9 * float(agreement.abs().sum()) else torch.arange(group.size)


def _rows(tensor: Tensor, axis: Axis, size: int) -> Tensor:
    """All that belongs to each unit, a row each, float64 on the CPU."""
    return tensor.detach().double().cpu().movedim(axis.dim, 0).reshape(size, -1)
