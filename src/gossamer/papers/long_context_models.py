"""Tiny language models that answer questions about long contexts, and the lessons that teach them to.

A model of a few thousand weights learns to look things up within a minute if nearly every token of its lessons is an
answer. A lesson is therefore short: a few facts, and then question upon question about them. Facts stand as far apart
as in a long context, not by filler between them but by positions that are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core.randomness import generator_for
from gossamer.measure.long_context.stories import Chapter
from gossamer.measure.long_context.tasks import Task
from gossamer.measure.long_context.words import PEOPLE, PLACES, SMALL_WORDS, THINGS, WordTokenizer, tokens_of

_IGNORED = -100
_SHARP = 20.0  # score by which what a head looks for stands out
_HEAD_SIZE = 32


@dataclass(frozen=True)
class Lessons:
    """Lessons as tensors.

    Attributes
    ----------
    tokens, positions, targets
        ``(lessons, tokens)``: ids, positions, and ids again where they are answers, −100 elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor


def lessons(tokenizer: WordTokenizer, count: int, length: int, span: int, seed: int) -> Lessons:
    """Short lessons with facts spread over a long span of positions.

    Parameters
    ----------
    tokenizer
        Of the small vocabulary.
    count, length
        How many, and tokens in each.
    span
        Positions over which a lesson is spread.
    seed
        Of everything that is drawn.
    """
    rng = np.random.default_rng(seed)
    made = [_lesson(tokenizer, rng, length, span) for _ in range(count)]
    return Lessons(*(torch.tensor(part, dtype=torch.int64) for part in zip(*made)))


def exercises(
    tokenizer: WordTokenizer, tasks: list[Task], count: int, length: int, rng: np.random.Generator
) -> Lessons:
    """Prompts as they will be met, with their answers; in turn from all tasks."""
    made = []
    for number in range(count):
        sample = tasks[number % len(tasks)].sample(rng, length, tokenizer)
        answer = [*tokens_of(sample.answer, tokenizer), tokenizer.eos_token_id]
        made.append(([*sample.prompt, *answer], [_IGNORED] * length + answer))
    longest = max(len(ids) for ids, _ in made)
    tokens = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in made]
    targets = [wanted + [_IGNORED] * (longest - len(wanted)) for _, wanted in made]
    positions = torch.arange(longest).expand(count, -1)
    return Lessons(torch.tensor(tokens), positions, torch.tensor(targets))


