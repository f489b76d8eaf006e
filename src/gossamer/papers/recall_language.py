"""Small byte-level language models with any attention, taught real text and to recall what was said long before.

Some sequences of a batch are plain text. In the others pairs of a name and a value are scattered; at the end the names
come again, and their values are to be predicted, besides every byte of text. Where a pair lies is random, so that
attention which sees only some of the past finds only some of the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.cluster_attention import SELF_SCORE
from gossamer.core.randomness import generator_for
from gossamer.papers.byte_language import BYTES, run_steps

_SHARPNESS = 2.0  # of attention at the beginning, times what is usual
_FIRST_NAME, _FIRST_VALUE, _LARGEST = 128, 192, 64  # bytes that no text in ASCII has


CHANCE = 1 / _LARGEST


@dataclass(frozen=True)
class Recall:
    """Sequences with something to recall.

    Attributes
    ----------
    tokens
        ``(count, length)``.
    places
        Of the bytes from which a value is to be predicted, that is the names at the end, ``(count, pairs)``.
    distances
        How far back the pairs lie, ``(count, pairs)``.
    """

    tokens: Tensor
    places: Tensor
    distances: Tensor

    def values(self) -> Tensor:
        """What is to be predicted, ``(count, pairs)``."""
        return self.tokens.gather(1, self.places + 1)

    def rows(self, chosen: slice) -> Recall:
        """Some of the sequences."""
        return Recall(self.tokens[chosen], self.places[chosen], self.distances[chosen])


def draw_recall(text: Tensor, count: int, length: int, pairs: int, generator: torch.Generator) -> Recall:
    """Scatter pairs in pieces of a text, and ask for them at the end, in another order.

    Parameters
    ----------
    text
        Bytes, ``(n,)``; those that are not ASCII are taken for spaces.
    count, length, pairs
        Sequences, bytes of each, and pairs in each, at most 64.
    generator
        Of everything that is drawn.
    """
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    tokens = text[starts + torch.arange(length)]
    tokens = torch.where(tokens < _FIRST_NAME, tokens, ord(" "))
    asked = length - 2 * pairs
    ranks = torch.rand(count, asked // 2, generator=generator).argsort(1)[:, :pairs] * 2
    names = torch.rand(count, _LARGEST, generator=generator).argsort(1)[:, :pairs] + _FIRST_NAME
    values = torch.randint(_FIRST_VALUE, _FIRST_VALUE + _LARGEST, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    places = (asked + 2 * torch.arange(pairs)).expand(count, -1)
    for where, what in (
        (ranks, names),
        (ranks + 1, values),
        (places, names.gather(1, order)),
        (places + 1, values.gather(1, order)),
    ):
        tokens = tokens.scatter(1, where, what)
    return Recall(tokens, places, places - ranks.gather(1, order))


class _Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, layers: int):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.normal_(self.down.weight, std=(4 * width * 2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, loss = self.attention(self.norm1(x))
        x = x + mixed
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")), loss


class RecallGPT(nn.Module):
    """A causal transformer on bytes with given attention layers.

    A state begins as the sum of its byte and the byte before, queries and keys begin alike, and what is read is first
    copied: then what followed a byte the last time stands out from the first step on. Otherwise models so small need
    thousands of steps to find it.

    Parameters
    ----------
    width
        Of the states.
    length
        Longest sequence.
    attentions
        One a layer: ``attention(x)`` of ``(batch, n, width)`` gives as much, and a loss to add.
    """

    def __init__(self, width: int, length: int, attentions: Sequence[nn.Module]):
        super().__init__()
        self.embedding, self.position = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        self.before = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.before.weight)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, attention, len(attentions)) for attention in attentions)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(self.embedding.weight * width**-0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, n, 256)``, and the losses of all attention layers."""
        x = self.embedding(tokens)
        x = x + self.before(functional.pad(x, (0, 0, 1, -1))) + self.position.weight[: tokens.shape[1]]
        total = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            total = total + loss
        return self.head(self.norm(x)), total


class Heads(nn.Module):
    """Multi-head attention by a given function of queries, keys and values ``(batch, heads, n, size)``.

    Queries and keys begin alike, and what is read is first copied; see :class:`RecallGPT`.
    """

    def __init__(self, width: int, heads: int, size: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.heads, self.attend = heads, attend
        inner = heads * size
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=(_SHARPNESS / width) ** 0.5)
        with torch.no_grad():
            nn.init.orthogonal_(self.qkv.weight[2 * inner :])
            self.qkv.weight[inner : 2 * inner] = self.qkv.weight[:inner]
            self.out.weight.copy_(self.qkv.weight[2 * inner :].t())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of ``(batch, n, width)`` to itself, and no loss."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)), x.new_zeros(())


