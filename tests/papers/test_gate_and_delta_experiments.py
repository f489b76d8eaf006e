from __future__ import annotations

import copy
import json

import pytest
import torch

from gossamer.activations.output_entropy import search_activations
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.papers import delta_activation, eafo, small_tables, stochastic_neurons
from gossamer.papers.digits import Digits
from gossamer.papers.moving_digits import SIDE, moving_clips
from gossamer.papers.small_tables import Table


def show(items, description):
    return iter(items)


def jittered(make, seeds=4, **options):
    """Observations of several seeds that differ by next to nothing."""
    return [make(0.001 * (-1) ** seed, **options) for seed in range(seeds)]


def settled(experiment, **options):
    observed = jittered(experiment, **options)
    json.dumps(observed, allow_nan=False)
    return observed


# --------------------------------------------------------------------------------------------- stochastic neurons


def gates(noise, rate=0.11, st=0.93, others=0.9, dense=0.94, chance=0.5, deviation=1.0, ratio=8.0):
    lab = []
    for name in ("likelihood ratio, best baseline", "likelihood ratio, no baseline", "straight-through"):
        row = {"widths": [3], "network": 0, "estimator": name, "cosine": 1.0, "bias": 0.0, "bias_without_scale": 0.0}
        lab.append(row | {"deviation": deviation + noise, "variance": ratio if "no baseline" in name else 1.0})

    def modes(accuracy):
        return {"sample": {"accuracy": accuracy + noise, "rate": rate}}

    gated = {name: modes(others) for name in ("sts", "noisy-rectifier", "reinforce")}
    gated |= {"st": modes(st), "dropout": modes(chance)}
    gated |= {name: {"all": {"accuracy": dense}} for name in ("no gates", "narrow")}
    return {"lab": lab, "gated": gated, "timing": {"with gater": 2.0}}


def test_the_rule_for_stochastic_neurons():
    decide = stochastic_neurons.decide
    assert decide(settled(gates)).outcome == "holds"
    assert decide(jittered(gates, rate=0.3)).outcome == "does not hold"
    assert decide(jittered(gates, st=0.85)).outcome == "does not hold"
    assert decide(jittered(gates, chance=0.95)).outcome == "does not hold"
    assert decide(jittered(gates, deviation=9.0)).outcome == "does not hold"
    assert decide(jittered(gates, ratio=1.5)).outcome == "does not hold"
    assert decide(jittered(gates, st=0.92)).outcome == "inconclusive"
    assert decide([gates(0.0)]).outcome == "inconclusive"
    numbers = decide(jittered(gates)).numbers
    assert numbers["straight-through − narrow network, points"].mean == pytest.approx(-1)
    assert numbers["injected noise − no gates, points"].mean == pytest.approx(-4)


def test_stochastic_neurons_are_observed_and_repeat(drawn_digits, monkeypatch):
    monkeypatch.setattr(stochastic_neurons, "digits", lambda: drawn_digits)
    quick = stochastic_neurons.QUICK
    settings = {
        "lab": {"widths": [[1], [2, 2]], "networks": 1, "samples": 200},
        "gates": quick["gates"] | {"images": 8, "width": 40, "blocks": 10, "hidden": 4, "steps": 3},
        "timing": {"width": 64, "blocks": 8, "repeats": 2},
    }
    observed, again = (stochastic_neurons.run(copy.deepcopy(settings), 0, show) for _ in range(2))
    json.dumps(observed, allow_nan=False)
    assert again["gated"] == observed["gated"]
    assert again["lab"] == observed["lab"]
    assert set(stochastic_neurons.FAMILIES) < set(observed["gated"])
    # the noisy rectifier can be enumerated only in small networks
    assert sum(row["estimator"] == "injected noise" for row in observed["lab"]) == 1
    for name in ("st", "reinforce"):
        assert set(observed["gated"][name]) == {"sample", "threshold", "mean"}
        assert observed["gated"][name]["mean"]["products"] == 1
    numbers = stochastic_neurons.decide([observed, again]).numbers
    assert all(interval.low <= interval.high for interval in numbers.values() if hasattr(interval, "low"))


# ------------------------------------------------------------------------------------------------ delta activation


