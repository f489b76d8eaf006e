"""Run all benchmarks: python -m benchmarks --json benchmarks/results.json."""

from benchmarks import pruning_memory, pruning_selection, pruning_walk
from benchmarks.harness import main

BENCHMARKS = (pruning_selection, pruning_walk, pruning_memory)

main(lambda options: [row for benchmark in BENCHMARKS for row in benchmark.measure(options)])
