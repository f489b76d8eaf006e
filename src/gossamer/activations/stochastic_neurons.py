"""Conditional computation: a small network decides by hard, random, mostly-zero gates which parts of a large one run.

A wide layer is split into blocks, and a gater draws for every example which of them are on. What a block would have
computed is multiplied by its gate, so where that is zero the block's weights need not be read at all. The gater is
trained by one of the estimators of :mod:`gossamer.activations.stochastic_units`, and a penalty holds the share of open
gates near a target.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.activations.stochastic_units import ReinforceUnit, make_unit
from gossamer.core.randomness import generator_for
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

Penalty = Literal["kl", "squared"]
Scope = Literal["batch", "sample"]
TestMode = Literal["sample", "threshold", "mean"]


def rate_penalty(rates: Tensor, target: float, kind: Penalty = "kl", per: Scope = "batch") -> Tensor:
    """How far rates are from a target: ``KL(ρ ‖ r)`` or ``(r − ρ)²``.

    Parameters
    ----------
    rates
        Probability of each gate to be open, ``(batch, gates)``.
    target
        ρ, in (0, 1).
    kind
        Which of the two.
    per
        What r averages over. ``"batch"``: the examples, for each gate, so that a gate may be open always for some of
        them as long as it is closed for others. ``"sample"``: the gates, for each example, so that every example has
        its share of open gates but a gate may be open for all. The two have different solutions.

    Returns
    -------
    Tensor
        A scalar: the mean over gates, or over examples.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If a name is unknown, or the target out of range.
    """
    for word, name, known in (("penalty", kind, get_args(Penalty)), ("scope", per, get_args(Scope))):
        if name not in known:
            raise UnknownNameError(word, name, known)
    _check_rate(target)
    # in half precision the bounds below would be 0 and 1
    wide = torch.promote_types(rates.dtype, torch.float32)
    mean = rates.mean(0 if per == "batch" else 1, dtype=wide)
    if kind == "squared":
        return (mean - target).square().mean()
    mean = mean.clamp(1e-6, 1 - 1e-6)
    return (target * (target / mean).log() + (1 - target) * ((1 - target) / (1 - mean)).log()).mean()


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ConfigurationError(f"target_rate is {rate}; it must lie in (0, 1), such as 0.1")


@register(
    "stochastic-gate",
    paper="stochastic-neurons",
    when="layer",
    granularity="activations",
    needs_data=False,
    timing="during training",
    path=("dense-to-dense",),
    topology="dynamic",
    criterion=("learned",),
    aims=("inference",),
)
class StochasticGate(nn.Module):
    """A small network that draws gates: linear, ReLU, linear, and a stochastic unit for each gate.

    Bengio, Léonard & Courville, 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", arXiv 1308.3432.

    Parameters
    ----------
    in_features, n_gates
        Width of the input, and number of gates.
    estimator
        A key of :data:`gossamer.activations.stochastic_units.ESTIMATORS`.
    target_rate
        ρ in (0, 1): the share of gates that shall be open. The last bias starts where it is met.
    hidden
        Units of the hidden layer; 0 for none.
    penalty, per
        See :func:`rate_penalty`.
    test_mode
        In evaluation: ``"threshold"`` opens what is likelier open than not, ``"sample"`` draws with a generator that
        starts anew at every call, so that the same input gives the same gates, and ``"mean"`` takes expected values,
        which skips nothing.
    at_least_one
        Whether a gate is opened for an example that has none open, and then its likeliest. Not for ``"reinforce"``,
        whose estimate needs what was drawn.
    seed
        Of the draws in evaluation.

    Attributes
    ----------
    gain
        What all gates are multiplied by, so that an open one is about 1 at the target rate: without, units that give
        √p would fade out what passes through them, the more so the rarer they are open.

    Raises
    ------
    ConfigurationError, UnknownNameError
        If a parameter is out of range, or a name unknown.
    """

    def __init__(
        self,
        in_features: int,
        n_gates: int,
        estimator: str = "st",
        target_rate: float = 0.1,
        *,
        hidden: int = 400,
        penalty: Penalty = "kl",
        per: Scope = "batch",
        test_mode: TestMode = "threshold",
        at_least_one: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        _check_rate(target_rate)
        if min(in_features, n_gates) < 1 or hidden < 0:
            raise ConfigurationError(
                f"sizes are {in_features}, {hidden} and {n_gates}; inputs and gates must be positive, hidden 0 or more"
            )
        if test_mode not in get_args(TestMode):
            raise UnknownNameError("test mode", test_mode, get_args(TestMode))
        self.unit = make_unit(estimator, target_rate)
        if at_least_one and isinstance(self.unit, ReinforceUnit):
            raise ConfigurationError("at_least_one would change what reinforce has drawn; give a shared block instead")
        rate_penalty(torch.full((1, 1), target_rate), target_rate, penalty, per)
        self.in_features, self.n_gates, self.target_rate = in_features, n_gates, target_rate
        self.penalty_kind, self.per, self.test_mode = penalty, per, test_mode
        self.at_least_one, self.seed = at_least_one, seed
        self.gain = 1 / self.unit.opened(target_rate)
        layers: list[nn.Module] = [nn.Linear(in_features, hidden), nn.ReLU()] if hidden else []
        last = nn.Linear(hidden or in_features, n_gates)
        nn.init.constant_(last.bias, self.unit.bias(target_rate))
        self.net = nn.Sequential(*layers, last)
        self.logits: Tensor | None = None

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Gates ``(batch, n_gates)`` for inputs ``(batch, in_features)``."""
        self.logits = logits = self.net(x)
        if self.training:
            gates = self.unit(logits, generator)
        elif self.test_mode == "threshold":
            gates = self.unit.threshold(logits)
        elif self.test_mode == "sample":
            gates = self.unit(logits, generator or generator_for("stochastic gates", self.seed))
        else:
            return self.gain * self.unit.mean(logits)
        return self.gain * (self._opened(gates, logits) if self.at_least_one else gates)

    def _opened(self, gates: Tensor, logits: Tensor) -> Tensor:
        none = (gates == 0).all(1, keepdim=True)
        best = torch.zeros_like(gates).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        # at a logit of a half or more every unit is open: 1 for coins, and not zero for those with real values
        value = self.unit.threshold(logits.clamp(min=0.5))
        return gates + (none * best * value).detach()

    def penalty(self) -> Tensor:
        """The penalty on the rates of the last call; a scalar that can be differentiated.

        Raises
        ------
        ConfigurationError
            If there was no call.
        """
        if self.logits is None:
            raise ConfigurationError("no gates to penalise: call the gate before its penalty")
        return rate_penalty(self.unit.rate(self.logits), self.target_rate, self.penalty_kind, self.per)

    def surrogate(self, losses: Tensor) -> Tensor:
        """What trains the gater from the losses ``(batch,)`` of the last call; zero unless that is its estimator."""
        if isinstance(self.unit, ReinforceUnit):
            return self.unit.estimator.surrogate(losses)
        return losses.new_zeros(())

    def extra_repr(self) -> str:  # noqa: D102
        return f"target_rate={self.target_rate}, per={self.per!r}, test_mode={self.test_mode!r}"


