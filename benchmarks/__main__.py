"""Run all benchmarks: python -m benchmarks --json benchmarks/results.json."""

from benchmarks import (
    activation_calibration,
    activation_decode,
    attention_denoising,
    attention_training,
    bdwp_products,
    kernels_activations,
    kernels_attention,
    kernels_convolution,
    kernels_groups,
    kernels_linear,
    kernels_nm,
    mask_candidates,
    nm_training,
    pruning_memory,
    pruning_selection,
    pruning_walk,
    sirius_decode,
    soups,
    threads,
    token_sparse_training,
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
    bdwp_products,
    kernels_activations,
    activation_calibration,
    activation_decode,
    sirius_decode,
    kernels_attention,
    attention_training,
    attention_denoising,
    token_sparse_training,
    soups,
    pruning_selection,
    pruning_walk,
    pruning_memory,
)

main(lambda options: [row for benchmark in BENCHMARKS for row in benchmark.measure(options)])
