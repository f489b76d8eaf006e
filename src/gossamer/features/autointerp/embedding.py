"""Texts as vectors: for scoring by retrieval, for hard negatives, and for comparing explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.measure.windows import evaluation_mode, model_device

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts → unit vectors ``(texts, size)``; ``encode`` of a ``SentenceTransformer`` that normalises is one."""


class MeanPooledEncoder:
    """The mean of an encoder's last states over the tokens of a text, at unit length.

    That is how sentence encoders such as all-MiniLM-L6-v2 are meant to be read.

    Parameters
    ----------
    model, tokenizer
        Of Hugging Face; the model returns ``last_hidden_state``.
    batch
        Texts at a time.
    length
        Tokens of a text; what follows is cut off.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch: int = 64, length: int = 256):
        self.model, self.tokenizer, self.batch, self.length = model, tokenizer, batch, length

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(texts, size)`` float32."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding
        vectors: dict[int, np.ndarray] = {}
        with evaluation_mode(self.model):
            for first in range(0, len(order), self.batch):
                places = order[first : first + self.batch]
                for place, vector in zip(places, self._vectors([texts[i] or " " for i in places])):
                    vectors[place] = vector
        return np.stack([vectors[place] for place in range(len(texts))]) if texts else np.zeros((0, 1), np.float32)

    def _vectors(self, texts: list[str]) -> np.ndarray:
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        read = {name: part.to(model_device(self.model)) for name, part in read.items()}
        states = self.model(**read).last_hidden_state.float()
        mask = read["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        found: np.ndarray = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return found
