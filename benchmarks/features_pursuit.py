"""Greedy coding: matching pursuit against the encoders of matching-pursuit autoencoders, and the orthogonal one.

Peers are sae-lens and SPAMS in their own environment, and scikit-learn's ``SparseCoder``. Products of
atoms, which an autoencoder keeps while its dictionary does not change, are known for the one row that says so.

Limits: for a step of a signal, one row of the products of atoms must be read; for the orthogonal pursuit, operations at
the measured rate of float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.features_peer import FeaturePeer, installed
from benchmarks.harness import Options, Row, main, paired
from gossamer.kernels.native import instruction_set
from gossamer.kernels.pursuit import matching_pursuit, orthogonal_matching_pursuit
from gossamer.measure import interleave, peak_flops, read_bandwidth

#: how many times faster the orthogonal pursuit must be
BARS = {"scikit-learn": 20.0, "spams": 0.7}
#: and matching pursuit: with a dictionary that stays, and with one that has just changed, as in training
MATCHING_BARS = {"gram": 8.0, "ours": 4.0}


def measure(options: Options) -> list[Row]:
    """Matching pursuit, then the orthogonal one."""
    return [*_matching(options), *_orthogonal(options)]


def problem(signals: int, atoms: int, size: int) -> tuple[Tensor, Tensor]:
    """Signals that share few atoms each, with noise, and the atoms."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, size, generator=generator), dim=1)
    chosen = torch.randint(atoms, (signals, 8), generator=generator)
    values = 1 + torch.rand(signals, 8, 1, generator=generator)
    return (values * dictionary[chosen]).sum(1) + 0.1 * torch.randn(signals, size, generator=generator), dictionary


def _matching(options: Options) -> list[Row]:
    signals, atoms, size, k = (64, 256, 32, 4) if options.quick else (1024, 16384, 640, 32)
    if not installed(options.peer_python):
        return []
    assert options.peer_python is not None
    x, dictionary = problem(signals, atoms, size)
    gram = dictionary @ dictionary.t()
    with ExitStack() as stack:
        peer = _opened(stack, options.peer_python, x, dictionary)
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda: matching_pursuit(x, dictionary, k, gram=False),
            "gram": lambda: matching_pursuit(x, dictionary, k, gram=gram),
            "sae-lens": partial(peer.run, "pursue", k=k),
        }
        seconds = interleave(runs, repeats=2 if options.quick else 3)
        version = peer.versions["sae-lens"]
    case = f"{signals} signals of {size}, {atoms} atoms, k = {k}, float32, {_here()}"
    limits = {"ours": None, "gram": 4 * signals * k * atoms / read_bandwidth()}
    names = {
        "gram": "matching pursuit, products of atoms known",
        "ours": "matching pursuit, dictionary new",
    }
    return [
        paired(
            names[way],
            case,
            seconds[way],
            f"sae-lens {version}",
            seconds["sae-lens"],
            0.0 if options.quick else MATCHING_BARS[way],
            limit=limits[way],
        )
        for way in names
    ]


def _orthogonal(options: Options) -> list[Row]:
    signals, atoms, size, k = (200, 64, 16, 4) if options.quick else (10_000, 512, 64, 10)
    x, dictionary = problem(signals, atoms, size)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: orthogonal_matching_pursuit(x, dictionary, k)}
    peers = {}
    if find_spec("sklearn"):
        from sklearn import __version__
        from sklearn.decomposition import SparseCoder

        coder = SparseCoder(dictionary.numpy(), transform_algorithm="omp", transform_n_nonzero_coefs=k)
        runs["scikit-learn"] = lambda: coder.transform(x.numpy())
        peers["scikit-learn"] = f"scikit-learn {__version__} SparseCoder"
    with ExitStack() as stack:
        if options.peer_python is not None and installed(options.peer_python):
            peer = _opened(stack, options.peer_python, x, dictionary)
            runs["spams"] = partial(peer.run, "orthogonal", k=k, threads=torch.get_num_threads())
            peers["spams"] = f"SPAMS {peer.versions['spams-bin']}"
        seconds = interleave(runs, repeats=2 if options.quick else 7)
    case = f"{signals} signals of {size}, {atoms} atoms, k = {k}, float32, {_here()}"
    operations = 2 * signals * (atoms * size + atoms * k * k / 2 + k**3 / 3)
    return [
        paired(
            "orthogonal matching pursuit",
            case,
            seconds["ours"],
            peers[name],
            seconds[name],
            0.0 if options.quick else BARS[name],
            limit=operations / peak_flops(),
        )
        for name in peers
    ]


def _opened(stack: ExitStack, python: Path, x: Tensor, dictionary: Tensor) -> FeaturePeer:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    np.save(folder / "signals.npy", x.numpy())
    np.save(folder / "dictionary.npy", dictionary.numpy())
    peer: FeaturePeer = stack.enter_context(FeaturePeer(python, torch.get_num_threads()))
    peer.load(signals=folder / "signals.npy", dictionary=folder / "dictionary.npy")
    return peer


def _here() -> str:
    return f"{torch.get_num_threads()} threads, {instruction_set()}"


if __name__ == "__main__":
    main(measure)
