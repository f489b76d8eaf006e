from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.papers import ap, random_search, small_digits
from gossamer.papers.power import minimum_detectable_effect
from gossamer.papers.statistics import paired_difference


def show(items, description):
    return iter(items)


# --------------------------------------------------------------------------------------------------- random search


SEARCH = {
    **random_search.QUICK,
    "images": ["mnist"],
    "width": 16,
    "sparsities": [0.5, 0.9],
    "trials": [1, 6],
    "scored": 20,
    "steps": 4,
    "measured_every": 2,
}


@pytest.fixture
def few(monkeypatch, drawn_digits):
    monkeypatch.setattr(random_search, "_IMAGES", {"mnist": (lambda: drawn_digits, 8)})


def test_all_searchers_are_observed_at_every_sparsity(few):
    observed = random_search.run(json.loads(json.dumps(SEARCH)), 0, show)
    json.dumps(observed, allow_nan=False)
    cases = [(row["searcher"], row["sparsity"]) for row in observed["rows"]]
    names = {"random search", "node importance", "random 0", "random 1"}
    assert len(cases) == len(set(cases)) == 1 + 2 * 4
    assert set(cases) == {("dense", 0.0), *((name, sparsity) for name in names for sparsity in (0.5, 0.9))}
    for shallow, deep in observed["depths"].values():
        assert deep >= shallow
    again = random_search.run(json.loads(json.dumps(SEARCH)), 0, show)
    assert again == observed


def test_the_depth_of_the_best_of_many_normal_numbers_is_the_expected_one():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(4000, 100, generator=generator, dtype=torch.float64)
    mean = sum(random_search.best_depth(row, 100) for row in losses) / len(losses)
    assert mean == pytest.approx(random_search.normal_depth(100), rel=0.02)
    assert random_search.normal_depth(1) == 0


def trial(searcher, sparsity, metric, area=0.5):
    return {"images": "mnist", "searcher": searcher, "sparsity": sparsity, "metric": metric, "area": area}


def observations(search=0.0, important=0.03, random=0.9, area=0.0, noise=0.001):
    found = []
    for seed in range(6):
        jitter = noise * (-1) ** seed
        rows = [trial("dense", 0.0, 0.95)]
        for sparsity in (0.5, 0.9):
            rows += [trial("random 0", sparsity, random - 0.01), trial("random 1", sparsity, random + 0.01)]
            rows += [trial("random search", sparsity, random + search + jitter, 0.5 + area + jitter)]
            rows += [trial("node importance", sparsity, random + important + jitter)]
        found.append({"rows": rows, "depths": {"mnist": [0.0, 1.5, 2.5]}, "trials": [1, 10, 100]})
    return found


def test_the_rule_for_random_search():
    assert random_search.decide(observations()).outcome == "holds"
    assert random_search.decide(observations(search=0.01)).outcome == "does not hold"
    assert random_search.decide(observations(area=0.01)).outcome == "does not hold"
    blind = random_search.decide(observations(important=0.0))
    assert blind.outcome == "inconclusive"
    assert "important" in blind.reason
    assert random_search.decide(observations(noise=0.02, important=0.1)).outcome == "inconclusive"
    assert random_search.decide(observations(random=0.5)).outcome == "inconclusive"
    assert random_search.decide(observations()[:1]).outcome == "inconclusive"


def test_a_verdict_names_lift_power_and_survival():
    numbers = random_search.decide(observations()).numbers
    assert numbers["random search − random, points, mnist 0.9"].mean == pytest.approx(0)
    assert numbers["accuracy over dense, mnist 0.9"] == pytest.approx(0.9 / 0.95)
    assert 0 < numbers["smallest effect that would be found, points"] < 0.5


def test_an_effect_of_the_detectable_size_is_found_as_often_as_promised():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        noise = generator.normal(size=12)
        # the size for the true deviation, 1, not for that of the sample
        effect = minimum_detectable_effect(np.tile([-1.0, 1.0], 6) * math.sqrt(11 / 12))
        hits += paired_difference(noise + effect, np.zeros(12)).above_zero
    assert hits / 300 == pytest.approx(0.8, abs=0.07)
    with pytest.raises(ConfigurationError, match="at least 2"):
        minimum_detectable_effect([1.0])


