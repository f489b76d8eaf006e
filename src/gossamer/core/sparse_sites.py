"""Where weights are switched on and off: in a dense parameter under a mask, or in a layer that stores no zeros."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gossamer.core.masks import mask_, pack_bits, unpack_bits
from gossamer.core.optimizer_state import per_weight, rearrange, repair
from gossamer.core.ranks import ranks
from gossamer.core.sparse_weight import SparseWeight
from gossamer.errors import ConfigurationError


class Site(ABC):
    """One parameter whose zeros change, in the orientation in which it is stored."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size

    @property
    @abstractmethod
    def bits(self) -> Tensor:
        """The mask, packed."""

    @property
    @abstractmethod
    def active(self) -> int:
        """Number of weights that are there."""

    def mask(self) -> Tensor:
        """The mask, unpacked; a copy."""
        return unpack_bits(self.bits, self.shape)

    @abstractmethod
    def weight(self) -> Tensor:
        """The weights with their zeros, detached."""

    def dense(self) -> Tensor:
        """The weights with those that train although nothing computes with them; a copy."""
        return self.weight().clone()

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient of all weights that :meth:`collect` asked for."""

    @abstractmethod
    def collect(self, wanted: bool) -> None:
        """Whether the coming backward passes have to keep the gradient of zeros too; what was kept is forgotten."""

    @abstractmethod
    def assign(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Change the mask, and what the optimiser remembers; None if that is loaded from elsewhere."""

    def restore(self) -> None:  # noqa: B027
        """Make ready for a step of the optimiser: put back what is kept aside, if anything is."""

    def settle(self) -> None:  # noqa: B027
        """Make ready for the model: keep aside again what it does not compute with, if anything."""

    @abstractmethod
    def hold(self, moved: bool = True) -> None:
        """Zero what a step may have moved; without `moved` it has moved nothing, and that is only noted."""

    @abstractmethod
    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser remember nothing of what is not there."""

    @abstractmethod
    def release(self) -> None:
        """Let go of everything."""


class MaskedWeight(Site):
    """A dense parameter of which some weights are held at zero.

    Gradients are masked as they arrive, before anybody can clip or accumulate them; weights after each step of the
    optimiser. While :meth:`collect` is on, a copy of the gradient with nothing masked is kept beside.
    """

    def __init__(self, name: str, parameter: nn.Parameter):
        self.name, self.parameter, self.shape = name, parameter, parameter.shape
        self._bits = pack_bits(torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        self._active = parameter.numel()
        self._wanted = False
        self._collected: Tensor | None = None
        self._last: Tensor | None = None
        self._version: int | None = None
        self._hook = parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def bits(self) -> Tensor:  # noqa: D102
        return self._bits

    @property
    def active(self) -> int:  # noqa: D102
        return self._active

    def weight(self) -> Tensor:  # noqa: D102
        return self.parameter.detach()

    def gradient(self) -> Tensor | None:  # noqa: D102
        return self._collected

    def collect(self, wanted: bool) -> None:  # noqa: D102
        self._wanted, self._collected, self._last = wanted, None, None

    def _arrived(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._check_version()
        if self._wanted:
            self._add(parameter.grad)
        if self.active < self.parameter.numel():
            mask_(parameter.grad, self._bits)

    def _add(self, gradient: Tensor) -> None:
        """Add what has arrived to the copy: of active weights `gradient` has the sum already, of others the latest."""
        fresh = self._collected is None or gradient is not self._last or not bool(torch.isfinite(self._collected).all())
        if fresh:  # the first pass, or the first after a step that a gradient scaler has skipped
            self._collected = gradient.detach().clone()
        else:
            assert self._collected is not None
            self._collected = torch.where(self.mask(), gradient, self._collected + gradient)
        self._last = gradient

    def _check_version(self) -> None:
        if self._version is None or self.parameter._version == self._version:
            return
        moved = int((self.parameter.detach()[~self.mask()] != 0).sum())
        if moved:
            raise ConfigurationError(
                f"{moved} weights of {self.name} that are masked have been moved, and not by the optimiser that the "
                f"method is attached to; detach it with finalize() and attach it to the optimiser in use"
            )
        self._version = self.parameter._version

    def mask_gradient(self) -> None:
        """Mask the gradient again, where something may have written to it after it arrived."""
        if self.parameter.grad is not None and self.active < self.parameter.numel():
            mask_(self.parameter.grad, self._bits)

    def assign(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:  # noqa: D102
        mask = mask.to(self.parameter.device)
        bits, old = pack_bits(mask), self._bits
        if torch.equal(bits, old):
            return
        self._bits, self._active = bits, int(mask.count_nonzero())
        self.hold()
        self.mask_gradient()
        if optimizer is not None and per_weight(optimizer, self.parameter):
            before = unpack_bits(old, self.shape)
            grown = mask & ~before
            repair(optimizer, self.parameter, before & ~mask, grown, self._active - int(grown.count_nonzero()))

    def hold(self, moved: bool = True) -> None:  # noqa: D102
        if moved and self.active < self.parameter.numel():
            mask_(self.parameter.detach(), self._bits)
        self._version = self.parameter._version

    def forget(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: D102
        if self.active < self.parameter.numel():
            for value in per_weight(optimizer, self.parameter).values():
                mask_(value, self._bits)

    def release(self) -> None:  # noqa: D102
        self._hook.remove()


class StoredNonzeros(Site):
    """A layer that stores no zeros: its list of values changes its length."""

    def __init__(self, name: str, layer: SparseWeight):
        self.name, self.layer, self.parameter = name, layer, layer.values
        self.shape = layer.mask().shape

    @property
    def bits(self) -> Tensor:  # noqa: D102
        return pack_bits(self.layer.mask())

    @property
    def active(self) -> int:  # noqa: D102
        return self.parameter.numel()

    def mask(self) -> Tensor:  # noqa: D102
        return self.layer.mask()

    def weight(self) -> Tensor:  # noqa: D102
        return self.layer.dense_weight()

    def gradient(self) -> Tensor | None:  # noqa: D102
        return self.layer.dense_gradient

    def collect(self, wanted: bool) -> None:  # noqa: D102
        self.layer.collect_gradient, self.layer.dense_gradient = wanted, None

    def assign(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:  # noqa: D102
        if ranks() > 1 and not self.layer.apart and not torch.equal(mask, self.layer.mask().to(mask.device)):
            raise ConfigurationError(
                f"{self.name} stores no zeros, and DistributedDataParallel cannot follow a change of its length; call "
                f"gossamer.core.ranks.leave_out_of_ddp(model) before DistributedDataParallel(model)"
            )
        old = {} if optimizer is None else per_weight(optimizer, self.parameter)
        source = self.layer.set_mask(mask)
        if optimizer is not None:
            rearrange(optimizer, self.parameter, old, source)

    def hold(self, moved: bool = True) -> None:
        """There is nothing that could have moved."""

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """There is nothing to be remembered."""

    def release(self) -> None:  # noqa: D102
        self.collect(False)