def masked(links: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention to some keys only, given as bool ``(heads or 1, n, n)``; by torch, which is quickest for short ones.

    A byte reads itself only where it sees nothing else: its own state goes past attention anyway.
    """
    bias = torch.zeros(links.shape).masked_fill(torch.eye(links.shape[-1], dtype=torch.bool), SELF_SCORE)
    bias = bias.masked_fill(~links, -math.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, bias)

    return attend


@dataclass(frozen=True)
class Lesson:
    """What a model is taught, and by what it is judged.

    Attributes
    ----------
    text
        Bytes to learn from, ``(n,)``.
    held_out
        Sequences of text, ``(sequences, length)``.
    recall
        Sequences with something to recall, on text that is not learned from.
    pairs
        In a sequence.
    """

    text: Tensor
    held_out: Tensor
    recall: Recall
    pairs: int

    @classmethod
    def of(cls, text: Tensor, settings: dict[str, Any]) -> Lesson:
        """Hold out the end of a text; the same whatever the seed of a run."""
        length, count = settings["length"], settings["held_out"]
        kept = 4 * count * length
        generator = generator_for("held-out recall", 0)
        recall = draw_recall(text[-kept:], count, length, settings["pairs"], generator)
        sequences = text[-kept:][: count * length].view(count, length)
        return cls(text[:-kept], sequences, recall, settings["pairs"])


@dataclass(frozen=True)
class Marks:
    """How a model does on what it has not seen.

    Attributes
    ----------
    loss
        Mean loss of text, in nats a byte.
    recalled
        Share of the values that are guessed right.
    by_distance
        The same by quarters of the distance, the nearest first.
    """

    loss: float
    recalled: float
    by_distance: list[float]


def teach(
    model: nn.Module,
    lesson: Lesson,
    settings: dict[str, Any],
    seed: int,
    prepare: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None,
) -> Marks:
    """Train a model by AdamW, and judge it.

    Parameters
    ----------
    model
        As :class:`RecallGPT`; changed in place.
    lesson
        What to learn.
    settings
        ``length``, ``text_batch`` (sequences of plain text), ``batch`` (with something to recall), ``steps``,
        ``learning_rate``.
    seed
        Of the order; equal seeds see the same sequences.
    prepare
        Gets the optimiser before training.
    """
    generator = generator_for("places to learn from", seed)
    rate, length = settings["learning_rate"], settings["length"]
    plain, batch = settings["text_batch"], settings["batch"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    prepare(optimizer)
    model.train()

    def loss(step: int) -> Tensor:
        starts = torch.randint(len(lesson.text) - length, (plain, 1), generator=generator)
        pairs = draw_recall(lesson.text, batch, length, lesson.pairs, generator)
        tokens = torch.cat([lesson.text[starts + torch.arange(length)], pairs.tokens])
        logits, extra = model(tokens)
        return _text_loss(logits, tokens) + _recall_loss(logits[plain:], pairs) + extra

    run_steps(optimizer, settings["steps"], rate, loss)
    return judge(model, lesson)


@torch.no_grad()
def judge(model: nn.Module, lesson: Lesson) -> Marks:
    """Loss on held-out text, and share of values recalled."""
    model.eval()
    parts = [slice(start, start + 32) for start in range(0, len(lesson.held_out), 32)]
    losses = [float(_text_loss(model(lesson.held_out[part])[0], lesson.held_out[part])) for part in parts]
    right = []
    for part in parts:
        rows = lesson.recall.rows(part)
        right.append(_at_places(model(rows.tokens)[0], rows).argmax(-1) == rows.values())
    hits, far = torch.cat(right).float(), lesson.recall.distances
    quarters = (4 * far) // (lesson.held_out.shape[1] + 1)
    found = [float(hits[quarters == number].mean()) for number in range(4)]
    return Marks(sum(losses) / len(losses), float(hits.mean()), found)


def _text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of the bytes that are text, not names and values."""
    meant = tokens[:, 1:].masked_fill(tokens[:, 1:] >= _FIRST_NAME, -100).flatten()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), meant)


def _recall_loss(logits: Tensor, recall: Recall) -> Tensor:
    return functional.cross_entropy(_at_places(logits, recall).flatten(0, 1), recall.values().flatten())


def _at_places(logits: Tensor, recall: Recall) -> Tensor:
    return logits.gather(1, recall.places[..., None].expand(-1, -1, logits.shape[-1]))


def attended_pairs(links: Tensor) -> float:
    """Mean number of keys that a query reads, of bool ``(…, n, n)``."""
    return float(links.double().sum(-1).mean())
