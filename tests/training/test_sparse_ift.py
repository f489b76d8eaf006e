from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from gossamer.core.channel_groups import find_channel_groups
from gossamer.errors import ConfigurationError, ModelError, SparsityError, TargetError
from gossamer.measure.flops import count_flops
from gossamer.training.isoflop_layers import (
    SparseDopedConv2d,
    SparseDopedLinear,
    SparseFactorizedConv2d,
    SparseFactorizedLinear,
    SparseParallelConv2d,
    SparseParallelLinear,
)
from gossamer.training.isoflop_report import isoflop_report, log2_choices
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.sparse_ift import KINDS, decay_groups, folded_decay, scale_width, sparse_ift
from gossamer.training.static import Static
from gossamer.training.width import widen, widened

OTHERS = [kind for kind in KINDS if kind != "wide"]


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 10))


def perceptron():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Sequential(nn.Linear(24, 24), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(24, 10))


IMAGES = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A residual sum, a depthwise convolution, and channels that are flattened."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.norm = nn.BatchNorm2d(2 * width)
        self.two = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.two(functional.relu(self.norm(self.depthwise(self.one(x)))))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 2), 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("build", [convolutional, perceptron])
def test_a_transformed_model_needs_as_many_operations_as_the_dense_one(kind, sparsity, build):
    dense = build()
    transformed = sparse_ift(dense, kind, sparsity, stem=build is perceptron, example=IMAGES)
    optimizer = torch.optim.SGD(transformed.model.parameters(), lr=0.1)
    training = transformed.method(end=10).attach(transformed.model, optimizer)
    expected = count_flops(dense, IMAGES).effective
    tolerance = 1e-3 if kind == "wide" else 0  # dense layers that grew are paid for in whole weights
    assert count_flops(transformed.model, IMAGES).effective == pytest.approx(expected, rel=tolerance, abs=0)
    assert set(training.targets) == set(transformed.sparsities)
    assert transformed.model(IMAGES).shape == dense(IMAGES).shape


@pytest.mark.parametrize("kind", KINDS)
def test_without_zeros_nothing_changes(kind):
    dense = convolutional()
    same, sparsities = sparse_ift(dense, kind, 0.0)
    assert not sparsities
    assert same is not dense
    assert str(same) == str(dense)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), dense.state_dict().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_stays_as_it_is(kind):
    dense = perceptron()
    before = copy.deepcopy(dense.state_dict())
    sparse_ift(dense, kind, 0.75, stem=True)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_sizes_are_those_of_the_formulas():
    assert len(SparseParallelLinear(40, 30, sparsity=0.9).branches) == 10  # 1 / (1 − 0.9) in binary is not 10
    assert len(SparseParallelConv2d(4, 8, 3, sparsity=0.75).branches) == 4
    # 9·16·32 / (0.5 · (144 + 32)) = 52.36…
    layer = SparseFactorizedConv2d(16, 32, 3, sparsity=0.5)
    assert layer.u.weight.shape == (53, 16, 3, 3)
    assert layer.v.weight.shape == (32, 53, 1, 1)
    # 4608 / (0.5 · 144 + 32) = 44.3…
    assert SparseFactorizedConv2d(16, 32, 3, sparsity=0.5, sparse_input_only=True).u.out_channels == 45
    # 20·30 / (0.1 · 50) = 120 exactly, which must not be rounded up
    assert SparseFactorizedLinear(20, 30, sparsity=0.9).u.out_features == 120
    # 0.75 · 4608 / 176 = 19.6…; 0.9 · 600 / 50 = 10.8
    assert SparseDopedConv2d(16, 32, 3, sparsity=0.75).u.out_channels == 19
    assert SparseDopedLinear(20, 30, sparsity=0.9).u.out_features == 10
    assert SparseDopedLinear(20, 30, sparsity=0.5).u.out_features == 6


def kept(layer):
    parameters = dict(layer.named_parameters())
    count = sum(p.numel() for name, p in parameters.items() if p.dim() > 1 and name not in layer.sparsities)
    return count + sum((1 - share) * parameters[name].numel() for name, share in layer.sparsities.items())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.75, 0.9, 0.97])
def test_every_layer_keeps_exactly_as_many_weights_as_a_dense_one(sparsity):
    for layer in (
        SparseParallelLinear(41, 37, sparsity=sparsity),
        SparseFactorizedLinear(41, 37, sparsity=sparsity),
        SparseFactorizedLinear(41, 37, sparsity=sparsity, sparse_input_only=True),
        SparseDopedLinear(41, 37, sparsity=sparsity),
    ):
        assert kept(layer) == 41 * 37
    for form in (SparseParallelConv2d, SparseFactorizedConv2d, SparseDopedConv2d):
        assert kept(form(12, 18, 3, groups=3, sparsity=sparsity)) == 18 * 4 * 9
    assert kept(SparseFactorizedConv2d(12, 12, 3, groups=12, sparsity=sparsity)) == 12 * 9


