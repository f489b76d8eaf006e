"""Whether results of sparse methods may stand side by side, and if not, why.

The ten rules are the advice of Liu and Wang, 2023, arXiv 2302.02596, made checkable: each method says where it stands
(:class:`gossamer.core.taxonomy.Taxonomy`) and everything it cost, and the rules are looked up, not argued about.

====  ======================================================================================================
R1    the same sparsity in the end, of the same weights
R2    the same training budget, with everything that led to the result in it
R3    the same pretrained start, or none for all
R4    a small dense network of as many parameters, and random pruning by shape, are among the rivals
R5    whole channels and single weights are compared at equal measured latency, not at equal sparsity
R6    a speed-up that is counted in operations is not given as time
R7    at least three seeds
R8    as much tuning for the dense baseline as for any sparse method
R9    masks, indices, dense copies and dense gradients count as memory and operations
R10   what is claimed beyond accuracy was measured
====  ======================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gossamer.core.taxonomy import Taxonomy
from gossamer.errors import ConfigurationError, UnfairComparisonError

Budget = Literal["training_flops", "epochs", "latency"]
_BUDGETS: dict[Budget, str] = {
    "training_flops": "training operations",
    "epochs": "epochs",
    "latency": "seconds of latency",
}
_SEEDS = 3
_SAME_SPARSITY = 1e-3  # what rounding to whole channels or groups of small layers may differ by
_SINGLE = {"unstructured", "n:m"}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One result in a comparison, as its authors report it.

    Attributes
    ----------
    name
        What the table calls it.
    taxonomy
        Where the method stands; None for a dense network.
    quality
        One number for each seed; higher is better.
    sparsity, counted
        Share of zeros at the end, and of which weights: ``"prunable weights"`` or ``"all parameters"``.
    parameters
        Non-zero ones at the end.
    epochs, training_flops
        What the result cost.
    phases, included
        All training that led to the result, such as ``("dense training", "pruning", "retraining")``; and the part of it
        that the two numbers include.
    pretrained
        Name of the weights from which training began; None for a random start.
    latency, device
        Measured seconds of inference, and on what.
    speedup, speedup_of
        What is reported as speed-up, and whether it is of ``"time"`` or of ``"operations"``; `speedup_called` is what
        the text calls it.
    tried
        Settings of hyper-parameters that were tried.
    overhead
        What memory and operations count beside weights: of ``masks``, ``indices``, ``dense copy``, ``dense gradients``.
    claimed, measured
        What is claimed beside quality, and what was measured of it: ``"robustness"``, ``"calibration"``, ….
    """

    name: str
    taxonomy: Taxonomy | None = None
    quality: tuple[float, ...]
    sparsity: float = 0.0
    counted: str = "prunable weights"
    parameters: float
    epochs: float
    training_flops: float
    phases: tuple[str, ...] = ("training",)
    included: tuple[str, ...] = ("training",)
    pretrained: str | None = None
    latency: float | None = None
    device: str | None = None
    speedup: float | None = None
    speedup_of: Literal["time", "operations"] = "time"
    speedup_called: Literal["time", "operations"] = "time"
    tried: int = 1
    overhead: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()

    @property
    def dense(self) -> bool:
        """Whether it is a dense network."""
        return self.taxonomy is None

    @property
    def structured(self) -> bool:
        """Whether its zeros are whole channels, heads, blocks or kernels."""
        return self.taxonomy is not None and not _SINGLE & set(self.taxonomy.patterns)


@dataclass(frozen=True)
class Violation:
    """A rule that a comparison breaks.

    Attributes
    ----------
    rule
        ``R1`` to ``R10``.
    name
        Of the contestant at fault; empty where it is the comparison as a whole.
    reason
        One sentence.
    """

    rule: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


