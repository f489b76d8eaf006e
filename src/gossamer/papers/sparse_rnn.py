"""Two claims about recurrent networks: most of their weights can go, and a graph tells what its network will be worth.

First: networks of four kinds of cells learn to recognise strings of the Reber grammar; then the smallest recurrent
weights are set to zero, and training goes on under the mask. Random masks are the control; a random mask from the
start, and one that is rewired while training (SET), get the same number of epochs. Because the grammar is artificial,
the same is done to a real network that others have trained, two GRUs that turn letters into phonemes.

Second: random graphs become recurrent networks, each beside a dense cell of as many parameters. From the numbers that
describe a graph a regression predicts the accuracy of graphs that it has not seen, against results shuffled over the
graphs.
"""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import torch
from torch import nn

from gossamer.core import scores
from gossamer.core.masks import MaskSet
from gossamer.core.randomness import generator_for
from gossamer.core.sparsifier import Sparsifier
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.pronunciation import phoneme_accuracy, pronouncer, train_epoch, words
from gossamer.papers.reber import reber_dataset
from gossamer.papers.reber_networks import CELLS, GrammarTask, Recogniser, dense_body, equal_hidden
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.graph_prediction import REGRESSORS, feature_correlations, predict_result
from gossamer.training.graph_rnn import GraphRNN
from gossamer.training.graph_study import random_graph, structure_study
from gossamer.training.set import SET
from gossamer.training.sparse_rnn import prune_rnn, regain
from gossamer.training.static import Static

NEAR = 0.01  # accuracy that may be lost
CHANCE = 0.6  # accuracy below which nothing is left: half of the strings are valid
CLAIMED = 0.6  # share of zeros
TOUGH = ("tanh", "gru", "lstm")
EPOCH = 100_000  # words, of the 118,000 that the network for pronunciations was trained on
_KINDS = ("watts-strogatz", "barabasi-albert")

