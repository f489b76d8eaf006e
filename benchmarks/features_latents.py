"""Bytes of stored latents: a million tokens with 32 of 16,384 features each, the text included.

What is stored does not depend on the model that the activations are from, so codes are drawn. Dense float16 activations
are what they are compared with; the limit is what place and value of every code would take without any table.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main
from gossamer.core.sparse_codes import SparseCodes
from gossamer.features.latent_capture import cache_latents

TOKENS, FEATURES, K = 1 << 20, 16384, 32
BAR = 100.0
_DOCUMENT = 4096


class _Drawn(nn.Module):
    """Says of every token that some features are active, each of them once."""

    def __init__(self, features: int, k: int):
        super().__init__()
        self.features, self.k = features, k
        self.weight = nn.Parameter(torch.zeros(1))
        self._generator = torch.Generator().manual_seed(0)

    def encode(self, x: Tensor) -> SparseCodes:
        first = torch.randint(self.features, (len(x), 1), generator=self._generator)
        step = 2 * torch.randint(self.features // 2, (len(x), 1), generator=self._generator) + 1
        indices = (first + step * torch.arange(self.k)) % self.features
        values = torch.rand(len(x), self.k, generator=self._generator) + 0.1
        return SparseCodes.from_rows(indices, values, self.features)


def measure(options: Options) -> list[Row]:
    """One row, in bytes."""
    tokens = 4 * _DOCUMENT if options.quick else TOKENS
    model = nn.Sequential(nn.Embedding(1000, 4))
    documents = list(torch.randint(1000, (tokens // _DOCUMENT, _DOCUMENT)))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "latents"
        cache = cache_latents(model, documents, "0", _Drawn(FEATURES, K), target, skip_first=0, progress=False)
        ours, theirs = cache.nbytes, cache.dense_bytes
    least = tokens * K * (math.log2(FEATURES) / 8 + 2)
    ratio, bar = theirs / ours, 0.0 if options.quick else BAR
    row = Row(
        operation="bytes of stored latents",
        case=f"{tokens} tokens, {FEATURES} features, {K} active at each, text included",
        peer="dense float16",
        ours=ours,
        theirs=theirs,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        bar=bar,
        met=ratio >= bar,
        limit=least,
        fraction_of_limit=least / ours,
        unit="bytes",
    )
    return [row]


if __name__ == "__main__":
    main(measure)
