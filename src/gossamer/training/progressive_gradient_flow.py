"""Progressive gradient flow: let the weights that N:M removes leave slowly, and with them their gradients.

At 1:16 and beyond, straight-through training gives fifteen removed weights of sixteen a gradient that was not meant
for them, and the noise drowns the one that counts. Two ways out: a mask whose removed entries fade from one to zero
(mask decay, MDGF), so that their gradients shrink with them; or a sequence of ever sparser binary patterns that ends
with the wanted one (structure decay, SDGF).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.nm_sparsifier import NMSparsifier, as_nm
from gossamer.core.patterns import NM, Pattern
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.registry import register
from gossamer.core.sparse_sites import Site
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, PatternError
from gossamer.measure.training_flops import TrainingFlops

Decay = Literal["exponential", "linear"]
Flow = Literal["chain", "ste"]
Kind = Literal["stepwise", "geometric", "densify"]

FEED_FORWARD = ("*mlp*", "*ffn*", "*feed_forward*", "*intermediate*", "*.up", "*.down", "*.fc1", "*.fc2")
"""Names of feed-forward layers, for `include`: the paper's placement."""
ATTENTION_INPUTS = ("*.qkv", "*.[qkv]", "*.[qkv]_proj", "*.query", "*.key", "*.value", "*.c_attn")
"""Names of the layers that make queries, keys and values, for `include` beside those, and for `own`."""


@dataclass(kw_only=True)
class Phased(NMSparsifier):
    """A training in three phases: dense, on the way to the pattern, and with its strictly binary masks.

    Parameters
    ----------
    total
        Steps of the whole training.
    dense_fraction, finetune_fraction
        Shares of them that come before and after the way.
    """

    total: int = 1000
    dense_fraction: float = 0.05
    finetune_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        dense, finetune = self.dense_fraction, self.finetune_fraction
        if self.total < 1 or min(dense, finetune) < 0 or self.finetune_from <= self.dense_until:
            raise ConfigurationError(
                f"of {self.total} steps {dense} are dense and {finetune} fine-tune: both must be 0 or more, and leave "
                f"at least one step between them"
            )

    @property
    def dense_until(self) -> int:
        """t_d: steps of the dense phase."""
        return round(self.dense_fraction * self.total)

    @property
    def finetune_from(self) -> int:
        """The step after which masks are those of the pattern itself."""
        return self.total - round(self.finetune_fraction * self.total)

    def phase(self, step: int) -> Phase:
        """Warm-up, ramp, explore."""
        return "warm-up" if step < self.dense_until else "ramp" if step < self.finetune_from else "explore"


