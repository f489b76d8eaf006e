"""ProSparse, DEFT and lazy neurons: each part of a rule decides, and a tiny run trains what it says."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from gossamer.papers import deft, lazy_neuron, prosparse
from gossamer.papers.encoder_text import Articles, Classifier, accuracy
from gossamer.papers.lazy_conditions import batches_of, by_heart, images_of
from gossamer.papers.lazy_networks import ByteNetwork, PatchNetwork, impulse_noise, shot_noise
from gossamer.papers.lazy_noise import METHODS


def shifted(build):
    return [build(shift) for shift in (0.0, 0.001, -0.001)]


def silent(items, description):
    return items


# ---------------------------------------------------------------------------------------------------- ProSparse


def prosparse_observation(shift=0.0):
    """What a run gives where the claim is right."""

    def one(zeros, loss):
        return {"zeros": zeros + shift, "chunk zeros": 0.3, "loss": loss + shift}

    runs = {"before": one(0.0, 1.6), "dense": one(0.0, 1.5), "ReLU": one(0.5, 1.5), "shifted ReLU": one(0.8, 1.6)}
    for strength, zeros, loss in ((1, 0.75, 1.6), (3, 0.875, 1.7)):
        runs[f"constant {strength}"] = one(zeros, loss)
    for strength, zeros, loss in ((1, 0.7, 1.52), (3, 0.84, 1.6)):
        more = {"shifted zeros": zeros + 0.01 + shift, "shifted chunk zeros": 0.3, "shifted loss": loss * 1.001 + shift}
        runs[f"ProSparse to {strength}"] = one(zeros, loss) | more
    predictor = {"recall": 0.95 + shift, "predicted_sparsity": 0.75 + shift, "true_sparsity": 0.8, "loss": 1.6}
    speed = {"density": 0.2, "times as fast": 2.0}
    return {"runs": runs, "predictor": predictor, "layers": [0.8, 0.9], "speed": speed}


def test_the_claim_of_prosparse_holds_where_every_part_does():
    verdict = prosparse.decide(shifted(prosparse_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["zeros of ProSparse − 0.8"].mean == pytest.approx(0.04)
    assert verdict.numbers["zeros that the shift adds"].mean == pytest.approx(0.01)


def test_losses_are_compared_at_equal_zeros():
    row = prosparse_observation()["runs"]
    # densities halve from ReLU to the first constant penalty and again to the second: 0.5, 0.25, 0.125
    row["ProSparse to 1"] |= {"zeros": 1 - 0.5 / 2**0.5, "loss": 1.5}
    row["ProSparse to 3"] |= {"zeros": 0.999}  # beyond all constant penalties: not compared
    assert prosparse._advantage(row) == pytest.approx(100 * (1.55 / 1.5 - 1))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("ProSparse to 3", {"loss": 1.9}, "at equal zeros"),
        ("ReLU", {"zeros": 0.7}, "of ReLU"),
        ("ProSparse to 3", {"shifted loss": 1.7}, "cost of the shift"),
        ("ProSparse to 3", {"shifted zeros": 0.5}, "shift adds"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_prosparse_and_is_named(name, changes, named):
    rows = shifted(prosparse_observation)
    for row in rows:
        row["runs"][name] |= changes
    verdict = prosparse.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason
    assert prosparse.decide(rows[:1]).outcome == "inconclusive"


def test_blind_predictors_refute_and_nothing_to_compare_with_decides_nothing():
    rows = shifted(prosparse_observation)
    for row in rows:
        row["predictor"]["recall"] = 0.5
    assert "recall" in prosparse.decide(rows).reason
    for row in rows:
        for name in ("ReLU", "constant 1", "constant 3"):
            row["runs"][name]["zeros"] = 0.1
    assert prosparse.decide(rows).outcome == "inconclusive"


@pytest.fixture(scope="module")
def staged_run():
    settings = copy.deepcopy(prosparse.QUICK)
    settings |= {"size": 60_000, "held_out": 12, "layers": 1, "width": 32, "length": 16, "batch": 2, "steps": 40}
    settings |= {"pretraining": 4, "staged": [0.5], "constant": [0.05, 0.5], "speed": {"d": 16, "m": 32}}
    settings["predictor"] = {"tokens": 400, "hidden": 8, "epochs": 1, "threshold": 0.3}
    return prosparse.run(settings, 0, silent)


def test_prosparse_trains_everybody_on_the_same_start(staged_run):
    runs = staged_run["runs"]
    assert {"before", "dense", "ReLU", "shifted ReLU", "constant 0.05", "constant 0.5", "ProSparse to 0.5"} <= set(runs)
    assert runs["dense"]["zeros"] < 0.01
    assert runs["constant 0.5"]["zeros"] > runs["constant 0.05"]["zeros"]
    assert runs["ProSparse to 0.5"]["zeros"] > runs["ReLU"]["zeros"]
    assert runs["ProSparse to 0.5"]["shifted zeros"] >= runs["ProSparse to 0.5"]["zeros"]
    found = runs["threshold as ProSparse to 0.5"]["zeros"]
    assert found == pytest.approx(runs["ProSparse to 0.5"]["zeros"], abs=0.1)
    predictor = staged_run["predictor"]
    assert predictor["loss of the exact short cut"] == pytest.approx(predictor["loss"], abs=1e-4)
    assert set(staged_run["curves"]) == {"ProSparse", "constant penalty", "threshold on Swish", "ReLU"}


# ---------------------------------------------------------------------------------------------------- DEFT


def deft_observation(shift=0.0):
    """What a run gives where the claim is right."""

    def one(accuracy, density):
        return {"accuracy": accuracy + shift, "density": density + shift, "usable density": density / 2 + shift}

    bases = {base: {"LoRA": one(95.0, 0.9), "DEFT": one(95.0, 0.5)} for base in deft.BASES}
    bases["as it is"] |= {"L1 of 1": one(95.0, 0.8), "L1 of 10": one(70.0, 0.3), "Hoyer": one(94.0, 0.7)}
    return {"bases": bases}


def test_the_claim_of_deft_holds_where_every_part_does():
    verdict = deft.decide(shifted(deft_observation))
    assert verdict.outcome == "holds", verdict.reason
    # an L1 that ruins the accuracy does not count as a rival
    expected = 100 * ((0.9 - 0.5) - (0.9 - 0.8)) / 0.9
    key = next(name for name in verdict.numbers if "than under L1" in name)
    assert verdict.numbers[key].mean == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ("base", "name", "changes", "named"),
    [
        ("as it is", "DEFT", {"density": 0.8, "usable density": 0.4}, "density fell"),
        ("as it is", "DEFT", {"accuracy": 90.0}, "as it is: DEFT − LoRA"),
        ("as it is", "L1 of 1", {"density": 0.1, "usable density": 0.05}, "than under L1"),
        ("8 bits", "DEFT", {"density": 0.95, "usable density": 0.5}, "8 bits"),
        ("half pruned", "DEFT", {"accuracy": 90.0}, "half pruned"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_deft_and_is_named(base, name, changes, named):
    rows = shifted(deft_observation)
    for row in rows:
        row["bases"][base][name] |= changes
    verdict = deft.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason
    assert deft.decide(rows[:1]).outcome == "inconclusive"


@pytest.fixture
def small_encoder(monkeypatch):
    """A random encoder, and articles whose class is their first word, in the place of what is downloaded."""
    pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

    def body():
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes), add_pooling_layer=False).eval()

    def articles(count, generator):
        labels = torch.arange(count) % deft.CLASSES
        tokens = torch.randint(10, 30, (count, 6), generator=generator)
        tokens[:, 0] = labels
        mask = torch.ones_like(tokens)
        mask[::2, 4:] = 0
        return Articles(tokens, mask, labels)

    def texts(training, held_out, length, seed):
        generator = torch.Generator().manual_seed(seed)
        return articles(training, generator), articles(held_out, generator)

    monkeypatch.setattr(deft, "encoder", body)
    monkeypatch.setattr(deft, "reuters", texts)
    return body


def test_deft_fine_tunes_every_case_from_the_same_start(small_encoder):
    settings = {**deft.QUICK, "training": 64, "held_out": 40, "steps": 3, "batch": 8, "calibration": 16, "l1": [1.0]}
    found = deft.run(settings, 0, silent)["bases"]
    assert set(found) == set(deft.BASES)
    assert {"LoRA", "DEFT"} <= set(found["8 bits"])
    assert {"Hoyer", "threshold at density"} <= set(found["as it is"])
    assert found["8 bits"]["LoRA"] != found["as it is"]["LoRA"]
    kept = found["as it is"]["threshold at usable density"]["usable density"]
    assert kept == pytest.approx(found["as it is"][deft.SPARSE]["usable density"], abs=0.1)


def test_padding_changes_nothing_in_a_classifier(small_encoder):
    torch.manual_seed(0)
    model = Classifier(small_encoder(), 3).eval()
    tokens = torch.randint(10, 30, (2, 4))
    padded = torch.cat([tokens, torch.full((2, 3), 5)], 1)
    mask = torch.cat([torch.ones(2, 4), torch.zeros(2, 3)], 1).long()
    plain = Articles(tokens, torch.ones_like(tokens), torch.zeros(2).long())
    assert torch.allclose(model(padded, mask), model(**plain.inputs), atol=1e-5)
    assert accuracy(model, plain) in (0.0, 50.0, 100.0)


# ---------------------------------------------------------------------------------------------------- lazy neurons


def lazy_observation(shift=0.0):
    """What a run gives where the claim is right."""

    def one(end):
        told = {"end on training data": end, "dead": 0.0, "neurons for half of the work": 0.2}
        return {"start": 0.5 + shift, "end": end + shift / 2, "steps": [0, 1], "curve": [0.5, end], **told}

    emergence = {}
    for condition in lazy_neuron.CONDITIONS:
        for width, end in ((256, 0.35), (1024, 0.25)):
            emergence[f"{condition}, {width} wide"] = one(end)
    emergence["decoder of bytes"] = one(0.45)
    gradient = {loss: {"mean": 0.1 + shift, "error": 0.01, "p": 1e-9} for loss in ("cross-entropy", "squared error")}
    noise = {}
    for share, gain in (("0", 0.0), ("0.4", 3.0), ("0.8", 5.0)):
        for method in METHODS:
            better = method == "top-k"
            noise[f"{method} at {share}"] = {
                "accuracy": 90.0 + shift + gain * better,
                "corrupted": 70.0 + 5 * better + shift,
                "calibration error": 0.1 - 0.05 * better + shift / 10,
            }
    heart = {name: {**one(0.3), "known by heart": known} for name, known in (("few", 100.0), ("many", 20.0))}
    patches = {"mixer of patches, top-k at 0": {"accuracy": 80.0 + shift}}
    told = {"by heart": heart, "noise in patches": patches, "cost": {"times as fast": 2.0}}
    return {"emergence": emergence, "gradient": gradient, "noise": noise, **told}


def test_the_claim_of_lazy_neurons_holds_where_every_part_does():
    verdict = lazy_neuron.decide(shifted(lazy_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["labels, 256 wide: fall of the density − 0.1"].mean == pytest.approx(0.05)
    assert verdict.numbers["accuracy after 0.8 wrong labels, top-k − ReLU"].mean == pytest.approx(5)
    assert verdict.numbers["random labels of few images: known by heart"] == 100
    assert verdict.numbers["mixer of patches, top-k at 0: accuracy"] == pytest.approx(80)


@pytest.mark.parametrize(
    ("part", "name", "changes", "named"),
    [
        ("emergence", "labels, 256 wide", {"end": 0.45}, "labels, 256 wide"),
        ("emergence", "decoder of bytes", {"end": 0.55}, "decoder of bytes"),
        ("emergence", "random labels, 1024 wide", {"end": 0.4}, "random labels: density of 256 wide − 1024 wide"),
        ("gradient", "squared error", {"mean": -0.1}, "expected gradient, squared error"),
        ("noise", "top-k at 0.4", {"accuracy": 80.0}, "accuracy after 0.4 wrong labels"),
        ("noise", "top-k at 0", {"corrupted": 60.0}, "worse images"),
        ("noise", "top-k at 0", {"calibration error": 0.3}, "calibration error"),
        ("noise", "top-k at 0", {"accuracy": 95.0}, "gap of clean accuracy"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_lazy_neurons_and_is_named(part, name, changes, named):
    rows = shifted(lazy_observation)
    for row in rows:
        row[part][name] |= changes
    verdict = lazy_neuron.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason
    assert lazy_neuron.decide(rows[:1]).outcome == "inconclusive"


def test_lazy_neurons_trains_every_condition_and_architecture(drawn_digits, monkeypatch):
    monkeypatch.setattr(lazy_neuron, "digits", lambda: drawn_digits)
    settings = copy.deepcopy(lazy_neuron.QUICK)
    settings |= {"images": 8, "steps": 6, "batch": 8, "widths": [16, 32], "depths": [2]}
    settings["architectures"] |= {"layers": 2, "width": 16, "steps": 6}
    settings["bytes"] |= {"size": 60_000, "length": 16, "batch": 2, "steps": 6, "held_out": 4}
    settings["gradient"] = {"width": 16, "tokens": 4, "networks": 20}
    settings["noise"] |= {"width": 32, "steps": 4}
    settings["by heart"] = {"width": 16, "few": 5}
    settings["speed"] = {"d": 16, "m": 32}
    found = lazy_neuron.run(settings, 0, silent)
    assert len(found["emergence"]) == 4 * 2 + 1 + 4 + 2
    assert all(0 < one["end"] < 1 and one["steps"][0] == 0 for one in found["emergence"].values())
    assert found["noise"]["top-k at 0"]["density"] <= 1 / 32 + 1e-9
    assert set(found["noise"]) == {f"{m} at {s}" for m in METHODS for s in ("0", "0.4", "0.8")}
    assert set(found["by heart"]) == {"few", "many"}
    patches = found["noise in patches"]
    assert len(patches) == 2 * 2 * 2
    for kind, most in (("transformer", 2 / 64), ("mixer", (1 / 32 + 2 / 64) / 2)):  # of 4 · 16 and 2 · 16 neurons
        assert patches[f"{kind} of patches, top-k at 0.4"]["density"] <= most + 1e-9
        assert patches[f"{kind} of patches, ReLU at 0.4"]["density"] > 0.2


def test_conditions_are_what_they_say(drawn_digits):
    images, labels = images_of("random labels", drawn_digits, 0)
    assert torch.equal(images, drawn_digits.images)
    assert not torch.equal(labels, drawn_digits.labels)
    images, labels = images_of("random images", drawn_digits, 0)
    assert not torch.equal(images, drawn_digits.images)
    assert torch.equal(labels, drawn_digits.labels)
    fresh = torch.cat([x for x, _ in batches_of("fresh noise", drawn_digits, 6, 5, 0)]).flatten(1)
    assert len(fresh.unique(dim=0)) == 30  # nothing ever repeats
    again = torch.cat([x for x, _ in batches_of("fresh noise", drawn_digits, 6, 5, 0)]).flatten(1)
    assert torch.equal(fresh, again)


def test_what_is_learned_by_heart_are_single_images(drawn_digits):
    few = by_heart(drawn_digits, 30, 0)
    assert len(few) == len(few.images.flatten(1).unique(dim=0)) == 30
    pairs = zip(*images_of("random labels", drawn_digits, 0))
    known = {tuple(image.flatten().tolist()): int(label) for image, label in pairs}
    assert all(known[tuple(i.flatten().tolist())] == int(label) for i, label in zip(few.images, few.labels))
    real = {tuple(i.flatten().tolist()): int(label) for i, label in zip(drawn_digits.images, drawn_digits.labels)}
    hits = sum(real[tuple(i.flatten().tolist())] == int(label) for i, label in zip(few.images, few.labels))
    assert hits < 12  # random labels are right by chance only
    every = by_heart(drawn_digits, len(drawn_digits), 0)
    assert torch.equal(every.labels.sort().values, images_of("random labels", drawn_digits, 0)[1].sort().values)


def test_networks_see_what_they_should():
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    decoder, encoder = (ByteNetwork(causal, 1, 16, 2, 8) for causal in (True, False))
    assert torch.allclose(decoder(tokens)[0, :-1], decoder(changed)[0, :-1], atol=1e-6)
    assert not torch.allclose(encoder(tokens)[0, 0], encoder(changed)[0, 0], atol=1e-6)
    for kind in ("transformer", "mixer"):
        assert PatchNetwork(kind, 1, 16)(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_noises_keep_to_the_range_of_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.full((2, 1, 28, 28), 0.5)
    changed = impulse_noise(images, 0.2, generator)
    assert float((changed != 0.5).double().mean()) == pytest.approx(0.2, abs=0.04)
    assert set(changed.unique().tolist()) == {0.0, 0.5, 1.0}
    shot = shot_noise(images, 3.0, generator)
    assert 0 <= float(shot.min()) <= float(shot.max()) <= 1
    assert float(shot.mean()) == pytest.approx(0.5, abs=0.05)
