"""Latents over real text whose meaning is known, because it was written down before they were made.

A latent is a sentence that is true or false of every token, see :mod:`gossamer.features.autointerp.predicates`, and
its activation where it is true is drawn by lot. Whatever judges explanations must find the sentence good and others
bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.features.autointerp.activity import CodedActivity
from gossamer.features.autointerp.predicates import parse
from gossamer.features.autointerp.windows import token_pieces

PLANTED: dict[str, str] = {
    "number": "the token is a number",
    "quotation": "the token is a quotation mark",
    "article": 'the token is one of ["the"]',
    "of": 'the token is one of ["of", "and"]',
    "person": 'the token is one of ["he", "his", "him"]',
    "nation": 'the token is one of ["congress", "government", "states"]',
    "after the": 'the previous token is one of ["the"]',
    "after of": 'the previous token is one of ["of"]',
    "sentence": "the token is the beginning of a sentence",
    "punctuation": "the token is punctuation",
    "after punctuation": "the previous token is punctuation",
    "capitals": "the token is capitalised",
}
"""Latents that are compared with each other's sentences."""

SPECIFIC, TOPIC = "whale", "sea"
TOPICAL: dict[str, str] = {
    SPECIFIC: 'the token is one of ["whale", "whales", "ship"]',
    TOPIC: 'the token is one of ["whale", "whales", "ship", "sea", "boat", "captain", "deck", "men"]',
}
"""A latent, and its neighbour: a topic that holds it. The topic's sentence explains the latent too widely."""

UNEVEN = "pronoun"
NARROW = 'the token is one of ["he"]'
WEAK = 'the token is one of ["his", "him", "it", "they", "their"]'
"""A latent that is strong where one sentence is true, and weak where another is."""


def planted(texts: Sequence[Tensor], tokenizer: Any, seed: int) -> tuple[CodedActivity, list[str]]:
    """Activations of all planted latents, and their names in order.

    Parameters
    ----------
    texts
        Token ids of the documents.
    tokenizer
        Of the model.
    seed
        Of the strengths.
    """
    draw = np.random.default_rng((seed, 4))
    rows = []
    for text in texts:
        pieces = token_pieces(tokenizer, np.asarray(text).reshape(-1))
        true = [_holds(sentence, pieces) for sentence in (*PLANTED.values(), *TOPICAL.values())]
        values = [where * draw.uniform(1, 10, len(pieces)) for where in true]
        strong, weak = _holds(NARROW, pieces), _holds(WEAK, pieces)
        values.append(strong * draw.uniform(8, 10, len(pieces)) + weak * draw.uniform(1, 5, len(pieces)))
        rows.append(np.stack(values, 1))
    codes = SparseCodes.from_dense(torch.from_numpy(np.concatenate(rows)).float())
    return CodedActivity(texts, codes), [*PLANTED, *TOPICAL, UNEVEN]


def _holds(sentence: str, pieces: Sequence[str]) -> np.ndarray:
    predicate = parse(sentence)
    assert predicate is not None
    return predicate.holds(pieces)
