"""The lazy-neuron claims: neurons fall silent whatever is learned, and a forced few withstand noise better.

Perceptrons of several widths and depths learn handwritten digits: with their labels, with random labels, random images
in their place, and noise that never repeats; transformers of patches and of bytes, in one direction and in both, and a
mixer learn beside them. How many neurons are active is watched, also where all images are learned by heart and where
hardly any is. The sign of the expected gradient is tested by
drawing output layers. Then networks that keep the k largest activations are compared with plain ones, with dropout and
with an L1 penalty: trained with wrong labels, judged on worse images, and asked how sure they are; among perceptrons,
and, reported beside them, in networks of patches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.activations.lazy_neuron import emergence_study, expected_gradient, feed_forward_flops
from gossamer.core.randomness import generator_for
from gossamer.kernels.channel_products import input_sparse
from gossamer.kernels.channels import ChannelMatrix
from gossamer.measure.activation_density import share_of_work
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.lazy_conditions import (
    CLASSES,
    CONDITIONS,
    batches_of,
    by_heart,
    drawn,
    images_of,
    random_images,
)
from gossamer.papers.lazy_networks import ByteNetwork, PatchNetwork, perceptron
from gossamer.papers.lazy_noise import noise, noise_in_patches, optimizer_of
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

WELL_BELOW = 0.1  # by which the share of active neurons must fall with labels; elsewhere, in so short a time, by any
EQUAL = 1.0  # points of clean accuracy within which two networks count as equally good
HIDDEN = 256  # stands for a byte that is to be guessed

QUICK: dict[str, Any] = {
    "images": 200,
    "steps": 200,
    "batch": 64,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "widths": [256, 1024, 4096],
    "depths": [2, 4],
    "architectures": {
        "layers": 2,
        "width": 32,
        "steps": 150,
        "learning_rate": 3e-3,
        "momentum": None,
        "shares": [0.0, 0.4],
    },
    "bytes": {"size": 500_000, "length": 48, "batch": 16, "steps": 200, "held_out": 64},
    "by heart": {"width": 256, "few": 100},
    "gradient": {"width": 256, "tokens": 16, "networks": 2000},
    "noise": {"width": 1024, "steps": 400, "ratio": 1 / 32, "dropout": 0.5, "l1": 0.1, "shares": [0.0, 0.4, 0.8]},
    "speed": {"d": 1024, "m": 4096},
}
FULL: dict[str, Any] = {
    **QUICK,
    "images": 400,
    "steps": 5000,
    "architectures": {**QUICK["architectures"], "layers": 4, "width": 64, "steps": 3000, "learning_rate": 1e-3},
    "bytes": {"size": 4_000_000, "length": 128, "batch": 32, "steps": 3000, "held_out": 256},
    "noise": {**QUICK["noise"], "steps": 6000},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Densities under every condition, the test of the gradient's sign, and what top-k makes of noise."""
    training, held_out = digits().split(settings["images"], seed)
    emergence = _emergence(settings, training, held_out, seed, progress)
    emergence |= _architectures(settings, training, held_out, seed, progress) | _bytes(settings["bytes"], seed)
    density = emergence[f"labels, {max(settings['widths'])} wide"]["end"]
    return {
        "emergence": emergence,
        "gradient": _gradient(settings["gradient"], seed),
        "by heart": _by_heart(settings, training, held_out, seed),
        "noise": noise(settings, training, held_out, seed, progress),
        "noise in patches": noise_in_patches(settings, training, held_out, seed, progress),
        "cost": _cost(settings["speed"], density),
        "curves": {
            name: {"x": found["steps"], "y": found["curve"]} for name, found in emergence.items() if "wide" in name
        },
    }


# ------------------------------------------------------------------------------------------------ emergence


def _emergence(
    settings: dict[str, Any], training: Digits, held_out: Digits, seed: int, progress: Track
) -> dict[str, dict[str, Any]]:
    """Perceptrons of every width under every condition, and of every depth on real labels."""
    own = [(condition, width, 1) for condition in CONDITIONS for width in settings["widths"]]
    own += [("labels", settings["widths"][0], depth) for depth in settings["depths"]]
    found = {}
    for condition, width, depth in progress(own, "emergence: perceptrons"):
        torch.manual_seed(seed)
        model = perceptron(width, depth)
        batches = batches_of(condition, training, settings["steps"], settings["batch"], seed)
        name = f"{condition}, {width} wide" if depth == 1 else f"{depth} hidden layers"
        probe = random_images(500, seed + 1) if condition in CONDITIONS[2:] else held_out.images[:500]
        seen = None if condition == "fresh noise" else images_of(condition, training, seed)[0][:500]
        found[name] = _watched(model, batches, settings, probe, seen)
    return found


