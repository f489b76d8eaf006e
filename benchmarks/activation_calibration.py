"""What calibrating activation thresholds costs beside running the model: a histogram for every input of layers.

The demo model reads windows of text as it always does, which ends in logits of every token; then with histograms,
which need none of them; then without histograms or logits, so that the cost of counting alone is known. Finding the
sites, once a model, is not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Options, Row, main, paired
from gossamer import calibration_batches, load, read_text
from gossamer.activations.base import observe_magnitudes
from gossamer.core.channel_rules import column_norms
from gossamer.measure import interleave, ratio
from gossamer.measure.runs import run_over
from gossamer.models.activation_sites import find_input_sites
from gossamer.models.blocks import run_batch

BAR = 1 / 1.10


def measure(options: Options) -> list[Row]:
    """Time of a pass with histograms over that of a plain one, in both dtypes."""
    length, repeats = (64, 2) if options.quick else (512, 7)
    return [row for dtype in ("float32", "bfloat16") for row in _rows(dtype, length, repeats)]


def _rows(dtype: str, length: int, repeats: int) -> list[Row]:
    loaded = load("demo", dtype=dtype)
    data = calibration_batches(read_text("state-of-the-union"), loaded.tokenizer, 2, length)
    sites = find_input_sites(loaded.model)
    scales = {
        "magnitude": dict.fromkeys(sites),
        "norm": {site: column_norms(site.target.matrix()) for site in sites},
    }

    @torch.no_grad()
    def forward() -> None:
        for batch in data:
            run_batch(loaded.model, batch)

    def uncounted() -> None:
        run_over(loaded.model, data, "", progress=False)

    def counting(by: str) -> Callable[[], object]:
        return lambda: observe_magnitudes(loaded.model, data, scales[by], progress=False)

    contenders = {"plain": forward, "uncounted": uncounted, **{by: counting(by) for by in scales}}
    timings = interleave(contenders, repeats=repeats, warmup=1)
    where = f"demo model, {dtype}, 2 × {length} tokens"
    return [
        paired(
            "calibration pass",
            f"{where}, scores by {by}",
            timings[by],
            "plain forward",
            timings["plain"],
            BAR,
            note=f"counting alone: {ratio(timings[by], timings['uncounted']).median:.2f}× the same pass without it",
        )
        for by in scales
    ]


if __name__ == "__main__":
    main(measure)
