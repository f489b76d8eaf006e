from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.core.kernel_groups import KernelGroup, KernelRows
from gossamer.errors import CheckpointError, ConfigurationError, TargetError
from gossamer.kernels.convolution_bytes import ByteKernels
from gossamer.kernels.convolution_operators import moves_of
from gossamer.kernels.native import available
from gossamer.runtime.convolution import compress_convolutions, fold_normalisation
from gossamer.runtime.convolution_layers import DepthwiseConv2d, SparseConv2d, natural_block
from gossamer.storage.layers import SparseLinear

native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")


def network():
    """A separable block, a residual and a clamp by function."""
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)

        def forward(self, x):
            return x + nn.functional.relu6(self.norm(self.conv(x)))

    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(), Residual()),
        *(nn.Conv2d(32, 24, 3, padding=1), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(24, 4),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def prune(model, size, sparsity):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
                module.weight *= KernelGroup(size).select(module.weight.abs(), sparsity)
    return model


def test_a_packed_convolution_looks_like_its_dense_twin():
    conv = prune(nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1)), 4, 0.5)[0]
    layer, x = SparseConv2d.from_conv(conv), torch.randn(2, 8, 9, 9)
    assert layer.block == 4
    assert torch.allclose(layer(x), conv(x), atol=1e-5)
    assert torch.equal(layer.weight, conv.weight)
    twin = layer.to_conv()
    assert torch.equal(twin(x), conv(x))
    assert "blocks of 4" in repr(layer)


