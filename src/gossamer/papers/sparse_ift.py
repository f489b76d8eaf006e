"""Sparse iso-FLOP transformations: is a layer better that is larger and sparse, at the same number of operations?

Networks that are too small for their task, a perceptron for handwritten digits and a convolutional network for clothes,
are trained as they are, and in the four forms of Sparse-IFT, all with the same settings, steps and operations: zeros
explore with RigL, with SET, or stay where they are. Beside them a dense network with twice the operations, the small
network made sparse without being made larger, and a network that is far too large to gain anything. The same is done
with the feed-forward layers of a byte-level language model, and in the full budget on crops of photographs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.selection import dropped_count
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.targets import find_targets
from gossamer.measure.flops import count_flops
from gossamer.papers.digits import SIDE, Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import fashion
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval, paired_difference
from gossamer.papers.textures import textures
from gossamer.training.isoflop_report import isoflop_report
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.sparse_ift import IsoFlop, decay_groups, folded_decay, sparse_ift
from gossamer.training.static import Static

DECAY = 5e-4
DEVIATION = 0.01
METHODS: dict[str, type[Sparsifier]] = {"rigl": RigL, "set": SET, "static": Static}
_ONE, _BOTH, _ALL = [0.75], [0.75, 0.9], [0.5, 0.75, 0.9]
_OTHERS = ("wide+set", "parallel+rigl", "factorized+rigl", "doped+rigl")
_DECIDING = ("wide+rigl", "wide+static", "small+rigl")
_FORMS = (*_DECIDING, *_OTHERS)
QUICK: dict[str, Any] = {
    "rate": 0.1,
    "batch": 64,
    "every": 50,
    "digits": {
        "training": 300,
        "width": 16,
        "steps": 500,
        "forms": dict.fromkeys(_DECIDING, _BOTH) | dict.fromkeys(_OTHERS, _ONE),
    },
    "clothes": {"training": 500, "held_out": 200, "width": 6, "steps": 300, "forms": dict.fromkeys(_DECIDING, _ONE)},
    "control": {"training": 300, "width": 512, "steps": 150, "forms": {"wide+rigl": [0.75]}},
    "language": {
        "bytes": 2_000_000,
        "held_out": 50_000,
        "layers": 1,
        "width": 64,
        "inner": 32,
        "length": 64,
        "batch": 8,
        "steps": 400,
        "rate": 3e-3,
        "forms": {"wide+rigl": [0.75]},
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "every": 100,
    "digits": {**QUICK["digits"], "steps": 4000, "forms": dict.fromkeys(_FORMS, _ALL)},
    "clothes": {
        **QUICK["clothes"],
        "training": 5000,
        "held_out": 1900,
        "width": 8,
        "steps": 4000,
        "forms": dict.fromkeys(_FORMS, _ALL),
    },
    "textures": {"training": 500, "held_out": 300, "width": 8, "steps": 4000, "forms": dict.fromkeys(_FORMS, _ALL)},
    "control": {**QUICK["control"], "width": 1024, "steps": 2000},
    "language": {
        **QUICK["language"],
        "held_out": 200_000,
        "layers": 4,
        "width": 128,
        "inner": 64,
        "length": 128,
        "steps": 4000,
        "forms": {"wide+rigl": _ALL, "wide+static": _ALL},
    },
}


@dataclass(frozen=True)
class Task:
    """Telling images apart with a network of some width.

    Attributes
    ----------
    build
        Width → network.
    training, held_out
        Images to learn from, and others to be judged by.
    whole
        Whether the first and last layer are sparse too: where they hold nearly all operations.
    """

    build: Callable[[int], nn.Module]
    training: Digits
    held_out: Digits
    whole: bool

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out images that the model gets right."""
        model.eval()
        with torch.inference_mode():
            parts = zip(self.held_out.images.split(500), self.held_out.labels.split(500))
            hits = [model(images).argmax(1) == labels for images, labels in parts]
        return float(torch.cat(hits).double().mean())