def stream(noise, saving=4.0, lost=0.0, gain=2.0, mixed=0.5, spatial=0.3, exact=1e-12):
    def row(accuracy, states, changes, mixed_gain):
        parts = {"states": states, "changes": changes * (1 + noise)}
        after = {f"{kind} after the first layer": value for kind, value in parts.items()}
        return {
            "accuracy": accuracy + noise,
            "ordered": parts | after,
            "shuffled": dict(parts),
            "mixed": {"states": states, "changes": states / mixed_gain},
            "numbers to remember": 10,
        }

    changes = 0.4 / saving
    return {
        "methods": {
            "frame by frame": row(0.9, 0.4, 0.5, 0.8),
            "penalised activations 0.1": row(0.9, spatial, 0.5, 0.8),
            "penalised activations 1.0": row(0.5, 0.001, 0.5, 0.8),
            "delta": row(0.9 - lost, gain * changes, changes, mixed),
        },
        "exactness": {"double": exact, "single": 1e-6},
    }


def test_the_rule_for_delta_activations():
    decide = delta_activation.decide
    assert decide(settled(stream)).outcome == "holds"
    assert decide(jittered(stream, saving=2.0)).outcome == "does not hold"
    assert decide(jittered(stream, lost=0.05)).outcome == "does not hold"
    assert decide(jittered(stream, lost=0.005)).outcome == "holds"
    # a network with penalised activations counts only within a point of accuracy
    assert decide(jittered(stream, spatial=0.05)).outcome == "does not hold"
    assert decide(jittered(stream, gain=0.8, mixed=0.1)).outcome == "does not hold"
    assert decide(jittered(stream, mixed=1.8)).outcome == "does not hold"
    assert decide(jittered(stream, exact=1e-3)).outcome == "does not hold"
    assert decide([stream(0.0)]).outcome == "inconclusive"
    assert decide(jittered(stream)).numbers["delta, accuracy, %"] == pytest.approx(90)


@pytest.fixture
def few_clips(monkeypatch, drawn_digits, drawn_textures):
    monkeypatch.setattr(delta_activation, "digits", lambda: drawn_digits)
    monkeypatch.setattr(delta_activation, "textures", lambda: drawn_textures)


def test_delta_activations_are_observed(few_clips):
    settings = delta_activation.QUICK | {"images": 8, "clips": 12, "held_out": 12, "long": 4, "channels": [3, 4]}
    settings |= {"hidden": 6, "steps": 2, "further": 2, "batch": 4, "thresholds": [0.3]}
    observed = delta_activation.run(json.loads(json.dumps(settings)), 0, show)
    json.dumps(observed, allow_nan=False)
    assert observed["exactness"]["double"] < 1e-10
    methods = observed["methods"]
    assert {"frame by frame", "delta", "delta, given step", "threshold 0.3", "threshold 0.3, drifting"} < set(methods)
    assert methods["delta, given step"]["steps"] == pytest.approx([settings["theta"]] * 4)
    for row in methods.values():
        assert 0 <= row["ordered"]["changes"] <= 1
    assert {"frame by frame", "penalised activations", "delta", "threshold", "threshold, drifting"} < set(
        observed["curves"]
    )
    assert observed["curves"]["frame by frame"]["x"] == [methods["frame by frame"]["ordered"]["states"]]
    assert sum(len(curve["x"]) for curve in observed["curves"].values()) == len(methods)


