"""Sparsing law: a measure of activation sparsity on a pretrained model, and how it moves while small models train.

The first part compares three ways to spend one percent of perplexity on a language model. The second trains byte-level
transformers on Python source with ReLU and with SiLU gates, at a constant learning rate after the warm-up, so that a
checkpoint is a model of its amount of data and not of its place in a schedule; and others of nearly equal size but
other proportions, and of other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from gossamer.activations.sparsing_law import fit_sparsing_law, ppl_p_sparsity
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import mean_interval, paired_difference

_METRICS = ("cett", "top-k", "fat")


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both parts."""
    contest = Contest.of(settings, seed)
    tokens = list(contest.held_out.split(settings["window"], dim=1))
    metrics = {}
    for metric in progress(_METRICS, "one percent of perplexity"):
        found = ppl_p_sparsity(
            contest.model, tokens, 1.0, metric=metric, sampled=settings["sampled"], tolerance=0.003, progress=False
        )
        metrics[metric] = {"sparsity": found.sparsity, "ratio": found.ratio, "setting": found.setting}
    del contest
    text = _Text(settings, seed)
    curves = {}
    for gate in progress(("relu", "silu"), "training with two gates"):
        curves[gate] = text.curve(settings["shape"], gate, settings["steps"], settings["checkpoints"])
    shapes = [*settings["shapes"], *settings["sizes"]]
    ends = []
    for shape in progress(shapes, "proportions and sizes"):
        point = text.curve(shape, "relu", settings["short steps"], 1)
        ends.append({"layers": shape[0], "width": shape[1], "ratio": point["y"][-1], "weights": point["weights"]})
    count = len(settings["shapes"])
    laws = {gate: _fits(curve) for gate, curve in curves.items()}
    return {
        "metrics": metrics,
        "laws": laws,
        "shapes": ends[:count],
        "sizes": ends[count:],
        "curves": {f"{gate} gates": {"x": c["x"], "y": c["y"]} for gate, c in curves.items()},
    }


class _Text:
    """Bytes to train and to judge on."""

    def __init__(self, settings: dict[str, Any], seed: int):
        self.length, self.batch, self.rate, self.seed = (
            *(settings[k] for k in ("length", "batch", "learning_rate")),
            seed,
        )
        source = python_source(settings["size"], 8, 8, self.length, 2, seed)
        cut = settings["judged"] * self.length
        self.text, self.held_out = source.text[:-cut], source.text[-cut:].view(-1, self.length)

    def curve(self, shape: Sequence[int], gate: str, steps: int, checkpoints: int) -> dict[str, Any]:
        """Activation ratio at 1% of perplexity over bytes of training, at checkpoints evenly spaced in logarithm."""
        model = self._model(shape, gate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.1, fused=True)
        warm = max(8, steps // 50)
        # the law is about models that have learnt something: at first everything can go, since nothing does anything
        spaced = np.geomspace(steps // 8, steps, checkpoints).round().astype(int).tolist()
        kept = {steps} if checkpoints == 1 else set(spaced)
        generator = torch.Generator().manual_seed(self.seed)
        amounts, ratios, losses = [], [], []
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, step / warm)
            places = torch.randint(len(self.text) - self.length, (self.batch, 1), generator=generator)
            ids = self.text[places + torch.arange(self.length)]
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step in kept:
                amounts.append(step * self.batch * self.length)
                found = ppl_p_sparsity(model.eval(), list(self.held_out.split(8)), 1.0, tolerance=0.01, progress=False)
                ratios.append(found.activation_ratio)
                losses.append(_loss(model, self.held_out))
                model.train()
        weights = sum(p.numel() for n, p in model.named_parameters() if "layers" in n)
        return {"x": amounts, "y": ratios, "loss": losses, "weights": weights}

    def _model(self, shape: Sequence[int], gate: str) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, width = shape
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=5 * width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=self.length,
            hidden_act=gate,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)


@torch.no_grad()
def _loss(model: Any, sequences: Tensor) -> float:
    return float(model(input_ids=sequences, labels=sequences).loss)


def _fits(curve: dict[str, Any]) -> dict[str, Any]:
    """Slope over the logarithm of the data, and criteria of both laws and of a constant."""
    slope = float(np.polyfit(np.log10(curve["x"]), curve["y"], 1)[0])
    fits = {form: fit_sparsing_law(curve["x"], curve["y"], form) for form in ("relu", "silu", "constant")}
    return {
        "slope": slope,
        "aic": {form: law.aic for form, law in fits.items()},
        "limit": {form: law.limit for form, law in fits.items()},
    }


