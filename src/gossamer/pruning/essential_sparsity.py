"""Essential sparsity: up to a sharp drop point, the smallest weights of a pretrained model can go for nothing.

Remove the smallest weights of a pretrained checkpoint in one shot, without any search or schedule, then fine-tune
(or just evaluate). Over a wide range of sparsity nothing happens; then quality falls off a cliff. The paper calls the
sparsity at the edge *essential*. :func:`essential_sparsity` sweeps, finds the edge in two ways (the last point within
a tolerance, and the joint of two fitted lines), and says how sure it is. :func:`pattern_ladder` asks the same of
N:M patterns. How the edge came about during pretraining is followed by
:func:`gossamer.pruning.abrupt_sparsification.track_checkpoints`, and whether the weights that go are those that a
lottery ticket would drop is answered in :mod:`gossamer.pruning.lottery_tickets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.calibration import Statistic, Statistics
from gossamer.core.changepoint import Array, Knee, curve_interval, fit_knee, isotonic_decreasing, last_within
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.progress import track
from gossamer.core.registry import register
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.pruning.base import LayerwisePruner
from gossamer.pruning.one_shot import Score, check_floor, one_shot_masks, protect
from gossamer.pruning.sweep import Evaluate, FineTune, Point, Trial, check_grid, check_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_SPARSITIES = tuple(float(s) for s in np.linspace(0, 0.95, 20).round(10))
DEFAULT_LADDER = ("1:2", "2:4", "4:8", "1:4")


@register(
    "global-magnitude",
    paper="essential-sparsity",
    when="after training",
    needs_data=False,
    criterion=("magnitude",),
    allocation="global",
    patterns=("unstructured",),
    aims=("inference", "insight"),
)
@dataclass
class EssentialMagnitude(LayerwisePruner):
    """Prune the smallest weights of the whole model in one ranking, with a floor under every layer if wanted.

    Jaiswal, Liu, Chen & Wang, 2023, "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights
    that Matter", arXiv 2306.03805.

    Parameters
    ----------
    min_density
        Share of its weights that every layer keeps (rounded down). One ranking needs layers of comparable scale; a
        matrix of small numbers would otherwise be emptied. In [0, 1 − sparsity].
    """

    pattern: Pattern | str = Unstructured("model")
    min_density: float = 0.0

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_density:
            check_floor(Pattern.parse(self.pattern), self.min_density, float(self.sparsity or 0))

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``|W|``, infinite for the largest weights up to the floor."""
        magnitude = scores.magnitude(target.matrix())
        return protect(magnitude, self.min_density) if self.min_density else magnitude


