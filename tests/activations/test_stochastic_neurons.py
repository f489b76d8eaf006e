from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.activations.estimator_lab import (
    StochasticNetwork,
    estimator_quality,
    exact_gradient,
    sampled_gradients,
)
from gossamer.activations.stochastic_neurons import GatedMLP, StochasticGate, rate_penalty
from gossamer.activations.stochastic_units import (
    ESTIMATORS,
    BinaryUnit,
    NoisyRectifier,
    ReinforceUnit,
    STSUnit,
    TopKUnit,
    make_unit,
)
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(seed=0, inputs=6, width=12, layers=2, outputs=3):
    torch.manual_seed(seed)
    found, before = [nn.Flatten()], inputs
    for _ in range(layers):
        found += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*found, nn.Linear(before, outputs))


def gated(estimator="st", blocks=4, shared=0, **options):
    main = perceptron()
    gater = StochasticGate(6, 2 * (blocks - shared), estimator, options.pop("rate", 0.4), hidden=8, **options)
    return GatedMLP(main, gater, blocks, shared)


# --------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "top-k"])
def test_a_unit_knows_its_rate_and_its_mean(estimator):
    unit = make_unit(estimator, 0.1)
    logits = torch.tensor([-2.0, -0.5, 1.0])
    drawn = unit(logits.expand(40_000, 3), generator())
    torch.testing.assert_close((drawn != 0).float().mean(0), unit.rate(logits), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.mean(0), unit.mean(logits), atol=0.03, rtol=0)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "top-k"])
def test_a_unit_starts_at_the_rate_that_is_asked_for(estimator):
    unit = make_unit(estimator, 0.1)
    assert float(unit.rate(torch.tensor(unit.bias(0.1)))) == pytest.approx(0.1, rel=1e-4)


