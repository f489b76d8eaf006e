"""Matching-pursuit autoencoders: concepts that form a tree are found however alike siblings are.

Trees of concepts with siblings more and more alike, as in the authors' benchmark; and the activations of a language
model, where more steps than in training should go on lowering the error. Reported besides: which features pictures and
their names share in a space that was learned by contrast.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.features.activation_rules import MutualChoice, ReLU
from gossamer.features.concept_tree import ConceptTree
from gossamer.features.dictionary_metrics import (
    absorption,
    babel,
    co_selected_babel,
    interference,
    modalities,
    recovery,
)
from gossamer.features.losses import unexplained_variance
from gossamer.features.matching_pursuit import MatchingPursuitSAE
from gossamer.features.sae import SAE
from gossamer.papers.emoji import contrastive_embeddings
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.feature_contest import (
    BATCH_TOPK,
    MATRYOSHKA,
    PURSUIT,
    RELU,
    TOPK,
    Contender,
    compared,
    contender,
    trained,
)
from gossamer.papers.language_features import LanguageFeatures, Source, language_features
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

FOUND = 0.95  # cosine of a true direction with the learned one
SAME = 0.05  # of a cosine that counts as none
STEEP = 0.5  # cosine of siblings from which on a linear encoder should fail
TOLERANCE = 0.05  # as in the authors' benchmark

QUICK: dict[str, Any] = {
    "cosines": [0.0, 0.6, 0.9],
    "tree_training": {"steps": 1500, "batch_size": 200, "learning_rate": 3e-2, "dead_after": 20_000},
    "sparsity": 0.05,
    "held_out": 4096,
    "source": {"documents": 256, "held_out": 24},
    "k": 16,
    "real_training": {
        "features": 1024,
        "steps": 150,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "dead_after": 20_000,
        "documents": 2,
    },
    "co_selected": 512,
    "towers": {"size": 64, "width": 24, "steps": 400, "batch": 256, "rate": 3e-3},
    "kinds_k": 8,
    "kinds_training": {"features": 256, "steps": 400, "batch_size": 512, "learning_rate": 3e-3, "dead_after": 20_000},
}
FULL: dict[str, Any] = {
    **QUICK,
    "cosines": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "tree_training": {"steps": 15_000, "batch_size": 200, "learning_rate": 3e-2, "dead_after": 20_000},
    "source": {"documents": 800, "held_out": 64},
    "k": 32,
    "real_training": {
        "features": 8192,
        "steps": 5000,
        "batch_size": 4096,
        "learning_rate": 3e-4,
        "dead_after": 1_000_000,
        "documents": 64,
    },
    "co_selected": 4096,
    "towers": {"size": 128, "width": 64, "steps": 5000, "batch": 512, "rate": 2e-3},
    "kinds_training": {"features": 2048, "steps": 5000, "batch_size": 2048, "learning_rate": 1e-3, "dead_after": 10**6},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Trees, and the activations of a model."""
    trees = {
        f"{cosine}": _tree(ConceptTree(child_cosine=cosine, seed=seed), settings, seed)
        for cosine in progress(settings["cosines"], "trees")
    }
    features = language_features(Source(**settings["source"]))
    plan, k = settings["real_training"], settings["k"]
    entries = {
        rule: contender(rule, k, plan["steps"], plan["features"]) for rule in (PURSUIT, TOPK, BATCH_TOPK, MATRYOSHKA)
    }
    learners, marks = compared(features, entries, plan, seed)
    for name, learner in learners.items():
        marks[name] |= _coherence(learner.sae, features, settings["co_selected"])
    curves = {
        name: {"x": settings["cosines"], "y": [trees[f"{cosine}"][name]["children"] for cosine in settings["cosines"]]}
        for name in (PURSUIT, BATCH_TOPK, MATRYOSHKA, RELU)
    }
    return {
        "trees": trees,
        "real": marks,
        "steps": _steps(learners, features, k),
        "kinds": _kinds(settings, seed),
        "curves": curves,
    }


