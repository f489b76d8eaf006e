"""Run all benchmarks: python -m benchmarks --json benchmarks/results.json."""

from benchmarks import (
    kernels_convolution,
    kernels_groups,
    kernels_linear,
    pruning_memory,
    pruning_selection,
    pruning_walk,
    threads,
    training_kernels,
    training_step,
)
from benchmarks.harness import main

BENCHMARKS = (
    kernels_linear,
    kernels_groups,
    kernels_convolution,
    threads,
    training_kernels,
    training_step,
    pruning_selection,
    pruning_walk,
    pruning_memory,
)

main(lambda options: [row for benchmark in BENCHMARKS for row in benchmark.measure(options)])
