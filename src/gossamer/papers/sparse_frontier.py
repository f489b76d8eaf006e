"""Sparse attention on tiny models taught to answer questions about long contexts, and on a real one.

Three sizes of one family, six methods, prefill and decode apart, always at equal sparsity on the same prompts. The
models are taught here, within a minute each; the pretrained one shows that the methods work on real text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from gossamer.attention.budget_solver import RULES, TOLERANCE, budget_for, rule_of
from gossamer.attention.evaluation import contender
from gossamer.errors import SparsityError
from gossamer.measure.long_context import (
    CommonWords,
    Frontier,
    Needle,
    Row,
    StoryRetrieval,
    Subject,
    Task,
    VariableTracking,
    answers,
    decoded_nll,
    draw,
    frontier,
    isoflops,
    max_safe_sparsity,
    small_vocabulary,
    validate_law,
)
from gossamer.measure.long_context.frontier import DENSE
from gossamer.measure.windows import evaluation_mode
from gossamer.models import load
from gossamer.models.text import evaluation_tokens, read_text
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.long_context_models import exercises, lessons, teach, tiny_model
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, bootstrap_interval

_LAWFUL = {"prefill": "vertical-slash", "decode": "quest"}
RETRIEVAL, AGGREGATION = ("needle", "story retrieval"), ("common words",)
ABLE = 0.5  # accuracy that a model needs to have anything to lose


def tasks(names: Sequence[str]) -> dict[str, Task]:
    """Tasks that the tiny models are taught."""
    made = (
        Needle(wording="terse"),
        VariableTracking(wording="terse"),
        CommonWords(wording="terse", common=1, share=0.3),
        StoryRetrieval(wording="terse"),
    )
    return {task.name: task for task in made if task.name in names}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Teach a family of models, evaluate all methods on it, and judge a pretrained model with the first seed."""
    subjects = {}
    for name, shape in progress(list(settings["models"].items()), "teaching tiny models"):
        subjects[name] = taught(shape, settings, seed)
    chosen = tasks(settings["tasks"])
    methods = {name: contender(name, chosen.values(), seed) for name in RULES}
    lengths, sparsities = settings["lengths"], settings["sparsities"]
    options = {"samples": settings["samples"], "seed": seed, "batch_size": settings["samples"], "progress": False}
    rows: list[Row] = []
    for name in progress(list(subjects), "sparse attention"):
        rows += frontier({name: subjects[name]}, methods, chosen, lengths, sparsities, **options).rows
    found = Frontier(tuple(rows))
    observation: Observation = {
        "models": _shapes(found),
        "rows": _packed(found),
        "curves": _curves(found, max(lengths)),
    }
    if seed == 0 and settings["demo"]:
        observation["demo"] = judged_demo(settings["demo"], progress)
    return observation


