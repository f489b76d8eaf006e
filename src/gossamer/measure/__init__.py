"""What sparsity costs and what it pays: quality, size, operations, speed and memory, all measured."""

from gossamer.measure.dead_neurons import dead_neuron_rate
from gossamer.measure.divergence import Divergence, divergence
from gossamer.measure.flops import LayerFlops, ModelFlops, count_flops
from gossamer.measure.harness import evaluate_tasks
from gossamer.measure.machine import describe_machine
from gossamer.measure.memory import PeakMemory, peak_flops, peak_memory, read_bandwidth
from gossamer.measure.perplexity import Perplexity, perplexity
from gossamer.measure.report_card import ReportCard, Run, report_card
from gossamer.measure.robustness import Robustness, robustness
from gossamer.measure.size import (
    ModelDensity,
    TensorDensity,
    TotalDensity,
    bytes_in_memory,
    bytes_on_disk,
    density,
    footprint,
)
from gossamer.measure.speed import GenerationSpeed, Timing, generation_speed, interleave, ratio
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_ledger import TrainingLedger
from gossamer.measure.training_memory import training_memory

__all__ = [
    "Divergence",
    "GenerationSpeed",
    "LayerFlops",
    "ModelDensity",
    "ModelFlops",
    "PeakMemory",
    "Perplexity",
    "ReportCard",
    "Robustness",
    "Run",
    "TensorDensity",
    "Timing",
    "TotalDensity",
    "TrainingCost",
    "TrainingLedger",
    "bytes_in_memory",
    "bytes_on_disk",
    "count_flops",
    "dead_neuron_rate",
    "density",
    "describe_machine",
    "divergence",
    "evaluate_tasks",
    "footprint",
    "generation_speed",
    "interleave",
    "peak_flops",
    "peak_memory",
    "perplexity",
    "ratio",
    "read_bandwidth",
    "report_card",
    "robustness",
    "training_memory",
]