def test_its_state_can_be_saved_and_loaded_over_another_mask():
    one = SparseConv2d.from_conv(prune(nn.Sequential(nn.Conv2d(8, 12, 1)), 4, 0.5)[0], 4)
    other = SparseConv2d.from_conv(prune(nn.Sequential(nn.Conv2d(8, 12, 1)), 4, 0.8)[0], 4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.weight, one.weight)
    assert torch.equal(other.bias, one.bias)
    broken = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    broken["places"][0] = 99
    with pytest.raises(CheckpointError, match="outside 0"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("format", ["float16", "int8"])
def test_smaller_formats_are_saved_loaded_and_named(format):
    conv = prune(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), 4, 0.5)[0]
    one, x = SparseConv2d.from_conv(conv, 4, format=format), torch.randn(2, 8, 9, 9)
    other = SparseConv2d.from_conv(nn.Conv2d(8, 12, 3, padding=1), 4, format=format)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
        assert torch.equal(copy.deepcopy(one)(x), one(x))
        assert float((one(x) - conv(x)).norm() / conv(x).norm()) < (0.02 if format == "int8" else 1e-3)
    assert f"stored in {format}" in repr(one)
    assert one.kernels.nbytes < SparseConv2d.from_conv(conv, 4).kernels.nbytes
    broken = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    broken["places"].view(-1)[0] = 99
    with pytest.raises(CheckpointError, match="outside 0"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_natural_block_is_the_pattern_that_was_pruned(size):
    torch.manual_seed(0)
    weight = torch.randn(64, 40, 1, 1)
    assert natural_block(weight * KernelGroup(size).select(weight.abs(), 0.5)) == size
    short = torch.randn(37, 40, 1, 1)
    assert natural_block(short * KernelGroup(size).select(short.abs(), 0.5)) == size


def test_normalisation_is_folded_without_changing_outputs_or_the_model():
    model, x = network(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    folded = fold_normalisation(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@native_only
@pytest.mark.parametrize("size", [1, 16])
def test_a_network_puts_out_the_same_with_sparse_kernels(size):
    model, x = prune(network(), size, 0.6), torch.randn(2, 3, 16, 16)
    report = compress_convolutions(model, x, measured=False)
    assert report.sparse == 3
    assert [layer.kernel for layer in report.layers] == ["dense", "depthwise", *[f"blocks of {size}"] * 3]
    assert str(report) == f"3 × blocks of {size}, 1 × dense, 1 × depthwise"
    with torch.no_grad():
        assert torch.allclose(report.model(x), model(x), atol=1e-5)


@native_only
def test_clamps_become_part_of_sparse_convolutions():
    report = compress_convolutions(prune(network(), 4, 0.6), torch.randn(1, 3, 16, 16), measured=False)
    packed = [module for module in report.model.modules() if isinstance(module, SparseConv2d)]
    assert [layer.bounds for layer in packed] == [(0.0, 6.0), (0.0, 6.0), None]
    deep = next(module for module in report.model.modules() if isinstance(module, DepthwiseConv2d))
    assert deep.bounds == (0.0, float("inf"))
    assert not any(isinstance(module, nn.ReLU) for module in report.model.modules())


@native_only
@pytest.mark.parametrize("winner", ["dense", "depthwise", "blocks of 1", "blocks of 4", "blocks of 16"])
def test_what_measured_fastest_is_used(winner):
    model, x = prune(network(), 4, 0.6), torch.randn(1, 3, 16, 16)
    offered = []

    def measure(runs):
        outputs = [run() for run in runs.values()]
        assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)
        offered.append(set(runs))
        return {name: 1.0 - (name == winner) for name in runs}

    report = compress_convolutions(model, x, measure=measure)
    sparse = {"dense", "blocks of 1", "blocks of 4"}
    assert offered == [{"dense", "blocks of 16"}, {"dense", "depthwise"}, sparse, sparse, sparse]
    assert [layer.kernel for layer in report.layers] == [winner if winner in each else "dense" for each in offered]
    with torch.no_grad():
        assert torch.allclose(report.model(x), model(x), atol=1e-5)


@native_only
def test_smaller_formats_compete_where_they_are_allowed():
    model, x = prune(network(), 4, 0.6), torch.randn(1, 3, 16, 16)
    offered = []

    def measure(runs):
        offered.append(set(runs))
        return {name: 1.0 - (name == "blocks of 4 in int8") for name in runs}

    report = compress_convolutions(model, x, formats=("float16", "int8"), measure=measure)
    kinds = {f"blocks of {block} in {kind}" for block in (1, 4) for kind in ("float16", "int8")}
    assert offered[2] == {"dense", *kinds}
    assert [layer.kernel for layer in report.layers[2:]] == ["blocks of 4 in int8"] * 3
    with torch.no_grad():
        assert float((report.model(x) - model(x)).norm() / model(x).norm()) < 0.05
    first = compress_convolutions(model, x, formats=("int8",), measured=False)
    assert [layer.kernel for layer in first.layers[2:]] == ["blocks of 4 in int8"] * 3
    for formats in ((), ("int4",)):
        with pytest.raises(ConfigurationError, match="choose from"):
            compress_convolutions(model, x, formats=formats)


@native_only
@pytest.mark.parametrize(("size", "kind"), [(1, "bitmask"), (4, "blocks4"), (16, "blocks16")])
def test_a_classifier_that_was_pruned_in_groups_is_packed_in_them(size, kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 32)), torch.randn(2, 3, 8, 8)
    head, offered = model[-1], []
    with torch.no_grad():
        head.weight *= KernelGroup(size).select(head.weight.abs(), 0.7)

    def measure(runs):
        outputs = [run() for run in runs.values()]
        assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)
        offered.append(set(runs))
        return {name: 1.0 - (name == kind) for name in runs}

    report = compress_convolutions(model.eval(), x, measure=measure)
    assert offered[-1] == {"dense", "csr", "bitmask", kind}
    assert report.layers[-1].kernel == kind
    assert compress_convolutions(model, x, measured=False).layers[-1].kernel == kind


@native_only
def test_a_sparse_classifier_and_pruned_rows_of_depthwise_kernels_are_packed_too():
    model, x = prune(network(), 4, 0.6), torch.randn(5, 3, 16, 16)
    deep, head = model[3], model[-1]
    with torch.no_grad():
        deep.weight *= KernelRows().select(deep.weight.abs(), 0.3)
        head.weight *= KernelGroup(1).select(head.weight.abs(), 0.8)
    report = compress_convolutions(model, x, measured=False)
    assert report.layers[-1].kernel == "bitmask"
    assert report.layers[-1].shape == (4, 24)
    assert report.sparse == 5
    assert isinstance(report.model.get_submodule(report.layers[-1].name), SparseLinear)
    with torch.no_grad():
        assert torch.allclose(report.model(x), model(x), atol=1e-5)


