"""Networks that make pictures larger: convolutions, attention in square windows, and in rectangles of both directions.

What comes out of each is added to the bicubic enlargement, so that a short training has only the rest to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.errors import ConfigurationError


class ResidualNetwork(nn.Module):
    """A small EDSR [Lim et al., 2017, arXiv 1707.02921]: residual blocks without norms, and a shuffle of pixels.

    Parameters
    ----------
    scale
        2, 3 or 4.
    width, blocks
        Channels, and residual blocks of two convolutions.
    """

    def __init__(self, scale: int, width: int = 32, blocks: int = 6):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.scale = scale

    def forward(self, pictures: Tensor) -> Tensor:
        """``(batch, 3, h, w)`` in [0, 1] → ``(batch, 3, scale · h, scale · w)``."""
        first = self.head(pictures - 0.5)
        x = first
        for block in self.body:
            x = x + block(x)
        return self.tail(first + self.last(x)) + larger(pictures, self.scale)


class WindowNetwork(nn.Module):
    """A small SwinIR [Liang et al., 2021, arXiv 2108.10257]: attention in windows, every other one shifted.

    Parameters
    ----------
    scale
        2, 3 or 4.
    width, blocks, heads
        Channels, transformer blocks, and heads of each.
    window
        Side of a window in pixels.
    """

    def __init__(self, scale: int, width: int = 32, blocks: int = 2, heads: int = 4, window: int = 8):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(_WindowBlock(width, heads, window, window // 2 * (i % 2)) for i in range(blocks))
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.scale, self.window = scale, window

    def forward(self, pictures: Tensor) -> Tensor:
        """``(batch, 3, h, w)`` in [0, 1] → ``(batch, 3, scale · h, scale · w)``."""
        height, width = pictures.shape[-2:]
        first = self.head(_padded(pictures - 0.5, self.window))
        x = first.permute(0, 2, 3, 1)
        for block in self.body:
            x = block(x)
        made = self.tail(first + self.last(x.permute(0, 3, 1, 2)))
        return made[..., : self.scale * height, : self.scale * width] + larger(pictures, self.scale)


class _WindowBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, (window, window), (shift, shift)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.bias = nn.Parameter(torch.zeros(heads, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(_attended(self.qkv(self.norm1(x)), self.heads, self.window, self.shift, self.bias))
        return x + self.mlp(self.norm2(x))


class CrossAggregationNetwork(nn.Module):
    """The cross aggregation transformer with rectangles, CAT-R [Chen et al., 2022, arXiv 2211.13654].

    Half of the heads look into wide rectangles and half into high ones, every other block into shifted ones; where a
    pixel's rectangles cross, both directions meet. A convolution of every channel adds what is near, and biases of
    relative positions are the answers of a small network, so that they fit rectangles of any size. Blocks stand in
    groups with a convolution and a way around.

    Parameters
    ----------
    scale
        2, 3 or 4.
    width, blocks, heads
        Channels, blocks of every group, and heads of each, half of them in either direction. The paper's are 180, 6, 6.
    groups
        Groups of blocks; 6 in the paper.
    window
        Sides of a rectangle in pixels.
    mlp_ratio
        Hidden units of a block's feed-forward network for every channel; 4 in the paper.

    Raises
    ------
    ConfigurationError
        If heads or channels cannot be halved and divided among the heads.
    """

    def __init__(
        self,
        scale: int,
        width: int = 32,
        blocks: int = 2,
        heads: int = 4,
        groups: int = 1,
        window: tuple[int, int] = (4, 16),
        mlp_ratio: int = 4,
    ):
        super().__init__()
        if heads % 2 or width % heads:
            raise ConfigurationError(f"{heads} heads, {width} channels; heads must be even and divide the channels")
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(_CrossGroup(width, blocks, heads, window, mlp_ratio) for _ in range(groups))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.scale, self.window = scale, window

    def forward(self, pictures: Tensor) -> Tensor:
        """``(batch, 3, h, w)`` in [0, 1] → ``(batch, 3, scale · h, scale · w)``."""
        height, width = pictures.shape[-2:]
        first = self.head(_padded(pictures - 0.5, math.lcm(*self.window)))
        x = first.permute(0, 2, 3, 1)
        for group in self.body:
            x = group(x)
        made = self.tail(first + self.last(self.norm(x).permute(0, 3, 1, 2)))
        return made[..., : self.scale * height, : self.scale * width] + larger(pictures, self.scale)


class _CrossGroup(nn.Module):
    def __init__(self, width: int, blocks: int, heads: int, window: tuple[int, int], mlp_ratio: int):
        super().__init__()
        shifts = ((0, 0), (window[0] // 2, window[1] // 2))
        self.blocks = nn.ModuleList(_CrossBlock(width, heads, window, shifts[i % 2], mlp_ratio) for i in range(blocks))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made = x
        for block in self.blocks:
            made = block(made)
        return x + self.conv(made.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: tuple[int, int], shift: tuple[int, int], mlp_ratio: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # the paper's sixteenth of half the width; norms leave nothing of one number and only signs of two
        self.wide, self.high = (_PositionBias(max(width // 32, 4), heads // 2) for _ in range(2))
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1))
        wide, high = (half.flatten(-2) for half in qkv.chunk(2, -1))
        heads, window, shift = self.heads // 2, self.window, self.shift
        seen = [
            _attended(wide, heads, window, shift, self.wide(*window)),
            _attended(high, heads, window[::-1], shift[::-1], self.high(*window[::-1])),
        ]
        near = self.near(qkv[..., 2, :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.out(torch.cat(seen, -1) + near)
        return x + self.mlp(self.norm2(x))


class _PositionBias(nn.Module):
    """What a network makes of the distance between two pixels of a rectangle, for every head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        sizes = (width, width, heads)
        self.first = nn.Linear(2, width)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, size)) for size in sizes)
        )

    def forward(self, height: int, width: int) -> Tensor:
        """``(heads, height · width, height · width)``."""
        device = self.first.weight.device
        places = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        distances = places[:, None] - places[None]
        known, where = distances.flatten(0, 1).unique(dim=0, return_inverse=True)
        answers = self.layers(self.first(known.to(self.first.weight.dtype)))
        return answers[where].view(len(places), len(places), -1).permute(2, 0, 1)


