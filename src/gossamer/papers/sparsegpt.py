"""SparseGPT on a pretrained language model: what the weight update is worth, in layer error and in perplexity.

The layer errors of all contenders are taken in one walk, on the inputs that SparseGPT itself sees and over all
calibration tokens, so that nothing but the layer's own weights differs. One of the contenders is the best that any
update could do: for a few rows of every layer, least squares on the weights that SparseGPT kept. Perplexities are of
models pruned block by block with each method.

The update is fitted to the calibration tokens, so it needs more of them than a mask does. With 2,048 tokens, little
more than the 1,536 inputs of the widest layers, it lowers every layer's error on those tokens and still loses to
Wanda at 50 % on another text. The quick budget therefore takes 4,096 tokens, and pays for them by pruning only the
first twelve of the thirty blocks. The full budget prunes all, on 16,384 tokens, and adds sparsities, N:M, the other
baselines, the mask without the update, and pruning to 50 % with 4 bits beside 3 bits alone, which take the same space
if a mask costs a bit a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.core.calibration import Gram, Statistics
from gossamer.core.patterns import Unstructured
from gossamer.core.quantization import Quantizer
from gossamer.core.scores import input_weighted
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target
from gossamer.methods import create
from gossamer.models.blocks import find_stacks
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest, case, gap, mean, perplexity_curves
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, paired_difference
from gossamer.pruning.sparsegpt import SparseGPT

_CASES = [case(method, sparsity) for sparsity in (0.5, 0.7) for method in ("wanda", "sparsegpt")]
_MORE = [case(m, s) for m in ("wanda", "sparsegpt", "magnitude") for s in (0.6, "2:4", "4:8")]
_MORE += [case("magnitude", 0.5), case("magnitude", 0.7), case("dsnot", 0.7), case("sparsegpt", 0.5, update=False)]
_MORE += [case("sparsegpt", 0.5, bits=4), case("sparsegpt", 0.0, bits=3)]
_QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 8,
    "length": 512,
    "tokens": 1024,
    "window": 512,
    "blocks": 12,
    "rows": 64,
    "refitted": 8,
    "cases": _CASES,
}
_HALF = "sparsegpt at 0.5"


@dataclass
class _Compared(SparseGPT):
    """SparseGPT that also notes the errors of other masks and updates on the input of every layer that it prunes."""

    rows: int = 64
    refitted: int = 8
    errors: list[dict[str, float]] = field(default_factory=list, init=False, repr=False)

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:
        dense = target.matrix().float().clone()
        mask = super().prune_layer(target, stats, sparsity)
        if stats is not None:
            gram = stats[Gram].matrix
            norm = gram.diagonal().clamp_min(0).sqrt()
            by_norm = Unstructured("row").select(input_weighted(dense, norm), sparsity)
            by_magnitude = Unstructured("layer").select(dense.abs(), sparsity)
            pruned = {
                "magnitude": dense * by_magnitude,
                "wanda": dense * by_norm,
                "mask only": dense * mask,
                "sparsegpt": target.matrix().float(),
            }
            self.errors.append(layer_errors(dense, pruned, mask, gram, self.rows, self.refitted))
        return mask


def layer_errors(
    dense: Tensor, pruned: dict[str, Tensor], mask: Tensor, gram: Tensor, rows: int, refitted: int
) -> dict[str, float]:
    """Relative output errors ‖(W − Ŵ)X‖ / ‖WX‖ over evenly spaced rows of a layer.

    Parameters
    ----------
    dense
        ``(out, in)`` float32.
    pruned
        Contender → ``(out, in)``.
    mask
        ``(out, in)`` bool: what SparseGPT kept, for the refit.
    gram
        ``(in, in)``: XᵀX.
    rows
        How many rows are measured.
    refitted
        How many rows are refitted by least squares.

    Returns
    -------
    dict
        Contender → error; for ``"refit"`` and the contenders with ``" (refitted rows)"`` only over those rows.
    """
    chosen = torch.linspace(0, len(dense) - 1, min(rows, len(dense))).long()
    few = torch.linspace(0, len(dense) - 1, min(refitted, len(dense))).long()
    errors = {name: _error(dense[chosen], weight[chosen], gram) for name, weight in pruned.items()}
    errors |= {f"{name} (refitted rows)": _error(dense[few], weight[few], gram) for name, weight in pruned.items()}
    refit = torch.stack([_refit(dense[row], mask[row], gram) for row in few])
    return {**errors, "refit": _error(dense[few], refit, gram)}


def _error(dense: Tensor, weight: Tensor, gram: Tensor) -> float:
    change = dense - weight
    return math.sqrt(max(0.0, float((change @ gram * change).sum())) / float((dense @ gram * dense).sum()))


def _refit(dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The weights of one row, zero where not kept, whose output is closest to that of the dense row."""
    index = kept.nonzero().flatten()
    hessian = gram[index][:, index].double()
    hessian.diagonal().add_(1e-6 * hessian.diagonal().mean())  # float32 sums are known to about this
    best = torch.linalg.solve(hessian, (gram[index] @ dense).double())
    return torch.zeros_like(dense).index_put_((index,), best.float())


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Prune with every case, and measure."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    blocks = [f"{name}.*" for stack in find_stacks(contest.model) for name in stack.blocks][: settings["blocks"]]
    compared = _Compared(sparsity=0.5, include=blocks, rows=settings["rows"], refitted=settings["refitted"])
    points = {"dense": {"nll": contest.nll()}}
    for label, method, options in progress(settings["cases"], "pruning and measuring"):
        rounded = {"quantizer": Quantizer(bits=options.pop("bits"))} if "bits" in options else {}
        pruner = compared if label == _HALF else create(method, **options, **rounded, include=blocks)
        points[label] = contest.enter(pruner, windows)
    errors = compared.errors
    mean_errors = {name: sum(layer[name] for layer in errors) / len(errors) for name in errors[0]}
    return {"points": points, "errors": mean_errors, "curves": perplexity_curves(points, settings["cases"])}