def perceptron(width: int) -> nn.Sequential:
    """Two hidden layers with batch norm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((SIDE * SIDE, width), (width, width)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutional(width: int) -> nn.Sequential:
    """At half resolution four convolutions with batch norm, the last two of twice the width, and a mean over places."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for before, after, stride in ((1, width, 1), (width, width, 2), (width, 2 * width, 1), (2 * width, 2 * width, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracy of every form on every task, their operations, and losses of the language model."""
    observed: Observation = {name: {} for name in ("accuracy", "operations", "training operations", "log2 masks")}
    for name in (name for name in ("digits", "clothes", "textures", "control") if name in settings):
        own = {**settings, **settings[name]}
        task = _task(name, own, seed)
        for form, sparsity in progress(_cases(own["forms"], twice=name != "control"), name):
            label = f"{name}, {form}" + (f", {sparsity}" if sparsity else "")
            torch.manual_seed(seed)
            made = _made(task, own["width"], form, sparsity, seed)
            report = isoflop_report(task.build(own["width"]), made, task.training.images[:1], repeats=1)
            _fit_images(task, made, own, form, seed)
            observed["accuracy"][label] = task.accuracy(made.model)
            observed["operations"][label] = report.ratio
            every = own["every"] if "rigl" in form else None
            observed["training operations"][label] = report.training_ratio(every)
            observed["log2 masks"][label] = report.log2_masks
    observed["loss"] = _language(settings["language"], settings["every"], seed, progress)
    return {**observed, "curves": _curves(observed["accuracy"])}


def _cases(forms: dict[str, list[float]], twice: bool) -> list[tuple[str, float]]:
    dense = [("dense", 0.0), ("twice", 0.0)] if twice else [("dense", 0.0)]
    return dense + [(form, sparsity) for form, sparsities in forms.items() for sparsity in sparsities]


def _task(name: str, settings: dict[str, Any], seed: int) -> Task:
    if name == "textures":
        return Task(convolutional, *textures().split(settings["training"], settings["held_out"], seed), whole=False)
    if name != "clothes":
        return Task(perceptron, *digits().split(settings["training"], seed), whole=True)
    training, rest = fashion().split(settings["training"], seed)
    held_out, _ = rest.split(settings["held_out"], seed)
    scaled = (Digits(part.images.float() / 255, part.labels) for part in (training, held_out))
    return Task(convolutional, *scaled, whole=False)


def _made(task: Task, width: int, form: str, sparsity: float, seed: int) -> IsoFlop:
    """The network of a form; every case starts from torch's generator in the same state."""
    dense = task.build(width)
    kind = form.partition("+")[0]
    if kind == "dense":
        return IsoFlop(dense, {})
    if kind == "twice":
        return IsoFlop(task.build(_twice(task, width)), {})
    example = task.training.images[:1]
    if kind == "small":
        layers = sparse_ift(dense, "wide", sparsity, stem=task.whole, heads=task.whole).sparsities
        weights = {target.name: target.shape.numel() for target in find_targets(dense, heads=True)}
        return IsoFlop(dense, {n: Fraction(dropped_count(weights[n], sparsity), weights[n]) for n in layers})
    heads = task.whole and kind == "wide"  # the other forms would put a norm behind the logits
    return sparse_ift(dense, kind, sparsity, stem=task.whole, heads=heads, example=example, seed=seed)  # type: ignore[arg-type]


def _twice(task: Task, width: int) -> int:
    """The smallest width of at least twice the operations."""
    example = task.training.images[:1]
    once = count_flops(task.build(width), example).dense
    return next(w for w in itertools.count(width) if count_flops(task.build(w), example).dense >= 2 * once)


