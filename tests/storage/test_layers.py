"""Packed layers beside their dense twins."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.storage.layers import PackedEmbedding, SparseLinear

KINDS = [("bitmask", f) for f in ("float32", "bfloat16", "int8", "int4")] + [("dense", "float32"), ("dense", "int8")]
KINDS += [("groups", "int4"), ("nibbles", "int4"), ("csr", "bfloat16"), ("blocks4", "int8"), ("blocks16", "float32")]
KINDS += [("nm", "float32"), ("nm", "int8")]


def linear(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(40, 96) < 0.6, 0)
        layer.weight[:, 32:64] = 0  # two groups of sixteen
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_it_computes_what_its_dense_twin_does(kind, format, bias):
    layer = SparseLinear.from_linear(linear(bias), kind, format)
    twin = layer.to_linear()
    for shape in ((96,), (3, 96), (2, 50, 96), (0, 96)):
        x = torch.randn(shape)
        assert layer(x).shape == twin(x).shape
        # four-bit kernels may round each input by up to half of 1/127 of its group's largest, here below 4
        rounding = 4 / 254 * twin.weight.abs().sum(1) if layer.matrix.rounds(1) else 0
        assert bool(((layer(x) - twin(x)).abs() <= rounding + 1e-5).all())
    assert (layer.in_features, layer.out_features) == (96, 40)
    assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lossless_layer_stores_the_very_weights(dtype):
    dense = linear(dtype=dtype)
    layer = SparseLinear.from_linear(dense)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.dtype == layer(torch.randn(2, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_gradients_reach_inputs_and_bias_as_in_the_dense_twin(kind, format):
    layer = SparseLinear.from_linear(linear(), kind, format)
    twin = layer.to_linear()
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 5, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    weights = torch.randn(4, 5, 40)
    (layer(x) * weights).sum().backward()
    (twin(y) * weights).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_stored_values_can_be_trained_and_zeros_stay_zero():
    layer = SparseLinear.from_linear(linear()).train_values()
    twin = layer.to_linear()
    mask = layer.matrix.mask()
    x = torch.randn(7, 96)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    kept = int(mask.sum())
    assert torch.allclose(layer.values.grad[:kept], twin.weight.grad[mask], rtol=1e-4, atol=1e-4)
    assert bool((layer.values.grad[kept:] == 0).all())
    with torch.no_grad():
        layer.values.sub_(layer.values.grad, alpha=0.01)
    assert torch.equal(layer.weight != 0, mask)
    with pytest.raises(ConfigurationError, match="int8"):
        SparseLinear.from_linear(linear(), "bitmask", "int8").train_values()


def test_the_operators_keep_the_rules_of_torch():
    layer = SparseLinear.from_linear(linear()).train_values()
    torch.library.opcheck(
        torch.ops.gossamer.bitmask_linear.default,
        (torch.randn(3, 96), layer.values, layer.bias, layer.bits, layer.starts, None, 96, 0, "float32"),
    )
    layer = SparseLinear.from_linear(linear(), "dense", "int8")
    for kind, format in (
        ("dense", "int8"),
        ("groups", "int4"),
        ("nibbles", "int4"),
        ("blocks8", "int8"),
        ("nm", "int8"),
    ):
        matrix = SparseLinear.from_linear(linear(), kind, format).matrix
        parts = matrix.tensors()
        about = (",".join(parts), kind, format, 40, 96, getattr(matrix, "group", 0))
        torch.library.opcheck(
            torch.ops.gossamer.packed_linear.default,
            (torch.randn(3, 96, requires_grad=True), [*parts.values()], layer.bias, *about),
        )


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_a_state_dict_goes_through_safetensors_and_back(kind, format, tmp_path):
    layer = nn.Sequential(SparseLinear.from_linear(linear(), kind, format))
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    other = nn.Sequential(SparseLinear.from_linear(nn.Linear(96, 40), "bitmask", "float32"))
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other[0].kind == kind
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_conversions_and_copies_leave_every_stored_bit(kind, format):
    layer = SparseLinear.from_linear(linear(), kind, format)
    before = {name: part.clone() for name, part in layer.matrix.tensors().items()}
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert all(torch.equal(part, before[name]) for name, part in other.matrix.tensors().items())
    assert other.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "part"), [("groups", "places"), ("groups", "zeros"), ("nibbles", "offsets")])
def test_broken_parts_of_four_bit_layers_are_refused(kind, part):
    layer = nn.Sequential(SparseLinear.from_linear(linear(), kind))
    state = copy.deepcopy(layer.state_dict())
    state[f"0.{part}"] = state[f"0.{part}"][1:]
    with pytest.raises(CheckpointError, match=r"0 .* is broken"):
        layer.load_state_dict(state)


def test_a_dense_state_dict_is_packed_when_it_is_loaded():
    layer = SparseLinear.from_linear(nn.Linear(96, 40))
    dense = linear()
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, dense.weight)
    with pytest.raises(CheckpointError, match="39"):
        layer.load_state_dict({"weight": torch.zeros(39, 96), "bias": torch.zeros(40)})


@pytest.mark.parametrize("change", ["starts", "values", "missing", "extra"])
def test_a_broken_state_is_refused_and_nothing_changes(change):
    layer = nn.Sequential(SparseLinear.from_linear(linear()))
    before = layer[0].weight
    state = copy.deepcopy(layer.state_dict())
    if change == "missing":
        del state["0.bits"]
    elif change == "extra":
        state["0._extra_state"] = torch.tensor([1, 2], dtype=torch.uint8)
    else:
        state[f"0.{change}"] = state[f"0.{change}"][1:]
    with pytest.raises(CheckpointError, match="0"):
        layer.load_state_dict(state)
    assert torch.equal(layer[0].weight, before)


def test_conversions_change_outputs_and_not_what_is_stored():
    layer = SparseLinear.from_linear(linear(), "bitmask", "float32")
    values = layer.values.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.values.dtype == torch.float32
    assert torch.equal(layer.values, values)
    assert layer.float().weight.dtype == torch.float32


def test_its_text_says_what_it_is():
    layer = SparseLinear.from_linear(linear(), "bitmask", "int8")
    assert "in_features=96, out_features=40, bias=True, bitmask int8" in repr(layer)
    with pytest.raises(ConfigurationError, match="coo"):
        SparseLinear.from_linear(linear(), "coo")
    with pytest.raises(ConfigurationError, match="always int4"):
        SparseLinear.from_linear(linear(), "groups", "int8")
    with pytest.raises(ConfigurationError, match="have 16 columns"):
        SparseLinear.from_linear(linear(), "groups", group=32)


def test_copies_and_pickles_are_independent():
    layer = SparseLinear.from_linear(linear())
    other = copy.deepcopy(layer)
    other.values.zero_()
    assert bool((layer.weight != 0).any())
    assert bool((other.weight == 0).all())


@pytest.mark.parametrize("kind", ["bitmask", "groups", "nibbles"])
def test_compiled_and_eager_agree(kind):
    layer = SparseLinear.from_linear(linear(), kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 96)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("kind", [BitmaskMatrix, DenseMatrix])
@pytest.mark.parametrize("scale", [1.0, 24.0])
def test_an_embedding_reads_rows(kind, scale):
    table = nn.Embedding(30, 16)
    layer = PackedEmbedding(kind.from_dense(table.weight.detach()), scale=scale)
    ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
    assert torch.equal(layer(ids), table(ids) * scale)
    assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 16)
    assert (layer.num_embeddings, layer.embedding_dim) == (30, 16)
