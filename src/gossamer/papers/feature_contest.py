"""Rules of selection side by side on the same activations: trained on one stream, judged on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.features.activation_rules import GradientTopK, JumpReLU, MutualChoice, ReLU, TopK
from gossamer.features.losses import unexplained_variance
from gossamer.features.matching_pursuit import MatchingPursuitSAE
from gossamer.features.phased_choice import PhasedChoice
from gossamer.features.sae import SAE
from gossamer.features.training import Batches, Learner, TrainingSettings, train
from gossamer.papers.language_features import LanguageFeatures

SWITCH = 0.8  # share of the steps after which features choose

TOPK, BATCH_TOPK, MUTUAL, FEATURE = "TopK", "BatchTopK", "mutual choice", "feature choice"
MATRYOSHKA, GRADIENT, PURSUIT, RELU, JUMP = "Matryoshka", "gradient TopK", "matching pursuit", "ReLU + L1", "JumpReLU"


@dataclass(frozen=True)
class Contender:
    """How one autoencoder is made and trained.

    Attributes
    ----------
    make
        From the size of an activation, the number of features, and a seed.
    training
        Settings that differ from those of all.
    """

    make: Callable[[int, int, int], SAE]
    training: dict[str, Any] = field(default_factory=dict)


def contender(rule: str, k: float, steps: int, features: int, sparsity: float = 0.0) -> Contender:
    """One of the rules by name, with the auxiliary loss that belongs to it.

    Parameters
    ----------
    rule
        One of the names of this module.
    k
        Features of a token; rules with a penalty look at `sparsity` instead.
    steps, features
        Of training, and of the dictionary.
    sparsity
        Weight of the penalty.
    """

    def plain(make_rule: Callable[[], Any], **training: Any) -> Contender:
        return Contender(lambda d, f, seed: SAE(d, f, make_rule(), seed), training)

    memory = min(0.99, 1 - 10 / max(steps, 11))  # a short training must not remember its beginning
    match rule:
        case "TopK":
            return plain(lambda: TopK(int(k)))
        case "BatchTopK":
            return plain(lambda: MutualChoice(k, memory))
        case "Matryoshka":
            return plain(lambda: MutualChoice(k, memory), prefixes=(features // 8, features // 4, features // 2))
        case "mutual choice":
            return plain(lambda: MutualChoice(k, memory), auxiliary="zipf")
        case "feature choice":
            switch = max(1, round(SWITCH * steps))
            return plain(lambda: PhasedChoice(int(k), switch, memory), auxiliary="zipf")
        case "gradient TopK":
            return plain(lambda: GradientTopK(int(k)))
        case "matching pursuit":
            extra = {"auxiliary": "none", "resample_every": max(1, steps // 5)}
            return Contender(lambda d, f, seed: MatchingPursuitSAE(d, f, int(k), seed=seed), extra)
        case "ReLU + L1":
            return plain(ReLU, sparsity=sparsity)
        case _:
            return plain(lambda: JumpReLU(0.5, 0.5), sparsity=sparsity)


def trained(
    contenders: Mapping[str, Contender], batches: Batches, d: int, settings: Mapping[str, Any], seed: int
) -> dict[str, Learner]:
    """Train all contenders on the same batches: ``features``, ``steps``, ``batch_size``, ``learning_rate``."""
    saes = {name: one.make(d, settings["features"], seed) for name, one in contenders.items()}
    common = {
        **{key: settings[key] for key in ("steps", "batch_size", "learning_rate")},
        "dead_after": settings["dead_after"],
        "memory": 0.99,
        "warmup": 0.05,
        "seed": seed,
    }
    plans = {name: TrainingSettings(**{**common, **one.training}) for name, one in contenders.items()}
    return train(saes, batches, plans, progress=False)


@torch.no_grad()
def judged(sae: SAE, x: Tensor, batch: int = 1024) -> dict[str, float]:
    """Held-out activations: ``unexplained``, ``active`` features of a token, and the share that is ``dead``, never so.

    Tokens are explained each by itself; to see that, some are explained again in another batch.
    """
    sae.eval()
    codes = type(sae.encode(x[:1])).cat([sae.encode(part) for part in x.split(batch)])
    output = sae.decode(codes)
    again = sae.decode(sae.encode(x[7:19]))
    apart = float((again - output[7:19]).abs().max() / output.abs().max())
    active = codes.values > 0
    fired = torch.bincount(codes.indices[active].long(), minlength=codes.width)
    return {
        "unexplained": float(unexplained_variance(output, x)),
        "active": float(active.sum()) / len(x),
        "dead": float((fired == 0).float().mean()),
        "depends on its batch": apart,
    }


def compared(
    features: LanguageFeatures,
    contenders: Mapping[str, Contender],
    settings: Mapping[str, Any],
    seed: int,
    gradients: bool = False,
) -> tuple[dict[str, Learner], dict[str, dict[str, float]]]:
    """Train on captured activations; marks on held-out ones and, with ``documents`` of them, in the model."""
    store = features.training
    draw = store.batches_with_gradients if gradients else store.batches
    learners = trained(
        contenders, lambda begin: draw(settings["batch_size"], seed, begin), features.d_in, settings, seed
    )
    saes = {name: learner.sae for name, learner in learners.items()}
    marks = {name: judged(sae, features.held_out[:]) for name, sae in saes.items()}
    for name, report in features.splice(saes, settings["documents"]).items():
        marks[name] |= {
            "recovered": report.recovered,
            "loss added": report.spliced - report.dense,
            "divergence": report.divergence,
            "silent in training": float(learners[name].dead.float().mean()),
        }
    return learners, marks
