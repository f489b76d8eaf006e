"""Re-ttention's claim: small windows suffice if the softmax keeps its denominator and the rest of its output.

A small diffusion transformer learns to draw handwritten digits and samples them in 20 steps, of which the first five
and every fifth afterwards are full. At all others it reads a band of the tokens: plainly, with the cached rest of the
output, with the cached share of the denominator, or with both, which is the method. What every way draws is compared
with what full attention draws from the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.base import Answer
from gossamer.attention.local_windows import WindowMask
from gossamer.attention.pattern_trace import correlation
from gossamer.attention.re_ttention import Rettention, distribution_shift, softmax_share
from gossamer.attention.state import StepwiseAttention
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.diffusion_transformer import DDIMSampler
from gossamer.papers.denoising_contest import (
    ChosenMask,
    HeadChoice,
    at_random,
    blocks_for,
    features_of,
    frechet,
    gap,
    judged,
    means,
    pooled,
    psnr,
    relative_error,
    ssim,
)
from gossamer.papers.denoising_hosts import Painter, train_painter
from gossamer.papers.digits import Digits, pretrain_body
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

BOTH, RATIO, RESIDUAL, PLAIN = "Re-ttention", "ratio only", "residual only", "plain window"
_WAYS = {BOTH: (True, True), RATIO: (True, False), RESIDUAL: (False, True), PLAIN: (False, False)}
_STEADY = 0.9  # correlation that counts as "hardly changes"
_BLOCK = 8

QUICK: dict[str, Any] = {
    "host": {
        "frames": None,
        "patch": 2,
        "layers": 3,
        "width": 64,
        "heads": 4,
        "text": 4,
        "steps": 260,
        "batch": 12,
        "learning_rate": 3e-3,
    },
    "steps": 20,
    "pictures": 10,
    "guidance": 2.0,
    "widths": [32, 16, 8],
    "rivals_at": 16,
    "classifier_steps": 150,
}
FULL: dict[str, Any] = {
    **QUICK,
    "host": {**QUICK["host"], "layers": 6, "width": 192, "heads": 6, "steps": 20_000, "batch": 64},
    "pictures": 256,
    "classifier_steps": 1500,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train the host, draw with full attention, and with every way to read less."""
    painter = train_painter(settings["host"], seed)
    studio = Studio(settings, painter, seed)
    trace = ShareTrace(mask=WindowMask.keeping(1 / settings["rivals_at"], painter.model.tokens, 1, studio.text))
    with trace.active(painter.model):
        dense = studio.drawn()
    score = Score(studio, dense, _classifier(painter, settings, seed))
    runs = {f"{way} at 1/{width}": (way, width) for width in settings["widths"] for way in _WAYS}
    found: dict[str, dict[str, float]] = {}
    for name in progress([*runs, *_RIVALS], "drawing"):
        if name in runs:
            way, width = runs[name]
            ratio, residual = _WAYS[way]
            found[name] = score.of(Rettention(keep=1 / width, ratio=ratio, residual=residual))
        else:
            found[name] = score.of(_rival(name, settings, studio, seed))
    curves = {
        way: {
            "x": [1 / w for w in settings["widths"]],
            "y": [found[f"{way} at 1/{w}"]["psnr"] for w in settings["widths"]],
        }
        for way in _WAYS
    }
    host = {"training loss": painter.loss, "frechet of dense to real": score.real}
    return {"ways": found, "premise": trace.summary(), "host": host, "curves": curves}


@dataclass
class Studio:
    """A painter at work on the same noise and labels, whatever reads its tokens."""

    settings: dict[str, Any]
    painter: Painter
    seed: int

    @property
    def text(self) -> slice:
        """Where the text tokens are."""
        return slice(0, self.painter.model.text_tokens)

    def drawn(self) -> Tensor:
        """Pictures of all digits in turn."""
        labels = torch.arange(self.settings["pictures"]) % self.painter.model.classes
        sampler = DDIMSampler(self.painter.model, self.settings["steps"], self.settings["guidance"])
        return sampler.sample(labels, torch.Generator().manual_seed(self.seed))


class Score:
    """Distances of pictures from those of full attention."""

    def __init__(self, studio: Studio, dense: Tensor, body: torch.nn.Module):
        self.studio, self.dense, self.body = studio, dense, body
        self.features = features_of(body, dense)
        real = features_of(body, studio.painter.held_out[0][: 4 * len(dense)])
        self.real = frechet(self.features, real)

    def of(self, method: StepwiseAttention) -> dict[str, float]:
        """What a method draws, measured."""
        with method.active(self.studio.painter.model) as installed:
            pictures = self.studio.drawn()
        return {
            "psnr": psnr(pictures, self.dense),
            "ssim": ssim(pictures, self.dense),
            "relative error": relative_error(pictures, self.dense),
            "frechet": frechet(features_of(self.body, pictures), self.features),
            "density": installed.report().density("prefill"),
        }


