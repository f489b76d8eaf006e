"""Zeros in activations: compute only what fires."""
