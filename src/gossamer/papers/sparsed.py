"""SparseD's claim: a diffusion language model that keeps each head's early pattern writes what dense attention writes.

A small masked-diffusion model of bytes learns Python's source, and to go on with a sign that stands somewhere in its
prompt. It writes in 16 steps: densely, with SparseD, with a pattern found in the first step, with one pattern for all
heads, with patterns searched at every step (the bound), and with the nearest blocks, with or without the first one.
Every way has as many dense steps and reads as many blocks, but for that which skips none. Held-out text that is
uncovered step by step tells how well each predicts; samples tell how often they agree, recall the sign, and what a
language model of the usual direction thinks of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.attention.pattern_trace import PatternTrace
from gossamer.attention.sparsed import SparseD
from gossamer.attention.state import StepwiseAttention
from gossamer.core.randomness import generator_for
from gossamer.models.masked_diffusion import MaskedDiffusionSampler
from gossamer.papers.byte_language import ByteGPT, pretrain
from gossamer.papers.denoising_contest import (
    ChosenMask,
    StaleKeys,
    blocks_for,
    gap,
    judged,
    means,
    nearest,
    top_mass,
)
from gossamer.papers.denoising_hosts import FACT, Writer, passages, train_writer, with_facts
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import mean_interval

OURS, EARLY, SHARED, BOUND = "SparseD", "no dense steps", "one pattern for all heads", "searched at every step"
WINDOW, SINK, STALE = "nearest blocks", "first and nearest blocks", "stale keys outside the block"
_NEAR = 0.02  # nats a byte that count as no loss

QUICK: dict[str, Any] = {
    "host": {
        "size": 1_000_000,
        "prompt": 96,
        "written": 32,
        "layers": 3,
        "width": 96,
        "heads": 4,
        "steps": 300,
        "batch": 16,
        "learning_rate": 3e-3,
        "asked": 0.75,
    },
    "judge": {"layers": 2, "width": 64, "heads": 2, "steps": 120, "batch": 8, "learning_rate": 5e-3},
    "steps": 16,
    "block_length": 16,
    "temperature": 0.5,
    "prompts": 24,
    "skip": 0.2,
    "select": 0.3,
    "block": 8,
}
FULL: dict[str, Any] = {
    **QUICK,
    "host": {
        **QUICK["host"],
        "size": 8_000_000,
        "prompt": 768,
        "written": 256,
        "layers": 6,
        "width": 256,
        "heads": 8,
        "steps": 20_000,
        "batch": 32,
        "learning_rate": 1e-3,
    },
    "judge": {"layers": 4, "width": 256, "heads": 4, "steps": 5000, "batch": 32, "learning_rate": 2e-3},
    "steps": 128,
    "block_length": 64,
    "prompts": 128,
    "block": 16,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train writer and judge, watch the dense model, and let every way write."""
    writer = train_writer(settings["host"], seed)
    trial = Trial(settings, writer, seed)
    trace = PatternTrace(block_size=settings["block"])
    with trace.active(writer.model):
        trial.nats()
    trial.dense = trial.written()
    found = {"dense": trial.measured(None)}
    density = trial.sparse_density()
    methods = _methods(settings, trial, density)
    for name in progress(list(methods), "writing"):
        found[name] = trial.measured(methods[name])
    share = settings["select"]
    premise = {
        "overlap between successive steps": trace.between_steps(share),
        "overlap over the life of a pattern": trace.between_steps(share, settings["steps"] - 1 - trial.pattern_step),
        "overlap between heads": trace.between_heads(share),
        "overlap between inputs": trace.between_inputs(share),
    }
    host = {"training loss": writer.loss, "density of sparse steps": density}
    return {"ways": found, "premise": premise, "host": host}