def taught(shape: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> Subject:
    """A tiny model after its lessons: facts far apart, then prompts as they will be met."""
    tokenizer, rng = small_vocabulary(), np.random.default_rng(1000 + seed)
    lengths = settings["lengths"]
    model = tiny_model(tokenizer, shape["width"], shape["layers"], shape["heads"], 2 * max(lengths), seed)
    short = lessons(tokenizer, settings["lessons"], settings["lesson tokens"], max(lengths), seed)
    teach(model, short, shape["steps"], settings["batch"], shape["learning rate"], seed)
    for length in lengths:
        count = settings["exercise steps"]
        data = exercises(tokenizer, list(tasks(settings["tasks"]).values()), 4 * count, length, rng)
        teach(model, data, count, 8, shape["learning rate"] / 2, seed, warm=5)
    return Subject(model, tokenizer)


def judged_demo(settings: Mapping[str, Any], progress: Track) -> dict[str, Any]:
    """Perplexity and needles of the pretrained demo model, dense and with every method."""
    loaded = load("demo", dtype="float32")
    length, prompt = settings["tokens"], settings["tokens"] - settings["decoded"]
    text = evaluation_tokens(read_text("state-of-the-union"), loaded.tokenizer, length)
    needles = draw(Needle(), loaded.tokenizer, length, settings["needles"], 0)
    found: dict[str, Any] = {}
    cells = [(DENSE, 0.0), *((name, s) for name in RULES for s in settings["sparsities"])]
    for name, sparsity in progress(cells, "demo model"):
        try:
            method = None if name == DENSE else budget_for(name, length, sparsity, loaded.model, [text[:, :prompt]])
        except SparsityError as error:
            found[f"{name} at {sparsity}"] = {"note": str(error)}
            continue
        found[f"{name} at {sparsity}"] = _judged(loaded, method, name, text, prompt, needles)
    return found


def _judged(loaded: Any, method: Any, name: str, text: torch.Tensor, prompt: int, needles: list[Any]) -> dict[str, Any]:
    """Negative log-likelihood a token of a prompt or of what is decoded after it, and the score on needles."""
    phase = None if method is None else rule_of(name).phase

    def measured() -> dict[str, float]:
        found = {}
        with evaluation_mode(loaded.model):
            if phase != "decode":
                logs = loaded.model(input_ids=text[:, :prompt], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                found["prompt nll"] = float(-logs.gather(-1, text[0, 1:prompt, None]).mean())
            if phase != "prefill":
                found["decoded nll"] = float(decoded_nll(loaded.model, text, prompt).mean())
        given = answers(loaded.model, needles, loaded.tokenizer, 1, decoded_prompt=int(phase == "decode"))
        return found | {"needles": sum(Needle().score(a, s.gold) for a, s in zip(given, needles)) / len(needles)}

    if method is None or phase is None:
        return measured() | {"realised": 0.0}
    with method.active(loaded.model) as installed:
        return measured() | {"realised": 1 - installed.report().density(phase)}


def decide(observations: Sequence[Observation]) -> Verdict:
    """The card's four checks."""
    everything = [unpacked(observation) for observation in observations]
    families = [able(found) for found in everything]
    budget = max(_budget_errors(everything).values(), default=0.0)
    gaps = {kind: _between(families, "vertical-slash", "block-sparse", names) for kind, names in _KINDS.items()}
    phases = _phases(families)
    laws = {phase: _law(everything, phase) for phase in ("prefill", "decode")}
    numbers: dict[str, Any] = {"largest miss of a budget": budget}
    numbers |= {f"vertical-slash − block-sparse, {kind}": gap for kind, gap in gaps.items() if gap}
    if phases:
        numbers["safe sparsity, decode − prefill"] = phases
    for phase, (explained, error, baseline) in laws.items():
        numbers |= {f"law, {phase}: R² on the largest model": explained, f"law, {phase}: its error": error}
        numbers[f"law, {phase}: error of the mean a task"] = baseline
    numbers |= _summary(everything)
    return _verdict(numbers, budget, gaps, phases, laws)


def _verdict(
    numbers: Mapping[str, Any], budget: float, gaps: Mapping[str, Any], phases: Interval | None, laws: Mapping[str, Any]
) -> Verdict:
    wins = {kind: gap for kind, gap in gaps.items() if gap}
    retrieval, aggregation = wins.get("retrieval"), wins.get("aggregation")
    predicted = all(error < baseline for _, error, baseline in laws.values())
    failed = [
        *(["budgets miss"] if budget > TOLERANCE else []),
        *(["vertical-slash does not win retrieval"] if "retrieval" in wins and wins["retrieval"].below_zero else []),
        *(
            ["block-sparse does not win aggregation"]
            if "aggregation" in wins and wins["aggregation"].above_zero
            else []
        ),
        *(["prefill tolerates more than decoding"] if phases and phases.below_zero else []),
        *([] if predicted else ["the law does not predict the largest model better than the mean of each task"]),
    ]
    sure = retrieval and aggregation and retrieval.above_zero and aggregation.below_zero
    outcome: Outcome
    if failed:
        outcome, reason = "does not hold", "; ".join(failed)
    elif sure and phases and phases.low >= 0:
        outcome, reason = (
            "holds",
            "each pattern wins its tasks, decoding tolerates more, the law predicts",
        )
    else:
        outcome, reason = "inconclusive", "an interval reaches across its bound, or a task was not learned"
    return Verdict(outcome, reason, numbers)


_KINDS = {"retrieval": RETRIEVAL, "aggregation": AGGREGATION}


def able(found: Frontier) -> Frontier:
    """Rows of tasks that a model can do with dense attention, at the length in question."""
    kept = []
    for row in found.rows:
        twin = found.dense_twin(row)
        if twin is not None and twin.accuracy >= ABLE:
            kept.append(row)
    return Frontier(tuple(kept))


def _budget_errors(families: Sequence[Frontier]) -> dict[str, float]:
    """Method → largest distance of its mean sparsity, over tasks, from what was asked for."""
    errors: dict[str, float] = {}
    for found in families:
        for method in found.values("method"):
            for cell in _cells(found.where(method=method), "model", "length", "sparsity"):
                if cell.rows[0].realised is not None:
                    gap = abs(cell.realised - cell.rows[0].sparsity)
                    errors[method] = max(errors.get(method, 0.0), gap)
    return errors


def _between(families: Sequence[Frontier], first: str, second: str, named: Sequence[str]) -> Interval | None:
    """Mean difference of two methods at equal sparsity, over all prompts of some tasks."""
    gaps: list[float] = []
    for found in families:
        for row in found.where(method=first).rows:
            twin = found.where(
                model=row.model, method=second, task=row.task, length=row.length, sparsity=row.sparsity
            ).rows
            if row.task in named and twin and row.scores and twin[0].scores:
                gaps += [a - b for a, b in zip(row.scores, twin[0].scores)]
    return bootstrap_interval(gaps) if len(gaps) > 1 else None


def _phases(families: Sequence[Frontier]) -> Interval | None:
    """Largest safe sparsity while decoding minus that in prefill: means of methods, over models, lengths and tasks."""
    gaps = []
    for found in families:
        safe = max_safe_sparsity(found, tolerance=0.1)
        for model in found.values("model"):
            for length in found.values("length"):
                mine = [one for one in safe if one.model == model and one.length == length]
                for task in found.where(model=model, length=length).values("task"):
                    means = []
                    for phase in ("decode", "prefill"):
                        given = [one.tasks[task] for one in mine if one.phase == phase and task in one.tasks]
                        means.append(sum(given) / len(given) if given else 0.0)
                    gaps.append(means[0] - means[1])
    return bootstrap_interval(gaps) if len(gaps) > 1 else None


def _law(families: Sequence[Frontier], phase: str) -> tuple[float, float, float]:
    """R² and error of the law on the largest model, and error of the mean of each task; means over seeds.

    One method stands for its phase, as in the paper's figures: a law that does not know methods cannot fit several.
    """
    methods = (DENSE, _LAWFUL[phase])
    found = [validate_law([row for row in one.rows if row.method in methods], "parameters") for one in families]
    quality = [(one.r_squared, one.error, one.baseline_error) for one in found]
    explained, error, baseline = (float(value) for value in np.mean(quality, axis=0))
    return explained, error, baseline


def _summary(families: Sequence[Frontier]) -> dict[str, Any]:
    """Accuracy over all tasks at the highest sparsity, and how often size beats density at the same price."""
    rows = Frontier(tuple(row for found in families for row in found.rows))
    highest = max(rows.values("sparsity"))
    numbers = {"accuracy, dense": rows.where(method=DENSE).accuracy}
    for method in rows.values("method"):
        part = rows.where(method=method, sparsity=highest)
        if method != DENSE and any(row.scores for row in part.rows):
            numbers[f"accuracy, {method} at {highest:g}"] = part.accuracy
    for phase in ("prefill", "decode"):
        points = [part for found in families for part in isoflops(found, phase)]  # type: ignore[arg-type]
        numbers[f"{phase}: large and sparse beats small and dense"] = sum(len(p.large_sparse_wins) for p in points)
        numbers[f"{phase}: small and dense beats large and sparse"] = sum(len(p.small_dense_wins) for p in points)
    return numbers


def _cells(found: Frontier, *fields: str) -> list[Frontier]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found.rows:
        groups.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return [Frontier(tuple(rows)) for rows in groups.values()]


def _curves(found: Frontier, length: int) -> dict[str, dict[str, list[float]]]:
    part = found.where(length=length)
    dense = part.where(method=DENSE).accuracy
    curves = {}
    for method in part.values("method"):
        cells = [part.where(method=method, sparsity=s) for s in part.where(method=method).values("sparsity")]
        reached = [(cell.rows[0].sparsity, cell.accuracy) for cell in cells if any(row.scores for row in cell.rows)]
        if method != DENSE and reached:
            curves[method] = {"x": [0.0, *(x for x, _ in reached)], "y": [dense, *(y for _, y in reached)]}
    return curves


def _shapes(found: Frontier) -> dict[str, dict[str, int]]:
    fields = ("parameters", "layers", "heads", "head_size")
    return {row.model: {field: getattr(row, field) for field in fields} for row in found.rows}


def _packed(found: Frontier) -> dict[str, dict[str, Any]]:
    """Rows as plain values, a few lines each."""
    packed = {}
    for row in found.rows:
        name = " | ".join(map(str, (row.model, row.method, row.phase, row.task, row.length, row.sparsity)))
        plain = {key: value for key, value in asdict(row).items() if key in ("realised", "selection_flops")}
        packed[name] = plain | {"scores": " ".join(f"{score:.3g}" for score in row.scores)}
    return packed


def unpacked(observation: Observation) -> Frontier:
    """Rows of an observation."""
    rows = []
    for name, plain in observation["rows"].items():
        model, method, phase, task, length, sparsity = name.split(" | ")
        scores = tuple(map(float, plain["scores"].split()))
        place = {"model": model, "method": method, "phase": phase, "task": task}
        place |= {"length": int(length), "sparsity": float(sparsity)}
        rows.append(Row(**place, **observation["models"][model], **plain | {"scores": scores}))
    return Frontier(tuple(rows))


_SMALL = {"layers": 2, "heads": 4, "learning rate": 2e-3, "steps": 200}
_MODELS = {
    "small": {**_SMALL, "width": 32},
    "middle": {**_SMALL, "width": 48},
    "large": {**_SMALL, "width": 64},
}
_QUICK: dict[str, Any] = {
    "models": _MODELS,
    "tasks": ["needle", "variable tracking", "common words"],
    "lessons": 3000,
    "lesson tokens": 96,
    "batch": 24,
    "exercise steps": 30,
    "lengths": [512],
    "sparsities": [0.5, 0.75, 0.9],
    "samples": 20,
    "demo": {"tokens": 1024, "decoded": 32, "needles": 1, "sparsities": [0.75]},
}
_FULL = {
    **_QUICK,
    "models": {name: {**shape, "steps": 2000} for name, shape in _MODELS.items()},
    "tasks": ["needle", "variable tracking", "common words", "story retrieval"],
    "lengths": [256, 512, 1024],
    "samples": 64,
    "sparsities": [0.5, 0.75, 0.875, 0.9],
    "exercise steps": 100,
    "lessons": 16000,
    "demo": {"tokens": 2048, "decoded": 128, "needles": 10, "sparsities": [0.5, 0.75, 0.9]},
}

experiment = Experiment(
    slug="sparse-frontier",
    claim=(
        "At equal sparsity no training-free sparse attention wins everywhere: columns and diagonals win on retrieval, "
        "blocks on aggregation; decoding tolerates more sparsity than prefill; and a law fitted to small models "
        "predicts the largest."
    ),
    rule=(
        "holds if every method's sparsity, mean of all tasks, is within 0.02 of what was asked and, on tasks that a "
        "model does with at least half accuracy, vertical-slash minus block-sparse is above zero on retrieval and "
        "below on aggregation, safe sparsity of decoding minus prefill is not below zero, all with 95% intervals, and "
        "the law of vertical-slash in prefill and of quest in decoding errs less on the largest model than the mean of "
        "each task; does not hold if any lies wholly on the other side"
    ),
    run=run,
    decide=decide,
    budgets={"quick": _QUICK, "full": _FULL},
    seeds=2,
    x_label="sparsity of the phase that was asked for",
    y_label="accuracy of the family, mean of tasks",
)
