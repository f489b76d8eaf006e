"""What training keeps from one step to the next, in bytes: parameters, gradients, optimiser state and indices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of everything that lives as long as a training run, counted exactly from the tensors that are there.

    Attributes
    ----------
    parameters
        Weights and biases.
    gradients
        What ``.grad`` of the parameters holds.
    optimizer
        Every tensor of the optimiser's state.
    buffers
        Everything else that the model keeps: running statistics, and the indices of layers that store no zeros.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


def training_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> TrainingMemory:
    """Count what training holds at this moment; call it after a step, before gradients are dropped.

    Parameters
    ----------
    model
        Tied parameters and shared buffers count once.
    optimizer
        Whose state counts.
    """
    parameters = list(model.parameters())
    states = optimizer.state.values() if optimizer is not None else ()
    return TrainingMemory(
        parameters=_bytes(parameters),
        gradients=_bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        optimizer=_bytes(value for state in states for value in state.values() if isinstance(value, Tensor)),
        buffers=_bytes(model.buffers()),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
