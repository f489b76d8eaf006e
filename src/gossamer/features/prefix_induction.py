"""Induction heads that want to see more than one token repeated, and those that do not.

Of "A B C … A B" an induction head looks from the second B to the C. Some do so on the last token alone; others only if
the tokens before it, the prefix, are repeated too, and better the longer it is [Kissane et al., 2024, arXiv 2406.17759,
section 3.4]. Random tokens with a repeated stretch tell them apart, and so does destroying all of the prefix but its
last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, ModelError
from gossamer.features.frozen_norm import FrozenNorm
from gossamer.features.heads import HeadGrid, evaluating, watched
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.blocks import run_batch


@dataclass(frozen=True, eq=False)
class Repeats:
    """Random tokens in which a stretch is repeated.

    Attributes
    ----------
    tokens
        ``(examples, length)``.
    corrupted
        The same, with only the last token of the repeated stretch left.
    source, destination
        Where the token behind the first stretch stands, and the last token of the second, ``(examples,)``.
    answer
        The token at the source.
    """

    tokens: Tensor
    corrupted: Tensor
    source: Tensor
    destination: Tensor
    answer: Tensor


def repeats(
    vocabulary: Sequence[int], prefix: int, count: int, length: int, seed: int, first: Sequence[int] = ()
) -> Repeats:
    """Draw texts of different random tokens, with a stretch of `prefix` tokens at two places.

    Parameters
    ----------
    vocabulary
        Ids to draw from.
    prefix
        Length of the stretch.
    count, length
        Texts, and tokens in each.
    seed
        Of everything that is drawn.
    first
        Tokens that begin every text; stretches lie behind them.

    Raises
    ------
    ConfigurationError
        If the text is too short for two stretches, or there are too few ids.
    """
    lead = len(first)
    if prefix < 1 or length < lead + 2 * prefix + 3 or len(vocabulary) < 2 * length:
        raise ConfigurationError(
            f"prefix {prefix}, length {length}, {len(vocabulary)} ids; give a prefix from 1 up, texts of at least "
            f"{lead + 2 * prefix + 3} tokens and twice as many ids as tokens"
        )
    generator = generator_for("repeated stretches", seed)
    ids = torch.tensor(list(vocabulary))
    tokens, corrupted = (torch.empty(count, length, dtype=torch.int64) for _ in range(2))
    source, destination = (torch.empty(count, dtype=torch.int64) for _ in range(2))
    for row in range(count):
        drawn = ids[torch.randperm(len(ids), generator=generator)[: 2 * length]]
        text, other = drawn[:length].clone(), drawn[length:]
        text[:lead] = torch.tensor(list(first), dtype=torch.int64)
        begin = int(torch.randint(lead, length - 2 * prefix - 2, (), generator=generator))
        again = int(torch.randint(begin + prefix + 1, length - prefix, (), generator=generator))
        text[again : again + prefix] = text[begin : begin + prefix]
        tokens[row] = text
        corrupted[row] = text
        corrupted[row, again : again + prefix - 1] = other[: prefix - 1]
        source[row], destination[row] = begin + prefix, again + prefix - 1
    return Repeats(tokens, corrupted, source, destination, tokens[torch.arange(count), source])


@dataclass(frozen=True, eq=False)
class PrefixScores:
    """How all heads of a model do induction, by the length of the prefix.

    Attributes
    ----------
    lengths
        Of the prefix.
    attention
        Mean attention from the end of the repetition to the token behind the first stretch, ``(lengths, heads)``.
    corrupted
        The same where all of the repetition but its last token is destroyed.
    effect
        What each head writes in the direction of that token's logit, ``(lengths, heads)``, with the scale of the last
        normalisation held fixed.
    names
        Layer and head.
    """

    lengths: tuple[int, ...]
    attention: Tensor
    corrupted: Tensor
    effect: Tensor
    names: tuple[tuple[int, int], ...]

    def of(self, layer: int, head: int) -> dict[str, list[float]]:
        """One head's scores by length.

        Raises
        ------
        ConfigurationError
            If there is no such head.
        """
        if (layer, head) not in self.names:
            raise ConfigurationError(f"there is no head {head} in layer {layer}; the last one is {self.names[-1]}")
        place = self.names.index((layer, head))
        parts = {"attention": self.attention, "corrupted": self.corrupted, "effect": self.effect}
        return {name: part[:, place].tolist() for name, part in parts.items()}

    @property
    def gain(self) -> Tensor:
        """How much more each head attends with the longest prefix than with the shortest, ``(heads,)``."""
        return self.attention[-1] - self.attention[0]

    def long_prefix(self, rise: float = 0.2, least: float = 0.3) -> list[tuple[int, int]]:
        """Heads that do induction with a long prefix, and far less without it.

        Parameters
        ----------
        rise
            By how much attention must grow with the prefix, and fall where the prefix is destroyed.
        least
            Attention that counts as induction.
        """
        falls = self.attention[-1] - self.corrupted[-1]
        chosen = (self.attention[-1] >= least) & (self.gain >= rise) & (falls >= rise)
        return [name for name, yes in zip(self.names, chosen.tolist()) if yes]

    def short_prefix(self, rise: float = 0.2, least: float = 0.3) -> list[tuple[int, int]]:
        """Heads that do induction on the last token alone."""
        chosen = (self.attention[0] >= least) & (self.gain < rise)
        return [name for name, yes in zip(self.names, chosen.tolist()) if yes]

    def table(self) -> str:
        """Heads that do induction at all, with their attention by length."""
        lines = ["head      " + "".join(f"{length:>8}" for length in self.lengths) + "   destroyed"]
        for place, (layer, head) in enumerate(self.names):
            row = self.attention[:, place]
            if float(row.max()) >= 0.1:
                shown = "".join(f"{value:8.3f}" for value in row.tolist())
                lines.append(f"{f'{layer}.{head}':10}{shown}{float(self.corrupted[-1, place]):12.3f}")
        return "\n".join(lines)


def prefix_induction(
    model: nn.Module,
    lengths: Sequence[int] = (1, 2, 3, 4, 6, 8),
    count: int = 100,
    tokens: int = 128,
    vocabulary: Sequence[int] | None = None,
    first: Sequence[int] = (),
    batch: int = 25,
    seed: int = 0,
) -> PrefixScores:
    """Test all heads of a model on repeated stretches of random tokens.

    Parameters
    ----------
    model
        A Hugging Face decoder.
    lengths
        Of the prefix; 1 to 9 in the paper.
    count, tokens
        Texts for each length, 400 in the paper, and tokens in each.
    vocabulary
        Ids to draw from; by default all of the model.
    first
        Tokens that begin every text, such as the one that the model was trained with.
    batch
        Texts that run together.
    seed
        Of the texts.

    Raises
    ------
    ModelError
        If the model's attention, or what makes its logits, cannot be seen.
    ConfigurationError
        As of :func:`repeats`.
    """
    grid = HeadGrid.of(model)
    ids = range(int(model.config.vocab_size)) if vocabulary is None else vocabulary  # type: ignore[union-attr]
    rows: dict[str, list[Tensor]] = {"attention": [], "corrupted": [], "effect": []}
    for length in lengths:
        drawn = repeats(ids, length, count, tokens, seed, first)
        clean = [_observed(model, grid, drawn.tokens[part], drawn, part) for part in _parts(count, batch)]
        destroyed = [_observed(model, grid, drawn.corrupted[part], drawn, part)[0] for part in _parts(count, batch)]
        rows["attention"].append(torch.cat([each for each, _ in clean]).mean(0))
        rows["effect"].append(torch.cat([each for _, each in clean]).mean(0))
        rows["corrupted"].append(torch.cat(destroyed).mean(0))
    stacked = {name: torch.stack(parts) for name, parts in rows.items()}
    return PrefixScores(tuple(lengths), names=tuple(grid.names), **stacked)


def _parts(count: int, batch: int) -> Iterator[slice]:
    return (slice(start, start + batch) for start in range(0, count, batch))


@torch.no_grad()
def _observed(model: nn.Module, grid: HeadGrid, tokens: Tensor, drawn: Repeats, part: slice) -> tuple[Tensor, Tensor]:
    """Attention to the source, and effect on the answer's logit, ``(texts, heads)`` each."""
    source, destination, answer = drawn.source[part], drawn.destination[part], drawn.answer[part]
    texts = torch.arange(len(tokens))
    attention: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}

    def attend(call: AttentionCall) -> None:
        query = call.query[texts, :, destination].float()
        key = call.key.float().repeat_interleave(call.group, 1)
        scores = torch.einsum("nhv,nhkv->nhk", query, key) * call.scale
        links = call.links()
        if links is not None:
            allowed = links.expand(len(texts), -1, -1, -1)[texts, 0, destination]
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        attention[call.layer] = scores.softmax(-1)[texts, :, source]

    def keep(layer: int, z: Tensor) -> None:
        written[layer] = torch.einsum(
            "nhv,hdv->nhd", z[texts, destination].float(), grid.layers[layer].slices().float()
        )

    site = AttentionSite(model, attend)
    try:
        with evaluating(model), watched(grid, keep), _Unembedding(model) as last:
            run_batch(model, tokens)
    finally:
        site.remove()
    if len(attention) != len(grid.layers):
        raise ModelError(f"{type(model).__name__} was not seen to attend in all of its layers")
    towards = last.directions(texts, destination, answer)
    effect = torch.cat([torch.einsum("nhd,nd->nh", written[layer], towards) for layer in sorted(written)], 1)
    return torch.cat([attention[layer] for layer in sorted(attention)], 1), effect


