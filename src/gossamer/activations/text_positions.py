"""Positions of the tokens behind a prompt, which are not always their numbers.

With M-RoPE an image takes fewer positions than it has tokens, so that all that follows is moved by a constant. The
decoder is told of it with the prompt; whoever goes on without ``generate`` has to keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.correction_runtimes import EagerText
from gossamer.errors import ModelError
from gossamer.models.blocks import accepted


def check_positions(model: Any, what: str) -> None:
    """Refuse a model to which the positions of tokens cannot be told.

    Raises
    ------
    ModelError
        If it takes none, as with ALiBi, where they are counted by what is in the cache.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not accepted(decoder, position_ids=None) or getattr(getattr(decoder, "config", None), "alibi", False):
        raise ModelError(
            f"{type(model).__name__} takes no positions of tokens but counts them, as with ALiBi; {what} has to tell "
            f"them: use a model with rotary or learned positions"
        )


@contextmanager
def noting_positions(model: Any) -> Iterator[list[Tensor]]:
    """The positions ``(…, 1, tokens)`` with which the decoder is called inside of the context, if it is given any."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            seen.append(kwargs["position_ids"])

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def position_shift(seen: list[Tensor], length: int) -> Tensor | None:
    """How far positions behind a prompt of so many tokens are from their numbers, ``(…, 1, 1)``; None if unknown."""
    return seen[-1][..., -1:] + 1 - length if seen else None


class PlacedText(EagerText):
    """A text whose positions are numbers of tokens and a shift.

    Attributes
    ----------
    shift
        ``(…, 1, 1)``; None leaves positions to the model, but where they are given.
    """

    shift: Tensor | None = None

    def read(self, ids: Tensor, **options: Any) -> Tensor:
        """Read tokens ``(1, n)`` behind the text; logits ``(n, vocabulary)``."""
        if self.shift is None:
            return super().read(ids, **options)
        numbers = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)
        return self.read_at(numbers.unsqueeze(0), ids, **options)

    def read_at(self, numbers: Tensor, ids: Tensor, **options: Any) -> Tensor:
        """Read tokens that have the numbers ``(1, n)`` in the text."""
        positions = numbers if self.shift is None else numbers + self.shift
        return super().read(ids, position_ids=positions, **options)
