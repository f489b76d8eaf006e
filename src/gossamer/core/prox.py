"""Penalties that ask for zeros, and their proximal operators: the thresholds of iterative solvers.

A penalty R charges every coefficient by itself. Its proximal operator answers the smallest question there is about it,
``prox(u) = argmin ½ (x − u)² + step · R(x)``, in closed form or nearly; iterated with gradients of a smooth loss it
answers the large ones. The l1 norm shrinks what it keeps; the others here leave large coefficients alone, at the
price of local minima. All penalties are even, so each is written down for magnitudes only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, softshrink

from gossamer.errors import ConfigurationError, UnknownNameError

_STEEPEST = 0.9  # between its thresholds a line may rise 10 times as fast as its argument before rounding shows
_NEWTON = 8  # steps of general l_q: from the right the error is squared every time


@dataclass(frozen=True)
class Penalty(ABC):
    """A penalty ``R(x)`` of single coefficients, its weight included.

    Attributes
    ----------
    lam
        λ, the weight: at least 0.
    convex
        Whether it is convex, so that acceleration is safe and minima are global.
    """

    lam: float
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check("lam", self.lam, self.lam >= 0, "at least 0")

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """``R`` of every entry, the shape of `x`."""

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:
        """``argmin ½ (x − u)² + step · R(x)`` for every entry; where two are equally good, the one that is zero."""
        return u.sign() * self.shrunk(u.abs(), step)

    @abstractmethod
    def shrunk(self, size: Tensor, step: float) -> Tensor:
        """:meth:`prox` of magnitudes."""


@dataclass(frozen=True)
class L1(Penalty):
    """``λ |x|``, by the soft threshold.

    Attributes
    ----------
    nonnegative
        Whether coefficients below zero cost infinity.
    """

    nonnegative: bool = False
    convex = True

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        cost = self.lam * x.abs()
        return torch.where(x < 0, math.inf, cost) if self.nonnegative else cost

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:  # noqa: D102
        threshold = self.lam * step
        return (u - threshold).clamp_(min=0) if self.nonnegative else softshrink(u, threshold)

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        return (size - self.lam * step).clamp_(min=0)


class L0(Penalty):
    """``λ`` for all that is not zero, by the hard threshold at ``√(2 step λ)``."""

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.lam * (x != 0).to(x.dtype)

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:  # noqa: D102
        return hardshrink(u, math.sqrt(2 * self.lam * step))

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        return self.prox(size, step)


@dataclass(frozen=True)
class Lq(Penalty):
    """``λ |x|^q`` with 0 < q < 1.

    In closed form for q = 1/2 [Xu et al., 2012] and 2/3 [Cao et al., 2013]; otherwise the threshold is exact and what
    lies above is found by Newton's method.

    Attributes
    ----------
    q
        The exponent.
    """

    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("q", self.q, 0 < self.q < 1, "between 0 and 1, both excluded")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.lam * x.abs() ** self.q

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        weight = self.lam * step
        if weight == 0:
            return size
        # where the best non-zero answer is as good as zero, it is `jump`
        jump = (2 * weight * (1 - self.q)) ** (1 / (2 - self.q))
        threshold = jump + weight * self.q * jump ** (self.q - 1)
        above = size.clamp(min=threshold)
        closed = {1 / 2: _half, 2 / 3: _two_thirds}.get(self.q)
        found = closed(above, weight) if closed else _newton(above, weight, self.q)
        return torch.where(size > threshold, found, 0)


def _half(size: Tensor, weight: float) -> Tensor:
    angle = (2 * weight / 8 * (size / 3) ** -1.5).clamp(max=1).arccos()
    return size * (2 / 3) * (1 + torch.cos(2 * math.pi / 3 - angle * (2 / 3)))


def _two_thirds(size: Tensor, weight: float) -> Tensor:
    double = 2 * weight
    angle = (27 / 16 * double**-1.5 * size.square()).clamp(min=1).arccosh() / 3
    phi = 2 / math.sqrt(3) * double**0.25 * angle.cosh().sqrt()
    return ((phi + (2 * size / phi - phi.square()).clamp(min=0).sqrt()) / 2) ** 3


def _newton(size: Tensor, weight: float, q: float) -> Tensor:
    x = size
    for _ in range(_NEWTON):
        slope = weight * q * x ** (q - 1)
        x = x - (x + slope - size) / (1 + slope * (q - 1) / x)
    return x


@dataclass(frozen=True, eq=False)
class CEL0(Penalty):
    """The continuous exact relaxation of l0 for least squares [Soubies et al., 2015].

    ``λ − (n²/2) (|x| − √(2λ)/n)²`` up to ``|x| = √(2λ)/n``, and λ beyond. With n the length of the atom that a
    coefficient belongs to, it has the global minimisers of l0 and fewer local ones.

    Attributes
    ----------
    length
        n of every coefficient: a number, or a tensor that broadcasts with coefficients.
    """

    length: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bool((torch.as_tensor(self.length) > 0).all()):
            raise ConfigurationError(f"length is {self.length}; lengths of atoms are above 0: leave empty atoms out")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        short = (math.sqrt(2 * self.lam) - x.abs() * self.length).clamp(min=0)
        return self.lam - short.square() / 2

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:  # noqa: D102
        if isinstance(self.length, Tensor) or step * self.length**2 > _STEEPEST:
            return super().prox(u, step)
        edge = math.sqrt(2 * self.lam)
        return _firm(u, edge * step * self.length, edge / self.length)

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        length = torch.as_tensor(self.length, dtype=size.dtype, device=size.device)
        rest = 1 - step * length.square()
        relaxed = (size - math.sqrt(2 * self.lam) * step * length).clamp(min=0) / rest.clamp(min=1e-12)
        hard = torch.where(size > math.sqrt(2 * step * self.lam), size, 0)
        return torch.where(rest > 0, torch.minimum(size, relaxed), hard)


@dataclass(frozen=True)
class MCP(Penalty):
    """The minimax concave penalty [Zhang, 2010]: ``λ |x| − x²/(2a)`` up to ``|x| = aλ``, and constant beyond.

    Attributes
    ----------
    a
        How far the penalty bends; above 0. At most `step`, its operator is a hard threshold.
    """

    a: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("a", self.a, self.a > 0, "above 0")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        size = x.abs().clamp(max=self.a * self.lam)
        return self.lam * size - size.square() / (2 * self.a)

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:  # noqa: D102
        if step > _STEEPEST * self.a:
            return super().prox(u, step)
        return _firm(u, self.lam * step, self.lam * self.a)

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        if step >= self.a:
            return torch.where(size > self.lam * math.sqrt(self.a * step), size, 0)
        return torch.minimum(size, (size - self.lam * step).clamp(min=0) / (1 - step / self.a))


@dataclass(frozen=True)
class SCAD(Penalty):
    """Smoothly clipped absolute deviation [Fan & Li, 2001]: l1 up to λ, bent from λ to aλ, constant beyond.

    Attributes
    ----------
    a
        Where it becomes constant, in λ; above 2.
    """

    a: float = 3.7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("a", self.a, self.a > 2, "above 2")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        size, lam, a = x.abs(), self.lam, self.a
        if lam == 0:
            return torch.zeros_like(size)
        bent = (2 * a * lam * size - size.square() - lam**2) / (2 * (a - 1))
        flat = torch.full_like(size, lam**2 * (a + 1) / 2)
        return torch.where(size <= lam, lam * size, torch.where(size <= a * lam, bent, flat))

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        lam, a = self.lam, self.a
        found = [(size - step * lam).clamp(0, lam), size.clamp(min=a * lam)]
        if step < a - 1:
            found.append((((a - 1) * size - a * step * lam) / (a - 1 - step)).clamp(lam, a * lam))
        return _best(self, size, step, found)


@dataclass(frozen=True)
class LogSum(Penalty):
    """``λ log(1 + |x|/ε)`` [Candès, Wakin & Boyd, 2008].

    Attributes
    ----------
    eps
        ε: the smaller, the closer to l0; above 0.
    """

    eps: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("eps", self.eps, self.eps > 0, "above 0")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.lam * torch.log1p(x.abs() / self.eps)

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        root = ((size + self.eps).square() - 4 * step * self.lam).clamp(min=0).sqrt()
        return _best(self, size, step, [torch.zeros_like(size), ((size - self.eps + root) / 2).clamp(min=0)])


@dataclass(frozen=True)
class KSparse(Penalty):
    """Nothing for at most k coefficients a row, infinity for more; its operator keeps the k largest.

    With it, proximal gradient steps are iterative hard thresholding [Blumensath & Davies, 2009].

    Attributes
    ----------
    lam
        Without meaning here.
    k
        How many are kept, at least 1.
    """

    lam: float = 0.0
    k: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("k", self.k, self.k >= 1, "at least 1")

    def value(self, x: Tensor) -> Tensor:  # noqa: D102
        over = (x != 0).sum(-1, keepdim=True) > self.k
        return torch.where(over & (x != 0), math.inf, 0.0).to(x.dtype)

    def prox(self, u: Tensor, step: float = 1.0) -> Tensor:  # noqa: D102
        best = u.abs().topk(min(self.k, u.shape[-1]), dim=-1).indices
        return torch.zeros_like(u).scatter(-1, best, u.gather(-1, best))

    def shrunk(self, size: Tensor, step: float) -> Tensor:  # noqa: D102
        return self.prox(size, step)


def _best(penalty: Penalty, size: Tensor, step: float, candidates: list[Tensor]) -> Tensor:
    """The candidate with the smallest objective; of equal ones the first."""
    best, least = candidates[0], torch.full_like(size, math.inf)
    for x in candidates:
        cost = (x - size).square() / 2 + step * penalty.value(x)
        best, least = torch.where(cost < least, x, best), torch.minimum(cost, least)
    return best


def _firm(u: Tensor, zero: float, same: float) -> Tensor:
    """Zero up to one magnitude, the value itself from another, and a straight line between them.

    As the sum of two soft thresholds it takes three passes over memory, half of what its definition takes.
    """
    steep = same / (same - zero) if same > zero else 1.0
    return softshrink(u, zero).mul_(steep).add_(softshrink(u, same), alpha=1 - steep)


def _half_norm(lam: float) -> Penalty:
    return Lq(lam, 0.5)


PENALTIES: dict[str, Callable[..., Penalty]] = {
    "l1": L1,
    "l0": L0,
    "l1/2": _half_norm,
    "lq": Lq,
    "cel0": CEL0,
    "mcp": MCP,
    "scad": SCAD,
    "log": LogSum,
    "k-sparse": KSparse,
}
"""Name → penalty, called with λ and what else it takes."""


def penalty(name: str, lam: float, **parameters: Any) -> Penalty:
    """The penalty of this name.

    Raises
    ------
    UnknownNameError
        If there is none of that name.
    ConfigurationError
        If it has no such parameter, or a value is out of range.

    Examples
    --------
    >>> penalty("mcp", 0.5, a=2.0)
    MCP(lam=0.5, a=2.0)
    """
    if name not in PENALTIES:
        raise UnknownNameError("penalty", name, PENALTIES)
    factory = PENALTIES[name]
    known = [field.name for field in fields(factory)] if isinstance(factory, type) else ["lam"]
    for given in parameters:
        if given not in known:
            raise ConfigurationError(f"penalty {name} has no parameter {given!r}; it has: {', '.join(known)}")
    return factory(lam, **parameters)


def prox(name: str, u: Tensor, lam: float, step: float = 1.0, **parameters: Any) -> Tensor:
    """``argmin ½ (x − u)² + step · R(x)`` of a named penalty; see :func:`penalty`.

    Examples
    --------
    >>> prox("l1", torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    >>> prox("l0", torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-3.,  0.,  2.])
    """
    _check("step", step, step > 0, "above 0")
    return penalty(name, lam, **parameters).prox(u, step)


def _check(name: str, value: float, valid: bool, allowed: str) -> None:
    if not (valid and math.isfinite(value)):
        raise ConfigurationError(f"{name} is {value}; it must be finite and {allowed}")
