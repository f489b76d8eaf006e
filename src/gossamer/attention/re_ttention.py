"""Re-ttention: what dropped keys would have added to a softmax changes slowly, so remember it.

A softmax over a few kept keys gives them too much: its denominator lacks the dropped ones. The share of the denominator
that the kept keys hold hardly changes from one denoising step to the next. So it is measured at rare full steps, each
row's weights are multiplied by it at sparse steps, and what the dropped keys had put out at the full step is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.attention.base import Answer, check_share
from gossamer.attention.local_windows import Mask, WindowMask, mask_density, masked_attention
from gossamer.attention.state import StepwiseAttention
from gossamer.core.block_mask import BlockMask
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import attention_with_lse
from gossamer.models.attention_sites import AttentionCall


@register(
    "re-ttention",
    paper="re-ttention",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("structure", "activation"),
    patterns=("unstructured", "blocks"),
)
@dataclass(kw_only=True)
class Rettention(StepwiseAttention):
    """A static window with the full softmax's denominator and the rest of its output [Chen et al., 2025, 2505.22918].

    At a full step: ρ_i = Σ_{j kept} e^{a_ij} / Σ_j e^{a_ij} of every head and query, and R = O − ρ · O_kept. At a
    sparse step t steps after it: O ≈ min(1, ρ + λ (t − 1)) · O_kept + R. The paper takes R behind the output
    projection; that is linear, so R before it makes the same difference.

    Parameters
    ----------
    keep
        Share of the tokens of a picture, or of a frame, that a window spans.
    mask
        ``band`` over all tokens, ``frames`` around the same place in every frame, or blocks; text stays dense.
    frames
        Of a video, for ``frames``.
    dense_steps
        Full steps at the beginning, a number or, below 1, a share of the steps (0.3 for videos).
    refresh_every
        Steps between full steps afterwards, the first of which follows the dense steps at once.
    drift
        λ, added to ρ after every sparse step: attention concentrates as noise goes away.
    residual, ratio
        Whether R is added, and ρ multiplied; without the ratio, this is window attention with a cached residual
        [Yuan et al., 2024, arXiv 2406.08552].

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """

    keep: float = 1 / 32
    mask: Literal["band", "frames"] | BlockMask = "band"
    frames: int = 1
    dense_steps: int | float = 5
    refresh_every: int = 5
    drift: float = 0.04
    residual: bool = True
    ratio: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.keep, "keep")
        if isinstance(self.mask, str) and self.mask not in ("band", "frames"):
            raise ConfigurationError(f"mask is {self.mask!r}; it must be band, frames, or a BlockMask")
        if self.mask == "frames" and self.frames < 2:
            raise ConfigurationError(f"frames is {self.frames}; say how many frames a video has, or use mask='band'")
        if not (0 <= self.dense_steps < math.inf and 1 <= self.refresh_every < math.inf):
            raise ConfigurationError(
                f"dense_steps is {self.dense_steps} and refresh_every {self.refresh_every}; give finite numbers, at "
                "least 0 and 1"
            )
        if not math.isfinite(self.drift):
            raise ConfigurationError(f"drift is {self.drift}; it must be a finite number, such as 0.04")

    def dense_until(self, steps: int) -> int:
        """Full steps at the beginning of a sample of so many."""
        few = 0 < self.dense_steps < 1
        return math.floor(round(self.dense_steps * steps, 9)) if few else int(self.dense_steps)

    def kind(self, index: int, steps: int) -> Literal["dense", "refresh", "sparse"]:
        """What happens at a step."""
        dense = self.dense_until(steps)
        if index < dense:
            return "dense"
        return "sparse" if (index - dense) % self.refresh_every else "refresh"

    def mix(self, call: AttentionCall) -> Answer | None:
        """Full, full and remembered, or sparse and corrected."""
        kind = self.kind(self.cache.index, self.cache.steps)
        if kind == "dense":
            return None
        mask = self.links(call)
        kept, lse_kept = masked_attention(
            call.query, call.key, call.value, mask, scale=call.scale, key_mask=call.key_mask
        )
        if kind == "refresh":
            return self._refreshed(call, kept, lse_kept)
        output = kept * self._ratio(call)[..., None].to(kept.dtype) if self.ratio else kept
        if self.residual:
            output = output + self.cache.get(call, "residual")
        return Answer(output, mask_density(mask, call.key_mask))

    def _refreshed(self, call: AttentionCall, kept: Tensor, lse_kept: Tensor) -> Answer:
        output, lse = attention_with_lse(
            call.query, call.key, call.value, causal=False, scale=call.scale, key_mask=call.key_mask
        )
        share = _share(lse_kept, lse)
        self.cache.put(call, "ratio", share)
        if self.residual:
            scaled = kept * share[..., None].to(kept.dtype) if self.ratio else kept
            self.cache.put(call, "residual", output - scaled)
        return Answer(output, 1.0)

    def _ratio(self, call: AttentionCall) -> Tensor:
        share = self.cache.get(call, "ratio")
        since = self.cache.index - self.cache.find(call, "ratio").step  # type: ignore[union-attr]
        # by steps and not by calls: some solvers ask twice at a step. A share beyond 1 would inflate again
        return (share + self.drift * (since - 1)).clamp(max=1.0)

    def links(self, call: AttentionCall) -> Mask:
        """The mask for a call.

        Raises
        ------
        ConfigurationError
            If a window would hold no token, or the frames do not divide the tokens.
        """
        if isinstance(self.mask, BlockMask):
            return self.mask
        frames = self.frames if self.mask == "frames" else 1
        return WindowMask.keeping(self.keep, call.query.shape[2], frames, self.cache.context)

    def expected_cost(self, steps: int, density: float) -> float:
        """Attention of a sample relative to dense, where sparse steps compute `density` of the pairs."""
        kinds = [self.kind(index, steps) for index in range(steps)]
        return sum({"dense": 1.0, "refresh": 1.0 + density, "sparse": density}[kind] for kind in kinds) / steps


def softmax_share(
    query: Tensor, key: Tensor, mask: Mask, *, scale: float | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """ρ: the share of each row's softmax denominator that the kept keys hold, by log-sum-exps.

    Parameters
    ----------
    query, key
        ``(batch, heads, n, size)``.
    mask
        See :func:`~gossamer.attention.local_windows.masked_attention`.
    scale, key_mask
        Likewise.

    Returns
    -------
    Tensor
        ``(batch, heads, n)`` in [0, 1]; 0 for a row of which nothing is kept.
    """
    value = key[..., :1]
    _, kept = masked_attention(query, key, value, mask, scale=scale, key_mask=key_mask)
    _, full = attention_with_lse(query, key, value, causal=False, scale=scale, key_mask=key_mask)
    return _share(kept, full)


def attention_with_denominator_scale(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    share: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention to the kept keys, as if their exponentials were the given share of the denominator.

    Weights are e^{a_ij} / (D_kept / ρ): a row of them sums to ρ and not to 1.

    Parameters
    ----------
    query, key, value, mask, scale, key_mask
        See :func:`~gossamer.attention.local_windows.masked_attention`.
    share
        ρ, ``(batch, heads, n)`` or something that can be broadcast to it, in [0, 1].

    Returns
    -------
    Tensor
        ``(batch, heads, n, value size)``.

    Raises
    ------
    ConfigurationError
        If a share is outside [0, 1], or the mask is for another length.
    """
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ConfigurationError(
            f"share spans {float(share.min()):.4g} … {float(share.max()):.4g}; it must be in [0, 1]: clamp it"
        )
    output, _ = masked_attention(query, key, value, mask, scale=scale, key_mask=key_mask)
    return output * share[..., None].to(output.dtype)


def distribution_shift(used: Tensor, true: Tensor) -> Tensor:
    """How far the weights of a row are from full attention: Σ w log(w / p) − w + p over all keys.

    Kept weights are those of full attention times used / true, dropped ones are 0; so this is
    used · log(used / true) − used + 1. For plain sparse attention (used = 1) it is Kullback and Leibler's divergence
    −log true, and at the true share 1 − true, the dropped weight itself.

    Parameters
    ----------
    used, true
        Sum of a row's weights, and the share that its kept keys hold in full attention; positive.
    """
    return used * (used / true).log() - used + 1


def _share(kept: Tensor, full: Tensor) -> Tensor:
    # both are −∞ in a row that is padding altogether
    return torch.where(kept == float("-inf"), 0.0, (kept - full).exp()).clamp(max=1.0)
