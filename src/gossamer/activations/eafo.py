"""CRReLU and its kin: an activation corrected by a step away from the one whose output tells least.

Take the variation of the output's entropy with the activation, and correct any activation against it. Starting from
ReLU and normal data the correction is ``x exp(−x²/2)``, and its size is left to be learned. Where the data are not
normal, their density can be followed while the network trains.

The correction is derived for the *inverse* of the activation. Added to the activation itself, as CRReLU does, a
positive factor raises the entropy and a negative one lowers it; since the factor is learned, either may come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.activations.output_entropy import BASES, forward_correction
from gossamer.core.backward_passes import recomputing
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, UnknownNameError

Density = Literal["gaussian", "kde"]
_FAR = 20.0  # beyond which x² would overflow in half precision, and exp(−x²/2) is zero anyway
_SAMPLES, _POINTS, _WIDEST = 2048, 257, 4.0  # of a kernel density: values, grid, and its reach in deviations


@register(
    "crrelu",
    paper="eafo",
    when="layer",
    granularity="activations",
    needs_data=False,
    timing="during training",
    path=("dense-to-dense",),
    topology="dynamic",
    criterion=("learned",),
    aims=("quality",),
)
class CRReLU(nn.Module):
    """``max(0, x) + ε x exp(−x²/2)``, with ε learned: the corrected ReLU.

    Sun et al., 2024, arXiv 2405.12954. It is not sparse: what ReLU makes zero is small here, and not zero.

    Parameters
    ----------
    eps
        ε at first.
    learnable
        Whether ε trains; one number for the layer. Leave it out of weight decay, see :func:`without_decay`.

    Raises
    ------
    ConfigurationError
        If ε is not finite.
    """

    def __init__(self, eps: float = 0.01, learnable: bool = True):
        super().__init__()
        self.eps = _factor(eps, learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        near = x.clamp(-_FAR, _FAR)
        return torch.relu(x) + self.eps.to(x.dtype) * x * torch.exp(-0.5 * near.square())

    def extra_repr(self) -> str:  # noqa: D102
        return f"eps={float(self.eps.detach()):.4g}"


def _factor(eps: float, learnable: bool) -> nn.Parameter:
    if not math.isfinite(eps):
        raise ConfigurationError(f"eps is {eps}; it must be a finite number, such as 0.01")
    return nn.Parameter(torch.tensor(float(eps)), requires_grad=learnable)


class EAFOActivation(nn.Module):
    """An activation with its entropy correction for the distribution that it sees: ``f(x) + ε c(x)``.

    Sun et al., 2024, arXiv 2405.12954; see :func:`forward_correction` for c. With ReLU and the
    standard normal density it is CRReLU, whose ε has a factor √(2π) less.

    Parameters
    ----------
    base
        A key of :data:`BASES`.
    density
        ``"gaussian"``: normal, of mean and variance that follow those of the pre-activations. ``"kde"``: a kernel
        density of the values of a batch, on a grid; its derivative is a difference.
    update_every
        Forward passes in training between two looks at the pre-activations.
    dynamic
        False keeps the standard normal density for good.
    eps, learnable
        As in :class:`CRReLU`.
    momentum
        Weight of a new look in the running mean and variance; the first one counts in full.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If a name is unknown, or a number out of range.
    """

    mean: Tensor
    variance: Tensor
    grid: Tensor
    table: Tensor
    steps: Tensor

    def __init__(
        self,
        base: str = "relu",
        density: Density = "gaussian",
        update_every: int = 100,
        *,
        dynamic: bool = True,
        eps: float = 0.01,
        learnable: bool = True,
        momentum: float = 0.5,
    ):
        super().__init__()
        if base not in BASES:
            raise UnknownNameError("activation", base, BASES)
        if density not in get_args(Density):
            raise UnknownNameError("density", density, get_args(Density))
        if update_every < 1 or not 0 < momentum <= 1:
            raise ConfigurationError(
                f"update_every is {update_every}, momentum {momentum}; give 1 pass or more, and a number in (0, 1]"
            )
        self.base, self.density, self.update_every = base, density, update_every
        self.dynamic, self.momentum = dynamic, momentum
        self.eps = _factor(eps, learnable)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("grid", torch.linspace(-_WIDEST, _WIDEST, _POINTS))
        normal = torch.exp(-0.5 * self.grid.square()) / math.sqrt(2 * math.pi)
        self.register_buffer("table", torch.stack([normal, -self.grid * normal]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EAFOActivation:
        # in half precision points of the grid would coincide, and a step of a running mean get lost
        before = {name: getattr(self, name) for name in ("mean", "variance", "grid", "table")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            found = getattr(self, name)
            if found.dtype.itemsize < exact.dtype.itemsize:
                setattr(self, name, exact.to(found.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if self.training and self.dynamic and not recomputing():
            if int(self.steps) % self.update_every == 0:
                self.look(x)
            self.steps += 1
        wide = _widened(x)
        p, tilt = (self._normal if self.density == "gaussian" else self._tabled)(wide)
        correction = forward_correction(self.base, p, tilt, wide)
        return BASES[self.base].function(x) + (self.eps * correction).to(x.dtype)

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Take the density from these pre-activations."""
        values = _widened(x.detach()).flatten()
        # spread over the batch, since neighbours may be alike
        values = values[:: max(1, len(values) // _SAMPLES)]
        spread, centre = torch.var_mean(values)
        if len(values) < 2 or not bool(spread > 0):
            return
        weight = self.momentum if int(self.steps) else 1.0
        self.mean.lerp_(centre.to(self.mean), weight)
        self.variance.lerp_(spread.to(self.variance), weight)
        if self.density == "kde":
            self._fit(values)

    def _fit(self, values: Tensor) -> None:
        deviation = values.std()
        width = 1.06 * deviation * len(values) ** -0.2  # Silverman's rule
        reach = _WIDEST * deviation
        self.grid = torch.linspace(-1, 1, _POINTS, dtype=values.dtype, device=values.device) * reach + values.mean()
        scaled = (self.grid.unsqueeze(1) - values) / width
        p = torch.exp(-0.5 * scaled.square()).mean(1) / (width * math.sqrt(2 * math.pi))
        (tilt,) = torch.gradient(p, spacing=float(self.grid[1] - self.grid[0]))
        self.table = torch.stack([p, tilt])

    def _normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (x - self.mean) * self.variance.rsqrt()
        p = torch.exp(-0.5 * scaled.square()) * self.variance.rsqrt() / math.sqrt(2 * math.pi)
        return p, -scaled * self.variance.rsqrt() * p

    def _tabled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Linear between the points of the grid, and zero beyond."""
        place = (x - self.grid[0]) / (self.grid[1] - self.grid[0])
        inside = (place >= 0) & (place <= _POINTS - 1)
        place = place.clamp(0, _POINTS - 1)
        left = place.detach().floor().clamp(max=_POINTS - 2).long()
        share = place - left
        p, tilt = (row[left] * (1 - share) + row[left + 1] * share for row in self.table)
        return p * inside, tilt * inside

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.base!r}, density={self.density!r}, dynamic={self.dynamic}, eps={float(self.eps.detach()):.4g}"


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser, in which no ε decays.

    Parameters
    ----------
    model
        With :class:`CRReLU` or :class:`EAFOActivation` in it, or without.
    weight_decay
        Of everything else.
    """
    factors = {id(parameter) for parameter in _factors(model)}
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        groups[id(parameter) in factors].append(parameter)
    decays = ((groups[False], weight_decay), (groups[True], 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in decays if params]


def _factors(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (CRReLU, EAFOActivation)):
            yield module.eps
