"""Weights that are made of others while they train, and of which no trace is left afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core.targets import Target


def parametrize_(target: Target, parametrization: nn.Module) -> None:
    """Let a weight be what a module makes of it; the module trains and evaluates with the layer."""
    parametrization.train(target.module.training)
    parametrize.register_parametrization(target.module, target.attribute, parametrization, unsafe=True)


def unparametrize_(target: Target, order: tuple[str, ...], keep: bool) -> None:
    """Undo :func:`parametrize_`.

    Parameters
    ----------
    target
        Of the weight.
    order
        Names of the parameters of its module as they were before; torch would put the weight last, and the state of
        an optimiser knows parameters by their order.
    keep
        Whether the weight keeps the value that it has now; otherwise it has its own again.
    """
    parametrize.remove_parametrizations(target.module, target.attribute, leave_parametrized=keep)
    own = target.module._parameters
    for name in order:
        own[name] = own.pop(name)


class ScaledWeight(nn.Module):
    """A parametrisation: blocks of inputs of every row times a factor that is positive, whatever is learned.

    Parameters
    ----------
    weight
        That is scaled.
    axis, row
        Dimensions of the inputs and of the outputs.
    blocks
        Of inputs, of equal length, each with a factor of its own.

    Attributes
    ----------
    log_scale
        Logarithms of the factors, zero at first.
    """

    def __init__(self, weight: Tensor, axis: int, row: int, blocks: int):
        super().__init__()
        self.axis, self.blocks = axis, blocks
        shape = [1] * (weight.dim() + 1)
        shape[axis] = blocks
        shape[row if row < axis else row + 1] = weight.shape[row]
        for stacked in range(min(axis, row)):
            shape[stacked] = weight.shape[stacked]
        self.log_scale = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight, of the same shape."""
        return (weight.unflatten(self.axis, (self.blocks, -1)) * self.log_scale.exp()).flatten(self.axis, self.axis + 1)
