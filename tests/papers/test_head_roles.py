"""Texts of three tasks: what is asked follows from what came before, and nothing else is asked."""

from __future__ import annotations

import pytest
import torch

from gossamer.papers.head_roles import COPY, FEW, MANY, SKIP, attention_only, judged, teach, texts


def drawn(task, count=40, length=64):
    return texts(count, length, torch.Generator().manual_seed(0), task)


@pytest.mark.parametrize("task", [MANY, FEW])
def test_what_is_repeated_is_asked(task):
    for tokens, labels in zip(*drawn(task)):
        asked = (labels != -100).nonzero()[:, 0]
        half = 31
        stretch = tokens[int(asked[0]) : int(asked[-1]) + 1]
        body = tokens[2 : 2 + half]
        places = [i for i in range(half - len(stretch) + 1) if body[i : i + len(stretch)].equal(stretch)]
        assert places, "a stretch of the first half"
        assert len(body.unique()) == (half if task == MANY else len(body.unique()))
        assert tokens[1] == task


def test_copies_and_skips():
    tokens, labels = drawn(COPY)
    assert tokens[:, 3:63:2].equal(tokens[:, 2:62:2])
    assert (labels[:, 3:63:2] == tokens[:, 3:63:2]).all()
    assert (labels[:, 2:62:2] == -100).all()
    tokens, labels = drawn(SKIP)
    for text, label in zip(tokens, labels):
        asked = (label != -100).nonzero()[:, 0]
        assert (text[asked - 1] == 5).all()
        assert len(text[asked].unique()) == 1
        assert (text[2:6] == text[asked[0]] - 8).any()


def test_a_transformer_of_attention_alone_learns_to_copy():
    model = attention_only(32, 2, 16, 1, 16, 0)
    x = torch.randn(2, 3, 32)
    assert not model.model.layers[0].mlp(x).any()
    before = judged(model, 16, 20, 0)["copy"]
    teach(model, 40, 32, 16, 1e-2, 0)
    assert judged(model, 16, 20, 0)["copy"] > before + 0.3
