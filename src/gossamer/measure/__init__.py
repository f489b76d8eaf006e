"""What sparsity costs and what it pays: quality, size, operations, speed and memory, all measured."""

from gossamer.measure.divergence import Divergence, divergence
from gossamer.measure.flops import LayerFlops, ModelFlops, count_flops
from gossamer.measure.harness import evaluate_tasks
from gossamer.measure.machine import describe_machine
from gossamer.measure.memory import PeakMemory, peak_flops, peak_memory, read_bandwidth
from gossamer.measure.perplexity import Perplexity, perplexity
from gossamer.measure.size import (
    ModelDensity,
    TensorDensity,
    TotalDensity,
    bytes_in_memory,
    bytes_on_disk,
    density,
)
from gossamer.measure.speed import GenerationSpeed, Timing, generation_speed, interleave, ratio

__all__ = [
    "Divergence",
    "GenerationSpeed",
    "LayerFlops",
    "ModelDensity",
    "ModelFlops",
    "PeakMemory",
    "Perplexity",
    "TensorDensity",
    "Timing",
    "TotalDensity",
    "bytes_in_memory",
    "bytes_on_disk",
    "count_flops",
    "density",
    "describe_machine",
    "divergence",
    "evaluate_tasks",
    "generation_speed",
    "interleave",
    "peak_flops",
    "peak_memory",
    "perplexity",
    "ratio",
    "read_bandwidth",
]
