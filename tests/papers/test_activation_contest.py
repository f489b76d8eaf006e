"""The verdicts of the experiments on training-free sparse activations, and what they have in common."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gossamer.activations.base import install
from gossamer.activations.teal import Teal
from gossamer.papers import chess, r_sparse, sparsing_law, teal, wina
from gossamer.papers.activation_contest import activation_curves, judged, matched, random_rules
from gossamer.papers.one_shot_comparison import Contest


@pytest.fixture
def contest(tiny_llama):
    held_out = torch.randint(0, 97, (1, 64), generator=torch.Generator().manual_seed(3))
    return Contest(tiny_llama, None, "", held_out, 16, 32, 0)


def test_random_channels_drop_exactly_what_was_asked_for(contest):
    found = judged(contest, random_rules(contest, 0.5, 0))
    assert found["realised"] == pytest.approx(0.5, abs=1e-12)


def test_a_rival_is_brought_to_the_same_number_of_weights_read(contest, batches):
    method = Teal()
    method.calibrate(contest.model, batches, progress=False)
    found = matched(contest, 0.7, method.at, rounds=5)
    assert found["share"] == pytest.approx(0.7, abs=0.01)
    with install(contest.model, method.at(found["setting"]), 0.01):
        assert contest.nll() == pytest.approx(found["nll"])


def test_curves_begin_at_the_dense_model():
    points = {"dense": {"nll": 1.0}, "teal at 0.5": {"nll": 2.0, "share": 0.6, "realised": 0.5}}
    curve = {"x": [0.0, 0.5], "y": [math.e, math.exp(2.0)]}
    assert activation_curves(points) == {"teal": curve}


def seeds(points, count=3, **more):
    """Observations of several seeds that differ by a little."""
    found = []
    for seed in range(count):
        moved = {name: {"nll": nll + 0.001 * seed * (len(name) % 3)} for name, nll in points.items()}
        found.append({"points": moved, **copy.deepcopy(more)})
    return found


TEAL = {
    "dense": 3.0, "teal at 0.4": 3.05, "teal at 0.5": 3.1, "random at 0.5": 6.0, "cats at 0.4": 3.4,
    "top-k at 0.5": 3.1, "uniform, same data at 0.5": 3.2, "greedy at 0.5": 3.15, "relu instead": 9.0,
    "uniform, as many weights": 3.18,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "holds"),
        ({"teal at 0.4": 3.3}, "does not hold"),
        ({"random at 0.5": 3.0}, "does not hold"),
        ({"greedy at 0.5": 3.19}, "does not hold"),  # for it reads more weights than the uniform budgets it beats
        ({"cats at 0.4": 3.0}, "does not hold"),
    ],
)
def test_the_verdict_on_teal_follows_its_rule(change, outcome):
    assert teal.decide(seeds(TEAL | change)).outcome == outcome


def wina_points():
    points = {"dense": 3.0, "rotated": 3.0}
    for sparsity, price in ((0.5, 0.2), (0.65, 0.9)):
        points |= {
            f"by magnitude at {sparsity}": 3 + 3 * price,
            f"by norm at {sparsity}": 3 + 2 * price,
            f"by magnitude, rotated at {sparsity}": 3 + 1.5 * price,
            f"by norm, rotated at {sparsity}": 3 + price,
        }
    return points


def test_the_verdict_on_wina_follows_its_rule():
    errors = {str(s): {"by norm": 0.5, "by magnitude": 0.6} for s in (0.0, 0.5, 1.0)}
    more = {"best subset": {"by norm": 1.0, "by magnitude": 0.4}, "errors": errors}
    assert wina.decide(seeds(wina_points(), **more)).outcome == "holds"
    worse = wina_points() | {"by norm, rotated at 0.65": 9.0}
    assert wina.decide(seeds(worse, **more)).outcome == "does not hold"
    missed = more | {"best subset": {"by norm": 0.9, "by magnitude": 0.4}}
    assert wina.decide(seeds(wina_points(), **missed)).outcome == "does not hold"


def test_norms_find_every_best_subset_and_their_gain_grows_with_the_spread():
    assert wina.best_subsets(0)["by norm"] == 1.0
    assert wina.best_subsets(0)["by magnitude"] < 0.9
    errors = wina.mean_errors(0)
    gains = [errors[spread]["by magnitude"] / errors[spread]["by norm"] for spread in ("0.0", "0.5", "1.0")]
    assert gains[0] == pytest.approx(1.0, abs=1e-6)
    assert gains[0] < gains[1] < gains[2]
    assert all(values["by norm"] < 1 for values in errors.values())


def test_the_verdict_on_chess_follows_its_rule():
    points = {"dense": 3.0, "chess and q, o at 0.5": 3.2, "chess and q, k, v, o at 0.5": 3.4}
    points |= {f"{name} at {level}": nll for level in (0.3, 0.5, 0.7) for name, nll in (("cats", 3.3), ("chess", 3.1))}
    errors = {str(level): {"cats": 0.3, "chess": 0.2, "oracle": 0.1} for level in (0.3, 0.5, 0.7)}
    assert chess.decide(seeds(points, errors=errors, correlation=0.5)).outcome == "holds"
    reversed_ = points | {"cats at 0.7": 3.0}
    assert chess.decide(seeds(reversed_, errors=errors, correlation=0.5)).outcome == "does not hold"


def test_the_verdict_on_r_sparse_follows_its_rule():
    points = {"dense": 3.0, "searched at 0.6": 3.1}
    for sparsity in (0.6, 0.7):
        points |= {
            f"alpha {a} at {sparsity}": 3 + p for a, p in ((1.0, 0.5), (0.9, 0.2), (0.7, 0.3), (0.5, 0.6), (0.0, 2))
        }
        points[f"teal at {sparsity}"] = 3.6
    made = {"channels only": 0.5, "both": 0.1, "rank only": 0.4}
    assert r_sparse.decide(seeds(points, made=made)).outcome == "holds"
    assert r_sparse.decide(seeds(points | {"alpha 1.0 at 0.7": 3.0}, made=made)).outcome == "does not hold"
    assert r_sparse.decide(seeds(points | {"searched at 0.6": 3.9}, made=made)).outcome == "inconclusive"


def test_a_layer_of_both_kinds_needs_both_kinds():
    for seed in range(3):
        errors = r_sparse.made_for_it(seed)
        assert errors["both"] < 0.5 * min(errors["channels only"], errors["rank only"])


def law_observation(slope=-0.1, cett=0.8):
    laws = {
        "relu": {"slope": slope, "aic": {"relu": -60.0, "silu": -40.0, "constant": -20.0}},
        "silu": {"slope": 0.05, "aic": {"relu": -40.0, "silu": -60.0, "constant": -20.0}},
    }
    metrics = {m: {"sparsity": s, "ratio": 1.01} for m, s in (("cett", cett), ("top-k", 0.6), ("fat", 0.5))}
    shapes = [{"width": w, "layers": n, "ratio": r} for w, n, r in ((96, 2, 0.4), (64, 4, 0.3), (48, 8, 0.2))]
    return {"metrics": metrics, "laws": laws, "shapes": shapes, "sizes": shapes[:2]}


def test_the_verdict_on_the_law_follows_its_rule():
    def spread(**changes):
        found = [law_observation(**changes) for _ in range(3)]
        for index, observation in enumerate(found):
            observation["metrics"]["cett"]["sparsity"] += 0.001 * index
            for gate in ("relu", "silu"):
                observation["laws"][gate]["slope"] *= 1 + 0.01 * index
                observation["laws"][gate]["aic"]["constant"] += 0.1 * index
        return found

    assert sparsing_law.decide(spread()).outcome == "holds"
    assert sparsing_law.decide(spread(slope=0.1)).outcome == "does not hold"
    assert sparsing_law.decide(spread(cett=0.4)).outcome == "does not hold"
