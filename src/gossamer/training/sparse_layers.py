"""Layers that train without storing a zero: values, gradients and what an optimiser remembers are all that exists.

They stand in for a dense layer under a mask where that is faster, or where memory is short. The parameter is the list
of non-zeros in row-major order, so that any optimiser works on it; when the topology changes the list changes its
length and the parameter stays the same object. Forward, gradient of the inputs and gradient of the values are the
products of :mod:`gossamer.kernels.sparse_rows`; none of them forms anything of the size of the dense weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.core.masks import pack_bits, unpack_bits
from gossamer.core.ranks import average_
from gossamer.core.sparse_weight import SparseWeight
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.sparse_rows import SparseRows

_BITS = "mask_bits"
_PARTS = ("starts", "places", "order")


class SparseLayer(SparseWeight):
    """What a sparse linear layer and a sparse pointwise convolution have in common.

    Parameters
    ----------
    inputs, outputs
        Features, or channels.
    bias
        Whether there is one.
    mask
        Which weights there are, ``(out, in)`` bool or with dimensions of size 1 behind; by default all.
    device, dtype
        Of values and bias.
    """

    kernel: tuple[int, ...] = ()  # dimensions of the dense weight behind (out, in)
    bias: nn.Parameter | None
    rows_starts: Tensor
    rows_places: Tensor
    rows_order: Tensor | None
    columns_starts: Tensor
    columns_places: Tensor
    columns_order: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._shape = (outputs, inputs)
        mask = torch.ones(self._shape, dtype=torch.bool) if mask is None else mask
        count = int(mask.count_nonzero())
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        )
        for name in (f"{which}_{part}" for which in ("rows", "columns") for part in _PARTS):
            self.register_buffer(name, None, persistent=False)
        self._index(self._matrix_mask(mask))
        self.collect_gradient = False
        self.dense_gradient: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw values and bias as torch draws those of a dense layer: uniform within ±1/√in."""
        bound = 1 / math.sqrt(max(1, self._shape[1]))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    # ------------------------------------------------------------------------------------------ topology

    def _matrix_mask(self, mask: Tensor) -> Tensor:
        wanted = (*self._shape, *self.kernel)
        if mask.dtype != torch.bool or tuple(mask.shape) not in (self._shape, wanted):
            raise ConfigurationError(f"the mask is {tuple(mask.shape)} {mask.dtype}; this layer takes {wanted} bool")
        return mask.detach().reshape(self._shape).cpu()

    def _index(self, mask: Tensor) -> None:
        for which, index in (("rows", SparseRows.from_mask(mask)), ("columns", SparseRows.transposed(mask))):
            for part in _PARTS:
                tensor = getattr(index, part)
                if part == "places":  # as bytes, for gloo refuses to send int16
                    tensor = tensor.view(torch.uint8)
                setattr(self, f"{which}_{part}", None if tensor is None else tensor.to(self.values.device))

    @property
    def rows(self) -> SparseRows:
        """Index of the weight."""
        return SparseRows(self._shape, self.rows_starts, self.rows_places.view(torch.int16), self.rows_order)

    @property
    def columns(self) -> SparseRows:
        """Index of its transpose."""
        places = self.columns_places.view(torch.int16)
        return SparseRows(self._shape[::-1], self.columns_starts, places, self.columns_order)

    @property
    def density(self) -> float:
        """Share of the weights that exists."""
        return self.values.numel() / max(1, self._shape[0] * self._shape[1])

    @property
    def index_bytes(self) -> int:
        """Bytes that say where the values stand."""
        return self.rows.nbytes + self.columns.nbytes

    def mask(self) -> Tensor:
        """Which weights there are, ``(out, in, kernel…)`` bool."""
        return self.rows.mask().view(*self._shape, *self.kernel)

    def dense_weight(self) -> Tensor:
        """The weight with its zeros, ``(out, in, kernel…)``, detached; a copy."""
        return self.rows.expand(self.values.detach()).view(*self._shape, *self.kernel)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> Tensor:
        """Change which weights there are; grown ones start at zero, and a gradient is dropped.

        The parameter stays the same object with another length. What an optimiser holds for it has the old length:
        :func:`gossamer.core.optimizer_state.rearrange` carries it over with what is returned.

        Parameters
        ----------
        mask
            ``(out, in)`` bool, or with the dimensions of the kernel.

        Returns
        -------
        Tensor
            ``(new nonzeros,)`` int64: for every new value its place among the old ones, −1 where it has grown.

        Raises
        ------
        ConfigurationError
            If the mask does not fit.
        """
        mask = self._matrix_mask(mask)
        device = self.values.device
        old, new = self.rows.positions(), mask.flatten().nonzero().flatten().to(device)
        source = torch.full((len(new),), -1, dtype=torch.int64, device=device)
        if len(old):
            place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
            stayed = old[place] == new
            source[stayed] = place[stayed]
        values = self.values.new_zeros(len(new))
        values[source >= 0] = self.values[source[source >= 0]]
        self._index(mask)
        self._replace_values(values)
        return source

    def _replace_values(self, values: Tensor) -> None:
        self.values.grad = None
        # what accumulates gradients remembers a length as long as an old loss is held; another dtype makes it forget
        other = torch.float32 if values.dtype == torch.float64 else torch.float64
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values

    def _take_mask(self, mask: Tensor) -> None:
        """Take over a topology whose values come from elsewhere; those of this layer are forgotten."""
        mask = self._matrix_mask(mask)
        self._index(mask)
        self._replace_values(self.values.new_zeros(int(mask.count_nonzero())))

    # ------------------------------------------------------------------------------------------ checkpoints

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _BITS] = pack_bits(self.mask())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        bits = state_dict.pop(prefix + _BITS, None)
        if bits is None:
            missing_keys.append(prefix + _BITS)
        else:
            mask = unpack_bits(bits.cpu(), self._shape)
            values = state_dict.get(prefix + "values")
            if values is not None and values.shape != (int(mask.count_nonzero()),):
                raise CheckpointError(
                    f"{prefix}values has shape {tuple(values.shape)}, and its mask keeps {int(mask.count_nonzero())} "
                    f"weights; the checkpoint is damaged"
                )
            if not torch.equal(mask, self.mask().reshape(self._shape).cpu()):
                self._take_mask(mask)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)

    # ------------------------------------------------------------------------------------------ products

    def _product(self, x: Tensor) -> Tensor:
        """Products with ``(positions, in)``, or with ``(images, in, positions)``."""
        if not x.is_floating_point():
            raise ConfigurationError(f"x is {x.dtype}; {type(self).__name__} takes floating numbers")
        wide = x.to(self.values.dtype)
        return SparseProduct.apply(wide, self.values, self.bias, self).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        outputs, inputs = self._shape
        return f"{inputs}, {outputs}, bias={self.bias is not None}, {self.density:.1%} of the weights"


