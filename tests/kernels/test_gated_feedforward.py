"""A gated feed-forward block that computes only the neurons that fire is the dense one with the others set to zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import ACTIVATIONS, GatedFeedforward

FORMATS = ("float32", "bfloat16", "int8", "int4")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(gate: Tensor, up: Tensor, down: Tensor, format: str = "float32", **options) -> GatedFeedforward:
    rows = NibbleRowMatrix.from_dense if format == "int4" else lambda w: DenseMatrix.from_dense(w, format)
    return GatedFeedforward(rows(gate), rows(up), ChannelMatrix.from_dense(down, format), **options)


def block(inputs: int = 40, neurons: int = 75, outputs: int = 33, **options) -> GatedFeedforward:
    gate, up, down = draw(neurons, inputs), draw(neurons, inputs, seed=1), draw(outputs, neurons, seed=2)
    return made(gate / 6, up, down, **options)


def dense(block: GatedFeedforward, x: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs in float64, and how much rounding in float32 may change them."""
    gate, up, down = (matrix.expand().double() for matrix in (block.gate, block.up, block.down))
    biases = [None if b is None else b.double() for b in (block.gate_bias, block.up_bias, block.down_bias)]
    before = nn.functional.linear(x.double(), gate, biases[0])
    hidden = ACTIVATIONS[block.activation][1](before)
    if block.activation == "fatrelu":
        hidden = torch.where(before <= block.cut, 0.0, before)
    if block.thresholds is not None:
        hidden = torch.where(hidden.abs() <= block.thresholds, 0.0, hidden)
    if wanted is not None:
        hidden = hidden * wanted
    inner = hidden * nn.functional.linear(x.double(), up, biases[1])
    return nn.functional.linear(inner, down, biases[2]), 2e-5 * (1 + inner.abs() @ down.abs().t())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_are_those_of_the_dense_block(activation, format, face):
    for sizes in ((40, 75, 33), (1, 1, 1), (64, 96, 64)):
        neurons = sizes[1]
        for thresholds in (None, 0.3 * draw(neurons, seed=7).abs()):
            cut = 0.4 if activation == "fatrelu" else 0.0
            one = block(*sizes, format=format, activation=activation, cut=cut, thresholds=thresholds)
            for count in (0, 1, 3, 40):
                x = draw(count, sizes[0], seed=count + 5)
                exact, allowed = dense(one, x)
                assert bool(((one(x).double() - exact).abs() <= allowed).all())
                wanted = torch.rand(count, neurons, generator=torch.Generator().manual_seed(1)) < 0.3
                exact, allowed = dense(one, x, wanted)
                assert bool(((one(x, wanted).double() - exact).abs() <= allowed).all())


def test_biases_belong_to_their_matrices(face):
    biases = {"gate_bias": draw(75, seed=3), "up_bias": draw(75, seed=4), "down_bias": draw(33, seed=5)}
    one = block(activation="relu", **biases)
    for count in (1, 6):
        x = draw(count, 40, seed=6)
        exact, allowed = dense(one, x)
        assert bool(((one(x).double() - exact).abs() <= allowed).all())


def test_threads_and_company_change_no_bit(face):
    one = block(activation="relu", format="bfloat16")
    x = draw(37, 40)
    found = one(x, threads=1)
    assert torch.equal(found, one(x, threads=2))
    assert torch.equal(found, one(x, threads=5))
    if face != "reference":
        assert all(torch.equal(one(x[i]), found[i]) for i in (0, 20, 36))
    assert torch.equal(one(x.bfloat16()), one(x.bfloat16().float()).bfloat16())


def test_silent_neurons_are_not_read(face):
    if face == "reference":
        pytest.skip("the reference reads everything")
    gate, up, down = torch.ones(8, 16), draw(8, 16), draw(16, 8)
    gate[3], up[3], down[:, 3] = -1.0, float("nan"), float("nan")
    one = GatedFeedforward(
        DenseMatrix.from_dense(gate), DenseMatrix.from_dense(up), ChannelMatrix.from_dense(down), "relu"
    )
    assert bool(one(torch.ones(3, 16)).isfinite().all())
    wanted = torch.ones(3, 8, dtype=torch.bool)
    wanted[:, 3] = False
    gate[3] = float("nan")
    one = GatedFeedforward(
        DenseMatrix.from_dense(gate), DenseMatrix.from_dense(up), ChannelMatrix.from_dense(down), "silu"
    )
    assert bool(one(torch.ones(3, 16), wanted).isfinite().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_is_shown(activation, face):
    x = draw(3, 40)
    x[1, 2] = float("nan")
    found = block(activation=activation, thresholds=torch.ones(75))(x)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


def test_what_does_not_fit_is_refused_by_name():
    one = block()
    for options, text in (
        ({"activation": "tanh"}, "tanh"),
        ({"cut": 0.5}, "cut is 0.5"),
        ({"activation": "fatrelu", "cut": -1.0}, "cut is -1"),
        ({"thresholds": torch.zeros(74)}, "74"),
        ({"up_bias": torch.zeros(74)}, "bias of up"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            block(**options)
    with pytest.raises(ConfigurationError, match="gate is"):
        GatedFeedforward(one.gate, one.down, one.down)  # type: ignore[arg-type]
    for wanted in (torch.ones(2, 74, dtype=torch.bool), torch.ones(2, 75)):
        with pytest.raises(ConfigurationError, match="wanted is"):
            one(draw(2, 40), wanted)
    with pytest.raises(ConfigurationError, match="x is"):
        one(draw(2, 41))
