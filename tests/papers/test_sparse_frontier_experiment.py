"""The sparse-frontier experiment: its lessons, its tiny models, and how its verdict follows from rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gossamer.measure.long_context import Frontier, Row, answers, draw, small_vocabulary
from gossamer.papers import sparse_frontier
from gossamer.papers.long_context_models import exercises, lessons, teach, tiny_model
from gossamer.papers.sparse_frontier import decide, tasks, unpacked

NAMES = ("needle", "variable tracking", "common words")


@pytest.fixture(scope="module")
def tokenizer():
    return small_vocabulary()


def test_lessons_ask_about_their_facts_over_a_long_span(tokenizer):
    made = lessons(tokenizer, 20, 96, 512, seed=0)
    assert made.tokens.shape == made.positions.shape == made.targets.shape == (20, 96)
    asked = made.targets != -100
    assert torch.equal(made.targets[asked], made.tokens[asked])
    assert (made.positions.diff(dim=1) >= 1).all()
    assert 96 < int(made.positions.max()) < 512
    for ids, wanted in zip(made.tokens.tolist(), made.targets.tolist()):
        first = ids.index(tokenizer.words.index("?"))
        assert all(target in (-100, 1) or target in ids[:first] for target in wanted)


def test_exercises_are_prompts_with_their_answers(tokenizer):
    task = tasks(NAMES)["needle"]
    made = exercises(tokenizer, [task], 4, 64, np.random.default_rng(0))
    assert made.tokens.shape == (4, 66)
    assert (made.targets[:, :64] == -100).all()
    assert (made.targets[:, 65] == tokenizer.eos_token_id).all()


def test_models_begin_with_heads_that_look_things_up(tokenizer):
    model = tiny_model(tokenizer, 64, 2, 4, 256, seed=0)
    samples = draw(tasks(NAMES)["needle"], tokenizer, 64, 40, 0)
    given = answers(model, samples, tokenizer, batch_size=40)
    hits = sum(answer.split()[:1] == list(sample.gold) for answer, sample in zip(given, samples))
    assert hits > 10  # by chance one in thirty


def test_teaching_lowers_the_loss_and_is_repeatable(tokenizer):
    data = lessons(tokenizer, 64, 64, 128, seed=0)
    losses = [teach(tiny_model(tokenizer, 32, 2, 4, 256, seed=0), data, 8, 8, 2e-3, 0) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def made(accuracy, seed=0, miss=0.0):
    """Rows of a family; `accuracy(size, method, task, sparsity)` says how good they are."""
    generator = np.random.default_rng(seed)
    rows = []
    for size, model in enumerate(("small", "middle", "large"), start=1):
        shape = {"model": model, "parameters": 20000 * 3**size, "layers": 2, "heads": 4, "head_size": 32, "length": 512}
        for task in NAMES:
            draws = generator.random(40)
            cells = [("dense", "dense", 0.0)]
            cells += [(m, "prefill", s) for m in ("vertical-slash", "block-sparse") for s in (0.5, 0.75, 0.9)]
            cells += [(m, "decode", s) for m in ("quest", "snap-kv") for s in (0.5, 0.75, 0.9)]
            for method, phase, sparsity in cells:
                scores = tuple(float(one < accuracy(size, method, task, sparsity)) for one in draws)
                realised = sparsity + (miss if method == "quest" else 0.0)
                place = {"method": method, "phase": phase, "task": task, "sparsity": sparsity, "realised": realised}
                rows.append(Row(**shape, **place, scores=scores))
    found = Frontier(tuple(rows))
    observation = {"models": sparse_frontier._shapes(found), "rows": sparse_frontier._packed(found)}
    return json.loads(json.dumps(observation))


def as_claimed(size, method, task, sparsity):
    loss = {"dense": 0.0, "quest": 0.01, "snap-kv": 0.02, "vertical-slash": 0.4, "block-sparse": 0.4}[method]
    favoured = {"vertical-slash": "needle", "block-sparse": "common words"}.get(method)
    return (0.6 + 0.1 * size) - (loss / 3 if task == favoured else loss) * sparsity


def test_rows_survive_being_stored():
    observation = made(as_claimed)
    assert sparse_frontier._packed(unpacked(observation)) == observation["rows"]


def test_a_frontier_as_claimed_holds():
    verdict = decide([made(as_claimed, seed) for seed in range(2)])
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["vertical-slash − block-sparse, retrieval"].above_zero
    assert verdict.numbers["safe sparsity, decode − prefill"].above_zero


def swapped(size, method, task, sparsity):
    """Each pattern wins the other's tasks."""
    other = {"vertical-slash": "block-sparse", "block-sparse": "vertical-slash"}.get(method, method)
    return as_claimed(size, other, task, sparsity)


def fragile_decoding(size, method, task, sparsity):
    return 0.9 - (0.5 * sparsity if method in ("quest", "snap-kv") else 0.0)


@pytest.mark.parametrize(
    ("accuracy", "miss", "reason"),
    [
        (as_claimed, 0.05, "budgets miss"),
        (swapped, 0.0, "vertical-slash does not win retrieval"),
        (fragile_decoding, 0.0, "prefill tolerates more"),
    ],
)
def test_a_frontier_that_is_otherwise_does_not_hold(accuracy, miss, reason):
    verdict = decide([made(accuracy, seed, miss) for seed in range(2)])
    assert verdict.outcome == "does not hold"
    assert reason in verdict.reason


def test_tasks_that_were_not_learned_decide_nothing():
    observation = made(lambda n, m, t, s: as_claimed(n, m, t, s) if t != "common words" else 0.1)
    verdict = decide([observation])
    assert "vertical-slash − block-sparse, aggregation" not in verdict.numbers
    assert verdict.outcome != "holds"