def test_dense_networks_stay_dense_and_those_without_convolutions_are_refused():
    model, x = network(), torch.randn(1, 3, 16, 16)
    report = compress_convolutions(model, x)
    assert report.sparse == 0
    assert {layer.kernel for layer in report.layers[2:]} == {"dense"}
    with torch.no_grad():
        assert torch.allclose(report.model(x), model(x), atol=1e-5)
    with pytest.raises(TargetError, match="no convolution"):
        compress_convolutions(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), torch.randn(1, 4, 8, 8))


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigurationError, match="one group"):
        SparseConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ConfigurationError, match="format is 'int4'"):
        SparseConv2d.from_conv(nn.Conv2d(4, 4, 3), format="int4")
    with pytest.raises(ConfigurationError, match="not depthwise"):
        DepthwiseConv2d.from_conv(nn.Conv2d(4, 4, 3))


def test_a_depthwise_layer_has_the_state_of_its_twin():
    conv = nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6)
    layer, x = DepthwiseConv2d.from_conv(conv, (0.0, 6.0)), torch.randn(2, 6, 11, 12)
    other = DepthwiseConv2d.from_conv(nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6), (0.0, 6.0))
    other.load_state_dict(conv.state_dict())
    with torch.no_grad():
        assert torch.allclose(layer(x), conv(x).clamp(0, 6), atol=1e-5)
        assert torch.equal(other(x), layer(x))
    assert "clamped" in repr(layer)


def layers():
    """Both kinds of layers and the dense networks that they stand for."""
    torch.manual_seed(0)
    conv = prune(nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1)), 2, 0.5)[0]
    deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    return [
        (SparseConv2d.from_conv(conv, 2, (0.0, 1.0)), nn.Sequential(conv, nn.Hardtanh(0.0, 1.0))),
        (SparseConv2d.from_conv(conv, 1), conv),
        (DepthwiseConv2d.from_conv(deep, (0.0, float("inf"))), nn.Sequential(deep, nn.ReLU())),
        (SparseConv2d.from_conv(conv, 2, None, "float16"), halved(conv)),
        (SparseConv2d.from_conv(conv, 2, (0.0, 1.0), "int8"), nn.Sequential(whole(conv), nn.Hardtanh(0.0, 1.0))),
        (SparseConv2d.from_conv(conv, 1, None, "int8", (-5.0, 5.0)), whole(conv)),
    ]


def halved(conv):
    """The dense twin of weights in half precision."""
    twin = copy.deepcopy(conv)
    twin.weight.data = conv.weight.data.half().float()
    return twin


def whole(conv):
    """The dense twin of weights in bytes."""
    twin = copy.deepcopy(conv)
    twin.weight.data = ByteKernels.from_dense(conv.weight, 1).expand()
    return twin


@pytest.mark.parametrize("number", range(6))
def test_gradients_reach_the_inputs_as_through_the_dense_twin(number):
    layer, twin = layers()[number]
    x = torch.randn(2, 6, 9, 8)
    gradients = []
    for module in (layer, twin):
        own = x.clone().requires_grad_()
        y = module(own)
        y.backward(torch.ones_like(y) + torch.arange(y.shape[-1]))
        gradients.append(own.grad)
    # bytes round the inputs too, and a result near a bound may fall to its other side
    apart = (gradients[0] - gradients[1]).abs() > 1e-5
    assert float(apart.double().mean()) <= (0.1 if number == 4 else 0)


@pytest.mark.parametrize("number", range(6))
def test_a_compiled_layer_is_one_graph_and_computes_the_same(number):
    layer, _ = layers()[number]
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("number", range(6))
def test_operators_keep_the_promises_of_torch(number):
    layer, _ = layers()[number]
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    low, high = layer.bounds or (-float("inf"), float("inf"))
    if isinstance(layer, SparseConv2d):
        about = ([tensor for _, tensor in layer.named_buffers()], list(layer.shape), layer.block)
        arguments = (*about, moves_of(layer.window), [low, high])
        operator = torch.ops.gossamer.stored_convolution.default
    else:
        arguments = (layer.weight, moves_of(layer.window), low, high)
        operator = torch.ops.gossamer.depthwise_convolution.default
    torch.library.opcheck(operator, (x, layer.bias, *arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("number", [0, 3, 4])
def test_another_dtype_of_the_model_leaves_stored_weights_alone(dtype, number):
    layer, x = layers()[number][0], torch.randn(2, 6, 9, 8)
    before, wanted = {name: t.clone() for name, t in layer.named_buffers()}, layer(x)
    layer.to(dtype)
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert layer.bias.dtype == dtype
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, atol=0.02)
