"""ProSparse's claims: a penalty that rises in stages buys more zeros for the same loss than one that is constant.

A byte-level transformer with SwiGLU learns Python's source; then its gates become ReLU and it trains on: without a
penalty, with a constant one of several strengths, and with one that rises in stages to several strengths, each for the
same steps on the same text. All are judged by zeros and loss on text they have not seen. From the sparsest good run
predictors learn which channels will be open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.activations.activation_predictor import collect_activity, train_predictor
from gossamer.activations.prosparse import ProSparse, shift_threshold
from gossamer.activations.sparse_feedforward import SparseGatedFFN, install_sparse_feed_forwards
from gossamer.core.randomness import generator_for
from gossamer.core.schedules import SineStages
from gossamer.core.taps import Listening
from gossamer.measure.activation_density import activation_density
from gossamer.measure.speed import interleave
from gossamer.models.feedforward_taps import feed_forward_taps
from gossamer.papers.byte_model import pretrain, train
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

ENOUGH = 0.8  # share of zeros that ProSparse must reach
FAR = 0.2  # by which ReLU alone stays behind
SHIFT_COST = 0.5  # percent of the loss that the shift of the threshold may cost
RECALL, CLOSE = 0.9, 0.15  # of the predictors, and how far predicted and true sparsity may lie apart
STAGED, CONSTANT = "ProSparse to", "constant"

# The stages end at the shares of training at which those of the authors' 1B model did, the last strength being held
# while the learning rate falls, and rise by the same shares. Strengths span what one pilot on a seed that is not judged
# showed to lead from few zeros to nearly all.
QUICK: dict[str, Any] = {
    "size": 1_000_000,
    "held_out": 300,
    "layers": 2,
    "width": 96,
    "length": 64,
    "batch": 8,
    "pretraining": 1200,
    "steps": 200,
    "learning_rate": 3e-3,
    "later_rate": 1e-3,
    "stages": {"begin": 0.105, "ends": [0.158, 0.21, 0.263, 0.368, 1.0], "shares": [0.02, 0.1, 0.1, 1.0, 1.0]},
    "staged": [1.0, 3.0, 9.0],
    "constant": [1.0, 3.0, 9.0],
    "threshold": 0.01,
    "predictor": {"tokens": 15_000, "hidden": 64, "epochs": 4, "threshold": 0.3},
    "speed": {"d": 1024, "m": 4096},
}
FULL: dict[str, Any] = {
    **QUICK,
    "size": 8_000_000,
    "layers": 4,
    "width": 256,
    "length": 256,
    "batch": 16,
    "pretraining": 8000,
    "steps": 4000,
    "constant": [0.3, 1.0, 3.0, 9.0],
    "predictor": {"tokens": 400_000, "hidden": 256, "epochs": 10, "threshold": 0.3},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Zeros and loss of every way to train on, before and after the shift, and what predictors make of the best."""
    length = settings["length"]
    source = python_source(settings["size"], 20, settings["held_out"], length, 4, seed)
    text, held_out = source.text, source.held_out.tokens
    sizes = {name: settings[name] for name in ("layers", "width", "length", "batch", "learning_rate")}
    start, _ = pretrain(text, **sizes, steps=settings["pretraining"], seed=seed, progress=progress)
    found: dict[str, dict[str, float]] = {"before": _judge(start, held_out)}
    dense = _trained_on(start, None, text, settings, seed)
    found["dense"] = _judge(dense, held_out)
    best: tuple[float, nn.Module, str] | None = None
    for name, method in progress(list(_contestants(settings).items()), "training on"):
        model = _trained_on(start, method, text, settings, seed)
        found[name] = _judge(model, held_out)
        shift = shift_threshold(model, settings["threshold"]) if method.activation == "relu" else None
        if shift is not None:
            found[name] |= {f"shifted {key}": value for key, value in _judge(model, held_out).items()}
        if name.startswith(STAGED) and (best is None or abs(found[name]["zeros"] - ENOUGH) < best[0]):
            best = abs(found[name]["zeros"] - ENOUGH), model, name
    assert best is not None
    for name in [name for name in found if name.startswith(STAGED)]:
        found[f"threshold as {name}"] = _thresholded(dense, text, held_out, found[name]["zeros"], length)
    return {
        "runs": found,
        "predictor": _predicted(best[1], text, held_out, settings["predictor"], seed),
        "layers": _by_layer(best[1], held_out),
        "speed": _speed(settings["speed"], 1 - found[best[2]]["zeros"]),
        "curves": _curves(found),
    }


def _contestants(settings: dict[str, Any]) -> dict[str, ProSparse]:
    own, steps = settings["stages"], settings["steps"]
    begin, ends = round(own["begin"] * steps), tuple(round(share * steps) for share in own["ends"])
    flat = {strength: _after(begin, strength) for strength in (0.0, *settings["constant"])}
    found = {
        "ReLU": ProSparse(stages=flat[0.0], threshold=0),
        "shifted ReLU": ProSparse(stages=flat[0.0], threshold=0, activation="shifted-relu"),
    }
    for strength in settings["constant"]:
        found[f"{CONSTANT} {strength:g}"] = ProSparse(stages=flat[strength], threshold=0)
    for strength in settings["staged"]:
        stages = SineStages(tuple(strength * share for share in own["shares"]), ends, begin)
        found[f"{STAGED} {strength:g}"] = ProSparse(stages=stages, threshold=0)
    return found


