"""How informative blocks of tokens are to a layer: the attention that they receive.

The informativeness of a block is the share of a query's attention that falls on it, averaged over heads and over the
queries that may see it. It is taken in units of the average block, so that what is learnt at one length holds at
another.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gossamer.attention.token_sparse_layers import LayerCall
from gossamer.core.block_mask import block_count
from gossamer.errors import ModelError, UnknownNameError
from gossamer.kernels.attention import attention_with_lse, block_mass
from gossamer.models.attention_sites import AttentionCall, AttentionSite

Pooling = Literal["mean", "max"]


class _Captured(Exception):
    """Queries and keys are known; what the layer would do with them is of no interest."""


@torch.no_grad()
def attention_call(model: nn.Module, call: LayerCall) -> AttentionCall:
    """Queries, with rotary positions, and keys of all tokens of a layer; the layer itself computes them.

    Raises
    ------
    ModelError
        If the layer's attention does not look its function up by name, or has a mask beyond causality and padding.
    """
    found: list[AttentionCall] = []

    def capture(inner: AttentionCall) -> Tensor | None:
        found.append(inner)
        raise _Captured

    kwargs: dict[str, Any] = {**call.kwargs}
    kwargs |= {name: None for name in ("past_key_values", "past_key_value") if name in kwargs}
    site = AttentionSite(model, capture)
    dropout = [m for m in call.module.modules() if isinstance(getattr(m, "attention_dropout", None), float)]
    before = [m.attention_dropout for m in dropout]
    try:
        for module in dropout:
            module.attention_dropout = 0.0  # type: ignore[assignment]
        # not the layer itself, whose hooks would leave tokens out
        call.module.forward(*call.args, **kwargs)
    except _Captured:
        return found[0]
    finally:
        site.remove()
        for module, value in zip(dropout, before):
            module.attention_dropout = value
    if kwargs.get("attention_mask") is not None:
        raise ModelError(
            f"layer {call.layer} has a mask beyond causality and padding, as texts that share a row make one; give "
            "every text a row of its own, or take scores that do not read attention, such as 'predicted'"
        )
    raise ModelError(f"layer {call.layer} computes no attention that can be read; give a model with 'sdpa' attention")


@torch.no_grad()
def attention_received(
    inner: AttentionCall, block: int, real: Tensor | None = None, pooled: Pooling = "mean", causal: bool = False
) -> Tensor:
    """Informativeness of the blocks of a layer, ``(batch, blocks)``; 1 is that of an average block.

    Wang et al., 2025, "LeMo", arXiv 2501.09767: ``I_j = Σ_heads Σ_{i ≥ j} A_ij`` over the number of queries that may
    see j. No more than a matrix of blocks is stored.

    Parameters
    ----------
    inner
        Queries and keys.
    block
        Tokens of a block.
    real
        Bool ``(batch, tokens)``; padding neither gives nor receives.
    pooled
        ``mean``: the block's tokens together. ``max``: as if all were like its most informative token.
    causal
        Whether only the block's own queries count, and the average is that of the blocks so far, so that no later
        token takes part in the decision.

    Raises
    ------
    UnknownNameError
        If there is no such pooling.
    """
    if pooled not in get_args(Pooling):
        raise UnknownNameError("pooling", pooled, get_args(Pooling))
    length = inner.query.shape[2]
    mask = real if real is not None else inner.key_mask
    options: dict[str, Any] = {"scale": inner.scale, "window": inner.window, "key_mask": mask}
    lse = attention_with_lse(inner.query, inner.key, inner.value, **options)[1]
    if mask is not None:
        lse = lse.masked_fill(~mask[:, None], float("inf"))  # a query that is padding gives nothing
    size = (block, 1) if pooled == "max" else (block, block)
    mass = block_mass(inner.query, inner.key, lse, size, **options).mean(1)
    blocks = block_count(length, block)
    if pooled == "max":
        mass = pad(mass, (0, blocks * block - length)).unflatten(-1, (blocks, block)) * block
    else:
        mass = mass[..., None]
    queries = _counts(mask, mass, length, block)
    exists = queries > 0
    if causal:
        return mass.diagonal(dim1=1, dim2=2).amax(1) / queries.clamp_min(1) * exists.cumsum(-1)
    seen = queries.flip(-1).cumsum(-1).flip(-1)
    return mass.sum(1).amax(-1) / seen.clamp_min(1) * exists.sum(-1, keepdim=True)


def _counts(mask: Tensor | None, mass: Tensor, length: int, block: int) -> Tensor:
    """Real tokens of each block, ``(batch or 1, blocks)``."""
    tokens = torch.ones(1, length, device=mass.device) if mask is None else mask.to(mass.dtype)
    return pad(tokens, (0, -length % block)).unflatten(-1, (-1, block)).sum(-1)
