from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.core.gates import (
    Reinforce,
    bernoulli_st,
    draw_noise,
    gate_probability,
    gumbel_sigmoid,
    inject_noise,
    noisy_rectifier,
    quantize_st,
    round_st,
    scale_gradient,
    stochastic_times_smooth,
    threshold_st,
)
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# --------------------------------------------------------------------------------------------- straight through


def test_rounding_has_the_gradient_of_the_identity():
    x = torch.tensor([-1.5, -0.2, 0.5, 2.6])
    assert round_st(x).tolist() == [-2.0, 0.0, 0.0, 3.0]
    assert gradient(lambda x: 3 * round_st(x), x).tolist() == [3.0] * 4


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.25])
def test_a_gradient_is_scaled_and_the_value_is_not(factor):
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(scale_gradient(x, factor), x)
    assert gradient(lambda x: scale_gradient(x, factor), x).tolist() == [factor] * 2


@pytest.mark.parametrize("factor", [-1.0, 1.0, 0.0])
def test_the_step_gets_the_chosen_share_of_the_gradient(factor):
    x = torch.tensor([0.26, -0.9, 0.04], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    quantized = quantize_st(x, step, factor)
    assert torch.allclose(quantized, torch.tensor([0.3, -0.9, 0.0], dtype=torch.float64))
    (weight * quantized).sum().backward()
    assert torch.allclose(x.grad, weight)
    # by hand: the levels are 3, -9 and 0
    assert float(step.grad) == pytest.approx(factor * (1 * 3 + 2 * -9 + 5 * 0))


def test_a_penalty_on_size_coarsens_negated_steps_and_dissolves_ordinary_ones():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    found = {}
    for factor in (-1.0, 1.0):
        step = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        for _ in range(50):
            (g,) = torch.autograd.grad(quantize_st(x, step, factor).abs().mean(), step)
            step = (step - 0.01 * g).clamp(min=1e-6).detach().requires_grad_()
        found[factor] = float(step.detach())
    assert found[1.0] < 0.01 < 0.2 < found[-1.0]


def test_coins_fall_as_often_as_their_probability_says_and_pass_the_gradient_on():
    logits = torch.tensor([-3.0, 0.0, 2.0]).expand(20000, 3)
    drawn = bernoulli_st(logits, generator=generator())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(logits[0]), atol=0.015, rtol=0)
    weight = torch.tensor([2.0, -1.0, 0.5])
    few = torch.tensor([-3.0, 0.0, 2.0])
    assert torch.equal(gradient(lambda a: weight * bernoulli_st(a), few), weight)
    p = torch.sigmoid(few)
    torch.testing.assert_close(gradient(lambda a: weight * bernoulli_st(a, temper=True), few), weight * p * (1 - p))


