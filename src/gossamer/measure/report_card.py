"""The report card of a comparison: quality beside price, and a warning where the prices differ.

A sparse network that trained longer, or saw more text, than its rival proves nothing. So a comparison states which
budgets must be equal; the card checks them, prints all the others, and either refuses the comparison or marks the runs
that are out of line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.measure.training_cost import TrainingCost

Budget = Literal[
    "training_flops",
    "units",
    "steps",
    "seconds",
    "bytes_moved",
    "active_parameters",
    "average_parameters",
    "inference_flops",
]
BUDGETS: dict[Budget, str] = {
    "training_flops": "training operations",
    "units": "tokens or samples",
    "steps": "steps",
    "seconds": "time, s",
    "bytes_moved": "bytes moved",
    "active_parameters": "parameters at the end",
    "average_parameters": "parameters on average",
    "inference_flops": "operations of inference",
}
"""What a comparison may hold equal, in words."""

_WIDTH = 200  # columns: a report is not cut to the terminal it happens to be made in


@dataclass(frozen=True)
class Run:
    """One contestant: its quality and its cost for each seed.

    Attributes
    ----------
    name
        What the table calls it.
    quality
        One number for each seed.
    costs
        What each seed cost, or one cost that stands for all of them.
    """

    name: str
    quality: tuple[float, ...]
    costs: tuple[TrainingCost, ...]

    def __init__(self, name: str, quality: float | Sequence[float], costs: TrainingCost | Sequence[TrainingCost]):
        values = tuple(quality) if isinstance(quality, Sequence) else (quality,)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "quality", tuple(float(value) for value in values))
        object.__setattr__(self, "costs", (costs,) if isinstance(costs, TrainingCost) else tuple(costs))
        if not values or not self.costs:
            raise ConfigurationError(
                f"{name!r} has {len(values)} qualities and {len(self.costs)} costs; at least one of each is needed"
            )
        if not all(math.isfinite(value) for value in self.quality):
            raise NonFiniteError(f"the quality of {name!r} is {self.quality}; leave out the seed that diverged")

    def cost(self, budget: Budget) -> float:
        """Mean over the seeds."""
        return sum(getattr(cost, budget) for cost in self.costs) / len(self.costs)

    @property
    def mean(self) -> float:
        """Mean quality."""
        return sum(self.quality) / len(self.quality)


@dataclass(frozen=True)
class ReportCard:
    """A comparison of runs under budgets that are meant to be equal.

    Attributes
    ----------
    runs
        The first is the one that the others are held against.
    quality
        Name of the number that is compared, such as ``"loss"``.
    equal
        Budgets that must not differ.
    tolerance
        Largest relative difference from the first run.

    Examples
    --------
    >>> cost = dict.fromkeys(TrainingCost.__dataclass_fields__, 100) | {"unit": "tokens", "counted": "all parameters"}
    >>> twice = TrainingCost(**cost | {"training_flops": 200})
    >>> card = ReportCard((Run("dense", 1.9, TrainingCost(**cost)), Run("sparse", 1.8, twice)), "loss")
    >>> card.differences
    {'sparse': {'training_flops': 2.0}}
    """

    runs: tuple[Run, ...]
    quality: str = "quality"
    equal: tuple[Budget, ...] = ("training_flops", "units")
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigurationError(f"a comparison of {names}; give at least two runs of different names")
        for budget in self.equal:
            if budget not in BUDGETS:
                raise ConfigurationError(f"budget {budget!r} is unknown; it must be one of {', '.join(BUDGETS)}")
        if not self.tolerance >= 0:
            raise ConfigurationError(f"tolerance is {self.tolerance}; it must be 0 or more, such as 0.05")
        kinds = {(cost.unit, cost.counted) for run in self.runs for cost in run.costs}
        if len(kinds) > 1:
            raise ConfigurationError(
                f"the runs count different things: {sorted(' of '.join(kind) for kind in kinds)}; "
                f"give every ledger the same units and the same `of`"
            )

    @property
    def differences(self) -> dict[str, dict[Budget, float]]:
        """Run → budget → how many times that of the first run; only what lies beyond the tolerance."""
        first, found = self.runs[0], {}
        for run in self.runs[1:]:
            ratios = {budget: _ratio(run.cost(budget), first.cost(budget)) for budget in self.equal}
            beyond = {b: r for b, r in ratios.items() if not 1 - self.tolerance <= r <= 1 + self.tolerance}
            if beyond:
                found[run.name] = beyond
        return found

    def check(self) -> None:
        """Refuse a comparison of unequal budgets.

        Raises
        ------
        ConfigurationError
            Naming the first run that differs, and in what.
        """
        for name, ratios in self.differences.items():
            budget, ratio = next(iter(ratios.items()))
            raise ConfigurationError(
                f"{name!r} has {ratio:.3g} times the {BUDGETS[budget]} of {self.runs[0].name!r}, beyond "
                f"{self.tolerance:.0%}; train both for the same budget, or take {budget!r} out of `equal`"
            )

    def table(self) -> Table:
        """The card as a table; a run out of line has ``≠`` beside each budget in which it is."""
        unit, counted = self.runs[0].costs[0].unit, self.runs[0].costs[0].counted
        table = Table(title=f"Equal: {', '.join(BUDGETS[b] for b in self.equal) or 'nothing'} (± {self.tolerance:.0%})")
        table.add_column("run")
        heads = ("seeds", self.quality, "training operations", "of dense", unit, "steps", "bytes moved")
        for head in (*heads, "parameters at the end", "on average", f"inference, for 1 of {unit}", "time, s"):
            table.add_column(head, justify="right")
        differences = self.differences
        for run in self.runs:
            marked = differences.get(run.name, {})

            def cell(budget: Budget, text: str, marked: Mapping[Budget, float] = marked) -> str:
                return f"≠ {text}" if budget in marked else text

            dense = sum(cost.dense_training_flops for cost in run.costs) / len(run.costs)
            table.add_row(
                run.name,
                str(len(run.quality)),
                _quality(run),
                cell("training_flops", scaled(run.cost("training_flops"))),
                f"{_ratio(run.cost('training_flops'), dense):.0%}",
                cell("units", scaled(run.cost("units"))),
                cell("steps", scaled(run.cost("steps"))),
                cell("bytes_moved", scaled(run.cost("bytes_moved"))),
                cell("active_parameters", scaled(run.cost("active_parameters"))),
                cell("average_parameters", scaled(run.cost("average_parameters"))),
                cell("inference_flops", scaled(run.cost("inference_flops"))),
                cell("seconds", f"{run.cost('seconds'):.3g}"),
            )
        table.caption = f"parameters: {counted}" + ("; ≠ not the same budget as the first run" if differences else "")
        return table

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=_WIDTH, color_system=None).print(self.table())
        return page.getvalue()


def report_card(
    runs: Sequence[Run],
    quality: str = "quality",
    equal: Sequence[Budget] = ("training_flops", "units"),
    tolerance: float = 0.05,
    unequal: Literal["refuse", "mark"] = "refuse",
) -> ReportCard:
    """Put runs side by side, if their budgets allow it.

    Parameters
    ----------
    runs
        At least two; the first is the one that the others are held against.
    quality
        Name of the number that is compared.
    equal
        Budgets that must not differ: see :data:`BUDGETS`.
    tolerance
        Largest relative difference from the first run.
    unequal
        ``"refuse"`` raises where a budget differs, ``"mark"`` marks it in the table.

    Raises
    ------
    ConfigurationError
        If budgets differ and that is not allowed, or the runs cannot be compared at all.
    """
    if unequal not in ("refuse", "mark"):
        raise ConfigurationError(f"unequal is {unequal!r}; it must be 'refuse' or 'mark'")
    card = ReportCard(tuple(runs), quality, tuple(equal), tolerance)
    if unequal == "refuse":
        card.check()
    return card


def observed_card(observations: Sequence[Mapping[str, Any]], quality: str = "quality") -> ReportCard | None:
    """The card of an experiment, from what its observations hold, one for each seed; differences are marked.

    Parameters
    ----------
    observations
        Each with ``{"runs": {name: {"quality": number, "cost": dict of a TrainingCost}}}``, and ``"equal"``, the names
        of the budgets that the comparison means to hold equal. A run that not every observation has is left out.
    quality
        What the quality is called.

    Returns
    -------
    ReportCard or None
        None if the experiment compares no runs.

    Raises
    ------
    CheckpointError
        If a stored cost is damaged.
    """
    found = [observation.get("runs", {}) for observation in observations]
    names = [name for name in (found[0] if found else {}) if all(name in runs for runs in found)]
    if len(names) < 2:
        return None
    runs = [
        Run(name, [r[name]["quality"] for r in found], [TrainingCost.from_dict(r[name]["cost"]) for r in found])
        for name in names
    ]
    return report_card(runs, quality, observations[0].get("equal", ("training_flops", "units")), unequal="mark")


def scaled(value: float) -> str:
    """A number with three digits and a decimal prefix, such as ``2.69 G``."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _quality(run: Run) -> str:
    if len(run.quality) == 1:
        return f"{run.mean:.4g}"
    spread = math.sqrt(sum((value - run.mean) ** 2 for value in run.quality) / (len(run.quality) - 1))
    return f"{run.mean:.4g} ± {spread:.2g}"


def _ratio(value: float, reference: float) -> float:
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value / reference
