"""The Routing Transformer's claims: tokens routed by content recall what no fixed pattern of the same cost can see.

Small models with half of their heads local learn real text, and to recall what was said somewhere in it. The other
heads read the clusters of online k-means, clusters of random centroids, buckets of random hashes, every so many tokens,
the last few, or everything.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.cluster_attention import SELF_SCORE
from gossamer.attention.routing_transformer import RoutingAttention, balanced_topk_route, update_centroids_after
from gossamer.core.randomness import generator_for
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import python_source
from gossamer.papers.recall_language import CHANCE, Lesson, RecallGPT, attended_pairs, teach
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

ROUTING, STRICT, RANDOM, HASHING = "routing", "strictly causal routing", "random centroids", "hashing"
STRIDED, LOCAL, DENSE = "strided", "local", "dense"

QUICK: dict[str, Any] = {
    "bytes": 1_500_000,
    "length": 256,
    "held_out": 64,
    "pairs": 32,
    "text_batch": 1,
    "batch": 4,
    "steps": 400,
    "learning_rate": 1e-2,
    "width": 64,
    "heads": 2,
    "layers": 1,
    "clusters": 8,
    "local_window": 16,
    "decay": 0.999,
}
FULL: dict[str, Any] = {
    **QUICK,
    "bytes": 8_000_000,
    "length": 1024,
    "held_out": 256,
    "text_batch": 4,
    "batch": 8,
    "steps": 3000,
    "learning_rate": 3e-3,
    "width": 128,
    "heads": 8,
    "layers": 4,
    "clusters": 32,
    "local_window": 64,
}


class LinkedAttention(RoutingAttention):
    """The same layer, but what would be routed reads fixed links, bool ``(n, n)``."""

    def __init__(self, links: Tensor, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        score = torch.zeros(links.shape).masked_fill(torch.eye(len(links), dtype=torch.bool), SELF_SCORE)
        self.register_buffer("bias", score.masked_fill(~links, -math.inf), persistent=False)

    def _route(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, v = self._heads(self.routed_projection(x), 2)
        q = functional.layer_norm(q, q.shape[-1:])
        return functional.scaled_dot_product_attention(q, q, v, self.bias), x.new_zeros(())


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train a model of each kind, and judge it."""
    text = python_source(settings["bytes"], 20, 20, 128, 2, seed=0).text
    lesson = Lesson.of(text, settings)
    found: dict[str, dict[str, Any]] = {}
    looked: dict[str, float] = {}
    kinds = [ROUTING, STRICT, RANDOM, HASHING, STRIDED, LOCAL, DENSE]
    for kind in progress(kinds, "training with heads of each kind"):
        torch.manual_seed(seed)
        layers = [make_attention(kind, settings, seed + 100 * number) for number in range(settings["layers"])]
        model = RecallGPT(settings["width"], settings["length"], layers)
        watch = _Watch(model) if kind in (ROUTING, STRICT) else None
        marks = teach(model, lesson, settings, seed, watch or (lambda optimizer: None))
        found[kind] = asdict(marks)
        if kind == ROUTING and watch is not None:
            looked = {**_look(model, lesson, settings), "drift of centroids, 1 − cosine": watch.drift()}
    curves = {name: {"x": [0.125, 0.375, 0.625, 0.875], "y": marks["by_distance"]} for name, marks in found.items()}
    return {"marks": found, "routing": looked, "keys a query": keys_a_query(settings), "curves": curves}


class _Watch:
    """Lets centroids learn with an optimiser, and remembers where they began."""

    def __init__(self, model: RecallGPT):
        self._kmeans = model.blocks[-1].attention.kmeans
        self._model = model
        self._start: Tensor | None = None

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        update_centroids_after(optimizer, self._model)
        optimizer.register_step_post_hook(self._remember)

    def _remember(self, *ignored: Any) -> None:
        if self._start is None:
            self._start = self._kmeans.means.clone()

    def drift(self) -> float:
        """1 − cosine between where centroids were after the first step and where they are, on average."""
        return 0.0 if self._start is None else float((1 - (self._start * self._kmeans.means).sum(-1)).mean())


def make_attention(kind: str, settings: dict[str, Any], seed: int) -> RoutingAttention:
    """A layer whose second half of heads is of a kind; all read equally many pairs, but for the dense one.

    What is read is first copied; see :class:`~gossamer.papers.recall_language.RecallGPT`.
    """
    layer = _uninitialised(kind, settings, seed)
    copied = nn.init.orthogonal_(torch.empty(layer.dim, layer.dim))
    with torch.no_grad():
        layer.out.weight.copy_(copied.t())
        half = layer.local_heads * layer.dim // layer.num_heads
        for projection, rows in ((layer.local_projection, copied[:half]), (layer.routed_projection, copied[half:])):
            projection.weight[-len(rows) :] = rows
    return layer