def decide(observations: Sequence[Observation]) -> Verdict:
    """The metric against its rivals, the signs of both slopes, and the effects of proportions and of size."""
    sparsity = {m: [o["metrics"][m]["sparsity"] for o in observations] for m in _METRICS}
    rivals = {m: paired_difference(sparsity["cett"], sparsity[m]) for m in ("top-k", "fat")}
    slopes = {g: mean_interval([o["laws"][g]["slope"] for o in observations]) for g in ("relu", "silu")}
    better = {
        g: mean_interval([o["laws"][g]["aic"]["constant"] - o["laws"][g]["aic"][g] for o in observations])
        for g in ("relu", "silu")
    }
    ranks = [
        float(spearmanr([s["width"] / s["layers"] for s in o["shapes"]], [s["ratio"] for s in o["shapes"]])[0])
        for o in observations
    ]
    effects = [
        (max(s["ratio"] for s in o["shapes"]) - min(s["ratio"] for s in o["shapes"]))
        - (max(s["ratio"] for s in o["sizes"]) - min(s["ratio"] for s in o["sizes"]))
        for o in observations
    ]
    numbers: dict[str, Any] = {f"sparsity at 1%, {m}": mean_interval(v) for m, v in sparsity.items()}
    numbers |= {f"sparsity, cett − {m}": gap for m, gap in rivals.items()}
    numbers |= {
        f"realised ratio of perplexity, {m}": sum(o["metrics"][m]["ratio"] for o in observations) / len(observations)
        for m in _METRICS
    }
    numbers |= {f"activation ratio per decade of data, {g}": slope for g, slope in slopes.items()}
    numbers |= {f"AIC of a constant − of the {g} law": gap for g, gap in better.items()}
    numbers["rank correlation of width / depth with the activation ratio"] = sum(ranks) / len(ranks)
    numbers["range over proportions − range over sizes"] = mean_interval(effects)
    held = [
        *(gap.above_zero for gap in rivals.values()),
        slopes["relu"].below_zero,
        slopes["silu"].above_zero,
        *(gap.above_zero for gap in better.values()),
        sum(ranks) > 0,
    ]
    failed = [
        *(gap.below_zero for gap in rivals.values()),
        slopes["relu"].above_zero,
        slopes["silu"].below_zero,
        *(gap.below_zero for gap in better.values()),
    ]
    outcome: Outcome
    if all(held):
        outcome, reason = "holds", "the metric finds most sparsity, and ReLU and SiLU gates move in opposite directions"
    elif any(failed):
        outcome, reason = "does not hold", "a part of the claim is wholly reversed"
    else:
        outcome, reason = "inconclusive", "an interval reaches across zero"
    return Verdict(outcome, reason, numbers)


_QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "tokens": 512,
    "window": 512,
    "length": 128,
    "sampled": 256,
    "size": 1_000_000,
    "judged": 16,
    "batch": 16,
    "learning_rate": 3e-3,
    "shape": [3, 64],
    "steps": 400,
    "checkpoints": 8,
    "short steps": 100,
    "shapes": [[2, 96], [4, 64], [8, 48]],
    "sizes": [[2, 32], [4, 64]],
}
_FULL = {
    **_QUICK,
    "tokens": 8192,
    "sampled": 2048,
    "size": 8_000_000,
    "judged": 64,
    "shape": [6, 128],
    "steps": 6000,
    "checkpoints": 12,
    "short steps": 3000,
    "shapes": [[2, 224], [4, 160], [8, 112], [16, 80]],
    "sizes": [[3, 48], [4, 64], [6, 96], [8, 128]],
}
experiment = Experiment(
    slug="sparsing-law",
    claim=(
        "At one percent of perplexity, thresholds from one tolerance of the truncated output leave most neurons out; "
        "and with more data, models with ReLU gates become sparser and those with SiLU gates denser, deeper and "
        "narrower ones sparser, while size matters little."
    ),
    rule=(
        "holds if, over seeds at 95%, the sparsity at 1% is above that of top-k and of one global threshold, the "
        "activation ratio falls with the logarithm of data for ReLU and rises for SiLU, each law beats a constant by "
        "AIC, and the mean rank correlation of width over depth with the activation ratio is above zero; does not hold "
        "if any of the intervals is wholly on the other side"
    ),
    run=run,
    decide=decide,
    budgets={"quick": _QUICK, "full": _FULL},
    seeds=3,
    x_label="bytes of training",
    y_label="share of active neurons at 1% of perplexity",
    logarithmic=False,
)
