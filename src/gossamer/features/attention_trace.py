"""What attention did in one text: who read from whom, and what.

Kernels do not return what they attended to. It is computed again from queries and keys, and checked: read with that
pattern, the values must give what the model's own heads put out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ModelError
from gossamer.features.heads import HeadGrid, evaluating, watched
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.blocks import run_batch

_EXACT = 1e-3  # of the largest output that may be off


@dataclass(frozen=True, eq=False)
class AttentionTrace:
    """One layer's attention in one text.

    Attributes
    ----------
    layer
        Number of the layer.
    tokens
        Ids ``(tokens,)``.
    pattern
        A, what every token read of every other, ``(heads, tokens, tokens)``; rows sum to one.
    values
        v, what there was to read, ``(heads, tokens, size)``; those of grouped heads are repeated.
    """

    layer: int
    tokens: Tensor
    pattern: Tensor
    values: Tensor

    @property
    def z(self) -> Tensor:
        """What the heads put out, ``(tokens, heads, size)``."""
        return (self.pattern @ self.values).transpose(0, 1)


def attention_pattern(call: AttentionCall) -> Tensor:
    """Who reads from whom, ``(batch, heads, queries, keys)`` float32, from queries and keys.

    Queries that may read nothing get zeros.
    """
    query, key = call.query.float(), call.key.float().repeat_interleave(call.group, 1)
    scores = query @ key.transpose(2, 3) * call.scale
    links = call.links()
    if links is not None:
        scores = scores.masked_fill(~links, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@torch.no_grad()
def trace_attention(model: nn.Module, tokens: Tensor, layers: Iterable[int] | int) -> dict[int, AttentionTrace]:
    """Run one text and keep what attention did in some layers.

    Parameters
    ----------
    model
        A Hugging Face model that looks its attention up by name.
    tokens
        Ids, ``(tokens,)`` or ``(1, tokens)``.
    layers
        Numbers of layers.

    Returns
    -------
    dict
        Number → trace.

    Raises
    ------
    ModelError
        If the model's attention cannot be seen, or does more than read values with a softmax of queries and keys.
    CalibrationError
        If the text is empty or there is no such layer.
    """
    row = tokens.reshape(1, -1)
    grid = HeadGrid.of(model)
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not row.shape[1] or not all(0 <= layer < len(grid.layers) for layer in wanted):
        raise CalibrationError(
            f"{row.shape[1]} tokens and layers {wanted}; give one token or more, layers below {len(grid.layers)}"
        )
    calls: dict[int, AttentionCall] = {}
    outputs: dict[int, Tensor] = {}

    def attend(call: AttentionCall) -> None:
        calls[call.layer] = call

    def keep(layer: int, z: Tensor) -> None:
        outputs[layer] = z

    site = AttentionSite(model, attend)
    try:
        with evaluating(model), watched(grid, keep):
            run_batch(model, row)
    finally:
        site.remove()
    return {layer: _traced(layer, row[0], calls.get(layer), outputs.get(layer)) for layer in wanted}


def _traced(layer: int, tokens: Tensor, call: AttentionCall | None, output: Tensor | None) -> AttentionTrace:
    if call is None or output is None:
        raise ModelError(f"layer {layer} was not seen to attend; its mask or its attention is of a kind of its own")
    values = call.value.float().repeat_interleave(call.group, 1)[0]
    found = AttentionTrace(layer, tokens, attention_pattern(call)[0], values)
    off = float((found.z - output[0].float()).abs().max())
    if off > _EXACT * float(output.abs().max()):
        raise ModelError(
            f"layer {layer}: values read with the pattern of its queries and keys are {off:.2g} off what its heads put "
            "out; it does more than that, a sink for instance"
        )
    return found