class Trial:
    """Held-out passages of a seed, half of them with a fact, written and predicted in one way after another."""

    dense: Tensor

    def __init__(self, settings: dict[str, Any], writer: Writer, seed: int):
        own, generator = settings["host"], generator_for("trial", seed)
        self.settings, self.model, self.seed = settings, writer.model, seed
        self.prompt, self.length = own["prompt"], own["written"]
        plain = passages(writer.held_out, settings["prompts"], self.prompt + self.length, generator)
        self.half = len(plain) // 2
        asked, self.facts = with_facts(plain[self.half :], self.prompt, generator)
        self.passages = torch.cat([plain[: self.half], asked])
        self.order = torch.rand(len(plain), self.length, generator=generator).argsort(1)
        self.judge = _judge(settings["judge"], writer, plain, seed)

    @property
    def pattern_step(self) -> int:
        """The last dense step of SparseD."""
        return int(self.settings["skip"] * self.settings["steps"]) + 1

    def written(self) -> Tensor:
        """What stands behind the prompts, ``(prompts, length)``."""
        plan = MaskedDiffusionSampler(
            self.model, self.settings["steps"], self.settings["block_length"], temperature=self.settings["temperature"]
        )
        generator = torch.Generator().manual_seed(self.seed)
        return plan.generate(self.passages[:, : self.prompt], self.length, generator=generator)[:, self.prompt :]

    @torch.no_grad()
    def nats(self) -> float:
        """Mean loss of what is still hidden of the passages, uncovered in random order over the steps."""
        steps, losses = self.settings["steps"], []
        self.model.begin(steps, slice(0, self.prompt))
        hidden_until = self.order * steps // self.length  # the step at which a place is uncovered
        for index in range(steps):
            self.model.step(index)
            hidden = functional.pad(hidden_until >= index, (self.prompt, 0))
            logits = self.model(self.passages.masked_fill(hidden, self.model.mask_token))
            losses.append(functional.cross_entropy(logits[hidden], self.passages[hidden]))
        return float(torch.stack(losses).mean())

    def sparse_density(self) -> float:
        """Density of SparseD's patterns on these passages."""
        with _sparsed(self.settings).active(self.model) as installed:
            self.nats()
            whole = installed.report().density("prefill")
        dense = (self.pattern_step + 1) / self.settings["steps"]
        return (whole - dense) / (1 - dense)

    def measured(self, method: StepwiseAttention | None) -> dict[str, float]:
        """Everything about one way."""
        if method is None:
            return {"nats": self.nats(), **self._of(self.dense), "density": 1.0}
        with method.active(self.model) as installed:
            nats = self.nats()
            density = installed.report().density("prefill")
            return {"nats": nats, **self._of(self.written()), "density": density}

    def _of(self, written: Tensor) -> dict[str, float]:
        plain = slice(0, self.half)
        whole = torch.cat([self.passages[plain, : self.prompt], written[plain].clamp(max=255)], 1)
        with torch.no_grad():
            logits = self.judge(whole)[:, self.prompt - 1 : -1]
        return {
            "agreement": float((written == self.dense).double().mean()),
            "recall": float((written[self.half :, :FACT] == self.facts).double().mean()),
            "judged": float(functional.cross_entropy(logits.flatten(0, 1), whole[:, self.prompt :].flatten())),
        }


def _judge(own: dict[str, Any], writer: Writer, held_out: Tensor, seed: int) -> ByteGPT:
    torch.manual_seed(seed)
    model = ByteGPT(own["layers"], own["width"], own["heads"], held_out.shape[1])
    pretrain(model, writer.training, held_out, own["steps"], own["batch"], own["learning_rate"], seed=seed)
    return model.eval()


def _sparsed(settings: dict[str, Any], **changes: Any) -> SparseD:
    return SparseD(
        **{"skip": settings["skip"], "select": settings["select"], "block_size": settings["block"], **changes}
    )


@dataclass(kw_only=True)
class FromTheStart(SparseD):
    """SparseD whose only dense step is the first, which finds the pattern."""

    @property
    def pattern_step(self) -> int:
        """The first step."""
        return 0