def _tree(tree: ConceptTree, settings: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    size = tree.size
    # as in the authors' benchmark: twenty features for twenty concepts, and their optimiser
    optimiser = {
        "betas": (0.5, 0.9375),
        "clip": 1.0,
        "warmup": 0.04,
        "cooldown": 0.2,
        "final_rate": 0.1,
        "auxiliary_k": size // 2,
    }
    plan = {**settings["tree_training"], "features": size}
    pursuit = {**optimiser, "auxiliary": "none", "resample_every": max(1, plan["steps"] // 10)}
    nested = tuple(max(1, size * part // 5) for part in range(1, 5))
    entries = {
        PURSUIT: Contender(
            lambda d, f, s: MatchingPursuitSAE(d, f, 6, TOLERANCE, bias=False, stop_on_repeat=True, seed=s), pursuit
        ),
        BATCH_TOPK: Contender(lambda d, f, s: SAE(d, f, MutualChoice(tree.active), s), optimiser),
        MATRYOSHKA: Contender(
            lambda d, f, s: SAE(d, f, MutualChoice(tree.active), s), {**optimiser, "prefixes": nested}
        ),
        RELU: Contender(lambda d, f, s: SAE(d, f, ReLU(), s), {**optimiser, "sparsity": settings["sparsity"]}),
    }

    def batches(begin: int) -> Any:
        while True:
            yield tree.sample(plan["batch_size"], generator_for("concepts", seed * 1_000_003 + begin))[0]
            begin += 1

    learners = trained(entries, batches, size, plan, seed)
    x, _ = tree.sample(settings["held_out"], generator_for("held-out concepts", seed))
    return {name: _tree_marks(tree, learner.sae.eval(), x) for name, learner in learners.items()}


@torch.no_grad()
def _tree_marks(tree: ConceptTree, sae: SAE, x: Tensor) -> dict[str, float]:
    truth, parents = tree.directions(), tree.parent_of
    found = recovery(sae.decoder, truth).cosine
    codes = sae.encode(x)
    return {
        "children": float(found[parents >= 0].mean()),
        "parents": float(found[: tree.parents].mean()),
        "leaves": float(found[tree.parents : tree.parents + tree.leaves].mean()),
        "absorbed": float(absorption(sae.decoder, truth, parents).mean()),
        "interference": interference(sae.decoder, truth),
        "unexplained": float(unexplained_variance(sae.decode(codes), x)),
        "active": float((codes.values > 0).sum()) / len(x),
        "coherence": float(babel(sae.decoder, 1)[0]),
        "coherence of co-selected": float(co_selected_babel(codes[:512], sae.decoder).max()),
    }


@torch.no_grad()
def _coherence(sae: SAE, features: LanguageFeatures, tokens: int) -> dict[str, float]:
    codes = sae.encode(features.held_out[:tokens])
    whole = babel(sae.decoder, 15)
    together = co_selected_babel(codes, sae.decoder)
    return {
        "coherence": float(whole[0]),
        "Babel function at 15": float(whole[14]),
        "Babel function of co-selected, mean": float(together.mean()),
    }


@torch.no_grad()
def _steps(learners: dict[str, Any], features: LanguageFeatures, k: int) -> dict[str, list[float]]:
    """What pursuit leaves unexplained after every number of steps up to three times k, and TopK forced to some k."""
    x = features.held_out[:2048]
    sae = learners[PURSUIT].sae
    assert isinstance(sae, MatchingPursuitSAE)
    after = [float(unexplained_variance(output, x)) for output in sae.path(x, range(1, 3 * k + 1))]
    plain = learners[TOPK].sae
    wanted, forced = [k // 4, k // 2, k, 2 * k, 3 * k], []
    for number in wanted:
        plain.activation.k = number
        forced.append(float(unexplained_variance(plain(x).output, x)))
    plain.activation.k = k
    return {"pursuit": after, "forced k": [float(number) for number in wanted], "TopK": forced}


def _kinds(settings: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """Dictionaries of pictures and names in one space: which features both have, on names that were not seen."""
    space = contrastive_embeddings(settings["towers"], seed)
    seen = space.held_out.logical_not()
    x, plan, k = torch.cat([space.images[seen], space.texts[seen]]), settings["kinds_training"], settings["kinds_k"]

    def batches(begin: int) -> Any:
        while True:
            rows = generator_for("pictures and names", seed * 1_000_003 + begin)
            yield x[torch.randint(len(x), (plan["batch_size"],), generator=rows)]
            begin += 1

    entries = {
        rule: contender(rule, k, plan["steps"], plan["features"]) for rule in (PURSUIT, TOPK, BATCH_TOPK, MATRYOSHKA)
    }
    learners = trained(entries, batches, x.shape[1], plan, seed)
    images, texts = space.images[space.held_out], space.texts[space.held_out]
    both, is_image = torch.cat([images, texts]), torch.arange(2 * len(images)) < len(images)
    marks = {name: _shared(learner.sae.eval(), both, is_image) for name, learner in learners.items()}
    return {**marks, "space": {"names found among the nearest five": space.retrieved}}


@torch.no_grad()
def _shared(sae: SAE, x: Tensor, is_image: Tensor) -> dict[str, float]:
    codes = sae.encode(x)
    found = modalities(codes, is_image)
    alive = (found.first + found.second) > 0
    return {
        "shared features": float(found.shared),
        "of so many alive": float(alive.sum()),
        "modality score": float(found.score[alive].mean()),
        "unexplained": float(unexplained_variance(sae.decode(codes), x)),
        "active": float((codes.values > 0).sum()) / len(x),
    }


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Cosines by seed, and errors after every step."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    cosines = list(observations[0]["trees"])
    steep = [cosine for cosine in cosines if float(cosine) > STEEP]
    rivals = [name for name in observations[0]["trees"][cosines[0]] if name != PURSUIT]
    needed: dict[str, Interval] = {}
    for level in ("children", "parents"):
        needed[f"{level} found by matching pursuit where siblings are alike − {FOUND}"] = mean_interval(
            [_mean(row, steep, PURSUIT, level) - FOUND for row in observations]
        )
    for rival in rivals:
        needed[f"children where siblings are alike, above {rival}"] = mean_interval(
            [_mean(row, steep, PURSUIT, "children") - _mean(row, steep, rival, "children") for row in observations]
        )
        if rival != RELU:
            needed[f"{SAME} − children where siblings are orthogonal, above {rival}"] = mean_interval(
                [SAME - _gap(row, cosines[0], rival) for row in observations]
            )
    numbers: dict[str, Interval | float] = {**needed}
    rising = sum(after >= before for row in observations for before, after in pairwise(row["steps"]["pursuit"]))
    numbers["steps after which the error was not lower"] = float(rising)
    for step in (1, len(observations[0]["steps"]["pursuit"]) // 3, len(observations[0]["steps"]["pursuit"])):
        values = [row["steps"]["pursuit"][step - 1] for row in observations]
        numbers[f"unexplained after {step} steps"] = sum(values) / len(values)
    for place, number in enumerate(observations[0]["steps"]["forced k"]):
        values = [row["steps"]["TopK"][place] for row in observations]
        numbers[f"unexplained by TopK forced to k={number:g}"] = sum(values) / len(values)
    tables = {f"siblings {cosine}": [row["trees"][cosine] for row in observations] for cosine in cosines}
    tables |= {part: [row[part] for row in observations] for part in ("real", "kinds")}
    for part, rows in tables.items():
        for name in rows[0]:
            for mark in rows[0][name]:
                numbers[f"{part}, {name}: {mark}"] = sum(row[name][mark] for row in rows) / len(rows)
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong or rising:
        why = wrong or ["a further step did not lower the error"]
        return Verdict("does not hold", f"reversed: {'; '.join(why)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "nested concepts are found where siblings are alike, and every step lowers the error", numbers
    )


def _mean(row: Observation, cosines: list[str], name: str, level: str) -> float:
    return sum(row["trees"][cosine][name][level] for cosine in cosines) / len(cosines)


def _gap(row: Observation, cosine: str, rival: str) -> float:
    marks = row["trees"][cosine]
    return marks[PURSUIT]["children"] - marks[rival]["children"]


experiment = Experiment(
    slug="mp-sae",
    claim=(
        "An autoencoder that encodes by matching pursuit finds concepts that form a tree where siblings are alike "
        "and linear encoders do not, is no different where they are orthogonal, and goes on lowering its error with "
        "more steps than it was trained with."
    ),
    rule=(
        "holds if, at 95 % over seeds, with sibling cosines above 0.5 the directions of children and of parents are "
        "found with a cosine above 0.95, those of children better than by BatchTopK, Matryoshka and ReLU; with "
        "orthogonal siblings by less than 0.05 better than BatchTopK and Matryoshka; and on a language model every "
        "step up to three times those of training lowers the error; does not hold if one of these is wholly "
        "reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="cosine of siblings",
    y_label="cosine of children found",
)
