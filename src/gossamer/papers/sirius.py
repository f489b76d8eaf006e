"""Sirius' claim: contextual sparsity spoils answers that take many steps, and a check every 16 tokens mends them.

A small transformer learns chains of modular arithmetic, where every token is right or wrong (made data: the truth is
the point). It answers in full, with half of its neurons chosen by prompt (CSparse) or by token (FSparse), and so that
the full model corrects either; ordinary speculative decoding takes the same draft. Without rewriting, without rollback,
and with other windows, thresholds and a tree, the correction is taken apart. On a real language model the text that
each writes behind a page of a book is judged by the full model's loss on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.contextual import ContextualSparse
from gossamer.activations.sirius import SiriusGenerator, SiriusStats
from gossamer.models import load, read_text
from gossamer.papers.chain_arithmetic import Chains, learn_chains
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import stretch
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

LOST = 20.0  # points of exact match that CSparse must lose
REGAINED = 0.85  # of that
ADVANCE = 0.8  # of the window
KINDS = {"CSparse": "griffin", "FSparse": "cats"}

QUICK: dict[str, Any] = {
    "layers": 2,
    "width": 64,
    "middle": 128,
    "steps": 350,
    "batch": 32,
    "learning_rate": 6e-3,
    "keep": 0.5,
    "shown": 16,
    "asked": 48,
    "prompts": 12,
    "ablation_prompts": 6,
    "kernel_size": 16,
    "ablations": {
        "no rewriting": {"rewrite": False},
        "no rollback": {"rollback": False},
        "k = 4": {"kernel_size": 4},
        "k = 8": {"kernel_size": 8},
        "k = 32": {"kernel_size": 32},
        "thr = 0.01": {"thr": 0.01},
        "thr = 0.5": {"thr": 0.5},
        "tree of 4": {"tree_width": 4},
    },
    "model": "demo",
    "text": "moby-dick",
    "page": 64,
    "new": 16,
}
FULL: dict[str, Any] = {
    **QUICK,
    "layers": 4,
    "width": 128,
    "middle": 384,
    "steps": 2000,
    "prompts": 200,
    "ablation_prompts": 100,
    "page": 512,
    "new": 128,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both models."""
    chains = Chains(shown=settings["shown"], asked=settings["asked"])
    shape = {name: settings[name] for name in ("layers", "width", "middle", "steps", "batch", "learning_rate")}
    model = learn_chains(chains, **shape, seed=seed, progress=progress)
    texts = chains.draw(settings["prompts"], torch.Generator().manual_seed(1000 + seed))
    points, density = _arithmetic(model, chains, texts, settings, progress)
    curves = {
        name: {"x": [points[name]["density"]], "y": [100 * points[name]["exact"]]}
        for name in ("full", *KINDS, *(f"Sirius on {kind}" for kind in KINDS))
    }
    return {
        "points": points,
        "density": density,
        "window": settings["kernel_size"],
        "real": _real(settings, seed),
        "curves": curves,
    }


# -------------------------------------------------------------------------------------------- arithmetic


