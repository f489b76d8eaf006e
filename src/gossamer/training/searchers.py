"""Does a search for sparse networks find better ones than chance? The same trial for every searcher.

A searcher looks at an untrained network and returns masks. Each is asked for every sparsity and seed; what it returns
is trained by the same recipe from the same initial weights on the same data in the same order, next to the dense
parent. Searches differ in what they cost, so that forward passes are counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.core.nodes import Nodes, node_groups, node_masks, shrink
from gossamer.core.progress import track
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.training.random_search import SearchResult


@dataclass(frozen=True)
class LearningCurve:
    """How training went.

    Attributes
    ----------
    steps
        When the metric was measured, increasing; the last one is the end.
    metrics
        Its values, such as accuracy on held-out data; higher is better.
    """

    steps: Sequence[int]
    metrics: Sequence[float]

    @property
    def final(self) -> float:
        """Metric at the end."""
        return self.metrics[-1]

    @property
    def area(self) -> float:
        """Area under the curve divided by its length, from step 0 on, where the first value is taken to hold."""
        steps = torch.tensor([0, *self.steps], dtype=torch.float64)
        values = torch.tensor([self.metrics[0], *self.metrics], dtype=torch.float64)
        return float(torch.trapezoid(values, steps) / steps[-1])

    def steps_to(self, target: float) -> int | None:
        """First measured step at which the metric is at least `target`; None if never."""
        return next((step for step, value in zip(self.steps, self.metrics) if value >= target), None)


class Searcher(Protocol):
    """A dataclass with fields ``sparsity`` and ``seed``, which the comparison sets."""

    sparsity: float
    seed: int

    def search(self, model: nn.Module, data: Any) -> SearchResult | MaskSet:
        """Masks for an untrained model."""


Train = Callable[[nn.Module, int], LearningCurve]
"""``train(model, seed)`` trains in place; torch's generator has been seeded before."""


@dataclass(kw_only=True)
class NodeImportance:
    """Keep the nodes that turn out important once the parent has been trained, with their initial weights.

    A searcher that knows the future, to see whether a comparison can tell a good choice from chance: the importance
    of a node is the product of the norms of the weights that enter and leave it after training.

    Parameters
    ----------
    train
        Trains a copy of the parent.
    sparsity, seed
        Share of the nodes of each layer that go; seed of the training.
    trained
        Parents that have been trained already: they serve for every sparsity.
    """

    train: Train = field(repr=False)
    sparsity: float = 0.9
    seed: int = 0
    trained: dict[tuple[float, ...], tuple[nn.Module, int]] = field(default_factory=dict, repr=False)

    def search(self, model: nn.Module, data: Any = None) -> SearchResult:
        """Train a copy, and keep what mattered."""
        key = (self.seed, *(float(p.detach().double().sum()) for p in model.parameters()))
        if key not in self.trained:
            parent = copy.deepcopy(model)
            curve = _run(self.train, parent, self.seed)
            self.trained[key] = parent, 3 * curve.steps[-1]
        parent, cost = self.trained[key]
        nodes = important_nodes(parent, self.sparsity)
        return SearchResult(node_masks(model, nodes), nodes, torch.full((1,), torch.nan), 0, 0, cost)


def important_nodes(model: nn.Module, sparsity: float) -> Nodes:
    """Nodes of each hidden layer with the largest product of incoming and outgoing norms.

    Raises
    ------
    SparsityError
        If no node of a layer would be left.
    """
    parameters = dict(model.named_parameters())
    nodes: dict[str, Tensor] = {}
    for name, group in node_groups(model).items():
        squares = {0: torch.zeros(group.size), 1: torch.zeros(group.size)}
        for axis in group.axes:
            if axis.name in parameters and parameters[axis.name].dim() > 1:
                weight = parameters[axis.name].detach().movedim(axis.dim, 0)
                squares[axis.dim] += weight.reshape(group.size, -1).float().square().sum(1).cpu()
        stay = round((1 - sparsity) * group.size)
        if not stay:
            raise SparsityError(f"sparsity {sparsity} leaves none of the {group.size} nodes of {name}; ask for less")
        best = (squares[0] * squares[1]).topk(stay).indices
        nodes[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, best, True)
    return nodes


def compare_searchers(
    searchers: Mapping[str, Searcher],
    model_fn: Callable[[int], nn.Module],
    data_fn: Callable[[int], Any],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    train_fn: Train,
    *,
    target: float = 0.95,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train what each searcher finds, and the dense parent, under equal conditions.

    Parameters
    ----------
    searchers
        Name → searcher; its fields `sparsity` and `seed` are set for every trial.
    model_fn
        Seed → the untrained parent.
    data_fn
        Seed → what searchers may look at: batches of the training set, or of a validation set that does not judge.
    sparsities, seeds
        What to go through.
    train_fn
        The recipe. It must draw its data from torch's generator, or from the seed it is given.
    target
        Fraction of the parent's final metric, to which steps are counted.
    progress
        Whether to show a bar.

    Returns
    -------
    list of dict
        One row for each trial, of the parent (called ``dense``, sparsity 0) too: ``searcher``, ``sparsity`` (of
        nodes), ``weight_sparsity``, ``seed``, ``metric``, ``steps_to_target`` (None if never reached), ``area``
        (mean height of the learning curve), ``initial_score`` (of what was chosen, NaN if there is none) and
        ``forward_passes``. ``pandas.DataFrame(rows)`` makes a table of them.

    Raises
    ------
    ConfigurationError
        If a searcher is called ``dense``, or there are no seeds.
    """
    if "dense" in searchers or not seeds:
        raise ConfigurationError("give at least one seed, and call no searcher 'dense', which is the parent")
    rows = []
    trials = [(seed, None, "dense") for seed in seeds]
    trials += [(seed, sparsity, name) for seed in seeds for sparsity in sparsities for name in searchers]  # type: ignore[misc]
    parents: dict[int, float] = {}
    for seed, sparsity, name in track(trials, "training what was found", enabled=progress):
        parent = model_fn(seed)
        row = {"searcher": name, "sparsity": sparsity or 0.0, "weight_sparsity": 0.0, "seed": seed}
        cost, score, found = 0, float("nan"), None
        if sparsity is not None:
            searcher = dataclasses.replace(searchers[name], sparsity=sparsity, seed=seed)
            found = searcher.search(parent, data_fn(seed))
        if isinstance(found, SearchResult):
            cost, score = found.forward_passes, float(found.scores[found.best_index])
            row["weight_sparsity"] = found.weight_sparsity
        elif found is not None:
            row["weight_sparsity"] = found.sparsity
        curve = _trained(parent, found, train_fn, seed)
        parents.setdefault(seed, curve.final)
        row |= {"metric": curve.final, "steps_to_target": curve.steps_to(target * parents[seed]), "area": curve.area}
        rows.append(row | {"initial_score": score, "forward_passes": cost})
    return rows


def _trained(parent: nn.Module, found: SearchResult | MaskSet | None, train: Train, seed: int) -> LearningCurve:
    """Train the parent, the smaller network that nodes make of it, or the parent under masks."""
    if found is None:
        return _run(train, parent, seed)
    if isinstance(found, SearchResult) and found.nodes:
        return _run(train, shrink(parent, found.nodes), seed)
    with static_masks(parent, found.masks if isinstance(found, SearchResult) else found):
        return _run(train, parent, seed)


def _run(train: Train, model: nn.Module, seed: int) -> LearningCurve:
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        return train(model, seed)
