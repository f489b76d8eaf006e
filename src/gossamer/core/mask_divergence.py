"""How far masks have moved, and how restless they are, while a model trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError


def sparse_architecture_divergence(first: MaskSet, second: MaskSet, normalize: bool = True) -> float:
    """Number of weights that one of two sets of masks keeps and the other does not.

    ``SAD = Σ_l ‖m_l − m'_l‖₁``, over the number of all weights if normalised [Zhou et al., 2021, arXiv 2102.04010].

    Parameters
    ----------
    first, second
        Masks of the same parameters at two times.
    normalize
        Whether to divide by the number of weights, so that models can be compared.

    Raises
    ------
    TargetError
        If they cover different parameters.
    """
    distance = first.distance(second)
    return distance / max(1, first.total) if normalize else float(distance)


@dataclass
class MaskTrace:
    """Divergence along a run: from its first masks, and from one look to the next.

    Attributes
    ----------
    steps
        When it looked.
    since_first
        Normalised divergence from the first masks.
    flips
        Normalised divergence from those of the look before: the share of weights that changed sides.

    Examples
    --------
    >>> import torch
    >>> trace = MaskTrace()
    >>> for step, kept in enumerate(([True, False], [False, True], [True, False])):
    ...     trace.look(step, MaskSet({"weight": torch.tensor([kept])}))
    >>> trace.since_first, trace.flips, trace.total_flips
    ([0.0, 1.0, 0.0], [0.0, 1.0, 1.0], 2.0)
    """

    steps: list[int] = field(default_factory=list)
    since_first: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    _first: MaskSet | None = field(default=None, repr=False)
    _last: MaskSet | None = field(default=None, repr=False)

    def look(self, step: int, masks: MaskSet) -> None:
        """Note the masks of a step.

        Raises
        ------
        ConfigurationError
            If the step does not follow the one before.
        """
        if self.steps and step <= self.steps[-1]:
            raise ConfigurationError(f"step {step} does not follow step {self.steps[-1]}; look at masks in their order")
        first, last = self._first or masks, self._last or masks
        self._first, self._last = first, masks
        self.steps.append(step)
        self.since_first.append(sparse_architecture_divergence(first, masks))
        self.flips.append(sparse_architecture_divergence(last, masks))

    @property
    def total_flips(self) -> float:
        """How often a weight changed sides on average, as far as the looks tell."""
        return sum(self.flips)