@dataclass
class EssentialSparsityResult:
    """A sweep and what it says.

    Attributes
    ----------
    sparsities
        Achieved, increasing from 0, ``(points,)``.
    quality
        ``(seeds, points)``; higher is better.
    threshold
        Lowest mean quality within the tolerance.
    es
        Essential sparsity: the largest sparsity up to which mean quality never falls below the threshold, linear
        between the points.
    reached
        Whether quality falls below the threshold at all. If not, `es` is the end of the sweep and a lower bound.
    ci
        95% bootstrap interval of `es` over the seeds; None for one seed.
    knee
        Two-piece linear fit of mean quality; None for fewer than 4 points.
    knee_ci
        95% bootstrap interval of the knee's position.
    layers
        For each point, parameter name → sparsity (of the first seed).
    settings
        Everything needed to repeat it.
    """

    sparsities: Array
    quality: Array
    threshold: float
    es: float
    reached: bool
    ci: tuple[float, float] | None
    knee: Knee | None
    knee_ci: tuple[float, float] | None
    layers: list[dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """Mean quality over the seeds, ``(points,)``; its monotone envelope if that was asked for."""
        return _level(self.quality.mean(0), self.settings.get("monotone", False))

    @property
    def lowest_density(self) -> list[float]:
        """For each point, the density of the emptiest layer."""
        return [1 - max(layers.values(), default=0.0) for layers in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; an infinite slope ratio becomes None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"sparsities": self.sparsities.tolist(), "quality": self.quality.tolist()}
        values["lowest_density"] = self.lowest_density
        if self.knee is not None:
            ratio = self.knee.ratio if math.isfinite(self.knee.ratio) else None
            values["knee"] = {**asdict(self.knee), "ratio": ratio}
        return values

    def __repr__(self) -> str:
        interval = f" [{self.ci[0]:.3f}, {self.ci[1]:.3f}]" if self.ci else ""
        knee = f", knee {self.knee.position:.3f} (slopes ×{self.knee.ratio:.3g})" if self.knee else ""
        return f"EssentialSparsityResult(es {'' if self.reached else '≥ '}{self.es:.3f}{interval}{knee})"

    def plot(self) -> Figure:
        """Quality against sparsity with the tolerance, the essential sparsity and the fitted knee."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for row in self.quality if len(self.quality) > 1 else ():
            axes.plot(self.sparsities, row, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(self.sparsities, self.mean, "o-", color="tab:blue", label="quality")
        axes.axhline(self.threshold, color="tab:grey", linestyle=":", label="tolerance")
        axes.axvline(self.es, color="tab:red", label=f"essential sparsity {'' if self.reached else '≥ '}{self.es:.2f}")
        if self.ci:
            axes.axvspan(*self.ci, color="tab:red", alpha=0.12)
        if self.knee is not None:
            label = f"knee {self.knee.position:.2f}"
            axes.plot(self.sparsities, self.knee.predict(self.sparsities), "--", color="tab:green", label=label)
        axes.set(xlabel="sparsity", ylabel="quality")
        axes.legend(frameon=False)
        return figure


def essential_sparsity(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    tolerance: float = 0.01,
    relative: bool = True,
    score: Score = "magnitude",
    scope: str = "global",
    pattern: Pattern | str | None = None,
    min_density: float = 0.0,
    finetune: FineTune | None = None,
    seeds: int | Sequence[int] = 1,
    monotone: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
    progress: bool = False,
) -> EssentialSparsityResult:
    """Sweep one-shot pruning over sparsities and find where quality drops. The model keeps every bit.

    Parameters
    ----------
    model
        A pretrained model.
    evaluate
        Module → number, higher is better, such as accuracy or negative perplexity.
    sparsities
        Increasing, in [0, 1). 0 is always measured, whether it is listed or not.
    tolerance
        ε: how much quality may fall below that of the dense model.
    relative
        Whether ε is a fraction of the dense quality (the paper's 1%), or in its units.
    score, scope, min_density, include, exclude, heads
        Which weights go; see :func:`gossamer.pruning.one_shot.one_shot_masks`.
    pattern
        Shape of the zeros with a free sparsity, such as ``"16x1"``; takes the place of the scope. For N:M patterns
        see :func:`pattern_ladder`.
    finetune
        ``finetune(copy, masks)`` trains a pruned copy of the model in place (or returns another) before it is
        evaluated; also at sparsity 0. Removed weights are held at zero; the optimiser must be made inside.
    seeds
        How many (0, 1, …) or which. A seed fixes torch's generator around `finetune` and `evaluate`, and the draw of
        random scores.
    monotone
        Whether the curve is replaced by its nearest non-increasing one before it is read. A single unlucky
        evaluation otherwise ends the essential range.
    progress
        Whether to show a bar.

    Raises
    ------
    SparsityError
        If the sparsities are unsorted, repeated or outside [0, 1), or too close to differ in one weight.
    NonFiniteError
        If a quality or weight is NaN or infinite.
    ConfigurationError
        If the tolerance is negative, seeds repeat, or the pattern fixes its own sparsity.
    """
    grid = check_grid(sparsities)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ConfigurationError(f"tolerance is {tolerance}; it must be a finite number ≥ 0, such as 0.01")
    if pattern is not None and Pattern.parse(pattern).sparsity is not None:
        raise ConfigurationError(f"the pattern {pattern} fixes its sparsity and has no sweep; use pattern_ladder")
    options: dict[str, Any] = {"score": score, "scope": scope, "pattern": pattern, "min_density": min_density}
    where: dict[str, Any] = {"include": tuple(include), "exclude": tuple(exclude), "heads": heads}
    trial = Trial(model, evaluate, finetune, check_seeds(seeds), varies=score == "random")
    # the sparsest mask first: what cannot work should fail before anything is evaluated
    _masks(model, grid[-1], {**options, **where}, trial.seeds[0])
    points = [
        trial.measure(f"sparsity {sparsity:g}", partial(_masks, model, sparsity, {**options, **where}))
        for sparsity in track(grid, "essential sparsity", enabled=progress)
    ]
    settings = {**options, **where, "tolerance": tolerance, "relative": relative, "monotone": monotone}
    settings["requested"], settings["seeds"] = grid, trial.seeds
    return _read(points, tolerance, {key: _plain(value) for key, value in settings.items()})


@dataclass(frozen=True)
class PatternPoint:
    """One rung of a ladder of patterns.

    Attributes
    ----------
    pattern
        As text, such as ``"2:4"``.
    sparsity
        What it fixes.
    quality
        One number a seed.
    drop
        Dense quality minus this one, means over the seeds; as a fraction of the dense one if relative.
    within
        Whether the drop is at most the tolerance.
    """

    pattern: str
    sparsity: float
    quality: tuple[float, ...]
    drop: float
    within: bool


def pattern_ladder(
    model: nn.Module,
    evaluate: Evaluate,
    patterns: Sequence[Pattern | str] = DEFAULT_LADDER,
    *,
    tolerance: float = 0.01,
    relative: bool = True,
    score: Score = "magnitude",
    finetune: FineTune | None = None,
    seeds: int | Sequence[int] = 1,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
) -> list[PatternPoint]:
    """Measure the drop of patterns that fix their own sparsity, such as N:M, in one shot.

    Parameters
    ----------
    patterns
        Which; their order is kept.
    model, evaluate, tolerance, relative, score, finetune, seeds, include, exclude, heads
        As in :func:`essential_sparsity`.

    Raises
    ------
    SparsityError
        If a pattern leaves its sparsity open.
    PatternError
        If one does not divide a layer.
    """
    rungs = [Pattern.parse(pattern) for pattern in patterns]
    for rung in rungs:
        rung.resolve(None)
    options = {"score": score, "include": tuple(include), "exclude": tuple(exclude), "heads": heads}
    trial = Trial(model, evaluate, finetune, check_seeds(seeds), varies=score == "random")
    dense = float(np.mean(trial.measure("sparsity 0", lambda seed: MaskSet()).quality))
    scale = abs(dense) if relative else 1.0
    ladder = []
    for rung in rungs:
        point = trial.measure(str(rung), partial(_masks, model, None, {**options, "pattern": rung}))
        drop = dense - float(np.mean(point.quality))
        drop_shown = drop / scale if scale else drop
        ladder.append(
            PatternPoint(str(rung), point.sparsity, tuple(point.quality), drop_shown, drop <= tolerance * scale)
        )
    return ladder


def _masks(model: nn.Module, sparsity: float | None, options: dict[str, Any], seed: int) -> MaskSet:
    return one_shot_masks(model, sparsity, seed=seed, **options)


def _read(points: Sequence[Point], tolerance: float, settings: dict[str, Any]) -> EssentialSparsityResult:
    x = np.array([point.sparsity for point in points])
    for before, after in pairwise(points):
        if after.sparsity <= before.sparsity:
            raise SparsityError(
                f"two sparsities of the sweep remove the same weights ({after.sparsity:g} of all); use a coarser grid"
            )
    quality = np.array([point.quality for point in points]).T

    def threshold(mean: Array) -> float:
        return mean[0] - tolerance * (abs(mean[0]) if settings["relative"] else 1.0)

    def essential(mean: Array) -> tuple[float, bool]:
        mean = _level(mean, settings["monotone"])
        return last_within(x, mean, threshold(mean))

    def bend(mean: Array) -> Knee:
        return fit_knee(x, _level(mean, settings["monotone"]))

    mean = quality.mean(0)
    es, reached = essential(mean)
    enough = len(points) >= 4
    return EssentialSparsityResult(
        sparsities=x,
        quality=quality,
        threshold=float(threshold(_level(mean, settings["monotone"]))),
        es=es,
        reached=reached,
        ci=curve_interval(quality, lambda mean: essential(mean)[0]),
        knee=bend(mean) if enough else None,
        knee_ci=curve_interval(quality, lambda mean: bend(mean).position) if enough else None,
        layers=[point.layers for point in points],
        settings=settings,
    )


def _level(mean: Array, monotone: bool) -> Array:
    return isotonic_decreasing(mean) if monotone else mean


def _plain(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Pattern):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