def test_a_generator_repeats_its_draws_and_leaves_the_global_one_alone():
    logits = torch.zeros(100)
    before = torch.random.get_rng_state()
    first, second = (bernoulli_st(logits, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_gate_without_chance_decides_at_a_half():
    logits = torch.tensor([-0.1, 0.1, 40.0])
    assert threshold_st(logits).tolist() == [0.0, 1.0, 1.0]
    assert gradient(threshold_st, logits).tolist() == [1.0] * 3


def test_extreme_logits_stay_finite_in_every_primitive():
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    for function in (
        lambda a: bernoulli_st(a, temper=True),
        stochastic_times_smooth,
        noisy_rectifier,
        gumbel_sigmoid,
        gate_probability,
    ):
        assert torch.isfinite(function(logits)).all()
        assert torch.isfinite(gradient(function, logits)).all()


# ------------------------------------------------------------------------------------- smooth factors and noise


def test_smooth_times_stochastic_has_exact_zeros_and_the_right_mean():
    logits = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64).expand(40000, 3)
    drawn = stochastic_times_smooth(logits, generator())
    p = torch.sigmoid(logits[0])
    torch.testing.assert_close(drawn.mean(0), p, atol=0.01, rtol=0)
    torch.testing.assert_close((drawn != 0).double().mean(0), p.sqrt(), atol=0.01, rtol=0)
    for unit, value in enumerate(p.sqrt()):
        assert drawn[:, unit].unique().tolist() == pytest.approx([0.0, float(value)], rel=1e-12)
        assert 0.0 in drawn[:, unit].tolist()


def test_smooth_times_stochastic_is_exact_for_a_linear_loss_and_off_by_a_half_undoubled():
    logits = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    p = torch.sigmoid(logits)
    many = logits.expand(200_000, 3)
    doubled = gradient(lambda a: stochastic_times_smooth(a, generator()), many).mean(0)
    torch.testing.assert_close(doubled, p * (1 - p), atol=0.004, rtol=0)
    plain = gradient(lambda a: stochastic_times_smooth(a, generator(), doubled=False), many).mean(0)
    torch.testing.assert_close(plain, p * (1 - p) / 2, atol=0.004, rtol=0)


def test_smooth_times_stochastic_agrees_to_first_order_in_the_outputs():
    # the exact gradient of E[L(b sqrt p)] against the estimate's mean, for a loss that bends
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    r = torch.sigmoid(a).sqrt()
    for bend, allowed in ((0.0, 1e-12), (0.1, 0.06), (0.4, 0.3)):

        def loss(h, bend=bend):
            return h + bend * h**2

        (exact,) = torch.autograd.grad(r * loss(r) + (1 - r) * loss(torch.zeros(())), a, retain_graph=True)
        h = r.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(h), h)
        (root,) = torch.autograd.grad(r, a, retain_graph=True)
        estimate = 2 * r.detach() * slope * root
        assert abs(float(estimate / exact) - 1) <= allowed


@pytest.mark.parametrize(("noise", "rate"), [("logistic", torch.sigmoid), ("normal", torch.special.ndtr)])
def test_the_noisy_rectifier_is_active_as_often_as_its_noise_says(noise, rate):
    logits = torch.tensor([-2.0, 0.0, 1.5]).expand(40000, 3)
    drawn = noisy_rectifier(logits, noise, generator=generator())
    assert bool((drawn >= 0).all())
    torch.testing.assert_close((drawn > 0).float().mean(0), rate(logits[0]), atol=0.01, rtol=0)


def test_the_noisy_rectifier_has_an_unbiased_gradient():
    # of E[max(0, a + n)] it is the rate
    logits = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    found = gradient(lambda a: noisy_rectifier(a, generator=generator()), logits.expand(100_000, 2)).mean(0)
    torch.testing.assert_close(found, torch.sigmoid(logits), atol=0.006, rtol=0)


def test_noise_may_multiply():
    x = torch.full((50_000,), 2.0)
    drawn = inject_noise(x, lambda a: a, "normal", 0.5, multiply=True, generator=generator())
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.02)


def test_standard_noises_have_their_spread():
    like = torch.zeros(200_000, dtype=torch.float64)
    assert float(draw_noise(like, "normal", generator()).std()) == pytest.approx(1.0, abs=0.01)
    assert float(draw_noise(like, "logistic", generator()).std()) == pytest.approx(math.pi / math.sqrt(3), abs=0.02)
    with pytest.raises(UnknownNameError, match="logistic"):
        draw_noise(like, "logistics")


def test_hard_relaxed_coins_are_coins_with_the_gradient_of_the_soft_ones():
    logits = torch.tensor([-1.0, 0.0, 2.0])
    hard = gumbel_sigmoid(logits.expand(20_000, 3), hard=True, generator=generator())
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(hard.mean(0), torch.sigmoid(logits), atol=0.015, rtol=0)
    soft = gradient(lambda a: gumbel_sigmoid(a, 0.5, generator=generator(1)), logits)
    assert torch.equal(gradient(lambda a: gumbel_sigmoid(a, 0.5, hard=True, generator=generator(1)), logits), soft)
    with pytest.raises(ConfigurationError, match="temperature is 0"):
        gumbel_sigmoid(logits, 0)


# ------------------------------------------------------------------------------------------------- likelihood ratio


def loss_of(h):
    return 5.0 + 3 * h[:, 0] - 2 * h[:, 1] + 4 * h[:, 0] * h[:, 1]