def _uninitialised(kind: str, settings: dict[str, Any], seed: int) -> RoutingAttention:
    clusters, window = settings["clusters"], settings["length"] // settings["clusters"]
    shape = (settings["width"], settings["heads"], clusters)
    options: dict[str, Any] = {"local_window": settings["local_window"], "decay": settings["decay"], "seed": seed}
    if kind in (ROUTING, RANDOM):
        layer = RoutingAttention(*shape, window, **options)
        return _frozen(layer) if kind == RANDOM else layer
    if kind in (STRICT, HASHING):
        # one that ends with the token has to be half as long as a cluster, of which a token sees half
        layer = RoutingAttention(*shape, window // 2, strict_causal=True, **options)
        return _hashing(layer, seed) if kind == HASHING else layer
    return LinkedAttention(_links(kind, settings), *shape, window, **options)


def _frozen(layer: RoutingAttention) -> RoutingAttention:
    layer.kmeans.initialized.fill_(True)
    layer.kmeans.decay, layer.commitment = 1.0, 0.0
    return layer


def _hashing(layer: RoutingAttention, seed: int) -> RoutingAttention:
    """Random directions and their opposites, of which a token takes the nearest, as Reformer does."""
    means = layer.kmeans.means
    half = torch.randn(len(means), (means.shape[1] + 1) // 2, means.shape[2], generator=generator_for("hashes", seed))
    means.copy_(functional.normalize(torch.cat([half, -half], 1)[:, : means.shape[1]], dim=-1))
    return _frozen(layer)


def _links(kind: str, settings: dict[str, Any]) -> Tensor:
    length, clusters = settings["length"], settings["clusters"]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    if kind == STRIDED:
        return (distance >= 0) & (distance % clusters == 0)
    return (distance >= 0) & (distance < length // clusters // 2) if kind == LOCAL else distance >= 0


def keys_a_query(settings: dict[str, Any]) -> dict[str, float]:
    """Mean number of keys that a query reads in a head of each kind; of the routed ones at most."""
    window = settings["length"] // settings["clusters"]
    fixed = {kind: attended_pairs(_links(kind, settings)) for kind in (STRIDED, LOCAL, DENSE)}
    return {ROUTING: (window + 1) / 2, RANDOM: (window + 1) / 2, STRICT: window / 2, HASHING: window / 2, **fixed}


@torch.no_grad()
def _look(model: RecallGPT, lesson: Lesson, settings: dict[str, Any]) -> dict[str, float]:
    """The last layer that routes: what its clusters hold, and how full they would be without balance."""
    layer, seen = model.blocks[-1].attention, []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(lesson.recall.tokens[:16])
    handle.remove()
    q = layer._heads(layer.routed_projection(seen[0]), 2)[0]
    q = functional.layer_norm(q, q.shape[-1:])
    scores = (q @ q.transpose(-1, -2)) * q.shape[-1] ** -0.5
    length = q.shape[2]
    places = torch.arange(length)
    mass = scores.masked_fill(places[:, None] <= places, -math.inf)[:, :, 1:].softmax(-1)
    chosen = balanced_topk_route(layer.kmeans.similarity(q), length // settings["clusters"])
    member = torch.zeros(*q.shape[:2], settings["clusters"], length).scatter(-1, chosen, 1.0)
    together = (member.transpose(-1, -2) @ member)[:, :, 1:] > 0
    share = float((mass * together).sum(-1).mean())
    chance = float(together.tril(0).double().mean() / torch.ones(length, length).tril(-1)[1:].double().mean())
    full = layer.kmeans.occupancy(q).double()
    return {
        "share of attention in clusters": share,
        "share of pairs in clusters": chance,
        "fullest cluster before balancing, times the mean": float((full.amax(1) / full.mean(1)).mean()),
        "empty clusters before balancing": float((full == 0).double().mean()),
        "tokens in no cluster": float((member.sum(2) == 0).double().mean()),
    }


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Differences paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        f"recalled by routing − by {rival}": _gap(observations, ROUTING, rival, "recalled")
        for rival in (RANDOM, STRIDED, LOCAL)
    }
    needed["loss of local − of routing"] = _gap(observations, LOCAL, ROUTING, "loss")
    numbers: dict[str, Interval | float] = {
        **needed,
        "recalled by routing − by hashing": _gap(observations, ROUTING, HASHING, "recalled"),
        "recalled by strictly causal routing − by local": _gap(observations, STRICT, LOCAL, "recalled"),
        "recalled by dense − by routing": _gap(observations, DENSE, ROUTING, "recalled"),
        "recalled by guessing": CHANCE,
    }
    for kind in observations[0]["marks"]:
        for part in ("loss", "recalled"):
            numbers[f"{kind}: {part}"] = _mean([row["marks"][kind][part] for row in observations])
        numbers[f"{kind}: keys a query of a head that is not local"] = observations[0]["keys a query"][kind]
    for part in observations[0]["routing"]:
        numbers[part] = _mean([row["routing"][part] for row in observations])
    recall = {name: value for name, value in needed.items() if name.startswith("recalled")}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in recall.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "clusters recall what random ones, strides and windows lose, at no price in text", numbers)


def _gap(observations: list[Observation], one: str, other: str, part: str) -> Interval:
    return mean_interval([row["marks"][one][part] - row["marks"][other][part] for row in observations])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="routing-transformer",
    claim=(
        "Heads that read the clusters of online k-means recall what lies anywhere in the past, unlike heads that read "
        "random clusters, every so many tokens or the last few, at as many pairs; text is predicted no worse than by "
        "local heads."
    ),
    rule=(
        "holds if, paired over seeds at 95 %, routing as published recalls more values than random centroids, a stride "
        "and a local window of as many pairs, and its loss on text is not wholly above that of the local window; does "
        "not hold if one of these is wholly reversed. Hashing, strictly causal routing and dense attention are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="distance of what is to be recalled, share of the length",
    y_label="share recalled",
)
