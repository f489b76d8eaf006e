"""Fast Sparse ConvNets' claims: sparse and wide beats dense and narrow, and the sparse network really runs faster.

MobileNets and gated inverted blocks of several widths are trained on Fashion-MNIST, dense or with the weights of their
1 × 1 convolutions pruned gradually, with the same steps; accuracy is compared at equal multiplications. Speed is
measured on MobileNet v1 at 224² against the dense network in the fastest form that torch has for it, on the same
processor. The full budget adds wider networks, blocks of several sizes and of both at once, training twice as long, and
the speed of a MobileNet v1 of half the width, of MobileNet v2, of its cache-aware form, and of EfficientNet-Lite0 with
its own weights and a sparse classifier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import FashionTask
from gossamer.papers.mobile_networks import (
    SMALL,
    cache_aware,
    efficientnet_lite0,
    inverted_network,
    mobilenet,
    mobilenet_v2,
)
from gossamer.papers.network_speed import times_faster
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.pruning.fast_sparse_convnets import FastSparseConvnets

FASTER = 1.3

#: the networks that are timed, and how the authors pruned them
_NETWORKS: dict[str, tuple[Callable[[], nn.Module], FastSparseConvnets]] = {
    "mobilenet": (mobilenet, FastSparseConvnets(sparsity=0.9, late_layers=1, late_block=4)),
    "mobilenet of half the width": (partial(mobilenet, width=0.5), FastSparseConvnets(sparsity=0.9)),
    "mobilenet v2": (mobilenet_v2, FastSparseConvnets(sparsity=0.85, late_layers=13, late_block=2)),
    "mobilenet v2, cache-aware": (lambda: mobilenet_v2(cache_aware()), FastSparseConvnets(sparsity=0.85)),
    "efficientnet-lite0": (efficientnet_lite0, FastSparseConvnets(sparsity=0.8, heads=True)),
}
#: zeros anywhere in early layers, and adjacent channels that share them in the last ones
MIXED = "1, then 4"
QUICK: dict[str, Any] = {
    "images": 1500,
    "held_out": 500,
    "batch": 64,
    "learning_rate": 3e-3,
    "steps": 450,
    # how many times as long networks train
    "stretches": [1],
    # as the authors chose it for MobileNet v1 and for EfficientNet
    "sparsity": {"mobilenet": 0.9, "inverted": 0.8},
    # the sparse networks and the dense ones cost about the same
    "dense_widths": {"mobilenet": [0.4], "inverted": [0.5]},
    "sparse_widths": {"mobilenet": [1.0], "inverted": [0.9]},
    "blocks": [1],
    "networks": ["mobilenet"],
    "speeds": [0.8, 0.9],
    "recipes": False,
    "rounds": 7,
}
FULL: dict[str, Any] = {
    **QUICK,
    "images": 5000,
    "held_out": 1900,
    "steps": 4000,
    "stretches": [1, 2],
    "dense_widths": {"mobilenet": [0.25, 0.4, 0.5, 0.6, 0.75], "inverted": [0.25, 0.35, 0.5, 0.6, 0.75]},
    "sparse_widths": {"mobilenet": [0.5, 0.75, 1.0, 1.5], "inverted": [0.5, 0.75, 1.0, 1.5]},
    "blocks": [1, 2, 4, MIXED],
    "networks": list(_NETWORKS),
    "speeds": [0.7, 0.8, 0.9, 0.95],
    "recipes": True,
    "rounds": 21,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracy against multiplications, and speed."""
    task = FashionTask.of(settings["images"], settings["held_out"], settings["batch"], settings["learning_rate"], seed)
    networks: list[tuple[str, float, Any]] = [
        (kind, width, 0) for kind in settings["dense_widths"] for width in settings["dense_widths"][kind]
    ]
    networks += [
        (kind, width, block)
        for kind in settings["sparse_widths"]
        for width in settings["sparse_widths"][kind]
        for block in settings["blocks"]
    ]
    points = []
    cases = [(*network, stretch) for network in networks for stretch in settings["stretches"]]
    for kind, width, block, stretch in progress(cases, "training"):
        torch.manual_seed(seed)
        network, steps = _network(kind, width), settings["steps"] * stretch
        task.train(network, steps, _pruner(settings["sparsity"][kind], steps, block) if block else None)
        point = {"kind": kind, "width": width, "block": block, "stretch": stretch}
        points.append({**point, "multiplications": multiplications(network), "accuracy": task.accuracy(network)})
    speed: dict[str, float] = {}
    for name in settings["networks"]:
        speed |= _speed(name, settings, seed)
    return {"points": points, "speed": speed, "curves": _curves(points)}


def _network(kind: str, width: float) -> nn.Module:
    return mobilenet(SMALL, width, 1, 10) if kind == "mobilenet" else inverted_network(width)