@register(
    "gated-mlp",
    paper="stochastic-neurons",
    when="layer",
    granularity="blocks",
    needs_data=False,
    timing="during training",
    path=("dense-to-dense",),
    topology="dynamic",
    criterion=("learned",),
    patterns=("channels",),
    aims=("inference",),
)
class GatedMLP(nn.Module):
    """A perceptron whose hidden layers are split into blocks that a gater switches on and off for each example.

    Bengio et al., 2013, arXiv 1308.3432. In evaluation a block that is off is not computed, neither its own weights
    nor those that read it; in training it is, and multiplied by zero.

    Parameters
    ----------
    main
        ``nn.Sequential`` of ``nn.Linear`` with ``nn.ReLU`` between them, and perhaps ``nn.Flatten`` before.
    gater
        Draws one gate for each block that is not shared, layer after layer.
    blocks
        Of each hidden layer; contiguous units, equally many.
    shared
        Of these, the first ones of each layer are always on: they see to it that no example is left without any.

    Raises
    ------
    ConfigurationError
        If the network has another shape, or the number of gates does not fit.
    """

    def __init__(self, main: nn.Sequential, gater: StochasticGate, blocks: int, shared: int = 0):
        super().__init__()
        self.main, self.gater, self.blocks, self.shared = main, gater, blocks, shared
        linears = self._linears()
        kinds = [type(layer) for layer in main if not isinstance(layer, nn.Flatten)]
        if len(linears) < 2 or kinds != [nn.Linear, nn.ReLU] * (len(linears) - 1) + [nn.Linear]:
            raise ConfigurationError("main is no perceptron; give nn.Sequential(Linear, ReLU, …, Linear)")
        for layer in linears[:-1]:
            if blocks < 1 or layer.out_features % blocks:
                raise ConfigurationError(
                    f"blocks is {blocks}; it must divide the {layer.out_features} units of a layer"
                )
        wanted = (len(linears) - 1) * (blocks - shared)
        if not 0 <= shared < blocks or gater.n_gates != wanted or gater.in_features != linears[0].in_features:
            raise ConfigurationError(
                f"the gater has {gater.n_gates} gates for {gater.in_features} inputs; {wanted} for "
                f"{linears[0].in_features} are needed by {len(linears) - 1} layers of {blocks} blocks, {shared} shared"
            )

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.main if isinstance(layer, nn.Linear)]

    def gates(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``(batch, layers, blocks)`` for inputs ``(batch, in_features)``, shared blocks with their ones."""
        drawn = self.gater(x, generator).unflatten(1, (-1, self.blocks - self.shared))
        return nn.functional.pad(drawn, (self.shared, 0), value=1.0)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Outputs ``(batch, out_features)``; inputs with more dimensions than two are flattened."""
        x = x.flatten(1)
        gates = self.gates(x, generator)
        # where every gate is open, as with mean values, one product beats many
        if self.training or bool((gates != 0).all()):
            return self.dense(x, gates)
        return self.skipping(x, gates)

    def dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """Compute every block, and multiply by the gates."""
        *hidden, last = self._linears()
        for layer, gate in zip(hidden, gates.unbind(1)):
            active = torch.relu(layer(x)).unflatten(1, (self.blocks, -1))
            x = (active * gate.unsqueeze(2)).flatten(1)
        return last(x)

    def skipping(self, x: Tensor, gates: Tensor) -> Tensor:
        """The same from the blocks alone that are on; weights of the others are not read."""
        *hidden, last = self._linears()
        pieces: list[tuple[Tensor | None, Tensor, slice]] = [(None, x, slice(0, x.shape[1]))]
        for layer, gate in zip(hidden, gates.unbind(1)):
            width = layer.out_features // self.blocks
            found: list[tuple[Tensor | None, Tensor, slice]] = []
            for block in range(self.blocks):
                rows = gate[:, block].nonzero().flatten()
                if len(rows):
                    place = slice(block * width, (block + 1) * width)
                    active = torch.relu(_gathered(layer, place, rows, pieces, len(x)))
                    found.append((rows, active * gate[rows, block].unsqueeze(1), place))
            pieces = found
        return _gathered(last, slice(0, last.out_features), torch.arange(len(x), device=x.device), pieces, len(x))

    def objective(self, losses: Tensor, weight: float = 1.0) -> Tensor:
        """What to minimise: mean loss, the penalty on rates times `weight`, and what the estimator needs beside.

        Parameters
        ----------
        losses
            ``(batch,)``, one for each example of the last call.
        weight
            λ of the penalty.

        Raises
        ------
        CalibrationError
            If losses are not one for each example.
        """
        if losses.dim() != 1:
            raise CalibrationError(f"losses have shape {tuple(losses.shape)}; give one for each example, (batch,)")
        return losses.mean() + weight * self.gater.penalty() + self.gater.surrogate(losses)

    def multiplications(self, gates: Tensor) -> Tensor:
        """Multiplications of the main network for every example, ``(batch,)``, with gates ``(batch, layers, blocks)``.

        Those of the gater come on top; see :meth:`gater_multiplications`.
        """
        *hidden, last = self._linears()
        before = torch.full((len(gates),), float(hidden[0].in_features), device=gates.device)
        total = torch.zeros_like(before)
        for layer, gate in zip(hidden, gates.unbind(1)):
            after = (gate != 0).sum(1) * (layer.out_features // self.blocks)
            total, before = total + before * after, after.to(before.dtype)
        return total + before * last.out_features

    def gater_multiplications(self) -> int:
        """Multiplications of the gater for one example."""
        return sum(layer.weight.numel() for layer in self.gater.net if isinstance(layer, nn.Linear))

    def dense_multiplications(self) -> int:
        """Multiplications of the main network for one example with every gate open."""
        return sum(layer.weight.numel() for layer in self._linears())


def _gathered(
    layer: nn.Linear, outputs: slice, rows: Tensor, pieces: list[tuple[Tensor | None, Tensor, slice]], batch: int
) -> Tensor:
    """Some outputs of a layer for some rows of the batch, from the pieces of its input that are there.

    A piece is the rows that it has (None for all), their values, and the inputs that they are.
    """
    bias = layer.bias[outputs] if layer.bias is not None else layer.weight.new_zeros(outputs.stop - outputs.start)
    if batch == 1:  # every piece has the one row, and looking for it would take longer than its product
        result = bias.unsqueeze(0)
        for _, values, inputs in pieces:
            result = torch.addmm(result, values, layer.weight[outputs, inputs].mT)
        return result
    result = bias.repeat(len(rows), 1)
    place = torch.full((batch,), -1, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    for have, values, inputs in pieces:
        weight = layer.weight[outputs, inputs].mT
        if have is None:
            result = result + values[rows] @ weight
            continue
        common = place[have] >= 0
        if bool(common.any()):
            result = result.index_add(0, place[have[common]], values[common] @ weight)
    return result
