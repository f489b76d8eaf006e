"""Which tokens a rule leaves alone: padding, and the beginning of a prompt, whose errors every later token inherits."""

from __future__ import annotations

import inspect
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

    def attach(self, model: nn.Module) -> list[Any]:
        """Follow the calls of a model; returns the handles to ``remove()`` in the end."""
        return [
            model.register_forward_pre_hook(self._look, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]

    def _forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        # a layer that is called by itself has no prompt
        self.dense = None

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        shape = _shape(args, given)
        self.dense = None
        if shape is None:
            return
        past = given.get("past_key_values")
        seen = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
        if seen == 0:
            self.dense = self.of_prompt(shape, _real(given.get("attention_mask"), shape))

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
            count = int(self._first(torch.tensor(shape[1])))
            return (torch.arange(shape[1]) < count).expand(shape) if count else None
        order = real.cumsum(1)  # 1 at the first real token, wherever the padding is
        return (order <= self._first(order[:, -1:])) | ~real

    def _first(self, tokens: Tensor) -> Tensor:
        # 0.07 · 100 is a little more than 7 in binary
        return (self.prompt * tokens.double() - 1e-9).ceil()


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, the positional ones too."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args)) | kwargs


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    found = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if found is None:
        found = next((value for value in args if isinstance(value, Tensor)), None)
    return None if found is None or found.dim() < 2 else (found.shape[0], found.shape[1])


def _real(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    if isinstance(mask, dict):  # one for each kind of attention
        mask = next(iter(mask.values()), None)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == shape[1]:
        # of caches of a fixed size: a token is real if another, or itself, looks at it
        seen = mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask.bool()
        mask = seen.any(1).any(1)[:, : shape[1]].expand(shape[0], -1)
    if not isinstance(mask, Tensor) or mask.shape != shape or bool(mask.all()):
        return None
    return mask.bool()
