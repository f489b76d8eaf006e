"""Layers that train without storing a zero, beside dense layers under the same mask."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.optimizer_state import per_weight, rearrange
from gossamer.core.targets import find_targets
from gossamer.errors import CheckpointError, ConfigurationError, TargetError
from gossamer.kernels import native
from gossamer.measure.training_memory import training_memory
from gossamer.runtime.choice import Choices
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.layer_choice import (
    DENSE,
    NONZEROS,
    first_masks,
    measure_training,
    sparsify_layers,
    stored_sparsely,
)
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.sparse_layers import SparseLinear, SparsePointwise

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_mask(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["float64", *native.instruction_sets()])
def dtype(request):
    """Float64 goes through torch, float32 through every set of compiled kernels."""
    if request.param == "float64":
        yield torch.float64
    else:
        with native.using(request.param):
            yield torch.float32


def pair(kind: str, dtype: torch.dtype, mask: torch.Tensor | None = None):
    """A sparse layer, its dense twin, the mask and inputs."""
    if kind == "linear":
        dense, sparse, x = nn.Linear(30, 20), SparseLinear, torch.randn(4, 7, 30)
    else:
        dense, sparse, x = nn.Conv2d(30, 20, 1), SparsePointwise, torch.randn(3, 30, 5, 9)
    mask = random_mask(*dense.weight.shape) if mask is None else mask.view(dense.weight.shape)
    layer = sparse.from_dense(dense.to(dtype), mask)
    return layer, layer.to_dense(), mask, x.to(dtype)


def gradients(module: nn.Module, x: torch.Tensor, outputs: torch.Tensor):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    found = module(x)
    found.backward(outputs)
    return found.detach(), x.grad


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
@pytest.mark.parametrize("kept", ["some", "all", "none", "an empty row"])
def test_outputs_and_gradients_are_those_of_the_dense_twin(kind, kept, dtype):
    mask = {"some": random_mask(20, 30), "all": random_mask(20, 30, density=2), "none": random_mask(20, 30, density=0)}
    rows = random_mask(20, 30)
    rows[3] = False
    layer, dense, mask, x = pair(kind, dtype, mask.get(kept, rows))
    wide = copy.deepcopy(dense).double()
    outputs = torch.randn_like(dense(x))
    found, expected = gradients(layer, x, outputs), gradients(wide, x.double(), outputs.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, **CLOSE)
    assert torch.allclose(layer.values.grad.double(), wide.weight.grad[mask], **CLOSE)
    assert torch.allclose(layer.bias.grad.double(), wide.bias.grad, **CLOSE)
    assert layer.values.shape == (int(mask.sum()),)
    assert torch.equal(layer.mask(), mask)


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
def test_gradients_agree_with_finite_differences(kind):
    mask = random_mask(4, 6)
    x = torch.randn(3, 6, dtype=torch.float64) if kind == "linear" else torch.randn(2, 6, 2, 2, dtype=torch.float64)
    layer = (SparseLinear if kind == "linear" else SparsePointwise)(6, 4, mask=mask, dtype=torch.float64)
    x.requires_grad_()

    def product(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.values, layer.bias))


def test_images_that_lie_channels_last_give_results_that_do(dtype):
    layer, dense, _, x = pair("pointwise", dtype)
    last = x.to(memory_format=torch.channels_last)
    outputs = torch.randn_like(dense(last))
    found, expected = gradients(layer, last, outputs), gradients(dense, x, outputs)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found[0], expected[0], **CLOSE)
    assert torch.allclose(found[1], expected[1], **CLOSE)
    assert torch.allclose(layer.values.grad, dense.weight.grad[layer.mask()], **CLOSE)


def test_inputs_of_another_precision_come_back_in_it():
    layer, dense, _, x = pair("linear", torch.float32)
    found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dense(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
def test_the_dense_gradient_adds_up_over_micro_batches(kind):
    layer, dense, mask, x = pair(kind, torch.float32)
    outputs = torch.randn_like(dense(x))
    layer(x).backward(outputs)
    assert layer.dense_gradient is None
    layer.collect_gradient = True
    for module in (layer, dense):
        for part, gradient in zip(x.split(1), outputs.split(1), strict=True):
            module(part).backward(gradient)
    assert layer.dense_gradient.shape == mask.shape
    assert torch.allclose(layer.dense_gradient, dense.weight.grad, **CLOSE)


def test_a_second_derivative_is_refused():
    layer, _, _, x = pair("linear", torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------- topology


def test_a_change_of_topology_keeps_what_stays_and_starts_the_rest_at_zero():
    layer, dense, mask, _ = pair("linear", torch.float32)
    values, parameter = layer.values.detach().clone(), layer.values
    layer.values.grad = torch.ones_like(layer.values)
    new = random_mask(20, 30, density=0.5, seed=1)
    source = layer.set_mask(new)
    assert layer.values is parameter
    assert parameter.grad is None
    assert parameter.shape == (int(new.sum()),)
    assert torch.equal(layer.dense_weight(), dense.weight * new)
    assert torch.equal(layer.mask(), new)
    expected = torch.full((20, 30), -1)
    expected[mask] = torch.arange(len(values))
    assert torch.equal(source, expected[new])


def test_training_goes_on_after_a_change_while_an_old_loss_is_held():
    layer, _, _, x = pair("linear", torch.float32)
    loss = layer(x).sum()
    loss.backward()
    layer.set_mask(random_mask(20, 30, seed=1))
    again = layer(x).sum()  # the old graph still lives
    again.backward()
    assert layer.values.grad.shape == layer.values.shape
    del loss


def test_a_mask_that_changes_between_forward_and_backward_is_reported():
    layer, _, _, x = pair("linear", torch.float32)
    found = layer(x).sum()
    layer.set_mask(random_mask(20, 30, seed=1, density=0.1))
    with pytest.raises(ConfigurationError, match="between forward and backward"):
        found.backward()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimiser_moves_the_values_as_it_moves_those_of_a_masked_layer(make):
    layer, dense, mask, x = pair("linear", torch.float64)
    settings = {"momentum": 0.9} if make is torch.optim.SGD else {}
    first, second = make(layer.parameters(), lr=0.01, **settings), make(dense.parameters(), lr=0.01, **settings)
    for step in range(6):
        for module, optimizer in ((layer, first), (dense, second)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is dense:
                dense.weight.grad *= mask
            optimizer.step()
        with torch.no_grad():
            dense.weight *= mask
        if step == 2:
            smaller = mask & random_mask(20, 30, density=0.7, seed=2)
            rearrange(first, layer.values, per_weight(first, layer.values), layer.set_mask(smaller))
            mask = smaller
            with torch.no_grad():
                dense.weight *= mask
    assert torch.allclose(layer.dense_weight(), dense.weight, rtol=1e-9, atol=1e-12)
    for value in first.state[layer.values].values():
        assert value.ndim == 0 or value.shape == layer.values.shape


def network(sparse: bool, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    if sparse:
        for name in ("0", "2"):
            layer = model.get_submodule(name)
            setattr(model, name, SparseLinear.from_dense(layer, torch.ones_like(layer.weight, dtype=torch.bool)))
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


METHODS = {
    "set": lambda: SET(sparsity=0.7, every=3, end=30, exclude=("4",)),
    "rigl": lambda: RigL(sparsity=0.7, every=3, end=30, exclude=("4",)),
    "gmp": lambda: GradualMagnitudePruning(sparsity=0.7, begin=2, end=20, every=3, exclude=("4",)),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_it_as_they_train_a_masked_layer(method):
    found = {}
    for sparse in (False, True):
        model = network(sparse, torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        training = METHODS[method]().attach(model, optimizer)
        steps(model, optimizer, 0, 25)
        assert ("0" in stored_sparsely(model)) == sparse
        masks = training.finalize()
        assert not stored_sparsely(model)
        found[sparse] = model.state_dict(), masks
    assert found[True][1] == found[False][1]
    for name, weight in found[False][0].items():
        assert torch.allclose(found[True][0][name], weight, rtol=1e-9, atol=1e-12), name


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not():
    def start():
        model = network(True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer

    whole, optimizer = start()
    METHODS["rigl"]().attach(whole, optimizer)
    steps(whole, optimizer, 0, 20)
    model, optimizer = start()
    training = METHODS["rigl"]().attach(model, optimizer)
    steps(model, optimizer, 0, 10)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), training.state_dict()], file)
    file.seek(0)
    saved = torch.load(file)
    model, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    METHODS["rigl"]().attach(model, optimizer, saved[2])
    steps(model, optimizer, 10, 20)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# ---------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_brings_its_own_topology():
    layer, *_ = pair("linear", torch.float32)
    other = SparseLinear(30, 20, mask=random_mask(20, 30, density=0.05, seed=3))
    parameter = other.values
    other.load_state_dict(layer.state_dict())
    assert other.values is parameter
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    assert torch.equal(other.bias, layer.bias)


def test_a_damaged_checkpoint_is_refused():
    layer, *_ = pair("linear", torch.float32)
    state = layer.state_dict()
    with pytest.raises(CheckpointError, match="keeps"):
        layer.load_state_dict({**state, "values": state["values"][1:]})
    with pytest.raises(CheckpointError, match="bytes of mask"):
        layer.load_state_dict({**state, "mask_bits": state["mask_bits"][1:]})
    with pytest.raises(RuntimeError, match="mask_bits"):
        layer.load_state_dict({name: tensor for name, tensor in state.items() if name != "mask_bits"})


def test_a_copy_shares_nothing():
    layer, _, mask, x = pair("linear", torch.float32)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    layer.set_mask(random_mask(20, 30, seed=5))
    with torch.no_grad():
        layer.values.fill_(7)
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin.mask(), mask)


def test_conversions_touch_values_and_leave_the_index():
    layer, _, mask, x = pair("linear", torch.float32)
    wide = copy.deepcopy(layer).double()
    assert wide.values.dtype == torch.float64
    assert wide.rows_starts.dtype == torch.int32
    assert torch.allclose(wide(x.double()).float(), layer(x), **CLOSE)
    assert f"{mask.float().mean():.1%} of the weights" in repr(layer)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="mask is"):
        SparseLinear(4, 3, mask=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="mask is"):
        SparseLinear(4, 3).set_mask(torch.ones(3, 4))
    with pytest.raises(ConfigurationError, match=r"takes \(…, 4\)"):
        SparseLinear(4, 3)(torch.ones(2, 5))
    with pytest.raises(ConfigurationError, match="floating"):
        SparseLinear(4, 3)(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="height"):
        SparsePointwise(4, 3)(torch.ones(2, 4, 5))
    with pytest.raises(ConfigurationError, match="not pointwise"):
        SparsePointwise.from_dense(nn.Conv2d(4, 3, 3))


# ---------------------------------------------------------------------------------------------- memory


def test_training_holds_a_small_share_of_what_a_dense_adam_holds():
    def held(model):
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(2, 2560)).sum().backward()
        optimizer.step()
        return training_memory(model, optimizer)

    dense = nn.Linear(2560, 640, bias=False)
    mask = random_mask(640, 2560, density=0.05)
    sparse = SparseLinear.from_dense(dense, mask)
    before, after = held(dense), held(sparse)
    weights = 640 * 2560
    steps_taken = 4
    assert before.total == 16 * weights + steps_taken
    count = int(mask.sum())
    assert after.parameters == after.gradients == 4 * count
    assert after.optimizer == 8 * count + steps_taken
    assert after.buffers == sparse.index_bytes
    assert after.total <= 0.15 * before.total


def test_a_checkpoint_is_a_small_share_of_a_dense_one():
    dense = nn.Linear(1000, 500)
    layer = SparseLinear.from_dense(dense, random_mask(500, 1000, density=0.1))
    sizes = [sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (layer, dense)]
    assert sizes[0] <= 0.14 * sizes[1]


# ---------------------------------------------------------------------------------------------- choosing


def choices(tmp_path, faster):
    """Measured times of a machine on which layers with more rows than `faster` gain."""
    return Choices(
        tmp_path / "choices.json",
        lambda case, storages: {DENSE: 2.0, NONZEROS: 1.0 if case.rows > faster else 3.0},
    )


def test_a_layer_is_swapped_only_where_it_was_measured_to_be_faster(tmp_path):
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 10), nn.Conv2d(3, 30, 1), nn.Conv2d(3, 30, 3))
    dense = copy.deepcopy(model)
    masks = MaskSet({f"{i}.weight": random_mask(*model[i].weight.shape, seed=i) for i in range(4)})
    report = sparsify_layers(model, masks, {"0": 5, "1": 5, "2": 50, "3": 50}, choices(tmp_path, 20))
    masks.apply_(dense)
    assert {name: type(layer) for name, layer in stored_sparsely(model).items()} == {
        "0": SparseLinear,
        "2": SparsePointwise,
    }
    assert [(row.name, row.sparse) for row in report] == [("0", True), ("1", False), ("2", True), ("3", False)]
    assert report[0].dense_seconds == 2.0
    assert report[0].sparse_seconds == 1.0
    assert report[2].positions == 50
    assert "Conv2d has no form" in report[3].reason
    x, image = torch.randn(5, 12), torch.randn(2, 3, 6, 6)
    assert torch.allclose(model[1](model[0](x)), dense[1](dense[0](x)), **CLOSE)
    assert torch.allclose(model[2](image), dense[2](image), **CLOSE)
    assert torch.equal(model[3].weight, dense[3].weight)


def test_layers_can_be_swapped_with_the_masks_with_which_a_method_will_start(tmp_path):
    model = network(False)
    before = copy.deepcopy(model.state_dict())
    method = SET(sparsity=0.7, every=3, end=30, exclude=("4",))
    masks = first_masks(method, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights = {name: model.get_parameter(name).detach() * mask for name, mask in masks.items()}
    sparsify_layers(model, masks, 16, choices(tmp_path, 0))
    training = method.attach(model, torch.optim.Adam(model.parameters()))
    assert set(stored_sparsely(model)) == {"0", "2"}
    for name, weight in weights.items():
        assert weight.count_nonzero() == masks[name].sum()
        assert torch.equal(training.weight(name), weight)


def test_tied_weights_stay_dense(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6, bias=False))
    model[1].weight = model[0].weight
    (row,) = sparsify_layers(model, {"1.weight": random_mask(6, 8)}, 10, choices(tmp_path, 0))
    assert not row.sparse
    assert "also 0.weight" in row.reason


def test_what_cannot_be_swapped_is_refused_before_anything_changes(tmp_path):
    model = network(False)
    before = copy.deepcopy(model.state_dict())
    mask = random_mask(24, 12)
    with pytest.raises(TargetError, match="nowhere"):
        sparsify_layers(model, {"0.weight": mask, "nowhere.weight": mask}, 5)
    with pytest.raises(ConfigurationError, match="mask of"):
        sparsify_layers(model, {"0.weight": mask, "2.weight": mask}, 5)
    with pytest.raises(ConfigurationError, match="positions of '0'"):
        sparsify_layers(model, {"0.weight": mask}, {"2": 5})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
def test_measuring_gives_a_time_for_both_forms(tmp_path):
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU())
    known = Choices(tmp_path / "choices.json", measure_training)
    (row,) = sparsify_layers(model, {"0.weight": random_mask(50, 40)}, 8, known)
    assert row.dense_seconds > 0
    assert row.sparse_seconds > 0
    assert row.sparse == (row.sparse_seconds < row.dense_seconds)


def test_targets_of_the_two_forms_have_the_same_names_and_shapes():
    found = [[(t.name, tuple(t.shape)) for t in find_targets(network(sparse), heads=True)] for sparse in (False, True)]
    assert found[0] == found[1]
