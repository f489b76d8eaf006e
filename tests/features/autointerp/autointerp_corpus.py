"""A small corpus of words with latents whose meaning is known, a tokenizer of one token a word, and a client."""

from __future__ import annotations

import numpy as np
import torch

from gossamer.core.sparse_codes import SparseCodes
from gossamer.features.autointerp.activity import CodedActivity
from gossamer.features.autointerp.clients import Client

WORDS = [
    "the",
    "of",
    "whale",
    "ship",
    "7",
    "19",
    ".",
    ",",
    "Captain",
    "sea",
    "white",
    "old",
    "and",
    "said",
    "man",
    "it",
]
THE, NUMBER, AFTER_THE, SAME_AS_THE, RARE = range(5)


class WordTokenizer:
    """Tokens are words with a space in front."""

    chat_template = None
    eos_token_id = None

    def decode(self, ids, **_):
        return "".join(" " + WORDS[int(i) % len(WORDS)] for i in np.atleast_1d(ids))

    def __call__(self, text, add_special_tokens=True, **_):
        return {
            "input_ids": [WORDS.index(word) if word in WORDS else sum(map(ord, word)) % 16 for word in text.split()]
        }


def corpus(documents: int = 40, length: int = 64, seed: int = 0) -> CodedActivity:
    """Documents of random words. Latents: "the", numbers, what follows "the", nearly the first again, a rare one."""
    draw = np.random.default_rng(seed)
    likely = np.r_[np.full(2, 0.04), np.full(2, 0.07), np.full(2, 0.02), np.full(10, 1)]
    likely[6:] *= (1 - likely[:6].sum()) / 10
    texts = [draw.choice(len(WORDS), size=length, p=likely) for _ in range(documents)]
    rows = []
    for text in texts:
        strength = draw.uniform(1, 3, size=length)
        the, number = text == 0, (text == 4) | (text == 5)
        after = np.r_[False, the[:-1]]
        rare = np.zeros(length, bool)
        same = the & (draw.random(length) < 0.8) | (text == 1)
        rows.append(np.stack([the, number, after, same, rare], 1) * strength[:, None])
    dense = torch.tensor(np.concatenate(rows), dtype=torch.float32)
    return CodedActivity(texts, SparseCodes.from_dense(dense))


class Scripted(Client):
    """Says what a function makes of a conversation."""

    name = "scripted"

    def __init__(self, says):
        self.says, self.heard = says, []

    def complete(self, conversations, max_tokens=200, temperature=0.0, seed=0):
        self.heard += conversations
        return [self.says(conversation[-1]["content"]) for conversation in conversations]

    def choose(self, conversations, options):
        replies = self.complete(conversations)
        return [None if reply is None else [float(reply == option) for option in options] for reply in replies]