def check_comparison(
    contestants: Sequence[Contestant], budget: Budget = "training_flops", tolerance: float = 0.05
) -> list[Violation]:
    """All rules that a comparison breaks, in the order of the rules.

    Parameters
    ----------
    contestants
        At least two; those that are neither dense nor the first sparse one are held against that one.
    budget
        What is meant to be equal.
    tolerance
        Largest relative difference of budgets.

    Raises
    ------
    ConfigurationError
        If there are fewer than two, names repeat, or the budget is unknown.
    """
    names = [each.name for each in contestants]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigurationError(f"a comparison of {names}; give at least two results of different names")
    if budget not in _BUDGETS:
        raise ConfigurationError(f"budget is {budget!r}; it must be one of {', '.join(_BUDGETS)}")
    sparse = [each for each in contestants if not each.dense]
    checks: list[Callable[[], Iterator[Violation]]] = [
        lambda: _sparsities(sparse, budget),
        lambda: _budgets(contestants, budget, tolerance),
        lambda: _starts(contestants),
        lambda: _rivals(contestants, tolerance),
        lambda: _latencies(sparse, tolerance),
        lambda: _speedups(contestants),
        lambda: _seeds(contestants),
        lambda: _tuning(contestants),
        lambda: _overheads(sparse),
        lambda: _claims(contestants),
    ]
    return [violation for check in checks for violation in check()]


def compare(
    contestants: Sequence[Contestant],
    budget: Budget = "training_flops",
    tolerance: float = 0.05,
    force: bool = False,
) -> list[Contestant]:
    """The results that no other beats in both quality and cost, best quality first: never a single winner.

    Parameters
    ----------
    contestants, budget, tolerance
        See :func:`check_comparison`.
    force
        Compare although rules are broken.

    Raises
    ------
    UnfairComparisonError
        Naming every rule that is broken.
    """
    broken = check_comparison(contestants, budget, tolerance)
    if broken and not force:
        raise UnfairComparisonError(
            "the results cannot be compared: " + "; ".join(map(str, broken)) + "; measure what is missing, or force it"
        )
    best = [one for one in contestants if not any(_beats(other, one) for other in contestants)]
    return sorted(best, key=lambda one: -_mean(one))


def needed_overhead(taxonomy: Taxonomy) -> set[str]:
    """What a method must count beside its weights.

    A mask or indices say where the others are; whatever starts dense, or may take weights back, keeps a dense copy
    unless its layers store no zeros (``indices``); growth by gradient needs the gradient of all weights at times.
    """
    needed = {"masks"}
    if taxonomy.topology == "dynamic" and "gradient" in taxonomy.criterion:
        needed.add("dense gradients")
    if taxonomy.timing == "during training" and taxonomy.paradigm != "sparse training":
        needed.add("dense copy")
    return needed


def _mean(contestant: Contestant) -> float:
    return sum(contestant.quality) / len(contestant.quality)


def _beats(one: Contestant, other: Contestant) -> bool:
    prices = [(one.training_flops, other.training_flops), (one.parameters, other.parameters)]
    if one.latency is not None and other.latency is not None and one.device == other.device:
        prices.append((one.latency, other.latency))
    no_worse = _mean(one) >= _mean(other) and all(ours <= theirs for ours, theirs in prices)
    return no_worse and (_mean(one) > _mean(other) or any(ours < theirs for ours, theirs in prices))


def _sparsities(sparse: Sequence[Contestant], budget: Budget) -> Iterator[Violation]:
    for each in sparse[1:]:
        first = sparse[0]
        if each.counted != first.counted:
            reason = f"{each.name} counts zeros among {each.counted}, {first.name} among {first.counted}"
            yield Violation("R1", each.name, reason)
        elif abs(each.sparsity - first.sparsity) > _SAME_SPARSITY and budget != "latency":
            reason = f"{each.name} has {each.sparsity:.1%} zeros, {first.name} {first.sparsity:.1%}"
            yield Violation("R1", each.name, reason)


def _budgets(contestants: Sequence[Contestant], budget: Budget, tolerance: float) -> Iterator[Violation]:
    for each in contestants:
        left_out = [phase for phase in each.phases if phase not in each.included]
        if left_out:
            yield Violation("R2", each.name, f"the cost of {each.name} leaves out its {left_out[0]}")
            continue
        began_dense = each.taxonomy is not None and each.taxonomy.timing == "after training"
        if began_dense and each.pretrained is None and "dense training" not in each.phases:
            yield Violation("R2", each.name, f"{each.name} prunes after training, and no dense training is counted")
    first = contestants[0]
    for each in contestants[1:]:
        ours, reference = (getattr(one, budget) for one in (each, first))
        if ours is None or reference is None:
            if budget != "latency" or not (each.dense or first.dense):
                lacking = each.name if ours is None else first.name
                yield Violation("R2", lacking, f"{lacking} has no {budget}, which was to be equal")
        elif not abs(ours - reference) <= tolerance * reference:
            reason = f"{each.name} took {ours / reference:.3g} times the {_BUDGETS[budget]} of {first.name}"
            yield Violation("R2", each.name, reason)


