from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.core.patterns import NM
from gossamer.core.transposable import TransposableNM
from gossamer.errors import ConfigurationError, PatternError, TargetError
from gossamer.training.bdwp import BDWP, backward_mask, bidirectional_linear, prune_gradient
from gossamer.training.bdwp_measures import backward_agreement, relative_operations, training_operations


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_backward(weight, n, m, groups=1):
    """The largest of every M outputs, one column after the other."""
    per_group = weight.shape[0] // groups
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    columns = weight.abs().flatten(1)
    for column in range(columns.shape[1]):
        for group in range(groups):
            for start in range(0, per_group, m):
                rows = range(group * per_group + start, group * per_group + min(start + m, per_group))
                ordered = sorted(rows, key=lambda row: (float(columns[row, column]), row))
                for row in ordered[-n:]:
                    kept.view(len(weight), -1)[row, column] = True
    return kept


@pytest.mark.parametrize(
    ("shape", "groups"), [((16, 5), 1), ((10, 3), 1), ((8, 3, 2, 2), 1), ((12, 2, 3, 1), 2), ((12, 2, 1), 3)]
)
def test_the_backward_mask_keeps_the_largest_of_every_group_of_outputs(shape, groups):
    weight = drawn(*shape)
    assert torch.equal(backward_mask(weight, 2, 4, groups), brute_backward(weight, 2, 4, groups))
    tied = weight.round()
    assert torch.equal(backward_mask(tied, 2, 4, groups), brute_backward(tied, 2, 4, groups))


def test_where_every_group_has_one_output_there_is_nothing_to_prune():
    with pytest.raises(PatternError, match="8 groups has one output in each"):
        backward_mask(drawn(8, 1, 3, 3), 2, 4, groups=8)


def test_the_functional_form_is_that_of_the_paper():
    x, weight, bias, flowing = drawn(3, 5, 8), drawn(12, 8, seed=1), drawn(12, seed=2), drawn(3, 5, 12, seed=3)
    forward, backward = NM(2, 4).select(weight.abs()), backward_mask(weight, 2, 4)
    for part in (x, weight, bias):
        part.requires_grad_()
    y = bidirectional_linear(x, weight, forward, backward, bias)
    torch.testing.assert_close(y, functional.linear(x, weight * forward, bias))
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), flowing)
    torch.testing.assert_close(dx, flowing @ (weight * backward))
    torch.testing.assert_close(dw, flowing.flatten(0, 1).t() @ x.flatten(0, 1))
    torch.testing.assert_close(db, flowing.sum((0, 1)))


LAYERS = {
    "linear": (lambda: nn.Linear(8, 16), (3, 8)),
    "linear with rows": (lambda: nn.Linear(8, 10, bias=False), (2, 3, 8)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 7, 7)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2), (2, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, groups=2), (2, 8, 5, 5)),
    "one dimension": (lambda: nn.Conv1d(8, 16, 3, padding=1), (2, 8, 6)),
    "unbatched": (lambda: nn.Conv2d(8, 16, 3), (8, 5, 5)),
}


@pytest.mark.parametrize("variant", ["bidirectional", "gradients", "forward", "transposable"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_goes_forwards_and_backwards_through_the_weights_it_should(kind, variant):
    make, shape = LAYERS[kind]
    if variant == "transposable" and kind == "linear with rows":
        pytest.skip("ten outputs are no multiple of four")
    torch.manual_seed(0)
    layer = make().double()
    net = nn.ModuleDict({"layer": layer, "head": nn.Linear(2, 2).double()})
    weight, groups = layer.weight.detach().clone(), getattr(layer, "groups", 1)
    method = BDWP(pattern="2:4", variant=variant, keep=())
    run = method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = drawn(*shape).requires_grad_()
    y = layer(x)
    flowing = drawn(*y.shape, seed=5)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), flowing)

    def reference(matrix, gradient):
        twin = copy.deepcopy(layer)
        twin.weight.data.copy_(matrix)
        inputs = x.detach().requires_grad_()
        outputs = twin(inputs)
        return outputs, *torch.autograd.grad(outputs, (inputs, twin.weight), gradient)

    pattern = TransposableNM(2, 4) if variant == "transposable" else NM(2, 4)
    kept = pattern.select(weight.abs())
    expected, true_dx, expected_dw = reference(weight * kept, flowing)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dw, expected_dw)
    if variant == "bidirectional":
        expected_dx = reference(weight * brute_backward(weight, 2, 4, groups), flowing)[1]
        assert not torch.allclose(expected_dx, true_dx)
    elif variant == "gradients":
        channels = {3: -2, 4: -3}.get(layer.weight.dim(), -1)
        expected_dx = reference(weight * kept, prune_gradient(flowing, NM(2, 4), channels))[1]
    else:
        expected_dx = true_dx
    torch.testing.assert_close(dx, expected_dx)
    assert torch.equal(run.mask("layer.weight"), kept)
    run.finalize()
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, flowing)[0], true_dx)


