from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer.activations.eafo import CRReLU, EAFOActivation, without_decay
from gossamer.activations.output_entropy import (
    BASES,
    activation_entropy,
    derivative,
    eafo_correction,
    first_variation,
    forward_correction,
    inverse_entropy,
    search_activations,
    worst_activation,
)
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.models.activation_functions import swap_activations


def normal(x):
    return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def laplace(x):
    return 0.5 * torch.exp(-x.abs())


def mixture(x):
    return 0.4 * normal((x + 1.5) / 0.6) / 0.6 + 0.6 * normal((x - 1) / 0.8) / 0.8


DENSITIES = [normal, laplace, mixture]
INVERSES = [
    (torch.logit, 0.01, 0.99),
    (torch.atanh, -0.98, 0.98),
    (lambda x: x + torch.log(-torch.expm1(-x)), 0.02, 5.0),
]


def bump(low, high):
    centre, reach = 0.45 * low + 0.55 * high, 0.4 * (high - low)
    return lambda x: (1 - ((x - centre) / reach) ** 2).clamp(min=0) ** 3


# -------------------------------------------------------------------------------------------------------- entropy


def test_entropies_of_known_distributions_come_out():
    assert activation_entropy(lambda x: x, normal) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-6)
    assert activation_entropy(lambda x: 3 * x + 1, normal) == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e) + math.log(3), abs=1e-6
    )
    assert activation_entropy(lambda x: x, laplace, low=-40, high=40) == pytest.approx(1 + math.log(2), abs=1e-5)
    # the exponential of a normal number
    assert activation_entropy(torch.exp, normal) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-6)


def test_samples_give_what_the_density_gives():
    samples = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for function in (torch.tanh, lambda x: 2 * x):
        wanted = activation_entropy(function, normal)
        assert activation_entropy(function, samples=samples) == pytest.approx(wanted, abs=0.03)


def test_entropies_that_do_not_exist_are_refused():
    with pytest.raises(ConfigurationError, match="does not increase"):
        activation_entropy(torch.relu, normal)
    activation_entropy(torch.relu, normal, low=1e-9)
    with pytest.raises(ConfigurationError, match="either"):
        activation_entropy(torch.tanh)
    with pytest.raises(CalibrationError, match="10 or more"):
        activation_entropy(torch.tanh, samples=torch.zeros(9))
    with pytest.raises(ConfigurationError, match="equal values"):
        activation_entropy(torch.relu, samples=torch.linspace(-9, 1, 100))
    with pytest.raises(ConfigurationError, match="density"):
        activation_entropy(torch.tanh, lambda x: -x)


@pytest.mark.parametrize("pdf", DENSITIES)
@pytest.mark.parametrize("number", range(3))
def test_the_variation_is_that_of_a_finite_difference(pdf, number):
    inverse, low, high = INVERSES[number]
    direction, step = bump(low, high), 1e-4
    above, below = (
        inverse_entropy(lambda x, s=s: inverse(x) + s * direction(x), pdf, low, high) for s in (step, -step)
    )
    found = first_variation(inverse, direction, pdf, low, high)
    assert found == pytest.approx((above - below) / (2 * step), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("pdf", DENSITIES)
@pytest.mark.parametrize("number", range(3))
def test_a_step_along_the_correction_of_the_inverse_lowers_the_entropy(pdf, number):
    inverse, low, high = INVERSES[number]
    # above zero only, where that of the Laplace density has its kink
    correction, window = eafo_correction(inverse, pdf), bump((0.5, 0.0, math.log(2))[number], high)
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)

    def entropy(size):
        y = inverse(x) + size * correction(x) * window(x)
        (slope,) = torch.gradient(y, spacing=float(x[1] - x[0]))
        density = (pdf(y) * slope).clamp(min=1e-300)
        return -float(torch.trapezoid(density * density.log(), x))

    assert entropy(1e-4) < entropy(0.0) < entropy(-1e-4)


