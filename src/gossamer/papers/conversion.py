"""A trained dense language model that is to become N:M sparse: what the experiments on conversion share.

A byte-level transformer is trained on Python's source; then every method gets the same dense weights, the same pieces
of the same text in the same order, and the same number of steps, and is judged by text that nobody has read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.papers.byte_language import ByteGPT, evaluate, next_byte_loss, pretrain
from gossamer.papers.python_source import python_source
from gossamer.pruning.base import LayerwisePruner
from gossamer.pruning.magnitude import Magnitude, Random
from gossamer.pruning.sparsegpt import SparseGPT
from gossamer.pruning.wanda import Wanda
from gossamer.training.maskllm import MaskLLM

ONE_SHOT: dict[str, type[LayerwisePruner]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}
_HELD_OUT = 0.05  # of the text, from its end
_DOCSTRING = re.compile(rb'"""(.+?)"""', re.DOTALL)


@dataclass(frozen=True)
class Conversion:
    """One seed's dense model and text.

    Attributes
    ----------
    settings
        ``bytes, held_out, length, layers, width, heads, steps, batch, learning_rate`` of the dense model, and
        ``tokens``: sequences of a step of conversion, and ``calibration``: steps' worth of text for one-shot pruning.
    dense
        In evaluation mode, never changed.
    text, unread, held_out
        Bytes ``(n,)`` to learn from and to be judged by, and the first sequences of the latter.
    seed
        Of everything.
    """

    settings: dict[str, Any]
    dense: ByteGPT
    text: Tensor
    unread: Tensor
    held_out: Tensor
    seed: int

    @classmethod
    def of(cls, settings: dict[str, Any], seed: int, width: int | None = None) -> Conversion:
        """Train the dense model."""
        text = python_source(settings["bytes"], 1, 1, settings["length"], 1, seed).text
        cut = int(len(text) * (1 - _HELD_OUT))
        held_out = sequences(text[cut:], settings["held_out"], settings["length"])
        torch.manual_seed(seed)
        model = ByteGPT(settings["layers"], width or settings["width"], settings["heads"], settings["length"])
        pretrain(
            model, text[:cut], held_out, settings["steps"], settings["batch"], settings["learning_rate"], seed=seed
        )
        return cls(settings, model.eval().requires_grad_(False), text[:cut], text[cut:], held_out, seed)

    def copy(self) -> ByteGPT:
        """The dense model once more, to be changed."""
        return copy.deepcopy(self.dense).requires_grad_(True)

    def loss(self, model: nn.Module, held_out: Tensor | None = None) -> float:
        """Held-out loss of a model in evaluation mode, nats a byte."""
        assert isinstance(model, ByteGPT)
        return evaluate(model.eval(), self.held_out if held_out is None else held_out)

    def pieces(self, steps: int, text: Tensor | None = None) -> Iterator[Tensor]:
        """What is read, step by step: bytes ``(sequences, length)``."""
        source, length = self.text if text is None else text, self.settings["length"]
        generator = torch.Generator().manual_seed(1_000 + self.seed)
        places = torch.randint(len(source) - length, (steps, self.settings["tokens"], 1), generator=generator)
        return (source[place + torch.arange(length)] for place in places)

    def pruned(self, method: str, pattern: str) -> tuple[ByteGPT, MaskSet]:
        """A copy, pruned at once after a look at the first pieces."""
        model = self.copy().eval()
        batches = list(self.pieces(self.settings["calibration"]))
        pruner = Random(pattern=pattern, seed=self.seed) if method == "random" else ONE_SHOT[method](pattern=pattern)
        return model, pruner.prune(model, batches, progress=False).masks

    def masked(self, masks: MaskSet) -> float:
        """Held-out loss of the dense weights under masks."""
        model = self.copy()
        masks.apply_(model)
        return self.loss(model)

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor], Tensor],
        steps: int,
        text: Tensor | None = None,
        each: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Make steps: the rate rises over a twelfth of them and falls along a cosine to a tenth; norms clipped at 1."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for step, piece in enumerate(self.pieces(steps, text)):
            cooled = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * cooled * min(1.0, 12 * (step + 1) / steps)
            optimizer.zero_grad()
            loss(piece).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            each(step)

    def learn_masks(
        self,
        steps: int,
        prior: MaskSet | None,
        learning_rate: float,
        text: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """MaskLLM: what its masks are, and what they and the last soft ones cost."""
        model = self.copy().train()
        learning = MaskLLM(steps=steps, prior=prior, seed=self.seed, **options).install(model)
        optimizer, _ = learning.optimizer(learning_rate)
        self.train(optimizer, lambda piece: next_byte_loss(model, piece), steps, text)
        seen = learning.diagnostics()
        soft = evaluate(model.train(), self.held_out)
        masks = learning.finalize()
        return {
            "masks": masks,
            "loss": self.loss(model),
            "soft loss": soft,
            "largest probability": seen.max_probability,
            "moved": seen.from_prior,
        }


def sequences(text: Tensor, count: int, length: int) -> Tensor:
    """Up to `count` pieces of a text one after the other, ``(count, length)``."""
    return text.unfold(0, length, length)[:count]


def docstrings_of(text: Tensor) -> Tensor:
    """What is said in a source between triple quotes, one after the other: bytes ``(n,)`` int64."""
    found = b"\n".join(_DOCSTRING.findall(text.to(torch.uint8).numpy().tobytes()))
    return torch.from_numpy(np.frombuffer(found, np.uint8).astype(np.int64))
