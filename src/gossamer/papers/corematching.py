"""CoreMatching's claims: tokens that share a prompt's neurons are the ones to keep, and these neurons do for decoding.

A language model reads a page of one book among pages of another, then the beginning of a sentence of the first, and has
to go on as the book does. The pages stand for an image: most of their tokens may be dropped at an early layer. Which,
is decided by matched neurons, by attention (with and without the angle between outputs), by norm, by place, or by
chance, always equally many. Afterwards neurons are chosen by the prompt, by another one, by weights, or by chance.
What overlap has to do with angles is tried on random weights. Besides, the authors' released schedule reads the same
prompts, and a small model of pictures and words answers what one of several digits in a picture is, without most of
the patches; both are reported.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.core_sets import CoreNeurons, CoreTokens, expected_overlap, overlaps
from gossamer.activations.corematching import CoreMatching, CoreMatchingGenerator, CorePrompt
from gossamer.measure.token_pruning_flops import generation_flops
from gossamer.models import evaluation_tokens, load, read_text
from gossamer.models.feedforward import FeedForward
from gossamer.models.key_value_cache import crop_to
from gossamer.models.sliced_feedforward import slice_gated_ffn
from gossamer.papers.core_pictures import on_pictures
from gossamer.papers.core_quiz import Quiz, answer_loss, judged, token_scores
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

RIVALS = ("attention", "random")
OTHER_NEURONS = ("random", "largest weights", "another prompt")
CORRELATION = 0.99
LATE = -5  # the token of the question with which the released code compares

QUICK: dict[str, Any] = {
    "model": "demo",
    "book": "moby-dick",
    "distractors": "state-of-the-union",
    "pages": 4,
    "page": 48,
    "question": 12,
    "answer": 20,
    "prompts": 2,
    "shares": [0.2, 0.4],
    "beta": 0.4,
    "rho": 0.2,
    "simulated_neurons": 4096,
    "steps": 6,
    "pictures": {
        "training": 400,
        "width": 64,
        "layers": 3,
        "steps": 400,
        "batch": 32,
        "learning_rate": 2e-3,
        "pictures": 20,
        "shares": [0.2, 0.4],
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "pages": 8,
    "page": 128,
    "prompts": 20,
    "shares": [0.1, 0.2, 0.3, 0.4, 0.6],
    "steps": 32,
    "pictures": {**QUICK["pictures"], "steps": 3000, "pictures": 500},
}


def draw_quiz(book: Tensor, others: Tensor, settings: dict[str, Any], generator: torch.Generator) -> Quiz:
    """Pages drawn from both texts ``(n,)``, the relevant one at a drawn place, and a quotation out of it."""
    page, pages = settings["page"], settings["pages"]
    said, asked = settings["question"], settings["answer"]

    def piece(text: Tensor) -> Tensor:
        start = 1 + int(torch.randint(len(text) - page - 1, (), generator=generator))
        return text[start : start + page]

    own, place = piece(book), int(torch.randint(pages, (), generator=generator))
    parts = [own if number == place else piece(others) for number in range(pages)]
    begin = int(torch.randint(page - said - asked + 1, (), generator=generator))
    question, answer = own[begin : begin + said], own[begin + said : begin + said + asked]
    prompt = torch.cat([book[:1], *parts, question])
    droppable = torch.zeros(len(prompt), dtype=torch.bool)
    droppable[1 : 1 + page * pages] = True
    relevant = torch.zeros_like(droppable)
    relevant[1 + place * page : 1 + (place + 1) * page] = True
    return Quiz(prompt[None], answer[None], droppable, relevant)


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """The formula, and both kinds of pruning on a few prompts."""
    loaded = load(settings["model"], dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    book, others = (
        evaluation_tokens(read_text(settings[name]), loaded.tokenizer)[0] for name in ("book", "distractors")
    )
    method = CoreMatching(neurons=CoreNeurons(settings["rho"], settings["beta"]))
    matching = method.install(loaded.model)
    quizzes = [draw_quiz(book, others, settings, generator) for _ in range(settings["prompts"])]
    tokens = [_tokens(matching, quiz, settings, generator) for quiz in progress(quizzes, "dropping tokens")]
    neurons = _neurons(matching, quizzes, generator)
    whole = CoreMatching(neurons=method.neurons, tokens=CoreTokens(reference=LATE), schedule="cache")
    return {
        "overlap": overlap_of_random_weights(settings["simulated_neurons"], seed),
        "tokens": tokens,
        "neurons": neurons,
        "released schedule": [_released(whole.install(loaded.model), quiz) for quiz in quizzes],
        "pictures": on_pictures(settings["pictures"], settings["rho"], settings["beta"], seed, progress),
        "cost": _cost(matching, quizzes[0], tokens[0]["elbow"]["kept"], settings),
        "curves": _curves(tokens, settings["shares"]),
    }


# ---------------------------------------------------------------------------------------------- overlap


def overlap_of_random_weights(neurons: int, seed: int, pairs: int = 41, width: int = 64) -> dict[str, float]:
    """Overlap of pairs of tokens at known angles under Gaussian rows, beside the formula and the cosine."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(neurons, width, generator=generator, dtype=torch.float64)
    cosines = torch.linspace(-1, 1, pairs, dtype=torch.float64)
    first, second = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64)).Q.T
    others = cosines[:, None] * first + (1 - cosines.square()).sqrt()[:, None] * second
    counts = overlaps(torch.cat([first[None], others]) @ rows.T)[0, 1:].double()
    expected = expected_overlap(cosines, neurons)
    return {
        "correlation with cosine": float(torch.corrcoef(torch.stack([counts, cosines]))[0, 1]),
        "correlation with formula": float(torch.corrcoef(torch.stack([counts, expected]))[0, 1]),
        "largest error, share of neurons": float((counts - expected).abs().max() / neurons),
    }


