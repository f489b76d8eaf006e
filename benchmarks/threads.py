"""Do our kernels and torch's operators get in each other's way? Products of both in alternation, and each by itself.

Both run on the threads of one OpenMP library; two pools whose idle threads spin would make alternation much slower than
the sum of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import Options, Row, main, paired
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.native import native
from gossamer.measure import Timing, interleave

ROUNDS = 20  # products in a measurement


def measure(options: Options) -> list[Row]:
    """Matrices of three sizes, so that a thread waits for short and for long."""
    repeats = 3 if options.quick else 15
    return [row for size in ((256,) if options.quick else (256, 1024, 2048)) for row in _rows(size, repeats)]


def _rows(size: int, repeats: int) -> list[Row]:
    """Torch with ours, and beside it torch with torch: what the second loses too is the caches' doing."""
    weight = torch.randn(size, size)
    weight[torch.rand(size, size) < 0.5] = 0
    packed, x = BitmaskMatrix.from_dense(weight), torch.randn(1, size)
    dense, other = torch.randn(size, size), torch.randn(size, size)
    products: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.nn.functional.linear(x, dense),
        "ours": lambda: packed.linear(x),
        "torch again": lambda: torch.nn.functional.linear(x, other),
    }
    contenders = {name: _repeated(product) for name, product in products.items()}
    for name in ("ours", "torch again"):
        contenders[f"torch and {name}"] = _repeated(products["torch"], products[name])
    timings = interleave(contenders, repeats=repeats)
    library = Path(native().thread_source()).name
    rows = []
    for name, bar in (("ours", 0.9), ("torch again", 0.0)):
        apart = Timing.of([a + b for a, b in zip(timings["torch"].samples, timings[name].samples)])
        case = f"{size} × {size}, {torch.get_num_threads()} threads of {library}"
        both = timings[f"torch and {name}"]
        rows.append(paired(f"torch and {name} in alternation", case, both, "one after the other", apart, bar))
    return rows


def _repeated(*products: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(ROUNDS):
            for product in products:
                product()

    return run


if __name__ == "__main__":
    main(measure)
