"""Move channels through a whole network so that filters which use the same inputs become neighbours.

Where kernels are dropped for groups of adjacent output channels, it matters who is whose neighbour, and that can be
chosen: a permutation of the channels of a layer, undone in all that read them, changes no output. For every free
dimension of the network the order is sought that keeps the largest sum of scores. Xu et al., 2023, arXiv 2310.19509;
the objective and the search are a reconstruction from its abstract: balanced clustering, then swaps with the exact
change of the objective until none improves it.

The order of input channels changes no group, so that one pass over the dimensions is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import ChannelGroup, find_channel_groups
from gossamer.core.kernel_groups import KernelGroup
from gossamer.core.progress import track
from gossamer.core.selection import dropped_count

_TRIED = 8  # most promising exchanges of a channel that are evaluated exactly
_PASSES = 20


def magnitudes(weight: Tensor) -> Tensor:
    """Sum of absolute weights of each kernel, ``(out, in)``."""
    return weight.detach().float().abs().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().float().abs()


@dataclass(frozen=True)
class Rearrangement:
    """What became of one dimension.

    Attributes
    ----------
    layers
        Weights whose output channels were ordered.
    order
        What was at ``order[i]`` is at place i now.
    before, after
        Sum of the scores that are kept.
    """

    layers: tuple[str, ...]
    order: Tensor
    before: float
    after: float


def rearrange_channels(
    model: nn.Module,
    pattern: KernelGroup,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    score: Callable[[Tensor], Tensor] = magnitudes,
    starts: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> list[Rearrangement]:
    """Order the channels of a network for a pattern, in place; its outputs stay what they are.

    Parameters
    ----------
    model
        A convolutional network that torch.fx can trace.
    pattern
        Size of the groups.
    sparsity
        Share of the units of each layer that will be dropped.
    layers
        Names of the weights that will be pruned; by default all convolutions and linear layers with full connections.
    score
        Weight → score of each of its kernels, ``(out, in)``.
    starts
        Random orders to begin with, beside the present one and one by clustering; the best result counts.
    seed
        Of these orders.
    progress
        Whether to show a bar.

    Returns
    -------
    list of Rearrangement
        One for each dimension that was free.

    Raises
    ------
    ModelError
        If the model cannot be traced.
    """
    parameters = dict(model.named_parameters())
    done = []
    for group in track(find_channel_groups(model), "ordering channels", enabled=progress):
        names = [name for name in group.outputs() if _counts(parameters[name], group, layers, name)]
        if not group.free or not names or pattern.size == 1:
            continue
        search = OrderSearch([score(parameters[name]) for name in names], pattern.size, sparsity)
        order = search.run(starts, seed)
        before, after = search.value(torch.arange(group.size)), search.value(order)
        group.permute_(model, order)
        done.append(Rearrangement(tuple(names), order, before, after))
    return done


def _counts(weight: Tensor, group: ChannelGroup, layers: Sequence[str] | None, name: str) -> bool:
    return weight.dim() in (2, 4) and weight.shape[1] > 1 and (layers is None or name in layers)


class OrderSearch:
    """Search for the order of output channels that keeps the most.

    The kept score of a layer is the sum of the K largest units, and a unit is the sum over a group of the scores of one
    input. That sum equals the minimum over t of ``K t + Σ max(unit − t, 0)``: at the present threshold it bounds every
    exchange from above, so that nearly all are dismissed without sorting, and the others are evaluated exactly.

    Parameters
    ----------
    scores
        Of each layer whose output channels are these, ``(out, in)``.
    size
        Channels of a group.
    sparsity
        Share of the units of each layer that is dropped.
    """

    def __init__(self, scores: Sequence[Tensor], size: int, sparsity: float):
        self.scores = [each.float() for each in scores]
        self.size, self.count = size, len(scores[0])
        self.groups = -(-self.count // size)
        self.kept = [self.groups * s.shape[1] - dropped_count(self.groups * s.shape[1], sparsity) for s in scores]

    def value(self, order: Tensor) -> float:
        """Sum of the scores that are kept with an order."""
        return sum(
            float(units.flatten().topk(kept).values.double().sum())
            for units, kept in zip(self._units(order), self.kept)
        )

    def run(self, starts: int = 2, seed: int = 0) -> Tensor:
        """Return the best order found: from the present one, from clusters, and from random ones."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.arange(self.count), self.clustered()]
        orders += [torch.randperm(self.count, generator=generator) for _ in range(starts)]
        return max((self.refine(order) for order in orders), key=self.value)

    def clustered(self) -> Tensor:
        """Balanced clusters: the strongest channel left, then those that add most where its group is kept."""
        profile = torch.cat([s / s.sum().clamp_min(1e-12) for s in self.scores], 1)
        density = sum(self.kept) / max(1, self.groups * profile.shape[1])
        left, order = torch.ones(self.count, dtype=torch.bool), []
        strength = profile.square().sum(1)
        wanted = max(1, round(density * profile.shape[1]))
        while left.any():
            chosen = int(strength.masked_fill(~left, -1).argmax())
            total = torch.zeros(profile.shape[1])
            for _ in range(min(self.size, int(left.sum()))):
                left[chosen] = False
                order.append(chosen)
                total += profile[chosen]
                inside = torch.zeros_like(total)
                inside[total.topk(wanted).indices] = 1
                chosen = int((profile @ inside).masked_fill(~left, -1).argmax())
        return torch.tensor(order)

    def refine(self, order: Tensor) -> Tensor:
        """Exchange channels of different groups as long as that keeps more."""
        order = order.clone()
        units = self._units(order)
        best = self.value(order)
        for _ in range(_PASSES):
            improved = False
            for place in range(self.count):
                found = self._exchange(order, units, place, best)
                if found is not None:
                    best, improved = found, True
            if not improved:
                break
        return order

    def _units(self, order: Tensor) -> list[Tensor]:
        """``(groups, in)`` for each layer."""
        missing = self.groups * self.size - self.count
        padded = [torch.nn.functional.pad(s[order], (0, 0, 0, missing)) for s in self.scores]
        return [each.view(self.groups, self.size, -1).sum(1) for each in padded]

    def _exchange(self, order: Tensor, units: list[Tensor], place: int, best: float) -> float | None:
        """Make the best exchange of the channel at `place` if there is one that improves; the new value."""
        mine = place // self.size
        theirs = torch.arange(self.count) // self.size
        bounds = torch.zeros(self.count)
        for s, u, kept in zip(self.scores, units, self.kept):
            threshold = u.flatten().topk(kept).values[-1]
            difference = s[order] - s[order[place]]  # what my group gains and the other one loses
            changed = (u[mine] + difference - threshold).relu().sum(1)
            changed += (u[theirs] - difference - threshold).relu().sum(1)
            present = (u - threshold).relu().sum(1)
            bounds += changed - present[mine] - present[theirs]
        bounds[theirs == mine] = 0
        tolerance = 1e-6 * max(1e-12, abs(best))
        candidates = bounds.topk(min(_TRIED, self.count))
        result: tuple[float, int] | None = None
        for bound, other in zip(candidates.values.tolist(), candidates.indices.tolist()):
            if bound <= tolerance or (result is not None and best + bound <= result[0]):
                break
            value = self._value_after(order, units, place, other)
            if value > best + tolerance and (result is None or value > result[0]):
                result = (value, other)
        if result is None:
            return None
        self._move(order, units, place, result[1])
        return result[0]

    def _value_after(self, order: Tensor, units: list[Tensor], place: int, other: int) -> float:
        total = 0.0
        for s, u, kept in zip(self.scores, units, self.kept):
            difference = s[order[other]] - s[order[place]]
            changed = u.clone()
            changed[place // self.size] += difference
            changed[other // self.size] -= difference
            total += float(changed.flatten().topk(kept).values.double().sum())
        return total

    def _move(self, order: Tensor, units: list[Tensor], place: int, other: int) -> None:
        for s, u in zip(self.scores, units):
            difference = s[order[other]] - s[order[place]]
            u[place // self.size] += difference
            u[other // self.size] -= difference
        order[[place, other]] = order[[other, place]]