def test_a_layer_does_what_its_effective_weight_does():
    images = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    window = {"stride": 2, "padding": 1, "groups": 3}
    for form, options in (
        (SparseParallelConv2d, {"norm": "none"}),
        (SparseFactorizedConv2d, {"phi": "linear"}),
        (SparseDopedConv2d, {}),
    ):
        layer = form(6, 12, 3, **window, sparsity=0.5, **options).double()
        bias = next(p for p in layer.parameters() if p.shape == (12,))
        expected = functional.conv2d(images, layer.effective_weight(), bias, **window)
        torch.testing.assert_close(layer(images), expected)
    rows = torch.randn(3, 5, 20, dtype=torch.float64)
    for form, options in (
        (SparseParallelLinear, {"norm": "none"}),
        (SparseFactorizedLinear, {"phi": "linear"}),
        (SparseDopedLinear, {}),
    ):
        layer = form(20, 30, sparsity=0.75, **options).double()
        bias = next(p for p in layer.parameters() if p.shape == (30,))
        torch.testing.assert_close(layer(rows), functional.linear(rows, layer.effective_weight(), bias))


def test_branches_are_normalised_before_they_are_added():
    layer = SparseParallelLinear(20, 30, sparsity=0.5).double().train()
    rows = torch.randn(50, 20, dtype=torch.float64)
    expected = torch.zeros(50, 30, dtype=torch.float64)
    for branch in layer.branches:
        out = rows @ branch.weight.T
        expected += (out - out.mean(0)) / (out.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(layer(rows), expected)
    assert layer(rows.view(5, 10, 20)).shape == (5, 10, 30)


def test_what_lies_between_two_factors():
    rows = torch.randn(50, 20)
    relu = SparseFactorizedLinear(20, 30, sparsity=0.75, phi="norm_relu", norm="layer")
    middle = functional.layer_norm(rows @ relu.u.weight.T, (relu.u.out_features,))
    torch.testing.assert_close(relu(rows), functional.linear(functional.relu(middle), relu.v.weight, relu.v.bias))
    with pytest.raises(ConfigurationError, match="phi='linear'"):
        relu.effective_weight()
    plain = SparseFactorizedLinear(20, 30, sparsity=0.75, phi="norm", norm="layer", bias=False)
    plain.load_state_dict({n: v for n, v in relu.state_dict().items() if n in plain.state_dict()})
    torch.testing.assert_close(plain(rows), functional.linear(middle, relu.v.weight))


def test_branches_differ_in_weights_and_in_masks():
    model, sparsities = sparse_ift(perceptron(), "parallel", 0.75, stem=True)
    first, second = model[1].branches[:2]
    assert not torch.equal(first.weight, second.weight)
    training = Static(
        sparsity=0.75, include=("1.branches.*",), allocation={n: s for n, s in sparsities.items() if n[0] == "1"}
    ).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    one, two = training.mask("1.branches.0.weight"), training.mask("1.branches.1.weight")
    # of 3456 places a quarter each: a sixteenth of all in both, if they are independent
    assert int((one & two).sum()) == pytest.approx(3456 / 16, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phi", ["norm_relu", "norm", "linear"])
def test_outputs_start_at_the_scale_of_the_dense_layer(kind, phi):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Identity(), nn.Linear(200, 300, bias=False))
    options = {"norm": "none"} if kind == "parallel" else {}
    rows = torch.randn(500, 300)
    ratios = []
    for seed in range(4):  # each alone is off by 0.04
        transformed = sparse_ift(dense, kind, 0.8, stem=True, heads=True, phi=phi, seed=seed, **options)
        optimizer = torch.optim.SGD(transformed.model.parameters(), lr=0.1)
        transformed.method(Static, seed=seed).attach(transformed.model, optimizer)
        with torch.no_grad():
            ratios.append(float(transformed.model[0](rows).var() / dense[0](rows).var()))
    assert sum(ratios) / 4 == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("kind", [RigL, SET, Static])
def test_masks_move_and_counts_stay(kind):
    dense = perceptron()
    transformed = sparse_ift(dense, "wide", 0.75, stem=True, heads=True)
    model = transformed.model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    options = {} if kind is Static else {"every": 2, "end": 12}
    training = transformed.method(kind, **options).attach(model, optimizer)
    first = {name: training.mask(name) for name in training.targets}
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(IMAGES), torch.arange(4)).backward()
        optimizer.step()
    moved = any(not torch.equal(first[name], training.mask(name)) for name in first)
    assert moved is (kind is not Static)
    masks = training.finalize()
    assert not masks.violations(model)
    assert masks.kept == 144 * 24 + 24 * 24 + 24 * 10


