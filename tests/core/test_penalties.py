"""Penalties on activations: their values by hand, and that they are neither lost nor counted twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer.core.penalties import PENALTIES, ActivationPenalty, rescaled_weight
from gossamer.core.taps import Tap, weighted_mean
from gossamer.errors import ConfigurationError, NonFiniteError, TargetError, UnknownNameError


class Two(nn.Module):
    """Two layers; `repeated` says how the first is checkpointed."""

    def __init__(self, repeated: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.repeated = nn.Linear(3, 4), nn.Linear(4, 5), repeated

    def body(self, x):
        return self.second(self.first(x).relu())

    def forward(self, x, attention_mask=None):
        return self.body(x) if self.repeated is None else checkpoint(self.body, x, use_reentrant=self.repeated)


def taps(model):
    return [Tap("middle", model.second), Tap("end", model.second, "output")]


@pytest.mark.parametrize(
    ("kind", "row", "value"),
    [
        ("l1", [3.0, -4.0, 0.0], 7.0),
        ("l0", [3.0, -4.0, 0.0], 9 / 9.25 + 16 / 16.25),
        ("hoyer", [3.0, -4.0, 0.0], 49 / 25),
        ("hoyer", [2.0, 2.0, 2.0], 3.0),
        ("hoyer", [0.0, 0.0, 0.0], 0.0),
        ("tanh", [3.0, -4.0, 0.0], math.tanh(6) + math.tanh(8)),
    ],
)
def test_values_worked_by_hand(kind, row, value):
    assert float(PENALTIES[kind](torch.tensor([row], dtype=torch.float64), 0.25)) == pytest.approx(value)


@pytest.mark.parametrize("kind", PENALTIES)
def test_gradients_agree_with_differences(kind):
    values = torch.tensor([[0.3, -0.7, 1.1], [0.2, 0.4, -0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: PENALTIES[kind](x, 0.1), values)


@pytest.mark.parametrize("kind", PENALTIES)
def test_silent_tokens_have_finite_gradients(kind):
    values = torch.zeros(2, 3, requires_grad=True)
    PENALTIES[kind](values, 1e-7).sum().backward()
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("reduction", ["mean", "token", "sum"])
def test_reductions_are_what_their_names_say(reduction):
    model, x = Two().double(), torch.randn(2, 6, 3, dtype=torch.float64)
    with ActivationPenalty(model, taps(model), "l1", weight=0.5, reduction=reduction) as penalty:
        out = model(x)
        middle, end = model.first(x).relu().abs(), out.abs()
        expected = {
            "mean": (middle.mean() + end.mean()) / 2,
            "token": middle.sum(-1).mean() + end.sum(-1).mean(),
            "sum": middle.sum() + end.sum(),
        }[reduction]
        assert float(penalty.loss().detach()) == pytest.approx(0.5 * float(expected.detach()))


def test_groups_are_averaged_apart_and_added():
    model, x = Two(), torch.randn(2, 6, 3)
    apart = [Tap("middle", model.second, group="a"), Tap("end", model.second, "output", group="b")]
    with ActivationPenalty(model, apart) as penalty:
        out = model(x)
        expected = model.first(x).relu().abs().mean() + out.abs().mean()
        assert float(penalty.loss().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_padding_does_not_count():
    model, x = Two().double(), torch.randn(2, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    with ActivationPenalty(model, taps(model)[:1], "l1") as penalty:
        model(x, attention_mask=mask)
        found = float(penalty.loss().detach())
        real = model.first(x).relu()[mask.bool()]
    assert found == pytest.approx(float(real.abs().mean().detach()))


def test_a_longer_mask_is_cut_to_the_tokens_and_a_shorter_one_is_refused():
    model, x = Two(), torch.randn(1, 3, 3)
    with ActivationPenalty(model, taps(model)[:1]) as penalty:
        model(x, torch.tensor([[1, 1, 1, 1, 0]]))
        kept = float(penalty.loss().detach())
        assert kept == pytest.approx(float(model.first(x).relu()[:, :2].mean().detach()), rel=1e-5)
        with pytest.raises(ConfigurationError, match="token_mask"):
            model(x, torch.tensor([[1, 1]]))


def test_each_forward_pass_is_asked_once_and_nothing_is_kept():
    model, x = Two(), torch.randn(2, 3)
    with ActivationPenalty(model, taps(model)) as penalty:
        model(x)
        model(2 * x)  # nobody asked after the first
        found = float(penalty.loss().detach())
        model(2 * x)
        assert float(penalty.loss().detach()) == found
        with pytest.raises(ConfigurationError, match="training mode"):
            penalty.loss()


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x = torch.randn(8, 3, dtype=torch.float64)

    def gradients(parts):
        model = Two().double()
        with ActivationPenalty(model, taps(model), "l0", eps=0.1) as penalty:
            for part in parts:
                (model(part).sum() * 0 + penalty.loss() / len(parts)).backward()
        return model.first.weight.grad

    assert torch.allclose(gradients([x]), gradients(x.split(2)), atol=1e-12)


def test_evaluation_is_not_heard():
    model, x = Two(), torch.randn(2, 3)
    with ActivationPenalty(model, taps(model)) as penalty:
        with torch.no_grad():
            model(x)
        model.eval()(x)
        model.train()
        with pytest.raises(ConfigurationError, match="no activation"):
            penalty.loss()


def test_a_checkpointed_pass_counts_once_and_has_the_same_gradient():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def gradients(repeated):
        model = Two(repeated).double()
        with ActivationPenalty(model, taps(model), "hoyer") as penalty:
            (model(x).square().sum() + penalty.loss()).backward()
            assert not penalty._heard  # what is computed again in the backward pass leaves nothing behind
        return model.first.weight.grad

    assert torch.allclose(gradients(False), gradients(None), atol=1e-12)


def test_reentrant_checkpointing_is_refused_because_it_hides_activations():
    model = Two(True)
    with ActivationPenalty(model, taps(model)) as penalty:
        model(torch.randn(4, 3, requires_grad=True))
        with pytest.raises(ConfigurationError, match="use_reentrant=False"):
            penalty.loss()


def test_weights_and_widths_follow_the_step():
    model, x = Two(), torch.randn(2, 3)
    with ActivationPenalty(
        model, taps(model), "l0", weight=lambda t: float(t), eps=lambda t: 10.0 ** -(t + 1)
    ) as penalty:
        model(x)
        assert float(penalty.loss().detach()) == 0
        penalty.advance()
        assert (penalty.current_weight, penalty.current_eps) == (1.0, 0.01)
        model(x)
        weighted = float(penalty.loss().detach())
        assert weighted == pytest.approx(penalty.value)
        assert penalty.ratio(2 * weighted) == pytest.approx(0.5)


def test_equal_weights_under_two_reductions_have_equal_losses():
    model, x = Two().double(), torch.randn(5, 7, 3, dtype=torch.float64)
    ends = [Tap("a", model.second, "output"), Tap("b", model.second, "output")]
    losses = []
    for reduction in ("token", "mean", "sum"):
        weight = rescaled_weight(0.3, [5, 5], "token", reduction, tokens=35)
        with ActivationPenalty(model, ends, "l1", weight=weight, reduction=reduction) as penalty:
            model(x)
            losses.append(float(penalty.loss().detach()))
    assert losses == pytest.approx([losses[0]] * 3)


def test_low_precision_is_counted_in_float32():
    model, x = Two().bfloat16(), torch.randn(2, 3).bfloat16()
    with ActivationPenalty(model, taps(model)) as penalty:
        model(x)
        assert penalty.loss().dtype == torch.float32


def test_a_mask_without_a_real_token_gives_zero():
    assert float(weighted_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))) == 0


def test_bad_input_is_named():
    model = Two()
    with pytest.raises(UnknownNameError, match="l1"):
        ActivationPenalty(model, taps(model), "l2")
    with pytest.raises(ConfigurationError, match="eps is 0"):
        ActivationPenalty(model, taps(model), eps=0)
    with pytest.raises(ConfigurationError, match="weight is -1"):
        ActivationPenalty(model, taps(model), weight=-1)
    with pytest.raises(ConfigurationError, match="reduction"):
        ActivationPenalty(model, taps(model), reduction="median")
    with pytest.raises(TargetError, match="no place"):
        ActivationPenalty(model, [])
    with pytest.raises(ConfigurationError, match="equal widths"):
        rescaled_weight(1.0, [3, 4], "token", "mean")
    with ActivationPenalty(model, taps(model)) as penalty:
        model(torch.full((2, 3), float("nan")))
        with pytest.raises(NonFiniteError, match="middle"):
            penalty.loss()
