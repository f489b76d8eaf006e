"""SPDF's claim: pretrain sparsely, fine-tune densely, and lose next to nothing.

A byte-level transformer is pretrained on Python's source, dense and under random masks, and then fine-tuned to write
the docstring of a signature and to name the package of a snippet, with few and with more examples: every weight of it,
or only those that were pretrained. It has to compare with a smaller dense model that cost as much to pretrain, with
one that was never pretrained, and with RigL, whose mask moves.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.measure.size import density
from gossamer.papers.byte_language import ByteGPT, Pretrained, pretrain, run_steps
from gossamer.papers.docstrings import Docstrings, docstrings, overlap
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import PythonSource, Snippets, python_source
from gossamer.papers.regression import linear_regression
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.densification import movements, snapshot
from gossamer.training.rigl import RigL
from gossamer.training.spdf import SparsePretraining, randomize_

CLOSE = {0.5: 0.02, 0.75: 0.05}  # log ratio of losses to dense pretraining that counts as no loss
FAR = 0.1  # … by which a model without pretraining must lose
_QUOTE = ord('"')

QUICK: dict[str, Any] = {
    "bytes": 2_500_000,
    "held_out": 128,
    "length": 128,
    "batch": 8,
    "learning_rate": 1e-2,
    "layers": 2,
    "width": 48,
    "heads": 2,
    "steps": 300,
    "sparsities": [0.5, 0.75],
    "inits": ["zero"],
    "examples": [200, 1000],
    "packages": 8,
    "classes": 2,
    "tested": 200,
    "tuning_steps": 60,
    "tuning_batch": 8,
    "tuning_rates": [3e-3],
    "written": 16,
}
FULL: dict[str, Any] = {
    **QUICK,
    "bytes": 8_000_000,
    "held_out": 512,
    "learning_rate": 3e-3,
    "batch": 32,
    "layers": 4,
    "width": 128,
    "heads": 4,
    "steps": 6000,
    "sparsities": [0.5, 0.75, 0.9],
    "inits": ["zero", "normal"],
    "examples": [200, 1000, 4000],
    "tested": 1000,
    "tuning_steps": 400,
    "tuning_batch": 16,
    "tuning_rates": [5e-4, 1e-3, 3e-3],
    "classes": 8,
    "written": 128,
}


class _Classifier(nn.Module):
    def __init__(self, body: ByteGPT, classes: int):
        super().__init__()
        self.body, self.classes = body, nn.Linear(body.width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classes(self.body.states(tokens).mean(1))


@dataclass(frozen=True)
class _Task:
    """What is learned after pretraining.

    Attributes
    ----------
    wrap
        Puts a head on a pretrained model, or leaves it as it is.
    loss
        Mean loss of a model on examples of the given rows, for training.
    examples
        How many there are to learn from.
    judge
        Mean held-out loss, in nats, and whatever else is reported.
    """

    wrap: Callable[[ByteGPT], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    examples: int
    judge: Callable[[nn.Module, bool], dict[str, float]]


def _docstring_task(settings: dict[str, Any], source: PythonSource) -> _Task:
    learned, judged = docstrings(
        max(settings["examples"]), settings["tested"], settings["length"], source.packages, seed=0
    )

    def loss(model: nn.Module, pairs: Docstrings) -> Tensor:
        return functional.cross_entropy(model(pairs.tokens).flatten(0, 1), pairs.labels.flatten())

    @torch.no_grad()
    def judge(model: nn.Module, thorough: bool) -> dict[str, float]:
        # a mean over bytes, not over pairs: parts hold differently many
        parts = [judged.rows(rows) for rows in torch.arange(len(judged)).split(64)]
        counts = [int((part.labels >= 0).sum()) for part in parts]
        total = sum(float(loss(model, part)) * count for part, count in zip(parts, counts))
        found = {"loss": total / sum(counts)}
        if thorough and settings["written"]:
            found["chrF"] = _write(model, judged, settings["written"])
        return found

    return _Task(lambda model: model, lambda model, rows: loss(model, learned.rows(rows)), len(learned), judge)


def _write(model: nn.Module, judged: Docstrings, count: int) -> float:
    """ChrF of docstrings that are written byte by byte, the likeliest first; each sees its own signature."""
    scores = []
    for row in range(min(count, len(judged))):
        start = int(judged.starts[row])
        text = judged.tokens[row : row + 1, :start]
        meant = judged.labels[row][judged.labels[row] >= 0]
        while text.shape[1] < judged.tokens.shape[1] and text.shape[1] - start < len(meant):
            best = model(text)[:, -1].argmax(-1, keepdim=True)
            if int(best) in (_QUOTE, ord("\n")):
                break
            text = torch.cat([text, best], 1)
        written = bytes(text[0, start:].tolist())
        scores.append(overlap(written, bytes(meant.tolist()).rstrip(b'"')))
    return sum(scores) / len(scores)


def _package_task(settings: dict[str, Any], source: PythonSource) -> _Task:
    learned, judged = (_first_classes(part, settings["classes"]) for part in (source.training, source.held_out))

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(learned.tokens[rows]), learned.labels[rows])

    @torch.no_grad()
    def judge(model: nn.Module, thorough: bool) -> dict[str, float]:
        logits = torch.cat([model(part) for part in judged.tokens.split(64)])
        hits = (logits.argmax(1) == judged.labels).float()
        return {"loss": float(functional.cross_entropy(logits, judged.labels)), "accuracy": float(hits.mean())}

    return _Task(lambda model: _Classifier(model, settings["classes"]), loss, len(learned.labels), judge)


def _first_classes(snippets: Snippets, classes: int) -> Snippets:
    """Snippets of the first packages, in any order: they come sorted by their package."""
    rows = (snippets.labels < classes).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return Snippets(snippets.tokens[rows], snippets.labels[rows])


TASKS: dict[str, Callable[[dict[str, Any], PythonSource], _Task]] = {
    "docstrings": _docstring_task,
    "packages": _package_task,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Pretrain every contestant once, and fine-tune it on both tasks with each number of examples."""
    source = _source(settings)
    pretrained = _pretrain_all(settings, source.text, seed, progress)
    tasks = {name: build(settings, source) for name, build in TASKS.items()}
    cases = list(itertools.product(_starts(pretrained, settings), TASKS, settings["examples"]))
    found: dict[str, dict[str, dict[str, float]]] = {}
    analysis: dict[str, float] = {}
    for (label, model, masks), task, examples in progress(cases, "fine-tuning"):
        tuned, quality = _finetune(tasks[task], model, masks, examples, settings, seed)
        found.setdefault(label, {})[f"{task}, {examples}"] = quality
        origin = pretrained.get(label)
        if origin is not None and origin.masks is not None and task == "docstrings":
            analysis |= {f"{label}, {name}": value for name, value in _analysis(origin, tuned, model).items()}
    return {
        "losses": {label: {case: quality["loss"] for case, quality in row.items()} for label, row in found.items()},
        "quality": found,
        "pretraining": {label: source.loss for label, source in pretrained.items()},
        "analysis": analysis,
        "flops": _bills(pretrained, settings),
        "runs": _runs(pretrained, found),
        "equal": ["training_flops", "units"],
        "curves": _curves(found, settings),
    }