def test_hidden_widths_grow_with_everything_that_belongs_to_them():
    wide, sparsities = sparse_ift(convolutional(), "wide", 0.75)
    assert [wide[i].weight.shape[:2] for i in (0, 3, 6, 11)] == [(24, 1), (24, 24), (40, 24), (10, 160)]
    assert wide[7].num_features == 40
    assert (wide[6].in_channels, wide[6].out_channels, wide[11].in_features) == (24, 40, 160)
    assert sparsities == {"3.weight": Fraction(3, 4), "6.weight": Fraction(3, 4)}
    assert widened(12, math.sqrt(2)) == 17
    assert widened(12, math.sqrt(2), 8) == 16
    rounded = sparse_ift(convolutional(), "wide", 0.5, multiple=8)
    # 12 → 16.97 → 16 and 20 → 28.3 → 32, of which as many weights stay as there were
    assert rounded.model[6].weight.shape[:2] == (32, 16)
    assert rounded.sparsities["6.weight"] == 1 - Fraction(12 * 20, 16 * 32)


def test_a_residual_network_grows_as_a_whole():
    dense = Residual(8).eval()
    images = torch.randn(2, 3, 8, 8)
    transformed = sparse_ift(dense, "wide", 0.75, example=images)
    wide = transformed.model
    assert wide.depthwise.groups == wide.depthwise.out_channels == 32
    assert wide.head.in_features == 64
    assert isoflop_report(dense, transformed, images).ratio == pytest.approx(1, abs=0.01)
    transformed.method(Static).attach(wide, torch.optim.SGD(wide.parameters(), lr=0.1))
    assert count_flops(wide, images).effective == pytest.approx(count_flops(dense, images).effective, rel=0.01)


def test_a_function_of_the_width_gives_the_same_as_tracing():
    torch.manual_seed(0)
    dense = Residual(8)
    by_groups = sparse_ift(dense, "wide", 0.75)
    by_function = scale_width(Residual, 8, 0.75)
    assert by_groups.sparsities == by_function.sparsities
    shapes = [
        {name: value.shape for name, value in each.model.state_dict().items()} for each in (by_groups, by_function)
    ]
    assert shapes[0] == shapes[1]


def test_feed_forward_layers_of_a_language_model_get_wider(tiny_llama):
    tokens = torch.arange(12).view(1, 12)
    transformed = sparse_ift(tiny_llama, "wide", 0.75)
    wide = transformed.model
    assert wide.model.layers[0].mlp.up_proj.out_features == 288
    assert wide.config.intermediate_size == 288
    assert set(transformed.sparsities.values()) == {Fraction(3, 4)}
    assert len(transformed.sparsities) == 9
    report = isoflop_report(tiny_llama, transformed, {"input_ids": tokens})
    assert report.ratio == 1
    training = transformed.method(end=10).attach(wide, torch.optim.Adam(wide.parameters()))
    wide(input_ids=tokens, labels=tokens).loss.backward()
    assert training.masks.sparsity == 0.75


@pytest.mark.parametrize("kind", OTHERS)
def test_linear_layers_of_a_language_model_are_replaced_by_name(kind, tiny_llama):
    tokens = torch.arange(12).view(1, 12)
    transformed = sparse_ift(tiny_llama, kind, 0.75, include=("*.q_proj", "*.mlp.*"), exclude=("*.0.*",))
    assert {name.split(".")[2] for name in transformed.sparsities} == {"1", "2"}
    assert isoflop_report(tiny_llama, transformed, {"input_ids": tokens}).ratio == 1
    if kind == "parallel":
        assert isinstance(transformed.model.model.layers[1].self_attn.q_proj.norms[0], nn.LayerNorm)


def test_layers_that_are_stored_the_other_way_round_are_replaced():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    tokens = torch.arange(12).view(1, 12)
    doped = sparse_ift(model, "doped", 0.75, include=("*.mlp.*",))
    assert doped.model.transformer.h[0].mlp.c_fc.s.weight.shape == (64, 16)
    assert isoflop_report(model, doped, {"input_ids": tokens}).ratio == 1
    wide = sparse_ift(model, "wide", 0.75, include=("*.mlp.*",))
    assert wide.model.transformer.h[0].mlp.c_fc.weight.shape == (16, 256)
    assert isoflop_report(model, wide, {"input_ids": tokens}).ratio == 1
    assert wide.method(Static).attach(wide.model, torch.optim.SGD(wide.model.parameters(), 0.1)).sparsity == 0.75