# ----------------------------------------------------------------------------------------------- tokens


def _tokens(
    matching: CoreMatchingGenerator, quiz: Quiz, settings: dict[str, Any], generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Loss on the answer, and relevant share of what is kept, for every way to choose."""
    scores = token_scores(matching, quiz, generator)
    everything = torch.arange(quiz.prompt.shape[1])
    found = {"full": judged(matching, quiz, everything)}
    found["elbow"] = judged(matching, quiz, CoreTokens().choose(scores["core"], quiz.droppable))
    for share in settings["shares"]:
        chooser = CoreTokens(elbow=False, share=share)
        for name, values in scores.items():
            found[f"{name} at {share}"] = judged(matching, quiz, chooser.choose(values, quiz.droppable))
    return found


def _released(matching: CoreMatchingGenerator, quiz: Quiz) -> dict[str, float]:
    """Loss on the answer where layers thin out their own caches, and the mean share of a prompt that they keep."""
    read = matching.read(quiz.prompt, quiz.droppable, neurons=False)
    kept = sum(len(index) for index in read.own.values()) / len(read.own) / read.length
    return {"loss": answer_loss(matching, read, quiz.answer), "kept": kept, "layers": len(read.own)}


# ---------------------------------------------------------------------------------------------- neurons


def _neurons(
    matching: CoreMatchingGenerator, quizzes: list[Quiz], generator: torch.Generator
) -> list[dict[str, float]]:
    """Loss on answers decoded with a share of the neurons; nothing is dropped from the prompt."""
    reads = [matching.read(q.prompt, q.droppable, kept=torch.arange(q.prompt.shape[1])) for q in quizzes]
    counts = [len(cut.index) for cut in reads[0].neurons]
    static = [slice_gated_ffn(layer, heaviest(layer, count)) for layer, count in zip(matching.layers, counts)]
    found = []
    for number, (quiz, read) in enumerate(zip(quizzes, reads)):
        chance = [
            slice_gated_ffn(layer, torch.randperm(layer.width, generator=generator)[:count])
            for layer, count in zip(matching.layers, counts)
        ]
        sets = {
            "all": [],
            "core": read.neurons,
            "random": chance,
            "largest weights": static,
            "another prompt": reads[number - 1].neurons,
        }
        logits, row = read.logits, {}
        for name, cuts in sets.items():
            crop_to(read.cache, read.length)
            again = CorePrompt(read.cache, read.length, read.kept, logits, cuts)
            with matching.sparse(again):
                row[name] = answer_loss(matching, again, quiz.answer)
        found.append(row)
    return found


def heaviest(layer: FeedForward, count: int) -> Tensor:
    """The neurons with the largest product of the norms of their rows and their column, whatever the prompt."""
    size = layer.down.matrix().double().norm(dim=0)
    for matrix in layer.widening():
        size = size * matrix.double().norm(dim=1)
    return size.topk(count).indices


# ------------------------------------------------------------------------------------------------- cost


def _cost(matching: CoreMatchingGenerator, quiz: Quiz, kept: float, settings: dict[str, Any]) -> dict[str, float]:
    """Operations, and processor time, of prompt and decoding: dense beside core tokens and neurons."""
    length, steps = quiz.prompt.shape[1], settings["steps"]
    dense = generation_flops(matching.model, length, steps)
    core = generation_flops(matching.model, length, steps, int(kept), matching.layer, settings["beta"])
    found = {
        "prefill, operations saved, times": dense.prefill / core.prefill,
        "decoding, operations saved, times": dense.decode / core.decode,
    }
    seconds = {}
    for name, stays in (("dense", torch.arange(length)), ("core", None)):
        begin = time.process_time()
        read = matching.read(quiz.prompt, quiz.droppable, kept=stays, neurons=name == "core")
        middle = time.process_time()
        with matching.sparse(read):
            for token in quiz.answer[0, :steps]:
                matching.extend(read, token.view(1, 1))
        seconds[name] = (middle - begin, time.process_time() - middle)
    found["prefill, faster, times"] = seconds["dense"][0] / seconds["core"][0]
    found["decoding, faster, times"] = seconds["dense"][1] / seconds["core"][1]
    return found


def _curves(tokens: list[dict[str, dict[str, float]]], shares: list[float]) -> dict[str, dict[str, list[float]]]:
    """Loss on the answer against the share that is kept."""
    names = dict.fromkeys(label.rpartition(" at ")[0] for label in tokens[0] if " at " in label)

    def mean(label: str) -> float:
        return sum(row[label]["loss"] for row in tokens) / len(tokens)

    return {
        name: {"x": [*shares, 1.0], "y": [*(mean(f"{name} at {share}") for share in shares), mean("full")]}
        for name in names
    }


# ---------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Losses on answers, paired by prompt, over all seeds."""
    rows = [row for o in observations for row in o["tokens"]]
    cells = [row for o in observations for row in o["neurons"]]
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    shares = [label.removeprefix("core at ") for label in rows[0] if label.startswith("core at ")]

    def gap(other: str) -> Interval:
        return mean_interval(
            [sum(r[f"{other} at {s}"]["loss"] - r[f"core at {s}"]["loss"] for s in shares) / len(shares) for r in rows]
        )

    needed = {f"tokens, {rival} − core, nats": gap(rival) for rival in RIVALS}
    needed |= {f"neurons, {n} − core, nats": mean_interval([c[n] - c["core"] for c in cells]) for n in OTHER_NEURONS}
    least = min(o["overlap"]["correlation with cosine"] for o in observations)
    numbers: dict[str, Interval | float] = {**needed, "overlap, least correlation with the cosine": least}
    numbers |= {f"tokens, {other} − core, nats": gap(other) for other in ("norm", "last", "attention and angle")}
    numbers |= _told(observations, rows, cells)
    wrong = [name for name, value in needed.items() if value.below_zero]
    wrong += ["overlap"] if least <= CORRELATION else []
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "matched tokens and neurons beat the others, and overlap tells the angle", numbers)