@dataclass(kw_only=True)
class ShareTrace(StepwiseAttention):
    """Full attention that measures the share of the denominator under a mask at every step."""

    mask: WindowMask
    shares: dict[tuple[int, int], Tensor] = field(init=False, repr=False, default_factory=dict)

    def mix(self, call: AttentionCall) -> Answer | None:
        """Full, and measured."""
        share = softmax_share(call.query, call.key, self.mask, scale=call.scale)
        self.shares[self.cache.index, call.layer] = share.clamp(min=1e-6)
        return None

    def summary(self) -> dict[str, float]:
        """Correlation of successive shares, their drift, and how far weights are from full ones with and without."""
        rule = Rettention()
        steps, correlations, drifts, plain, scaled = self.cache.steps, [], [], [], []
        for (index, layer), share in self.shares.items():
            later = self.shares.get((index + 1, layer))
            if later is not None:
                correlations.append(correlation(share, later).mean())
                drifts.append((later - share).mean())
            if rule.kind(index, steps) == "sparse":
                back = 1 + (index - rule.dense_until(steps)) % rule.refresh_every - 1
                used = (self.shares[index - back, layer] + rule.drift * (back - 1)).clamp(max=1)
                plain.append(distribution_shift(torch.ones(()), share).mean())
                scaled.append(distribution_shift(used, share).mean())
        parts = {"correlation": correlations, "drift": drifts, "shift, plain": plain, "shift, scaled": scaled}
        return {name: float(torch.stack(values).double().mean()) for name, values in parts.items()}


_RIVALS = ("pooled estimate", "head choice", "random blocks")


def _rival(name: str, settings: dict[str, Any], studio: Studio, seed: int) -> StepwiseAttention:
    """Rivals, full at the same steps; blocks and windows of about the same density."""
    rule, steps, n = Rettention(), settings["steps"], studio.painter.model.tokens
    full = frozenset(index for index in range(steps) if rule.kind(index, steps) != "sparse")
    share, words = 1 / settings["rivals_at"], studio.painter.model.text_tokens
    band = WindowMask.keeping(share, n, 1, studio.text)
    if name == "head choice":
        rows = studio.painter.model.grid[1]
        column = WindowMask.keeping(max(share, 1 / rows), n, rows, studio.text)
        return HeadChoice(windows=(band, column), dense_at=full)
    keep = blocks_for(band.density, -(-n // _BLOCK))
    choose = pooled(keep, _BLOCK, words) if name == "pooled estimate" else at_random(keep, _BLOCK, seed, words)
    return ChosenMask(choose=choose, dense_at=full)


def _classifier(painter: Painter, settings: dict[str, Any], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    pictures, labels = painter.training
    return pretrain_body(
        Digits(((pictures[..., 2:-2, 2:-2] + 0.5) / 2), labels), "supervised", settings["classifier_steps"], 64, 2e-3
    ).eval()


def decide(observations: list[Observation]) -> Verdict:
    """Decibels to the full sample, means over window widths, paired by seed; and the premise."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {f"{BOTH} − {way}, dB": _over_widths(observations, way) for way in (PLAIN, RESIDUAL, RATIO)}
    for rival in ("pooled estimate", "head choice"):
        needed[f"{BOTH} − {rival} at 1/16, dB"] = gap(observations, "ways", f"{BOTH} at 1/16", rival, "psnr")
    correlations = [row["premise"]["correlation"] for row in observations]
    needed[f"correlation of successive shares − {_STEADY}"] = mean_interval([c - _STEADY for c in correlations])
    told = {**means(observations, "ways")}
    for part in ("premise", "host"):
        for name in observations[0][part]:
            told[name] = sum(row[part][name] for row in observations) / len(observations)
    return judged(needed, told, "share and rest together come nearest to full attention, and shares hardly change")


def _over_widths(observations: list[Observation], way: str) -> Interval:
    found = []
    for row in observations:
        widths = [name.rpartition(" at ")[2] for name in row["ways"] if name.startswith(f"{BOTH} at ")]
        gaps = [row["ways"][f"{BOTH} at {w}"]["psnr"] - row["ways"][f"{way} at {w}"]["psnr"] for w in widths]
        found.append(sum(gaps) / len(gaps))
    return mean_interval(found)


experiment = Experiment(
    slug="re-ttention",
    claim=(
        "With static windows of a few percent of the tokens a diffusion transformer draws almost what it draws with "
        "full attention, if weights are multiplied by the cached share of the denominator and the cached rest of the "
        "output is added; windows without either, or chosen by head or by block, come less near."
    ),
    rule=(
        "holds if, at 95 % over seeds, the pictures of Re-ttention are nearer to those of full attention (PSNR, mean "
        "over windows of 1/32, 1/16 and 1/8) than those of plain windows, of the residual alone and of the ratio "
        "alone, at 1/16 nearer than those of pooled block estimates and of a choice by head, and the shares of "
        "successive steps correlate above 0.9; does not hold if one of these is wholly reversed. All ways are full at "
        "the same steps. SSIM, relative error, the Fréchet distance of a classifier's features, densities and the "
        "shift of the weights are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of the tokens in the window",
    y_label="PSNR to full attention, dB",
)