@pytest.mark.parametrize("pdf", DENSITIES)
def test_the_distribution_function_is_the_worst_of_a_thousand(pdf):
    x = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    weight = pdf(x) / torch.trapezoid(pdf(x), x)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.1, 3, 1000, dtype=torch.float64).view(-1, 1, 1)
    knots = sizes * torch.randn(1000, 1, 10, generator=generator, dtype=torch.float64)
    logs = nn.functional.interpolate(knots, size=1801, mode="linear", align_corners=True)[:, 0]
    slope = (weight + 1e-7) * logs.exp()
    slope = slope / torch.trapezoid(slope, x).unsqueeze(1)
    entropies = -torch.trapezoid(weight * (weight / slope).log(), x)

    def cdf(at):
        inner = torch.cumulative_trapezoid(weight, x)
        return torch.cat([inner.new_zeros(1), inner])[((at - x[0]) / (x[1] - x[0])).round().long()]

    worst = worst_activation(cdf)(x)
    (steep,) = torch.gradient(worst, spacing=float(x[1] - x[0]))
    best = -float(torch.trapezoid(weight * (weight / steep.clamp(min=1e-300)).log(), x))
    assert best == pytest.approx(0, abs=1e-3)
    assert float(entropies.max()) < best + 1e-3
    assert float(entropies.max()) < 0


def test_the_worst_activation_has_a_uniform_output_on_its_range():
    worst = worst_activation(torch.special.ndtr, -2.0, 3.0)
    assert activation_entropy(worst, normal, low=-7, high=7) == pytest.approx(math.log(5), abs=1e-6)
    assert [float(worst(torch.tensor(x))) for x in (-40.0, 0.0, 40.0)] == [-2.0, 0.5, 3.0]
    with pytest.raises(ConfigurationError, match="low must be below high"):
        worst_activation(torch.special.ndtr, 1.0, 1.0)


def test_relu_s_correction_is_the_one_of_the_paper():
    x = torch.linspace(0.1, 4, 50, dtype=torch.float64)
    wanted = x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(eafo_correction(lambda y: y, normal)(x), wanted)


@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        ("sigmoid", torch.logit),
        ("tanh", torch.atanh),
        ("softplus", lambda x: x + torch.log(-torch.expm1(-x))),
    ],
)
def test_the_forward_correction_is_that_of_the_inverse_carried_over(name, inverse):
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    function = BASES[name].function
    found = forward_correction(name, normal(x), derivative(normal, x).detach(), x)
    wanted = eafo_correction(inverse, normal)(function(x)) * derivative(function, x).detach()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["relu", "identity", "elu", "softplus", "sigmoid", "tanh"])
def test_the_entropy_rises_with_the_forward_correction(name):
    # by ∫ c² / f′, which is what the sign of the paper's CRReLU gives
    candidate = search_activations(normal, (name,), trials=11)[0]
    low = 1e-9 if name == "relu" else -8.0
    x = torch.linspace(low, 8, 20_001, dtype=torch.float64)
    weight = normal(x) / torch.trapezoid(normal(x), x)
    c = forward_correction(name, normal(x), derivative(normal, x).detach(), x)
    # the density is normalised to the part that is integrated, the correction is not
    wanted = torch.trapezoid(weight / normal(x) * c**2 / derivative(BASES[name].function, x).detach(), x)
    if name != "elu":  # whose slope has a kink
        boundary = float((weight / normal(x) * c * normal(x) / derivative(BASES[name].function, x).detach())[0])
        assert candidate.slope == pytest.approx(float(wanted) - boundary, rel=0.01, abs=1e-3)
    assert candidate.slope > 0
    assert candidate.epsilon < 0
    assert candidate.corrected < candidate.entropy


def test_the_search_orders_what_it_finds():
    found = search_activations(normal, ("tanh", "softplus"), trials=21)
    assert [c.corrected for c in found] == sorted(c.corrected for c in found)
    with pytest.raises(UnknownNameError, match="softplus"):
        search_activations(normal, ("soft-plus",))


# --------------------------------------------------------------------------------------------------------- layers


def test_crrelu_is_its_formula_and_starts_near_relu():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    layer = CRReLU(0.3).double()
    torch.testing.assert_close(layer(x), x.clamp(min=0) + 0.3 * x * torch.exp(-x * x / 2), atol=1e-7, rtol=1e-7)
    assert float(CRReLU().eps.detach()) == pytest.approx(0.01)
    assert not CRReLU(learnable=False).eps.requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.eps.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crrelu_stays_finite_in_half_precision(dtype):
    x = torch.tensor([-6e4, -300.0, -1.0, 0.0, 1.0, 300.0, 6e4], dtype=dtype)
    out = CRReLU(0.5).to(dtype)(x)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert out[0] == 0
    assert out[-1] == x[-1]


