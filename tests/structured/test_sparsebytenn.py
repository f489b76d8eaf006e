from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.kernel_groups import KernelGroup, KernelRows
from gossamer.core.schedules import Cubic
from gossamer.errors import CalibrationError, ConfigurationError, PatternError
from gossamer.methods import create
from gossamer.structured import sparsebytenn as module
from gossamer.structured.sparsebytenn import SparseByteNN, distillation


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )


def trained(method, steps=30, model=None):
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run = method.attach(model, optimizer)
    zeros = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(4, (8,))).backward()
        optimizer.step()
        zeros.append(float((model[4].weight == 0).double().mean()))
    return model, run, zeros


def test_first_depthwise_and_last_layers_stay_dense():
    names = [target.name for target in SparseByteNN().targets(network())]
    assert names == ["4.weight", "7.weight"]


def test_zeros_grow_along_the_cubic_schedule_and_end_exactly():
    method = SparseByteNN(sparsity=0.5, group=8, begin=5, end=20, every=5)
    model, run, zeros = trained(method)
    schedule = Cubic(0.5, 20, begin=5)
    units = 32 // 8 * 16
    assert zeros[4] == 0
    for step in (10, 15, 20):
        assert zeros[step - 1] == int(schedule(step) * units) / units
    assert zeros[19:] == [0.5] * 11
    masks = run.finalize()
    assert not masks.violations(model)
    for name, mask in masks.items():
        method.pattern.verify(mask, 0.5, name)


def test_whole_kernels_go_for_whole_groups():
    method = SparseByteNN(sparsity=0.5, group=16, end=10, every=5)
    _, run, _ = trained(method, 12)
    mask = run.finalize()["7.weight"]
    assert mask.shape == (32, 32, 3, 3)
    grouped = mask.view(2, 16, 32, 9)
    assert torch.equal(grouped, grouped[:, :1, :, :1].expand_as(grouped))


def test_nothing_moves_after_letting_go():
    model, run, _ = trained(SparseByteNN(sparsity=0.5, group=4, end=10), 10)
    run.finalize()
    optimizer = run.optimizer
    optimizer.zero_grad()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert float((model[4].weight == 0).double().mean()) < 0.5


def test_finishing_early_prunes_the_rest():
    model, run, _ = trained(SparseByteNN(sparsity=0.7, group=4, end=1000), 3)
    masks = run.finalize()
    assert masks.sparsity == pytest.approx(0.7, abs=0.01)
    assert not masks.violations(model)


def test_rearranging_keeps_more_than_the_order_that_was_there():
    method = SparseByteNN(sparsity=0.5, group=16)
    plain, ordered = network(), network()
    x = torch.randn(2, 1, 8, 8)
    wanted = ordered.eval()(x)
    method.arrange(ordered)
    assert torch.allclose(ordered(x), wanted, atol=1e-5)

    def kept(model):
        masks = method.masks(model)
        return sum(float(model.get_parameter(name)[mask].detach().abs().sum()) for name, mask in masks.items())

    assert kept(ordered) > kept(plain)


def test_a_run_goes_on_from_its_state():
    method = SparseByteNN(sparsity=0.6, group=4, end=12, every=3)
    _, first, _ = trained(method, 8)
    model = network()
    second = method.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    second.load_state_dict(first.state_dict())
    assert second.step == 8
    assert second.masks == first.masks


def test_channels_are_not_moved_under_a_momentum():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigurationError, match="attach before its first step"):
        SparseByteNN().attach(model, optimizer)
    SparseByteNN(rearrange=False).attach(model, optimizer)


