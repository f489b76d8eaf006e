"""Layers that take the place of a dense one at its cost: more of everything, of which only a part is there.

Three forms, each for linear layers and for convolutions. Parallel: several sparse copies, normalised and added up.
Factorized: a sparse matrix into a wide middle, something nonlinear, a sparse matrix back. Doped: a sparse matrix with a
dense one of low rank beside it. How many copies, how wide, which rank: always so that the weights that are there are
exactly as many as the dense layer has, and are used at as many places.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, check_sparsity

Norm = Literal["batch", "layer", "none"]
Phi = Literal["norm_relu", "norm", "linear"]
Size = int | tuple[int, int]
_NORMS = ("batch", "layer", "none")
_PHIS = ("norm_relu", "norm", "linear")


class IsoFlopLayer(nn.Module):
    """What the six layers have in common; built from the dense layer that they replace.

    Weights are drawn so that, with inputs of unit variance and at their sparsity, the outputs have the variance that
    those of the dense layer have.

    Attributes
    ----------
    sparsities
        Name of a parameter → share of it that must be zero for the cost to be that of the dense layer, an exact count
        over its size.
    """

    def __init__(self, dense: nn.Linear | nn.Conv2d, sparsity: float):
        super().__init__()
        check_sparsity(sparsity)
        self.sparsities: dict[str, Fraction] = {}
        self.shape = tuple(dense.weight.shape)
        for size in ("in_features", "out_features", "in_channels", "out_channels"):
            if hasattr(dense, size):
                setattr(self, size, getattr(dense, size))

    @classmethod
    def replacing(cls, dense: nn.Linear | nn.Conv2d, sparsity: float, **options: Any) -> Self:
        """A layer with the shapes, device, dtype and initial scale of a dense one."""
        layer = cls.__new__(cls)
        cls._form.__init__(layer, dense, sparsity, **options)  # type: ignore[misc]
        return layer

    _form: type[IsoFlopLayer]

    @property
    def folds(self) -> bool:
        """Whether one matrix does the same: not if something nonlinear lies between."""
        return True

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """That matrix, ``(out, in, kernel…)``; norms are left out of account.

        Raises
        ------
        ConfigurationError
            If there is none.
        """

    def factors(self) -> list[nn.Parameter]:
        """The matrices that the effective weight is made of."""
        return [parameter for parameter in self.parameters() if parameter.dim() > 1]

    def _keep(self, kept: dict[str, int]) -> None:
        """Note how many weights of each part are there."""
        parameters = dict(self.named_parameters())
        for name, count in kept.items():
            size = parameters[name].numel()
            if not 0 < count <= size:
                raise ConfigurationError(
                    f"{name} would keep {count} of {size} weights in place of a dense layer {self.shape}; "
                    f"exclude this layer, or take a lower sparsity"
                )
            self.sparsities[name] = Fraction(size - count, size)


class _Parallel(IsoFlopLayer):
    def __init__(
        self,
        dense: nn.Linear | nn.Conv2d,
        sparsity: float,
        norm: Norm = "batch",
        generator: torch.Generator | None = None,
    ):
        super().__init__(dense, sparsity)
        count = round(1 / (1 - _exactly(sparsity)))
        outputs, size = dense.weight.shape[0], dense.weight.numel()
        self.branches = nn.ModuleList(_like(dense) for _ in range(count))
        self.norms = nn.ModuleList(_norm(norm, dense, outputs) for _ in range(count))
        self.bias = _bias(dense) if norm == "none" else None
        scale = _scale(dense)
        for branch in self.branches:
            _draw(branch.weight, scale, generator)
        shares = [size // count + (j < size % count) for j in range(count)]
        self._keep({f"branches.{j}.weight": share for j, share in enumerate(shares)})

    def forward(self, x: Tensor) -> Tensor:
        """``Σ_j norm_j(W_j x)``: the nonlinearity comes after the layer, as it did."""
        total = self.norms[0](self.branches[0](x))
        for branch, norm in zip(self.branches[1:], self.norms[1:]):
            total = total + norm(branch(x))
        if self.bias is None:
            return total
        return total + (self.bias if len(self.shape) == 2 else self.bias.view(-1, 1, 1))

    def effective_weight(self) -> Tensor:
        return torch.stack([branch.weight for branch in self.branches]).sum(0)


class _Factorized(IsoFlopLayer):
    def __init__(
        self,
        dense: nn.Linear | nn.Conv2d,
        sparsity: float,
        phi: Phi = "norm_relu",
        norm: Norm = "batch",
        sparse_input_only: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(dense, sparsity)
        if phi not in _PHIS:
            raise ConfigurationError(f"phi is {phi!r}; use {', '.join(_PHIS)}")
        groups, inputs, outputs = _sizes(dense)
        density = 1 - _exactly(sparsity)
        share = density * inputs + (1 if sparse_input_only else density) * outputs
        middle = groups * math.ceil(inputs * outputs / share)
        self.u = _like(dense, outputs=middle)
        parts: list[nn.Module] = [] if phi == "linear" else [_norm(norm, dense, middle)]
        self.phi = nn.Sequential(*parts, *([nn.ReLU()] if phi == "norm_relu" else []))
        self.v = _like(dense, inputs=middle, pointwise=True, bias=dense.bias is not None)
        total, into, out = dense.weight.numel(), self.u.weight.numel(), self.v.weight.numel()
        kept_out = out if sparse_input_only else round(total * out / (into + out))
        self._keep({"u.weight": total - kept_out} | ({} if sparse_input_only else {"v.weight": kept_out}))
        # a ReLU halves the second moment of what comes out of the norm
        gain = 2.0 if phi == "norm_relu" else 1.0
        _draw(self.u.weight, math.sqrt(into / ((total - kept_out) * inputs)), generator)
        _draw(self.v.weight, _scale(dense) * math.sqrt(gain * inputs * groups * out / (kept_out * middle)), generator)

    def forward(self, x: Tensor) -> Tensor:
        """``V φ(U x)``."""
        return self.v(self.phi(self.u(x)))

    @property
    def folds(self) -> bool:
        return not len(self.phi)

    def effective_weight(self) -> Tensor:
        if not self.folds:
            raise ConfigurationError("a factorized layer is one matrix only with phi='linear'")
        return _product(self.v, self.u, self.shape)


class _Doped(IsoFlopLayer):
    def __init__(self, dense: nn.Linear | nn.Conv2d, sparsity: float, generator: torch.Generator | None = None):
        super().__init__(dense, sparsity)
        groups, inputs, outputs = _sizes(dense)
        rank = math.floor(_exactly(sparsity) * inputs * outputs / (inputs + outputs))
        if rank < 1:
            raise ConfigurationError(
                f"at sparsity {sparsity} a dense layer {self.shape} pays for no low-rank part: its rank would be 0; "
                f"exclude this layer, or take a higher sparsity"
            )
        self.s = _like(dense, bias=dense.bias is not None)
        self.u = _like(dense, outputs=groups * rank)
        self.v = _like(dense, inputs=groups * rank, pointwise=True)
        total = dense.weight.numel()
        kept = total - self.u.weight.numel() - self.v.weight.numel()
        self._keep({"s.weight": kept})
        scale = _scale(dense)
        _draw(self.s.weight, scale, generator)
        _draw(self.u.weight, 1 / math.sqrt(inputs), generator)
        _draw(self.v.weight, scale * math.sqrt((1 - kept / total) * inputs / rank), generator)

    def forward(self, x: Tensor) -> Tensor:
        """``S x + V U x``."""
        return self.s(x) + self.v(self.u(x))

    def effective_weight(self) -> Tensor:
        return self.s.weight + _product(self.v, self.u, self.shape)


class SparseParallelLinear(_Parallel):
    """``round(1 / (1 − s))`` sparse linear layers, each with a norm, added up: ``Σ_j norm_j(W_j x)``.

    Parameters
    ----------
    in_features, out_features, bias
        As of :class:`torch.nn.Linear`; the bias is that of the norms where there are any.
    sparsity
        s in [0, 1).
    norm
        ``batch`` as in the paper, ``layer``, or ``none``.
    generator
        Of the initial weights.
    """

    _form = _Parallel

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float = 0.75, **options: Any
    ):
        super().__init__(nn.Linear(in_features, out_features, bias), sparsity, **options)


class SparseParallelConv2d(_Parallel):
    """``round(1 / (1 − s))`` sparse convolutions, each with a norm, added up; see :class:`SparseParallelLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As of :class:`torch.nn.Conv2d`.
    sparsity, norm, generator
        As of :class:`SparseParallelLinear`.
    """

    _form = _Parallel

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, *, sparsity: float = 0.75, **options: Any
    ):
        dense, rest = _convolution(in_channels, out_channels, kernel_size, options)
        super().__init__(dense, sparsity, **rest)


class SparseFactorizedLinear(_Factorized):
    """Two sparse linear layers with a wide middle of ``⌈mn / ((1 − s)(m + n))⌉``: ``V φ(U x)``.

    Parameters
    ----------
    in_features, out_features, bias
        As of :class:`torch.nn.Linear`.
    sparsity
        s in [0, 1).
    phi
        ``norm_relu``, ``norm`` or ``linear``.
    norm
        ``batch`` as in the paper, ``layer``, or ``none``.
    sparse_input_only
        Whether V stays dense; the middle is then ``⌈mn / ((1 − s) n + m)⌉`` for n inputs and m outputs.
    generator
        Of the initial weights.
    """

    _form = _Factorized

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float = 0.75, **options: Any
    ):
        super().__init__(nn.Linear(in_features, out_features, bias), sparsity, **options)


class SparseFactorizedConv2d(_Factorized):
    """A sparse convolution into a wide middle and a sparse 1 × 1 one back; see :class:`SparseFactorizedLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As of :class:`torch.nn.Conv2d`; with groups, both parts have them.
    sparsity, phi, norm, sparse_input_only, generator
        As of :class:`SparseFactorizedLinear`.
    """

    _form = _Factorized

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, *, sparsity: float = 0.75, **options: Any
    ):
        dense, rest = _convolution(in_channels, out_channels, kernel_size, options)
        super().__init__(dense, sparsity, **rest)


class SparseDopedLinear(_Doped):
    """A sparse linear layer and a dense one of rank ``⌊s mn / (m + n)⌋``: ``S x + V U x``.

    Parameters
    ----------
    in_features, out_features, bias
        As of :class:`torch.nn.Linear`.
    sparsity
        s in (0, 1), high enough for a rank of 1.
    generator
        Of the initial weights.
    """

    _form = _Doped

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float = 0.75, **options: Any
    ):
        super().__init__(nn.Linear(in_features, out_features, bias), sparsity, **options)


class SparseDopedConv2d(_Doped):
    """A sparse convolution, and a dense one to few channels with a 1 × 1 one back; see :class:`SparseDopedLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As of :class:`torch.nn.Conv2d`; with groups, all parts have them.
    sparsity, generator
        As of :class:`SparseDopedLinear`.
    """

    _form = _Doped

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, *, sparsity: float = 0.75, **options: Any
    ):
        dense, rest = _convolution(in_channels, out_channels, kernel_size, options)
        super().__init__(dense, sparsity, **rest)


class _BatchNormOfLast(nn.BatchNorm1d):
    """Batch norm of the last dimension, whatever lies before it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view(input.shape)


def _convolution(inputs: int, outputs: int, kernel: Size, options: dict[str, Any]) -> tuple[nn.Conv2d, dict[str, Any]]:
    own = ("stride", "padding", "dilation", "groups", "bias", "padding_mode")
    given = {name: options[name] for name in own if name in options}
    return nn.Conv2d(inputs, outputs, kernel, **given), {n: v for n, v in options.items() if n not in own}


def _like(
    dense: nn.Linear | nn.Conv2d,
    *,
    inputs: int | None = None,
    outputs: int | None = None,
    pointwise: bool = False,
    bias: bool = False,
) -> nn.Linear | nn.Conv2d:
    """A layer like the dense one, with other numbers of inputs or outputs; pointwise, it works on what it left."""
    place: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if isinstance(dense, nn.Linear):
        return nn.Linear(inputs or dense.in_features, outputs or dense.out_features, bias, **place)
    sizes = (inputs or dense.in_channels, outputs or dense.out_channels)
    if pointwise:
        return nn.Conv2d(*sizes, 1, groups=dense.groups, bias=bias, **place)
    window = (dense.kernel_size, dense.stride, dense.padding, dense.dilation, dense.groups)
    return nn.Conv2d(*sizes, *window, bias, dense.padding_mode, **place)  # type: ignore[arg-type]


def _norm(norm: Norm, dense: nn.Linear | nn.Conv2d, channels: int) -> nn.Module:
    if norm not in _NORMS:
        raise ConfigurationError(f"norm is {norm!r}; use {', '.join(_NORMS)}")
    place: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if norm == "none":
        return nn.Identity()
    if isinstance(dense, nn.Linear):
        return _BatchNormOfLast(channels, **place) if norm == "batch" else nn.LayerNorm(channels, **place)
    return nn.BatchNorm2d(channels, **place) if norm == "batch" else nn.GroupNorm(1, channels, **place)


def _sizes(dense: nn.Linear | nn.Conv2d) -> tuple[int, int, int]:
    """Groups, and within each of them: inputs of one output, and outputs."""
    groups = dense.groups if isinstance(dense, nn.Conv2d) else 1
    return groups, dense.weight[0].numel(), dense.weight.shape[0] // groups


def _exactly(value: float) -> Fraction:
    """0.9 as nine tenths, so that neither a floor nor a ceiling is off by one."""
    return Fraction(value).limit_denominator(10**9)


def _scale(dense: nn.Linear | nn.Conv2d) -> float:
    return float(dense.weight.detach().float().std(correction=0))


def _bias(dense: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    return None if dense.bias is None else nn.Parameter(dense.bias.detach().clone())


@torch.no_grad()
def _draw(weight: Tensor, scale: float, generator: torch.Generator | None) -> None:
    weight.copy_(torch.empty(weight.shape).normal_(0, scale, generator=generator))


def _product(v: nn.Linear | nn.Conv2d, u: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """The weight of one layer that does what `u` and then `v` do, group by group."""
    groups = u.groups if isinstance(u, nn.Conv2d) else 1
    into = u.weight.flatten(1).unflatten(0, (groups, -1))
    out = v.weight.flatten(1).unflatten(0, (groups, -1))
    return (out @ into).reshape(shape)
