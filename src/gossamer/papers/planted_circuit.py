"""A transformer whose weights are written by hand, so that it is known which heads continue a repeated sequence.

The circuit has three floors: previous-token heads note what stood before each token, induction heads look for the place
where the current token was noted and copy what stands there, and a last head amplifies the result. All other heads are
busy with something else, some of it on prompts of the task only, but nothing that the answer depends on. Coordinates
are rotated at random, and every weight is noisy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.features.circuit_tasks import CircuitTask
from gossamer.papers.small_transformers import Attention

_MATCH, _REST, _SELF = 14.0, 7.0, 20.0  # scores of a match, of the first token, and of a token's own position
_LOGITS = 6.0
_CIRCUIT = (("previous", "previous"), ("induction", "induction"), ("amplify",))
_BUSY = ("duplicate", "own token", "first token", "own token to logits", "random", "random", "random", "random")


class PlantedTransformer(nn.Module):
    """Three layers of heads with a known circuit; position 0 holds the token that begins every prompt.

    Parameters
    ----------
    vocabulary, length
        Tokens that there are, and longest prompt.
    heads
        Of each layer, at least 3.
    noise
        Size of the noise in each weight matrix, relative to a matrix of ones on its diagonal.
    seed
        Of the places of heads, the rotation and the noise.

    Attributes
    ----------
    truth
        Which heads belong to the circuit, bool ``(3 · heads,)``.
    """

    def __init__(self, vocabulary: int = 40, length: int = 32, heads: int = 8, noise: float = 0.05, seed: int = 0):
        super().__init__()
        generator = generator_for("planted circuit", seed)
        plan = _Plan(vocabulary, length, noise, generator)
        self.embedding, self.position = nn.Embedding(vocabulary, plan.width), nn.Embedding(length, plan.width)
        self.blocks = nn.ModuleList(_Block(plan.width, heads, plan.size) for _ in _CIRCUIT)
        self.head = nn.Linear(plan.width, vocabulary, bias=False)
        places = [torch.randperm(heads, generator=generator) for _ in _CIRCUIT]
        self.truth = torch.zeros(len(_CIRCUIT), heads, dtype=torch.bool)
        with torch.no_grad():
            for number, (block, order, planted) in enumerate(zip(self.blocks, places, _CIRCUIT)):
                kinds = (planted + _BUSY * heads)[:heads]
                for head, kind in zip(order.tolist(), kinds):
                    plan.write(block.attention, head, kind)
                self.truth[number, order[: len(planted)]] = True
            self.embedding.weight.copy_(plan.rows("token", vocabulary))
            self.position.weight.copy_(plan.rows("position", length))
            self.head.weight.copy_(_LOGITS * plan.rows("answer", vocabulary))
        self.truth = self.truth.flatten()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)``."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_output_embeddings(self) -> nn.Module:
        """The matrix that makes logits."""
        return self.head


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, size: int):
        super().__init__()
        self.attention = Attention(width, heads, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class _Plan:
    """Where in the stream what is written: tokens, positions, tokens before, answers, and what nobody reads."""

    def __init__(self, vocabulary: int, length: int, noise: float, generator: torch.Generator):
        sizes = {
            "token": vocabulary,
            "position": length,
            "before": vocabulary,
            "answer": vocabulary,
            "junk": vocabulary,
        }
        self.width, self.noise, self.generator = sum(sizes.values()), noise, generator
        self.size = max(vocabulary, length) + 1
        rotation = torch.linalg.qr(torch.randn(self.width, self.width, generator=generator))[0]
        self.parts = dict(zip(sizes, rotation.split(list(sizes.values()))))

    def rows(self, part: str, count: int) -> Tensor:
        """Directions of a part, ``(count, width)``."""
        return self.parts[part][:count]

    def write(self, attention: Attention, head: int, kind: str) -> None:
        """Give a head its job."""
        made: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
            "previous": lambda: self._positional(1, "token", "before", 0.5),
            "induction": lambda: self._matching("before", "token", "answer", 0.5),
            "amplify": lambda: self._positional(0, "answer", "answer", 1.0),
            "duplicate": lambda: self._matching("token", "token", "junk", 1.0),
            "own token": lambda: self._positional(0, "token", "junk", 1.0),
            "own token to logits": lambda: self._positional(0, "token", "answer", 0.3),
            "first token": lambda: self._positional(None, "token", "junk", 1.0),
            "random": self._random,
        }
        rows = slice(head * self.size, (head + 1) * self.size)
        query, key, value, output = (self._noisy(weight) for weight in made[kind]())
        attention.q_proj.weight[rows] = query * self.size**0.25
        attention.k_proj.weight[rows] = key * self.size**0.25
        attention.v_proj.weight[rows] = value
        attention.o_proj.weight[:, rows] = output.t()

    def _noisy(self, weight: Tensor) -> Tensor:
        drawn = torch.randn(weight.shape, generator=self.generator) / self.width**0.5
        return weight + self.noise * drawn

    def _empty(self) -> Tensor:
        return torch.zeros(self.size, self.width)

    def _moved(self, read: str, written: str, gain: float) -> tuple[Tensor, Tensor]:
        """Values that read one part, and outputs that write it into another."""
        value, output = self._empty(), self._empty()
        count = len(self.parts["token"])
        value[:count] = self.parts[read][:count]
        output[:count] = gain * self.parts[written][:count]
        return value, output

    def _positional(self, back: int | None, read: str, written: str, gain: float) -> tuple[Tensor, ...]:
        """Looks so many tokens back, or to the first one."""
        query, key = self._empty(), self._empty()
        positions = self.parts["position"]
        count = len(positions)
        key[:count] = positions * _SELF**0.5
        if back is None:
            query[0] = positions.sum(0) * _SELF**0.5
        else:
            query[: count - back] = positions[back:] * _SELF**0.5
        return query, key, *self._moved(read, written, gain)

    def _matching(self, looked_at: str, looked_for: str, written: str, gain: float) -> tuple[Tensor, ...]:
        """Looks for a token, earlier, and rests on the first position if there is none."""
        query, key = self._empty(), self._empty()
        count = len(self.parts["token"])
        query[:count] = self.parts[looked_for] * _MATCH**0.5
        key[:count] = self.parts[looked_at] * _MATCH**0.5
        query[count] = self.parts["position"].sum(0) * _REST**0.5
        key[count] = self.parts["position"][0] * _REST**0.5
        return query, key, *self._moved("token", written, gain)

    def _random(self) -> tuple[Tensor, ...]:
        """Looks anywhere, and writes where nobody reads."""
        query, key, value = (2 * torch.randn(self._empty().shape, generator=self.generator) for _ in range(3))
        mixing = torch.randn(self.size, len(self.parts["junk"]), generator=self.generator)
        scale = self.size**-0.5
        # what is written is about as long as what heads of the circuit write
        return query * scale, key * scale, value * scale / 4, mixing @ self.parts["junk"] * scale


def repeated_prompts(vocabulary: int, length: int, count: int, seed: int) -> CircuitTask:
    """Some of a random sequence after all of it: what follows is asked for.

    In the twins other tokens stand in the place of those that come again, so that nothing is repeated. Wrong is another
    token of the sequence.
    """
    generator = generator_for("repetitions", seed)
    half = min(length, vocabulary) // 2 - 1
    positive, negative, right, wrong = [], [], [], []
    for _ in range(count):
        drawn = torch.randperm(vocabulary - 1, generator=generator)[: 2 * half] + 1
        first, others = drawn[:half], drawn[half:]
        # of few lengths, so that many prompts can run together
        again = int(torch.randint(1, (half - 1) // 5 + 1, (), generator=generator)) * 5
        elsewhere = int(torch.randint(half, (), generator=generator))
        begin = torch.zeros(1, dtype=torch.int64)
        positive.append(torch.cat([begin, first, first[:again]]))
        negative.append(torch.cat([begin, first, others[:again]]))
        right.append(first[again])
        wrong.append(first[elsewhere if elsewhere != again else again - 1])
    return CircuitTask(positive, negative, torch.stack(right)[:, None], torch.stack(wrong)[:, None])
