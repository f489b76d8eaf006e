"""Sirius against its own formula: how much of the weights that it leaves unread is time that it does not take.

``python -m benchmarks.sirius_decode --json FILE``. The full model, read by transformers, takes turns with generation
that drafts by half of the neurons and checks every k tokens. The formula is the effective density of the steps that
were made; a ratio of 1 means that weights unread are time saved, whether or not the draft was good enough to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Options, Row, main, paired
from gossamer.activations.contextual import ContextualSparse
from gossamer.activations.sirius import SiriusGenerator
from gossamer.measure import Timing, interleave
from gossamer.measure.speed import prompt_ids
from gossamer.models import load

BAR = 0.85
CASES: tuple[dict[str, Any], ...] = (
    {"keep": 0.5, "kernel_size": 16},
    {"keep": 0.5, "kernel_size": 8},
    {"keep": 0.75, "kernel_size": 16},
)
PROMPT, NEW = 48, 96


def measure(options: Options) -> list[Row]:
    """A row for every case, on the demo model in float32."""
    loaded = load("demo", dtype="float32")
    ids = prompt_ids(loaded.model, loaded.tokenizer, PROMPT)[:1]
    new, rounds = (20, 1) if options.quick else (NEW, 5)
    return [_row(loaded.model, ids, case, new, rounds) for case in CASES]


def _row(model: Any, ids: torch.Tensor, case: dict[str, Any], new: int, rounds: int) -> Row:
    sparse = ContextualSparse(model, "griffin", case["keep"])
    generator = SiriusGenerator(model, sparse, case["kernel_size"])

    def tokens(count: int) -> dict[str, int]:
        return {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}

    contenders: dict[str, Callable[[], object]] = {
        "prompt": lambda: model.generate(input_ids=ids, do_sample=False, **tokens(1)),
        "full": lambda: model.generate(input_ids=ids, do_sample=False, **tokens(new)),
        "sirius": lambda: generator.generate(input_ids=ids, **tokens(new)),
    }
    timings = interleave(contenders, repeats=rounds)
    sparse.remove()
    stats, samples = generator.stats, {name: timing.samples for name, timing in timings.items()}
    # both read the prompt in full; the formula is about what comes behind it
    formula = [p + (f - p) * stats.measured_density for p, f in zip(samples["prompt"], samples["full"])]
    faster = timings["full"].median / timings["sirius"].median
    note = (
        f"{new / timings['sirius'].median:.1f} tokens/s, full {new / timings['full'].median:.1f}: {faster:.2f} times; "
        f"advance {stats.aal:.1f} of {stats.kernel_size}, effective density {stats.effective_density:.2f}"
    )
    label = f"SmolLM2-135M float32, {case['keep']:.0%} of neurons, k = {stats.kernel_size}, {new} tokens"
    return paired(
        "Sirius decode", label, timings["sirius"], "its effective density", Timing.of(formula), BAR, note=note
    )


if __name__ == "__main__":
    main(measure)