def _class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def _watched(
    model: nn.Module,
    batches: Iterator[Any],
    settings: dict[str, Any],
    probe: Tensor,
    seen: Tensor | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = _class_loss,
) -> dict[str, Any]:
    """Train with a rate that falls along a line, and put down how many neurons were active."""
    optimizer = optimizer_of(model, settings)
    steps = settings["steps"]

    def cool(step: int) -> None:
        optimizer.param_groups[0]["lr"] = settings["learning_rate"] * (1 - step / steps)

    known = None if seen is None else [seen]
    found = emergence_study(model, batches, loss, optimizer, [probe], seen=known, steps=steps, looks=5, each=cool)
    assert found.trained is not None
    assert found.held_out is not None
    layers = found.held_out.layers.values()
    return {
        "start": found.density[0],
        "end": found.density[-1],
        "end on training data": found.trained.density,
        "steps": found.steps,
        "curve": found.density,
        "layers": [values[-1] for values in found.layers.values()],
        "dead": found.held_out.dead,
        "neurons for half of the work": sum(share_of_work(layer.frequency) for layer in layers) / len(layers),
    }


def _by_heart(settings: dict[str, Any], training: Digits, held_out: Digits, seed: int) -> dict[str, dict[str, Any]]:
    """Perceptrons that learn random labels of few images, all by heart, or of so many that they know hardly any."""
    own, found = settings["by heart"], {}
    for name, count in (("few", own["few"]), ("many", len(training))):
        torch.manual_seed(seed)
        model, learned = perceptron(own["width"]), by_heart(training, count, seed)
        batches = drawn(learned, settings["steps"], settings["batch"], generator_for("lazy batches", seed))
        found[name] = _watched(model, batches, settings, held_out.images[:500], learned.images[:500])
        with torch.inference_mode():
            right = model(learned.images).argmax(1) == learned.labels
        found[name]["known by heart"] = 100 * float(right.double().mean())
    return found


def _architectures(
    settings: dict[str, Any], training: Digits, held_out: Digits, seed: int, progress: Track
) -> dict[str, dict[str, Any]]:
    own = {**settings, **settings["architectures"]}
    cases = [("transformer", own["layers"], own["width"]), ("mixer", own["layers"], own["width"])]
    cases += [("transformer", 1, own["width"]), ("transformer", own["layers"], 2 * own["width"])]
    found = {}
    for kind, layers, width in progress(cases, "emergence: patches"):
        torch.manual_seed(seed)
        model = PatchNetwork(kind, layers, width)
        batches = batches_of("labels", training, own["steps"], own["batch"], seed)
        found[f"{kind} of patches, {layers} × {width}"] = _watched(model, batches, own, held_out.images[:500])
    return found


