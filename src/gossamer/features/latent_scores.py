"""Which features mean something: how well being active tells the value of a variable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import CalibrationError, ConfigurationError


@dataclass(frozen=True, eq=False)
class LatentF1:
    """How well features tell values.

    Attributes
    ----------
    table
        Variable → ``(features, values)``: the harmonic mean of precision P(value | active) and recall
        P(active | value); 0 for features that are never active.
    grouped
        Variable → ``(features,)``: the best that a feature does for a union of values.
    """

    table: dict[str, Tensor]
    grouped: dict[str, Tensor]

    def best(self) -> Tensor:
        """The best single description of each feature by a value or a union of values, ``(features,)``."""
        return torch.stack(list(self.grouped.values())).amax(0)

    def interpretable(self, bar: float = 0.8) -> float:
        """Share of the features that are ever active which one description explains."""
        best = self.best()
        alive = best > 0
        return float((best[alive] >= bar).float().mean()) if bool(alive.any()) else 0.0

    def cover(self, bar: float = 0.8) -> dict[str, float]:
        """Variable → share of its values that some feature tells."""
        return {name: float((table.amax(0) >= bar).float().mean()) for name, table in self.table.items()}


def latent_f1(active: Tensor, labels: Mapping[str, Tensor], max_group: int = 10) -> LatentF1:
    """Compare when features are active with the values of variables.

    Unions are tried greedily: the values of a variable in the order of their F1, up to `max_group` of them.

    Parameters
    ----------
    active
        Bool ``(prompts, features)``.
    labels
        Variable → its value on every prompt.
    max_group
        Values in a union, at most.

    Raises
    ------
    CalibrationError
        If shapes do not fit.
    ConfigurationError
        If `max_group` is below 1.

    Examples
    --------
    >>> found = latent_f1(torch.tensor([[True], [True], [False]]), {"a": torch.tensor([0, 0, 1])})
    >>> found.table["a"]
    tensor([[1., 0.]])
    """
    if active.dim() != 2 or any(value.shape != active.shape[:1] for value in labels.values()) or not labels:
        shapes = {name: tuple(value.shape) for name, value in labels.items()}
        raise CalibrationError(
            f"active is {tuple(active.shape)}, labels are {shapes}; give (prompts, features), (prompts,)"
        )
    if max_group < 1:
        raise ConfigurationError(f"max_group is {max_group}; it must be 1 or more")
    fired = active.double()
    times = fired.sum(0)
    table, grouped = {}, {}
    for name, value in labels.items():
        marks = torch.nn.functional.one_hot(value).double()
        both, size = fired.t() @ marks, marks.sum(0)
        # 2 · both / (active + size) is the harmonic mean, and 0 where both are never
        f1 = 2 * both / (times[:, None] + size).clamp(min=1)
        order = f1.argsort(1, descending=True)[:, :max_group]
        unions = both.gather(1, order).cumsum(1) * 2
        spread = times[:, None] + size.expand_as(f1).gather(1, order).cumsum(1)
        table[name] = f1.float()
        grouped[name] = (unions / spread.clamp(min=1)).amax(1).float()
    return LatentF1(table, grouped)
