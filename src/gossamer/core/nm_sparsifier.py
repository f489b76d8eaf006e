"""What all N:M training has in common: which layers, which pattern in each, and a choice after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from gossamer.core.patterns import NM, Pattern
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.roles import Role, without_roles
from gossamer.core.sparse_sites import Site
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.sparsifier import Phase, Sparsifier
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, PatternError, TargetError

Indivisible = Literal["refuse", "dense"]


@dataclass(kw_only=True)
class NMSparsifier(Sparsifier):
    """Train dense weights of which the model computes with the N largest of every M.

    The choice is made by magnitude after every step of the optimiser, once however many backward passes a step takes.
    Gradients go to all weights (the straight-through estimator), so that one that is not chosen may come back. As it
    stands, this is that estimator alone.

    Parameters
    ----------
    pattern
        N:M along the inputs of a layer, for convolutions along their input channels; ``"2:4@0"`` along the outputs.
    sparsity
        Follows from the pattern; may be given if it agrees.
    own
        Layers with a pattern of their own: glob on module names → N:M, the first that matches.
    keep
        Roles of layers that stay dense; by convention the first. Output heads are left out by `heads`.
    indivisible
        What to do with a layer whose width is no multiple of M: ``"refuse"``, or leave it ``"dense"`` with a note.

    Raises
    ------
    PatternError
        If the pattern is no N:M pattern; on attaching, if it does not divide a layer.
    SparsityError
        If `sparsity` contradicts it.
    """

    pattern: str | Pattern = "2:4"
    sparsity: float | None = None  # type: ignore[assignment]
    own: Mapping[str, str | Pattern] = field(default_factory=dict)
    keep: tuple[Role, ...] = ("first",)
    indivisible: Indivisible = "refuse"

    def __post_init__(self) -> None:
        self.pattern = as_nm(self.pattern)
        self.sparsity = float(self.pattern.resolve(self.sparsity))
        super().__post_init__()
        self.own = {glob: as_nm(pattern) for glob, pattern in self.own.items()}
        if self.indivisible not in get_args(Indivisible):
            raise ConfigurationError(f"indivisible is {self.indivisible!r}; use 'refuse' or 'dense'")

    # ------------------------------------------------------------------------------------------ which layers

    def targets(self, model: nn.Module) -> list[Target]:
        """Which matrices become N:M.

        Raises
        ------
        TargetError
            If there is none.
        PatternError
            If a pattern does not divide one, and that is not allowed.
        """
        found = self._candidates(model)
        fitting = [target for target in found if self.indivisible == "refuse" or self._fits(target)]
        if not fitting:
            raise TargetError(f"no layer to make {self.pattern}: none of {len(found)} has a width that M divides")
        for target in fitting:
            self._check(target)
        return fitting

    def _candidates(self, model: nn.Module) -> list[Target]:
        found = super().targets(model)
        return without_roles(model, found, self.keep) if self.keep else found

    def _check(self, target: Target) -> None:
        for pattern in self.patterns(self.pattern_of(target)):
            pattern.check_shape(tuple(target.shape), target.name)

    def _fits(self, target: Target) -> bool:
        try:
            self._check(target)
        except PatternError:
            return False
        return True

    def pattern_of(self, target: Target) -> NM:
        """What a layer ends with."""
        for glob, pattern in self.own.items():
            if fnmatchcase(target.module_name, glob):
                return as_nm(pattern)
        return as_nm(self.pattern)

    def site(self, name: str, targets: Sequence[Target]) -> Site | None:
        """A dense weight, and the part of it that counts."""
        if isinstance(targets[0].module, SparseWeight):
            raise ConfigurationError(
                f"{name} stores no zeros, but {type(self).__name__} trains them; attach it before layers are replaced"
            )
        return ProjectedWeight(name, targets[0].parameter, targets)

    # ------------------------------------------------------------------------------------------ what, and when

    def patterns(self, final: NM) -> Sequence[Pattern]:
        """All that a layer goes through on its way to a pattern."""
        return [final]

    def pattern_at(self, step: int, final: NM) -> Pattern | None:
        """What a layer that ends with a pattern has after a number of steps; None is dense."""
        return final

    def fade_at(self, step: int) -> float:
        """What weights that are not chosen are multiplied with after a number of steps."""
        return 0.0

    def density_at(self, step: int) -> float:
        """Share of the weights that take part in the step after that many, by `pattern`; a faded weight does."""
        pattern = self.pattern_at(step, as_nm(self.pattern))
        if pattern is None or self.fade_at(step) > 0:
            return 1.0
        return 1.0 - float(pattern.resolve(None))

    def wants_gradient(self, step: int) -> bool:
        """Whether weights that are not chosen learn: they do, which costs a dense product in each step."""
        return True

    def start(self, training: SparseTraining) -> None:
        """Note what stays dense, and choose."""
        if self.indivisible == "dense":
            for target in self._candidates(training.model):
                if target.name not in training.targets:
                    shape = tuple(target.shape)
                    training.notes.append(
                        f"{target.name} stays dense: {self.pattern_of(target)} does not divide {shape}"
                    )
        self.change(training)

    def change(self, training: SparseTraining) -> None:
        """Choose anew."""
        step = training.step
        final = self._final(training)
        training.project({name: self.pattern_at(step, each) for name, each in final.items()}, self.fade_at(step))

    def finish(self, training: SparseTraining) -> None:
        """Choose by the final pattern, if training ended before it."""
        final = self._final(training)
        reached = all(self.pattern_at(training.step, each) == each for each in final.values())
        if not reached or self.fade_at(training.step):
            training.project(final)

    def _final(self, training: SparseTraining) -> dict[str, NM]:
        return {target.parameter_name: self.pattern_of(target) for target in training.targets.values()}

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "explore"


def as_nm(pattern: str | Pattern) -> NM:
    """Read an N:M pattern.

    Raises
    ------
    PatternError
        If it is a pattern of another kind.
    """
    found = Pattern.parse(pattern)
    if not isinstance(found, NM):
        raise PatternError(f"pattern is {found}; N:M training needs one such as 2:4 or 1:16")
    return found