class OneForAll(SparseD):
    """SparseD with one pattern for all heads: that of their mean weights."""

    def ranked_by(self, mass: Tensor) -> Tensor:
        """Mean over heads."""
        return mass.mean(1, keepdim=True)


def _methods(settings: dict[str, Any], trial: Trial, density: float) -> dict[str, StepwiseAttention]:
    """Name → method; rivals read at least as many blocks as SparseD does, rounded up to whole ones."""
    block, dense = settings["block"], range(trial.pattern_step + 1)
    keep = blocks_for(density, -(-(trial.prompt + trial.length) // block))
    blocks = trial.length // settings["block_length"]
    return {
        OURS: _sparsed(settings),
        EARLY: FromTheStart(select=settings["select"], block_size=block),
        "chosen together": _sparsed(settings, isolated=False),
        SHARED: OneForAll(skip=settings["skip"], select=settings["select"], block_size=block),
        BOUND: ChosenMask(choose=top_mass(keep, block), dense_at=dense),
        WINDOW: ChosenMask(choose=nearest(keep, block), dense_at=dense),
        SINK: ChosenMask(choose=nearest(keep, block, sinks=1), dense_at=dense),
        STALE: StaleKeys(block_length=settings["block_length"], steps_per_block=settings["steps"] // blocks),
    }


def decide(observations: list[Observation]) -> Verdict:
    """Premise, loss on held-out text, agreement and recall, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    premises = [row["premise"] for row in observations]
    needed = {
        "overlap between steps − between heads": mean_interval(
            [row["overlap over the life of a pattern"] - row["overlap between heads"] for row in premises]
        ),
        f"dense + {_NEAR} − SparseD, nats a byte": mean_interval(
            [row["ways"]["dense"]["nats"] + _NEAR - row["ways"][OURS]["nats"] for row in observations]
        ),
    }
    for rival in (SHARED, WINDOW, SINK, EARLY):
        needed[f"{rival} − {OURS}, nats a byte"] = gap(observations, "ways", rival, OURS, "nats")
    told = {
        f"{OURS} − {rival}, {measure}": gap(observations, "ways", OURS, rival, measure)
        for rival in ("dense", SHARED, WINDOW, SINK, EARLY, BOUND, STALE)
        for measure in ("agreement", "recall")
    }
    numbers: dict[str, Any] = {**told, **means(observations, "ways")}
    for part in ("premise", "host"):
        for name in observations[0][part]:
            numbers[name] = sum(row[part][name] for row in observations) / len(observations)
    numbers["expected cost of attention"] = SparseD(**_PAPER).expected_cost(
        QUICK["steps"], numbers["density of sparse steps"]
    )
    return judged(needed, numbers, "early patterns of each head's own cost next to nothing, and all others cost more")


_PAPER: dict[str, Any] = {"skip": QUICK["skip"], "select": QUICK["select"], "block_size": QUICK["block"]}
experiment = Experiment(
    slug="sparsed",
    claim=(
        "A masked-diffusion language model whose heads each keep the block pattern of an early step, after a fifth of "
        "dense steps, predicts and writes as with dense attention, and better than with patterns of the first step, "
        "one pattern for all heads, or windows that read as much; patterns change less over steps than over heads."
    ),
    rule=(
        "holds if, at 95 % over seeds, a head's patterns as many steps apart as one is in use overlap more than those "
        "of different heads, the loss of SparseD on held-out text that is uncovered over the "
        "steps is within 0.02 nats a byte of dense, and that of one pattern for all heads, of the nearest blocks, of "
        "the first and nearest, and of patterns found in the first step is higher than SparseD's; does not hold if "
        "one of these is wholly reversed. Agreement of samples with dense ones, recall, an autoregressive model's "
        "opinion, patterns searched at every step, and stale keys are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
)
