"""Pruning a model that is larger than the memory it is allowed.

A Llama of random weights is written to disk block by block, so that not even its maker ever holds it. A process of its
own then prunes it with ``offload="disk"`` under a hard limit far below the model's size. The limit is ``RLIMIT_DATA``:
it bounds the private writable memory of a process (what malloc hands out, and private maps of files), so an
allocation beyond it fails at once and the run with it; the pages of a checkpoint that is merely mapped can be dropped
and read again, and do not need to fit. What is reported is the peak of resident anonymous memory (``RssAnon``) over
what Python, torch and transformers take once they are imported, next to the bound: two and a half blocks in float32
and the hidden states of the calibration data.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Row, main

BOUND = 2.5
"""Blocks in float32 that pruning may hold beside the activations."""


@dataclass(frozen=True)
class Shape:
    """A Llama, the calibration data that goes through it, and the share of its size that is allowed as memory."""

    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int
    sequences: int
    tokens: int
    allowed: float

    def block_weights(self) -> dict[str, tuple[int, ...]]:
        """Name within a block → shape."""
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        square = (self.hidden, self.hidden)
        attention = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
        feed = {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": narrow}
        norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (self.hidden,))
        return {**attention, **feed, **norms}

    def outer_weights(self) -> dict[str, tuple[int, ...]]:
        """What lies outside the blocks."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (self.hidden,)}

    @property
    def block_bytes(self) -> int:
        """One block in float32."""
        return _bytes(self.block_weights())

    @property
    def model_bytes(self) -> int:
        """The model in float32."""
        return self.blocks * self.block_bytes + _bytes(self.outer_weights())

    @property
    def activation_bytes(self) -> int:
        """The hidden states between two blocks, of all calibration data, in float32."""
        return 4 * self.sequences * self.tokens * self.hidden

    @property
    def bound(self) -> int:
        """What pruning may take."""
        return int(BOUND * self.block_bytes) + self.activation_bytes

    @property
    def limit(self) -> int:
        """The memory that is imposed, libraries included."""
        return int(self.allowed * self.model_bytes)


SHAPES = {
    "full": Shape(1536, 4096, 32, 32_000, sequences=4, tokens=512, allowed=0.3),
    "small": Shape(1024, 2816, 12, 4_000, sequences=4, tokens=256, allowed=0.8),
}


def _bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        size = 4
        for length in shape:
            size *= length
        total += size
    return total


def write_model(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write config and shards of a random Llama, one file for each block and one for the rest."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(seed)
    names = {f"block-{i:03d}": [f"model.layers.{i}.{n}" for n in shape.block_weights()] for i in range(shape.blocks)}
    shapes = {f"model.layers.{i}.{n}": s for i in range(shape.blocks) for n, s in shape.block_weights().items()}
    names["rest"], shapes = list(shape.outer_weights()), {**shapes, **shape.outer_weights()}
    where = {}
    for file, members in names.items():
        tensors = {
            name: torch.randn(shapes[name], generator=generator) * 0.02
            if len(shapes[name]) > 1
            else torch.ones(shapes[name])
            for name in members
        }
        save_file(tensors, directory / f"{file}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(members, f"{file}.safetensors")
    index = {"metadata": {"total_size": shape.model_bytes}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.hidden // 128,
        num_key_value_heads=shape.hidden // 128,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        dtype="float32",
    ).save_pretrained(directory)


@dataclass
class Peak:
    """Bytes above what the process had when the measurement began, and the seconds that it took."""

    anonymous: int = 0
    resident: int = 0
    data: int = 0
    baseline: int = 0
    baseline_data: int = 0
    seconds: float = 0.0


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


def prune_under_limit(directory: Path, shape: Shape, method: str, offload: str | None) -> Peak:
    """Load and prune in this process, which gives up everything above the limit for the rest of its life."""
    import torch

    from gossamer import load, prune

    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(shape.vocabulary, (1, shape.tokens), generator=generator) for _ in range(shape.sequences)]
    _warm_up()
    before = _status()
    peak = Peak(baseline=before["RssAnon"], baseline_data=before["VmData"])
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, before, done), daemon=True)
    watcher.start()
    started = time.perf_counter()
    model = load(directory, dtype="float32", offload=offload).model
    resource.setrlimit(resource.RLIMIT_DATA, (shape.limit, shape.limit))
    result = prune(model, method, calibration=batches, sparsity=0.5, progress=False)
    peak.seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    assert abs(result.sparsity - 0.5) < 1e-3
    return peak