def _told(observations: list[Observation], rows: list[Any], cells: list[Any]) -> dict[str, float]:
    """Means over prompts of all losses and relevant shares, and over seeds of the formula and of costs."""
    numbers = {}
    for label in rows[0]:
        for kind in rows[0][label]:
            numbers[f"tokens, {kind}, {label}"] = sum(row[label][kind] for row in rows) / len(rows)
    for label in cells[0]:
        numbers[f"neurons, loss, {label}"] = sum(cell[label] for cell in cells) / len(cells)
    for part in ("overlap", "cost"):
        for name in observations[0][part]:
            numbers[f"{part}, {name}"] = sum(o[part][name] for o in observations) / len(observations)
    alike = [row for o in observations for row in o["released schedule"]]
    for name in alike[0]:
        numbers[f"released schedule, {name}"] = sum(row[name] for row in alike) / len(alike)
    pictures = [o["pictures"] for o in observations]
    for label, first in pictures[0]["tokens"].items():
        for kind in first:
            numbers[f"pictures, {kind}, {label}"] = sum(p["tokens"][label][kind] for p in pictures) / len(pictures)
    for label in pictures[0]["neurons"]:
        numbers[f"pictures, neurons, loss, {label}"] = sum(p["neurons"][label] for p in pictures) / len(pictures)
    return numbers


experiment = Experiment(
    slug="corematching",
    claim=(
        "Tokens whose active neurons overlap those of the whole prompt are better kept than those that get attention, "
        "and decoding needs the prompt's own neurons only; overlap measures the angle between tokens."
    ),
    rule=(
        "holds if, at 95 % over prompts of all seeds, the loss on the answer at equally many kept tokens (mean over "
        "shares) is higher when attention or chance chooses them, the loss with 40 % of the neurons is higher for "
        "random ones, those with the largest weights and another prompt's, and in every simulation the overlap "
        "correlates with the cosine by more than 0.99; does not hold if one of these is reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of the pages' tokens that is kept",
    y_label="loss on the answer, nats a token",
)