@register(
    "mask-decay",
    paper="progressive-gradient-flow",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class MaskDecay(Phased):
    """Multiply the weights that N:M removes with a factor that falls from one to zero over training.

    Bambhaniya et al., 2024, "Progressive gradient flow for robust N:M sparsity training in transformers", arXiv
    2402.04744: ``W̃ = W ⊙ (m + β_t (1 − m))`` with the N largest of every M in m, chosen after every step. The paper's
    configuration: exponential decay, 1e-4 a step.

    Parameters
    ----------
    decay
        ``exponential``: ``β = exp(−c (t − t_d))``; ``linear``: ``β = max(0, 1 − c (t − t_d))``. β is 1 until the dense
        phase ends at t_d, and 0 from the fine-tuning on: exponential decay never gets there by itself, and the loss
        jumps by what is left of it (:meth:`fade_at` of the step before says how much).
    rate
        c, by default 1e-4 unless one of the next is given.
    half_life, final_value
        What c follows from instead: the steps after which β is a half, or β at the end of the way.
    flow
        ``chain``: a faded weight gets β times its gradient, as the text says and the chain rule has it; where β is 0
        it gets none, and the mask stays as it is. ``ste``: all of it, as the released program does.
    """

    pattern: str | Pattern = "1:16"
    decay: Decay = "exponential"
    rate: float | None = None
    half_life: float | None = None
    final_value: float | None = None
    flow: Flow = "chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay not in get_args(Decay) or self.flow not in get_args(Flow):
            raise ConfigurationError(
                f"decay and flow are {self.decay!r} and {self.flow!r}; use {', '.join(get_args(Decay))} and "
                f"{', '.join(get_args(Flow))}"
            )
        given = [name for name in ("rate", "half_life", "final_value") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} are given, but each of them fixes the decay; give one")
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ConfigurationError(
                f"the decay is {self.coefficient} a step from {given or 'rate'}; rate and half_life must be above 0 "
                f"and final_value in (0, 1), for linear decay in [0, 1)"
            )

    @property
    def coefficient(self) -> float:
        """The coefficient c of the decay."""
        exponential, way = self.decay == "exponential", self.finetune_from - self.dense_until
        if self.half_life is not None:
            return (math.log(2) if exponential else 0.5) / self.half_life if self.half_life > 0 else math.nan
        if self.final_value is not None:
            left = self.final_value
            if not (0 < left < 1 or (left == 0 and not exponential)):
                return math.nan
            return (-math.log(left) if exponential else 1 - left) / way
        return 1e-4 if self.rate is None else self.rate

    def fade_at(self, step: int) -> float:
        """β after a number of steps."""
        if step >= self.finetune_from:
            return 0.0
        since = max(0, step - self.dense_until) * self.coefficient
        return math.exp(-since) if self.decay == "exponential" else max(0.0, 1 - since)

    def pattern_at(self, step: int, final: NM) -> Pattern | None:
        """Nothing is removed in the dense phase."""
        return final if step >= self.dense_until else None

    def wants_gradient(self, step: int) -> bool:
        """Whether removed weights learn in a step."""
        return self.flow == "ste" or self.fade_at(step - 1) > 0

    def site(self, name: str, targets: Sequence[Target]) -> Site | None:
        """A dense weight whose gradients fade with it, if they flow by the chain rule."""
        super().site(name, targets)
        return ProjectedWeight(name, targets[0].parameter, targets, chain=self.flow == "chain")

    def change(self, training: SparseTraining) -> None:
        """Choose anew and fade, until what is removed has no gradient any more."""
        ended = training.step > 0 and self.fade_at(training.step - 1) == 0
        if self.flow == "ste" or not ended:
            super().change(training)

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "frozen" if self.flow == "chain" and self.fade_at(step) == 0 else super().phase(step)


@register(
    "structure-decay",
    paper="progressive-gradient-flow",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class StructureDecay(Phased):
    """Train through a sequence of patterns that ends with the wanted one, with straight-through gradients in each.

    Bambhaniya et al., 2024, arXiv 2402.04744: the way between the dense phase and the fine-tuning is cut into equal
    frames, one for each pattern.

    Parameters
    ----------
    kind
        ``stepwise``: M−1:M, M/2:M, M/4:M, …, N:M. ``geometric``: kN:kM with k = 8, 4, 2, 1, which leaves the share of
        zeros as it is and takes away freedom. ``densify``: N:8M, N:4M, N:2M, N:M, from too sparse. Or a table of
        patterns of one's own, which ends with `pattern` (and cannot be combined with `own`).
    frames
        How many patterns ``geometric`` and ``densify`` have.
    """

    pattern: str | Pattern = "1:8"
    kind: Kind | Sequence[str | Pattern] = "stepwise"
    frames: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.kind, str) and self.kind not in get_args(Kind):
            raise ConfigurationError(f"kind is {self.kind!r}; use {', '.join(get_args(Kind))}, or a table of patterns")
        if self.frames < 1:
            raise ConfigurationError(f"frames is {self.frames}; at least one is needed")
        if not isinstance(self.kind, str) and self.own:
            raise ConfigurationError("a table of patterns is that of one pattern; give `own` layers a run with a kind")
        for final in (as_nm(self.pattern), *map(as_nm, self.own.values())):
            self.patterns(final)

    def patterns(self, final: NM) -> list[NM]:
        """What each frame has.

        Raises
        ------
        PatternError
            If ``stepwise`` cannot halve its way to the pattern, or a table does not end with it.
        """
        if self.kind == "stepwise":
            return _halved(final)
        if not isinstance(self.kind, str):
            table = [as_nm(pattern) for pattern in self.kind]
            if not table or table[-1] != final:
                raise PatternError(f"the table ends with {table[-1] if table else 'nothing'}; it must end with {final}")
            return table
        factors = [2**power for power in reversed(range(self.frames))]
        kept = factors if self.kind == "geometric" else [1] * self.frames
        return [NM(k * final.n, factor * final.m, final.dim) for k, factor in zip(kept, factors, strict=True)]

    def pattern_at(self, step: int, final: NM) -> Pattern | None:
        """The pattern of the frame that a step falls into."""
        if step < self.dense_until:
            return None
        frames = self.patterns(final)
        passed = (step - self.dense_until) * len(frames) // (self.finetune_from - self.dense_until)
        return frames[min(passed, len(frames) - 1)]


def _halved(final: NM) -> list[NM]:
    halvings = math.log2(final.m / final.n)
    if final.n == final.m or halvings != int(halvings):
        raise PatternError(f"{final} cannot be reached by halving: M/N must be 2, 4, 8, …; give a table of patterns")
    counts = [final.m - 1, *(final.m >> power for power in range(1, int(halvings) + 1))]
    return [NM(n, final.m, final.dim) for n in dict.fromkeys(counts)]


# ---------------------------------------------------------------------------------------------------- what it costs


def training_flops(method: NMSparsifier, flops: TrainingFlops, tokens: int, steps: int) -> float:
    """Operations of training with an N:M method, as the paper counts them: a step costs what its density does.

    A faded weight counts as whole. What a straight-through step does for the gradient of removed weights is not
    counted, so that a method which is sparse from the start costs N/M.

    Parameters
    ----------
    method
        Of which ``density_at`` is asked for every step.
    flops
        Of the model.
    tokens, steps
        Tokens of a step, and how many steps.
    """
    return sum(flops.at(method.density_at(step)).pretrain(tokens) for step in range(steps))


def steps_at_equal_flops(method: NMSparsifier, flops: TrainingFlops, budget: float, tokens: int) -> int:
    """How many steps of a method that has no phases a number of operations pays for.

    Raises
    ------
    ConfigurationError
        If the method has phases, whose shares depend on the number of steps; then `total` must be searched for.
    """
    if isinstance(method, Phased):
        raise ConfigurationError(
            f"{type(method).__name__} has phases, whose lengths follow from `total`; compare training_flops instead"
        )
    return int(budget // training_flops(method, flops, tokens, 1))


# ---------------------------------------------------------------------------------------------------- what it explains


@dataclass(frozen=True)
class GradientNoise:
    """Second moment of the gradient, averaged over weights, as Adam remembers it.

    Attributes
    ----------
    chosen, removed
        Of the weights that the final pattern keeps now, and of those that it does not.
    """

    chosen: float
    removed: float


def gradient_noise(training: SparseTraining) -> GradientNoise:
    """How large the gradients of weights that count are, and of those that do not.

    The paper's explanation: at high sparsity the second of them stays high under straight-through estimators, and
    what it feeds is noise.

    Parameters
    ----------
    training
        Of an N:M method, with an optimiser that keeps a running mean of squared gradients.

    Raises
    ------
    ConfigurationError
        If the optimiser keeps none, or has not made a step.
    """
    method = training.method
    assert isinstance(method, NMSparsifier)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name, target in training.targets.items():
        moment = training.optimizer.state.get(target.parameter, {}).get("exp_avg_sq")
        if not isinstance(moment, Tensor):
            raise ConfigurationError(
                f"the optimizer remembers no squared gradients of {name}; train with Adam and make a step first"
            )
        part = moment if target.index is None else moment[target.index]
        part = (part.transpose(0, 1) if target.transposed else part).double()
        kept = method.pattern_of(target).select(training.dense(name).abs(), name=name)
        for place, mask in enumerate((kept, ~kept)):
            sums[place] += part[mask].sum().cpu()
            counts[place] += mask.sum().cpu()
    means = sums / counts.clamp_min(1)
    return GradientNoise(float(means[0]), float(means[1]))
