"""A small transformer of attention alone that learns three things which heads can do, and texts to teach it.

A text is one task, named by its second token. *Repeat*: random tokens, and then a stretch of them once more; among few
different tokens the last one alone does not say where one is, among many it does. *Copy*: every other token is the one
before. *Skip*: a marker early in the text decides what follows a certain token, however far it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core.labels import IGNORED
from gossamer.core.randomness import generator_for
from gossamer.features.attention_sae import AttentionSAE
from gossamer.features.attention_trace import trace_attention
from gossamer.features.heads import gated_heads, last_logits, mean_heads
from gossamer.features.prefix_induction import Repeats

VOCABULARY = 64
BEGIN, MANY, FEW, COPY, SKIP = range(5)
TASKS = {"repeat, many": MANY, "repeat, few": FEW, "copy": COPY, "skip": SKIP}
_FIRST = 8  # of the tokens that texts are made of
_ASK = 5  # the token after which a skip is decided


class Nothing(nn.Module):
    """A feed-forward part that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x)


def attention_only(width: int, heads: int, head_size: int, layers: int, length: int, seed: int) -> Any:
    """An untrained Llama whose feed-forward parts add nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_size,
        max_position_embeddings=length,
        rope_theta=1e4,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=BEGIN,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape)
    for layer in model.model.layers:
        layer.mlp = Nothing()
    return model


def texts(count: int, length: int, generator: torch.Generator, task: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids, and the same with −100 where nothing can be predicted, ``(count, length)`` each."""
    made = [_text(length, generator, task) for _ in range(count)]
    return torch.stack([tokens for tokens, _ in made]), torch.stack([labels for _, labels in made])


def _text(length: int, generator: torch.Generator, task: int | None) -> tuple[Tensor, Tensor]:
    def below(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    kind = list(TASKS.values())[below(len(TASKS))] if task is None else task
    free = torch.randperm(VOCABULARY - _FIRST, generator=generator) + _FIRST
    tokens = free[torch.randint(len(free), (length,), generator=generator)]
    known = torch.zeros(length, dtype=torch.bool)
    if kind in (MANY, FEW):
        half = (length - 2) // 2
        body = free[:half] if kind == MANY else free[torch.randint(6, (half,), generator=generator)]
        tokens[2 : 2 + half] = body
        begin = below(half // 4)
        stretch = half - begin
        tokens[2 + half : 2 + half + stretch] = body[begin:]
        known[2 + half + (1 if kind == MANY else 4) : 2 + half + stretch] = True
    elif kind == COPY:
        tokens[3::2] = tokens[2 : length - 1 : 2]
        known[3::2] = True
    else:
        marker = below(8)
        tokens[2 + below(4)] = _FIRST + marker
        later = torch.arange(8, length - 1, 3)
        tokens[8:][(tokens[8:] >= _FIRST) & (tokens[8:] < _FIRST + 16)] += 20
        tokens[later] = _ASK
        tokens[later + 1] = _FIRST + 8 + marker
        known[later + 1] = True
    tokens[0], tokens[1] = BEGIN, kind
    return tokens, torch.where(known, tokens, IGNORED)


def teach(model: Any, steps: int, batch: int, length: int, rate: float, seed: int) -> None:
    """Train on mixed texts with AdamW and a linear cool-down."""
    generator = generator_for("texts of three tasks", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1.0, 2 * (steps - step) / steps)
        tokens, labels = texts(batch, length, generator)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def judged(model: Any, length: int, count: int, seed: int) -> dict[str, float]:
    """Share of what can be predicted that is, by task."""
    generator = generator_for("texts to judge by", seed)
    found = {}
    for name, task in TASKS.items():
        tokens, labels = texts(count, length, generator, task)
        guess = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
        asked = labels[:, 1:] != IGNORED
        found[name] = float((guess[asked] == labels[:, 1:][asked]).double().mean())
    return found


def attributed(model: Any, sae: AttentionSAE, drawn: Repeats) -> Tensor:
    """How much of the second layer's active features each head brings from the induced token, ``(heads,)``."""
    total = torch.zeros(sae.n_heads)
    for text, source, end in zip(drawn.tokens, drawn.source.tolist(), drawn.destination.tolist()):
        trace = trace_attention(model, text, 1)[1]
        codes = sae.encode(trace.z[end].reshape(1, -1))
        worth = sae.encoder_blocks[codes.indices.long()].detach() * sae.scale
        total += torch.einsum("fhv,hv,h->h", worth, trace.values[:, source], trace.pattern[:, end, source])
    return total / len(drawn.tokens)


@torch.no_grad()
def ablated(model: Any, drawn: Repeats) -> Tensor:
    """How much of the right logit is lost with each head, its mean in its place, ``(all heads,)``."""
    means = mean_heads(model, list(drawn.tokens))
    lost = torch.zeros(sum(map(len, means)))
    gates = 1 - torch.eye(len(lost) + 1, len(lost))
    for text, end, answer in zip(drawn.tokens, drawn.destination.tolist(), drawn.answer.tolist()):
        with gated_heads(model, gates, means):
            logits = last_logits(model, text[None, : end + 1].expand(len(lost) + 1, -1))
        # against the other tokens, which share what all logits gain
        logit = logits[:, answer] - logits[:, _FIRST:].mean(1)
        lost += logit[-1] - logit[:-1]
    return lost / len(drawn.tokens)