def _source(settings: dict[str, Any]) -> PythonSource:
    """One reading for all: what tasks are judged by is in no text that is pretrained on."""
    size = settings["bytes"] + settings["length"] * settings["held_out"]
    # a task of few classes is drawn from the snippets of all
    share = settings["packages"] / settings["classes"]
    counts = (math.ceil(share * number) for number in (max(settings["examples"]), settings["tested"]))
    return python_source(size, *counts, settings["length"], settings["packages"], seed=0)


def _pretrain_all(settings: dict[str, Any], source: Tensor, seed: int, progress: Track) -> dict[str, Pretrained]:
    text, held_out = source[: settings["bytes"]], source[settings["bytes"] :].view(-1, settings["length"])
    steps = settings["steps"]
    middle = 0.75 if 0.75 in settings["sparsities"] else settings["sparsities"][-1]
    ending, every = max(2, steps * 3 // 4), max(1, steps // 20)
    rigl = RigL(sparsity=middle, end=ending, every=every, allocation="uniform", seed=seed)
    methods: dict[str, Any] = {"dense": None}
    methods |= {
        f"spdf {sparsity}": SparsePretraining(sparsity=sparsity, seed=seed) for sparsity in settings["sparsities"]
    }
    methods |= {f"rigl {middle}": rigl, "small dense": None}
    found = {}
    for label, method in progress(methods.items(), "pretraining"):
        torch.manual_seed(seed)
        model = _model(settings, _inner_of_equal_cost(settings, 1 - middle) if label == "small dense" else None)
        batch, rate = settings["batch"], settings["learning_rate"]
        found[label] = pretrain(model, text, held_out, steps, batch, rate, method, seed)
    return found


def _model(settings: dict[str, Any], inner: int | None = None) -> ByteGPT:
    return ByteGPT(settings["layers"], settings["width"], settings["heads"], settings["length"], inner)


def _inner_of_equal_cost(settings: dict[str, Any], left: float) -> int:
    """Inner width at which a dense model, embeddings and head unchanged, costs as much for a byte as the sparse one."""
    heads = settings["heads"]
    wanted = _model(settings).flops(left).forward
    sizes = range(heads, settings["width"] + 1, heads)
    return min(sizes, key=lambda inner: abs(_model(settings, inner).flops().forward - wanted))


def _starts(pretrained: dict[str, Pretrained], settings: dict[str, Any]) -> list[tuple[str, ByteGPT, MaskSet | None]]:
    """Label, model and the mask that fine-tuning keeps, of all that is fine-tuned."""
    found: list[tuple[str, ByteGPT, MaskSet | None]] = []
    for label, source in pretrained.items():
        found.append((label, source.model, None))
        if source.training is None:
            continue
        method, masks = source.training.method, source.masks
        assert masks is not None
        if isinstance(method, SparsePretraining):
            method.densify(source.training)
            found.append((f"{label}, mask kept", source.model, masks))
            if "normal" in settings["inits"]:
                other = copy.deepcopy(source.model)
                randomize_(other, masks, generator=torch.Generator().manual_seed(0))
                found.append((f"{label}, random start", other, None))
        else:
            source.training.finalize()
    torch.manual_seed(0)
    return [*found, ("no pretraining", _model(settings), None)]


def _finetune(
    task: _Task, model: ByteGPT, masks: MaskSet | None, examples: int, settings: dict[str, Any], seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """Train a copy on the first examples; of several learning rates the one that does best on a fifth of them."""
    rows = torch.arange(min(examples, task.examples))
    rates = settings["tuning_rates"]
    if len(rates) > 1:
        cut = max(1, len(rows) // 5)
        losses = {}
        for rate in rates:
            tuned = _train(task, model, masks, rows[cut:], rate, settings, seed)
            with torch.no_grad():
                losses[rate] = float(task.loss(tuned, rows[:cut]))
        rates = [min(losses, key=lambda rate: losses[rate])]
    tuned = _train(task, model, masks, rows, rates[0], settings, seed)
    return tuned, task.judge(tuned, examples == max(settings["examples"]))


def _train(
    task: _Task, model: ByteGPT, masks: MaskSet | None, rows: Tensor, rate: float, settings: dict[str, Any], seed: int
) -> nn.Module:
    body = copy.deepcopy(model)
    torch.manual_seed(seed)
    tuned = task.wrap(body)
    steps, batch = settings["tuning_steps"], settings["tuning_batch"]
    order = torch.randint(len(rows), (steps, batch), generator=torch.Generator().manual_seed(seed))
    with static_masks(body, masks) if masks is not None else nullcontext():
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.1, fused=True)
        run_steps(optimizer, steps, rate, lambda step: task.loss(tuned, rows[order[step]]))
    return tuned


def _analysis(source: Pretrained, tuned: nn.Module, before: ByteGPT) -> dict[str, float]:
    """Means over matrices of what fine-tuning did to them."""
    assert source.masks is not None
    body = tuned.body if isinstance(tuned, _Classifier) else tuned
    rows = movements(snapshot(before, source.masks), body, source.masks)
    names = ("revived", "kept", "revived_share", "angle")
    return {name: sum(getattr(row, name) for row in rows) / len(rows) for name in names}


def _bills(pretrained: dict[str, Pretrained], settings: dict[str, Any]) -> dict[str, float]:
    """Operations saved, by formula, and zeros of the matrices beside zeros of the model."""
    found: dict[str, float] = {}
    tokens = settings["steps"] * settings["batch"] * settings["length"]
    tuning = settings["tuning_steps"] * settings["tuning_batch"] * settings["length"]
    for sparsity in settings["sparsities"]:
        source = pretrained[f"spdf {sparsity}"]
        assert source.masks is not None
        flops = source.model.flops(1 - sparsity)
        everything = density(source.model).total().total
        found |= {
            f"{sparsity}, pretraining": flops.saving(),
            f"{sparsity}, with fine-tuning": flops.saving(tokens, tuning),
            f"{sparsity}, zeros of all parameters": (source.masks.total - source.masks.kept) / everything,
        }
    return found


def _runs(pretrained: dict[str, Pretrained], found: dict[str, Any]) -> dict[str, Any]:
    """For the report card: cost of pretraining, and mean loss after fine-tuning; first those of equal cost."""
    sparsest_first = sorted(pretrained, key=lambda label: pretrained[label].cost.training_flops)
    return {
        label: {
            "quality": _mean([quality["loss"] for quality in found[label].values()]),
            "cost": pretrained[label].cost.to_dict(),
        }
        for label in sparsest_first
    }


def _curves(found: dict[str, Any], settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    case = f"docstrings, {max(settings['examples'])}"
    x = [0.0, *settings["sparsities"]]
    curves = {}
    for name, ending in (("every weight fine-tuned", ""), ("mask kept", ", mask kept")):
        labels = ["dense", *(f"spdf {sparsity}{ending}" for sparsity in settings["sparsities"])]
        curves[name] = {"x": x, "y": [found[label][case]["loss"] for label in labels]}
    return curves


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def decide(observations: list[Observation]) -> Verdict:
    """Apply the rule."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    sparsities = [float(label.split()[1]) for label in observations[0]["losses"] if _plain(label)]
    claims: dict[str, tuple[bool, bool]] = {}
    numbers: dict[str, Interval | float] = {}
    for sparsity in sparsities:
        kept = _ratio(observations, f"spdf {sparsity}, mask kept", f"spdf {sparsity}")
        gap = _ratio(observations, f"spdf {sparsity}", "dense")
        numbers[f"log loss, mask kept − all weights, {sparsity}"] = kept
        numbers[f"log loss, pretrained sparse − dense, {sparsity}"] = gap
        claims[f"keeping the mask is as good at {sparsity}"] = (kept.above_zero, kept.below_zero)
        if sparsity in CLOSE:
            claims[f"more than {CLOSE[sparsity]:.0%} is lost at {sparsity}"] = (
                gap.high < CLOSE[sparsity],
                gap.low > CLOSE[sparsity],
            )
    middle = f"spdf {0.75 if 0.75 in sparsities else sparsities[-1]}"
    small = _ratio(observations, "small dense", middle)
    nothing = _ratio(observations, "no pretraining", middle)
    claims["a small dense model of the same cost is as good"] = (small.above_zero, small.below_zero)
    claims["pretraining matters little"] = (nothing.low > FAR, nothing.high < FAR)
    numbers["log loss, small dense − sparse, equal operations"] = small
    numbers["log loss, no pretraining − sparse"] = nothing
    numbers["log loss, rigl − sparse"] = _ratio(observations, middle.replace("spdf", "rigl"), middle)
    numbers |= relation(observations, sparsities)
    numbers |= {f"operations saved, {name}": value for name, value in observations[0]["flops"].items()}
    names = observations[0]["analysis"]
    numbers |= {f"{name} (docstrings)": _mean([o["analysis"][name] for o in observations]) for name in names}
    wrong = [name for name, (_, opposite) in claims.items() if opposite]
    if wrong:
        return Verdict("does not hold", "; ".join(wrong), numbers)
    open_ = [name for name, (held, _) in claims.items() if not held]
    if open_:
        return Verdict("inconclusive", f"not excluded: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "sparse pretraining with dense fine-tuning is near dense, and better than its rivals", numbers
    )


def _plain(label: str) -> bool:
    return label.startswith("spdf") and "," not in label


def _ratio(observations: list[Observation], above: str, below: str) -> Interval:
    """Log of the ratio of two losses, mean over tasks and numbers of examples, over seeds."""
    rows = [(o["losses"][above], o["losses"][below]) for o in observations]
    return mean_interval([_mean([math.log(one[case] / other[case]) for case in one]) for one, other in rows])


def relation(observations: list[Observation], sparsities: list[float]) -> dict[str, Interval | float]:
    """What the gap to dense pretraining depends on: sparsity, headroom of the task, and the number of examples.

    Headroom is the logarithm of the ratio of losses without and with dense pretraining: how much a task has to lose.
    """
    rows = []
    for losses in (observation["losses"] for observation in observations):
        for sparsity, case in itertools.product(sparsities, losses["dense"]):
            rows.append(
                {
                    "gap": math.log(losses[f"spdf {sparsity}"][case] / losses["dense"][case]),
                    "sparsity": sparsity,
                    "headroom": math.log(losses["no pretraining"][case] / losses["dense"][case]),
                    "log examples": math.log(float(case.split(", ")[1])),
                }
            )
    fitted = linear_regression(rows, ["sparsity", "headroom", "log examples"], "gap")
    return {f"gap, coefficient of {name}": value for name, value in fitted.items() if name != "intercept"}


experiment = Experiment(
    slug="spdf",
    claim=(
        "A model that is pretrained with up to three quarters of its weights missing at random, and fine-tuned with "
        "all of them, is as good as one pretrained dense."
    ),
    rule=(
        "losses on two tasks, with few and with more examples; mean logarithms of their ratios, 95 % over seeds. Holds "
        "if fine-tuning every weight beats keeping the mask at every sparsity; if the loss is less than 2 % above that "
        "of dense pretraining at 50 % zeros, and less than 5 % at 75 %; and if at 75 % it is below that of a dense "
        "model of equal pretraining operations, and at least 10 % below that without pretraining; does not hold if one "
        "of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="sparsity during pretraining",
    y_label="loss of docstrings after fine-tuning, nats a byte",
)
