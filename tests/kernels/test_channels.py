"""Products in which only some channels take part are those of dense matrices with the others set to zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels.channel_products import delta_linear_, input_sparse, masked_output
from gossamer.kernels.channels import FORMATS, ChannelMatrix, NibbleRowMatrix, lay_by_channels
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.kinds import pack, rebuild
from gossamer.kernels.native import available
from gossamer.kernels.operators import packed_linear

SHAPES = [(1, 1), (3, 70), (65, 200), (130, 33), (0, 5), (9, 0), (600, 31)]
COUNTS = (0, 1, 2, 7, 33)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def limits(columns: int, seed: int = 5) -> Tensor:
    """Thresholds that silence about half of normally distributed inputs; some of them none."""
    found = 1.35 * torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    found[::5] = 0
    return found


def bound(x: Tensor, dense: Tensor) -> Tensor:
    """How far sums in float32 may be from the exact ones: a rounding for each term, of the sum of sizes."""
    return (dense.shape[1] + 3) * 2.0**-24 * (x.double().abs() @ dense.double().abs().t()) + 1e-30


def rows_matrix(w: Tensor, format: str) -> DenseMatrix | NibbleRowMatrix:
    return NibbleRowMatrix.from_dense(w) if format == "int4" else DenseMatrix.from_dense(w, format)


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_sparse_product_is_that_of_the_live_inputs(format, face):
    for shape in SHAPES:
        matrix = ChannelMatrix.from_dense(draw(*shape), format)
        matrix.validate()
        dense, t = matrix.expand(), limits(shape[1])
        assert dense.shape == shape
        for count in COUNTS:
            x, bias = draw(count, shape[1], seed=count + 1), draw(shape[0], seed=9)
            x[:, 1::7] = 0
            for thresholds in (None, t):
                live = x if thresholds is None else torch.where(x.abs() > thresholds, x, 0.0)
                exact = live.double() @ dense.double().t()
                found = input_sparse(matrix, x, thresholds)
                assert found.shape == (count, shape[0])
                assert bool(((found.double() - exact).abs() <= bound(live, dense)).all())
                biased = input_sparse(matrix, x, thresholds, bias).double() - exact - bias.double()
                assert bool((biased.abs() <= bound(live, dense) + 2.0**-23 * (exact + bias).abs()).all())


@pytest.mark.parametrize("format", FORMATS)
def test_an_ordinary_product_is_that_of_the_expanded_matrix(format, face):
    for shape in ((17, 64), (65, 201), (9, 1)):
        for matrix in (ChannelMatrix.from_dense(draw(*shape), format), rows_matrix(draw(*shape), format)):
            matrix.validate()
            dense = matrix.expand()
            assert torch.equal(matrix.expand(3, 9), dense[3:9])
            for count in (1, 5, 40):
                x, bias = draw(count, shape[1]), draw(shape[0], seed=1)
                exact = x.double() @ dense.double().t() + bias
                assert bool(((matrix.linear(x, bias).double() - exact).abs() <= bound(x, dense) + 1e-6).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_a_masked_product_is_the_gated_product_where_the_gate_is_not_zero(format, density, face):
    for shape in SHAPES:
        matrix = rows_matrix(draw(*shape), format)
        matrix.validate()
        dense = matrix.expand()
        for count in COUNTS:
            x, bias = draw(count, shape[1], seed=count + 1), draw(shape[0], seed=9)
            gate = draw(count, shape[0], seed=4)
            gate *= torch.rand(count, shape[0], generator=torch.Generator().manual_seed(2)) < density
            found = masked_output(matrix, x, gate, bias)
            exact = gate.double() * (x.double() @ dense.double().t() + bias.double())
            allowed = (
                gate.double().abs() * (bound(x, dense) + 2.0**-23 * (1 + bias.double().abs())) + 1e-6 * exact.abs()
            )
            assert bool(((found.double() - exact).abs() <= allowed).all())
            assert bool((found[gate == 0] == 0).all())


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_takes_up_what_has_changed(format, face):
    matrix = ChannelMatrix.from_dense(draw(70, 90), format)
    for count in (1, 6, 40):
        delta, state, t = draw(count, 90), draw(count, 70, seed=3), limits(90)
        delta[:, ::3] = 0
        before = state.clone()
        assert delta_linear_(matrix, delta, state, t) is state
        live = torch.where(delta.abs() > t, delta, 0.0)
        exact = before.double() + live.double() @ matrix.expand().double().t()
        assert bool(((state.double() - exact).abs() <= bound(live, matrix.expand()) + 2.0**-23 * exact.abs()).all())
        again = state.clone()
        assert torch.equal(delta_linear_(matrix, torch.zeros(count, 90), state), again)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_and_company_change_no_bit(format, face):
    matrix, rows, t = ChannelMatrix.from_dense(draw(301, 257), format), rows_matrix(draw(301, 257), format), limits(257)
    for count in (1, 5, 13, 40):
        x, gate = draw(count, 257, seed=count), torch.relu(draw(count, 301, seed=8))
        one, two, seven = (input_sparse(matrix, x, t, threads=threads) for threads in (1, 2, 7))
        assert torch.equal(one, two)
        assert torch.equal(one, seven)
        one, two, seven = (masked_output(rows, x, gate, threads=threads) for threads in (1, 2, 7))
        assert torch.equal(one, two)
        assert torch.equal(one, seven)
    if face != "reference":
        together = input_sparse(matrix, x, t)
        assert all(torch.equal(input_sparse(matrix, x[i], t), together[i]) for i in (0, 17, 39))


def test_what_no_vector_wants_is_not_read(face):
    w = draw(40, 64)
    w[:, 5] = float("nan")  # a dense product would show it
    x = draw(9, 64)
    x[:, 5] = 0.5
    t = torch.zeros(64)
    t[5] = 0.5
    if face == "reference":
        pytest.skip("the reference reads everything")
    assert bool(input_sparse(ChannelMatrix.from_dense(w), x, t).isfinite().all())
    gate = torch.ones(9, 64)
    gate[:, 5] = 0
    found = masked_output(DenseMatrix.from_dense(w.t().contiguous()), draw(9, 40), gate)
    assert bool(found.isfinite().all())
    assert bool((found[:, 5] == 0).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 4, 40])
def test_a_nan_is_live_and_stays_with_its_vector(format, count, face):
    matrix, t = ChannelMatrix.from_dense(draw(21, 80), format), torch.full((80,), 1e9)
    t[70] = float("inf")
    x = torch.ones(count, 80)
    x[count - 1, 70] = float("nan")
    found = input_sparse(matrix, x, t)
    assert bool(found[count - 1].isnan().all())
    assert bool((found[: count - 1] == 0).all())
    x[count - 1, 70] = float("inf")
    t[70] = 3.0
    assert not bool(input_sparse(matrix, x, t)[count - 1].isfinite().any())
    gate = torch.zeros(count, 21)
    gate[count - 1, 2] = float("nan")
    gated = masked_output(rows_matrix(draw(21, 80), format), torch.ones(count, 80), gate)
    assert bool(gated[count - 1, 2].isnan())
    assert int((gated != 0).sum()) == 1


def test_a_threshold_itself_is_silent_and_all_may_be(face):
    matrix = ChannelMatrix.from_dense(torch.eye(5))
    x = torch.tensor([[1.0, -1.0, 1.0000001, -2.0, -0.0]])
    assert input_sparse(matrix, x, torch.ones(5)).tolist() == [[0, 0, x[0, 2].item(), -2, 0]]
    assert input_sparse(matrix, x, torch.full((5,), 9.0), torch.arange(5.0)).tolist() == [[0, 1, 2, 3, 4]]


def test_bfloat16_vectors_give_the_rounded_float32_result(face):
    matrix, rows, t = ChannelMatrix.from_dense(draw(33, 100)), DenseMatrix.from_dense(draw(33, 100)), limits(100)
    for count in (1, 5, 40):
        x, bias = draw(count, 100).bfloat16(), draw(33, seed=1).bfloat16()
        gate = torch.relu(draw(count, 33, seed=2)).bfloat16()
        assert torch.equal(
            input_sparse(matrix, x, t, bias), input_sparse(matrix, x.float(), t, bias.float()).bfloat16()
        )
        wide = masked_output(rows, x.float(), gate.float(), bias.float())
        assert torch.equal(masked_output(rows, x, gate, bias), wide.bfloat16())


def test_vectors_may_lie_anywhere_in_memory(face):
    matrix, rows, t = ChannelMatrix.from_dense(draw(20, 65)), DenseMatrix.from_dense(draw(20, 65)), limits(65)
    whole = draw(9, 3, 131)
    for view in (whole[:, 1, 1:66], whole[:, :, 66:].transpose(0, 1), whole[::2, 0, ::2][:, :65], whole[0, 0, :65]):
        gate = draw(*view.shape[:-1], 40, seed=2)[..., ::2]
        assert torch.equal(input_sparse(matrix, view, t), input_sparse(matrix, view.contiguous(), t))
        found = masked_output(rows, view, gate)
        assert torch.equal(found, masked_output(rows, view.contiguous(), gate.contiguous()))
        assert found.shape == (*view.shape[:-1], 20)


@pytest.mark.parametrize("group", [32, 96])
def test_four_bit_scales_belong_to_groups_of_a_channel(group, face):
    w = draw(200, 40)
    w[96:] *= 50
    matrix = ChannelMatrix.from_dense(w, "int4", group)
    matrix.validate()
    assert matrix.scales.shape == (40, -(-200 // group))
    step = matrix.scales.float().abs().repeat_interleave(group, 1)[:, :200].t()
    inside = w.abs() <= 7 * step  # those beyond the last step are cut off
    assert float(inside.float().mean()) > 0.8
    assert bool(((matrix.expand() - w).abs() <= 0.501 * step)[inside].all())
    assert 8 * matrix.nbytes / w.numel() < 8
    x = draw(3, 40)
    exact = x.double() @ matrix.expand().double().t()
    assert bool(((input_sparse(matrix, x).double() - exact).abs() <= bound(x, matrix.expand())).all())


def test_what_is_stored_is_one_channel_after_the_other():
    w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert ChannelMatrix.from_dense(w).values[:6].tolist() == [1, 4, 2, 5, 3, 6]
    lines = torch.zeros(1, 40)
    lines[0, 0], lines[0, 16], lines[0, 38] = -8.0, 7.0, -8.0
    matrix = NibbleRowMatrix.from_dense(lines)
    assert matrix.values[:32].tolist() == [0xF0, *[0x88] * 15, *[0x88] * 6, 0x80, *[0x88] * 9]
    assert torch.equal(matrix.expand(), lines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_laid_by_channels_is_kept_once(dtype):
    w = draw(30, 20).to(dtype)
    laid = lay_by_channels(w)
    assert torch.equal(laid, w)
    matrix = ChannelMatrix.of_view(laid)
    matrix.validate()
    assert matrix.values.data_ptr() == laid.data_ptr()
    assert torch.equal(matrix.expand(), w.float())
    x = draw(2, 20)
    assert torch.allclose(torch.nn.functional.linear(x.to(dtype), laid), torch.nn.functional.linear(x.to(dtype), w))
    assert ChannelMatrix.of_view(w) is None
    assert ChannelMatrix.of_view(w.t().contiguous().t()) is None  # nothing is readable behind it


def test_the_operator_gives_the_product_and_the_gradient_of_its_inputs(face):
    matrix = ChannelMatrix.from_dense(draw(20, 72), "int8")
    parts = matrix.tensors()
    x = draw(3, 72).requires_grad_(True)
    y = packed_linear(x, list(parts.values()), None, ",".join(parts), "channels", "int8", 20, 72, 0)
    assert torch.equal(y, matrix.linear(x))
    y.square().sum().backward()
    assert torch.allclose(x.grad, 2 * y.detach() @ matrix.expand(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "format"), [("channels", "int8"), ("channels", "int4"), ("nibble_rows", "int4")])
def test_kinds_pack_and_put_together_again(kind, format):
    matrix = pack(draw(20, 70), kind, format)
    about = {"kind": kind, "shape": (20, 70), "format": format, "group": matrix.group}
    assert torch.equal(rebuild("layer", about, matrix.tensors()).expand(), matrix.expand())
    with pytest.raises(CheckpointError, match=r"is missing|scales are None"):
        rebuild("layer", about, {"values": matrix.values}).validate()


BROKEN = {
    "values too short": lambda m: {"values": m.values[:-1]},
    "values of another dtype": lambda m: {"values": m.values.double()},
    "scales too short": lambda m: {"scales": m.scales[:-1]},
    "scales missing": lambda m: {"scales": None},
    "scales of another dtype": lambda m: {"scales": m.scales.double()},
    "a scale is NaN": lambda m: {"scales": m.scales * float("nan")},
    "shape": lambda m: {"shape": (m.shape[0] + 1, m.shape[1] + 1)},
    "format": lambda m: {"format": "int7"},
}


@pytest.mark.parametrize("part", BROKEN)
@pytest.mark.parametrize("kind", ["int8", "int4", "rows"])
def test_a_matrix_whose_parts_disagree_is_refused(kind, part):
    w = draw(61, 101)
    matrix = NibbleRowMatrix.from_dense(w) if kind == "rows" else ChannelMatrix.from_dense(w, kind)
    matrix.validate("layer")
    with pytest.raises(CheckpointError, match="layer"):
        dataclasses.replace(matrix, **BROKEN[part](matrix)).validate("layer")
    if kind == "int4":
        with pytest.raises(CheckpointError, match="multiple of 32"):
            dataclasses.replace(matrix, group=33).validate()


def test_what_does_not_fit_is_refused_by_name():
    w = draw(5, 96)
    matrix, rows, x = ChannelMatrix.from_dense(w), DenseMatrix.from_dense(w), draw(2, 96)
    with pytest.raises(ConfigurationError, match="float64"):
        ChannelMatrix.from_dense(w.double())
    with pytest.raises(ConfigurationError, match="int7"):
        ChannelMatrix.from_dense(w, "int7")
    for format, group in (("int4", 33), ("int8", 32), ("float32", 32)):
        with pytest.raises(ConfigurationError, match=f"group is {group}"):
            ChannelMatrix.from_dense(w, format, group)
    for thresholds, text in (
        (torch.zeros(95), "95"),
        (torch.zeros(96).double(), "float64"),
        (-torch.ones(96), "negative or NaN"),
        (torch.full((96,), float("nan")), "negative or NaN"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            input_sparse(matrix, x, thresholds)
        with pytest.raises(ConfigurationError, match=text):
            delta_linear_(matrix, x, torch.zeros(2, 5), thresholds)
    for wrong in (draw(2, 95), x.double(), torch.tensor(1.0)):
        with pytest.raises(ConfigurationError, match="takes"):
            input_sparse(matrix, wrong)
        with pytest.raises(ConfigurationError, match="takes"):
            masked_output(rows, wrong, torch.ones(2, 5))
    with pytest.raises(ConfigurationError, match="gate is"):
        masked_output(rows, x, torch.ones(2, 6))
    with pytest.raises(ConfigurationError, match="bias is"):
        input_sparse(matrix, x, bias=torch.ones(6))
    for state in (torch.zeros(2, 6), torch.zeros(2, 5).double(), torch.zeros(5, 2).t()):
        with pytest.raises(ConfigurationError, match="state is"):
            delta_linear_(matrix, x, state)
    w[0, 0] = float("nan")
    for format in ("int8", "int4"):
        with pytest.raises(NonFiniteError, match=format):
            ChannelMatrix.from_dense(w, format)


@pytest.mark.skipif(not available(), reason="there are no compiled kernels")
def test_long_lines_are_worked_on_in_pieces():
    matrix = ChannelMatrix.from_dense(draw(9000, 21), "bfloat16")
    for count in (1, 20):
        x = draw(count, 21)
        exact = x.double() @ matrix.expand().double().t()
        assert bool(((input_sparse(matrix, x).double() - exact).abs() <= bound(x, matrix.expand())).all())
