"""The attention of vision transformers, whoever wrote them: found by structure, replaced where it is computed.

Whatever projections, norms and biases a model puts around it, attention itself is one call of
``scaled_dot_product_attention``. That call is answered by a method while the module that makes it runs; nothing of
the model is copied, subclassed or changed, and removing the hooks restores it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.errors import ModelError, TargetError
from gossamer.models.blocks import find_stacks
from gossamer.models.heads import find_attention_heads

_POSITIONS = re.compile(r"pos(ition)?_embed(ding)?s?$")
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries, keys, values ``(batch, heads, tokens, ·)`` and the scale → the output, shaped like the values."""


@dataclass(frozen=True, eq=False)
class VisionSite:
    """One attention layer.

    Attributes
    ----------
    name, module
        Of the module that makes queries and maps heads back.
    block_name, block
        The block around it, whose output is the next block's input.
    heads, head_dim, width
        Heads, their width, and the width of the model.
    hidden
        Width of the feed-forward layer of the block.
    """

    name: str
    module: nn.Module
    block_name: str
    block: nn.Module
    heads: int
    head_dim: int
    width: int
    hidden: int


def find_vision_sites(model: nn.Module) -> list[VisionSite]:
    """The attention layers of a vision transformer, in order, one for each block.

    Raises
    ------
    TargetError
        If there is none, or a block has several.
    """
    blocks = {name: block for stack in find_stacks(model) for name, block in stack.blocks.items()}
    found: list[VisionSite] = []
    for heads in find_attention_heads(model):
        around = next((name for name in blocks if heads.name.startswith(f"{name}.")), None)
        if around is None:
            continue
        if any(site.block_name == around for site in found):
            raise TargetError(f"{around} has several attention layers; a vision transformer has one in each block")
        width, mixed = heads.output.shape[:2]
        hidden = max(m.out_features for m in _feed_forward(blocks[around], heads.module))
        found.append(
            VisionSite(
                heads.name, heads.module, around, blocks[around], heads.count, mixed // heads.count, width, hidden
            )
        )
    if not found:
        raise TargetError(f"{type(model).__name__} has no blocks with attention; give a vision transformer")
    return found


def _feed_forward(block: nn.Module, attention: nn.Module) -> list[nn.Linear]:
    inside = {id(m) for m in attention.modules()}
    return [m for m in block.modules() if isinstance(m, nn.Linear) and id(m) not in inside] or [nn.Linear(1, 0)]


def count_tokens(model: nn.Module) -> int:
    """Tokens of an image, with those of the prefix: the length of the table of positions.

    Raises
    ------
    ModelError
        If there is none.
    """
    for name, parameter in model.named_parameters():
        if _POSITIONS.search(name.removesuffix(".weight")) and parameter.dim() in (2, 3):
            return parameter.shape[-2]
    raise ModelError(
        f"{type(model).__name__} has no table of positions that tells the number of tokens; pass num_tokens"
    )


def final_norm(model: nn.Module, sites: Sequence[VisionSite]) -> nn.Module:
    """The normalisation behind the last block, or the identity."""
    names = [name for name, _ in model.named_modules()]
    last = max(place for place, name in enumerate(names) if f"{name}.".startswith(f"{sites[-1].block_name}."))
    modules = list(model.modules())
    norms = (m for m in modules[last + 1 :] if isinstance(m, nn.LayerNorm | nn.RMSNorm))
    return next((m for m in norms if m.normalized_shape == (sites[-1].width,)), nn.Identity())


class _Answered(TorchFunctionMode):
    """Answers calls of ``scaled_dot_product_attention`` by another function; all else goes on as ever."""

    def __init__(self, name: str, attend: Attend):
        super().__init__()
        self.name, self.attend, self.asked = name, attend, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.asked = True
        return self._answer(*args, **(kwargs or {}))

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p:
            raise ModelError(
                f"{self.name} attends with a mask or with dropout; sparse links are for plain attention over all tokens"
            )
        return self.attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


class Answering:
    """Answers the attention of one site until it is removed.

    Parameters
    ----------
    site
        Where.
    attend
        What answers.

    Raises
    ------
    ModelError
        In a call of the model: if the site computes attention by other means than torch's function, or with a mask
        or dropout.
    """

    def __init__(self, site: VisionSite, attend: Attend):
        self._site, self._attend = site, attend
        self._entered: list[_Answered] = []
        self._handles = [
            site.module.register_forward_pre_hook(self._enter),
            site.module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = _Answered(self._site.name, self._attend)
        mode.__enter__()
        self._entered.append(mode)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self._entered.pop()
        mode.__exit__(None, None, None)
        # an exception on the way leaves no output, and speaks for itself
        if output is not None and not mode.asked:
            raise ModelError(
                f"{self._site.name} does not call torch's scaled_dot_product_attention; for Hugging Face load the "
                f"model with attn_implementation='sdpa', for timm set its fused_attn"
            )


def first_tensor(output: Any) -> Tensor:
    """What a block passes on: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, first: Tensor) -> Any:
    """The output of a block with another first tensor."""
    return first if isinstance(output, Tensor) else (first, *output[1:])


def logits_of(output: Any) -> Tensor:
    """Logits of a classifier's output, which may be an object that holds them.

    Raises
    ------
    ModelError
        If there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"{type(output).__name__} holds no logits; give a model that classifies images")
    return logits


def gather_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """``(batch, n, width)`` at places ``(batch, m)`` → ``(batch, m, width)``."""
    return torch.gather(tokens, 1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