def test_small_digits_are_read_and_checked(monkeypatch, tmp_path):
    folder = tmp_path / "sklearn/datasets/data"
    folder.mkdir(parents=True)
    path = folder / "digits.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write(",".join(["16"] * 32 + ["0"] * 32 + ["7"]) + "\n" + ",".join(["8"] * 64 + ["3"]) + "\n")
    monkeypatch.setattr(small_digits, "fetch", lambda *_: tmp_path)
    small_digits.small_digits.cache_clear()
    with pytest.raises(CheckpointError, match="checksum"):
        small_digits.small_digits()
    monkeypatch.setattr(small_digits, "_SHA256", small_digits.file_digest(path))
    data = small_digits.small_digits()
    small_digits.small_digits.cache_clear()
    assert data.images.shape == (2, 1, 8, 8)
    assert data.images[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert data.labels.tolist() == [7, 3]


# -------------------------------------------------------------------------------------------- activate while pruning


ACTIVATION = {
    **ap.QUICK,
    "runs": {
        "perceptron, magnitude": ["host", "activation", "random"],
        "convolutional, synflow": ["host", "inner layers"],
    },
    "sparsity": {"perceptron": 0.4, "convolutional": 0.4},
    "steps": {"perceptron": 3, "convolutional": 3},
    "training": 8,
    "batch": 8,
}


@pytest.mark.parametrize("restart", [True, False])
def test_every_variant_is_observed_at_every_density(monkeypatch, drawn_digits, restart):
    monkeypatch.setattr(ap, "digits", lambda: drawn_digits)
    observed = ap.run(json.loads(json.dumps({**ACTIVATION, "restart": restart})), 0, show)
    json.dumps(observed, allow_nan=False)
    points = observed["points"]
    assert len(points) == 5 * 4
    densities = [p["density"] for p in points if p["network"] == "perceptron" and p["variant"] == "activation"]
    assert densities == pytest.approx([1.0, 0.8, 0.64, 0.6], abs=1e-4)
    dense = {(p["network"], p["accuracy"], p["dead"]) for p in points if p["density"] == 1}
    assert len(dense) == 2  # before the first cut all variants are one and the same network
    last = {p["variant"]: p["dead"] for p in points if p["network"] == "perceptron" and p["density"] < 0.61}
    assert len(set(last.values())) == 3


def test_every_host_and_network_of_the_full_budget_runs(monkeypatch, drawn_digits, drawn_textures):
    monkeypatch.setattr(ap, "digits", lambda: drawn_digits)
    monkeypatch.setattr(ap, "textures", lambda: drawn_textures)
    settings = {
        **ap.FULL,
        "runs": {name: ["host"] for name in ap.FULL["runs"]},
        "sparsity": dict.fromkeys(ap.FULL["sparsity"], 0.3),
        "steps": dict.fromkeys(ap.FULL["steps"], 1),
        "training": 8,
        "crops": {"training": 8, "judged": 2},
        "batch": 4,
        "width of vgg": 2,
        "growing regularisation": {"penalty_step": 5e-3, "penalty_every": 1},
    }
    observed = ap.run(json.loads(json.dumps(settings)), 0, show)
    json.dumps(observed, allow_nan=False)
    cases = {f"{p['network']}, {p['host']}" for p in observed["points"]}
    assert cases == set(ap.FULL["runs"])
    assert {name.split(", ")[0] for name in cases} == ap.FULL["sparsity"].keys() == ap.FULL["steps"].keys()


def pruned(dead=-0.05, accuracy=0.0, control=0.0):
    found = []
    for seed in range(4):
        points = []
        for variant, effect in {"host": 0.0, "activation": dead, "random": control}.items():
            gain = accuracy if variant == "activation" else 0.0
            for density in (1.0, 0.4, 0.1001, 0.05):
                cut = effect + 0.001 * (-1) ** seed if density < 1 and variant != "host" else 0.0
                points.append(
                    {
                        "network": "perceptron",
                        "host": "magnitude",
                        "variant": variant,
                        "density": density,
                        "dead": 0.5 + cut,
                        "accuracy": 0.9 + (gain + 0.001 * (-1) ** seed if density < 0.2 else 9 * gain),
                    }
                )
        found.append({"points": points})
    return found


def test_the_rule_for_activation():
    assert ap.decide(pruned()).outcome == "holds"
    assert ap.decide(pruned(dead=0.05)).outcome == "does not hold"
    assert ap.decide(pruned(accuracy=-0.02)).outcome == "does not hold"
    assert ap.decide(pruned(dead=0.0)).outcome == "inconclusive"
    assert ap.decide(pruned(control=-0.05)).outcome == "inconclusive"
    assert ap.decide(pruned()[:1]).outcome == "inconclusive"


def test_differences_leave_the_dense_network_out():
    numbers = ap.decide(pruned(dead=-0.06, accuracy=0.01)).numbers
    assert numbers["dead neurons, activation − host, perceptron, magnitude, points"].mean == pytest.approx(-6)
    assert numbers[
        "accuracy at ≤ 10 % density, activation − host, perceptron, magnitude, points"
    ].mean == pytest.approx(1)