def _fit_images(task: Task, made: IsoFlop, settings: dict[str, Any], form: str, seed: int) -> None:
    """SGD with momentum and decay as in the paper; the rate falls along a cosine."""
    steps = settings["steps"]
    optimizer = torch.optim.SGD(decay_groups(made.model, DECAY), lr=settings["rate"], momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(task.training), (steps, settings["batch"]), generator=generator)

    def loss(batch: Tensor) -> Tensor:
        images, labels = task.training.images[batch], task.training.labels[batch]
        return nn.functional.cross_entropy(made.model(images), labels) + DECAY * folded_decay(made.model)

    _fit(made, optimizer, iter(rows), loss, steps, settings["every"], form, seed)


def _fit(
    made: IsoFlop,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    loss: Callable[[Tensor], Tensor],
    steps: int,
    every: int,
    form: str,
    seed: int,
) -> None:
    """Train, the same way whatever the form; masks move in the first three quarters."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = None
    if made.sparsities:
        kind = METHODS[form.partition("+")[2]]
        options = {} if kind is Static else {"every": every, "end": 3 * steps // 4}
        training = made.method(kind, seed=seed, **options).attach(made.model, optimizer)
    made.model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()
    if training is not None:
        training.finalize()
    made.model.eval()


def _language(settings: dict[str, Any], every: int, seed: int, progress: Track) -> dict[str, float]:
    """Loss in nats per byte on held-out source, by form of the feed-forward layers."""
    size = settings["bytes"] + settings["held_out"]
    text = python_source(size, 10, 10, settings["length"], 2, seed).text
    training, held_out = text[: settings["bytes"]], text[settings["bytes"] :]
    losses = {}
    for form, sparsity in progress(_cases(settings["forms"], twice=True), "language"):
        torch.manual_seed(seed)
        model = _language_model(settings, 2 if form == "twice" else 1)
        made = sparse_ift(model, "wide", sparsity, include=("*.mlp.*",), seed=seed)
        optimizer = torch.optim.AdamW(made.model.parameters(), lr=settings["rate"], weight_decay=0.1, fused=True)
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(
            len(training) - settings["length"], (settings["steps"], settings["batch"]), generator=generator
        )
        window = torch.arange(settings["length"])
        batches = (training[starts.unsqueeze(1) + window] for starts in places)

        def loss(tokens: Tensor, model: Any = made.model) -> Tensor:
            return model(input_ids=tokens, labels=tokens).loss

        _fit(made, optimizer, batches, loss, settings["steps"], every, form, seed)
        label = form + (f", {sparsity}" if sparsity else "")
        losses[label] = _held_out_loss(made.model, held_out, settings["length"])
    return losses


def _language_model(settings: dict[str, Any], times: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=settings["width"],
        intermediate_size=times * settings["inner"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        max_position_embeddings=settings["length"],
        use_cache=False,
        pad_token_id=None,
    )
    return LlamaForCausalLM(shape)


def _held_out_loss(model: Any, text: Tensor, length: int) -> float:
    rows = text[: len(text) // length * length].view(-1, length)
    with torch.inference_mode():
        losses = [model(input_ids=part, labels=part).loss * len(part) for part in rows.split(128)]
    return float(sum(losses) / len(rows))


def _curves(accuracy: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    """Error of every form over sparsity; dense networks are straight lines."""
    curves: dict[str, dict[str, list[float]]] = {}
    sparsities = sorted({float(label.split(", ")[2]) for label in accuracy if label.count(",") == 2})
    for label, value in accuracy.items():
        task, form, *sparsity = label.split(", ")
        if task == "control":
            continue
        curve = curves.setdefault(f"{task}, {form}", {"x": [], "y": []})
        places = [float(each) for each in sparsity] or [sparsities[0], sparsities[-1]]
        curve["x"] += places
        curve["y"] += [100 * (1 - value)] * len(places)
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """Differences in accuracy, paired by seed, and the mean over sparsities within a seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    numbers: dict[str, Interval | float] = {}
    for task in ("digits", "clothes"):
        for rival in ("dense", "wide+static", "small+rigl"):
            numbers[f"accuracy, {task}, wide+rigl − {rival}"] = _difference(observations, task, "wide+rigl", rival)
    losses = [o["loss"] for o in observations]
    name = next(label for label in losses[0] if label.startswith("wide+rigl"))
    numbers["loss per byte, dense − wide+rigl"] = paired_difference(
        [each["dense"] for each in losses], [each[name] for each in losses]
    )
    gains = {task: _values(observations, task, "wide+rigl", "dense") for task in ("digits", "control")}
    numbers["gain on digits − gain of a network too large"] = paired_difference(gains["digits"], gains["control"])
    deciding = dict(numbers)
    forms = {label.split(", ")[1] for label in observations[0]["accuracy"] if label.startswith("digits")}
    for form in sorted(forms - {"wide+rigl", "dense"}):
        numbers[f"accuracy, digits, {form} − dense"] = _difference(observations, "digits", form, "dense")
    for task in ("digits", "clothes"):
        numbers[f"accuracy, {task}, wide+rigl − twice"] = _difference(observations, task, "wide+rigl", "twice")
    for rival in (
        ("dense", "wide+static", "small+rigl", "twice") if "textures, dense" in observations[0]["accuracy"] else ()
    ):
        numbers[f"accuracy, textures, wide+rigl − {rival}"] = _difference(observations, "textures", "wide+rigl", rival)
    worst = max(
        abs(math.log(ratio))
        for observation in observations
        for label, ratio in observation["operations"].items()
        if label.split(", ")[1] not in ("twice", "small+rigl")
    )
    numbers["training operations of wide+rigl over dense, at most"] = max(
        ratio for o in observations for label, ratio in o["training operations"].items() if "wide+rigl" in label
    )
    numbers["largest deviation from the operations of the dense network"] = math.expm1(worst)
    return _verdict(deciding, worst, numbers)


