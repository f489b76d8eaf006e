from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.errors import ConfigurationError, PatternError, SparsityError
from gossamer.training.iss_p import IterativeSoftShrinkage, residual_mass
from gossamer.training.trainability import watch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))


def attach(model, rate=0.0, optimizer=None, **options):
    options = {"sparsity": 0.9, "shrink": 0.8, "end": 100, "heads": True, "exclude": (), **options}
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=rate)
    return IterativeSoftShrinkage(**options).attach(model, optimizer)


def step(model, training, seed=0, batch=16):
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(batch, 20, generator=generator), torch.randint(3, (batch,), generator=generator)
    training.optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    training.optimizer.step()


def smallest(weight, count):
    """Places of the smallest, by sorting."""
    return weight.abs().flatten().argsort(stable=True)[:count]


def test_without_gradients_the_smallest_weights_shrink_geometrically_and_the_others_stay():
    model = network().double()
    before = [layer.weight.detach().clone() for layer in (model[0], model[2], model[4])]
    training = attach(model)
    for _ in range(5):
        step_double(model, training)
    for layer, old in zip((model[0], model[2], model[4]), before):
        expected = old.flatten().clone()
        expected[smallest(old, -(-9 * old.numel() // 10))] *= 0.8**5  # rounded up
        torch.testing.assert_close(layer.weight.flatten(), expected, rtol=1e-12, atol=0)
    assert training.masks.sparsity == 0  # nothing is masked yet


def step_double(model, training):
    training.optimizer.zero_grad()
    model(torch.zeros(4, 20, dtype=torch.float64)).sum().backward()
    training.optimizer.step()


def test_the_smallest_are_chosen_anew_in_every_step():
    """Against a loop that does the same with a sort."""
    model, reference = network(), network()
    training = attach(model, rate=1.0, shrink=0.97)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
    chosen = set()
    for number in range(12):
        step(model, training, number)
        generator = torch.Generator().manual_seed(number)
        inputs, labels = torch.randn(16, 20, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(reference(inputs), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for layer in (reference[0], reference[2], reference[4]):
                places = smallest(layer.weight, -(-9 * layer.weight.numel() // 10))
                layer.weight.view(-1)[places] *= 0.97
        chosen.add(tuple(sorted(smallest(reference[0].weight.detach(), 540).tolist())))
    for one, other in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(chosen) > 1


def test_hard_thresholding_is_shrinkage_by_everything():
    model = network()
    training = attach(model, rate=0.3, shrink=0.0)
    for number in range(3):
        step(model, training, number)
        assert int((model[0].weight == 0).sum()) == 540
    assert training.masks.sparsity == 0  # gradients still reach what is zero
    step(model, training, 9)
    assert int((model[0].weight == 0).sum()) == 540


def test_the_cut_is_exact_and_final():
    model = network()
    training = attach(model, rate=0.3, end=6)
    for number in range(6):
        assert training.phase == "explore"
        step(model, training, number)
    assert training.phase == "frozen"
    zeros = {name: int((~mask).sum()) for name, mask in training.masks.items()}
    assert zeros == {"0.weight": 540, "2.weight": 1080, "4.weight": 108}
    assert 0 < training.extra["residual mass"] < 0.5
    mask = training.mask("0.weight")
    for number in range(4):
        step(model, training, number)
    assert torch.equal(training.mask("0.weight"), mask)
    assert not training.finalize().violations(model)


def test_the_cut_comes_at_the_end_if_training_is_shorter():
    model = network()
    training = attach(model, rate=0.1)
    step(model, training)
    assert training.finalize().sparsity == pytest.approx(0.9)


def test_the_residual_mass_is_what_the_cut_takes_away():
    model = network()
    training = attach(model, rate=0.1, end=50)
    for number in range(20):
        step(model, training, number)
    before = [layer.weight.detach().clone() for layer in (model[0], model[2], model[4])]
    whole = sum(float(weight.square().sum()) for weight in before)
    cut = sum(float(w.flatten()[smallest(w, -(-9 * w.numel() // 10))].square().sum()) for w in before)
    assert residual_mass(training) == pytest.approx(cut / whole, rel=1e-6)
    training.finalize()
    left = sum(float(layer.weight.detach().square().sum()) for layer in (model[0], model[2], model[4]))
    assert left == pytest.approx(whole - cut, rel=1e-5)


def test_a_sample_finds_the_threshold_to_one_percent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 400), nn.Linear(400, 3))
    options = {"exclude": ("1",), "sparsity": 0.95}
    training = attach(model, fast_sample=32_400, **options)
    share = float((~training.method.kept(training)["0.weight"]).double().mean())
    assert share == pytest.approx(0.95, abs=0.01)
    assert share != 0.95
    exact = training.method.kept(training, exact=True)["0.weight"]
    assert int(exact.sum()) == 12_000
    training.finalize()
    assert int((model[0].weight != 0).sum()) == 12_000  # the cut does not rely on the sample


def test_a_layer_smaller_than_the_sample_is_ranked_exactly():
    model = network()
    training = attach(model, fast_sample=10_000)
    fast, exact = training.method.kept(training), training.method.kept(training, exact=True)
    assert all(torch.equal(fast[name], exact[name]) for name in exact)


def test_one_of_twenty_is_kept():
    model = network()
    training = attach(model, rate=0.1, pattern="1:20", sparsity=0.95, end=4, exclude=("2", "4"))
    for number in range(3):
        step(model, training, number)
    kept = training.method.kept(training)["0.weight"]
    assert (kept.sum(1) == 1).all()
    step(model, training, 3)
    assert ((model[0].weight != 0).sum(1) == 1).all()


def test_one_ranking_of_the_whole_model():
    model = network()
    training = attach(model, pattern="unstructured:model")
    weights = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() > 1])
    threshold = weights.sort().values[-(-9 * weights.numel() // 10)]
    masks = training.finalize()
    assert masks.kept == weights.numel() // 10
    assert all(
        (parameter[parameter != 0].abs() >= threshold).all() for n, parameter in model.named_parameters() if n in masks
    )


@pytest.mark.parametrize("pull", ["penalty", "fixed penalty"])
def test_penalties_grow_on_the_smallest_weights(pull):
    """Against SGD on the loss with ½ Σ λ w² written into it."""
    model, reference = network().double(), network().double()
    options = {"pull": pull, "penalty_step": 0.05, "penalty_every": 2, "penalty_limit": 0.12}
    training = attach(model, rate=0.3, **options)
    weights = [layer.weight for layer in (reference[0], reference[2], reference[4])]
    first = [smallest(weight.detach(), -(-9 * weight.numel() // 10)) for weight in weights]
    penalties = [torch.zeros_like(weight).view(-1) for weight in weights]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)
    for number in range(1, 15):
        generator = torch.Generator().manual_seed(number)
        inputs, labels = torch.randn(16, 20, generator=generator).double(), torch.randint(3, (16,), generator=generator)
        for net, used in ((model, training.optimizer), (reference, optimizer)):
            used.zero_grad()
            loss = functional.cross_entropy(net(inputs), labels)
            if net is reference:
                loss = loss + sum(0.5 * (p * w.view(-1).square()).sum() for p, w in zip(penalties, weights))
            loss.backward()
            used.step()
        if number % 2 == 0:
            for penalty, weight, fixed in zip(penalties, weights, first):
                if penalty.max() <= 0.12:
                    chosen = fixed if pull == "fixed penalty" else smallest(weight.detach(), len(fixed))
                    penalty[chosen] += 0.05
    assert float(penalties[0].max()) == pytest.approx(0.15)
    for one, other in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(one, other)
    training.finalize()
    assert not training.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("options", [{}, {"fast_sample": 100}, {"pull": "penalty", "penalty_every": 2}])
def test_a_run_goes_on_as_if_it_had_not_stopped(options):
    whole, parts = network(), network()
    options = {"end": 8, **options}
    one = attach(whole, optimizer=torch.optim.Adam(whole.parameters(), lr=1e-2), **options)
    two = attach(parts, optimizer=torch.optim.Adam(parts.parameters(), lr=1e-2), **options)
    for number in range(10):
        step(whole, one, number)
        if number == 4:
            saved = copy.deepcopy((parts.state_dict(), two.optimizer.state_dict(), two.state_dict()))
            parts = network()
            optimizer = torch.optim.Adam(parts.parameters(), lr=1e-2)
            parts.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            base = {"sparsity": 0.9, "shrink": 0.8, "heads": True, "exclude": (), **options}
            two = IterativeSoftShrinkage(**base).attach(parts, optimizer, saved[2])
        step(parts, two, number)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)
    assert one.masks == two.masks


def test_convolutions_for_the_image_stay_dense():
    model = nn.Sequential()
    for name, layer in (("head", nn.Conv2d(3, 8, 3)), ("body", nn.Conv2d(8, 8, 3)), ("tail", nn.Conv2d(8, 3, 3))):
        model.add_module(name, layer)
    model.add_module("last", nn.Conv2d(3, 3, 1))
    training = IterativeSoftShrinkage().attach(model, torch.optim.Adam(model.parameters()))
    assert set(training.targets) == {"head.weight", "body.weight"}


def test_gradients_and_changes_of_structure_are_watched():
    model = network()
    training = attach(model, rate=0.3)
    seen = watch(training, every=2, kept=training.method.kept)
    masks = []
    for number in range(6):
        step(model, training, number)
        masks.append(training.method.kept(training)["0.weight"])
        if number == 3:
            gradient = model[0].weight.grad.clone()
    row = next(row for row in seen.gradients if (row.step, row.layer) == (4, "0.weight"))
    assert row.norm == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert row.mean == pytest.approx(float(gradient.abs().mean()), rel=1e-6)
    assert row.deviation == pytest.approx(float(gradient.abs().std(correction=0)), rel=1e-5)
    expected = [(4, float((masks[3] != masks[1]).double().mean())), (6, float((masks[5] != masks[3]).double().mean()))]
    assert seen.flips["0.weight"] == expected
    norms = torch.tensor([r.norm for r in seen.gradients if r.layer == "2.weight"], dtype=torch.float64)
    alone = copy.copy(seen)
    alone.gradients = [r for r in seen.gradients if r.layer == "2.weight"]
    assert alone.unsteadiness() == pytest.approx(float(norms.var() / norms.mean() ** 2))
    seen.close()
    step(model, training, 7)
    assert len(seen.gradients) == 9


def test_watching_needs_something_to_see():
    training = attach(network())
    with pytest.raises(ConfigurationError, match="every is 0"):
        watch(training, 0)
    with pytest.raises(ConfigurationError, match="at least two looks"):
        watch(training).unsteadiness()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 0.999}, SparsityError, r"at most 0\.995"),
        ({"sparsity": 1.0}, SparsityError, "sparsity is"),
        ({"shrink": 1.0}, ConfigurationError, r"shrink is 1\.0"),
        ({"shrink": -0.1}, ConfigurationError, "shrink is"),
        ({"pull": "push"}, ConfigurationError, "pull is 'push'"),
        ({"end": 0}, ConfigurationError, "end is 0"),
        ({"penalty_every": 0}, ConfigurationError, "penalty_every 0"),
        ({"penalty_step": 0.0}, ConfigurationError, "penalty_step"),
        ({"pattern": "2:4"}, SparsityError, "contradicts"),
        ({"fast_sample": 5}, ConfigurationError, "fast_sample is 5"),
        ({"fast_sample": 500, "pattern": "1:20", "sparsity": 0.95}, ConfigurationError, "fast_sample"),
    ],
)
def test_impossible_settings_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        IterativeSoftShrinkage(**options)


def test_a_pattern_that_does_not_fit_is_refused_at_once():
    with pytest.raises(PatternError, match="multiple of 20"):
        attach(network(), pattern="1:20", sparsity=0.95)


def test_counts_are_rounded_up_but_leave_something():
    method = IterativeSoftShrinkage(sparsity=0.95)
    assert method._share(30) == Fraction(29, 30)
    assert IterativeSoftShrinkage(sparsity=0.99)._share(120) == Fraction(119, 120)
    assert IterativeSoftShrinkage(sparsity=0.9)._share(10) == Fraction(9, 10)
