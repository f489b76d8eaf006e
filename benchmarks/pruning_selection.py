"""Choosing which weights go: N:M masks, and one threshold over a whole model."""

from __future__ import annotations

import torch

from benchmarks.harness import Options, Row, compare, main
from gossamer.core.patterns import NM
from gossamer.core.selection import keep_highest_jointly
from gossamer.measure import read_bandwidth


def measure(options: Options) -> list[Row]:
    """N:M on 4096 × 4096, and 100 million weights at once."""
    side, size = (256, 100_000) if options.quick else (4096, 10_000_000)
    scores = torch.rand(side, side, generator=torch.Generator().manual_seed(0))
    layers = {f"layer {i}": torch.rand(size, generator=torch.Generator().manual_seed(i)) for i in range(10)}
    bandwidth = read_bandwidth()
    rows = []
    for n, m in ((2, 4), (4, 8)):

        def sort_and_scatter(n: int = n, m: int = m) -> torch.Tensor:
            groups = scores.view(-1, m)
            mask = torch.ones_like(groups, dtype=torch.bool)
            return mask.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], False).view_as(scores)

        def ours(n: int = n, m: int = m) -> torch.Tensor:
            return NM(n, m).select(scores)

        assert torch.equal(ours(), sort_and_scatter())
        limit = scores.numel() * 5 / bandwidth  # four bytes read and one written for every weight
        rows.append(compare("N:M mask", f"{n}:{m}, {side}²", ours, "argsort + scatter", sort_and_scatter, 10, limit))

    def concatenated() -> torch.Tensor:
        flat = torch.cat(list(layers.values()))
        return flat > flat.kthvalue(len(flat) // 2).values

    limit = sum(map(torch.numel, layers.values())) * (3 * 4 + 1) / bandwidth  # two counting passes and one to mark
    rows.append(
        compare(
            "global threshold",
            f"{10 * size / 1e6:g} M weights, float32",
            lambda: keep_highest_jointly(layers, 5 * size),
            f"cat + kthvalue ({40 * size / 1e6:g} MB copy)",
            concatenated,
            1,
            limit,
            repeats=3,
        )
    )
    return rows


if __name__ == "__main__":
    main(measure)
