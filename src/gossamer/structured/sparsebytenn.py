"""SparseByteNN: kernels dropped for groups of channels that have first been moved next to each other.

Zeros anywhere keep the most of a network and are hard to run fast; whole filters are easy to run and cost much quality.
In between, the kernel of one input channel is dropped for a group of neighbouring output channels at once, which a
runtime can skip even at 30 %. Which channels are neighbours is not given by nature: before pruning, the channels of the
whole network are ordered so that filters with similar needs share a group. Then the groups are pruned gradually during
training and the network is tuned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.core.calibration import observe
from gossamer.core.channel_groups import find_channel_groups
from gossamer.core.gradual import GradualPruning
from gossamer.core.kernel_groups import KernelGroup, KernelRows
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Pattern
from gossamer.core.registry import register
from gossamer.core.selection import Sparsity
from gossamer.core.sparse_training import SparseTraining, check_free
from gossamer.core.statistics import InputNorm
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.structured.group_size import choose_group_size
from gossamer.structured.rearrange import Rearrangement, magnitudes, rearrange_channels

SCORES = ("magnitude", "squared", "activation")
ALLOCATIONS = ("uniform", "global")
DEPTHWISE = ("dense", "channels", "rows")
AUTO = "auto"


@register(
    "sparsebytenn",
    paper="sparsebytenn",
    when="during training",
    granularity="blocks",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="uniform",
    patterns=("kernels",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class SparseByteNN(GradualPruning):
    """Drop kernels of groups of output channels, gradually, after ordering the channels of the whole network.

    Xu, Liu, Xu, Wang, Li, Yan, Li, Fu, Pan & Chen, 2023, "SparseByteNN: A Novel Mobile Inference Acceleration Framework
    Based on Fine-Grained Group Sparsity", arXiv 2310.19509.

    Parameters
    ----------
    sparsity
        Share of the units of each pruned layer that become zero.
    group
        Output channels that share their zeros: 4, 8 or 16, or ``"auto"`` for the smallest of them that is nearly as
        fast as the fastest on this machine, which :meth:`attach` measures.
    rearrange
        Whether channels are ordered first.
    begin, end
        Steps at which pruning starts, and reaches the sparsity, along a cubic schedule.
    every
        Steps between two choices of what is dropped.
    score
        A unit counts for its sum of ``"magnitude"`` or of ``"squared"`` weights; with ``"activation"``, of squared
        weights times the squares of what its input channel carries, as calibration images show it.
    allocation
        Whether every layer gets the same sparsity (``"uniform"``) or the units of all layers compete by the mean of
        their weights' scores (``"global"``); the channels are ordered for the same sparsity everywhere.
    floor
        Share of the units of a layer that stay in a global competition.
    depthwise
        What goes of depthwise convolutions, uniformly: nothing (``"dense"``), whole ``"channels"``, or ``"rows"`` of
        their kernels.
    smallest_input
        Other layers with fewer input channels stay dense, as the first layer does.
    exclude
        Globs on the names of modules that stay dense.

    Examples
    --------
    >>> run = SparseByteNN(sparsity=0.5, end=100).attach(network, optimizer)  # doctest: +SKIP
    >>> for batch in batches:  # the loop of the user, as it was          # doctest: +SKIP
    ...     ...
    >>> masks = run.finalize()  # doctest: +SKIP
    """

    sparsity: float = 0.3
    group: int | str = 16
    rearrange: bool = True
    score: str = "magnitude"
    allocation: str = "uniform"
    floor: float = 0.1
    depthwise: str = "dense"
    smallest_input: int = 16
    norms: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group != AUTO:
            KernelGroup(self.group)  # type: ignore[arg-type]
        if self.depthwise not in DEPTHWISE:
            raise ConfigurationError(f"depthwise is {self.depthwise!r}; it must be one of {', '.join(DEPTHWISE)}")
        if self.score not in SCORES:
            raise ConfigurationError(f"score is {self.score!r}; it must be one of {', '.join(SCORES)}")
        if self.allocation not in ALLOCATIONS:
            raise ConfigurationError(f"allocation is {self.allocation!r}; it must be one of {', '.join(ALLOCATIONS)}")
        if self.allocation == "global" and not 0 <= self.floor <= 1 - self.sparsity + 1e-9:
            raise ConfigurationError(
                f"floor is {self.floor!r}; a share of every layer's units stays, from 0 to 1 − sparsity"
            )

    @property
    def pattern(self) -> Pattern:
        """The shape of the zeros, but for depthwise convolutions.

        Raises
        ------
        ConfigurationError
            If the size of groups is still to be chosen.
        """
        if not isinstance(self.group, int):
            raise ConfigurationError("group is 'auto'; use method.resolved(model), or give 4, 8 or 16")
        return KernelGroup(self.group)

    def patterns(self, model: nn.Module) -> dict[str, Pattern]:
        """The shape of the zeros of every weight that is pruned, by its name."""
        own = {"dense": None, "channels": KernelGroup(1), "rows": KernelRows()}[self.depthwise]
        return {t.name: own if own is not None and _is_depthwise(t) else self.pattern for t in self.targets(model)}

    def resolved(self, model: nn.Module) -> SparseByteNN:
        """The same with a number for the size of groups, measured for this model if it is ``"auto"``."""
        if self.group != AUTO:
            return self
        shapes = [tuple(target.shape) for target in self.targets(model) if not _is_depthwise(target)]
        chosen = replace(self, group=choose_group_size(shapes, self.sparsity))
        chosen.norms = self.norms
        return chosen

    def targets(self, model: nn.Module) -> list[Target]:
        """The weights that are pruned: convolutions over all channels, but for the first and for narrow ones.

        Raises
        ------
        TargetError
            If there are none.
        """
        found = find_targets(model, self.include, self.exclude, heads=self.heads)
        too = self.depthwise != "dense"
        return [each for each in found if (too if _is_depthwise(each) else each.shape[1] >= self.smallest_input)]

    def observe(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """See what every input channel carries, for the score ``"activation"``.

        Parameters
        ----------
        model
            As it is now; after its channels have been ordered this must be done again.
        batches
            Images.

        Raises
        ------
        CalibrationError
            If there are no images, or an input is not finite.
        """
        targets = [target for target in self.targets(model) if not _is_depthwise(target)]
        training = model.training
        with torch.no_grad(), observe(targets, [InputNorm]) as seen:
            for batch in batches:
                model.eval()(batch)
        model.train(training)
        for target in targets:
            if target.name not in seen:
                raise CalibrationError(f"no image reached {target.name}; give at least one batch")
            seen[target.name].check_finite(target.name)
            squares = seen[target.name][InputNorm].square_sum.view(target.shape[1], -1).sum(1)
            self.norms[target.name] = (squares / squares.mean().clamp_min(1e-30)).sqrt().float()

    def unit_scores(self, weight: Tensor, name: str = "") -> Tensor:
        """Score of each kernel, ``(out, in)``; the name is that of the weight, of which inputs were seen."""
        if self.score == "magnitude":
            return magnitudes(weight)
        squares = magnitudes(weight.detach().square())
        if self.score == "squared" or not name:
            return squares
        if name not in self.norms:
            raise ConfigurationError(f"the inputs of {name} are not known; attach with images, or call observe first")
        return squares * self.norms[name].square()

    def arrange(self, model: nn.Module, batches: Iterable[Tensor] = ()) -> list[Rearrangement]:
        """Order the channels, in place, without changing what the model puts out.

        Parameters
        ----------
        model
            What is arranged.
        batches
            Images, which the score ``"activation"`` needs.
        """
        targets = [target for target in self.targets(model) if not _is_depthwise(target)]
        names = [target.name for target in targets]
        options: dict[str, Any] = {"layers": names, "score": self.unit_scores}
        size = cast("KernelGroup", self.pattern)
        if self.score != "activation":
            return rearrange_channels(model, size, self.sparsity, **options)
        images = list(batches)
        self.observe(model, images)
        # a copy whose weights hold the norms as well is ordered, since norms move along with what they belong to
        weighted = copy.deepcopy(model)
        for target in targets:
            norms = self.norms[target.name].view(-1, *[1] * (len(target.shape) - 2))
            weighted.get_parameter(target.name).data.mul_(norms)
        done = rearrange_channels(weighted, size, self.sparsity, **options)
        orders = {each.layers: each.order for each in done}
        for group in find_channel_groups(model):
            order = orders.get(tuple(name for name in group.outputs() if name in names))
            if order is not None and group.free:
                group.permute_(model, order)
        self.observe(model, images)
        return done

    def masks(self, model: nn.Module, sparsity: float | None = None) -> MaskSet:
        """Masks of the present weights at a sparsity."""
        wanted = self.sparsity if sparsity is None else sparsity
        patterns, found = self.patterns(model), {}
        targets = {target.name: target for target in self.targets(model)}
        deep = {name for name, target in targets.items() if _is_depthwise(target)}
        scores = {name: self.unit_scores(t.matrix(), name) for name, t in targets.items() if name not in deep}
        shares: Mapping[str, Sparsity] = dict.fromkeys(targets, wanted)
        if self.allocation == "global":
            weights = {name: math.prod(targets[name].shape[2:]) for name in scores}
            shares = {**shares, **self._shares(scores, weights, wanted)}
        for name, target in targets.items():
            own = target.matrix().float().abs() if name in deep else scores[name]
            mask = patterns[name].select(own, shares[name], name)
            found[name] = mask.view(*mask.shape, *[1] * (len(target.shape) - mask.dim())).expand(target.shape)
        return MaskSet(found)

    def _shares(self, scores: dict[str, Tensor], weights: dict[str, int], sparsity: float) -> dict[str, Fraction]:
        """Sparsity of each layer if the weakest units of all go, of kernels that have that many weights."""
        values, sizes, layers = [], [], []
        counts, pattern = {}, cast("KernelGroup", self.pattern)
        for number, (name, each) in enumerate(scores.items()):
            units = pattern.reduce(each).flatten() / weights[name]
            counts[name] = len(units)
            weakest = units.sort().values[: len(units) - math.ceil(self.floor * len(units))]
            values.append(weakest)
            sizes.append(torch.full_like(weakest, pattern.size * weights[name], dtype=torch.float64))
            layers.append(torch.full_like(weakest, number, dtype=torch.int64))
        order = torch.cat(values).argsort(stable=True)
        spent = torch.cat(sizes)[order].cumsum(0)
        total = sum(pattern.size * weights[name] * count for name, count in counts.items())
        dropped = torch.cat(layers)[order[spent <= sparsity * total]].bincount(minlength=len(scores))
        return {name: Fraction(int(gone), counts[name]) for name, gone in zip(counts, dropped)}

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
        calibration: Iterable[Tensor] = (),
    ) -> GroupTraining:
        """Order the channels, then prune a little after every few steps of the optimiser.

        Parameters
        ----------
        model, optimizer
            What is trained.
        state
            Of a run that goes on, with a model whose channels have been ordered then.
        calibration
            Batches of images, which the score ``"activation"`` needs.

        Raises
        ------
        TargetError
            If the model has nothing to prune.
        ModelError
            If its channels are to be ordered and it cannot be traced.
        ConfigurationError
            If its channels are to be ordered and the optimiser has already made a step.
        CalibrationError
            If the score needs images and there are none.
        """
        check_free(self.targets(model), optimizer)  # before a channel is moved
        method, images, rearranged = self.resolved(model), list(calibration), []
        if state is not None:
            method.norms = dict(state["extra"])
        elif self.rearrange:
            if optimizer.state:
                raise ConfigurationError(
                    "the optimiser holds the momentum of channels that are to be moved; attach before its first step, "
                    "or set rearrange=False"
                )
            rearranged = method.arrange(model, images)
        elif self.score == "activation":
            method.observe(model, images)
        training = GroupTraining(method, model, optimizer, state)
        training.rearranged = rearranged
        return training

    def start(self, training: SparseTraining) -> None:
        """Remember what the inputs carried."""
        training.extra.update(self.norms)


def _is_depthwise(target: Target) -> bool:
    """Whether every kernel of a weight belongs to one channel alone."""
    return len(target.shape) == 4 and target.shape[1] == 1 and getattr(target.module, "groups", 1) == target.shape[0]


class GroupTraining(SparseTraining):
    """A training run under a growing mask; what :meth:`SparseByteNN.attach` returns.

    Attributes
    ----------
    rearranged
        How the channels were ordered; empty for a run that goes on.
    """

    rearranged: list[Rearrangement]


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """What a network has yet to learn from its dense self: divergence of softened outputs, times temperature².

    Parameters
    ----------
    logits, teacher
        ``(batch, classes)``.
    temperature
        Of both; Hinton, Vinyals & Dean, 2015, arXiv 1503.02531.
    """
    soft = torch.nn.functional.log_softmax(logits / temperature, 1)
    wanted = torch.nn.functional.log_softmax(teacher / temperature, 1)
    return torch.nn.functional.kl_div(soft, wanted, reduction="batchmean", log_target=True) * temperature**2
