"""Train, remove some weights, go back, and again: the loop that finds lottery tickets, for any way of choosing.

What is removed stays removed. Between rounds the remaining weights return to where training started (Frankle &
Carbin, 2019, arXiv 1803.03635), to where they stood after a little training (Frankle et al., 2020, arXiv 1912.05671),
or stay where they are while the learning rate starts again (Renda, Frankle & Carbin, 2020, arXiv 2003.02389).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gossamer.core.masking import LazyScores, parameter_masks, static_masks
from gossamer.core.masks import MaskSet
from gossamer.core.randomness import generator_for
from gossamer.core.selection import keep_highest_jointly
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, SparsityError

Scores: TypeAlias = Mapping[str, Tensor]
"""Target name → scores of the shape of its matrix, on the CPU; higher is more worth keeping."""


@dataclass(frozen=True)
class Round:
    """What a choice of weights may look at when a round of training has ended.

    Attributes
    ----------
    number
        0 for the first round.
    model
        As training left it; removed weights are zero.
    targets
        The matrices that may lose weights.
    alive
        Target name → bool, True where a weight is still there.
    initial, start
        Target name → weights before the first round, and at the start of this one.
    generator
        For choices by chance; on the CPU, the same one in all rounds.
    """

    number: int
    model: nn.Module
    targets: Sequence[Target]
    alive: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    generator: torch.Generator

    @property
    def remaining(self) -> int:
        """Number of weights that are still there."""
        return sum(int(mask.sum()) for mask in self.alive.values())

    @property
    def total(self) -> int:
        """Number of weights that there were at first."""
        return sum(mask.numel() for mask in self.alive.values())

    def scores(self, function: Callable[[Target], Tensor]) -> LazyScores:
        """Scores of all matrices, computed when they are asked for."""
        return LazyScores(self.targets, function)

    def movement(self, target: Target, *, since: str = "start") -> Tensor:
        """How far each weight of a matrix has moved, ``|w − w₀|``, float32.

        Parameters
        ----------
        target
            One of :attr:`targets`.
        since
            ``"start"`` of this round or ``"initial"`` state of the model.
        """
        earlier = (self.start if since == "start" else self.initial)[target.name]
        return (target.matrix() - earlier.to(target.parameter.device)).abs().float()


Choice: TypeAlias = Callable[[Round], Mapping[str, Tensor]]
"""Masks of what remains after a round, by target; part of what was alive."""


def drop_lowest(alive: Mapping[str, Tensor], scores: Scores, count: int) -> dict[str, Tensor]:
    """Remove the `count` lowest scores among the weights that are alive, all matrices together.

    Parameters
    ----------
    alive
        Target name → bool.
    scores
        Of the same names and shapes; asked for a few times each. Infinity protects a weight.
    count
        How many to remove at most: only weights of finite score go.

    Returns
    -------
    dict of str to Tensor
        New masks; ties go by the order of the mapping, then by position.

    Raises
    ------
    SparsityError
        If `count` is negative or more than are alive.
    """
    remaining = sum(int(mask.sum()) for mask in alive.values())
    if not 0 <= count <= remaining:
        raise SparsityError(f"cannot remove {count} of {remaining} remaining weights")
    living = _Living(alive, scores)
    count = min(count, sum(int((values < torch.inf).sum()) for values in living.values()) - living.removed)
    return keep_highest_jointly(living, living.removed + count)


def drop_in_turn(alive: Mapping[str, Tensor], *parts: tuple[Scores, int]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Let several criteria remove their shares, one after the other, each from what those before it left.

    Parameters
    ----------
    alive
        Target name → bool.
    parts
        Scores and how many weights to remove by them. Where a later criterion finds too few weights of finite score,
        the first one removes the rest, so that the total stays exact.

    Returns
    -------
    dict, tuple of int
        New masks, and how many weights each criterion removed.

    Raises
    ------
    SparsityError
        If the counts are negative, or together more than are alive.
    """
    masks, removed = dict(alive), [0] * len(parts)
    counts = [sum(int(mask.sum()) for mask in masks.values())]
    for place, (scores, count) in enumerate(parts):
        masks = drop_lowest(masks, scores, count)
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
        removed[place] = counts[-2] - counts[-1]
    missing = sum(count for _, count in parts) - sum(removed)
    if missing:
        masks = drop_lowest(masks, parts[0][0], missing)
        removed[0] += missing
    return masks, tuple(removed)


