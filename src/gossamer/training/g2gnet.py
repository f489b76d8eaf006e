"""Groups of neurons that talk much within and little between: a sparse network with a plan, and how it is rewired.

Cortical neurons form ensembles, and an ensemble mostly reads its counterpart in the area before. G2GNet gives a
feedforward network this wiring: the units of every layer fall into groups, group i of a layer is fully connected to
group i of the next, and any other pair of units only with a small probability. While it trains, edges may move. Where
activity of two units is correlated an edge is worth having (Hebb), where it is not it may go; magnitude and chance are
the other two rules, for either end of the exchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.core.registry import register
from gossamer.core.selection import keep_highest
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier
from gossamer.core.targets import Target
from gossamer.core.topology import GROWTHS, Scores, magnitude, random_numbers
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError, check_sparsity
from gossamer.training.hebbian import HebbianScore
from gossamer.training.sparse_rnn import gates

Grouping = Literal["index", "random", "mixer"]
Prune = Literal["set", "random", "hebbian"]
Growth = Literal["hebbian", "random", "gradient"]


def unit_groups(
    units: int, groups: int, grouping: Grouping = "index", layer: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Which group each unit belongs to.

    Parameters
    ----------
    units, groups
        Numbers of both; where the second does not divide the first, sizes differ by one.
    grouping
        ``"index"``: contiguous blocks, which keep neighbouring pixels together; ``"random"``: blocks of a random
        order; ``"mixer"``: blocks in even layers, every `groups`-th unit in odd ones, so that what a group of one layer
        knows reaches all groups of the next.
    layer
        Number of the layer, for ``"mixer"``.
    generator
        For ``"random"``, on the CPU.

    Returns
    -------
    Tensor
        ``(units,)`` int64 in [0, groups).

    Raises
    ------
    ConfigurationError
        If there are more groups than units, or none.
    UnknownNameError
        If there is no such grouping.
    """
    if grouping not in get_args(Grouping):
        raise UnknownNameError("grouping", grouping, get_args(Grouping))
    if not 1 <= groups <= units:
        raise ConfigurationError(f"groups is {groups} for {units} units; it must lie in [1, {units}]")
    place = torch.arange(units)
    if grouping == "mixer" and layer % 2:
        return place % groups
    blocks = place * groups // units
    return blocks[torch.randperm(units, generator=generator)] if grouping == "random" else blocks


