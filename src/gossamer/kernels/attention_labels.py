"""The few channels of every key by which tokens are chosen, as they are stored: as they are, or in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

LABEL_BITS = (4, 8, 16, 32)


@dataclass(frozen=True, eq=False)
class Labels:
    """Channels of keys as they are stored.

    Attributes
    ----------
    codes
        ``(batch, heads, tokens, r)`` floating-point; or uint8, with 4 bits two to a byte.
    low, step
        ``(batch, heads, tokens, 1)`` of rounded labels, in the dtype of the keys, else None.
    channels
        r.
    bits
        Of each label.
    """

    codes: Tensor
    low: Tensor | None
    step: Tensor | None
    channels: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(part.numel() * part.element_size() for part in self.parts())

    @property
    def shape(self) -> tuple[int, ...]:
        """``(batch, heads, tokens, r)``."""
        return (*self.codes.shape[:3], self.channels)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The labels, ``(batch, heads, tokens, r)``, by default as stored or, if rounded, in float32 at least."""
        if self.low is None or self.step is None:
            return self.codes if dtype is None else self.codes.to(dtype)
        codes, low, step = self.codes, self.low, self.step
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., : self.channels]
        dtype = _wide(step) if dtype is None else dtype
        return codes.to(dtype) * step.to(dtype) + low.to(dtype)

    def first(self, tokens: int) -> Labels:
        """Those of the first tokens."""
        return self.like([part[:, :, :tokens] for part in self.parts()])

    def like(self, parts: list[Tensor]) -> Labels:
        """Labels of the same kind that consist of other :meth:`parts`."""
        low, step = parts[1:] or (None, None)
        return Labels(parts[0], low, step, self.channels, self.bits)

    def parts(self) -> list[Tensor]:
        """Everything that grows with the tokens."""
        return [part for part in (self.codes, self.low, self.step) if part is not None]


def make_labels(values: Tensor, bits: int) -> Labels:
    """Round channels of keys ``(batch, heads, tokens, r)`` to labels.

    With 16 bits they keep a 16-bit dtype, and become bfloat16 from any other; with 32 they stay as they are. With 8
    and 4 bits they lie on a grid of 2^bits − 1 steps from the smallest to the largest of the token and head; each is
    the nearest point of the grid that is stored, whose step is rounded to the dtype of the values.

    Raises
    ------
    ConfigurationError
        If bits are none of these.
    """
    channels = values.shape[-1]
    if bits not in LABEL_BITS:
        raise ConfigurationError(f"label_bits is {bits}; it must be one of {', '.join(map(str, LABEL_BITS))}")
    if bits >= 16:
        wide = values.element_size() > 2 and bits == 16
        return Labels(values.to(torch.bfloat16) if wide else values, None, None, channels, bits)
    exact = values.to(_wide(values))
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    # a step of float32 would bring the last of 15 points nearer by 0.06 steps at most, and be 2 bytes more a token
    step = ((high - low) / (2**bits - 1)).to(values.dtype)
    codes = ((exact - low) / torch.where(step > 0, step, 1)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, channels % 2)).unflatten(-1, (-1, 2))
        codes = codes[..., 0] | (codes[..., 1] << 4)
    return Labels(codes, low.to(values.dtype), step, channels, bits)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def of_values(labels: Tensor | Labels) -> Tensor:
    """A tensor of the shape, dtype and device of the labels; where they are rounded, not of their numbers."""
    if isinstance(labels, Tensor):
        return labels
    return labels.codes if labels.step is None else labels.step.expand(labels.shape)
