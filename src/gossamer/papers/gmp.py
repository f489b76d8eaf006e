"""Gradual magnitude pruning's question: large and sparse, or small and dense, at the same number of bytes?

Two families are trained for equally many steps: a perceptron on handwritten digits and a one-layer LSTM on the bytes
of Python source. The large network of each is pruned along the cubic ramp to several sparsities; against each stands
the smallest dense network that takes at least as many bytes as the large one with a bit mask. Controls at one
sparsity: everything at once at the end of the ramp, a straight ramp, chance, and a ramp that ends with the training.
The full budget tells the same of residual networks, which learn crops of photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.sparsifier import Sparsifier
from gossamer.measure.size import footprint
from gossamer.papers.digits import digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import Recipe, accuracy, fully_connected, train_images
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.papers.textures import residual, textures
from gossamer.training.gmp import GradualMagnitudePruning

_HELD_OUT = 0.1  # of the bytes of a text

QUICK: dict[str, Any] = {
    "sparsities": [0.75, 0.9, 0.95],
    "control": 0.9,
    "perceptron": {
        "width": 512,
        "training_images": 400,
        "networks": 1,
        # fewer than some fifteen rounds through the images leave every large network unfinished
        "steps": 1000,
        "batch": 64,
        "learning_rate": 0.1,
        "controls": ["at once", "straight", "random", "late"],
    },
    "lstm": {
        "width": 128,
        "bytes": 500_000,
        "steps": 1500,
        "batch": 16,
        "length": 33,
        "learning_rate": 1e-2,
        "judged": 256,
        "controls": ["random"],
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "perceptron": {**QUICK["perceptron"], "networks": 5, "steps": 3000},
    "lstm": {
        **QUICK["lstm"],
        "width": 256,
        "bytes": 2_200_000,
        "steps": 15_000,
        "batch": 32,
        "length": 65,
        "judged": 1000,
        "controls": ["at once", "random"],
    },
    "residual": {
        "width": 32,
        "blocks": 1,
        "images": 500,
        "judged": 300,
        "steps": 3000,
        "batch": 64,
        "learning_rate": 0.1,
        "controls": ["at once", "random"],
    },
}


class ByteLstm(nn.Module):
    """Embedding, LSTM and softmax over the 256 bytes.

    Parameters
    ----------
    width
        Of the LSTM; the embedding has a quarter of it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(256, max(1, width // 4))
        self.lstm = nn.LSTM(self.embedding.embedding_dim, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, 256)`` of the next bytes of ``(batch, length)``."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """All families that the settings name, each trained once for every case."""
    points: dict[str, list[dict[str, float]]] = {}
    own = settings["perceptron"]
    for number in range(own["networks"]):
        for label, row in _perceptrons(settings, seed * own["networks"] + number, progress):
            points.setdefault(f"perceptron, {label}", []).append(row)
    for label, row in _lstms(settings, seed, progress):
        points.setdefault(f"LSTM, {label}", []).append(row)
    if "residual" in settings:
        for label, row in _residuals(settings, seed, progress):
            points.setdefault(f"residual, {label}", []).append(row)
    return {"points": points, "curves": _curves(points)}


def _perceptrons(settings: dict[str, Any], seed: int, progress: Track) -> Iterator[tuple[str, dict[str, float]]]:
    own = settings["perceptron"]
    training, held_out = digits().split(own["training_images"], seed)
    recipe = Recipe(own["steps"], own["batch"], own["learning_rate"])

    def train(width: int, method: Sparsifier | None) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = fully_connected(784, width, width, 10)
        train_images(model, training, recipe, seed, method)
        return model, 100 * (1 - accuracy(model, held_out))

    yield from _family(settings, own, lambda width: fully_connected(784, width, width, 10), train, seed, progress)


def _residuals(settings: dict[str, Any], seed: int, progress: Track) -> Iterator[tuple[str, dict[str, float]]]:
    own = settings["residual"]
    training, held_out = textures().split(own["images"], own["judged"], seed)
    recipe = Recipe(own["steps"], own["batch"], own["learning_rate"])

    def build(width: int) -> nn.Module:
        return residual(width, own["blocks"])

    def train(width: int, method: Sparsifier | None) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = build(width)
        train_images(model, training, recipe, seed, method)
        return model, 100 * (1 - accuracy(model, held_out))

    yield from _family(settings, own, build, train, seed, progress)


def _lstms(settings: dict[str, Any], seed: int, progress: Track) -> Iterator[tuple[str, dict[str, float]]]:
    own = settings["lstm"]
    text = python_source(own["bytes"], 1, 1, 64, 1, seed).text
    cut = int(len(text) * (1 - _HELD_OUT))
    judged = text[cut:][: own["judged"] * own["length"]].unfold(0, own["length"], own["length"])

    def train(width: int, method: Sparsifier | None) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = ByteLstm(width)
        train_bytes(model, text[:cut], own, method)
        with torch.inference_mode():
            losses = [float(_loss(model, part)) for part in judged.split(64)]
        return model, sum(losses) / len(losses)

    yield from _family(settings, own, ByteLstm, train, seed, progress)


def train_bytes(model: nn.Module, text: Tensor, own: dict[str, Any], method: Sparsifier | None) -> None:
    """Train on pieces from places drawn by torch's generator: Adam, clipped, the rate lowered along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=own["learning_rate"], fused=True)
    run = None if method is None else method.attach(model, optimizer)
    starts = torch.randint(len(text) - own["length"], (own["steps"], own["batch"], 1))
    for step, places in enumerate(starts):
        for group in optimizer.param_groups:
            group["lr"] = own["learning_rate"] * (1 + math.cos(math.pi * step / own["steps"])) / 2
        optimizer.zero_grad()
        _loss(model, text[places + torch.arange(own["length"])]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if run is not None:
        run.finalize()


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _family(
    settings: dict[str, Any],
    own: dict[str, Any],
    network: Callable[[int], nn.Module],
    train: Callable[[int, Sparsifier | None], tuple[nn.Module, float]],
    seed: int,
    progress: Track,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every case of one family: what it is called, and its bytes and its loss."""
    cases: list[tuple[str, float | None, dict[str, Any]]] = [("large, dense", None, {})]
    cases += [(f"large at {sparsity}", sparsity, {}) for sparsity in settings["sparsities"]]
    cases += [(f"{name} at {settings['control']}", settings["control"], CONTROLS[name]) for name in own["controls"]]
    sizes = {}
    for label, sparsity, options in progress(cases, "training the large one"):
        method = None if sparsity is None else pruner(sparsity, own["steps"], seed=seed, **options)
        model, loss = train(own["width"], method)
        sizes[label] = footprint(model)
        yield label, {"bytes": sizes[label], "loss": loss}
    for sparsity in progress(settings["sparsities"], "training small ones"):
        width = _width_of(network, sizes[f"large at {sparsity}"])
        model, loss = train(width, None)
        yield f"small for {sparsity}", {"bytes": footprint(model, "dense"), "loss": loss, "width": width}


CONTROLS: dict[str, dict[str, Any]] = {
    "at once": {"at_once": True},
    "straight": {"power": 1.0},
    "random": {"score": "random"},
    "late": {"late": True},
}
"""Ways to prune that the cubic ramp is compared with, by the options of :func:`pruner`."""


def pruner(
    sparsity: float, steps: int, *, at_once: bool = False, late: bool = False, **options: Any
) -> GradualMagnitudePruning:
    """From an eighth of the steps to five eighths of them, in about twenty steps; late: to the very end."""
    begin, end = steps // 8, steps if late else steps * 5 // 8
    return GradualMagnitudePruning(
        sparsity=sparsity,
        begin=end if at_once else begin,
        end=end,
        every=max(1, (end - begin) // 20),
        heads=True,
        embeddings=True,
        **options,
    )


def _width_of(network: Callable[[int], nn.Module], size: int) -> int:
    """The smallest width at which the dense network takes at least so many bytes."""
    width = 1
    with torch.device("meta"):
        while sum(parameter.nbytes for parameter in network(width).parameters()) < size:
            width += 1
    return width


def _curves(points: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for label, rows in points.items():
        family, _, rest = label.partition(", ")
        kind = rest.split()[0].rstrip(",")
        if kind in ("large", "small"):
            curve = curves.setdefault(f"{family}, {kind}", {"x": [], "y": []})
            curve["x"] += [rows[0]["bytes"] / 1e3]
            curve["y"] += [sum(row["loss"] for row in rows) / len(rows) / (1 if family == "LSTM" else 10)]
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """Losses, paired by network."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    labels = list(observations[0]["points"])
    shares = [label.removeprefix("LSTM, small for ") for label in labels if label.startswith("LSTM, small for ")]
    control = next(label for label in labels if label.startswith("LSTM, random at ")).rpartition(" ")[2]
    needed, spared, told = {}, {}, {}
    for family in ("perceptron", "LSTM", *(["residual"] if "residual, large, dense" in labels else [])):
        large, decides = f"{family}, large at ", family != "residual"
        for share in shares:
            name = f"{family}, small − large at {share}"
            (needed if decides else told)[name] = _difference(
                observations, f"{family}, small for {share}", large + share
            )
        for other in CONTROLS:
            if f"{family}, {other} at {control}" not in labels:
                continue
            found = _difference(observations, f"{family}, {other} at {control}", large + control)
            group = needed if other == "random" else spared if other == "at once" else told
            (group if decides else told)[f"{family}, {other} − large at {control}"] = found
        told[f"{family}, large at {control} − dense"] = _difference(
            observations, large + control, f"{family}, large, dense"
        )
    numbers: dict[str, Interval | float] = {**needed, **spared, **told}
    numbers |= {f"loss, {label}": _mean(observations, label, "loss") for label in labels}
    numbers |= {f"kB, {label}": _mean(observations, label, "bytes") / 1e3 for label in labels}
    wrong = [name for name, value in (needed | spared).items() if value.below_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "the large sparse network is better than the small dense one at every size", numbers)


def _difference(observations: list[Observation], worse: str, better: str) -> Interval:
    pairs = [zip(o["points"][worse], o["points"][better], strict=True) for o in observations]
    return mean_interval([one["loss"] - other["loss"] for pair in pairs for one, other in pair])


def _mean(observations: list[Observation], label: str, key: str) -> float:
    values = [row[key] for o in observations for row in o["points"][label]]
    return sum(values) / len(values)


experiment = Experiment(
    slug="gmp",
    claim=(
        "At equally many bytes, indices counted, a large network that is pruned gradually is better than a small dense "
        "one, for perceptrons and for LSTM language models."
    ),
    rule=(
        "holds if, at 95 %, paired over networks, at every sparsity the small dense network has a higher loss than the "
        "large one pruned to no more bytes (bit mask counted), on digits (errors in %) and on bytes of Python source "
        "(nats a byte), and random scores give a higher loss than magnitude in both; does not hold if one of these is "
        "wholly reversed, or pruning at once is wholly better than the ramp"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="kB",
    y_label="nats a byte (LSTM), errors in 10 % (perceptron)",
)