def _starts(contestants: Sequence[Contestant]) -> Iterator[Violation]:
    first = contestants[0]
    for each in contestants[1:]:
        if each.pretrained != first.pretrained:
            ours, theirs = (one.pretrained or "random weights" for one in (each, first))
            yield Violation("R3", each.name, f"{each.name} starts from {ours}, {first.name} from {theirs}")


def _rivals(contestants: Sequence[Contestant], tolerance: float) -> Iterator[Violation]:
    sparse = [each for each in contestants if not each.dense]
    if not sparse:
        return
    size = sparse[0].parameters
    if not any(each.dense and each.parameters <= (1 + tolerance) * size for each in contestants):
        yield Violation("R4", "", f"there is no small dense network of about {size:.3g} parameters")
    by_shape = ("random" in each.taxonomy.criterion for each in sparse if each.taxonomy and _by_shape(each.taxonomy))
    if not any(by_shape):
        yield Violation("R4", "", "random pruning with an Erdős–Rényi allocation is missing")


def _by_shape(taxonomy: Taxonomy) -> bool:
    return taxonomy.allocation == "erdos-renyi" and taxonomy.topology == "static"


def _latencies(sparse: Sequence[Contestant], tolerance: float) -> Iterator[Violation]:
    if len({each.structured for each in sparse}) < 2:
        return
    single = next(each for each in sparse if not each.structured)
    for each in sparse:
        if not each.structured:
            continue
        if each.latency is None or single.latency is None or each.device != single.device:
            reason = f"{each.name} removes whole structures and {single.name} single weights, without latency of both"
            yield Violation("R5", each.name, f"{reason} on one device")
        elif not abs(each.latency - single.latency) <= tolerance * single.latency:
            times = each.latency / single.latency
            yield Violation("R5", each.name, f"{each.name} takes {times:.3g} times the latency of {single.name}")


def _speedups(contestants: Sequence[Contestant]) -> Iterator[Violation]:
    for each in contestants:
        if each.speedup is None:
            continue
        if each.speedup_called != each.speedup_of:
            reason = (
                f"{each.name} calls {each.speedup:.3g}× fewer {each.speedup_of} a speed-up in {each.speedup_called}"
            )
            yield Violation("R6", each.name, reason)
        elif each.speedup_of == "time" and each.device is None:
            yield Violation("R6", each.name, f"{each.name} is said to be {each.speedup:.3g} times faster, on no device")


def _seeds(contestants: Sequence[Contestant]) -> Iterator[Violation]:
    for each in contestants:
        if len(each.quality) < _SEEDS:
            yield Violation("R7", each.name, f"{each.name} has {len(each.quality)} seeds; {_SEEDS} are needed")


def _tuning(contestants: Sequence[Contestant]) -> Iterator[Violation]:
    dense = [each.tried for each in contestants if each.dense]
    for each in contestants:
        if not each.dense and dense and each.tried > max(dense):
            reason = f"{each.tried} settings were tried for {each.name} and {max(dense)} for the dense baseline"
            yield Violation("R8", each.name, reason)


def _overheads(sparse: Sequence[Contestant]) -> Iterator[Violation]:
    for each in sparse:
        assert each.taxonomy is not None
        counted = set(each.overhead)
        if "indices" in counted:  # layers that store no zeros need neither masks nor a dense copy
            counted |= {"masks", "dense copy"}
        missing = sorted(needed_overhead(each.taxonomy) - counted)
        if missing:
            yield Violation("R9", each.name, f"{each.name} does not count its {missing[0]}")


def _claims(contestants: Sequence[Contestant]) -> Iterator[Violation]:
    for each in contestants:
        missing = [claim for claim in each.claimed if claim not in each.measured]
        if missing:
            yield Violation("R10", each.name, f"{each.name} claims {missing[0]}, and nothing was measured")