def tiny_model(tokenizer: WordTokenizer, width: int, layers: int, heads: int, positions: int, seed: int) -> nn.Module:
    """An untrained Llama.

    Parameters
    ----------
    tokenizer
        Its vocabulary.
    width, layers, heads
        Of the transformer; key heads are half of the heads.
    positions
        Longest context.
    seed
        Of its weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=_HEAD_SIZE,
        rope_theta=1e6,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=width**-0.5 / 2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape)
    _begin(model)
    return model.eval()


@torch.no_grad()
def _begin(model: Any) -> None:
    """Begin with the circuit by which transformers look things up, which takes long to be found by chance.

    A head of the first layer looks one token back and copies what it finds into the second half of the stream; a head
    of the second layer looks for tokens behind one that equals its own, and repeats them [Olsson et al., 2022, arXiv
    2209.11895]. Training starts there and is free to leave.
    """
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    embeddings = model.model.embed_tokens.weight
    width, size = embeddings.shape[1], first.head_dim
    half, fast = width // 2, 3
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.mul_(0.1)
    embeddings[:, half:] = 0
    scale = float(embeddings.square().mean().sqrt())
    embeddings[:, 0] = 0.6 * scale * width**0.5
    scale = float(embeddings.square().mean().sqrt())
    copied = min(half, size)

    # all embeddings share their first component; keys of it alone, turned by a position, agree with the next query
    common = 0.6 * width**0.5 / 1.17
    angle = model.model.rotary_emb.inv_freq[:fast]
    plain = (_SHARP * size**0.5 / fast) ** 0.5 / common
    query, key = _rows(first.q_proj, size), _rows(first.k_proj, size)
    query[0], key[0] = 0, 0
    query[0, :fast, 0] = plain
    key[0, :fast, 0], key[0, size // 2 : size // 2 + fast, 0] = plain * angle.cos(), plain * angle.sin()
    _rows(first.v_proj, size)[0] = torch.eye(size, width)
    first.o_proj.weight[:, :size] = 0
    first.o_proj.weight[half : half + copied, :copied] = scale * torch.eye(copied)

    # channels that hardly turn compare tokens at any distance
    slow = [*range(size // 4, size // 2), *range(3 * size // 4, size)][: copied - 1]
    query, key = _rows(second.q_proj, size), _rows(second.k_proj, size)
    query[0], key[0] = 0, 0
    for place, channel in enumerate(slow, start=1):
        query[0, channel, place] = key[0, channel, half + place] = (_SHARP * size**0.5 / len(slow)) ** 0.5
    _rows(second.v_proj, size)[0] = torch.eye(size, width)
    second.o_proj.weight[:, :size] = 0
    second.o_proj.weight[1:copied, 1:copied] = 4 * scale * torch.eye(copied - 1)


def _rows(layer: nn.Linear, size: int) -> Tensor:
    """Weights by head, ``(heads, size, width)``."""
    return layer.weight.view(-1, size, layer.weight.shape[1])


def teach(
    model: Any, data: Lessons, steps: int, batch: int, learning_rate: float, seed: int, warm: int = 20
) -> list[float]:
    """Train on answers with AdamW, along a warm-up and a cosine; returns the loss of every step."""
    generator = generator_for("lessons", seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    losses = []
    model.train()
    for step in range(steps):
        cooled = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warm, 1.0) * cooled
        rows = torch.randint(len(data.tokens), (batch,), generator=generator)
        targets = data.targets[rows][:, 1:]
        asked = targets != _IGNORED
        states = model.model(input_ids=data.tokens[rows], position_ids=data.positions[rows]).last_hidden_state
        loss = cross_entropy(model.lm_head(states[:, :-1][asked]), targets[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _lesson(
    tokenizer: WordTokenizer, rng: np.random.Generator, length: int, span: int
) -> tuple[list[int], list[int], list[int]]:
    """Tokens, positions and targets of one lesson."""
    facts, questions = _common(rng, length) if rng.random() < 0.2 else _facts(rng)
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []

    def write(words: str, answer: str | None, gap: int) -> None:
        asked = tokens_of(words, tokenizer)
        given = [] if answer is None else [*tokens_of(answer, tokenizer), tokenizer.eos_token_id]
        start = positions[-1] + 1 + gap if positions else gap
        ids.extend(asked + given)
        positions.extend(range(start, start + len(asked) + len(given)))
        targets.extend([_IGNORED] * len(asked) + given)

    spare = max(span - length, 0) if len(facts) > 1 else 0
    cuts = np.diff(np.sort(rng.integers(0, int(rng.integers(0, spare + 1)) + 1, size=len(facts) + 1)), prepend=0)
    for fact, gap in zip(facts, cuts.tolist()):
        write(fact, None, gap)
    place = 0
    while len(ids) < length:
        write(*questions[place % len(questions)], 0)
        place += 1
    return ids[:length], positions[:length], targets[:length]


def _facts(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    """Needles, chains of variables and chapters, and questions about all."""
    half = len(THINGS) // 2
    keys = [THINGS[int(i)] for i in rng.permutation(half)]
    values = [THINGS[half + int(i)] for i in rng.permutation(len(THINGS) - half)]
    facts, questions = [], []
    for key, value in zip(keys[:3], values):
        facts.append(f"{key} {value} {_talk(rng, 1)}")
        questions.append((f"? {key}", value))
    for chain in range(2):
        names = [keys[3 + chain], *values[3 + 3 * chain : 6 + 3 * chain]]
        facts += [f"{a} {b} ; {_talk(rng, 1)}" for a, b in pairwise(names)]
        questions.append((f"? {names[0]}", " ".join(names[1:])))
    facts = _shuffled(rng, facts[:3], facts[3:6], facts[6:])
    first = int(rng.integers(1, 24))
    rooms, folk = rng.permutation(len(PLACES)), rng.permutation(len(PEOPLE))
    told = [Chapter(first + k, PLACES[rooms[k]], PEOPLE[folk[k]], values[12 + k]) for k in range(3)]
    for chapter in told:
        facts.append(f"{chapter.terse()} {_talk(rng, 1)}")
        about = f"? chapter n{chapter.number}"
        questions += [(f"{about} went", chapter.place.lower()), (f"{about} met", chapter.person.lower())]
        questions.append((f"{about} bought", str(chapter.item)))
    questions += [(f"? before {b.item}", str(a.item)) for a, b in pairwise(told)]
    return facts, [questions[int(i)] for i in rng.permutation(len(questions))]


def _common(rng: np.random.Generator, length: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A list of words in which one is common, and the question for it."""
    drawn = rng.permutation(len(THINGS))
    room = length - 4
    often = int(room * rng.uniform(0.2, 0.4))
    words = [THINGS[int(drawn[0])]] * often
    words += [THINGS[int(drawn[1 + i])] for i in rng.integers(len(THINGS) - 1, size=room - often)]
    listed = [words[int(i)] for i in rng.permutation(len(words))]
    return [" ".join(listed)], [("? common", words[0])]


def _talk(rng: np.random.Generator, most: int) -> str:
    return " ".join(SMALL_WORDS[int(i)] for i in rng.integers(len(SMALL_WORDS), size=int(rng.integers(0, most + 1))))


def _shuffled(rng: np.random.Generator, *groups: list[str]) -> list[str]:
    """Members of all groups mixed, each group in order."""
    turns = rng.permutation(np.repeat(np.arange(len(groups)), [len(group) for group in groups]))
    rest = [list(group) for group in groups]
    return [rest[int(turn)].pop(0) for turn in turns]
