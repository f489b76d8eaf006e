"""Running the later blocks of a model again and again on the same prompts, without running the earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.features.heads import evaluating, last_logits
from gossamer.models.blocks import find_stacks


class Replay:
    """What the blocks of a model give out on some prompts.

    Parameters
    ----------
    model
        The model.
    tokens
        ``(prompts, length)``, or what else the model is called with.

    Attributes
    ----------
    logits
        After the last token, ``(prompts, vocabulary)``.
    """

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.blocks = {name: block for stack in find_stacks(model) for name, block in stack.blocks.items()}
        found: dict[nn.Module, Any] = {}
        handles = [
            block.register_forward_hook(lambda module, args, output: found.update({module: output}))
            for block in self.blocks.values()
        ]
        try:
            with torch.no_grad(), evaluating(model):
                self.logits = last_logits(model, tokens)
        finally:
            for handle in handles:
                handle.remove()
        self._outputs = [found.get(block) for block in self.blocks.values()]

    def before(self, name: str) -> int:
        """How many blocks end before a module begins; 0 if it is in no block."""
        return next((n for n, block in enumerate(self.blocks) if f"{name}.".startswith(f"{block}.")), 0)

    @contextmanager
    def skipping(self, count: int) -> Iterator[None]:
        """Inside, the first blocks give out what they did before, at no cost; hooks on them still see it."""
        chosen = list(zip(self.blocks.values(), self._outputs))[:count]
        before = [(block, block.__dict__.get("forward")) for block, _ in chosen]
        for block, output in chosen:
            block.forward = lambda *args, output=output, **kwargs: output
        try:
            yield
        finally:
            for block, forward in before:
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