def _arithmetic(
    model: nn.Module, chains: Chains, texts: Tensor, settings: dict[str, Any], progress: Track
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Exact match and cost of every way to answer; and the density of each sparse model."""
    dense = _answers(texts, chains, lambda ids: (greedy(model, ids, chains.asked), None))
    points, density = {"full": {**dense, "density": 1.0}}, {}
    few = texts[: settings["ablation_prompts"]]
    for name, kind in KINDS.items():
        sparse = ContextualSparse(model, kind, settings["keep"])  # type: ignore[arg-type]
        density[name] = sparse.density
        alone = _answers(texts, chains, lambda ids: (sparse_greedy(model, sparse, ids, chains.asked), None))  # noqa: B023
        points[name] = {**alone, "density": sparse.density}
        cases: list[tuple[str, Tensor, dict[str, Any]]] = [
            (f"Sirius on {name}", texts, {}),
            (f"speculative on {name}", few, {"accept": "exact"}),
        ]
        if name == "CSparse":
            cases += [(f"Sirius on {name}, {label}", few, options) for label, options in settings["ablations"].items()]
        for label, prompts, options in progress(cases, f"answering on {name}"):
            options = {"kernel_size": settings["kernel_size"], **options}
            corrected = SiriusGenerator(model, sparse, **options)
            points[label] = _answers(prompts, chains, _corrected(corrected, chains.asked))
        sparse.remove()
    return points, density


Answer = Callable[[Tensor], tuple[Tensor, SiriusStats | None]]


def _corrected(generator: SiriusGenerator, new: int) -> Answer:
    def answer(ids: Tensor) -> tuple[Tensor, SiriusStats | None]:
        out = generator.generate(input_ids=ids, **_plain(new))
        return out.sequences, out.stats

    return answer


def _answers(texts: Tensor, chains: Chains, answer: Answer) -> dict[str, float]:
    """How right the answers are, what they take, and how fast they come."""
    begin = time.perf_counter()
    found = [answer(text[: chains.prompt].unsqueeze(0)) for text in texts]
    seconds = time.perf_counter() - begin
    said = chains.right(torch.cat([ids for ids, _ in found]), texts)
    said["tokens per second"] = len(texts) * chains.asked / seconds
    stats = [s for _, s in found if s is not None]
    if stats:
        said |= pooled(stats)
    return said


def pooled(stats: list[SiriusStats]) -> dict[str, float]:
    """Advance, effective density and rollbacks over several texts."""
    together = SiriusStats(stats[0].kernel_size, stats[0].density, [w for s in stats for w in s.windows])
    return {
        "aal": together.aal,
        "effective density": together.effective_density,
        "density": together.measured_density,
        "rollbacks a check": together.rollbacks / together.checks,
        "read a check": sum(w.read for w in together.windows) / together.checks,
    }


def _plain(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}


def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """The model's own continuation."""
    return model.generate(input_ids=ids, do_sample=False, **_plain(new))


@torch.no_grad()
def sparse_greedy(model: Any, sparse: ContextualSparse, ids: Tensor, new: int) -> Tensor:
    """The sparse model's continuation of a prompt that the full one has read."""
    generator = SiriusGenerator(model, sparse, kernel_size=new + 1, rollback=False, rewrite=False)
    return generator.generate(input_ids=ids, **_plain(new)).sequences


# ------------------------------------------------------------------------------------------- real text


def _real(settings: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """What the full model thinks of the continuations of one page."""
    loaded = load(settings["model"], dtype="float32")
    model, new = loaded.model, settings["new"]
    page = stretch(read_text(settings["text"]), loaded.tokenizer, settings["page"], seed)
    own = greedy(model, page, new)
    found = {"full": {"loss": text_loss(model, own, page.shape[1])}}
    for name, kind in KINDS.items():
        sparse = ContextualSparse(model, kind, settings["keep"])  # type: ignore[arg-type]
        alone = sparse_greedy(model, sparse, page, new)
        found[name] = {"loss": text_loss(model, alone, page.shape[1]), "density": sparse.density}
        out = SiriusGenerator(model, sparse, settings["kernel_size"]).generate(input_ids=page, **_plain(new))
        found[f"Sirius on {name}"] = {"loss": text_loss(model, out.sequences, page.shape[1]), **pooled([out.stats])}
        sparse.remove()
    return found


@torch.no_grad()
def text_loss(model: Any, ids: Tensor, begin: int) -> float:
    """Mean negative log-likelihood of a text's tokens from `begin` on, in nats."""
    logits = model(ids).logits[0, begin - 1 : -1].float()
    return float(nn.functional.cross_entropy(logits, ids[0, begin:]))


# ---------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """What CSparse loses, how much of that Sirius regains, and how far a check advances; paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    exact = {name: [100 * o["points"][name]["exact"] for o in observations] for name in observations[0]["points"]}
    lost = [full - sparse for full, sparse in zip(exact["full"], exact["CSparse"])]
    regained = [ours - sparse for ours, sparse in zip(exact["Sirius on CSparse"], exact["CSparse"])]
    advance = [o["points"]["Sirius on CSparse"]["aal"] for o in observations]
    window = observations[0]["window"]
    needed = {
        f"points lost by CSparse − {LOST:g}": mean_interval([loss - LOST for loss in lost]),
        f"points regained − {REGAINED:g} of those lost": mean_interval(
            [gain - REGAINED * loss for gain, loss in zip(regained, lost)]
        ),
        f"advance of a check − {ADVANCE:g} k": mean_interval([a - ADVANCE * window for a in advance]),
    }
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "sparse answers break, and checks mend them at a small cost", numbers)


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Means over seeds of everything that was measured."""
    numbers: dict[str, Interval | float] = {}
    for part in ("points", "real"):
        for name, values in observations[0][part].items():
            for kind in values:
                every = [o[part][name][kind] for o in observations]
                place = "chains" if part == "points" else "book"
                numbers[f"{place}, {name}, {kind}"] = sum(every) / len(every)
    return numbers


experiment = Experiment(
    slug="sirius",
    claim=(
        "Half of the neurons, chosen by the prompt, ruin answers that take many steps; when the full model re-reads "
        "every 16 tokens, rewrites the cache and rolls back, most of what was lost comes back at a small cost."
    ),
    rule=(
        "holds if, at 95 % over seeds, CSparse at 50 % loses more than 20 points of exact match on chains of "
        "arithmetic, Sirius regains more than 85 % of that, and a check advances by more than 0.8 of its 16 tokens; "
        "does not hold if one of these is wholly reversed. FSparse, speculative decoding, ablations, speed and the "
        "real model's text are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="weights read for a token, share",
    y_label="exact match, %",
)
