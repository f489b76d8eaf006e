"""A gated feed-forward block in one call that computes only the neurons that fire.

``down · (f(gate · x) ⊙ (up · x))`` needs a row of ``up`` and a channel of ``down`` only where ``f(gate · x)`` is not
zero: after a ReLU, or where it is set to zero because it is small. If a router says beforehand which neurons are
wanted, the rows of ``gate`` are left out as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.channel_products import check_thresholds, flat_inputs
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix, lines_of_rows
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.matrix import Call
from gossamer.kernels.native import available, native

#: name → number by which the kernels know an activation, and what it is
ACTIVATIONS = {
    "silu": (0, torch.nn.functional.silu),
    "gelu_tanh": (1, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "gelu": (2, torch.nn.functional.gelu),
    "relu": (3, torch.relu),
    "fatrelu": (3, torch.relu),
}


@dataclass(frozen=True)
class GatedFeedforward:
    """Three matrices in the layouts that let single neurons be left out.

    Attributes
    ----------
    gate, up
        ``(neurons, inputs)``, row after row.
    down
        ``(outputs, neurons)``, channel after channel.
    activation
        ``relu``, ``fatrelu``, ``silu``, ``gelu`` or ``gelu_tanh``.
    cut
        Of ``fatrelu``: gates of at most this become 0, the others stay as they are.
    thresholds
        ``(neurons,)`` float32: activations of at most this size become 0; None leaves them.
    gate_bias, up_bias, down_bias
        One number for each row, or None.

    Raises
    ------
    ConfigurationError
        If the parts do not fit together.
    """

    gate: DenseMatrix | NibbleRowMatrix
    up: DenseMatrix | NibbleRowMatrix
    down: ChannelMatrix
    activation: str = "silu"
    cut: float = 0.0
    thresholds: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        neurons = self.gate.shape[0]
        if self.up.shape != self.gate.shape or self.down.shape[1] != neurons:
            raise ConfigurationError(
                f"gate is {self.gate.shape}, up {self.up.shape}, down {self.down.shape}; the first two must be equal "
                f"and the columns of the last their rows"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigurationError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.cut < float("inf") or (self.cut and self.activation != "fatrelu"):
            raise ConfigurationError(
                f"cut is {self.cut} for {self.activation}; fatrelu takes a number of at least 0, the others none"
            )
        check_thresholds(self.thresholds, neurons)
        for name, rows in (("gate", neurons), ("up", neurons), ("down", self.down.shape[0])):
            bias = getattr(self, f"{name}_bias")
            if bias is not None and bias.shape != (rows,):
                raise ConfigurationError(f"the bias of {name} is {tuple(bias.shape)}; its matrix has {rows} rows")

    def __call__(self, x: Tensor, wanted: Tensor | None = None, threads: int | None = None) -> Tensor:
        """Outputs of the block.

        Parameters
        ----------
        x
            ``(…, inputs)``, float32 or bfloat16, on the CPU. Of 32 vectors at a time, whatever some of them needs is
            read once.
        wanted
            ``(…, neurons)`` bool: which neurons to compute at all; by default all.
        threads
            By default as many as torch uses. The result does not depend on it.

        Returns
        -------
        Tensor
            ``(…, outputs)`` in the dtype of `x`.

        Raises
        ------
        ConfigurationError
            If shapes or dtypes do not fit.
        """
        neurons, inputs = self.gate.shape
        flat = flat_inputs(x, neurons, inputs)
        expected = (*x.shape[:-1], neurons)
        if wanted is not None and (wanted.shape != expected or wanted.dtype != torch.bool):
            raise ConfigurationError(
                f"wanted is {tuple(wanted.shape)} {wanted.dtype}; {tuple(x.shape)} inputs take {expected} bool"
            )
        outputs = flat.new_empty(len(flat), self.down.shape[0])
        mask = None if wanted is None else wanted.reshape(-1, neurons).contiguous()
        if outputs.numel() and available():
            self._run(flat, mask, outputs, threads or torch.get_num_threads())
        elif outputs.numel():
            outputs.copy_(self._reference(flat.float(), mask))
        return outputs.view(*x.shape[:-1], self.down.shape[0])

    def _run(self, flat: Tensor, wanted: Tensor | None, outputs: Tensor, threads: int) -> None:
        gate_bias, up_bias, down_bias = (_wide(b) for b in (self.gate_bias, self.up_bias, self.down_bias))
        native().channel_feedforward(
            lines_of_rows(self.gate),
            lines_of_rows(self.up),
            self.down.lines(),
            ACTIVATIONS[self.activation][0],
            self.cut,
            *(0 if part is None else part.data_ptr() for part in (self.thresholds, wanted, gate_bias, up_bias)),
            *Call(flat, down_bias, outputs).arguments(threads),
        )

    def _reference(self, x: Tensor, wanted: Tensor | None) -> Tensor:
        """With torch alone."""
        linear = torch.nn.functional.linear
        before = linear(x, self.gate.expand(), _wide(self.gate_bias))
        hidden = ACTIVATIONS[self.activation][1](before)
        if self.activation == "fatrelu":
            hidden = torch.where(before <= self.cut, 0.0, hidden)
        silent = hidden == 0
        if self.thresholds is not None:
            silent |= hidden.abs() <= self.thresholds
        if wanted is not None:
            silent |= ~wanted
        hidden = torch.where(silent, 0.0, hidden * linear(x, self.up.expand(), _wide(self.up_bias)))
        return linear(hidden, self.down.expand(), _wide(self.down_bias))


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()