def exact(logits):
    """Of the expected loss of two coins, over their four states."""
    a = logits.clone().requires_grad_()
    p = torch.sigmoid(a)
    total = torch.zeros((), dtype=a.dtype)
    for state in torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=a.dtype):
        total = total + torch.where(state > 0, p, 1 - p).prod() * loss_of(state.unsqueeze(0))[0]
    return torch.autograd.grad(total, a)[0]


def estimates(baseline, logits, batches=300, size=100):
    gate, source, found = Reinforce(baseline), generator(), []
    for _ in range(batches):
        a = logits.expand(size, 2).clone().requires_grad_()
        h = gate(a, source)
        gate.surrogate(loss_of(h)).backward()
        found.append(a.grad * size)
    return torch.cat(found)


def test_every_baseline_leaves_the_likelihood_ratio_unbiased_and_the_best_one_has_the_least_variance():
    logits = torch.tensor([-1.0, 0.4], dtype=torch.float64)
    wanted = exact(logits)
    variance = {}
    for baseline in ("optimal", "mean", "none"):
        found = estimates(baseline, logits)
        error = (found.var(0) / len(found)).sqrt()
        assert bool(((found.mean(0) - wanted).abs() < 4 * error).all()), baseline
        variance[baseline] = float(found[1000:].var(0).sum())
    assert variance["optimal"] < variance["mean"] < variance["none"]
    assert variance["optimal"] < variance["none"] / 2


def test_the_best_baseline_approaches_its_formula():
    gate, source = Reinforce(), generator()
    logits = torch.tensor([-1.0, 0.4], dtype=torch.float64)
    for _ in range(600):
        gate.surrogate(loss_of(gate(logits.expand(200, 2), source)))
    p = torch.sigmoid(logits)
    for unit in (0, 1):
        weighted = weight = 0.0
        for state in torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64):
            chance = torch.where(state > 0, p, 1 - p).prod()
            square = (state[unit] - p[unit]) ** 2
            weighted, weight = weighted + chance * square * loss_of(state[None])[0], weight + chance * square
        assert float(gate.baseline()[unit]) == pytest.approx(float(weighted / weight), rel=0.03)


def test_a_sample_is_scored_with_the_baseline_from_before_it():
    gate = Reinforce()
    logits = torch.zeros(1, 1, requires_grad=True)
    h = gate(logits, generator())
    gate.surrogate(torch.tensor([7.0])).backward()
    # nothing was known of the loss before
    assert float(logits.grad) == pytest.approx(float(h - 0.5) * 7)
    assert float(gate.baseline()) == pytest.approx(7.0)


def test_no_gradient_flows_through_the_sample_or_the_loss():
    gate, layer = Reinforce(), nn.Linear(2, 1)
    logits = torch.zeros(5, 2, requires_grad=True)
    h = gate(logits)
    assert not h.requires_grad
    gate.surrogate(layer(h).squeeze(1)).backward()
    assert layer.weight.grad is None
    assert logits.grad is not None


def test_a_batch_mean_is_refused_and_so_is_a_second_score():
    gate = Reinforce()
    with pytest.raises(ConfigurationError, match="no sample"):
        gate.surrogate(torch.zeros(3))
    gate(torch.zeros(3, 2))
    with pytest.raises(CalibrationError, match="reduction='none'"):
        gate.surrogate(torch.tensor(1.0))
    gate.surrogate(torch.zeros(3))
    with pytest.raises(ConfigurationError, match="no sample"):
        gate.surrogate(torch.zeros(3))


def test_averages_are_stored_and_loaded():
    gate = Reinforce()
    gate(torch.zeros(4, 3))
    gate.surrogate(torch.arange(4.0))
    fresh = Reinforce()
    fresh.load_state_dict(gate.state_dict())
    assert torch.equal(fresh.baseline(), gate.baseline())


def test_unknown_baselines_and_decays_are_refused():
    with pytest.raises(UnknownNameError, match="optimal"):
        Reinforce("optimum")
    with pytest.raises(ConfigurationError, match="decay is 1"):
        Reinforce(decay=1.0)
