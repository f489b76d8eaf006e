"""Planning a sparse pretraining run: how large to start, how sparse to end, and on how much text.

By the law of average parameters (Jin et al., 2025, arXiv 2501.12486) a model that is pruned on the way reaches the
loss of a dense model as large as it was on average, for the same compute. It ends smaller than that dense model, and
is cheaper to serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.core.schedules import Geometric, Schedule
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.measure.scaling_law import LawFit
from gossamer.measure.sparsity_path import SparsityPath

CLOCK = 1 << 20  # moments of a run
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Plan:
    """A sparse pretraining run, and the dense one that it equals.

    Attributes
    ----------
    sparsity
        At the end; 0 if a dense run is best.
    initial_parameters, final_parameters, average_parameters
        At the start, at the end, and on average over tokens: the last is the size of the matched dense model.
    tokens
        Of the run, and of the matched dense one, which costs as much.
    loss
        That the law predicts for both.
    small_dense_loss
        That it predicts for a dense model of the final size which spends the whole compute on more text.
    """

    sparsity: float
    initial_parameters: float
    final_parameters: float
    average_parameters: float
    tokens: float
    loss: float
    small_dense_loss: float

    @property
    def inference_saving(self) -> float:
        """How many times fewer parameters the final model has than the dense one of equal loss and compute."""
        return self.average_parameters / self.final_parameters


def pretraining_path(
    sparsity: float,
    start: float = 0.25,
    end: float = 0.75,
    schedule: type[Schedule] = Geometric,
    fixed_cost: float = 0.0,
) -> SparsityPath:
    """A ramp between two shares of the compute of a run.

    Parameters
    ----------
    sparsity
        At the end.
    start, end
        Shares of the compute at which pruning begins and ends, ``0 <= start < end <= 1``.
    schedule
        Shape of the ramp; geometric in the authors' code.
    fixed_cost
        See :class:`~gossamer.measure.sparsity_path.SparsityPath`.

    Raises
    ------
    ConfigurationError
        If the shares are out of range or out of order.
    """
    if not 0 <= start < end <= 1:
        raise ConfigurationError(f"start and end are {start} and {end} of the compute; 0 <= start < end <= 1 is needed")
    ramp = schedule(sparsity, round(end * CLOCK), begin=round(start * CLOCK))
    return SparsityPath(ramp, CLOCK, "compute", fixed_cost)


def plan_sparse_pretraining(
    compute: float,
    final_parameters: float,
    law: LawFit,
    *,
    start: float = 0.25,
    end: float = 0.75,
    schedule: type[Schedule] = Geometric,
    largest_sparsity: float = 0.95,
) -> Plan:
    """Choose sparsity, first size and text so that the law predicts the least loss at a given final size.

    The compute is ``6 · N̄ · D``: operations that do not depend on the pruned weights are left out, as in the law.

    Parameters
    ----------
    compute
        Operations of the whole run.
    final_parameters
        That the model should have at its end, counted as in the fit of the law.
    law
        Fitted with average parameters.
    start, end, schedule
        Of the ramp; see :func:`pretraining_path`.
    largest_sparsity
        The search ends there.

    Returns
    -------
    Plan
        Dense, with ``sparsity`` 0, if the final size is already the best one for the compute, or above it.

    Raises
    ------
    ConfigurationError
        If a number is not positive, or the shares are out of order.
    SparsityError
        If `largest_sparsity` is outside (0, 1).
    """
    if not compute > 0 or not final_parameters > 0:
        raise ConfigurationError(f"compute and final_parameters are {compute} and {final_parameters}; both must be > 0")
    if not 0 < largest_sparsity < 1:
        raise SparsityError(f"largest_sparsity is {largest_sparsity}; it must lie in (0, 1), such as 0.95")

    def plan(sparsity: float) -> Plan:
        initial = final_parameters / (1 - sparsity)
        average = initial * pretraining_path(sparsity, start, end, schedule).average_density()
        tokens = compute / (6 * average)
        small = float(law.predict(final_parameters, compute / (6 * final_parameters)))
        return Plan(sparsity, initial, final_parameters, average, tokens, float(law.predict(average, tokens)), small)

    found = plan(_minimum(lambda sparsity: plan(sparsity).loss, largest_sparsity))
    dense = plan(0.0)
    return found if found.loss < dense.loss else dense


def _minimum(function: Callable[[float], float], high: float, steps: int = 40) -> float:
    """Golden section on [0, high]: along it the average size grows, and the law has one minimum in the size."""
    low = 0.0
    for _ in range(steps):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if function(left) <= function(right) else (left, high)
    return (low + high) / 2
