"""TopK autoencoders: a step of training, encoding and decoding, and the selection alone.

Peers are sae-lens and dictionary_learning in their own environment, with float32 as ours, and torch. Each does the
whole step that its trainer does: forward, backward, clipping, Adam, and what it notes of the features; ours clips too.

Limits are the fastest product of tokens and features by torch, float32 or bfloat16, or the memory that must be read:
atoms of all codes, and for a step weights, gradients and both means of Adam as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.features_peer import LIBRARIES, FeaturePeer, installed
from benchmarks.harness import Options, Row, main, paired
from gossamer.features.activation_rules import TopK
from gossamer.features.sae import SAE
from gossamer.features.training import Learner, TrainingSettings
from gossamer.kernels.encode_select import highest_of_rows
from gossamer.kernels.native import instruction_set
from gossamer.measure import Timing, interleave, read_bandwidth

SIZE, FEATURES, K, TOKENS = 640, 16384, 32, 4096
#: how many times faster a step, encoding with decoding, and the selection must be
BARS = {"step": 2.8, "reconstruct": 1.6, "select": 4.0}


def planted(tokens: int, size: int, seed: int) -> Tensor:
    """Activations of twice as many directions as dimensions, of which few are active, and a little noise."""
    atoms = torch.nn.functional.normalize(torch.randn(2 * size, size, generator=_generator(0)), dim=1)
    draw = _generator(seed)
    active = torch.rand(tokens, 2 * size, generator=draw) < 20 / (2 * size)
    values = active * torch.rand(tokens, 2 * size, generator=draw)
    return values @ atoms + 0.05 * torch.randn(tokens, size, generator=draw)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(options: Options) -> list[Row]:
    """A step and encoding with decoding against both libraries, then the selection against torch."""
    size, features, k, tokens = (32, 256, 4, 128) if options.quick else (SIZE, FEATURES, K, TOKENS)
    x = planted(tokens, size, 1)
    threads = torch.get_num_threads()
    case = f"{tokens} tokens of {size}, {features} features, k = {k}, float32, {threads} threads, {instruction_set()}"
    rows = _against_libraries(options, x, features, k, case) if installed(options.peer_python) else []
    return [*rows, _selection(options, x, features, k, case)]


def _against_libraries(options: Options, x: Tensor, features: int, k: int, case: str) -> list[Row]:
    assert options.peer_python is not None
    sae = SAE(x.shape[1], features, TopK(k))
    sae.prepare(x)
    learner = Learner.of(sae, TrainingSettings(batch_size=len(x), clip=1.0))
    numbers = iter(range(1 << 30))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.save(folder / "x.npy", x.numpy())
        peer = stack.enter_context(FeaturePeer(options.peer_python, torch.get_num_threads()))
        peer.load(x=folder / "x.npy")
        for library in LIBRARIES:
            peer.autoencoder(library, x.shape[1], features, k, len(x))
        steps: dict[str, Callable[[], object]] = {"ours": lambda: learner.step(next(numbers), x)}
        steps |= {name: partial(peer.run, "train", library=name, x="x") for name in LIBRARIES}
        products: dict[str, Callable[[], object]] = {"ours": lambda: _reconstruct(sae, x)}
        products |= {name: partial(peer.run, "reconstruct", library=name) for name in LIBRARIES}
        repeats = 2 if options.quick else 7
        seconds = {"step": interleave(steps, repeats=repeats)}
        seconds["reconstruct"] = interleave(products, repeats=repeats)
        versions = {"sae-lens": peer.versions["sae-lens"], "dictionary_learning": peer.versions["dictionary-learning"]}
    limits = _limits(x, features, k)
    names = {"step": "training step of a TopK autoencoder", "reconstruct": "encode and decode"}
    return [
        paired(
            names[what],
            case,
            seconds[what]["ours"],
            f"{library} {versions[library]}",
            seconds[what][library],
            0.0 if options.quick else BARS[what],
            limit=limits[what],
        )
        for what in seconds
        for library in LIBRARIES
    ]


@torch.no_grad()
def _reconstruct(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x))


def _limits(x: Tensor, features: int, k: int) -> dict[str, float]:
    encoder = torch.randn(features, x.shape[1])
    narrow = x.bfloat16(), encoder.bfloat16()
    found: dict[str, Timing] = interleave(
        {"float32": lambda: x @ encoder.t(), "bfloat16": lambda: narrow[0] @ narrow[1].t()}, repeats=3
    )
    product = min(timing.median for timing in found.values())
    gathered = 4 * len(x) * k * x.shape[1] / read_bandwidth()
    # Adam reads weight, gradient and two means, and writes all but the gradient, for encoder and decoder
    adam = 2 * 7 * 4 * encoder.numel() / read_bandwidth()
    # atoms and tokens are gathered by decoding, and by the gradients of values, decoder and encoder
    return {"step": product + 4 * gathered + adam, "reconstruct": product + gathered}


def _selection(options: Options, x: Tensor, features: int, k: int, case: str) -> Row:
    scores = x @ torch.randn(features, x.shape[1], generator=_generator(2)).t()
    seconds = interleave(
        {"ours": lambda: highest_of_rows(scores, k), "torch": lambda: scores.topk(k, dim=1, sorted=False)},
        repeats=2 if options.quick else 7,
    )
    return paired(
        "selection of the highest of every row",
        case,
        seconds["ours"],
        "torch.topk",
        seconds["torch"],
        0.0 if options.quick else BARS["select"],
        limit=scores.nbytes / read_bandwidth(),
    )


if __name__ == "__main__":
    main(measure)
