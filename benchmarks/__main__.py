"""Run all benchmarks: python -m benchmarks --json benchmarks/results.json."""

from benchmarks import (
    kernels_convolution,
    kernels_groups,
    kernels_linear,
    kernels_nm,
    mask_candidates,
    nm_training,
    pruning_memory,
    pruning_selection,
    pruning_walk,
    soups,
    threads,
    training_kernels,
    training_step,
)
from benchmarks.harness import main

BENCHMARKS = (
    kernels_linear,
    kernels_nm,
    kernels_groups,
    kernels_convolution,
    threads,
    training_kernels,
    training_step,
    nm_training,
    mask_candidates,
    soups,
    pruning_selection,
    pruning_walk,
    pruning_memory,
)

main(lambda options: [row for benchmark in BENCHMARKS for row in benchmark.measure(options)])