QUICK: dict[str, Any] = {
    "cells": list(TOUGH),
    "strings": 8000,
    "held_out": 1000,
    "lengths": [10, 24],
    "batch": 128,
    "learning_rate": 3e-3,
    "epochs": 10,
    "layers": 1,
    "hidden": 50,
    "embedding": 100,
    "networks": 1,
    "amounts": [CLAIMED, 0.9, 1.0],
    "single": [],
    "chance": [CLAIMED],
    "retraining": 1,
    "peers": {"tanh": 0.9},
    "words": 1500,
    "held_out_words": 300,
    "word_amounts": [CLAIMED],
    "word_learning_rate": 3e-4,
    "graph_strings": 1500,
    "graphs": 10,
    "nodes": [10, 30],
    "graph_cells": ["tanh", "gru"],
    "graph_epochs": 4,
    "graph_batch": 128,
    "graph_learning_rate": 1e-2,
    "permutations": 59,
    "trees": 20,
}
FULL: dict[str, Any] = {
    **QUICK,
    "cells": list(CELLS),
    "strings": 15_000,
    "held_out": 5000,
    "lengths": [10, 50],
    "learning_rate": 1e-3,
    "epochs": 15,
    "layers": 3,
    "networks": 3,
    "amounts": [0.1, 0.2, 0.3, 0.4, 0.5, CLAIMED, 0.7, 0.8, 0.9, 1.0],
    "single": [CLAIMED, 0.8, 0.9, 1.0],
    "chance": [0.1, 0.3, CLAIMED, 0.8, 0.9],
    "retraining": 10,
    "peers": dict.fromkeys(CELLS, 0.9),
    "words": 110_000,
    "held_out_words": 5000,
    "word_amounts": [0.3, CLAIMED, 0.8, 0.9],
    "graph_strings": 15_000,
    "graphs": 66,
    "nodes": [10, 50],
    "graph_cells": list(CELLS),
    "graph_epochs": 15,
    "graph_learning_rate": 1e-3,
    "permutations": 199,
    "trees": 100,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """All parts."""
    networks = range(seed * settings["networks"], (seed + 1) * settings["networks"])
    pruning = [
        {"cell": cell, "number": number} | _pruned(settings, cell, number, peers=number == networks[0])
        for number in progress(networks, "pruning")
        for cell in settings["cells"]
    ]
    real = _real(settings, seed, progress)
    graphs = _graphs(settings, seed, progress)
    prediction = {name: settings[name] for name in ("permutations", "trees")}
    return {"pruning": pruning, "real": real, "graphs": graphs, "prediction": prediction, "curves": _curves(pruning)}


def _task(settings: dict[str, Any], seed: int, kind: str = "") -> GrammarTask:
    training = settings[f"{kind}strings"]
    strings = reber_dataset(training + settings["held_out"], seed=seed, lengths=tuple(settings["lengths"]))
    return GrammarTask(*strings.split(training), settings[f"{kind}batch"], settings[f"{kind}learning_rate"])


def _pruned(settings: dict[str, Any], cell: str, number: int, peers: bool) -> dict[str, Any]:
    """Accuracy of one network, dense; pruned in every way, and after each epoch of retraining; and of its peers."""
    task = _task(settings, number)

    def fresh() -> Recogniser:
        torch.manual_seed(number)
        return Recogniser(dense_body(cell, settings["embedding"], settings["hidden"], settings["layers"]))

    network = fresh()
    task.train(network, settings["epochs"])
    dense = task.accuracy(network)
    cases = [(amount, "both", "magnitude") for amount in settings["amounts"]]
    cases += [(amount, "both", "random") for amount in settings["chance"]]
    cases += [(amount, which, "magnitude") for amount in settings["single"] for which in ("ih", "hh")]
    points = []
    for amount, which, name in cases:
        pruned = copy.deepcopy(network)
        masks = prune_rnn(pruned, amount, ("ih", "hh") if which == "both" else (which,), score=_score(name, number))
        accuracies = _retrained(task, pruned, masks, dense, settings["retraining"], number)
        points.append({"amount": amount, "which": which, "score": name, "accuracies": accuracies})
    found: dict[str, Any] = {"dense": dense, "points": points, "peers": {}}
    if peers and cell in settings["peers"]:
        for name, method in _peers(settings, settings["peers"][cell], number).items():
            rival = fresh()
            task.train(rival, settings["epochs"] + 1, method)  # as many as pruning and one epoch of retraining
            found["peers"][name] = task.accuracy(rival)
    return found


def _score(name: str, seed: int) -> Any:
    if name == "magnitude":
        return scores.magnitude
    return functools.partial(scores.random, generator=generator_for("random pruning", seed))


def _retrained(
    task: GrammarTask, network: Recogniser, masks: MaskSet, dense: float, epochs: int, seed: int
) -> list[float]:
    torch.manual_seed(seed)
    found = regain(
        network,
        masks,
        lambda: task.train(network, 1),
        lambda: task.accuracy(network),
        dense - NEAR,
        epochs,
    )
    return list(found.accuracies)


def _peers(settings: dict[str, Any], sparsity: float, seed: int) -> dict[str, Sparsifier]:
    """What is sparse from the start, in the recurrent weights alone."""
    body = {"include": ("body",), "sparsity": sparsity, "seed": seed}
    epoch = -(-settings["strings"] // settings["batch"])
    end = max(1, epoch * settings["epochs"] * 3 // 4)
    return {"static": Static(**body), "set": SET(**body, end=end, every=epoch)}


def _real(settings: dict[str, Any], seed: int, progress: Track) -> dict[str, Any]:
    """Phoneme accuracy of the network for pronunciations: pruned, and retrained on other words.

    The dense network is trained further on the same words, too: it has seen all the words that are held out here, and
    may forget some of them.
    """
    training, held_out = words(settings["words"] + settings["held_out_words"], seed).split(settings["words"])
    network = pronouncer()
    points = []
    cases = [(amount, name) for amount in settings["word_amounts"] for name in ("magnitude", "random", "per gate")]
    cases.insert(0, (0.0, "magnitude"))
    for amount, name in progress(cases, "letters to phonemes"):
        pruned = copy.deepcopy(network)
        by_gate = name == "per gate"
        masks = prune_rnn(pruned, amount, per_gate=by_gate, score=_score("magnitude" if by_gate else name, seed))
        torch.manual_seed(seed)
        epoch = functools.partial(train_epoch, pruned, training, settings["batch"], settings["word_learning_rate"])
        accuracy = functools.partial(phoneme_accuracy, pruned, held_out)
        accuracies = list(regain(pruned, masks, epoch, accuracy, 1.0, 1).accuracies)
        points.append({"amount": amount, "score": name, "accuracies": accuracies})
    return {"dense": points[0]["accuracies"][1], "points": points, "epoch": settings["words"] >= EPOCH}


def _graphs(settings: dict[str, Any], seed: int, progress: Track) -> list[dict[str, float]]:
    """Features of graphs, accuracy of their networks, and of dense cells with as many parameters."""
    task = _task(settings, 1000 + seed, "graph_")
    draw = random.Random(seed)
    sizes = [draw.randint(*settings["nodes"]) for _ in range(settings["graphs"])]

    def accuracy(body: nn.RNNBase | GraphRNN) -> float:
        network = Recogniser(body)
        task.train(network, settings["graph_epochs"], cool=False)
        return task.accuracy(network)

    def trained(graph: Any, number: int) -> dict[str, float]:
        found = {}
        for cell in settings["graph_cells"]:
            torch.manual_seed(seed * settings["graphs"] + number)
            body = GraphRNN(graph, cell)
            found[cell] = accuracy(body)
            width = equal_hidden(cell, body.input_size, body.active_parameters)
            found[f"{cell}, dense"] = accuracy(dense_body(cell, body.input_size, width))
        return found

    def graph(number: int) -> Any:
        return random_graph(_KINDS[number % 2], sizes[number], seed * settings["graphs"] + number)

    rows = structure_study(graph, settings["graphs"], trained, lambda numbers: progress(numbers, "graphs"))
    return [row | {"kind": _KINDS[number % 2]} for number, row in enumerate(rows)]  # type: ignore[dict-item]


def _curves(pruning: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for cell in dict.fromkeys(network["cell"] for network in pruning):
        own = [network for network in pruning if network["cell"] == cell]
        amounts = [point["amount"] for point in own[0]["points"] if _is(point, "magnitude")]
        for label, epoch in (("pruned", 0), ("retrained", 1)):
            values = [sum(network["dense"] for network in own) / len(own)]
            values += [sum(_accuracy(n, amount, "magnitude", epoch) for n in own) / len(own) for amount in amounts]
            curves[f"{cell}, {label}"] = {"x": [0.0, *amounts], "y": [100 * value for value in values]}
    return curves


def _is(point: dict[str, Any], score: str, which: str = "both") -> bool:
    return point["score"] == score and point.get("which", "both") == which


def _accuracy(network: dict[str, Any], amount: float, score: str, epoch: int, which: str = "both") -> float:
    """After an epoch of retraining, or fewer if it was back before."""
    point = next(p for p in network["points"] if p["amount"] == amount and _is(p, score, which))
    return point["accuracies"][min(epoch, len(point["accuracies"]) - 1)]


def decide(observations: list[Observation]) -> Verdict:
    """The rule, over networks for pruning and over all graphs for prediction."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    numbers: dict[str, Interval | float] = {}
    wrong, open_ = [], []
    for name, value, bound, above in _pruning_parts(observations):
        numbers[name] = value
        if (value.high < bound) if above else (value.low > bound):
            wrong.append(name)
        elif not ((value.low > bound) if above else (value.high < bound)):
            open_.append(name)
    predictable = _prediction(observations, numbers)
    numbers |= _peer_numbers(observations)
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if not predictable:
        return Verdict("does not hold", "graph features foretell the accuracy of no kind of cell", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across its bound: {'; '.join(open_)}", numbers)
    reason = (
        "60 % of the recurrent weights go for less than a point after an epoch, chance is worse, all of them leave "
        f"nothing, and graphs foretell the accuracy of {' and '.join(predictable)} networks"
    )
    return Verdict("holds", reason, numbers)


def _pruning_parts(observations: list[Observation]) -> list[tuple[str, Interval, float, bool]]:
    """Name, interval, bound, and whether the interval must lie above it or below."""
    parts = []
    for cell in dict.fromkeys(network["cell"] for network in observations[0]["pruning"]):
        own = [network for o in observations for network in o["pruning"] if network["cell"] == cell]
        gone = mean_interval([_accuracy(network, 1.0, "magnitude", 1) for network in own])
        parts.append((f"accuracy with no recurrent weight, {cell}", gone, CHANCE, False))
        if cell in TOUGH:
            parts += _loss_parts(cell, own)
    real = [o["real"] for o in observations]
    lost, chance = _loss_parts("letters to phonemes", real)
    return [*parts, lost, chance] if all(network["epoch"] for network in real) else [*parts, chance]


def _loss_parts(name: str, networks: list[dict[str, Any]]) -> list[tuple[str, Interval, float, bool]]:
    lost = mean_interval([n["dense"] - _accuracy(n, CLAIMED, "magnitude", 1) for n in networks])
    chance = [_accuracy(n, CLAIMED, "magnitude", 1) - _accuracy(n, CLAIMED, "random", 1) for n in networks]
    return [
        (f"lost at 60 % after an epoch, {name}", lost, NEAR, False),
        (f"pruned by magnitude − by chance at 60 %, both retrained, {name}", mean_interval(chance), 0.0, True),
    ]


def _prediction(observations: list[Observation], numbers: dict[str, Interval | float]) -> list[str]:
    """Kinds of cells whose accuracy the features foretell; what was found is added to the numbers."""
    rows = [row for o in observations for row in o["graphs"]]
    cells = [name.removesuffix(", dense") for name in rows[0] if name.endswith(", dense")]
    features = [name for name in rows[0] if name.partition(",")[0] not in (*cells, "kind")]
    found = []
    for cell in cells:
        chosen = predict_result(rows, features, cell, **observations[0]["prediction"])
        shuffled = sum(chosen.shuffled) / len(chosen.shuffled)
        numbers[f"R² of random forest, {cell}"] = chosen.r2
        numbers[f"R² of random forest, shuffled, {cell}"] = shuffled
        numbers[f"p of R², {cell}"] = chosen.p
        for regressor in REGRESSORS:
            if regressor != "random forest":
                other = predict_result(rows, features, cell, regressor, permutations=0)
                numbers[f"R² of {regressor}, {cell}"] = other.r2
        correlations = feature_correlations(rows, features, cell)
        strongest = max(correlations, key=lambda name: abs(correlations[name]))
        numbers[f"correlation of {cell} with {strongest}, the strongest"] = correlations[strongest]
        gap = [row[f"{cell}, dense"] - row[cell] for row in rows]
        numbers[f"dense cell of as many parameters − graph, {cell}"] = mean_interval(gap)
        if chosen.p < 0.05 and chosen.r2 > 0 and shuffled < 0.1:
            found.append(cell)
    return found


def _peer_numbers(observations: list[Observation]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    gone = [o["real"]["dense"] - _accuracy(o["real"], CLAIMED, "magnitude", 1) for o in observations]
    found["lost at 60 % after retraining, letters to phonemes"] = gone
    for network in (network for o in observations for network in o["pruning"]):
        cell = network["cell"]
        found.setdefault(f"accuracy, {cell}, dense", []).append(network["dense"])
        for point in network["points"]:
            place = f"{cell}, {point['score']} at {point['amount']:.0%} of {point['which']}"
            found.setdefault(f"accuracy, {place}, pruned", []).append(point["accuracies"][0])
            found.setdefault(f"accuracy, {place}, retrained", []).append(point["accuracies"][-1])
        for name, accuracy in network["peers"].items():
            found.setdefault(f"accuracy, {cell}, {name} from the start", []).append(accuracy)
    for o in observations:
        for point in o["real"]["points"]:
            place = f"{point['score']} at {point['amount']:.0%}"
            found.setdefault(f"phoneme accuracy, {place}, pruned", []).append(point["accuracies"][0])
            found.setdefault(f"phoneme accuracy, {place}, retrained", []).append(point["accuracies"][-1])
    return {name: sum(values) / len(values) for name, values in found.items()}


experiment = Experiment(
    slug="sparse-rnn",
    claim=(
        "More than 60 % of the weights of a recurrent network can be pruned, and an epoch of retraining brings its "
        "accuracy back; properties of a random graph foretell the accuracy of the recurrent network with its wiring."
    ),
    rule=(
        "holds if, at 95 % over networks, tanh, GRU and LSTM networks for the Reber grammar lose less than a point of "
        "accuracy when 60 % of their recurrent weights are pruned and they are retrained for at most one epoch, random "
        "masks of 60 % are worse after the same retraining, and without any recurrent weight accuracy stays below "
        "60 %; the same, over seeds, of the GRUs that turn letters into phonemes, whose loss counts only in the full "
        "budget, where an epoch is the whole dictionary; and a random forest on graph features explains the accuracy "
        "of graphs it has not seen (R² above 0, permutation p below 0.05, mean R² of shuffled results below 0.1) for "
        "at least one kind of cell; does not hold if a part is wholly reversed or no kind of cell is foretold"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of recurrent weights pruned",
    y_label="accuracy, %",
)