def test_crrelu_is_not_sparse():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert float((torch.relu(x) == 0).float().mean()) > 0.45
    assert float((CRReLU()(x) == 0).float().mean()) < 0.01


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_a_static_correction_of_relu_is_crrelu(density):
    layer = EAFOActivation("relu", density, dynamic=False, eps=0.2 * math.sqrt(2 * math.pi))
    x = torch.linspace(-3.9, 3.9, 200)
    torch.testing.assert_close(layer(x), CRReLU(0.2)(x), atol=2e-3 if density == "kde" else 1e-6, rtol=0)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_a_dynamic_correction_follows_the_pre_activations(density):
    torch.manual_seed(0)
    layer = EAFOActivation("relu", density, update_every=5, eps=1.0, momentum=1.0)
    for _ in range(11):
        layer(2.0 + 0.5 * torch.randn(50, 40))
    assert float(layer.mean) == pytest.approx(2.0, abs=0.05)
    assert float(layer.variance.sqrt()) == pytest.approx(0.5, abs=0.05)
    x = torch.linspace(0.8, 3.2, 60)
    p = torch.exp(-0.5 * ((x - 2) / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    # a kernel density is a little too wide
    torch.testing.assert_close(layer(x) - x, (x - 2) / 0.25 * p, atol=0.45 if density == "kde" else 0.15, rtol=0)


def test_the_density_is_looked_at_only_now_and_then_and_only_in_training():
    layer = EAFOActivation(update_every=3)
    looks = []
    layer.look = lambda x: looks.append(int(layer.steps))  # type: ignore[method-assign]
    for _ in range(7):
        layer(torch.randn(4, 4))
    assert looks == [0, 3, 6]
    layer.eval()
    layer(torch.randn(4, 4))
    assert int(layer.steps) == 7
    still = EAFOActivation(dynamic=False)
    still(100 + torch.randn(9, 9))
    assert float(still.mean) == 0


def test_constant_pre_activations_leave_the_density_alone():
    layer = EAFOActivation("tanh", "kde", update_every=1)
    assert torch.isfinite(layer(torch.zeros(8, 8))).all()
    assert float(layer.variance) == 1


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_every_base_trains_and_is_stored(base, density):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), EAFOActivation(base, density, update_every=10), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    first = None
    for _ in range(25):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or float(loss.detach())
    assert float(loss.detach()) < first
    assert float(model[1].eps.detach()) != pytest.approx(0.01)
    again = nn.Sequential(nn.Linear(4, 16), EAFOActivation(base, density), nn.Linear(16, 1))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_statistics_are_as_exact_as_in_float32_whatever_the_dtype(density, dtype):
    torch.manual_seed(0)
    layer, twin = (EAFOActivation("relu", density, update_every=2, eps=1.0) for _ in range(2))
    layer(5 + torch.randn(64, 64))
    twin.load_state_dict(layer.state_dict())
    layer.to(dtype)
    for _ in range(4):
        x = (5 + torch.randn(64, 64)).to(dtype)
        found, expected = layer(x), twin(x.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.04 if dtype == torch.bfloat16 else 0.005, rtol=0)
    for name in ("mean", "variance", "grid", "table"):
        assert getattr(layer, name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(getattr(layer, name).float(), getattr(twin, name))


def test_in_float64_gradients_are_those_of_finite_differences():
    layer = EAFOActivation("tanh", dynamic=False, eps=0.3).double()
    assert torch.autograd.gradcheck(layer, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))


def test_what_checkpointing_computes_again_is_no_second_look():
    torch.manual_seed(0)
    layer = EAFOActivation(update_every=1)
    x = torch.randn(9, 9, requires_grad=True)
    checkpoint(lambda x: layer(x).square(), x, use_reentrant=False).sum().backward()
    assert int(layer.steps) == 1


def test_factors_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 3), CRReLU(), nn.Linear(3, 3), EAFOActivation())
    groups = without_decay(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [parameter.numel() for parameter in groups[1]["params"]] == [1, 1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(without_decay(nn.Linear(2, 2), 0.1)) == 1


def test_it_takes_the_place_of_another_activation():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    swap = swap_activations(model, nn.ReLU, CRReLU)
    assert isinstance(model[1], CRReLU)
    swap.undo()
    assert isinstance(model[1], nn.ReLU)


def test_impossible_parameters_are_refused():
    with pytest.raises(UnknownNameError, match="relu"):
        EAFOActivation("rellu")
    with pytest.raises(UnknownNameError, match="gaussian"):
        EAFOActivation(density="gauss")
    with pytest.raises(ConfigurationError, match="update_every is 0"):
        EAFOActivation(update_every=0)
    with pytest.raises(ConfigurationError, match="eps is nan"):
        CRReLU(float("nan"))