def _warm_up() -> None:
    """Let the libraries take their own buffers before the measurement, on a model of a few kilobytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gossamer import prune

    tiny = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    ids = [torch.randint(128, (1, 128), generator=torch.Generator().manual_seed(0))]
    for method in ("wanda", "sparsegpt"):
        prune(LlamaForCausalLM(tiny).eval(), method, calibration=ids, sparsity=0.5, progress=False)


def _watch(peak: Peak, before: dict[str, int], done: threading.Event) -> None:
    while True:
        now = _status()
        peak.anonymous = max(peak.anonymous, now["RssAnon"] - before["RssAnon"])
        peak.resident = max(peak.resident, now["VmRSS"] - before["VmRSS"])
        peak.data = max(peak.data, now["VmData"] - before["VmData"])
        if done.wait(0.003):
            return


def run_apart(directory: Path, size: str, method: str, offload: str | None = "disk") -> Peak:
    """Call :func:`prune_under_limit` in a fresh process.

    Raises
    ------
    MemoryError
        If it did not fit, with what the process said last.
    """
    command = [sys.executable, "-m", "benchmarks.pruning_memory", "--size", size, "--child", str(directory), method]
    finished = subprocess.run(
        [*command, *(["--in-memory"] if offload is None else [])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    if finished.returncode:
        raise MemoryError(finished.stderr.strip()[-2000:] or f"ended with {finished.returncode}")
    return Peak(**json.loads(finished.stdout.splitlines()[-1]))


def measure(options: Options, methods: tuple[str, ...] = ("wanda", "sparsegpt")) -> list[Row]:
    """Peak memory of each method against the bound."""
    size = "small" if options.quick else "full"
    shape = SHAPES[size]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        return [_fitting(Path(folder), size, method) for method in methods]


def _fitting(directory: Path, size: str, method: str) -> Row:
    """The row of a run, which may have ended at the limit."""
    try:
        return row(SHAPES[size], method, run_apart(directory, size, method))
    except MemoryError:
        at_least = row(SHAPES[size], method, Peak(anonymous=SHAPES[size].limit))
        return replace(at_least, note="did not fit under the limit, which stands in for its peak")


def row(shape: Shape, method: str, peak: Peak) -> Row:
    """The peak and the bound; the least that could do is one block and the activations."""
    ours, bound = peak.anonymous, shape.bound
    least = shape.block_bytes + shape.activation_bytes
    blocks = (ours - shape.activation_bytes) / shape.block_bytes
    times = bound / ours
    return Row(
        operation=f"peak memory of {method} from disk",
        case=(
            f"{shape.model_bytes / 1e9:.1f} GB in {shape.blocks} blocks of {shape.block_bytes / 1e6:.0f} MB, "
            f"under a limit of {shape.limit / 1e9:.1f} GB"
        ),
        peer=f"{BOUND} blocks and the activations",
        ours=ours / 1e6,
        theirs=bound / 1e6,
        ratio=times,
        ratio_low=times,
        ratio_high=times,
        bar=1.0,
        met=ours <= bound,
        limit=least / 1e6,
        fraction_of_limit=least / ours,
        unit="MB",
        note=f"{blocks:.2f} blocks and {shape.activation_bytes / 1e6:.0f} MB of activations, {peak.seconds:.0f} s",
    )


def _child(size: str, directory: Path, method: str, offload: str | None) -> None:
    print(json.dumps(asdict(prune_under_limit(directory, SHAPES[size], method, offload))))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--size", choices=SHAPES)
    parser.add_argument("--child", nargs=2, metavar=("DIRECTORY", "METHOD"))
    parser.add_argument("--in-memory", action="store_true")
    return parser.parse_known_args()[0]


if __name__ == "__main__":
    arguments = _arguments()
    if arguments.child:
        directory, method = arguments.child
        _child(arguments.size, Path(directory), method, None if arguments.in_memory else "disk")
    else:
        main(measure)