def digits_and_backgrounds():
    images = torch.zeros(10, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1
    return Digits(images, torch.arange(10)), torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_digit_moves_before_a_background_that_does_not():
    data, backgrounds = digits_and_backgrounds()
    clips = moving_clips(data, backgrounds, 30, 40, torch.Generator().manual_seed(0), noise=0.0)
    assert clips.frames.shape == (30, 40, 1, SIDE, SIDE)
    changed = (clips.frames[:, 1:] != clips.frames[:, :-1]).flatten(2).sum(2)
    # it moves every second frame, and then at most its border and what was behind it change
    assert bool((changed[:, 0::2] == 0).all())
    assert bool((changed[:, 1::2] > 0).all())
    assert int(changed.max()) < 60
    ink = (clips.frames > 2.9).flatten(2).sum(2)
    assert bool((ink == 16).all())


def test_mixed_frames_are_of_other_clips_and_shuffled_ones_of_the_same():
    data, backgrounds = digits_and_backgrounds()
    generator = torch.Generator().manual_seed(0)
    clips = moving_clips(data, backgrounds, 12, 5, generator, noise=0.1)
    mixed, shuffled = clips.mixed(generator), clips.shuffled(generator)
    for place in range(5):
        assert sorted(mixed.frames[:, place].sum((1, 2, 3)).tolist()) == pytest.approx(
            sorted(clips.frames[:, place].sum((1, 2, 3)).tolist())
        )
    sources = []
    for clip in mixed.frames:
        same = [(clips.frames[:, t] == frame).flatten(1).all(1).nonzero() for t, frame in enumerate(clip)]
        sources.append([int(place) for place in same])
    assert all(len(set(row)) == 5 for row in sources)
    torch.testing.assert_close(
        shuffled.frames.sum((2, 3, 4)).sort(1).values, clips.frames.sum((2, 3, 4)).sort(1).values
    )
    with pytest.raises(ConfigurationError, match="as many clips"):
        moving_clips(data, backgrounds, 3, 5, generator).mixed(generator)


# ------------------------------------------------------------------------------------------------------------ EAFO


def activations(noise, crrelu=0.92, relu=0.9, others=0.9, worst=0.8, error=1e-4, rival=-1e-4, change=-0.1):
    def row(accuracy):
        return {task: {"accuracy": accuracy + noise, "loss": 0.3} for task in ("iris", "images")}

    rows = {"ReLU": row(relu), "CRReLU": row(crrelu), "worst": row(worst)}
    rows |= {name: row(others) for name in eafo.CORRECTIONS}
    theory = {
        "variation error": error,
        "entropy changes": {"tanh, normal": change},
        "rivals": {"normal": rival},
        "search": {"relu": {"slope": 0.1, "epsilon": -1.0, "gain": 0.2}},
        "entropy of CRReLU − ReLU, x > 0": 0.03,
    }
    return {"rows": rows, "theory": theory}


def test_the_rule_for_corrected_activations():
    decide = eafo.decide
    assert decide(settled(activations)).outcome == "holds"
    assert decide(jittered(activations, crrelu=0.89)).outcome == "does not hold"
    assert decide(jittered(activations, others=0.95)).outcome == "does not hold"
    assert decide(jittered(activations, worst=0.91)).outcome == "does not hold"
    for wrong in ({"error": 0.1}, {"rival": 0.01}, {"change": 0.01}):
        assert "variation" in decide(jittered(activations, **wrong)).reason
    assert decide(jittered(activations, crrelu=0.9)).outcome == "inconclusive"
    assert decide([activations(0.0)]).outcome == "inconclusive"


def test_ranks_share_ties():
    rows = {"a": {"t": {"accuracy": 0.9}}, "b": {"t": {"accuracy": 0.9}}, "c": {"t": {"accuracy": 0.8}}}
    assert eafo.mean_ranks(rows) == {"a": 1.5, "b": 1.5, "c": 3.0}


def test_activations_are_compared_on_every_task(drawn_digits, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tables = {name: Table(torch.randn(40, 5, generator=generator), torch.arange(40) % 3) for name in ("iris", "wine")}
    tables["digits"] = Table(torch.randn(40, 64, generator=generator), torch.arange(40) % 10)
    monkeypatch.setattr(eafo, "digits", lambda: drawn_digits)
    monkeypatch.setattr(eafo, "small_tables", lambda: tables)
    monkeypatch.setattr(eafo, "search_activations", lambda pdf: search_activations(pdf, ("relu",), trials=5))
    settings = copy.deepcopy(eafo.QUICK) | {"theory": {"rivals": 10, "directions": 1}}
    settings["images"]["images"] = 8
    for part in ("tables", "images", "transformer"):
        settings[part]["steps"] = 2
    observed = eafo.run(settings, 0, show)
    json.dumps(observed, allow_nan=False)
    assert {"ReLU", "CRReLU", "worst", *eafo.CORRECTIONS} < set(observed["rows"])
    for row in observed["rows"].values():
        assert set(row) == {"iris", "wine", "digits", "images", "transformer"}
    assert observed["rows"]["ReLU"]["images"]["small"] > observed["rows"]["CRReLU"]["images"]["small"]
    assert "factor" in observed["rows"]["CRReLU"]["transformer"]
    assert max(observed["theory"]["entropy changes"].values()) < 0
    # the sign with which CRReLU is written raises the entropy
    assert observed["theory"]["entropy of CRReLU − ReLU, x > 0"] > 0


def test_tables_are_scaled_by_what_is_learned_from():
    table = Table(torch.arange(30.0).view(10, 3) * torch.tensor([1.0, 5.0, 0.0]), torch.arange(10) % 2)
    first, rest = table.split(0.6, 0)
    assert (len(first.labels), len(rest.labels)) == (6, 4)
    torch.testing.assert_close(first.values.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.values.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)
    again = table.split(0.6, 0)[0]
    assert torch.equal(again.values, first.values)


def test_damaged_tables_are_refused(monkeypatch, tmp_path):
    folder = tmp_path / "sklearn/datasets/data"
    folder.mkdir(parents=True)
    (folder / "iris.csv").write_text("1,2\n")
    monkeypatch.setattr(small_tables, "fetch", lambda *_: tmp_path)
    small_tables.small_tables.cache_clear()
    with pytest.raises(CheckpointError, match="checksum"):
        small_tables.small_tables()
