"""Which tokens a rule leaves alone: padding, and the beginning of a prompt, whose errors every later token inherits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError


class DenseTokens:
    """Follows a model's calls and says which of their tokens stay dense.

    A call that finds nothing in its cache is a prompt: of every sequence the first share of tokens stays dense,
    padding not counted. A call that continues a cache is decoding: everything is sparse.

    Parameters
    ----------
    prompt
        Share of each prompt that stays dense, from 0 to 1; with 1 only decoding is sparse.

    Attributes
    ----------
    dense
        Of the present call, ``(batch, tokens)`` bool, or None if no token is dense.
    """

    def __init__(self, prompt: float):
        if not 0 <= prompt <= 1:
            raise ConfigurationError(f"dense_prefill is {prompt}; it must be from 0 to 1, the dense share of a prompt")
        self.prompt = prompt
        self.dense: Tensor | None = None

    def attach(self, model: nn.Module) -> Any:
        """Follow the calls of a model; returns what to ``remove()`` in the end."""
        return model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shape = _shape(args, kwargs)
        self.dense = None
        if shape is None:
            return
        past = kwargs.get("past_key_values")
        seen = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
        if seen == 0:
            self.dense = self.of_prompt(shape, _real(kwargs.get("attention_mask"), shape))

    def of_prompt(self, shape: tuple[int, int], real: Tensor | None = None) -> Tensor | None:
        """Dense tokens of prompts.

        Parameters
        ----------
        shape
            Sequences, and tokens in each.
        real
            ``(batch, tokens)`` bool, False at padding; None if there is none.
        """
        if real is None:
            count = math.ceil(self.prompt * shape[1])
            return (torch.arange(shape[1]) < count).expand(shape) if count else None
        order = real.cumsum(1)  # 1 at the first real token, wherever the padding is
        first = (self.prompt * order[:, -1:]).ceil()
        return (order <= first) | ~real


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    found = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if found is None:
        found = next((value for value in args if isinstance(value, Tensor)), None)
    return None if found is None or found.dim() < 2 else (found.shape[0], found.shape[1])


def _real(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.shape != shape or bool(mask.all()):
        return None
    return mask.bool()
