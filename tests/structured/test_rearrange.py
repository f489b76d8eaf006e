from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.core.channel_groups import find_channel_groups
from gossamer.core.kernel_groups import KernelGroup
from gossamer.core.patterns import Pattern
from gossamer.errors import ConfigurationError, ModelError, PatternError
from gossamer.structured.rearrange import OrderSearch, magnitudes, rearrange_channels


class Gated(nn.Module):
    """Everything that ties channels: a residual, a depthwise convolution, a gate, normalisation, a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 16, 1)
        self.widen = nn.Conv2d(16, 20, 3, stride=2, padding=1)
        self.act = nn.PReLU(20)
        self.hidden = nn.Linear(20 * 4 * 4, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = functional.relu6(self.stem_norm(self.stem(x)))
        y = functional.silu(self.expand_norm(self.expand(x)))
        y = self.depthwise(y)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project(y * gate)
        x = torch.flatten(self.act(self.widen(x)), 1)
        return self.head(functional.relu(self.hidden(x)))


def network():
    torch.manual_seed(0)
    model = Gated()
    for module in model.modules():  # as training leaves it
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 2)
        elif isinstance(module, nn.PReLU):
            module.weight.data.uniform_(0, 1)
    return model.eval()


def test_a_residual_a_depthwise_convolution_and_a_gate_tie_channels():
    groups = {frozenset(group.outputs()): group for group in find_channel_groups(network())}
    assert frozenset({"stem.weight", "stem_norm.weight", "project.weight"}) in groups
    tied = groups[frozenset({"expand.weight", "expand_norm.weight", "depthwise.weight", "excite.weight"})]
    assert tied.size == 32
    assert tied.free
    inputs = {axis.name for axis in tied.axes if axis.dim == 1}
    assert inputs == {"squeeze.weight", "project.weight"}
    flattened = next(
        axis for group in groups.values() for axis in group.axes if axis.name == "hidden.weight" and axis.dim
    )
    assert flattened.repeat == 16
    assert [group.outputs() for group in groups.values() if not group.free] == [["head.weight"]]


def test_any_order_of_free_channels_leaves_the_outputs_alone():
    model, x = network(), torch.randn(2, 3, 8, 8)
    wanted = model(x)
    before = copy.deepcopy(model.state_dict())
    for group in find_channel_groups(model):
        if group.free:
            group.permute_(model, torch.randperm(group.size))
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert sum(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) > 20


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_rearranging_keeps_the_outputs_and_never_keeps_less(size, sparsity):
    model, x = network(), torch.randn(2, 3, 8, 8)
    wanted = model(x)
    found = rearrange_channels(model, KernelGroup(size), sparsity, starts=1)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert len(found) == 5
    assert all(each.after >= each.before for each in found)
    assert sum(each.after for each in found) > sum(each.before for each in found)


def test_the_reported_value_is_what_the_pattern_keeps():
    model, pattern = network(), KernelGroup(8)
    for each in rearrange_channels(model, pattern, 0.5, starts=0):
        kept = 0.0
        for name in each.layers:
            scores = magnitudes(model.get_parameter(name))
            kept += float(scores[pattern.select(scores, 0.5)].sum())
        assert kept == pytest.approx(each.after, rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_search_reaches_the_best_of_all_orders_of_eight_channels(seed, sparsity):
    scores = torch.rand(8, 6, generator=torch.Generator().manual_seed(seed)) ** 3
    search = OrderSearch([scores], 4, sparsity)
    partitions = [
        torch.tensor([0, *rest, *(i for i in range(1, 8) if i not in rest)])
        for rest in itertools.combinations(range(1, 8), 3)
    ]
    best = max(search.value(order) for order in partitions)
    assert len(partitions) == 35
    assert search.value(search.run(starts=4)) == pytest.approx(best, rel=1e-6)


def test_channels_that_need_the_same_inputs_find_each_other():
    scores = torch.zeros(16, 8)
    scores[0::2, :4] = 1
    scores[1::2, 4:] = 1
    search = OrderSearch([scores], 8, 0.5)
    order = search.run(starts=0)
    assert search.value(torch.arange(16)) == 32
    assert search.value(order) == 64
    assert {int(i) % 2 for i in order[:8]} in ({0}, {1})


def test_several_layers_share_one_order():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(10, 5, generator=generator), torch.rand(10, 7, generator=generator)
    search = OrderSearch([one, other], 4, 0.5)
    order = search.run()
    single = sum(OrderSearch([each], 4, 0.5).value(order) for each in (one, other))
    assert search.value(order) == pytest.approx(single)
    assert search.value(order) >= search.value(torch.arange(10))


def test_layers_that_are_not_named_do_not_matter():
    model = network()
    found = rearrange_channels(model, KernelGroup(4), 0.5, layers=["widen.weight"], starts=0)
    assert [each.layers for each in found] == [("widen.weight",)]


def test_units_are_kernels_of_a_group_and_the_last_group_may_be_short():
    scores = torch.zeros(6, 2, 1, 1)
    scores[:4, 0], scores[:4, 1], scores[4:, 0], scores[4:, 1] = 1, 2, 3, 1.5
    mask = KernelGroup(4).select(scores, 0.5)  # units count 4, 8, 6 and 3
    assert mask[:, :, 0, 0].tolist() == [[False, True]] * 4 + [[True, False]] * 2
    spatial = KernelGroup(2).select(torch.rand(4, 3, 3, 3), 0.5)
    assert torch.equal(spatial, spatial[:, :, :1, :1].expand_as(spatial))
    assert int((~spatial[:, :, 0, 0]).sum()) == 3 * 2


def test_the_pattern_is_readable_as_text():
    assert Pattern.parse("kernels:16") == KernelGroup(16)
    assert str(KernelGroup(4)) == "kernels:4"
    with pytest.raises(PatternError, match="groups of 3"):
        Pattern.parse("kernels:3")


def test_what_cannot_be_moved_or_traced_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be traced"):
        find_channel_groups(Branching())
    model = network()
    head = next(group for group in find_channel_groups(model) if not group.free)
    with pytest.raises(ConfigurationError, match="not free"):
        head.permute_(model, torch.arange(5))
    free = next(group for group in find_channel_groups(model) if group.free)
    with pytest.raises(ConfigurationError, match="no permutation"):
        free.permute_(model, torch.zeros(free.size, dtype=torch.int64))


def test_operations_that_mix_channels_pin_them():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = self.one(x)
            return self.two(torch.cat([y, y.mean(1, keepdim=True).expand_as(y)], 1))

    assert not any(group.free for group in find_channel_groups(Mixing()))