def larger(pictures: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, the answer without a network: ``(batch, 3, h, w)``."""
    return functional.interpolate(pictures, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def _padded(pictures: Tensor, side: int) -> Tensor:
    """Mirrored at the right and lower edges, as often as it takes, until both sizes are multiples of `side`."""
    for axis in (-1, -2):
        size = pictures.shape[axis]
        period = max(2 * size - 2, 1)
        places = torch.arange(size + -size % side, device=pictures.device) % period
        pictures = pictures.index_select(axis, torch.where(places < size, places, period - places))
    return pictures


def _attended(qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor) -> Tensor:
    """Attention within windows of a picture: ``(batch, h, w, 3 · channels)`` → ``(batch, h, w, channels)``."""
    batch, height, width, _ = qkv.shape
    rows, columns = height // window[0], width // window[1]
    moved = qkv.roll((-shift[0], -shift[1]), (1, 2))
    parts = moved.view(batch, rows, window[0], columns, window[1], 3, heads, -1)
    query, key, value = parts.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3).unbind(0)
    if any(shift):
        bias = bias.masked_fill(~_together(height, width, window, shift, qkv.device)[:, None], -torch.inf)
    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    seen = seen.view(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return seen.reshape(batch, height, width, -1).roll(shift, (1, 2))


def _together(height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Whether two pixels of a shifted window lie side by side in the picture too, ``(windows, pixels, pixels)``."""
    wrapped_rows = torch.arange(height, device=device) >= height - shift[0]
    wrapped_columns = torch.arange(width, device=device) >= width - shift[1]
    region = 2 * wrapped_rows[:, None] + wrapped_columns.long()
    parts = region.view(height // window[0], window[0], width // window[1], window[1]).transpose(1, 2).flatten(2)
    parts = parts.flatten(0, 1)
    return parts[:, :, None] == parts[:, None]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "residual": ResidualNetwork,
    "window": WindowNetwork,
    "cross": CrossAggregationNetwork,
}
"""Networks by name; all take scale, width and blocks."""
