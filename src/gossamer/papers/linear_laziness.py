"""Two linear layers: how much the first one changes from first weights of one norm, and what theory says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.core.effective_rank import truncate_rank
from gossamer.core.randomness import generator_for
from gossamer.measure.laziness import kernel_alignment
from gossamer.training.rich_lazy import aligned_low_rank
from gossamer.training.two_layer_linear import expected_alignment, linear_ntk, train_two_layer


def linear_laziness(own: dict[str, Any], seed: int) -> dict[str, Any]:
    """Change of the first layer at one norm; and kernel alignment after learning from small weights, as predicted."""
    size, generator = own["size"], generator_for("two linear layers", seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(own["samples"], size)
    direction = normal(size)
    direction /= direction.norm()
    change: dict[str, dict[str, float]] = {}
    for scale in own["scales"]:
        full = scale * normal(size, size) / size**0.5
        cases = {"full": full} | {f"rank {rank}": truncate_rank(full, rank) for rank in own["ranks"]}
        cases["aligned"] = aligned_low_rank(direction, size, float(full.norm()), 1.0, generator)
        # not zero: what lies outside the first rows could then be learnt only by turning them, in endless time
        w2 = own["readout"] * normal(size) / size**0.5
        change[str(scale)] = {
            name: float((train_two_layer(w1, w2, x, x @ direction, tolerance=1e-4).w1 - w1).norm())
            for name, w1 in cases.items()
        }
    return {"change": change, "theory": _theory(own, normal)}


def _theory(own: dict[str, Any], normal: Callable[..., Tensor]) -> dict[str, dict[str, float]]:
    """Mean alignment over random tasks, predicted and found, in a network a quarter as large; on whitened data."""
    size = own["size"] // 4
    x = torch.linalg.qr(normal(10 * size, size))[0] * (10 * size) ** 0.5
    full = normal(size, size) * own["small"]
    w2 = normal(size) * own["small"]
    found: dict[str, dict[str, float]] = {}
    for name, rank in (("full", size), ("rank 3", 3), ("rank 1", 1)):
        w1 = truncate_rank(full, rank)
        kernel, alignments = linear_ntk(w1, w2, x), []
        for _ in range(own["draws"]):
            after = train_two_layer(w1, w2, x, x @ normal(size), learning_rate=0.03, tolerance=1e-5)
            alignments.append(kernel_alignment(kernel, linear_ntk(after.w1, after.w2, x)))
        found[name] = {"predicted": expected_alignment(w1, w2), "found": sum(alignments) / len(alignments)}
    return found
