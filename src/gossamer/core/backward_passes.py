"""Whether a backward pass is running, in which activation checkpointing computes again what has been computed."""

from __future__ import annotations

import torch


def backward_pass() -> int:
    """Number of the backward pass that is running; −1 outside of any."""
    return torch._C._current_graph_task_id()


def recomputing() -> bool:
    """Whether this runs in a backward pass; never while a graph is being compiled."""
    return not torch.compiler.is_compiling() and backward_pass() >= 0
