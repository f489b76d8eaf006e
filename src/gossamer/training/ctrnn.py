"""A rectified recurrent network in continuous time, the kind that models of neural circuits use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.core.registry import register
from gossamer.errors import ConfigurationError


@register("ctrnn", paper="rich-lazy", when="layer", needs_data=False, criterion=("structure",))
class CTRNN(nn.Module):
    """``h_{t+1} = ReLU((1 − a) h_t + a (W h_t + W_in x_t))`` with a linear readout of every step, all without bias.

    Liu et al., 2024, arXiv 2310.08513, section 4 and the authors' code.

    Parameters
    ----------
    input_size, hidden_size, output_size
        Channels in, units, and channels out.
    recurrent
        First W, ``(*copies, hidden_size, hidden_size)``. Default: uniform in ±1/√hidden, as torch starts a linear
        layer, and as input and readout weights always start.
    leak
        ``a = dt/τ`` in (0, 1]; at 1 a unit forgets what it was.
    copies
        Shape of a stack of independent networks that run side by side on the same or on their own inputs.
    mask
        Which recurrent connections exist, bool, as W; the others are and stay zero.
    generator
        For the weights; on the CPU.

    Raises
    ------
    ConfigurationError
        If a size, the leak or the shape of W or its mask is wrong.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        recurrent: Tensor | None = None,
        leak: float = 1.0,
        copies: tuple[int, ...] = (),
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, output_size) < 1 or not 0 < leak <= 1:
            raise ConfigurationError(
                f"sizes are {input_size}, {hidden_size} and {output_size}, leak {leak}; "
                "positive sizes and 0 < leak <= 1 are needed"
            )
        square = (*copies, hidden_size, hidden_size)
        for name, given in (("recurrent", recurrent), ("mask", mask)):
            if given is not None and given.shape != square:
                raise ConfigurationError(f"{name} has shape {tuple(given.shape)}; {square} is needed")
        self.input_size, self.hidden_size, self.output_size, self.leak = input_size, hidden_size, output_size, leak

        def uniform(rows: int, columns: int) -> nn.Parameter:
            bound = 1 / math.sqrt(columns)
            drawn = torch.rand(*copies, rows, columns, generator=generator)
            return nn.Parameter((2 * drawn - 1) * bound)

        self.input = uniform(hidden_size, input_size)
        self.recurrent = uniform(hidden_size, hidden_size)
        self.readout = uniform(output_size, hidden_size)
        self.register_buffer("mask", mask)
        with torch.no_grad():
            if recurrent is not None:
                self.recurrent.copy_(recurrent)
            if mask is not None:
                self.recurrent.mul_(mask)

    def forward(self, sequence: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over sequences.

        Parameters
        ----------
        sequence
            ``(steps, *copies, batch, input_size)``, or without `copies` where all see the same.
        hidden
            First state, ``(*copies, batch, hidden_size)``. Default: zeros.

        Returns
        -------
        outputs, activity
            ``(steps, *copies, batch, output_size)`` and ``(steps, *copies, batch, hidden_size)``.
        """
        if sequence.dim() < 3 or sequence.shape[-1] != self.input_size:
            raise ConfigurationError(
                f"the input has shape {tuple(sequence.shape)}; (steps, …, batch, {self.input_size}) is needed"
            )
        # the product also masks the gradient, so that a connection that does not exist never moves
        recurrent = self.recurrent if self.mask is None else self.recurrent * self.mask
        if sequence.dim() == 3:
            sequence = sequence.reshape(len(sequence), *[1] * (self.input.dim() - 2), *sequence.shape[1:])
        driven = sequence @ self.input.mT
        state = torch.zeros_like(driven[0]) if hidden is None else hidden
        states = []
        for drive in driven:
            pull = state @ recurrent.mT + drive
            state = torch.relu(pull if self.leak == 1 else (1 - self.leak) * state + self.leak * pull)
            states.append(state)
        activity = torch.stack(states)
        return activity @ self.readout.mT, activity

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, {self.output_size}, leak={self.leak}"