def _bytes(own: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """A decoder that tells the next byte, and an encoder that guesses hidden ones."""
    length = own["length"]
    source = python_source(own["size"], 20, own["held_out"], length, 4, seed)
    text, probe = source.text, source.held_out.tokens

    def texts(generator: torch.Generator) -> Iterator[Tensor]:
        for places in torch.randint(len(text) - length, (own["steps"], own["batch"], 1), generator=generator):
            yield text[places + torch.arange(length)]

    def next_byte(model: nn.Module, tokens: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def hidden_byte(model: nn.Module, tokens: Tensor) -> Tensor:
        hidden = torch.arange(length).expand_as(tokens) % 7 == 3
        return functional.cross_entropy(model(tokens.masked_fill(hidden, HIDDEN))[hidden], tokens[hidden])

    found = {}
    for name, causal, loss in (("decoder of bytes", True, next_byte), ("encoder of bytes", False, hidden_byte)):
        torch.manual_seed(seed)
        model = ByteNetwork(causal, 2, 64, 2, length)
        settings = {"steps": own["steps"], "learning_rate": 3e-3, "momentum": None}
        found[name] = _watched(model, texts(generator_for("texts", seed)), settings, probe, loss=loss)
    return found


def _gradient(own: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """The mean gradient of active neurons for both losses, and its p-value."""
    hidden = torch.randn(own["tokens"], own["width"], generator=generator_for("hidden", seed)).relu()
    found = {}
    for loss in ("cross-entropy", "squared error"):
        one = expected_gradient(hidden, CLASSES, loss=loss, networks=own["networks"], seed=seed)  # type: ignore[arg-type]
        found[loss] = {"mean": one.mean, "error": one.error, "p": one.p_value}
    return found


# ----------------------------------------------------------------------------------------------------- cost


def _cost(own: dict[str, int], density: float) -> dict[str, float]:
    """Operations at a density, and the time of the matrix back with as many channels live, against a dense product."""
    d, m = own["d"], own["m"]
    flops = feed_forward_flops(d, m, density)
    generator = generator_for("speed", 0)
    weight = torch.randn(d, m, generator=generator)
    x = torch.randn(1, m, generator=generator) * (torch.rand(1, m, generator=generator) < density)
    packed = ChannelMatrix.from_dense(weight)
    dense, sparse = _seconds(lambda: functional.linear(x, weight)), _seconds(lambda: input_sparse(packed, x))
    return {
        "operations left if the second matrix skips": flops.second / flops.dense,
        "operations left if both skip": flops.both / flops.dense,
        "times as fast, second matrix": dense / sparse,
    }


def _seconds(call: Callable[[], Any], repeats: int = 31) -> float:
    """Median time that the processor spends on a call, whatever else it is doing meanwhile."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return sorted(spent)[repeats // 2]


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = _emerging(observations) | _withstanding(observations)
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "neurons fall silent everywhere, wider ones more, and top-k withstands noise", numbers)


def _emerging(observations: list[Observation]) -> dict[str, Interval]:
    """The fall under every condition, the order of widths, and the sign of the gradient."""
    rows = [row["emergence"] for row in observations]
    needed = {}
    for name in rows[0]:
        least = WELL_BELOW if name.startswith("labels, ") else 0.0
        fall = mean_interval([row[name]["start"] - row[name]["end"] - least for row in rows])
        needed[f"{name}: fall of the density − {least:g}"] = fall
    for condition in CONDITIONS:
        names = [name for name in rows[0] if name.startswith(f"{condition}, ")]
        for narrow, wide in pairwise(names):
            label = f"{condition}: density of {narrow.split(', ')[1]} − {wide.split(', ')[1]}"
            needed[label] = mean_interval([row[narrow]["end"] - row[wide]["end"] for row in rows])
    for loss in observations[0]["gradient"]:
        needed[f"expected gradient, {loss}"] = mean_interval([row["gradient"][loss]["mean"] for row in observations])
    return needed


def _withstanding(observations: list[Observation]) -> dict[str, Interval]:
    """Top-k against ReLU: wrong labels, worse images, calibration, at equal clean accuracy."""
    rows = [row["noise"] for row in observations]
    needed = {}
    for label in rows[0]:
        method, _, share = label.partition(" at ")
        if method == "ReLU" and share != "0":
            needed[f"accuracy after {share} wrong labels, top-k − ReLU"] = _gap(rows, share, "accuracy")
    needed["accuracy on worse images, top-k − ReLU"] = _gap(rows, "0", "corrupted")
    needed["calibration error, ReLU − top-k"] = _gap(rows, "0", "calibration error", -1)
    clean = [abs(row["top-k at 0"]["accuracy"] - row["ReLU at 0"]["accuracy"]) for row in rows]
    needed[f"{EQUAL:g} − gap of clean accuracy, points"] = mean_interval([EQUAL - gap for gap in clean])
    return needed


def _gap(rows: list[dict[str, dict[str, float]]], share: str, key: str, sign: int = 1, rival: str = "ReLU") -> Interval:
    return mean_interval([sign * (row[f"top-k at {share}"][key] - row[f"{rival} at {share}"][key]) for row in rows])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for name in observations[0]["emergence"]:
        for key in ("start", "end", "end on training data", "dead", "neurons for half of the work"):
            numbers[f"{name}: {key}"] = _mean([row["emergence"][name][key] for row in observations])
    for name in observations[0]["by heart"]:
        for key in ("known by heart", "start", "end", "end on training data"):
            numbers[f"random labels of {name} images: {key}"] = _mean([o["by heart"][name][key] for o in observations])
    for part in ("noise", "noise in patches"):
        for name, first in observations[0][part].items():
            for key in first:
                numbers[f"{name}: {key}"] = _mean([row[part][name][key] for row in observations])
    rows = [row["noise"] for row in observations]
    for rival in ("dropout", "L1"):
        numbers[f"accuracy after 0.4 wrong labels, top-k − {rival}"] = _gap(rows, "0.4", "accuracy", 1, rival)
        numbers[f"accuracy on worse images, top-k − {rival}"] = _gap(rows, "0", "corrupted", 1, rival)
    for loss in observations[0]["gradient"]:
        numbers[f"largest p of the gradient's sign, {loss}"] = max(row["gradient"][loss]["p"] for row in observations)
    for key in observations[0]["cost"]:
        numbers[key] = _mean([row["cost"][key] for row in observations])
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="lazy-neuron",
    claim=(
        "Under ReLU the neurons of every architecture fall silent in training, with real and with random labels, "
        "random images and data that never repeat, the wider the layer the more, because the expected gradient of an "
        "active neuron is positive; and networks that keep only the k largest activations of an input withstand "
        "wrong labels and worse images better and are better calibrated."
    ),
    rule=(
        "holds if, at 95 % over seeds, the share of active neurons falls from the start to the end of training under "
        "every condition and in every architecture, in perceptrons with real labels by 10 points, is lower for each "
        "wider perceptron under every condition, the expected gradient of active neurons is positive for both losses, "
        "and top-k (a 32nd of the width) beats plain ReLU after 40 and 80 % wrong labels, on worse images and in "
        "calibration error, their clean accuracies within a point; does not hold if one of these is wholly reversed. "
        "Dropout, L1, dead neurons, operations and time are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="step",
    y_label="share of active neurons",
)
