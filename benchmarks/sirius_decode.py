"""Sirius against its own formula: how much of the weights that it leaves unread is time that it does not take.

``python -m benchmarks.sirius_decode --json FILE``. The full model takes turns with generation that drafts by half of
the neurons and checks every k tokens, both in the same runtime: compiled steps, or transformers' own code. The formula
is the effective density of the steps that were made; a ratio of 1 means that weights unread are time saved, whether or
not the draft was good enough to gain. It is about what comes behind the prompt, so reading that (for the draft also
cutting the matrices) is measured by itself and taken off both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Options, Row, main, paired
from gossamer.activations.contextual import ContextualSparse
from gossamer.activations.correction_runtimes import Runtime
from gossamer.activations.correction_stats import SiriusStats
from gossamer.activations.sirius import SiriusGenerator
from gossamer.measure import Timing, interleave
from gossamer.measure.speed import prompt_ids
from gossamer.models import load
from gossamer.runtime.generation import generate
from gossamer.runtime.program import DecodeProgram

BAR = 0.85
CASES: tuple[tuple[Runtime, float, int], ...] = (
    ("native", 0.5, 16),
    ("native", 0.5, 8),
    ("native", 0.75, 16),
    ("eager", 0.5, 16),
)
PROMPT, NEW, ROUNDS = 48, 64, 3


def measure(options: Options) -> list[Row]:
    """A row for every runtime, share of neurons and k, on the demo model in float32."""
    loaded = load("demo", dtype="float32")
    model: Any = loaded.model
    model.generation_config.eos_token_id = None  # so that all texts are of one length
    ids = prompt_ids(model, loaded.tokenizer, PROMPT)[:1]
    new, rounds = (8, 1) if options.quick else (NEW, ROUNDS)
    return [_row(model, ids, *case, new, rounds) for case in CASES]


def _row(model: Any, ids: torch.Tensor, runtime: Runtime, keep: float, k: int, new: int, rounds: int) -> Row:
    sparse = ContextualSparse(model, "griffin", keep)
    generator = SiriusGenerator(model, sparse, k, runtime=runtime)
    full = _full(model, ids, runtime)

    taken: list[SiriusStats] = []

    def sirius(count: int) -> None:
        taken.append(generator.generate(input_ids=ids, **_exactly(count)).stats)

    contenders: dict[str, Callable[[], object]] = {
        "prompt": lambda: full(1),
        "full": lambda: full(new),
        "begin": lambda: sirius(1),
        "sirius": lambda: sirius(new),
    }
    timings = interleave(contenders, repeats=rounds)
    generator.remove()
    stats, samples = max(taken, key=lambda s: s.checks), {name: timing.samples for name, timing in timings.items()}
    dense = Timing.of([all_ - prompt for all_, prompt in zip(samples["full"], samples["prompt"])])
    ours = Timing.of([all_ - begin for all_, begin in zip(samples["sirius"], samples["begin"])])
    formula = Timing.of([seconds * stats.measured_density for seconds in dense.samples])
    note = (
        f"{(new - 1) / ours.median:.1f} tokens/s, full {(new - 1) / dense.median:.1f}; advance {stats.aal:.1f} of {k}, "
        f"weights read {stats.measured_density:.2f}; prompt {timings['prompt'].median:.2f} s, with cutting "
        f"{timings['begin'].median:.2f} s"
    )
    label = f"SmolLM2-135M float32, {keep:.0%} of neurons, k = {k}, {new} tokens, {runtime} runtime"
    return paired("Sirius decode", label, ours, "its effective density", formula, BAR, note=note)


def _full(model: Any, ids: torch.Tensor, runtime: Runtime) -> Callable[[int], object]:
    """Generation of some tokens by the full model."""
    if runtime == "native":
        program = DecodeProgram.of(model, ids.shape[1] + NEW)
        return lambda count: generate(program, ids[0].tolist(), count)
    return lambda count: model.generate(input_ids=ids, do_sample=False, **_exactly(count))


def _exactly(count: int) -> dict[str, int]:
    return {"max_new_tokens": count, "pad_token_id": 0}


if __name__ == "__main__":
    main(measure)
