"""Random search: look at many random sub-networks before training, train the one that looks best.

Farahani, 2024, arXiv 2403.08265. In *node space* a candidate keeps exactly ``k_l = round((1 − s) h_l)`` nodes of each
hidden layer and inherits their initial weights; candidates are compared by the loss of the untrained sub-network. The
finding is that the winner trains no better than any other, which makes this the bar that a search for sparse networks
has to clear: :func:`gossamer.training.searchers.compare_searchers` holds others to it.

The paper's budget, score and networks are not published in full; what stands here follows the method's description.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gossamer.core.masking import parameter_masks
from gossamer.core.masks import MaskSet
from gossamer.core.nodes import Nodes, gather_nodes, node_groups, node_masks, shrink
from gossamer.core.patterns import Unstructured
from gossamer.core.randomness import generator_for
from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, SparsityError

Space = Literal["node", "edge"]
Score = Literal["init_loss", "accuracy", "gradient_norm"]
Batches: TypeAlias = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
_Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class SearchResult:
    """The candidate that won, and what was seen of all of them.

    Attributes
    ----------
    masks
        Of the winner. In node space also of biases and normalisation, and of the layers that read the nodes.
    nodes
        Which nodes stay, for :func:`gossamer.core.nodes.shrink`; empty in edge space.
    scores
        Of all candidates in the order in which they were drawn, ``(n_trials,)``; NaN where one could not be scored.
    best_index
        Which one won.
    skipped
        How many scores are NaN.
    forward_passes
        What the search cost: runs of a candidate on a batch; a backward run counts as two.
    """

    masks: MaskSet
    nodes: Nodes
    scores: Tensor
    best_index: int
    skipped: int
    forward_passes: int

    @property
    def weight_sparsity(self) -> float:
        """Share of zeros in the matrices that lose any; in node space more than the share of nodes that go."""
        return MaskSet({name: mask for name, mask in self.masks.items() if mask.dim() > 1}).sparsity


@register(
    "random-search",
    paper="random-search",
    when="during training",
    granularity="channels",
    timing="before training",
    path=("dense-to-sparse",),
    topology="static",
    criterion=("search",),
    allocation="uniform",
    patterns=("channels",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class RandomSearch(Sparsifier):
    """Draw sub-networks at random, keep the one with the best score before training, and train that.

    Parameters
    ----------
    n_trials
        T: how many are drawn. 1 is the random baseline, and what is drawn first does not depend on T.
    sparsity
        s: share of the nodes of each hidden layer (or of the weights of each layer) that go.
    space
        ``"node"`` or ``"edge"``.
    score
        ``"init_loss"`` (lowest wins), ``"accuracy"``, or ``"gradient_norm"`` (highest wins).
    warm_up, learning_rate
        Steps of gradient descent before a candidate is scored, on the batches in turn, and their size.
    loss
        ``loss(outputs, targets)``, a mean over the batch; cross-entropy by default.
    at_once
        How many candidates are run side by side.
    stream
        Which of several independent sequences of draws under the same seed.
    data
        For :meth:`attach`: what :meth:`search` gets there.
    include, exclude, heads
        In edge space, which layers. Node space has all layers that torch.fx can follow.
    seed
        Of the generator that draws, and of nothing else.

    Raises
    ------
    ConfigurationError
        If a name is unknown or a number out of range.
    """

    n_trials: int = 100
    sparsity: float = 0.9
    space: Space = "node"
    score: Score = "init_loss"
    warm_up: int = 0
    learning_rate: float = 0.1
    loss: Callable[[Tensor, Tensor], Tensor] = field(default=nn.functional.cross_entropy, repr=False)
    at_once: int = 50
    stream: int = 0
    data: Batches | None = field(default=None, repr=False)
    heads: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("space", Space), ("score", Score)):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {', '.join(get_args(known))}")
        for name, lowest in (("n_trials", 1), ("warm_up", 0), ("at_once", 1), ("stream", 0)):
            if getattr(self, name) < lowest:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")

    def search(self, model: nn.Module, data: Batches | None = None) -> SearchResult:
        """Draw, score and choose. The model stays as it is, and so do torch's own generators.

        Parameters
        ----------
        model
            The untrained parent. Batch normalisations normalise by the batch while it is scored, everything else is
            in evaluation mode.
        data
            ``(inputs, targets)`` or batches of them, from the training set. Not needed for a single trial.

        Raises
        ------
        SparsityError
            If no node of a layer would be left.
        CalibrationError
            If there is no data to choose by.
        NonFiniteError
            If no candidate has a score.
        """
        draws = _NodeSpace(model, self) if self.space == "node" else _EdgeSpace(model, self)
        batches = _batches(data)
        if self.n_trials > 1 and not batches:
            raise CalibrationError("no data to choose among random networks by; give a batch of the training set")
        scores = torch.full((self.n_trials,), math.nan, dtype=torch.float64)
        if batches:
            for start in range(0, self.n_trials, self.at_once):
                part = slice(start, min(start + self.at_once, self.n_trials))
                scores[part] = self._scores(draws.template, *draws.tensors(part), batches).cpu()
            if scores.isnan().all():
                raise NonFiniteError(f"all {self.n_trials} scores are NaN; look for NaN in the weights or the data")
        worst = torch.inf if self.score == "init_loss" else -torch.inf
        ranked = scores.nan_to_num(nan=worst, posinf=torch.inf, neginf=-torch.inf)
        best = int(ranked.argmin() if self.score == "init_loss" else ranked.argmax())
        masks, nodes = draws.masks(best)
        each = (3 if self.score == "gradient_norm" else 1) * len(batches) + 3 * self.warm_up * bool(batches)
        skipped = int(scores.isnan().sum()) if batches else 0
        return SearchResult(masks, nodes, scores, best, skipped, self.n_trials * each)

    def generator(self) -> torch.Generator:
        """What draws, at its beginning."""
        return generator_for(f"random search {self.stream}", self.seed)

    def start(self, training: SparseTraining) -> None:
        """Search, and train under the winner's masks."""
        found = self.search(training.model, self.data)
        masks = {}
        for name, target in training.targets.items():
            if target.parameter_name in found.masks:
                mask = found.masks[target.parameter_name]
                mask = mask if target.index is None else mask[target.index]
                masks[name] = mask.transpose(0, 1) if target.transposed else mask
        training.assign(masks)

    def _scores(self, template: nn.Module, parameters: _Tensors, buffers: _Tensors, masks: _Tensors, batches) -> Tensor:  # type: ignore[no-untyped-def]
        """Scores of some candidates, ``(candidates,)``; their tensors are stacked along the first dimension."""

        def loss_of(parameters: _Tensors, buffers: _Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
            return self.loss(functional_call(template, (parameters, buffers), (inputs,)), targets)

        def hits_of(parameters: _Tensors, buffers: _Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(template, (parameters, buffers), (inputs,))
            return (outputs.argmax(-1) == targets).double().mean()

        dims = (0, 0, None, None)
        slope = vmap(grad(loss_of), dims)

        def gradient(inputs: Tensor, targets: Tensor) -> _Tensors:
            found = slope(parameters, buffers, inputs, targets)
            return {name: g * masks[name] if name in masks else g for name, g in found.items()}

        for step in range(self.warm_up):
            inputs, targets = batches[step % len(batches)]
            moved = gradient(inputs, targets)
            parameters = {name: p - self.learning_rate * moved[name] for name, p in parameters.items()}
        total = sum(len(inputs) for inputs, _ in batches)
        if self.score == "gradient_norm":
            sums: _Tensors = {}
            for inputs, targets in batches:
                for name, g in gradient(inputs, targets).items():
                    sums[name] = sums.get(name, 0) + g.double() * (len(inputs) / total)
            return sum(g.flatten(1).square().sum(1) for g in sums.values()).sqrt()  # type: ignore[union-attr]
        value = vmap(hits_of if self.score == "accuracy" else loss_of, dims)
        with torch.no_grad():
            values = [value(parameters, buffers, *batch).double() * (len(batch[0]) / total) for batch in batches]
        return torch.stack(values).sum(0)


def _batches(data: Batches | None) -> list[tuple[Tensor, Tensor]]:
    if data is None:
        return []
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        data = [data]
    return [(batch[0], batch[1]) for batch in data]


def _ready(template: nn.Module) -> nn.Module:
    """Evaluation mode, except that normalisations, whose averages mean nothing yet, use the batch."""
    template.eval()
    for module in template.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return template


class _NodeSpace:
    """Sub-networks of the same size: each is run as the small dense network that it is."""

    def __init__(self, model: nn.Module, method: RandomSearch):
        self.model = model
        self.sizes = {name: group.size for name, group in node_groups(model).items()}
        stay = {name: round((1 - method.sparsity) * size) for name, size in self.sizes.items()}
        for name, kept in stay.items():
            if not kept:
                raise SparsityError(
                    f"sparsity {method.sparsity} leaves none of the {self.sizes[name]} nodes of {name}; ask for less"
                )
        generator = method.generator()
        drawn = [
            {
                name: torch.randperm(size, generator=generator)[: stay[name]].sort().values
                for name, size in self.sizes.items()
            }
            for _ in range(method.n_trials)
        ]
        self.rows = {name: torch.stack([each[name] for each in drawn]) for name in stay}
        self.template = _ready(shrink(model, self.nodes(0)))

    def nodes(self, index: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(self.sizes[name], dtype=torch.bool).index_fill_(0, rows[index], True)
            for name, rows in self.rows.items()
        }

    def tensors(self, part: slice) -> tuple[_Tensors, _Tensors, _Tensors]:
        found = gather_nodes(self.model, {name: rows[part] for name, rows in self.rows.items()})
        buffers = {name: found[name].clone() for name, _ in self.model.named_buffers()}
        return {name: found[name] for name, _ in self.model.named_parameters()}, buffers, {}

    def masks(self, index: int) -> tuple[MaskSet, Mapping[str, Tensor]]:
        nodes = self.nodes(index)
        return node_masks(self.model, nodes), nodes


class _EdgeSpace:
    """Sub-networks of single weights: each is run as the parent with zeros."""

    def __init__(self, model: nn.Module, method: RandomSearch):
        self.model = model
        self.targets = method.targets(model)
        generator = method.generator()
        pattern = Unstructured("layer")
        self.drawn = [
            parameter_masks(
                self.targets,
                {
                    t.name: pattern.select(torch.rand(t.shape, generator=generator), method.sparsity)
                    for t in self.targets
                },
            )
            for _ in range(method.n_trials)
        ]
        self.template = _ready(copy.deepcopy(model))

    def tensors(self, part: slice) -> tuple[_Tensors, _Tensors, _Tensors]:
        drawn = self.drawn[part]
        device = self.targets[0].parameter.device
        masks = {name: torch.stack([each[name] for each in drawn]).to(device) for name in drawn[0]}
        parameters = {
            name: p.detach() * masks[name] if name in masks else p.detach().expand(len(drawn), *p.shape)
            for name, p in self.model.named_parameters()
        }
        buffers = {name: b.expand(len(drawn), *b.shape).clone() for name, b in self.model.named_buffers()}
        return parameters, buffers, masks

    def masks(self, index: int) -> tuple[MaskSet, Mapping[str, Tensor]]:
        return self.drawn[index], {}