def _pruner(sparsity: float, steps: int, block: int | str) -> FastSparseConvnets:
    """From a tenth of the steps to half of them, so that what is left can still learn; gates stay dense."""
    begin, end = steps // 10, steps // 2
    times: dict[str, Any] = {"begin": begin, "end": end, "every": max(1, (end - begin) // 20), "exclude": ("*gate*",)}
    if isinstance(block, str):
        return FastSparseConvnets(sparsity=sparsity, block=1, late_layers=2, late_block=4, **times)
    return FastSparseConvnets(sparsity=sparsity, block=block, **times)


def multiplications(network: nn.Module) -> int:
    """How many the network needs for an image of 28², zeros left out."""
    total = 0

    def count(module: nn.Conv2d | nn.Linear, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        positions = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        total += int(torch.count_nonzero(module.weight)) * positions

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 1, 28, 28))
    finally:
        for handle in handles:
            handle.remove()
    return total


def _speed(name: str, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """How many times faster than dense, by sparsity and blocks, batch 1 at 224²."""
    torch.manual_seed(seed)
    build, recipe = _NETWORKS[name]
    network = build().eval()
    methods = {
        f"{sparsity}, blocks of {block}": FastSparseConvnets(sparsity=sparsity, block=block)
        for sparsity in settings["speeds"]
        for block in (1, 4)
    }
    if settings["recipes"]:
        methods["as published"] = recipe
    pruned = {}
    for label, method in methods.items():
        pruned[label] = copy.deepcopy(network)
        method.masks(pruned[label]).apply_(pruned[label])
    found = times_faster(network, pruned, torch.randn(1, 3, 224, 224), settings["rounds"])
    return {f"{name}, {label}": value for label, value in found.items()}


def _curves(points: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for point in sorted(points, key=lambda point: point["multiplications"]):
        form = f"sparse, blocks of {point['block']}" if point["block"] else "dense"
        form += f", {point['stretch']} × as long" if point["stretch"] > 1 else ""
        curve = curves.setdefault(f"{point['kind']}, {form}", {"x": [], "y": []})
        curve["x"].append(point["multiplications"] / 1e6)
        curve["y"].append(100 * point["accuracy"])
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """Accuracy at no more multiplications, paired by seed, and speed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    gains = {kind: _gain(observations, kind) for kind in ("mobilenet", "inverted")}
    speed = mean_interval([math.log(o["speed"]["mobilenet, 0.9, blocks of 1"] / FASTER) for o in observations])
    numbers: dict[str, Interval | float] = {f"accuracy, sparse − dense, {kind}": gain for kind, gain in gains.items()}
    numbers[f"log of the speed of mobilenet at 90 % over {FASTER}"] = speed
    for name in observations[0]["speed"]:
        values = [math.log(o["speed"][name]) for o in observations]
        numbers[f"times faster, {name}"] = math.exp(sum(values) / len(values))
    wrong = [f"dense is better: {kind}" for kind, gain in gains.items() if gain.below_zero]
    wrong += [f"the sparse network is not {FASTER} times faster"] if speed.below_zero else []
    if wrong:
        return Verdict("does not hold", "; ".join(wrong), numbers)
    if not (speed.above_zero and all(gain.above_zero for gain in gains.values())):
        return Verdict("inconclusive", "an interval reaches across its bound", numbers)
    return Verdict("holds", "more accurate at no more multiplications, and faster on the processor", numbers)


def _gain(observations: list[Observation], kind: str) -> Interval:
    """Accuracy of the largest unstructured network, less that of the smallest dense one with as many multiplications.

    If every dense network has fewer, the largest of them is the one to beat.
    """
    values = []
    for observation in observations:
        own = [point for point in observation["points"] if (point["kind"], point["stretch"]) == (kind, 1)]
        sparse = max((p for p in own if p["block"] == 1), key=lambda p: p["multiplications"])
        dense = sorted((p for p in own if not p["block"]), key=lambda p: p["multiplications"])
        rival = next((p for p in dense if p["multiplications"] >= sparse["multiplications"]), dense[-1])
        values.append(sparse["accuracy"] - rival["accuracy"])
    return mean_interval(values)


experiment = Experiment(
    slug="fast-sparse-convnets",
    claim=(
        "Sparse mobile networks are more accurate than dense ones of equally many multiplications, and run at least "
        "1.3 times faster than the same network dense."
    ),
    rule=(
        "holds if, at 95 % over seeds, the largest network with pruned 1 × 1 convolutions is more accurate on "
        "Fashion-MNIST than the smallest dense one of the same kind with at least as many multiplications, for "
        "MobileNets (90 % zeros) and for gated inverted blocks (80 %), and MobileNet v1 at 224² with 90 % zeros "
        "anywhere runs more than 1.3 times faster than dense in torch's fastest form; does not hold if one is wholly "
        "reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="million multiplications",
    y_label="accuracy, %",
)