def _verdict(deciding: dict[str, Any], worst: float, numbers: dict[str, Any]) -> Verdict:
    wrong = [name for name, value in deciding.items() if value.below_zero]
    if wrong:
        return Verdict("does not hold", "reversed: " + "; ".join(wrong), numbers)
    if worst > DEVIATION:
        return Verdict("inconclusive", f"operations differ by more than {DEVIATION:.0%}", numbers)
    open_ = [name for name, value in deciding.items() if not value.above_zero]
    if open_:
        return Verdict("inconclusive", "an interval reaches across zero: " + "; ".join(open_), numbers)
    return Verdict("holds", "larger and sparse is better at the same operations where a network is too small", numbers)


def _values(observations: list[Observation], task: str, form: str, rival: str) -> list[float]:
    """For each seed the difference in accuracy, averaged over the sparsities of the form."""
    found = []
    for observation in observations:
        accuracy = observation["accuracy"]
        sparsities = [label.split(", ")[2] for label in accuracy if label.startswith(f"{task}, {form}, ")]
        own = [accuracy[f"{task}, {form}, {s}"] for s in sparsities] or [accuracy[f"{task}, {form}"]]
        other = [accuracy.get(f"{task}, {rival}, {s}", accuracy.get(f"{task}, {rival}")) for s in sparsities or [""]]
        found.append(sum(own) / len(own) - sum(other) / len(other))
    return found


def _difference(observations: list[Observation], task: str, form: str, rival: str) -> Interval:
    return mean_interval(_values(observations, task, form, rival))


experiment = Experiment(
    slug="sparse-ift",
    claim=(
        "A network that is made wider and sparse, so that it needs the same operations, and whose zeros explore while "
        "it trains, is more accurate than the dense one, with no other setting changed."
    ),
    rule=(
        "holds if, at 95 % over seeds and averaged over the sparsities, the wide sparse network under RigL is more "
        "accurate than the dense one, than itself with a static mask, and than the small network made sparse, for a "
        "perceptron on digits and a convolutional network on clothes; if its feed-forward layers lower the loss of a "
        "byte-level language model; if a network that is far too large gains less; and if operations agree to 1 %; "
        "does not hold if one comparison is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="sparsity",
    y_label="error, %",
)
