"""Edges between heads by what the model does without them: ACDC, and attribution of edges.

Nodes are the heads and the logits; an edge leads from a head to a head of a later layer, or to the logits. It is cut by
letting the reader alone see what the writer writes on the prompt's twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError
from gossamer.features.circuit_tasks import CircuitTask
from gossamer.features.head_paths import HeadPaths
from gossamer.features.heads import HeadGrid, by_length, evaluating


@dataclass(frozen=True, eq=False)
class EdgeSearch:
    """What ACDC leaves of a model.

    Attributes
    ----------
    edges
        Bool ``(heads, heads + 1)``: from head to head, and in the last column to the logits.
    runs
        Runs of the model, each on all prompts.
    """

    edges: Tensor
    runs: int

    @property
    def heads(self) -> Tensor:
        """Heads from which the logits are reached, bool ``(heads,)``."""
        reached = self.edges[:, -1].clone()
        for _ in range(len(reached)):
            reached |= (self.edges[:, :-1] & reached).any(1)
        return reached


def forward_edges(grid: HeadGrid) -> Tensor:
    """All edges that there can be, bool ``(heads, heads + 1)``."""
    layer = grid.layer_of
    return torch.cat([layer[:, None] < layer, torch.ones(len(grid), 1, dtype=torch.bool)], 1)


@torch.no_grad()
def acdc(model: nn.Module, task: CircuitTask, threshold: float, progress: bool = False) -> EdgeSearch:
    """Cut every edge whose loss changes the predictions by less than a threshold [Conmy et al., 2023, 2304.14997].

    Readers are visited from the logits back to the first layer, and the edges into each one after the other. A cut
    stays if the divergence of the predictions from those of the whole model rises by less than the threshold. Readers
    that nothing reads any more are passed over.

    Parameters
    ----------
    model
        See :class:`~gossamer.features.head_paths.HeadPaths`.
    task
        Prompts, and the twins with whose outputs edges are cut.
    threshold
        τ, in nats of the Kullback–Leibler divergence, mean over prompts.
    progress
        Whether to show a bar.

    Raises
    ------
    ConfigurationError
        If the threshold is negative.
    """
    if threshold < 0:
        raise ConfigurationError(f"threshold is {threshold}; it must be at least 0")
    with evaluating(model):
        cuts = _Cuts(model, task)
        possible = forward_edges(cuts.grid)
        kept, best, runs = possible.clone(), 0.0, 1
        for reader in track(reversed(range(possible.shape[1])), "cutting edges", possible.shape[1], progress):
            if reader < len(kept) and not kept[reader].any():
                kept[:, reader] = False
                continue
            for writer in reversed(possible[:, reader].nonzero()[:, 0].tolist()):
                kept[writer, reader] = False
                found = cuts.divergence(possible & ~kept)
                runs += 1
                if found - best < threshold:
                    best = found
                else:
                    kept[writer, reader] = True
    return EdgeSearch(kept, runs)


def acdc_scores(
    model: nn.Module, task: CircuitTask, thresholds: Sequence[float], progress: bool = False
) -> tuple[Tensor, int]:
    """For every head the highest of the thresholds at which ACDC keeps it (0 if none does), and the runs it took."""
    scores = torch.zeros(len(HeadGrid.of(model)))
    runs = 0
    for threshold in track(sorted(thresholds), "thresholds", enabled=progress):
        found = acdc(model, task, threshold)
        scores[found.heads] = threshold
        runs += found.runs
    return scores, runs


@torch.no_grad()
def edge_effects(model: nn.Module, task: CircuitTask, progress: bool = False) -> Tensor:
    """How far predictions diverge if one edge alone is cut, in nats, ``(heads, heads + 1)``: the exhaustive way."""
    with evaluating(model):
        cuts = _Cuts(model, task)
        possible = forward_edges(cuts.grid)
        effects = torch.zeros(possible.shape)
        for writer, reader in track(possible.nonzero().tolist(), "cutting each edge", enabled=progress):
            alone = torch.zeros_like(possible)
            alone[writer, reader] = True
            effects[writer, reader] = cuts.divergence(alone)
    return effects


class _Cuts:
    """Predictions of a model with edges cut, against those of the whole model."""

    def __init__(self, model: nn.Module, task: CircuitTask):
        self.grid = HeadGrid.of(model)
        self.batches = []
        for rows, tokens in by_length(task.positive):
            paths = HeadPaths(model, tokens[:1])
            paths.run(torch.stack([task.negative[int(row)].reshape(-1) for row in rows]))
            instead = torch.cat(paths.outputs, 2)
            self.batches.append((paths, tokens, instead, paths.run(tokens).log_softmax(-1)))
        self.total = len(task)
        self.first = [int((self.grid.layer_of < number).sum()) for number in range(len(self.grid.layers) + 1)]

    def divergence(self, cut: Tensor) -> float:
        """Mean divergence if these edges are cut, bool ``(heads, heads + 1)``."""
        total = 0.0
        for paths, tokens, instead, whole in self.batches:
            shift = partial(self._shift, cut=cut, paths=paths, instead=instead)
            found = paths.run(tokens, shift).log_softmax(-1)
            total += float((whole.exp() * (whole - found)).sum())
        return total / self.total

    def _shift(self, layer: int, cut: Tensor, paths: HeadPaths, instead: Tensor) -> Tensor | None:
        begin = self.first[layer]
        last = layer == len(self.grid.layers)
        part = cut[:begin, -1:] if last else cut[:begin, begin : self.first[layer + 1]]
        if not bool(part.any()):
            return None
        change = instead[:, :, :begin] - torch.cat(paths.outputs[:layer], 2)
        added = torch.einsum("btwd,wr->btrd", change, part.to(change.dtype))
        return added[:, :, 0] if last else added


def edge_attribution(model: nn.Module, task: CircuitTask) -> Tensor:
    """How much the metric would change if each edge were cut, to first order: ``(heads, heads + 1)``.

    The change in what the writer writes, times the gradient of the metric with respect to the stream that the reader
    reads, summed over tokens, and averaged over prompts [Syed et al., 2023, arXiv 2310.10348].

    Parameters
    ----------
    model
        See :class:`~gossamer.features.head_paths.HeadPaths`.
    task
        Prompts, and the twins from which the changes come.
    """
    grid = HeadGrid.of(model)
    scores = torch.zeros(len(grid), len(grid) + 1)
    with evaluating(model):
        for rows, tokens in by_length(task.positive):
            paths = HeadPaths(model, tokens[:1])
            with torch.no_grad():
                paths.run(torch.stack([task.negative[int(row)].reshape(-1) for row in rows]))
                instead = torch.cat(paths.outputs, 2)
            change, slopes = _slopes(paths, tokens, instead, task, rows)
            scores += torch.einsum("btwd,btrd->wr", change, slopes)
    return scores.masked_fill(~forward_edges(grid), 0) / len(task)


def _slopes(
    paths: HeadPaths, tokens: Tensor, instead: Tensor, task: CircuitTask, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Changes of what heads write, and gradients with respect to what heads, and the logits, read."""
    shape, width = tokens.shape, instead.shape[-1]
    added = [torch.zeros(*shape, layer.count, width, requires_grad=True) for layer in paths.grid.layers]
    added.append(torch.zeros(*shape, width, requires_grad=True))
    with torch.enable_grad():
        metric = task.score(paths.run(tokens, lambda layer: added[layer]), rows).sum()
        slopes = torch.autograd.grad(metric, added)
    change = instead - torch.cat([output.detach() for output in paths.outputs], 2)
    return change, torch.cat([*slopes[:-1], slopes[-1].unsqueeze(2)], 2)