def _after(begin: int, strength: float) -> Callable[[int], float]:
    return lambda step: strength if step > begin else 0.0


def _trained_on(
    start: nn.Module, method: ProSparse | None, text: Tensor, settings: dict[str, Any], seed: int
) -> nn.Module:
    """A copy of the model, trained on for the same steps on the same text, whatever the method."""
    model: Any = copy.deepcopy(start).train()
    training = None if method is None else method.attach(model)
    torch.manual_seed(seed)
    length, batch, steps = settings["length"], settings["batch"], settings["steps"]

    def batches() -> Iterator[Tensor]:
        for places in torch.randint(len(text) - length, (steps, batch, 1)):
            yield text[places + torch.arange(length)]

    def loss(tokens: Tensor) -> Tensor:
        found = model(input_ids=tokens, labels=tokens).loss
        return found if training is None else found + training.loss()

    def each(step: int) -> None:
        if training is not None:
            training.advance()

    train(model, batches(), loss, steps, settings["later_rate"], each)
    if training is not None:
        training.finish()
    return model.eval()


def _judge(model: nn.Module, held_out: Tensor) -> dict[str, float]:
    density = activation_density(model, held_out.split(64), feed_forward_taps(model))
    return {"zeros": density.sparsity, "chunk zeros": density.chunk_sparsity or 0.0, "loss": _loss(model, held_out)}


def _loss(model: nn.Module, held_out: Tensor) -> float:
    with torch.inference_mode():
        losses = [float(model(input_ids=x, labels=x).loss) * len(x) for x in held_out.split(64)]
    return sum(losses) / len(held_out)


def _thresholded(model: nn.Module, text: Tensor, held_out: Tensor, zeros: float, length: int) -> dict[str, float]:
    """The dense model whose smallest activations are cut off, with thresholds for each layer from other text."""
    taps, seen = feed_forward_taps(model), {}

    def note(tap: Any, values: Tensor, mask: Tensor | None) -> None:
        seen[tap.name] = values.abs().flatten()

    with torch.inference_mode(), Listening(model, taps, note):
        model(input_ids=text[: 32 * length].view(32, length))
    limits = {name: values.kthvalue(max(1, round(zeros * len(values)))).values for name, values in seen.items()}
    handles = [
        tap.module.register_forward_pre_hook(
            lambda module, args, limit=limits[tap.name]: (args[0].masked_fill(args[0].abs() <= limit, 0),)
        )
        for tap in taps
    ]
    # the cut is made by a hook that runs before the one which counts
    found = _judge(model, held_out)
    for handle in handles:
        handle.remove()
    return found


def _predicted(model: nn.Module, text: Tensor, held_out: Tensor, own: dict[str, Any], seed: int) -> dict[str, float]:
    """Quality of predictors, and the loss when they alone decide; the exact short cut beside it."""
    length = held_out.shape[1]
    rows = own["tokens"] // length
    activity = collect_activity(model, text[: rows * length].view(rows, length).split(64))
    trained = {
        name: train_predictor(
            *pair, own["hidden"], epochs=own["epochs"], threshold=own["threshold"], learning_rate=3e-3, seed=seed
        )
        for name, pair in activity.items()
    }
    qualities = [quality for _, quality in trained.values()]
    dense = _loss(model, held_out)
    exact = install_sparse_feed_forwards(model)
    short_cut = _loss(model, held_out)
    exact.remove()
    guided = install_sparse_feed_forwards(model, {name: predictor for name, (predictor, _) in trained.items()})
    guessed = _loss(model, held_out)
    guided.remove()
    mean = {
        key: sum(getattr(quality, key) for quality in qualities) / len(qualities)
        for key in ("recall", "predicted_sparsity", "true_sparsity")
    }
    return {**mean, "loss": dense, "loss of the exact short cut": short_cut, "loss under predictors": guessed}


@torch.no_grad()
def _speed(own: dict[str, int], density: float) -> dict[str, float]:
    """How much faster one token passes a layer of a larger model with as many gates open, against the dense layer."""
    generator = generator_for("speed", 0)
    gate, up = (torch.randn(own["m"], own["d"], generator=generator) for _ in range(2))
    down, x = torch.randn(own["d"], own["m"], generator=generator), torch.randn(1, own["d"], generator=generator)
    before = functional.linear(x, gate)
    bias = -before.flatten().quantile(1 - density).expand(own["m"]).contiguous()
    layer = SparseGatedFFN(gate, up, down, nn.ReLU(), (bias, None, None))

    def dense() -> Tensor:
        return functional.linear(functional.linear(x, gate, bias).relu() * functional.linear(x, up), down)

    times = interleave({"dense": dense, "sparse": lambda: layer(x)}, repeats=15)
    wanted = float((before + bias > 0).double().mean())
    return {"density": wanted, "times as fast": times["dense"].median / times["sparse"].median}


