"""Pruning a real model: Wanda's time, the share of it that is selection, SparseGPT against Wanda, and a peer."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main, paired
from benchmarks.llm_compressor import LlmCompressor
from gossamer import calibration_batches, load, prune, read_text
from gossamer.core.progress import track
from gossamer.core.targets import find_targets
from gossamer.measure import Timing, peak_flops, perplexity

METHODS = ("wanda", "sparsegpt")


def measure(options: Options) -> list[Row]:
    """Both methods in turn on SmolLM2-135M with 16 sequences of 512 tokens, beside llm-compressor's if it is there."""
    rounds, sequences, length = (1, 2, 64) if options.quick else (3, 16, 512)
    loaded = load("demo", dtype="float32")
    batches = calibration_batches(read_text("state-of-the-union"), loaded.tokenizer, sequences, length)
    held_out = calibration_batches(read_text("moby-dick"), loaded.tokenizer, sequences, length)
    case = f"SmolLM2-135M, {sequences} × {length} tokens, 50%, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        if options.peer_python is None:
            print("llm-compressor is left out; give the interpreter of its environment with --peer-python")
            walk = _Walk(loaded.model, batches, None, Path(folder))
            return _own_rows(walk.rounds(rounds), walk.selection, case)
        tokens = [row.tolist() for batch in batches for row in batch]
        source = _plain_directory(loaded, Path(folder))
        with LlmCompressor(options.peer_python, source, tokens, torch.get_num_threads()) as peer:
            walk = _Walk(loaded.model, batches, peer, Path(folder))
            seconds = walk.rounds(rounds)
        quality, shortest = walk.perplexities(held_out), _shortest(loaded.model, batches)
        return [*_own_rows(seconds, walk.selection, case), *_peer_rows(seconds, quality, peer.version, case, shortest)]


class _Walk:
    """Runs of ours and of the peer, and the last result of each."""

    def __init__(self, model: nn.Module, batches: list[Tensor], peer: LlmCompressor | None, folder: Path):
        self.model, self.batches, self.peer, self.folder = model, batches, peer, folder
        self.selection: list[float] = []  # seconds, by round
        self.pruned: dict[str, nn.Module] = {}

    def rounds(self, count: int) -> dict[str, Timing]:
        """Seconds by contender; in every second round the order is reversed."""
        contenders: dict[str, Callable[[], float]] = {name: self._ours(name) for name in METHODS}
        if self.peer is not None:
            contenders |= {f"their {name}": self._theirs(self.peer, name) for name in METHODS}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in track(range(count), "pruning in turns"):
            for name in list(contenders)[:: -1 if turn % 2 else 1]:
                seconds[name].append(contenders[name]())
        return {name: Timing.of(values) for name, values in seconds.items()}

    def _ours(self, name: str) -> Callable[[], float]:
        def run() -> float:
            model = copy.deepcopy(self.model)
            started = time.perf_counter()
            result = prune(model, name, calibration=self.batches, sparsity=0.5, progress=False)
            elapsed = time.perf_counter() - started
            if name == "wanda":
                self.selection.append(result.seconds["selection"])
            self.pruned[name] = model
            return elapsed

        return run

    def _theirs(self, peer: LlmCompressor, name: str) -> Callable[[], float]:
        return lambda: peer.prune(name, 0.5, self.folder / f"{name}.safetensors")

    def perplexities(self, held_out: list[Tensor]) -> dict[str, float]:
        """Of every contender's last result, on the same windows."""
        length = held_out[0].shape[1]
        found = {}
        for name, model in self.pruned.items():
            found[name] = perplexity(model, held_out, length, length, progress=False).value
            weights = load_file(self.folder / f"{name}.safetensors")
            model.load_state_dict(weights, strict=False)
            found[f"their {name}"] = perplexity(model, held_out, length, length, progress=False).value
        return found


def _plain_directory(loaded: Any, folder: Path) -> Path:
    """The model as the peer can read it."""
    directory = folder / "dense"
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    return directory


def _own_rows(seconds: dict[str, Timing], selection: list[float], case: str) -> list[Row]:
    wanda = seconds["wanda"]
    allowed = Timing.of([0.05 * total for total in wanda.samples])
    spent = Timing.of(selection)
    return [
        paired("sparsegpt", case, seconds["sparsegpt"], "our Wanda", wanda, 1 / 1.5),
        paired("mask selection in Wanda", case, spent, "5% of the whole of Wanda", allowed, 1.0),
    ]


def _shortest(model: nn.Module, batches: list[Tensor]) -> float:
    """Seconds for the products of two passes, for the statistics and for what the pruned blocks put out."""
    weights = sum(target.shape.numel() for target in find_targets(model))
    return 2 * 2 * weights * sum(batch.numel() for batch in batches) / peak_flops()


def _peer_rows(
    seconds: dict[str, Timing], quality: dict[str, float], version: str, case: str, shortest: float
) -> list[Row]:
    return [
        paired(
            name,
            case,
            seconds[name],
            f"llm-compressor {version}",
            seconds[f"their {name}"],
            1.0,
            limit=shortest,
            note=f"perplexity on Moby Dick {quality[name]:.2f}, theirs {quality[f'their {name}']:.2f}",
        )
        for name in METHODS
    ]


if __name__ == "__main__":
    main(measure)
