"""Which weights of a model are there, and how they are exchanged: exact counts, whatever the layer stores.

A :class:`Topology` knows no method and no schedule: it prunes to a count, grows a number, and keeps the optimiser's
memory of each weight in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from gossamer.core import scores as score_functions
from gossamer.core.masking import LazyScores
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.randomness import generator_for
from gossamer.core.ranks import same_everywhere
from gossamer.core.selection import Sparsity, dropped_count, keep_highest, keep_highest_jointly
from gossamer.core.sparse_sites import MaskedWeight, Site, StoredNonzeros
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, UnknownNameError

Scores = Callable[["Topology", str], Tensor]
"""``scores(topology, name)``: ``(out, in, kernel…)``, higher = more worth keeping, or growing."""


class Topology:
    """The weights of a model that may become zero, and those that are.

    Attributes
    ----------
    targets
        Name → matrix, in the orientation ``(out, in, kernel…)``.
    optimizer
        Whose memory follows the changes.
    generator
        For everything that is drawn; on the CPU.
    step
        Steps of the optimiser so far.
    history
        ``(step, active weights)`` at the start and after every change.
    """

    def __init__(self, targets: Iterable[Target], optimizer: torch.optim.Optimizer, seed: int = 0):
        self.targets: dict[str, Target] = {target.name: target for target in targets}
        self.optimizer = optimizer
        self.generator = generator_for("sparse training", seed)
        self.step = 0
        self.history: list[tuple[int, int]] = []
        self._sites = self._find_sites()

    def _find_sites(self) -> dict[str, Site]:
        parts: dict[str, list[Target]] = {}
        for target in self.targets.values():
            parts.setdefault(target.parameter_name, []).append(target)
        return {name: self._make_site(name, targets) for name, targets in parts.items()}

    def _make_site(self, name: str, targets: list[Target]) -> Site:
        """How the zeros of a parameter are held, which is one target or several stacked experts."""
        first = targets[0]
        if isinstance(first.module, SparseWeight):
            return StoredNonzeros(name, first.module)
        return MaskedWeight(name, first.parameter)

    # ------------------------------------------------------------------------------------------ what there is

    @property
    def masks(self) -> MaskSet:
        """What remains, by the names of parameters, as they are stored."""
        state: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            state[f"{name}:bits"] = site.bits.cpu()
            state[f"{name}:shape"] = torch.tensor(site.shape, dtype=torch.int64)
        return MaskSet.from_state_dict({key: value.clone() for key, value in state.items()})

    def mask(self, name: str) -> Tensor:
        """Which weights of a target are active: bool, ``(out, in, kernel…)``."""
        return self._oriented(name, self._site(name).mask())

    def weight(self, name: str) -> Tensor:
        """Weights of a target, detached, zero where inactive; of a dense parameter a view that writes through."""
        return self._oriented(name, self._site(name).weight())

    def dense(self, name: str) -> Tensor:
        """Weights of a target with those that train although the model does not compute with them; a copy."""
        return self._oriented(name, self._site(name).dense())

    def gradient(self, name: str) -> Tensor:
        """Gradient of all weights of a target, inactive ones included, at the step just made.

        Raises
        ------
        ConfigurationError
            If it was not collected.
        """
        gradient = self._site(name).gradient()
        if gradient is None:
            raise ConfigurationError(
                f"there is no gradient of the zeros of {name} at step {self.step}: the method did not ask for it with "
                f"wants_gradient, or none has reached it"
            )
        return self._oriented(name, gradient)

    def active(self, name: str) -> int:
        """Number of weights of a target that are not masked."""
        return self._site(name).active if self.targets[name].index is None else int(self.mask(name).sum())

    @property
    def total(self) -> int:
        """Number of weights of all targets: the denominator of :attr:`sparsity`."""
        return sum(target.shape.numel() for target in self.targets.values())

    @property
    def density(self) -> float:
        """Share of the targets' weights that are active."""
        return self.history[-1][1] / self.total if self.history else 1.0

    @property
    def sparsity(self) -> float:
        """Share of the targets' weights that are masked."""
        return 1 - self.density

    # ------------------------------------------------------------------------------------------ what changes

    def assign(self, masks: Mapping[str, Tensor]) -> None:
        """Set masks: what goes becomes zero and is forgotten by the optimiser, what comes starts at zero.

        Parameters
        ----------
        masks
            Target name → bool ``(out, in, kernel…)``, or a :class:`MaskSet`, whose masks are as parameters are stored.
            What is not named stays as it is.

        Raises
        ------
        UnknownNameError, ConfigurationError
            If a name, shape or dtype does not fit.
        """
        by_site = self._stored(masks) if isinstance(masks, MaskSet) else self._gathered(masks)
        for name, whole in by_site.items():
            self._sites[name].assign(same_everywhere(whole), self.optimizer)
        if self.history:
            self._record()

    def _stored(self, masks: MaskSet) -> dict[str, Tensor]:
        for name, mask in masks.items():
            if name not in self._sites:
                raise UnknownNameError("sparse weight", name, self._sites)
            if mask.shape != self._sites[name].shape:
                shape = tuple(self._sites[name].shape)
                raise ConfigurationError(f"the mask of {name} is {tuple(mask.shape)}; it must be {shape}")
        return dict(masks)

    def _gathered(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of parameters out of masks of targets, of which several may be parts of one parameter."""
        by_site: dict[str, Tensor] = {}
        for name, mask in masks.items():
            target, site = self._target(name), self._site(name)
            if mask.dtype != torch.bool or mask.shape != target.shape:
                raise ConfigurationError(
                    f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(target.shape)}"
                )
            whole = by_site.setdefault(target.parameter_name, site.mask())
            stored = mask.transpose(0, 1) if target.transposed else mask
            whole[... if target.index is None else target.index] = stored.to(whole.device)
        return by_site

    def project(self, patterns: Mapping[str, Pattern | None], fade: float = 0.0) -> None:
        """Choose anew the part of dense weights that the model computes with; only :class:`ProjectedWeight` has one.

        Parameters
        ----------
        patterns
            Parameter name → of what is chosen by magnitude; None chooses everything.
        fade
            What the others are multiplied with, in [0, 1]. While it is above 0 all weights count as active.
        """
        for name, pattern in patterns.items():
            site = self._sites[name]
            assert isinstance(site, ProjectedWeight), name
            site.choose(pattern, fade)
        if self.history and self.history[-1][1] != sum(self.active(name) for name in self.targets):
            self._record()

    def prune(
        self,
        sparsity: Sparsity | Mapping[str, Sparsity],
        scope: Literal["layer", "model"] | Pattern = "layer",
        scores: Scores | None = None,
    ) -> None:
        """Remove the lowest scores until exactly a share is zero; nothing comes back.

        Parameters
        ----------
        sparsity
            Of every target, or of each by name; with the scope ``"model"`` of all together. Where more is zero
            already, nothing happens.
        scope
            What competes: the weights of a layer, or of the whole model; or a pattern of :mod:`gossamer.core.patterns`.
        scores
            By default the magnitude.
        """
        measure = scores or magnitude
        if scope == "model" or (isinstance(scope, Unstructured) and scope.scope == "model"):
            if isinstance(sparsity, Mapping):
                raise ConfigurationError("one ranking of the whole model has one sparsity, not one for each layer")
            alive = sum(self.active(name) for name in self.targets)
            dropped = max(dropped_count(self.total, sparsity), self.total - alive)
            lazy = LazyScores(self.targets.values(), lambda target: self._below(target.name, measure))
            self.assign(keep_highest_jointly(lazy, dropped))
            return
        pattern = scope if isinstance(scope, Pattern) else Unstructured(scope)
        for name, target in self.targets.items():
            wanted = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
            zeros = target.shape.numel() - self.active(name)
            if isinstance(pattern, Unstructured) and pattern.scope == "layer":
                size = target.shape.numel()
                wanted = Fraction(max(dropped_count(size, wanted), zeros), size)
            self.assign({name: pattern.select(self._below(name, measure), wanted, name) & self.mask(name).cpu()})

    def exchange(
        self,
        share: float | Mapping[str, int],
        growth: Literal["gradient", "random"] | Scores = "gradient",
        scores: Scores | None = None,
    ) -> None:
        """Drop the lowest scores of each layer, and grow as many of its inactive weights; the counts stay exact.

        What has just been dropped may come back at once, as in RigL and GraNet.

        Parameters
        ----------
        share
            Of the active weights of each layer (rounded to whole weights), or the number for each layer by name.
        growth
            What the highest of is grown: the absolute gradient, a random number, or scores of one's own.
        scores
            What the lowest of is dropped; by default the magnitude.
        """
        grow = GROWTHS.get(growth) if isinstance(growth, str) else growth
        if grow is None:
            raise ConfigurationError(f"growth is {growth!r}; use {', '.join(GROWTHS)}, or a function of your own")
        for name in self.targets:
            active = self.active(name)
            number = share[name] if isinstance(share, Mapping) else round(share * active)
            number = min(number, active)
            if not number > 0:
                continue
            ranked = self._below(name, scores or magnitude)
            left = _highest(ranked, active - number, f"scores of {name}")
            # memory that is new to the process takes longer to touch than all else here, so it is used again
            wanted = torch.where(left, ranked.new_tensor(-torch.inf), grow(self, name).cpu().float(), out=ranked)
            fresh = _highest(wanted, number, f"growth scores of {name}")
            self.assign({name: left | fresh})

    def _below(self, name: str, measure: Scores) -> Tensor:
        """Scores under which what is inactive goes before anything that is active."""
        target = self._target(name)
        target.check_finite()
        inactive = ~self.mask(name).cpu()
        found = measure(self, name).cpu().float()
        # a magnitude is made for this; what the functions of others return may be something they keep
        return (
            found.masked_fill_(inactive, -torch.inf)
            if measure is magnitude
            else found.masked_fill(inactive, -torch.inf)
        )

    def _record(self) -> None:
        active = sum(self.active(name) for name in self.targets)
        if self.history and self.history[-1][0] == self.step:
            self.history.pop()
        self.history.append((self.step, active))

    def _target(self, name: str) -> Target:
        if name not in self.targets:
            raise UnknownNameError("sparse weight", name, self.targets)
        return self.targets[name]

    def _site(self, name: str) -> Site:
        return self._sites[self._target(name).parameter_name]

    def _oriented(self, name: str, stored: Tensor) -> Tensor:
        target = self.targets[name]
        part = stored if target.index is None else stored[target.index]
        return part.transpose(0, 1) if target.transposed else part


def _highest(values: Tensor, number: int, name: str) -> Tensor:
    return keep_highest(values.reshape(1, -1), values.numel() - number, name).view(values.shape)


def magnitude(topology: Topology, name: str) -> Tensor:
    """``|W|`` of a target."""
    return score_functions.magnitude(topology.weight(name))


def gradient_magnitude(topology: Topology, name: str) -> Tensor:
    """``|∂L/∂W|`` of a target, zeros included."""
    return topology.gradient(name).abs().float()


def random_numbers(topology: Topology, name: str) -> Tensor:
    """Uniform random numbers of the run's generator."""
    return score_functions.random(torch.empty(topology.targets[name].shape), topology.generator)


GROWTHS: dict[str, Scores] = {"gradient": gradient_magnitude, "random": random_numbers}
"""Ways to choose what grows, by name."""