def g2g_mask(
    out_features: int,
    in_features: int,
    groups: int = 8,
    p_inter: float = 0.15,
    grouping: Grouping = "index",
    *,
    layer: int = 0,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask of a layer: all edges within a group, others with a probability.

    Konstantaropoulos, Smirnakis & Papadopouli, 2025, "Neuro-inspired Ensemble-to-Ensemble Communication Primitives for
    Sparse and Efficient ANNs", arXiv 2508.14140. The expected density is 1/G + (1 − 1/G)·p′.

    Parameters
    ----------
    out_features, in_features
        Shape of the weight.
    groups
        G.
    p_inter
        p′, in [0, 1]; 0 leaves a block-diagonal matrix, 1 a dense one.
    grouping, layer
        See :func:`unit_groups`; both sides are grouped in the same way.
    exact
        Whether to draw exactly round(p′ · pairs) edges between groups instead of each by itself.
    generator
        On the CPU.

    Returns
    -------
    Tensor
        ``(out_features, in_features)`` bool.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """
    ends = [unit_groups(units, groups, grouping, layer, generator) for units in (out_features, in_features)]
    return mask_of_groups(*ends, p_inter, exact=exact, generator=generator)


def mask_of_groups(
    out_groups: Tensor,
    in_groups: Tensor,
    p_inter: float,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`g2g_mask` for groups that are given, ``(out,)`` and ``(in,)``."""
    if not 0 <= p_inter <= 1:
        raise ConfigurationError(f"p_inter is {p_inter}; it is a probability in [0, 1], such as 0.15")
    within = out_groups.unsqueeze(1) == in_groups
    drawn = torch.rand(within.shape, generator=generator)
    if not exact:
        return within | (drawn < p_inter)
    pairs = int((~within).sum())
    wanted = int(within.sum()) + round(p_inter * pairs)
    return keep_highest(drawn.masked_fill(within, 2.0).view(1, -1), within.numel() - wanted).view(within.shape)


def inter_probability(sparsity: float, groups: int) -> float:
    """p′ at which the expected sparsity (1 − 1/G)(1 − p′) is the given one.

    Raises
    ------
    SparsityError
        If the groups alone have more edges than that.
    """
    check_sparsity(sparsity)
    between = 1 - 1 / groups
    if sparsity > between + 1e-9:
        raise SparsityError(f"sparsity is {sparsity}; {groups} groups reach at most {between:.4g}, ask for more groups")
    return max(0.0, 1 - sparsity / between) if between else 1.0


@register(
    "g2gnet",
    paper="g2gnet",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude", "activation", "structure"),
    allocation="given",
)
@dataclass(kw_only=True)
class G2G(Sparsifier):
    """Wire every layer by groups, and exchange edges by magnitude, correlation or chance while it trains.

    Konstantaropoulos, Smirnakis & Papadopouli, 2025, arXiv 2508.14140: 8 groups, p′ = 0.15, and, if edges move, a tenth
    of them every 1000 steps. The output layer stays dense unless `heads`.

    Parameters
    ----------
    sparsity
        Of every layer, from which p′ follows; at most 1 − 1/G. Numbers of edges are exact.
    groups
        G.
    p_inter
        p′, instead of the sparsity.
    grouping
        See :func:`unit_groups`. Random groups of a layer's outputs are those of the next layer's inputs.
    every
        Steps between exchanges; None for a wiring that stays.
    begin, end
        Exchanges happen after the first and before the second of these steps; None for no end.
    exchange
        Share of a layer's edges that move.
    prune
        Which go: ``"set"`` the smallest weights, ``"random"``, ``"hebbian"`` the least correlated.
    growth
        Which come: ``"hebbian"`` the most correlated, ``"random"``, ``"gradient"`` the largest gradients.
    correlation
        See :class:`~gossamer.training.hebbian.HebbianScore`.
    batches
        Forward passes before an exchange over which correlations are taken.
    """

    sparsity: float = 0.74375
    groups: int = 8
    p_inter: float | None = None
    grouping: Grouping = "index"
    every: int | None = None
    begin: int = 0
    end: int | None = None
    exchange: float = 0.1
    prune: Prune = "set"
    growth: Growth = "hebbian"
    correlation: Literal["absolute", "signed", "residual"] = "absolute"
    batches: int = 20

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigurationError(f"groups is {self.groups}; it must be at least 1")
        if self.p_inter is None:
            inter_probability(self.sparsity, self.groups)
        elif not 0 <= self.p_inter <= 1:
            raise ConfigurationError(f"p_inter is {self.p_inter}; it is a probability in [0, 1], such as 0.15")
        else:
            self.sparsity = (1 - 1 / self.groups) * (1 - self.p_inter)
        super().__post_init__()
        for kind, name, known in (("prune", self.prune, Prune), ("grow", self.growth, Growth)):
            if name not in get_args(known):
                raise UnknownNameError(f"rule to {kind} by", name, get_args(known))
        if self.grouping not in get_args(Grouping):
            raise UnknownNameError("grouping", self.grouping, get_args(Grouping))
        if not 0 <= self.exchange <= 1:
            raise ConfigurationError(f"exchange is {self.exchange}; it must be a share in [0, 1]")
        late = self.end is not None and self.end <= self.begin
        if (self.every is not None and self.every < 1) or self.begin < 0 or late or self.batches < 1:
            raise ConfigurationError(
                f"begin, end, every and batches are {self.begin}, {self.end}, {self.every} and {self.batches}; "
                f"0 <= begin < end, every >= 1 and batches >= 1 are needed"
            )
        self._correlations: WeakKeyDictionary[SparseTraining, HebbianScore] = WeakKeyDictionary()

    def start(self, training: SparseTraining) -> None:
        """Draw the wiring."""
        masks, ends = draw_wiring(
            list(training.targets.values()), self.sparsity, self.groups, self.grouping, training.generator
        )
        training.assign(masks)
        for name, (out_groups, in_groups) in ends.items():
            training.extra[f"groups of {name}, out"] = out_groups
            training.extra[f"groups of {name}, in"] = in_groups

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> SparseTraining:
        """Start, or go on, and listen to the layers if correlations will be needed; see :meth:`Sparsifier.attach`."""
        training = super().attach(model, optimizer, state)
        if self.every is not None and "hebbian" in (self.prune, self.growth):
            score = HebbianScore(self.correlation, when=self._listens)
            try:
                score.attach(training)
            except ConfigurationError:
                training.finalize()
                raise
            self._correlations[training] = score
        return training

    def _exchanges(self, step: int) -> bool:
        if self.every is None or (self.end is not None and step >= self.end):
            return False
        return step > self.begin and (step - self.begin) % self.every == 0

    def _listens(self, step: int) -> bool:
        """Whether the forward passes after this many steps count."""
        return any(self._exchanges(step + ahead) for ahead in range(1, self.batches + 1))

    def wants_gradient(self, step: int) -> bool:
        """At exchanges that grow by the gradient."""
        return self.growth == "gradient" and self._exchanges(step)

    def change(self, training: SparseTraining) -> None:
        """Exchange edges, if it is time."""
        if not self._exchanges(training.step):
            return
        correlation = self._correlations.get(training)
        rules: dict[str, Scores | None] = {"set": magnitude, "random": random_numbers, "hebbian": correlation}
        chosen = correlation if self.growth == "hebbian" else GROWTHS[self.growth]
        assert chosen is not None
        training.exchange(self.exchange, chosen, rules[self.prune])
        if correlation:
            correlation.forget()

    def finish(self, training: SparseTraining) -> None:
        """Stop listening."""
        correlation = self._correlations.pop(training, None)
        if correlation:
            correlation.detach()

    def phase(self, step: int) -> Phase:  # noqa: D102
        if self.every is None or (self.end is not None and step >= self.end):
            return "frozen"
        return "warm-up" if step < self.begin else "explore"


def draw_wiring(
    targets: Sequence[Target],
    sparsity: float,
    groups: int,
    grouping: Grouping = "index",
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Masks of the layers of a model, with exact numbers of edges.

    Parameters
    ----------
    targets
        In the order in which the signal passes them; of a convolution, channels are the units, and all gates of a
        recurrent unit belong to its group.
    sparsity
        Of every layer.
    groups, grouping, generator
        See :func:`unit_groups`.

    Returns
    -------
    tuple
        Target name → mask of its shape, and target name → groups of its outputs and inputs.

    Raises
    ------
    SparsityError
        If the groups alone have more edges in a layer.
    ConfigurationError
        If a layer has fewer units than there are groups.
    """
    masks: dict[str, Tensor] = {}
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    before: Tensor | None = None
    for number, target in enumerate(targets):
        inputs, stacked = target.shape[1], gates(target.module)
        out = target.shape[0] // stacked
        if min(out, inputs) < groups:
            raise ConfigurationError(
                f"{target.name} has shape {tuple(target.shape)} and groups is {groups}; exclude it or take fewer groups"
            )
        reused = grouping == "random" and before is not None and len(before) == inputs
        in_groups = before if reused else unit_groups(inputs, groups, grouping, number, generator)
        before = unit_groups(out, groups, grouping, number, generator)
        ends[target.name] = (before.repeat(stacked), in_groups)
        between = float((before.unsqueeze(1) != in_groups).float().mean())
        if sparsity > between + 0.5 / (stacked * out * inputs):
            raise SparsityError(
                f"sparsity is {sparsity:.4g}, and {target.name} has only {between:.4g} of its edges between groups; "
                f"ask for less, or for more groups"
            )
        p_inter = min(1.0, max(0.0, 1 - sparsity / between)) if between else 1.0
        flat = mask_of_groups(*ends[target.name], p_inter, exact=True, generator=generator)
        masks[target.name] = flat.view(*flat.shape, *[1] * (len(target.shape) - 2)).expand(target.shape).contiguous()
    return masks, ends


def widen(training: SparseTraining) -> None:
    """Make up for missing edges, so that the signal of a sparse network starts as strong as that of a dense one.

    Weights of a unit are multiplied by the root of how many times more inputs it would have if it were dense.

    Parameters
    ----------
    training
        Any run that has just been attached.
    """
    for name in training.targets:
        edges = training.mask(name).sum(1, keepdim=True).clamp_min(1)
        weight = training.weight(name)
        weight.mul_((weight.shape[1] / edges).sqrt())
