"""AdaSpa's claim: two exact searches find patterns for all steps of a video transformer, better than estimates do.

A small diffusion transformer learns clips of handwritten digits that drift before photographs, and samples them in 50
steps. At a sparsity of 0.8 it reads the blocks that AdaSpa finds at steps 10 and 30, with and without levels for heads;
those of an exact search at every step, the bound; windows chosen by head, blocks by pooled estimates, and random
blocks. All are dense for the first ten steps. What they draw is compared with what dense attention draws from the same
noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.attention.adaspa import AdaSpa, tile_order
from gossamer.attention.local_windows import WindowMask
from gossamer.attention.pattern_trace import PatternTrace
from gossamer.attention.state import StepwiseAttention
from gossamer.models.diffusion_transformer import DDIMSampler, DiffusionTransformer
from gossamer.papers.denoising_contest import (
    ChosenMask,
    HeadChoice,
    at_random,
    blocks_for,
    gap,
    judged,
    means,
    pooled,
    psnr,
    relative_error,
    ssim,
    top_mass,
)
from gossamer.papers.denoising_hosts import train_painter
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import mean_interval

OURS, ALIKE = "AdaSpa", "AdaSpa, heads alike"
RIVALS = ("choice by head", "pooled estimate", "random blocks")
_NOISE = 0.5  # decibels that levels of heads may cost: the paper's own gain is about as large

QUICK: dict[str, Any] = {
    "host": {
        "frames": 8,
        "patch": 3,
        "layers": 3,
        "width": 64,
        "heads": 4,
        "text": 16,
        "steps": 220,
        "batch": 4,
        "learning_rate": 3e-3,
    },
    "steps": 50,
    "searches": [10, 30],
    "clips": 2,
    "guidance": 2.0,
    "sparsity": 0.8,
    "block": 16,
}
FULL: dict[str, Any] = {
    **QUICK,
    "host": {**QUICK["host"], "layers": 6, "width": 192, "heads": 6, "steps": 20_000, "batch": 32, "patch": 2},
    "clips": 32,
    "block": 32,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train the host, watch it draw densely, and draw in every other way."""
    painter = train_painter(settings["host"], seed)
    model = painter.model

    def drawn() -> Tensor:
        sampler = DDIMSampler(model, settings["steps"], settings["guidance"])
        return sampler.sample(torch.arange(settings["clips"]), torch.Generator().manual_seed(seed))

    trace = PatternTrace(block_size=settings["block"])
    with trace.active(model):
        dense = drawn()
    found = {}
    methods = _methods(settings, model, seed)
    for name in progress(list(methods), "drawing"):
        with methods[name].active(model) as installed:
            clips = drawn()
        found[name] = {
            "psnr": psnr(clips, dense),
            "ssim": ssim(clips, dense),
            "relative error": relative_error(clips, dense),
            "density": installed.report().density("prefill"),
        }
    return {"ways": found, "premise": _premise(trace, settings), "host": {"training loss": painter.loss}}


def _methods(settings: dict[str, Any], model: DiffusionTransformer, seed: int) -> dict[str, StepwiseAttention]:
    """Name → method, all dense for the same first steps and of about the same density afterwards."""
    block, words, searches = settings["block"], model.text_tokens, tuple(settings["searches"])
    own: dict[str, Any] = {"sparsity": settings["sparsity"], "block_size": block}
    density = 1 - settings["sparsity"]
    keep = blocks_for(density, -(-model.tokens // block))
    dense = range(searches[0])
    frames, place = model.grid[0], model.grid[1] * model.grid[2]
    text = slice(0, words)
    windows = (
        WindowMask(model.tokens, round(density * frames * place / 2), 1, text),
        WindowMask(model.tokens, round(density * place / 2), frames, text),
    )
    tiles = tile_order(model.grid, (2, 4, 2), words)
    return {
        OURS: AdaSpa(**own, search_steps=searches),
        ALIKE: AdaSpa(**own, search_steps=searches, head_adaptive=False),
        "AdaSpa, one search": AdaSpa(**own, search_steps=searches[:1]),
        "AdaSpa, rows free": AdaSpa(**own, search_steps=searches, row_wise=False),
        "AdaSpa, tiles": AdaSpa(**own, search_steps=searches, reorder=tiles),
        "exact search at every step": ChosenMask(choose=top_mass(keep, block, words), dense_at=dense),
        RIVALS[0]: HeadChoice(windows=windows, dense_at=dense),
        RIVALS[1]: ChosenMask(choose=pooled(keep, block, words), dense_at=dense),
        RIVALS[2]: ChosenMask(choose=at_random(keep, block, seed, words), dense_at=dense),
    }


def _premise(trace: PatternTrace, settings: dict[str, Any]) -> dict[str, float]:
    """Similarity of patterns and of log-sum-exps between the two search steps, heads, and inputs."""
    share, apart = 1 - settings["sparsity"], settings["searches"][1] - settings["searches"][0]
    return {
        "overlap between the searches": trace.between_steps(share, apart),
        "overlap between successive steps": trace.between_steps(share),
        "overlap between heads": trace.between_heads(share),
        "overlap between inputs": trace.between_inputs(share),
        "log-sum-exps, correlation between the searches": trace.sum_correlation(apart),
        "log-sum-exps, correlation between heads": trace.sum_correlation(across="heads"),
        "log-sum-exps, correlation between inputs": trace.sum_correlation(across="inputs"),
    }


def decide(observations: list[Observation]) -> Verdict:
    """Decibels to the dense sample, paired by seed, and the premise."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {f"{OURS} − {rival}, dB": gap(observations, "ways", OURS, rival, "psnr") for rival in RIVALS}
    levels = [row["ways"][OURS]["psnr"] - row["ways"][ALIKE]["psnr"] + _NOISE for row in observations]
    needed[f"{OURS} − heads alike + {_NOISE} dB"] = mean_interval(levels)
    premises = [row["premise"] for row in observations]
    needed["overlap between the searches − between heads"] = mean_interval(
        [row["overlap between the searches"] - row["overlap between heads"] for row in premises]
    )
    told = {**means(observations, "ways")}
    for part in ("premise", "host"):
        for name in observations[0][part]:
            told[name] = sum(row[part][name] for row in observations) / len(observations)
    told[f"{OURS} − exact search at every step, dB"] = gap(
        observations, "ways", OURS, "exact search at every step", "psnr"
    )
    told["expected cost of attention"] = AdaSpa().expected_cost(50)
    return judged(needed, told, "two searches beat windows, estimates and chance, and patterns outlast the steps")


experiment = Experiment(
    slug="adaspa",
    claim=(
        "In a video diffusion transformer, block patterns found exactly at two of fifty steps, with three levels of "
        "sparsity for heads, keep clips nearer to those of dense attention than windows chosen by head, pooled "
        "estimates or random blocks do at a sparsity of 0.8, because patterns hardly change over the steps."
    ),
    rule=(
        "holds if, at 95 % over seeds, PSNR to the dense clips of AdaSpa is above that of windows chosen by head, of "
        "pooled estimates made at every step and of random blocks, at most half a decibel below that of AdaSpa with "
        "heads alike, and patterns at the two searches overlap more than those of different heads; does not hold if "
        "one of these is wholly reversed. The exact search at every step, one search, free rows, tiles, SSIM and "
        "log-sum-exps are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
)