class _Unembedding:
    """What comes after the last block: a normalisation and the matrix of logits."""

    def __init__(self, model: nn.Module):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
            raise ModelError(f"{type(model).__name__} does not say which matrix makes its logits")
        self.model, self.head = model, head
        self.read: Tensor | None = None
        self.last: tuple[nn.Module, Tensor, Tensor] | None = None

    def __enter__(self) -> _Unembedding:
        def entering(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.read = args[0]

        def leaving(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.last = module, args[0], output

        self.handles = [self.head.register_forward_pre_hook(entering)]
        for module in self.model.modules():
            if "norm" in type(module).__name__.lower() and not list(module.children()):
                self.handles.append(module.register_forward_hook(leaving))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def directions(self, texts: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        """Along which the stream makes the logits of answers, ``(texts, d)``."""
        if self.last is None or self.read is None or not self.last[2].equal(self.read):
            raise ModelError(f"{type(self.model).__name__}: no normalisation puts out what logits are made of")
        norm = FrozenNorm.of(self.last[0], self.last[1][texts, positions].float())
        weight = self.head.weight.detach().float()[answers]  # type: ignore[union-attr]
        return torch.stack([norm.back(row, place) for place, row in enumerate(weight)])


def prefix_induction_score(
    model: nn.Module, layer: int, head: int, lengths: Sequence[int] = (1, 2, 3, 4, 6, 8), **options: object
) -> dict[str, list[float]]:
    """Scores of one head by length of the prefix: see :func:`prefix_induction`, which tests all heads at once."""
    return prefix_induction(model, lengths, **options).of(layer, head)  # type: ignore[arg-type]
