"""Linear layers that are told what has changed: ``z_t = z_{t−1} + W d_t``, without the products with zeros.

The state z is the pre-activation itself, so whatever comes after it sees what a dense layer would give. The bias is
in z from the first frame on and never added again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.kernels.channel_products import delta_linear_
from gossamer.kernels.channels import ChannelMatrix, lay_by_channels
from gossamer.kernels.native import available

_FEW = 0.05  # share of live inputs below which a convolution is cheaper from its nonzeros, one by one


class DeltaLayer(nn.Module, ABC):
    """What both kinds of layers remember from frame to frame.

    Attributes
    ----------
    state
        z of the last frame, or None before the first.
    received
        Sum of the changes so far, kept only for refreshing and from the first :meth:`advance` on.
    refresh_every
        Frames after which z is computed anew from `received`, because rounding adds up; None for never.
    """

    refresh_every: int | None
    state: Tensor | None
    received: Tensor | None
    streaming: bool
    _frames: int

    def _prepare(self, refresh_every: int | None) -> None:
        if refresh_every is not None and refresh_every < 1:
            raise ConfigurationError(f"refresh_every is {refresh_every}; it must be at least 1 frame, or None")
        self.refresh_every, self.streaming = refresh_every, False
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far; the next one is the first."""
        self.state, self.received, self._frames = None, None, 0

    @abstractmethod
    def dense(self, x: Tensor) -> Tensor:
        """The layer with its bias, on states."""

    @abstractmethod
    def change(self, delta: Tensor, state: Tensor) -> Tensor:
        """``z + W d``; the old state may be overwritten."""

    @torch.no_grad()
    def step(self, delta: Tensor) -> Tensor:
        """Take the change of one frame, and return the pre-activation ``W q_t + b``.

        Parameters
        ----------
        delta
            ``(batch, …)``; that of the first frame after :meth:`reset` is the whole frame.

        Raises
        ------
        CalibrationError
            If it has another shape than the frame before.
        """
        if self.refresh_every is not None or self.received is not None:
            self._check(delta, self.received)
            self.received = delta.clone() if self.received is None else self.received + delta
        return self._take(delta)

    @torch.no_grad()
    def advance(self, frame: Tensor) -> Tensor:
        """Take a whole frame q_t, of which only what differs from the last one is computed.

        All of it is after changes (:meth:`step`) whose sum was not kept.
        """
        self._check(frame, self.received)
        if self.received is None:
            self.state = None
        delta = frame if self.received is None else frame - self.received
        self.received = frame.clone()
        return self._take(delta)

    def _take(self, delta: Tensor) -> Tensor:
        self._frames += 1
        if self.state is None:
            self.state = self.dense(delta)
        elif self.refresh_every is not None and self._frames % self.refresh_every == 0 and self.received is not None:
            self.state = self.dense(self.received)
        else:
            self.state = self.change(delta, self.state)
        return self.state.clone()

    def _check(self, frame: Tensor, before: Tensor | None) -> None:
        if before is not None and before.shape != frame.shape:
            raise CalibrationError(
                f"a frame has shape {tuple(frame.shape)}, the one before {tuple(before.shape)}; "
                "reset the layer before another stream"
            )

    def sequence(self, deltas: Tensor) -> Tensor:
        """Pre-activations of a whole sequence of changes ``(batch, time, …)``, as training sees them."""
        states = deltas.cumsum(1)
        return self.dense(states.flatten(0, 1)).unflatten(0, states.shape[:2])


