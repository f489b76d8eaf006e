"""Training steps of sparse attention: S2-Attention against dense, and how the time of routing grows with the length.

A step is a forward and a backward pass of attention alone, without projections, for these are the same for all. At the
density of the pattern, 1 / density times faster is possible. Times of routing attention are fitted by a power of the
length, with as many clusters as the root of it; making the clusters and the routes is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Options, Row, main, paired
from gossamer.attention.cluster_attention import Members, balanced_topk_route, clustered_attention, ordered_attention
from gossamer.attention.s2_attention import LocalStridePattern, SparseAttention
from gossamer.core.kmeans import SphericalKMeans
from gossamer.kernels.native import instruction_set
from gossamer.measure import Timing, interleave

S2_BAR, EXPONENT_BAR = 3.0, 1.65
_HEADS, _SIZE = 4, 64
#: local blocks, stride → of the pattern; the first is the paper's for long contexts
_PATTERNS = ((1, 16), (4, 8))


def measure(options: Options) -> list[Row]:
    """All rows."""
    return [*_s2(options), *_routing(options)]


def _draw(length: int, heads: int = _HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, _SIZE, generator=generator).requires_grad_() for _ in range(3)]


def _step(attend: Callable[..., Tensor], parts: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attend(*parts), parts, grad)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _s2(options: Options) -> list[Row]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        length = 512 if options.quick else 8192
        parts = [part.detach().to(dtype).requires_grad_() for part in _draw(length)]
        grad = torch.randn_like(parts[0])
        runs = {"dense": _step(_dense, parts, grad)}
        densities = {}
        for local, stride in _PATTERNS:
            pattern = LocalStridePattern(_HEADS, local_blocks=local, vert_stride=stride)
            name = f"L = {local}, v = {stride}"
            densities[name] = pattern.mask(length, 64).density
            runs[name] = _step(SparseAttention(64, pattern), parts, grad)
        seconds = interleave(runs, repeats=2 if options.quick else 7, warmup=1)
        case = f"{length} tokens, {_HEADS} heads of {_SIZE}, {str(dtype).split('.')[1]}, {_machine()}"
        for name, density in densities.items():
            # only what density takes away is promised: the bar is for the paper's sparser pattern
            bar = S2_BAR if name.startswith("L = 1,") else 0.0
            limit = density * seconds["dense"].median
            row = paired(
                f"S2 training step of attention, {name}, {density:.1%} of blocks",
                case,
                seconds[name],
                "torch scaled_dot_product_attention",
                seconds["dense"],
                bar,
                limit,
                note=f"limit {1 / density:.1f}×: the density times the dense time",
            )
            found.append(row)
    return found


def _routing(options: Options) -> list[Row]:
    lengths = [256, 512] if options.quick else [1024, 2048, 4096, 8192, 16384]
    runs: dict[str, Callable[[], object]] = {}
    for length in lengths:
        parts = _draw(length)
        grad = torch.randn_like(parts[0])
        clusters = round(math.sqrt(length))
        kmeans = SphericalKMeans(_HEADS, clusters, _SIZE)
        shared = [parts[0], parts[2]]  # keys are made of queries
        runs[f"routed {length}"] = _step(_routed(kmeans), shared, grad)
        runs[f"strict {length}"] = _step(_strict(kmeans), shared, grad)
        runs[f"dense {length}"] = _step(_dense, parts, grad)
    seconds = interleave(runs, repeats=2 if options.quick else 5, warmup=1)
    found = []
    for kind, said in (("routed", "routing attention"), ("strict", "strictly causal routing attention")):
        ours, theirs = ([seconds[f"{which} {n}"] for n in lengths] for which in (kind, "dense"))
        found.append(_exponent(said, ours, lengths, theirs))
        for length in lengths[-2:]:
            case = f"{length} tokens, {round(math.sqrt(length))} clusters, {_HEADS} heads of {_SIZE}, {_machine()}"
            operation = f"training step of {said}, {length} tokens"
            times = (seconds[f"{which} {length}"] for which in (kind, "dense"))
            found.append(paired(operation, case, next(times), "torch scaled_dot_product_attention", next(times), 0.0))
    return found


def _routed(kmeans: SphericalKMeans) -> Callable[..., Tensor]:
    """Routing as published, with keys made of queries; the centroids learn, too."""

    def attend(q: Tensor, v: Tensor) -> Tensor:
        shared = functional.layer_norm(q, (_SIZE,))
        scores = kmeans.similarity(shared)
        kmeans.observe(shared, nearest=scores.argmax(-1))
        kmeans.update()
        places = balanced_topk_route(scores, -(-q.shape[2] // kmeans.num_clusters))
        return clustered_attention(shared, shared, v, Members(places, places), causal=True, shared=True)

    return attend


def _strict(kmeans: SphericalKMeans) -> Callable[..., Tensor]:
    def attend(q: Tensor, v: Tensor) -> Tensor:
        shared = functional.layer_norm(q, (_SIZE,))
        nearest = kmeans.assign(shared)
        kmeans.observe(shared, nearest=nearest)
        kmeans.update()
        return ordered_attention(shared, shared, v, nearest, -(-q.shape[2] // kmeans.num_clusters))

    return attend


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """The p of the power law ``n^p`` that fits times best, on logarithmic axes."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def _exponent(said: str, ours: list[Timing], lengths: list[int], dense: list[Timing]) -> Row:
    """One row whose figures are exponents, fitted in every round for their spread."""
    fits = [[exponent(lengths, list(times)) for times in zip(*(t.samples for t in kind))] for kind in (ours, dense)]
    mine, theirs = (exponent(lengths, [t.median for t in kind]) for kind in (ours, dense))
    rounds = sorted(other / own for own, other in zip(*fits))
    return Row(
        operation=f"time of a training step of {said} as the length grows: fitted exponent",
        case=f"{lengths[0]} … {lengths[-1]} tokens, {_HEADS} heads of {_SIZE}, {_machine()}",
        peer="torch scaled_dot_product_attention",
        ours=mine,
        theirs=theirs,
        ratio=median(rounds),
        ratio_low=rounds[len(rounds) // 4],
        ratio_high=rounds[-1 - len(rounds) // 4],
        bar=round(theirs / EXPONENT_BAR, 3),
        met=mine <= EXPONENT_BAR,
        limit=1.5,
        fraction_of_limit=1.5 / mine,
        rounds=len(rounds),
        unit="",
        note=f"met at an exponent of {EXPONENT_BAR} and less; 1.5 is what the operations grow by",
    )


def _machine() -> str:
    return f"{torch.get_num_threads()} threads, {instruction_set()}"


if __name__ == "__main__":
    main(measure)