def test_distillation_is_zero_for_equal_outputs_and_follows_the_teacher():
    teacher = torch.randn(6, 4)
    assert float(distillation(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(6, 4, requires_grad=True)
    distillation(logits, teacher).backward()
    better = distillation((logits - logits.grad).detach(), teacher)
    assert better < distillation(logits.detach(), teacher)


def test_it_is_known_by_name_and_checks_its_parameters():
    assert create("sparsebytenn", group=4).pattern.size == 4
    wrong = ({"score": "taylor"}, {"every": 0}, {"begin": 5, "end": 5}, {"group": 5}, {"sparsity": 1.0})
    for options in (*wrong, {"group": "best"}, {"depthwise": "columns"}):
        with pytest.raises(ConfigurationError):
            SparseByteNN(**options)


def test_the_size_of_groups_is_measured_when_it_is_attached(monkeypatch):
    seen = []

    def choose(shapes, sparsity):
        seen.append((sorted(shapes), sparsity))
        return 8

    monkeypatch.setattr(module, "choose_group_size", choose)
    method = SparseByteNN(sparsity=0.5, group="auto", end=10, every=5)
    with pytest.raises(ConfigurationError, match="group is 'auto'"):
        method.masks(network())
    _, run, _ = trained(method, 12)
    assert seen == [([(32, 16, 1, 1), (32, 32, 3, 3)], 0.5)]
    masks = run.finalize()
    KernelGroup(8).verify(masks["7.weight"], 0.5, "7.weight")
    with pytest.raises(PatternError):
        KernelGroup(16).verify(masks["7.weight"], 0.5, "7.weight")


@pytest.mark.parametrize(("depthwise", "pattern"), [("channels", KernelGroup(1)), ("rows", KernelRows())])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_depthwise_kernels_lose_channels_or_rows_if_that_is_wanted(depthwise, pattern, allocation):
    method = SparseByteNN(sparsity=0.5, group=4, depthwise=depthwise, allocation=allocation, end=10, every=5)
    model, run, _ = trained(method, 12)
    masks = run.finalize()
    assert set(masks) == {"3.weight", "4.weight", "7.weight"}
    pattern.verify(masks["3.weight"], 0.5, "3.weight")
    assert not masks.violations(model)
    assert float((model[3].weight == 0).double().mean()) == pytest.approx(0.5, abs=1e-6)


def test_what_inputs_carry_decides_which_kernels_stay():
    model, method = network(), SparseByteNN(sparsity=0.5, group=4, score="activation", rearrange=False)
    with torch.no_grad():
        model[3].weight[::2] *= 100  # every second input of the 1 × 1 convolution is far stronger than its weight shows
        model[3].bias.zero_()
    with pytest.raises(ConfigurationError, match=r"inputs of 4\.weight are not known"):
        method.masks(model)
    method.observe(model, [torch.randn(4, 1, 8, 8)])
    mask = method.masks(model)["4.weight"]
    assert mask[:, ::2].all()
    assert not mask[:, 1::2].any()
    with pytest.raises(CalibrationError, match="at least one batch"):
        SparseByteNN(score="activation").observe(model, [])


def test_channels_are_ordered_by_what_inputs_carry_and_outputs_stay():
    model = network()
    x, images = torch.randn(2, 1, 8, 8), [torch.randn(4, 1, 8, 8)]
    wanted = model.eval()(x)
    method = SparseByteNN(sparsity=0.5, group=16, score="activation", end=10)

    def kept():
        method.observe(model, images)
        scores = {name: method.unit_scores(model.get_parameter(name), name) for name in ("4.weight", "7.weight")}
        masks = method.masks(model)
        return sum(float(scores[name][masks[name].flatten(2).any(2)].sum()) for name in scores)

    before = kept()
    run = method.attach(model, torch.optim.SGD(model.parameters(), 0.1), calibration=images)
    assert run.rearranged
    assert torch.allclose(model.eval()(x), wanted, atol=1e-5)
    norms = dict(run.method.norms)
    assert kept() > before
    assert all(torch.allclose(norms[name], method.norms[name], rtol=1e-4) for name in norms)
    run.finalize()
    with pytest.raises(CalibrationError):
        method.attach(model, torch.optim.SGD(model.parameters(), 0.1))


def test_in_a_global_competition_the_weakest_units_of_all_layers_go():
    model = network()
    with torch.no_grad():
        model[4].weight.abs_().add_(1)  # the 1 × 1 convolution is far stronger than the 3 × 3 one
        model[7].weight.clamp_(-0.01, 0.01)
    method = SparseByteNN(sparsity=0.5, group=16, allocation="global", floor=0.25)
    masks = method.masks(model)
    gone = {name: float((~mask).double().mean()) for name, mask in masks.items()}
    assert gone["7.weight"] == pytest.approx(0.5, abs=0.05)  # it holds nearly all weights
    assert gone["4.weight"] == 0
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)
    strong = SparseByteNN(sparsity=0.75, group=16, allocation="global", floor=0.25).masks(model)
    assert float((~strong["7.weight"]).double().mean()) == pytest.approx(0.75, abs=0.02)
    for options in ({"allocation": "best"}, {"allocation": "global", "floor": 0.6}):
        with pytest.raises(ConfigurationError):
            SparseByteNN(sparsity=0.5, **options)