class SparseProduct(torch.autograd.Function):
    """The three products of a sparse layer, of which the gradients can be taken once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseLayer) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.rows, ctx.columns = layer, layer.rows, layer.columns
        return ctx.rows.multiply(values, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # noqa: D102
        x, values = ctx.saved_tensors
        if len(values) != ctx.rows.nonzeros:
            raise ConfigurationError(
                f"a mask changed between forward and backward, from {ctx.rows.nonzeros} to {len(values)} weights; "
                f"change masks after the step of the optimiser"
            )
        wanted_x, wanted_values, wanted_bias, _ = ctx.needs_input_grad
        if ctx.layer.collect_gradient:
            _collect(ctx.layer, x, outputs)
        gradient = ctx.rows.outer(x, outputs) if wanted_values else None
        if gradient is not None and ctx.layer.apart:
            average_(gradient)
        return (
            ctx.columns.multiply(values, outputs) if wanted_x else None,
            gradient,
            outputs.sum(0 if outputs.ndim == 2 else (0, 2)) if wanted_bias else None,
            None,
        )


def _collect(layer: SparseLayer, x: Tensor, outputs: Tensor) -> None:
    """Add the gradient of the dense weight to what earlier passes left."""
    if x.ndim == 3:
        x, outputs = x.transpose(1, 2).flatten(0, 1), outputs.transpose(1, 2).flatten(0, 1)
    gradient = (outputs.t() @ x).view(*layer.rows.shape, *layer.kernel)
    layer.dense_gradient = gradient if layer.dense_gradient is None else layer.dense_gradient.add_(gradient)


class SparseLinear(SparseLayer):
    """A linear layer of which only the non-zero weights exist.

    Parameters
    ----------
    in_features, out_features, bias, mask, device, dtype
        As in :class:`SparseLayer`, and in :class:`torch.nn.Linear`.

    Examples
    --------
    >>> layer = SparseLinear(3, 2, mask=torch.tensor([[True, False, True], [False, False, True]]))
    >>> layer.values.shape, layer(torch.ones(5, 3)).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, mask, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """The same layer without its zeros, or without what a mask removes."""
        out, inputs = linear.weight.shape
        layer = cls(
            inputs, out, linear.bias is not None, _kept(linear.weight, mask), linear.weight.device, linear.weight.dtype
        )
        return _filled(layer, linear)

    def to_dense(self) -> nn.Linear:
        """The same layer with its zeros stored."""
        like = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None, **like)
        return _emptied(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` for ``(…, in)``."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ConfigurationError(f"x is {tuple(x.shape)}; this layer takes (…, {self.in_features})")
        return self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class SparsePointwise(SparseLayer):
    """A convolution with kernels of one weight, stride 1, of which only the non-zero weights exist.

    Images may lie channels first or channels last; the result lies as they do.

    Parameters
    ----------
    in_channels, out_channels, bias, mask, device, dtype
        As in :class:`SparseLayer`, and in :class:`torch.nn.Conv2d`.
    """

    kernel = (1, 1)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, out_channels, bias, mask, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels

    @classmethod
    def from_dense(cls, convolution: nn.Conv2d, mask: Tensor | None = None) -> SparsePointwise:
        """The same layer without its zeros, or without what a mask removes.

        Raises
        ------
        ConfigurationError
            If the convolution is not pointwise.
        """
        if not is_pointwise(convolution):
            raise ConfigurationError(f"{convolution} is not pointwise: 1 × 1, stride 1, no padding, one group")
        weight = convolution.weight
        out, inputs = weight.shape[:2]
        layer = cls(inputs, out, convolution.bias is not None, _kept(weight, mask), weight.device, weight.dtype)
        return _filled(layer, convolution)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with its zeros stored."""
        like = {"device": self.values.device, "dtype": self.values.dtype, "bias": self.bias is not None}
        return _emptied(self, nn.utils.skip_init(nn.Conv2d, self.in_channels, self.out_channels, 1, **like))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(batch, in, height, width)``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ConfigurationError(
                f"x is {tuple(x.shape)}; this layer takes (batch, {self.in_channels}, height, width)"
            )
        batch, _, height, width = x.shape
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            flat = self._product(x.permute(0, 2, 3, 1).reshape(-1, self.in_channels))
            return flat.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        return self._product(x.flatten(2)).view(batch, self.out_channels, height, width)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a product at every position by itself."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.kernel_size != (1, 1):
        return False
    return module.stride == (1, 1) and module.padding in ((0, 0), "valid", "same")


def _kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight.detach() != 0 if mask is None else mask


@torch.no_grad()
def _filled(layer: Any, dense: nn.Linear | nn.Conv2d) -> Any:
    """`layer` with the values of a dense one, in whose mode it is."""
    mask = layer.mask().reshape(dense.weight.shape).to(dense.weight.device)
    layer.values.copy_(dense.weight[mask])
    layer.values.requires_grad_(dense.weight.requires_grad)
    if dense.bias is not None:
        layer.bias.copy_(dense.bias)
        layer.bias.requires_grad_(dense.bias.requires_grad)
    return layer.train(dense.training)


@torch.no_grad()
def _emptied(layer: SparseLayer, dense: Any) -> Any:
    """`dense` with the values of a sparse layer and its zeros."""
    dense.weight.copy_(layer.dense_weight())
    dense.weight.requires_grad_(layer.values.requires_grad)
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)
