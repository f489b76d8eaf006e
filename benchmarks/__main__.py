"""Run all benchmarks: python -m benchmarks --json benchmarks/results.json."""

from benchmarks import pruning_selection, pruning_walk
from benchmarks.harness import main

main(lambda: [*pruning_selection.measure(), *pruning_walk.measure()])