@pytest.mark.parametrize("kind", OTHERS)
def test_decay_acts_on_the_matrix_that_the_factors_make(kind):
    model = sparse_ift(perceptron(), kind, 0.75, stem=True, phi="linear", norm="none").model
    layers = [model[1], model[3][0]]
    expected = sum(0.5 * layer.effective_weight().square().sum() for layer in layers)
    torch.testing.assert_close(folded_decay(model), expected)
    decayed, others = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decayed["params"]] == [(10, 24)]  # the head alone
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_without_an_effective_matrix_factors_decay_as_usual():
    model = sparse_ift(perceptron(), "factorized", 0.75, stem=True).model
    assert float(folded_decay(model)) == 0
    assert len(decay_groups(model, 0.1)[0]["params"]) == 5


def test_a_choice_of_masks_is_counted_in_bits():
    for size, chosen in ((5, 2), (40, 10), (1000, 100)):
        assert log2_choices(size, chosen) == pytest.approx(math.log2(math.comb(size, chosen)), rel=1e-9)
    assert log2_choices(7, 7) == 0
    with pytest.raises(ConfigurationError, match="8 of 7"):
        log2_choices(7, 8)


def test_the_bill_adds_up():
    dense = perceptron()
    report = isoflop_report(dense, sparse_ift(dense, "wide", 0.75, stem=True, heads=True), IMAGES)
    assert [row.kept for row in report.layers] == [144 * 24, 24 * 24, 240]
    assert [row.stored for row in report.layers] == [144 * 48, 48 * 48, 480]
    assert report.flops == report.dense_flops == 2 * 4 * (144 * 24 + 24 * 24 + 240)
    assert report.log2_masks == pytest.approx(
        sum(math.log2(math.comb(a, b)) for a, b in ((6912, 3456), (2304, 576), (480, 240)))
    )
    # one dense gradient in a hundred steps of three passes
    computed = 2 * 4 * (6912 + 2304 + 480)
    assert report.training_ratio() == 1
    assert report.training_ratio(99) == pytest.approx((299 * report.flops + computed) / (300 * report.flops))
    assert min(report.dense_seconds, report.seconds) > 0
    assert f"{report.flops:,} operations" in str(report)


def test_a_dense_stem_and_head_make_the_model_dearer_unless_hidden_layers_pay():
    dense = convolutional()
    ratio = isoflop_report(dense, sparse_ift(dense, "wide", 0.75), IMAGES).ratio
    assert ratio > 1.05
    assert isoflop_report(dense, sparse_ift(dense, "wide", 0.75, example=IMAGES), IMAGES).ratio == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_sparsities_are_refused(kind, sparsity):
    with pytest.raises(SparsityError, match="sparsity is"):
        sparse_ift(perceptron(), kind, sparsity)


def test_what_cannot_be_transformed_is_named():
    with pytest.raises(ConfigurationError, match=r"1: at sparsity 0.01.*rank would be 0"):
        sparse_ift(perceptron(), "doped", 0.01, stem=True)
    with pytest.raises(ConfigurationError, match="kind is 'broad'"):
        sparse_ift(perceptron(), "broad")
    with pytest.raises(ConfigurationError, match="phi is 'tanh'"):
        sparse_ift(perceptron(), "factorized", phi="tanh", stem=True)
    with pytest.raises(ConfigurationError, match="norm is 'group'"):
        sparse_ift(perceptron(), "parallel", norm="group", stem=True)
    with pytest.raises(TargetError, match="stem and head stay dense"):
        sparse_ift(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), "wide")
    with pytest.raises(SparsityError, match="let stem or heads be sparse"):
        sparse_ift(perceptron(), "wide", 0.75, example=IMAGES)
    with pytest.raises(ConfigurationError, match="Conv1d"):
        sparse_ift(nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3)), "parallel")


def test_a_network_that_cannot_be_traced_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.two(self.one(x) if x.sum() > 0 else x)

    with pytest.raises(ModelError, match=r"cannot be traced by torch\.fx"):
        sparse_ift(Branching(), "wide", stem=True)
    with pytest.raises(ConfigurationError, match=r"factor is 0\.5"):
        widen(perceptron(), find_channel_groups(perceptron()), 0.5)


def test_a_tied_layer_is_refused(tiny_llama):
    layers = tiny_llama.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="tied weight of two layers"):
        sparse_ift(tiny_llama, "doped", 0.75, include=("*.mlp.*",))
