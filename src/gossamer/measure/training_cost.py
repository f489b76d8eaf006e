"""The price of a training run in numbers: operations, bytes, active parameters and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gossamer.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class TrainingCost:
    """The cost of a run so far.

    Attributes
    ----------
    steps
        Steps of the optimiser.
    units, unit
        Tokens or samples that went forward in training mode, and which of the two.
    seconds
        Time from the first forward pass of each step to its end; loading data and evaluating between steps are left
        out.
    training_flops, dense_training_flops
        Operations of all forward and backward passes, with the active weights only and with all weights.
    inference_flops, dense_inference_flops
        Forward operations for one unit with the weights active at the end, and with all.
    bytes_moved, dense_bytes_moved
        Least traffic between memory and processor over the run, with active weights only and with all.
    parameters, active_parameters
        All parameters, and those active at the end.
    average_parameters, average_over_steps
        Mean number of active parameters over units, and over steps.
    counted
        Which parameters these four numbers count.
    """

    steps: int
    units: int
    unit: str
    seconds: float
    training_flops: float
    dense_training_flops: float
    inference_flops: float
    dense_inference_flops: float
    bytes_moved: float
    dense_bytes_moved: float
    parameters: int
    active_parameters: int
    average_parameters: float
    average_over_steps: float
    counted: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TrainingCost:
        """Rebuild a cost from :meth:`to_dict`.

        Raises
        ------
        CheckpointError
            If a part is missing or unknown.
        """
        if set(stored) != {field.name for field in fields(cls)}:
            different = sorted(set(stored) ^ {field.name for field in fields(cls)})
            raise CheckpointError(f"a stored training cost lacks or adds {different[0]!r}; measure the run again")
        return cls(**stored)

    def __add__(self, other: TrainingCost) -> TrainingCost:
        """One run after the other, such as pretraining and fine-tuning; sizes are those of the second."""
        if (self.unit, self.counted) != (other.unit, other.counted):
            raise ConfigurationError(
                f"a run counted in {self.unit} ({self.counted}) cannot be added to one in {other.unit} "
                f"({other.counted}); give both ledgers the same units and the same `of`"
            )
        summed = ("steps", "units", "seconds", "training_flops", "dense_training_flops")
        values = asdict(other)
        for name in (*summed, "bytes_moved", "dense_bytes_moved"):
            values[name] += getattr(self, name)
        for name, weight in (("average_parameters", "units"), ("average_over_steps", "steps")):
            parts = [(getattr(cost, name), getattr(cost, weight)) for cost in (self, other)]
            total = sum(share for _, share in parts)
            values[name] = sum(value * share for value, share in parts) / total if total else values[name]
        return TrainingCost(**values)
