"""Layers that look at small windows, as a convolution does, but with filters of their own at every place.

Between a fully connected and a convolutional layer lie two steps: a mask that leaves each output its window, and a tie
that makes all places share one filter. :func:`weight_map` writes down both at once; a locally connected layer takes
only the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair, _single

from gossamer.core.registry import register
from gossamer.errors import ConfigurationError

Size = int | tuple[int, ...]


class _LocallyConnected(nn.Module):
    """What the layers for sequences and for images share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: tuple[int, ...],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        bias: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size, self.stride, self.padding = input_size, kernel_size, stride, padding
        self.output_size = output_size(input_size, kernel_size, stride, padding)
        if min(in_channels, out_channels) < 1:
            raise ConfigurationError(f"channels are {in_channels} in and {out_channels} out; both must be positive")
        places, window = math.prod(self.output_size), in_channels * math.prod(kernel_size)
        self.weight = nn.Parameter(torch.empty(places, out_channels, window))
        self.bias = nn.Parameter(torch.empty(places, out_channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/√window, as torch starts a convolution."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @torch.no_grad()
    def tie_(self, filters: Tensor, bias: Tensor | None = None) -> None:
        """Set every place to the filters of a convolution, ``(out, in, kernel…)``; the layer then computes the same."""
        self.weight.copy_(filters.flatten(1).expand_as(self.weight))
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias.expand_as(self.bias))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same as a fully connected layer on flattened inputs: zero outside the windows."""
        places = weight_map(
            self.in_channels, self.out_channels, self.input_size, self.kernel_size, self.stride, self.padding
        )
        dense = nn.Linear(places.shape[1], places.shape[0], bias=self.bias is not None)
        stored = self.weight.transpose(0, 1).reshape(-1)
        dense.weight.copy_(torch.where(places >= 0, stored[places.clamp_min(0)], 0.0))
        if self.bias is not None:
            dense.bias.copy_(self.bias.t().reshape(-1))
        return dense.to(self.weight.device, self.weight.dtype)

    def _check(self, x: Tensor) -> None:
        expected = (self.in_channels, *self.input_size)
        if x.shape[1:] != expected:
            raise ConfigurationError(
                f"the input has shape {tuple(x.shape)}; (batch, {', '.join(map(str, expected))})"
                " is needed, because every place has weights of its own"
            )

    def _apply_windows(self, windows: Tensor) -> Tensor:
        """Windows ``(batch, window, places)`` → ``(batch, out, places)``."""
        result = torch.bmm(windows.permute(2, 0, 1), self.weight.mT)
        if self.bias is not None:
            result = result + self.bias.unsqueeze(1)
        return result.permute(1, 2, 0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


@register(
    "locally-connected-1d",
    paper="dynamic-signal-distribution",
    when="layer",
    needs_data=False,
    criterion=("structure",),
    patterns=("blocks",),
)
class LocallyConnected1d(_LocallyConnected):
    """A convolution over a sequence whose filters are not shared between places.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As in :class:`torch.nn.Conv1d`; padding is with zeros.
    input_size
        Length of the sequence, which decides how many filters there are.

    Raises
    ------
    ConfigurationError
        If the kernel does not fit into the padded input, or a size is out of range.

    Examples
    --------
    >>> LocallyConnected1d(2, 3, 8, kernel_size=4, stride=4)(torch.zeros(5, 2, 8)).shape
    torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Size,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
    ) -> None:
        sizes = (_single(each) for each in (input_size, kernel_size, stride, padding))
        super().__init__(in_channels, out_channels, *sizes, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, length)`` → ``(batch, out_channels, places)``."""
        self._check(x)
        padded = functional.pad(x, (self.padding[0],) * 2)
        windows = padded.unfold(2, self.kernel_size[0], self.stride[0])
        return self._apply_windows(windows.transpose(2, 3).flatten(1, 2))


@register(
    "locally-connected-2d",
    paper="dynamic-signal-distribution",
    when="layer",
    needs_data=False,
    criterion=("structure",),
    patterns=("blocks",),
)
class LocallyConnected2d(_LocallyConnected):
    """A convolution over an image whose filters are not shared between places.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As in :class:`torch.nn.Conv2d`; padding is with zeros.
    input_size
        Height and width of the image, which decide how many filters there are.

    Raises
    ------
    ConfigurationError
        If the kernel does not fit into the padded input, or a size is out of range.

    Examples
    --------
    >>> LocallyConnected2d(1, 4, 28, kernel_size=7, stride=7)(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 4, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Size,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
    ) -> None:
        sizes = (_pair(each) for each in (input_size, kernel_size, stride, padding))
        super().__init__(in_channels, out_channels, *sizes, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, height, width)`` → ``(batch, out_channels, rows, columns)``."""
        self._check(x)
        windows = functional.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        return self._apply_windows(windows).unflatten(2, self.output_size)


def output_size(
    input_size: tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[int, ...]:
    """Places of a window along each dimension, as for a convolution.

    Raises
    ------
    ConfigurationError
        If there is no place, or a size is out of range.
    """
    if min(*input_size, *kernel_size, *stride) < 1 or min(padding) < 0:
        raise ConfigurationError(
            f"input_size, kernel_size, stride and padding are {input_size}, {kernel_size}, {stride} and {padding}; "
            "all must be positive, padding may be zero"
        )
    places = tuple((i + 2 * p - k) // s + 1 for i, k, s, p in zip(input_size, kernel_size, stride, padding))
    if min(places) < 1:
        raise ConfigurationError(
            f"a kernel of {kernel_size} does not fit into an input of {input_size} with padding {padding}; "
            "take a smaller kernel or more padding"
        )
    return places


def weight_map(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    tied: bool = False,
) -> Tensor:
    """Write a locally connected or a convolutional layer as a masked, and tied, fully connected one.

    Parameters
    ----------
    in_channels, out_channels, input_size, kernel_size, stride, padding
        Of the layer; one or two dimensions.
    tied
        Whether all places share a filter, as in a convolution.

    Returns
    -------
    Tensor
        ``(out_channels · places, in_channels · inputs)`` int64, both flattened as torch does: −1 where the fully
        connected layer has a zero (so ``weight_map(...) >= 0`` is the mask of the toolkit), otherwise the number of
        the weight that stands there. Tied: its place in the flattened ``(out, in, kernel…)``; else in the flattened
        ``(out, places, in, kernel…)``.
    """
    size = math.prod(input_size)
    window = in_channels * math.prod(kernel_size)
    places = math.prod(output_size(input_size, kernel_size, stride, padding))
    # unfolding the numbers of the inputs tells which input each weight of a window meets; 0 is padding
    numbers = torch.arange(1, in_channels * size + 1, dtype=torch.float64).view(1, in_channels, *input_size)
    if len(input_size) == 1:
        seen = functional.pad(numbers, (padding[0],) * 2).unfold(2, kernel_size[0], stride[0])
        seen = seen.transpose(2, 3).flatten(1, 2)
    else:
        seen = functional.unfold(numbers, kernel_size, padding=padding, stride=stride)
    meets = seen[0].t().long() - 1  # (places, window)
    result = torch.full((out_channels, places, in_channels * size + 1), -1)
    own = torch.arange(window).expand(places, window)
    if not tied:
        own = own + torch.arange(places).unsqueeze(1) * window
    for channel in range(out_channels):
        first = channel * window * (1 if tied else places)
        # padding is written into a last column that is cut off
        result[channel].scatter_(1, torch.where(meets < 0, in_channels * size, meets), own + first)
    return result[..., :-1].flatten(0, 1)