class _Living(Mapping[str, Tensor]):
    """Scores under which a removed weight goes before any that is alive."""

    def __init__(self, alive: Mapping[str, Tensor], scores: Scores):
        self.alive, self.scores = alive, scores
        self.removed = sum(int((~mask).sum()) for mask in alive.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[name].masked_fill(~self.alive[name], -torch.inf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.alive)

    def __len__(self) -> int:
        return len(self.alive)


def prune_in_rounds(
    model: nn.Module,
    train: Callable[[nn.Module, MaskSet], Any],
    choose: Choice,
    rounds: int,
    *,
    rewind: Callable[[nn.Module], Any] | None = None,
    restart: bool = True,
    retrain: bool = False,
    pretrained: bool = False,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
) -> list[MaskSet]:
    """Train, choose what remains, and go back, `rounds` times.

    Parameters
    ----------
    model
        The initial or pretrained model; it is copied and stays as it is.
    train
        ``train(copy, masks)`` trains in place; removed weights are held at zero. The optimiser must be made inside.
    choose
        What remains after a round.
    rounds
        How many; at least 1.
    rewind
        Trains the copy for a while before everything starts; later rounds return to that state. By default they
        return to `model`.
    restart
        Whether weights return at all; if not, each round goes on from where the last one left them.
    retrain
        Whether the copy is trained under the new masks within the same round too, before it returns.
    pretrained
        Whether the model is trained already: a round then begins with the choice, and trains under what it chose.
    seed
        Of torch's generator in every training, and of the choice.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`.

    Returns
    -------
    list of MaskSet
        What was left after each round.

    Raises
    ------
    ConfigurationError
        If there are no rounds, or training moved a removed weight.
    """
    if rounds < 1:
        raise ConfigurationError(f"rounds is {rounds}; at least 1 is needed")
    ticket = copy.deepcopy(model)
    targets = find_targets(ticket, include, exclude, heads=heads)
    alive: Mapping[str, Tensor] = {target.name: torch.ones(target.shape, dtype=torch.bool) for target in targets}
    generator = generator_for("pruning in rounds", seed)
    found: list[MaskSet] = []
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        if rewind is not None:
            rewind(ticket)
        initial = _copy_of(ticket)
        start, masks = initial, parameter_masks(targets, alive)
        for number in range(rounds):
            if not pretrained:
                _train(ticket, train, masks, seed)
            earlier = (_matrices(targets, initial), _matrices(targets, start))
            alive = choose(Round(number, ticket, targets, alive, *earlier, generator))
            masks = parameter_masks(targets, alive)
            found.append(masks)
            if restart:
                ticket.load_state_dict(initial)
            if retrain or pretrained:
                _train(ticket, train, masks, seed)
            if restart:
                ticket.load_state_dict(initial)
            else:
                masks.apply_(ticket)
                start = _copy_of(ticket)
    return found


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _matrices(targets: Sequence[Target], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    def matrix(target: Target) -> Tensor:
        weight = state[target.parameter_name]
        weight = weight if target.index is None else weight[target.index]
        return weight.transpose(0, 1) if target.transposed else weight

    return LazyScores(targets, matrix)


def _train(model: nn.Module, train: Callable[[nn.Module, MaskSet], Any], masks: MaskSet, seed: int) -> None:
    torch.manual_seed(seed)
    with static_masks(model, masks):
        train(model, masks)