class DeltaLinear(DeltaLayer, nn.Linear):
    """``nn.Linear`` that can also be told what has changed.

    Yousefzadeh & Sifalakis, 2021, arXiv 2107.07305. The columns of the weight lie one after the other in memory, so
    that those of inputs that have not changed are not read.

    Parameters
    ----------
    linear
        The layer whose parameters it takes over.
    refresh_every
        See :class:`DeltaLayer`.
    """

    def __init__(self, linear: nn.Linear, refresh_every: int | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(lay_by_channels(linear.weight), requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        self._prepare(refresh_every)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``; while streaming, :meth:`advance`."""
        return self.advance(x) if self.streaming else self.dense(x)

    def dense(self, x: Tensor) -> Tensor:  # noqa: D102
        return nn.functional.linear(x, self.weight, self.bias)

    def change(self, delta: Tensor, state: Tensor) -> Tensor:
        """Columns of inputs that changed, and no others; without the kernel, in any example of the batch."""
        if available() and delta.dtype == state.dtype == torch.float32 and state.is_contiguous():
            matrix = ChannelMatrix.of_view(self.weight)
            if matrix is not None:
                return delta_linear_(matrix, delta, state)
        rows = delta.reshape(-1, self.in_features)
        live = rows.any(0).nonzero().flatten()
        if not len(live):
            return state
        # rows of the transposed weight are contiguous
        change = rows[:, live] @ self.weight.mT.index_select(0, live)
        return state.add_(change.view(state.shape))


class DeltaConv2d(DeltaLayer, nn.Conv2d):
    """``nn.Conv2d`` that can also be told what has changed.

    Where few inputs have, each of them adds its multiple of the kernel to the outputs that it reaches; where many
    have, the change is convolved as a whole, which costs less than gathering.

    Parameters
    ----------
    convolution
        The layer whose parameters it takes over.
    refresh_every
        See :class:`DeltaLayer`.
    """

    def __init__(self, convolution: nn.Conv2d, refresh_every: int | None = None):
        nn.Module.__init__(self)
        kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        for name in (*kept, "transposed", "output_padding", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(convolution, name))
        self.weight, self.bias = convolution.weight, convolution.bias
        self._prepare(refresh_every)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``; while streaming, :meth:`advance`."""
        return self.advance(x) if self.streaming else self.dense(x)

    def dense(self, x: Tensor) -> Tensor:  # noqa: D102
        return self._conv_forward(x, self.weight, self.bias)

    def change(self, delta: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        live = int(delta.count_nonzero())
        if not live:
            return state
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if plain and live <= _FEW * delta.numel():
            return self.scatter(delta, state)
        return state.add_(self._conv_forward(delta, self.weight, None))

    def scatter(self, delta: Tensor, state: Tensor) -> Tensor:
        """Add to the state, in place, what each nonzero of the change contributes.

        Parameters
        ----------
        delta
            ``(batch, in_channels, height, width)``.
        state
            ``(batch, out_channels, rows, columns)``.
        """
        example, channel, row, column = delta.nonzero(as_tuple=True)
        values = delta[example, channel, row, column].unsqueeze(1)
        rows, columns = state.shape[2:]
        flat = state.permute(0, 2, 3, 1).reshape(-1, self.out_channels)
        padding: Any = self.padding
        for ky in range(self.kernel_size[0]):
            y = row + padding[0] - ky * self.dilation[0]
            for kx in range(self.kernel_size[1]):
                x = column + padding[1] - kx * self.dilation[1]
                top, left = y // self.stride[0], x // self.stride[1]
                hits = (y % self.stride[0] == 0) & (x % self.stride[1] == 0)
                hits &= (top >= 0) & (top < rows) & (left >= 0) & (left < columns)
                place = ((example * rows + top) * columns + left)[hits]
                kernel = self.weight[:, :, ky, kx].mT[channel[hits]]
                flat.index_add_(0, place, values[hits] * kernel)
        return flat.view(len(state), rows, columns, -1).permute(0, 3, 1, 2)


def products_of_inputs(module: nn.Module, entering: Tensor) -> Tensor:
    """In how many products each input of a frame takes part; of a shape that broadcasts to a frame.

    For a convolution this is less at the borders, and with strides it differs from pixel to pixel.
    """
    if isinstance(module, nn.Linear):
        return torch.tensor(float(module.out_features), device=entering.device)
    if not isinstance(module, nn.Conv2d):
        raise TargetError(f"products of {type(module).__name__} cannot be counted; nn.Linear and nn.Conv2d can")
    frame = torch.zeros_like(entering[:1], dtype=torch.float32).requires_grad_()
    ones = torch.ones_like(module.weight, dtype=torch.float32)
    with torch.enable_grad():
        reached = module._conv_forward(frame, ones, None)
        (products,) = torch.autograd.grad(reached.sum(), frame)
    return products[0]