def test_pruned_gradients_keep_the_largest_of_every_group_of_channels():
    gradient = torch.tensor([[1.0, -4.0, 2.0, 3.0, 9.0]])
    assert prune_gradient(gradient, NM(2, 4), -1).tolist() == [[0, -4, 0, 3, 9]]
    image = drawn(2, 8, 3, 3)
    kept = prune_gradient(image, NM(1, 4), -3) != 0
    assert (kept.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 1).all()


def test_both_masks_are_made_anew_once_a_step_and_follow_the_dense_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    run = BDWP(pattern="1:4").attach(net, torch.optim.SGD(net.parameters(), lr=0.5))
    (site,) = run.projected().values()
    for step in range(4):
        run.optimizer.zero_grad()
        made = []
        for part in range(3):
            x = drawn(4, 8, seed=10 * step + part)
            functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
            made.append(site.backward_weight())
        assert made[0] is made[1] is made[2]
        dense = run.dense("2.weight")
        assert torch.equal(made[0], dense * brute_backward(dense, 1, 4))
        run.optimizer.step()
        assert not torch.equal(run.dense("2.weight"), dense)


def test_a_step_is_the_one_of_the_paper():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)).double()
    x, labels = drawn(5, 6), torch.tensor([0, 1, 0, 1, 1])
    run = BDWP(pattern="2:8", decay=0.3).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    first, dense, kept = net[0].weight.detach().clone(), run.dense("1.weight"), run.mask("1.weight")
    hidden = net[0](x).detach().requires_grad_()
    middle = (hidden @ (dense * kept).t()).detach().requires_grad_()
    functional.cross_entropy(net[2](middle), labels).backward()
    flowing = middle.grad
    functional.cross_entropy(net(x), labels).backward()
    run.optimizer.step()
    torch.testing.assert_close(
        run.dense("1.weight"), dense - 0.1 * (flowing.t() @ hidden.detach() + 0.3 * dense * ~kept)
    )
    dx = flowing @ (dense * brute_backward(dense, 2, 8))
    torch.testing.assert_close(net[0].weight.detach(), first - 0.1 * dx.t() @ x)


def test_depthwise_convolutions_stay_dense_and_layers_of_other_kinds_have_one_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.point, self.rnn, self.head = nn.Conv2d(8, 8, 1), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            x = self.point(self.depthwise(self.stem(x)))
            return self.head(self.rnn(x.flatten(2).transpose(1, 2))[0][:, -1])

    torch.manual_seed(0)
    model = Model()
    with pytest.warns(UserWarning, match="weight") as told:
        run = BDWP(pattern="2:4").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sorted(str(each.message) for each in told) == [
        "depthwise.weight stays dense: each of its groups has a single input or output",
        "rnn.weight_hh_l0 is sparse forwards only: LSTM",
        "rnn.weight_ih_l0 is sparse forwards only: LSTM",
    ]
    assert list(run.targets) == ["point.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    model(torch.randn(2, 1, 3, 3)).sum().backward()
    run.optimizer.step()
    assert run.finalize().violations(model) == {}
    assert not model.point._forward_hooks
    assert not model.point._forward_pre_hooks


def test_inputs_by_name_evaluation_and_copies_work():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)).double()
    run = BDWP(pattern="1:4").attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = drawn(3, 8).requires_grad_()
    one, other = (torch.autograd.grad(y.sum(), x)[0] for y in (net[1](x), net[1](input=x)))
    assert torch.equal(one, other)
    twin = copy.deepcopy(net)
    plain = torch.autograd.grad(twin[1](x).sum(), x)[0]
    torch.testing.assert_close(plain, net[1].weight.detach().sum(0).expand(3, 8))
    assert not torch.allclose(plain, one)
    with torch.no_grad():
        assert torch.equal(net(x), twin(x))
    run.finalize()


