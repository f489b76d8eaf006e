"""Dense weights that train while the model computes with a part of them.

In N:M training every weight keeps learning, and after every step the largest of each group are chosen anew. So the
parameter of a layer is two things in turn. Between steps it holds what the layer computes with: the chosen weights,
and zeros. What it lacks is kept aside, and put back for the length of the optimiser's step. Nothing is wrapped or
renamed: the model's code, whatever it does with its weights, and its state dict see a sparse matrix; and the gradient
of that matrix, which autograd gives for its zeros too, is the straight-through gradient of the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.masks import count_bits, mask_, pack_bits, unpack_bits
from gossamer.core.patterns import NM, Pattern
from gossamer.core.ranks import ranks, same_everywhere
from gossamer.core.selection import check_scores
from gossamer.core.sparse_sites import Site
from gossamer.core.targets import Target
from gossamer.errors import CheckpointError, ConfigurationError

_AT_ONCE = 1 << 17  # weights whose scores, mask and copies stay in the cache together


class ProjectedWeight(Site):
    """A dense weight of which a pattern chooses the part that counts.

    Parameters
    ----------
    name, parameter
        Whose weight.
    targets
        The matrices that it holds: one, or several stacked experts.
    chain
        Whether a faded weight gets only its share of the gradient, as the chain rule has it; otherwise all of it.

    Attributes
    ----------
    fade
        What the weights that are not chosen are multiplied with, β in [0, 1]. At 0 they are zero; above, the model
        computes with all weights, and :attr:`bits` says so.
    """

    def __init__(self, name: str, parameter: nn.Parameter, targets: Sequence[Target], *, chain: bool = False):
        self.name, self.parameter, self.shape = name, parameter, parameter.shape
        self.fade = 0.0
        self._targets = list(targets)
        self._everything = pack_bits(torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        self._chosen = self._everything
        self._active = parameter.numel()
        self._aside: Tensor | None = None
        self._whole = True
        self._version: int | None = None
        self._hook = parameter.register_hook(self._faded) if chain else None

    # ------------------------------------------------------------------------------------------ what there is

    @property
    def bits(self) -> Tensor:  # noqa: D102
        return self._everything if self.fade else self._chosen

    @property
    def active(self) -> int:  # noqa: D102
        return self.parameter.numel() if self.fade else self._active

    @property
    def aside(self) -> Tensor | None:
        """The weights that were not chosen, zero elsewhere, before they are faded; None while all are chosen."""
        return self._aside

    def chosen(self) -> Tensor:
        """Which weights are chosen, faded or not: bool, of the shape of the parameter."""
        return unpack_bits(self._chosen, self.shape)

    def dense(self) -> Tensor:
        """The weight that trains; a copy."""
        if self._aside is None or self._whole:
            return self.parameter.detach().clone()
        return torch.where(self.chosen(), self.parameter.detach(), self._aside)

    def weight(self) -> Tensor:
        """What the model computes with; while masks are being chosen, the dense weight. Detached, no copy."""
        return self.parameter.detach()

    def gradient(self) -> Tensor | None:
        """The gradient of the parameter, which has that of zeros in it."""
        return self.parameter.grad

    def collect(self, wanted: bool) -> None:
        """There is nothing to be collected beside the gradient."""

    # ------------------------------------------------------------------------------------------ a step

    @torch.no_grad()
    def restore(self) -> None:
        """Put the dense weight into the parameter."""
        if self._aside is None or self._whole:
            return
        self._check_version()
        if self.fade:
            self.parameter.copy_(torch.where(self.chosen(), self.parameter, self._aside))
        else:
            self.parameter.add_(self._aside)
        self._whole = True

    def hold(self, moved: bool = True) -> None:
        """Every weight was meant to move."""

    def settle(self) -> None:
        """Choose as before, if nobody has chosen anew since the dense weight was put back."""
        if self._whole and self._aside is not None:
            self._divide()

    @torch.no_grad()
    def choose(self, pattern: Pattern | None, fade: float = 0.0) -> None:
        """Choose by magnitude of the dense weight.

        Parameters
        ----------
        pattern
            Of what counts, in every matrix of the parameter; None takes all.
        fade
            β.

        Raises
        ------
        NonFiniteError
            If a weight is NaN.
        """
        self.restore()
        if pattern is None or fade == 1:
            self._chosen, self._active, self._aside, self.fade = self._everything, self.parameter.numel(), None, 0.0
            return
        self.fade = fade
        if self._runs_through(pattern):
            assert isinstance(pattern, NM)
            self._choose_in_passing(pattern)
        else:
            self._chosen = same_everywhere(pack_bits(self._selected(pattern)))
            self._divide()
        self._active = count_bits(self._chosen)

    def _runs_through(self, pattern: Pattern) -> bool:
        """Whether groups lie one after another in memory, so that one pass over it is enough."""
        plain = len(self._targets) == 1 and self._targets[0].index is None and not self._targets[0].transposed
        along = isinstance(pattern, NM) and pattern.dim == self.parameter.dim() - 1
        return plain and along and self.parameter.is_contiguous() and ranks() == 1

    def _choose_in_passing(self, pattern: NM) -> None:
        pattern.check_shape(tuple(self.shape), self.name)
        weight, aside = self.parameter.detach().view(-1), self._room().view(-1)
        # the very bits may be part of a saved state
        self._chosen = torch.empty_like(self._everything)
        once = math.lcm(8, pattern.m) * max(1, _AT_ONCE // math.lcm(8, pattern.m))
        for start in range(0, len(weight), once):
            part = weight[start : start + once]
            bits = pack_bits(pattern.keep(check_scores(part.abs(), self.name).view(-1, pattern.m)))
            self._chosen[start // 8 : start // 8 + len(bits)] = bits
            self._divide_part(part, aside[start : start + once], bits)
        self._divided()

    def _selected(self, pattern: Pattern) -> Tensor:
        kept = torch.ones(self.shape, dtype=torch.bool, device=self.parameter.device)
        for target in self._targets:
            mask = pattern.select(target.matrix().abs(), name=target.name)
            kept[... if target.index is None else target.index] = mask.transpose(0, 1) if target.transposed else mask
        return kept

    # ------------------------------------------------------------------------------------------ taking apart

    def _room(self) -> Tensor:
        if self._aside is None:
            self._aside = torch.empty_like(self.parameter)
        return self._aside

    def _divide(self) -> None:
        """Take the dense weight apart by what is chosen."""
        self._divide_part(self.parameter.detach(), self._room(), self._chosen)
        self._divided()

    def _divide_part(self, weight: Tensor, aside: Tensor, bits: Tensor) -> None:
        aside.copy_(weight)
        mask_(weight, bits)
        aside.sub_(weight)
        if self.fade:
            weight.add_(aside, alpha=self.fade)

    def _divided(self) -> None:
        self._whole = False
        self._version = self.parameter._version

    def _faded(self, gradient: Tensor) -> Tensor | None:
        if self._aside is None or self._whole:
            return None
        return torch.where(self.chosen(), gradient, gradient * self.fade)

    def _check_version(self) -> None:
        """Refuse weights that were put in the place of what the model computed with, and do not fit what is aside."""
        if self.parameter._version == self._version:
            return
        assert self._aside is not None
        missing = ~self.chosen()
        if not torch.equal(self.parameter[missing], (self._aside * self.fade)[missing]):
            raise ConfigurationError(
                f"weights of {self.name} that are kept aside have been written to since the last step; load the state "
                f"of the run together with that of the model, or finalize() before changing weights"
            )

    # ------------------------------------------------------------------------------------------ from outside

    def assign(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Choose these weights; the others are kept aside, and what the optimiser remembers is kept."""
        self.restore()
        bits = pack_bits(mask.to(self.parameter.device))
        self._chosen, self._active, self.fade = bits, int(mask.count_nonzero()), 0.0
        self._divide()

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """What is not chosen trains too, and has a memory."""

    def release(self) -> None:
        """Leave what the model computes with in the parameter, and drop the rest."""
        self.settle()
        self._aside = None
        if self._hook is not None:
            self._hook.remove()

    def state(self) -> dict[str, Any]:
        """What is aside, and what has been chosen."""
        aside = None if self._aside is None else self._aside.clone()
        return {"aside": aside, "chosen": self._chosen.cpu(), "fade": self.fade}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the parameter itself is loaded with the model."""
        try:
            aside, chosen, fade = state["aside"], state["chosen"], float(state["fade"])
            fits = chosen.shape == self._everything.shape and (aside is None or aside.shape == self.shape)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of {self.name} in this run is damaged: {error!r}") from error
        if not fits:
            raise CheckpointError(f"what is kept aside of {self.name} has another shape than {tuple(self.shape)}")
        self._aside = None if aside is None else aside.to(self.parameter).clone()
        self._chosen, self.fade = chosen.to(self._everything.device).clone(), fade
        self._active, self._whole, self._version = count_bits(self._chosen), aside is None, None