def test_normal_noise_has_its_own_rate_mean_and_bias():
    unit = NoisyRectifier("normal")
    drawn = unit(torch.full((100_000,), unit.bias(0.2)), generator())
    assert float((drawn > 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float(drawn.mean()) == pytest.approx(float(unit.mean(torch.tensor(unit.bias(0.2)))), abs=0.005)
    with pytest.raises(UnknownNameError):
        NoisyRectifier("pink")


def test_top_k_keeps_the_highest_of_every_sample():
    unit = TopKUnit(0.5)
    logits = torch.tensor([[1.0, -1.0, 3.0, 0.0], [0.0, 4.0, 5.0, -9.0]])
    assert (unit(logits) != 0).tolist() == [[True, False, True, False], [False, True, True, False]]
    with pytest.raises(ConfigurationError, match="share is 0"):
        TopKUnit(0)


def test_an_unknown_estimator_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'reinforce'"):
        make_unit("reinforced", 0.1)


# ----------------------------------------------------------------------------------------------------------- lab


@pytest.mark.parametrize("widths", [(3,), (3, 2, 3)])
def test_the_exact_gradient_is_that_of_a_finite_difference(widths):
    network = StochasticNetwork.draw(widths, generator())
    for law, rate in (("binary", lambda p: p), ("sts", torch.sqrt)):
        found = exact_gradient(network, law)

        def expected(place, step, law=law, rate=rate):
            biases = [bias.clone() for bias in network.biases]
            layer, unit = (0, place) if place < widths[0] else (1, place - widths[0])
            biases[layer][unit] += step

            def below(number, before):
                if number == len(widths):
                    return float(network.loss(before.unsqueeze(0)))
                p = torch.sigmoid(network.logits(number, before, biases))
                total = 0.0
                for code in range(2 ** widths[number]):
                    state = torch.tensor([float(code >> bit & 1) for bit in range(widths[number])]).double()
                    chance = float(torch.where(state > 0, rate(p), 1 - rate(p)).prod())
                    total += chance * below(number + 1, state * rate(p) if law == "sts" else state)
                return total

            return below(0, network.drive)

        for place in (0, widths[0] - 1, *([widths[0]] if len(widths) > 1 else [])):
            difference = (expected(place, 1e-5) - expected(place, -1e-5)) / 2e-5
            assert float(found[place]) == pytest.approx(difference, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("widths", [(4,), (3, 3)])
def test_the_likelihood_ratio_is_unbiased_and_the_best_baseline_halves_its_variance(widths):
    network = StochasticNetwork.draw(widths, generator(5), offset=5.0)
    exact = exact_gradient(network)
    best = estimator_quality(sampled_gradients(network, ReinforceUnit(), 12_000, generator(1)), exact)
    none = estimator_quality(sampled_gradients(network, ReinforceUnit("none"), 12_000, generator(1)), exact)
    assert best.deviation < 4
    assert none.deviation < 4
    assert best.variance < none.variance / 2


def test_straight_through_is_biased_with_the_right_direction_in_one_layer():
    found = []
    for seed in range(5):
        network = StochasticNetwork.draw((4,), generator(seed))
        estimates = sampled_gradients(network, BinaryUnit(), 4000, generator(1))
        found.append(estimator_quality(estimates, exact_gradient(network)))
    assert all(quality.cosine > 0.5 for quality in found)
    assert all(quality.deviation > 20 for quality in found)


def test_injected_noise_is_unbiased_for_its_own_law():
    network = StochasticNetwork.draw((2,), generator(2))
    estimates = sampled_gradients(network, NoisyRectifier(), 20_000, generator(1))
    quality = estimator_quality(estimates, exact_gradient(network, "noisy-rectifier"))
    assert quality.deviation < 6
    assert quality.cosine > 0.99


def test_smooth_times_stochastic_points_along_the_gradient_of_its_own_law():
    network = StochasticNetwork.draw((4,), generator(3))
    quality = estimator_quality(
        sampled_gradients(network, STSUnit(), 8000, generator(1)), exact_gradient(network, "sts")
    )
    assert quality.cosine > 0.8


def test_networks_too_large_to_enumerate_are_refused():
    network = StochasticNetwork.draw((9, 9), generator())
    with pytest.raises(ConfigurationError, match="18 units; 16"):
        exact_gradient(network)
    with pytest.raises(ConfigurationError, match="3 can be"):
        exact_gradient(StochasticNetwork.draw((4,), generator()), "noisy-rectifier")


# ------------------------------------------------------------------------------------------------------- penalty


def test_the_penalty_is_zero_at_its_target_and_nowhere_else():
    even = torch.full((5, 3), 0.1)
    for kind in ("kl", "squared"):
        for per in ("batch", "sample"):
            assert float(rate_penalty(even, 0.1, kind, per)) == pytest.approx(0, abs=1e-7)
            assert float(rate_penalty(even + 0.2, 0.1, kind, per)) > 0.01


def test_a_penalty_per_batch_lets_gates_specialise_and_one_per_sample_lets_them_be_constant():
    # two examples, two gates: each open for one example, or one gate open for both
    special = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    constant = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for kind in ("kl", "squared"):
        assert float(rate_penalty(special, 0.5, kind, "batch")) == pytest.approx(0, abs=1e-5)
        assert float(rate_penalty(constant, 0.5, kind, "batch")) > 0.2
        assert float(rate_penalty(constant, 0.5, kind, "sample")) == pytest.approx(0, abs=1e-5)


def test_the_divergence_is_the_one_of_coins():
    r, t = 0.3, 0.1
    wanted = t * math.log(t / r) + (1 - t) * math.log((1 - t) / (1 - r))
    assert float(rate_penalty(torch.full((2, 2), r), t)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_divergence_is_finite_in_half_precision_at_the_ends_too(dtype):
    rates = torch.tensor([[0.0, 1.0, 0.3]], dtype=dtype)
    torch.testing.assert_close(rate_penalty(rates, 0.1), rate_penalty(rates.float(), 0.1))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_gates_train_in_half_precision(estimator):
    gate = StochasticGate(12, 6, estimator, 0.3, hidden=8).half()
    gates = gate(torch.randn(1, 12).half())  # of one example rates may be 0 and 1
    (gate.penalty() + gates.float().sum()).backward()
    assert gates.dtype == torch.float16
    assert torch.isfinite(gate.penalty())
    assert all(torch.isfinite(parameter.grad).all() for parameter in gate.parameters())


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1])
def test_a_target_that_is_no_rate_is_refused(target):
    with pytest.raises(ConfigurationError, match=r"\(0, 1\)"):
        StochasticGate(4, 3, target_rate=target)


# --------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_gates_start_around_the_target_and_open_ones_around_one(estimator):
    torch.manual_seed(0)
    gate = StochasticGate(20, 50, estimator, 0.1, hidden=16)
    gates = gate(torch.randn(400, 20))
    assert gates.shape == (400, 50)
    assert float((gates != 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    if estimator != "top-k":
        assert gates[gates != 0].mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_every_estimator_learns_which_gate_to_open(estimator):
    # the loss falls with the gate that the input names, and the penalty keeps the others shut
    torch.manual_seed(0)
    gate = StochasticGate(4, 4, estimator, 0.25, hidden=0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    inputs = torch.eye(4)[torch.arange(64) % 4]
    for _ in range(150):
        gates = gate(inputs)
        losses = ((gates - inputs) ** 2).sum(1)
        optimizer.zero_grad()
        (losses.mean() + gate.penalty() + gate.surrogate(losses)).backward()
        optimizer.step()
    rates = gate.unit.rate(gate.net(torch.eye(4)))
    named, others = rates.diagonal().mean(), (rates.sum() - rates.trace()) / 12
    assert float(named) > 2 * float(others)


def test_evaluation_repeats_itself_in_every_mode():
    torch.manual_seed(0)
    gate = StochasticGate(5, 30, "st", 0.3, hidden=0)
    nn.init.normal_(gate.net[-1].bias)
    gate.eval()
    x = torch.randn(8, 5)
    found = {}
    for mode in ("sample", "threshold", "mean"):
        gate.test_mode = mode
        found[mode] = gate(x)
        assert torch.equal(gate(x), found[mode])
    assert torch.equal(found["threshold"], (gate.net(x) > 0).float())
    torch.testing.assert_close(found["mean"], torch.sigmoid(gate.net(x)))
    assert set(found["sample"].unique().tolist()) == {0.0, 1.0}
    gate.seed, gate.test_mode = 1, "sample"
    assert not torch.equal(gate(x), found["sample"])


@pytest.mark.parametrize("estimator", ["st", "sts", "noisy-rectifier", "gumbel"])
def test_at_least_one_gate_opens_where_that_is_asked_for(estimator):
    torch.manual_seed(0)
    gate = StochasticGate(5, 4, estimator, 0.01, hidden=0, at_least_one=True)
    for training in (True, False):
        gate.train(training)
        x = torch.randn(200, 5)
        gates = gate(x)
        assert bool((gates != 0).any(1).all())
        alone = (gates != 0).sum(1) == 1
        likeliest = gate.net(x).argmax(1)
        assert float((gates.argmax(1) == likeliest)[alone].float().mean()) > 0.8
    with pytest.raises(ConfigurationError, match="shared block"):
        StochasticGate(5, 4, "reinforce", at_least_one=True)


def test_bad_gates_are_refused():
    with pytest.raises(ConfigurationError, match="sizes are 0"):
        StochasticGate(0, 4)
    with pytest.raises(UnknownNameError, match="threshold"):
        StochasticGate(4, 4, test_mode="thresholds")
    with pytest.raises(UnknownNameError, match="squared"):
        StochasticGate(4, 4, penalty="square")
    with pytest.raises(ConfigurationError, match="call the gate"):
        StochasticGate(4, 4).penalty()


# ----------------------------------------------------------------------------------------------------------- MLP


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("estimator", ["st", "sts", "noisy-rectifier", "top-k"])
def test_skipping_gives_what_computing_everything_gives(estimator, shared, batch):
    model = gated(estimator, shared=shared, test_mode="sample").double().eval()
    x = torch.randn(batch, 6, dtype=torch.float64, generator=generator(batch))
    gates = model.gates(x)
    assert bool((gates == 0).any())
    torch.testing.assert_close(model.skipping(x, gates), model.dense(x, gates))
    torch.testing.assert_close(model(x), model.dense(x, gates))


def test_examples_without_any_block_get_the_last_bias():
    model = gated().eval()
    x = torch.randn(3, 6)
    gates = torch.zeros(3, 2, 4)
    torch.testing.assert_close(model.skipping(x, gates), model.main[-1].bias.expand(3, -1))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_weights_of_skipped_blocks_are_not_read(batch):
    model = gated().eval()
    x = torch.randn(batch, 6)
    gates = torch.zeros(batch, 2, 4)
    gates[:, 0, 1] = gates[:, 1, 2] = 1.0
    wanted = model.dense(x, gates)
    with torch.no_grad():
        dead = torch.ones(12, dtype=torch.bool)
        dead[3:6] = False
        model.main[1].weight[dead] = model.main[1].bias[dead] = float("nan")
        model.main[3].weight[:, dead] = float("nan")
        dead = torch.ones(12, dtype=torch.bool)
        dead[6:9] = False
        model.main[3].weight[dead] = model.main[3].bias[dead] = float("nan")
        model.main[5].weight[:, dead] = float("nan")
    torch.testing.assert_close(model.skipping(x, gates), wanted)
    assert bool(model.dense(x, gates).isnan().all())


def test_shared_blocks_are_always_on():
    model = gated(shared=2, test_mode="threshold", rate=0.01).eval()
    gates = model.gates(torch.randn(10, 6))
    assert gates.shape == (10, 2, 4)
    assert bool((gates[:, :, :2] == 1).all())
    assert bool((gates[:, :, 2:] == 0).all())


def test_multiplications_are_those_of_open_blocks():
    model = gated()
    gates = torch.zeros(2, 2, 4)
    gates[0, 0, :2] = gates[0, 1, 0] = 1
    # 6 inputs to 6 units, those to 3, those to 3 outputs
    assert model.multiplications(gates).tolist() == [6 * 6 + 6 * 3 + 3 * 3, 0]
    assert model.multiplications(torch.ones(1, 2, 4)).tolist() == [model.dense_multiplications()]
    assert model.dense_multiplications() == 6 * 12 + 12 * 12 + 12 * 3
    assert model.gater_multiplications() == 6 * 8 + 8 * 8


def test_the_likelihood_ratio_reaches_the_gater_only_through_the_objective():
    model = gated("reinforce")
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    losses.mean().backward(retain_graph=True)
    assert model.gater.net[0].weight.grad is None
    model.objective(losses, weight=0.0).backward()
    assert float(model.gater.net[0].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_gated_network_learns(estimator):
    model = gated(estimator, rate=0.3)
    torch.manual_seed(1)
    x = torch.randn(128, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = last = None
    for _ in range(80):
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        model.objective(losses, 1.0).backward()
        optimizer.step()
        first, last = first or float(losses.mean()), float(losses.mean())
    assert last < 0.85 * first


def test_a_gated_network_is_copied_and_stored():
    model = gated("reinforce").eval()
    again = copy.deepcopy(gated("reinforce", rate=0.2)).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), model(x))


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="no perceptron"):
        GatedMLP(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), StochasticGate(6, 4), 4)
    with pytest.raises(ConfigurationError, match="must divide the 12"):
        GatedMLP(perceptron(), StochasticGate(6, 10), 5)
    with pytest.raises(ConfigurationError, match=r"7 gates .* 8 for 6 are needed"):
        GatedMLP(perceptron(), StochasticGate(6, 7), 4)
    with pytest.raises(CalibrationError, match="one for each example"):
        gated().objective(torch.tensor(1.0))