def test_what_follows_a_layer_may_write_in_place():
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 1), nn.ReLU(inplace), nn.Flatten())
        net.append(nn.Linear(32, 2))
        BDWP(pattern="2:8").attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        net(torch.ones(2, 1, 4, 4)).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_copy_still_has_hooks_that_do_nothing_to_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    BDWP(pattern="1:4").attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    twin = copy.deepcopy(net)
    run = BDWP(pattern="2:4").attach(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    twin(torch.randn(3, 8)).sum().backward()
    run.optimizer.step()
    assert run.finalize().sparsity == 0.5


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (1, 8), (3, 3), (1, 16)])
def test_transposable_masks_have_n_in_every_row_and_column_of_a_block(n, m):
    pattern = TransposableNM(n, m)
    for scores in (drawn(3 * m, 2 * m).abs(), torch.ones(m, 2 * m), drawn(2 * m, m, 2, 2).abs().round()):
        mask = pattern.select(scores)
        NM(n, m).verify(mask)
        NM(n, m, dim=0).verify(mask)
        pattern.verify(mask)
    assert pattern.sparsity == 1 - n / m


def test_a_transposable_mask_is_within_half_of_the_best_and_usually_near_it():
    from itertools import permutations

    pattern, ratios = TransposableNM(1, 4), []
    for seed in range(40):
        scores = drawn(4, 4, seed=seed).abs()
        found = float(scores[pattern.select(scores)].sum())
        best = max(float(scores[range(4), list(order)].sum()) for order in permutations(range(4)))
        ratios.append(found / best)
    assert min(ratios) >= 0.5
    assert max(ratios) <= 1 + 1e-12
    assert sum(ratios) / 40 > 0.9


def test_a_transposable_pattern_refuses_what_it_does_not_divide_or_is_not():
    with pytest.raises(PatternError, match="both dimensions to be multiples of 4"):
        TransposableNM(2, 4).select(torch.ones(6, 8))
    with pytest.raises(PatternError, match="1 <= n <= m"):
        TransposableNM(5, 4)
    wrong = NM(2, 4).select(drawn(4, 4).abs())
    wrong[0] = torch.tensor([True, True, True, False])
    with pytest.raises(PatternError, match="do not follow transposable 2:4"):
        TransposableNM(2, 4).verify(wrong)


def test_operations_are_those_of_the_cost_model():
    assert [round(relative_operations(*pattern), 3) for pattern in ((2, 4), (2, 8), (1, 8))] == [0.667, 0.5, 0.417]
    assert relative_operations(2, 8, "forward") == pytest.approx(0.75)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 5))
    x = torch.zeros(3, 8)
    rows = {row.name: row for row in training_operations(net, x, BDWP(pattern="2:8"))}
    assert (rows["0"].forward, rows["0"].backward, rows["0"].update) == (384, 0, 384)
    assert (rows["1"].forward, rows["1"].backward, rows["1"].update) == (384, 384, 1536)
    assert rows["1"].total / (3 * rows["1"].dense) == pytest.approx(relative_operations(2, 8))
    assert rows["2"].total == 3 * 480
    forward = {row.name: row for row in training_operations(net, x, BDWP(pattern="2:8", variant="forward"))}
    assert forward["1"].total / (3 * 1536) == pytest.approx(relative_operations(2, 8, "forward"))


def test_agreement_falls_with_sparsity_and_is_one_for_all_weights():
    weight, gradient = drawn(64, 64), drawn(32, 64, seed=1)
    found = [backward_agreement(weight, gradient, pattern)["dense"] for pattern in ("4:4", "2:4", "2:8", "1:8")]
    assert found[0] == pytest.approx(1)
    assert found == sorted(found, reverse=True)
    both = backward_agreement(weight, gradient, "2:8")
    assert 0 < both["forward"] < 1
    assert both["dense"] == found[2]


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigurationError, match="variant is 'both'"):
        BDWP(variant="both")
    with pytest.raises(PatternError, match="groups along the inputs"):
        BDWP(pattern="2:8@0")
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 3))
    with pytest.raises(TargetError):
        BDWP(pattern="2:8", include=("nothing",)).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(PatternError, match=r"0\.weight has shape \(12, 8\).*both dimensions"):
        BDWP(variant="transposable", keep=()).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