def _by_layer(model: nn.Module, held_out: Tensor) -> list[float]:
    density = activation_density(model, held_out.split(64), feed_forward_taps(model))
    return [1 - layer.density for layer in density.layers.values()]


def _curves(found: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    groups = {"ProSparse": STAGED, "constant penalty": CONSTANT, "threshold on Swish": "threshold as", "ReLU": "ReLU"}
    curves = {}
    for title, prefix in groups.items():
        points = sorted((run["zeros"], run["loss"]) for name, run in found.items() if name.startswith(prefix))
        curves[title] = {"x": [x for x, _ in points], "y": [y for _, y in points]}
    return curves


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    rows = [row["runs"] for row in observations]
    advantage = [_advantage(row) for row in rows]
    if any(value is None for value in advantage):
        return Verdict("inconclusive", "no constant penalty reached the zeros of ProSparse; widen its strengths", {})
    needed = {
        "constant − ProSparse at equal zeros, % of loss": mean_interval([a for a in advantage if a is not None]),
        f"zeros of ProSparse − {ENOUGH}": mean_interval([_most(row) - ENOUGH for row in rows]),
        f"zeros of ProSparse − zeros of ReLU − {FAR}": mean_interval(
            [_most(r) - r["ReLU"]["zeros"] - FAR for r in rows]
        ),
        "zeros that the shift adds": mean_interval([_shift(row)[0] for row in rows]),
        f"{SHIFT_COST} − cost of the shift, % of loss": mean_interval([SHIFT_COST - _shift(row)[1] for row in rows]),
        f"recall of predictors − {RECALL}": mean_interval([r["predictor"]["recall"] - RECALL for r in observations]),
        f"{CLOSE} − |predicted − true sparsity|": mean_interval([CLOSE - _apart(row) for row in observations]),
    }
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict(
        "holds", "stages beat constant penalties at equal zeros; shift and predictors keep to bounds", numbers
    )


def _staged(row: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    return [run for name, run in row.items() if name.startswith(STAGED)]


def _most(row: dict[str, dict[str, float]]) -> float:
    """The highest share of zeros that stages have reached."""
    return max(run["zeros"] for run in _staged(row))


def _advantage(row: dict[str, dict[str, float]]) -> float | None:
    """Percent of loss by which constant penalties lie above stages with as many zeros, mean over those comparable.

    Between two constant penalties the loss is taken to be linear in the logarithm of the density.
    """
    line = sorted(
        (math.log(1 - run["zeros"]), run["loss"]) for n, run in row.items() if n.startswith((CONSTANT, "ReLU"))
    )
    gaps = []
    for run in _staged(row):
        x = math.log(1 - run["zeros"])
        for (a, low), (b, high) in pairwise(line):
            if a <= x <= b:
                between = low + (high - low) * (x - a) / (b - a) if b > a else low
                gaps.append(100 * (between / run["loss"] - 1))
                break
    return sum(gaps) / len(gaps) if gaps else None


def _shift(row: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Zeros that the shift of the threshold adds, and percent of loss that it costs, mean over stages."""
    runs = _staged(row)
    added = sum(run["shifted zeros"] - run["zeros"] for run in runs) / len(runs)
    cost = sum(100 * (run["shifted loss"] / run["loss"] - 1) for run in runs) / len(runs)
    return added, cost


def _apart(row: Observation) -> float:
    return abs(row["predictor"]["predicted_sparsity"] - row["predictor"]["true_sparsity"])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for name, first in observations[0]["runs"].items():
        for key in first:
            values = [row["runs"][name][key] for row in observations]
            numbers[f"{name}: {key}"] = sum(values) / len(values)
    for key in observations[0]["predictor"]:
        values = [row["predictor"][key] for row in observations]
        numbers[f"predictors: {key}"] = sum(values) / len(values)
    for key in observations[0]["speed"]:
        numbers[f"one layer, 1024 wide: {key}"] = sum(row["speed"][key] for row in observations) / len(observations)
    for place, _ in enumerate(observations[0]["layers"]):
        values = [row["layers"][place] for row in observations]
        numbers[f"zeros of layer {place} under ProSparse"] = sum(values) / len(values)
    return numbers


experiment = Experiment(
    slug="prosparse",
    claim=(
        "After ReLU has taken the place of a smooth gate, an L1 penalty on activations that rises in sine-shaped "
        "stages leads to far more zeros than ReLU alone, at a lower loss than constant penalties with as many zeros; "
        "a shifted threshold adds zeros nearly for free, and small predictors find the active channels."
    ),
    rule=(
        "holds if, at 95 % over seeds, stages reach 80 % zeros and 20 points more than ReLU alone, their loss lies "
        "below that of constant penalties at equal zeros (between two of them linear in the logarithm of the "
        "density), the shift adds zeros for less than 0.5 % of the loss, and predictors reach a recall of 0.9 with a "
        "predicted sparsity within 15 points of the true one; does not hold if one of these is wholly reversed. "
        "Shifted ReLU and thresholds on the smooth gate are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of zeros",
    y_label="loss, nats a byte",
)
