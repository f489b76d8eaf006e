"""Pruning a real model: Wanda's time, the share of it that is selection, and SparseGPT against Wanda."""

from __future__ import annotations

import copy
import time

from benchmarks.harness import Row, main
from gossamer import calibration_batches, load, prune, read_text
from gossamer.core.progress import track


def measure(rounds: int = 3) -> list[Row]:
    """Both methods in turn on SmolLM2-135M with 16 sequences of 512 tokens."""
    loaded = load("demo", dtype="float32")
    batches = calibration_batches(read_text("state-of-the-union"), loaded.tokenizer, 16, 512)
    seconds: dict[str, list[float]] = {"wanda": [], "sparsegpt": []}
    selection = []
    for _ in track(range(rounds), "pruning in turns"):
        for name in seconds:
            model = copy.deepcopy(loaded.model)
            started = time.perf_counter()
            result = prune(model, name, calibration=batches, sparsity=0.5, progress=False)
            seconds[name].append(time.perf_counter() - started)
            if name == "wanda":
                selection.append(result.seconds["selection"] / result.seconds["total"])
    wanda, surgeon = (sorted(values)[rounds // 2] for values in seconds.values())
    ratios = sorted(w / s for w, s in zip(seconds["wanda"], seconds["sparsegpt"]))
    share = sorted(selection)[rounds // 2]
    case = "SmolLM2-135M, 16 × 512 tokens"
    low, high, middle = ratios[0], ratios[-1], ratios[rounds // 2]
    return [
        Row("sparsegpt", case, "our Wanda", surgeon, wanda, middle, low, high, None, None, 1 / 1.5, middle >= 1 / 1.5),
        Row(
            "wanda without selection",
            case,
            "the whole of Wanda",
            wanda * (1 - share),
            wanda,
            1 / (1 - share),
            1 / (1 - min(selection)),
            1 / (1 - max(selection)),
            None,
            None,
            1.0,
            share <= 0.05,
        ),
    ]


if __name__ == "__main__":
    main(measure)