def decide(observations: Sequence[Observation]) -> Verdict:
    """Order of the layer errors at 50 %, and the gap to Wanda in log perplexity at 50 % and 70 %."""
    errors = {
        f"error: {worse} − {better}": _error_gap(observations, worse, better)
        for worse, better in (("mask only", "sparsegpt"), ("wanda", "sparsegpt"), ("magnitude", "wanda"))
    }
    at_half = [_behind(o, 0.5) for o in observations]
    at_seventy = [_behind(o, 0.7) for o in observations]
    gaps = {
        "wanda − sparsegpt at 70 %": gap(observations, "wanda at 0.7", "sparsegpt at 0.7"),
        "the gap at 70 % − that at 50 %": paired_difference(at_seventy, at_half),
    }
    numbers: dict[str, Any] = {
        **errors,
        "wanda − sparsegpt at 50 %": gap(observations, "wanda at 0.5", _HALF),
        **gaps,
        "share of the best possible update": sum(map(_share, observations)) / len(observations),
    }
    numbers |= {f"layer error, {name}": _error_mean(observations, name) for name in observations[0]["errors"]}
    labels = observations[0]["points"]
    numbers |= {f"perplexity, {label}": math.exp(mean(observations, label)) for label in labels}
    decisive = [*errors.values(), *gaps.values()]
    outcome: Outcome
    if all(value.above_zero for value in decisive):
        outcome, reason = "holds", "the layer errors are in order, and SparseGPT is ahead of Wanda most at 70 %"
    elif any(value.below_zero for value in decisive):
        outcome, reason = "does not hold", "a layer error is out of order, or the lead over Wanda at 70 % is reversed"
    else:
        outcome, reason = "inconclusive", "an interval includes zero"
    return Verdict(outcome, reason, numbers)


def _error_gap(observations: Sequence[Observation], worse: str, better: str) -> Interval:
    return paired_difference([o["errors"][worse] for o in observations], [o["errors"][better] for o in observations])


def _error_mean(observations: Sequence[Observation], name: str) -> float:
    return sum(o["errors"][name] for o in observations) / len(observations)


def _behind(observation: Observation, sparsity: float) -> float:
    """By how much Wanda's log perplexity is above SparseGPT's."""
    points = observation["points"]
    return points[f"wanda at {sparsity}"]["nll"] - points[f"sparsegpt at {sparsity}"]["nll"]


def _share(observation: Observation) -> float:
    """How much of the error that an update can take from SparseGPT's mask its own update takes."""
    errors = observation["errors"]
    alone, swept = errors["mask only (refitted rows)"], errors["sparsegpt (refitted rows)"]
    return (alone - swept) / (alone - errors["refit"])


experiment = Experiment(
    slug="sparsegpt",
    claim="Updating the remaining weights lowers layer errors below any mask alone, and pays most at high sparsity.",
    rule=(
        "holds if, paired over seeds at 95 %, mean layer error at 50 % is lower for SparseGPT than for its own mask "
        "without update and than for Wanda, and for Wanda than for magnitude, and log perplexity of Wanda minus "
        "SparseGPT is above zero at 70 % and larger there than at 50 %; does not hold if any of these is wholly "
        "reversed"
    ),
    run=run,
    decide=decide,
    budgets={
        "quick": _QUICK,
        "full": {
            **_QUICK,
            "sequences": 32,
            "length": 512,
            "tokens": 16_384,
            "window": 1024,
            "blocks": None,
            "rows": 512,
            "cases": [*_CASES, *_MORE],
        },
    },
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)
