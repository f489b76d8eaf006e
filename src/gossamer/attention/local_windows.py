"""Attention to what is near: bands over images, windows around the same place in every frame of a video.

A window is kept as a rule and not as an n × n matrix. If tokens are ordered by their place and not by their frame, the
same place of all frames is one block, and windows are bands of blocks: work and memory follow the window. Text is
attended to apart, and both parts are put together by their log-sum-exps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import attention_with_lse, block_sparse_attention

_BLOCK = 64  # of the kernel, where a band has no blocks of its own


@dataclass(frozen=True)
class WindowMask:
    """Tokens see the places near their own in every frame, and all text; text sees everything.

    Attributes
    ----------
    length
        Tokens, text included.
    reach
        Places to either side that are seen.
    frames
        Of equally many tokens; 1 makes a band.
    text
        Which tokens are text: a run of them at the beginning or the end.

    Raises
    ------
    ConfigurationError
        If the frames do not divide the tokens, or the text lies elsewhere.
    """

    length: int
    reach: int
    frames: int = 1
    text: slice = field(default_factory=lambda: slice(0, 0))

    def __post_init__(self) -> None:
        start, stop, _ = self.text.indices(self.length)
        if stop > start and start != 0 and stop != self.length:
            raise ConfigurationError(f"text is {start} … {stop} of {self.length} tokens; it must be at either end")
        if self.frames < 1 or self.length <= self._words or (self.length - self._words) % self.frames:
            raise ConfigurationError(
                f"{self.length - self._words} tokens in {self.frames} frames; frames must have equally many tokens"
            )
        if self.reach < 0:
            raise ConfigurationError(f"reach is {self.reach}; it must be 0 or more")

    @classmethod
    def keeping(cls, share: float, length: int, frames: int = 1, text: slice = slice(0, 0)) -> WindowMask:
        """The window of ⌊share · tokens of a frame⌋ places [Chen et al., 2025, arXiv 2505.22918]; all of them at 1.

        Raises
        ------
        ConfigurationError
            If that is no place at all.
        """
        words = len(range(*text.indices(length)))
        frame = (length - words) // max(1, frames)
        width = math.floor(round(share * frame, 9))
        if width < 1:
            raise ConfigurationError(
                f"keep is {share}: a window of no token in frames of {frame}; keep at least 1/{max(frame, 1)}"
            )
        return cls(length, frame if share >= 1 else width // 2, frames, text)

    @property
    def _words(self) -> int:
        return len(range(*self.text.indices(self.length)))

    @property
    def frame(self) -> int:
        """Tokens of a frame."""
        return (self.length - self._words) // self.frames

    @property
    def places(self) -> Tensor:
        """Number of the token at each place of each frame, ``(frames, tokens of a frame)``."""
        front = self.text.indices(self.length)[0] == 0
        first = self._words if front else 0
        return torch.arange(first, first + self.frames * self.frame).view(self.frames, self.frame)

    @property
    def words(self) -> Tensor:
        """Numbers of the text tokens."""
        return torch.arange(*self.text.indices(self.length))

    @property
    def density(self) -> float:
        """Share of all pairs that is kept."""
        place = torch.arange(self.frame)
        widths = (place + self.reach).clamp(max=self.frame - 1) - (place - self.reach).clamp(min=0) + 1
        seen = self.frames**2 * int(widths.sum())
        words = self._words
        return (seen + words * (2 * self.length - words)) / self.length**2

    def real_density(self, real: Tensor | None) -> float:
        """Share of the pairs of real tokens, bool ``(batch, n)``, that is kept; of all pairs for None."""
        if real is None:
            return self.density
        own = real[:, self.places.to(real.device)].sum(1)  # real tokens at each place, over the frames
        seen, place = pad(own.cumsum(1), (1, 0)), torch.arange(self.frame, device=real.device)
        first, last = (place - self.reach).clamp(min=0), (place + self.reach + 1).clamp(max=self.frame)
        total, words = real.sum(1), real[:, self.words.to(real.device)].sum(1)
        kept = (own * (seen[:, last] - seen[:, first])).sum(1) + words * (2 * total - words)
        return int(kept.sum()) / max(int(total.square().sum()), 1)

    def to_dense(self) -> Tensor:
        """Every single link, bool ``(1, 1, n, n)``."""
        near = (torch.arange(self.frame)[:, None] - torch.arange(self.frame)).abs() <= self.reach
        found = torch.ones(self.length, self.length, dtype=torch.bool)
        flat = self.places.flatten()
        found[flat[:, None], flat] = near.repeat(self.frames, self.frames)
        return found[None, None]

    def to_blocks(self, block_size: int) -> BlockMask:
        """The blocks that hold any link, for kernels."""
        return BlockMask.from_tokens(self.to_dense(), block_size, causal=False)


Mask = WindowMask | BlockMask | Tensor


def mask_density(mask: Mask, real: Tensor | None = None) -> float:
    """Share of the pairs that a mask keeps; of those of real tokens, bool ``(batch, n)``, where they are told."""
    if not isinstance(mask, Tensor):
        return mask.real_density(real)
    if real is None:
        return float(mask.double().mean())
    both = real[:, None, :, None] & real[:, None, None, :]
    return float((mask & both).double().mean()) / max(float(both.double().mean()), 1e-12)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention between the pairs that a mask keeps, and each row's log-sum-exp over them.

    Parameters
    ----------
    query, key, value
        ``(batch, heads, n, size)``.
    mask
        A window, blocks, or bool that can be broadcast to ``(batch, heads, n, n)``.
    scale
        By default one over the square root of the size.
    key_mask
        True at real tokens, ``(batch, n)``.

    Returns
    -------
    output, lse
        ``(batch, heads, n, value size)`` and ``(batch, heads, n)``; zeros and −∞ for a row that sees nothing.

    Raises
    ------
    ConfigurationError
        If the mask is for another length.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, BlockMask):
        return block_sparse_attention(query, key, value, mask, scale=scale, key_mask=key_mask, return_lse=True)
    if isinstance(mask, Tensor):
        if mask.dtype is not torch.bool or mask.shape[-2:] != (query.shape[2], key.shape[2]):
            raise ConfigurationError(
                f"the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool and end with "
                f"{(query.shape[2], key.shape[2])}"
            )
        seen = mask if key_mask is None else mask & key_mask[:, None, None, :]
        return _small_attention(query, key, value, seen, scale)
    if mask.length != query.shape[2] or mask.length != key.shape[2]:
        raise ConfigurationError(f"the window is made for {mask.length} tokens, not {query.shape[2]}; make another")
    return _window_attention(query, key, value, mask, scale, key_mask)


def _window_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: WindowMask, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    options = {"causal": False, "scale": scale}
    words = mask.words.to(query.device)
    # place by place and in it frame by frame: then the same place of all frames is one block
    order = mask.places.T.flatten().to(query.device)
    parts = [part[:, :, order] for part in (query, key, value)]
    real = None if key_mask is None else key_mask[:, order]
    found = _banded(*parts, mask, scale, real)
    if len(words):
        seen = None if key_mask is None else key_mask[:, words]
        found = _merged(
            found, attention_with_lse(parts[0], key[:, :, words], value[:, :, words], key_mask=seen, **options)
        )
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    sums = query.new_empty(query.shape[:3], dtype=found[1].dtype)
    output[:, :, order], sums[:, :, order] = found
    if len(words):
        text = attention_with_lse(query[:, :, words].contiguous(), key, value, key_mask=key_mask, **options)
        output[:, :, words], sums[:, :, words] = text
    return output, sums


def _banded(
    query: Tensor, key: Tensor, value: Tensor, mask: WindowMask, scale: float, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention between near places, of tokens ordered by place and frame."""
    n = query.shape[2]
    size = _BLOCK if mask.frames == 1 else mask.frames
    row = torch.arange(-(-n // size), device=query.device)
    apart = (row[:, None] - row).abs()
    # a band of tokens cuts through blocks, and the kernel's own window draws its edge
    reach, window = (-(-mask.reach // size), mask.reach + 1) if mask.frames == 1 else (mask.reach, None)
    blocks = BlockMask((apart <= reach)[None, None], n, n, (size, size), causal=False)
    return block_sparse_attention(query, key, value, blocks, scale=scale, window=window, key_mask=real, return_lse=True)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys together, from that to each."""
    sums = torch.logaddexp(one[1], other[1])
    safe = sums.masked_fill(sums == float("-inf"), 0.0)
    first, second = ((part[1] - safe).exp()[..., None].to(part[0].dtype) for part in (one, other))
    return one[0] * first + other[0] * second, sums


def _small_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = (part.to(wide).repeat_interleave(group, 1) for part in (key, value))
    scores = ((query.to(wide) * scale) @ key.mT).masked_fill(~seen, float("-inf"))
    empty = ~seen.any(-1).expand(scores.shape[:-1])
    weights = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
    # the largest weight is e^(largest score − sum); a sum of exponentials of −∞ would cost ten times as much
    sums = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(empty, float("-inf"))
    return (weights @ value).to(query.dtype), sums
