from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.activations.delta_activation import DeltaActivation, DeltaThreshold
from gossamer.activations.delta_cost import delta_ops, frame_ops
from gossamer.activations.delta_layers import DeltaConv2d, DeltaLinear
from gossamer.activations.delta_model import to_delta, to_threshold
from gossamer.errors import CalibrationError, ConfigurationError, TargetError, UnknownNameError


def video(batch=2, time=9, dtype=torch.float64):
    """A patch that flickers on a background that does not."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(batch, 1, 1, 16, 16, generator=generator, dtype=dtype).expand(-1, time, -1, -1, -1).clone()
    clip[:, :, :, 4:7, 4:7] += torch.rand(batch, time, 1, 3, 3, generator=generator, dtype=dtype)
    return clip


def network(dtype=torch.float64):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )
    made[1].running_mean.normal_()
    made[1].running_var.uniform_(0.5, 2)
    return made.to(dtype).eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = (
            nn.Conv2d(1, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Linear(3, 2),
        )
        self.before, self.after = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.before(self.first(x))
        return self.head((x + self.after(self.second(x))).amax((2, 3)))


# ---------------------------------------------------------------------------------------------------- activation


def test_states_are_whole_steps_and_changes_add_up_to_them():
    x = torch.tensor([[[0.26, -1.0], [0.31, 0.14], [0.33, 0.16]]])
    states = DeltaActivation(theta_init=0.1)(x)
    torch.testing.assert_close(states, torch.tensor([[[0.3, 0.0], [0.3, 0.1], [0.3, 0.2]]]))
    changes = DeltaActivation(theta_init=0.1, delta_level=1)(x)
    torch.testing.assert_close(changes, torch.tensor([[[0.3, 0.0], [0.0, 0.1], [0.0, 0.1]]]))
    torch.testing.assert_close(changes.cumsum(1), states)
    events = DeltaActivation(theta_init=0.1, delta_level=2)(x)
    assert bool((events[:, 0] == 0).all())
    assert torch.equal(events[:, 1:], changes[:, 1:])


def test_the_step_gets_the_negated_gradient_and_the_input_the_plain_one():
    x = torch.tensor([[[0.26], [0.52]]], dtype=torch.float64, requires_grad=True)
    layer = DeltaActivation(theta_init=0.1).double()
    weight = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    # levels 3 and 5
    assert float(layer.theta.grad) == pytest.approx(-(1 * 3 + 3 * 5))


def test_the_penalty_is_the_mean_change_without_the_first_frame_weighed_by_rate_and_fan_out():
    x = torch.tensor([[[9.0, 0.0], [9.5, 0.0], [9.5, 2.0]]])
    layer = DeltaActivation(theta_init=0.5, rate=2.0, fan_out=3.0)
    layer(x)
    assert layer.penalty().item() == pytest.approx(2 * 3 * (0.5 + 2.0) / 4)
    layer = DeltaActivation(theta_init=0.5)
    layer(x)
    assert layer.penalty().item() == pytest.approx((0.5 + 2.0) / 4)


def test_the_penalty_comes_from_the_common_ones():
    layer = DeltaActivation(theta_init=0.5, kind="l0")
    layer(torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]))
    # a smooth count of one change in two
    assert layer.penalty().item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UnknownNameError, match="l1"):
        DeltaActivation(kind="l11")


def trained(theta_gradient):
    torch.manual_seed(0)
    layer = DeltaActivation(theta_init=0.1, theta_gradient=theta_gradient)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    clips = torch.rand(8, 1, 20) + 0.1 * torch.rand(8, 6, 20)
    for _ in range(60):
        layer(clips)
        optimizer.zero_grad()
        layer.penalty().backward()
        optimizer.step()
    states = layer(clips)
    return float(layer.theta.detach().abs()), float((states[:, 1:] == states[:, :-1]).float().mean())


def test_sparsity_grows_with_the_negated_gradient_and_steps_collapse_with_the_ordinary_one():
    coarse, still = trained(-1.0)
    fine, moving = trained(1.0)
    assert fine < 0.05 < 0.1 < coarse
    assert moving < 0.3 < 0.6 < still


@pytest.mark.parametrize(
    ("granularity", "size", "shape"),
    [
        ("layer", None, ()),
        ("channel", 3, (3,)),
        ("channel", (3, 4, 5), (3,)),
        ("neuron", (3, 4, 5), (3, 4, 5)),
    ],
)
def test_steps_belong_to_a_layer_a_channel_or_a_neuron(granularity, size, shape):
    layer = DeltaActivation(granularity, size=size)
    assert layer.theta.shape == shape
    if shape:
        with torch.no_grad():
            layer.theta.uniform_(0.1, 1)
    x = torch.rand(2, 6, 3, 4, 5)
    states = layer(x)
    step = layer.theta.view(3, 1, 1) if granularity == "channel" else layer.theta
    torch.testing.assert_close(states / step, (states / step).round(), atol=1e-4, rtol=0)
    layer.penalty().backward()
    assert layer.theta.grad.shape == shape
    for place in range(6):
        sent = layer.step(x[:, place])
        wanted = states[:, place] - states[:, place - 1] if place else states[:, 0]
        torch.testing.assert_close(sent, wanted)


def test_steps_near_zero_and_negative_ones_do_no_harm():
    layer = DeltaActivation()
    with torch.no_grad():
        layer.theta.zero_()
    assert torch.isfinite(layer(torch.rand(1, 2, 3))).all()
    with torch.no_grad():
        layer.theta.fill_(-0.5)
    torch.testing.assert_close(layer(torch.tensor([[[0.6], [0.9]]])), torch.tensor([[[0.5], [1.0]]]))


def test_a_step_that_is_given_does_not_train_and_softmax_is_over_channels():
    assert not DeltaActivation(learn_theta=False).theta.requires_grad
    probabilities = DeltaActivation(theta_init=1e-3, activation="softmax")(torch.randn(2, 3, 5))
    torch.testing.assert_close(probabilities.sum(2), torch.ones(2, 3), atol=5e-3, rtol=0)
    states = DeltaActivation(theta_init=1.0, activation="identity")(torch.tensor([[[-2.2]]]))
    assert states.item() == -2.0


def test_wrong_parameters_and_axes_are_refused():
    for wrong in (
        {"theta_init": 0.0},
        {"rate": -1.0},
        {"fan_out": -2.0},
        {"delta_level": 3},
        {"granularity": "neuron"},
    ):
        with pytest.raises(ConfigurationError):
            DeltaActivation(**wrong)
    with pytest.raises(UnknownNameError, match="channel"):
        DeltaActivation("channels")
    with pytest.raises(CalibrationError, match="axis of time"):
        DeltaActivation()(torch.rand(4, 5))
    with pytest.raises(CalibrationError, match="axis of time"):
        DeltaActivation("channel", size=3)(torch.rand(2, 3, 6, 4))
    layer = DeltaActivation()
    with pytest.raises(CalibrationError, match="2 frames"):
        layer.penalty()
    layer(torch.rand(2, 1, 4))
    with pytest.raises(CalibrationError, match="2 frames"):
        layer.penalty()


# --------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("live", [0.02, 0.3, 1.0])
def test_a_linear_layer_that_is_told_changes_gives_what_it_gives_for_frames(live):
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(40, 7)
    layer = DeltaLinear(dense)
    frame = torch.zeros(3, 40)
    for _ in range(12):
        delta = torch.randn(3, 40, generator=generator) * (torch.rand(3, 40, generator=generator) < live)
        frame = frame + delta
        torch.testing.assert_close(layer.step(delta), dense(frame), atol=1e-5, rtol=0)
    layer.reset()
    torch.testing.assert_close(layer.step(frame), dense(frame), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1},
        {"stride": 3, "padding": 2, "dilation": 2},
        {"padding": "same"},
        {"groups": 2, "padding": 1},
        {"bias": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("live", [0.01, 0.5])
def test_a_convolution_that_is_told_changes_gives_what_it_gives_for_frames(options, live):
    generator = torch.Generator().manual_seed(0)
    dense = nn.Conv2d(4, 6, 3, **options).double()
    layer = DeltaConv2d(dense)
    frame = torch.zeros(2, 4, 11, 9, dtype=torch.float64)
    for _ in range(6):
        drawn = torch.randn(frame.shape, generator=generator, dtype=torch.float64)
        delta = drawn * (torch.rand(frame.shape, generator=generator) < live)
        frame = frame + delta
        torch.testing.assert_close(layer.step(delta), dense(frame))


def test_scattering_is_the_convolution_whatever_the_stride():
    generator = torch.Generator().manual_seed(0)
    for stride, padding, dilation, kernel in (
        (1, 0, 1, 3),
        (2, 1, 1, 3),
        ((2, 3), (0, 2), (1, 2), (2, 5)),
        (4, 3, 1, 1),
    ):
        dense = nn.Conv2d(3, 5, kernel, stride=stride, padding=padding, dilation=dilation, bias=False).double()
        delta = torch.randn(2, 3, 13, 12, generator=generator, dtype=torch.float64)
        wanted = dense(delta)
        torch.testing.assert_close(DeltaConv2d(dense).scatter(delta, torch.zeros_like(wanted)), wanted)


def test_the_bias_is_added_once():
    layer = DeltaLinear(nn.Linear(3, 2))
    first = layer.step(torch.zeros(1, 3))
    for _ in range(4):
        torch.testing.assert_close(layer.step(torch.zeros(1, 3)), first)


def test_columns_of_inputs_that_do_not_change_are_not_read():
    dense = nn.Linear(6, 4).double()
    layer = DeltaLinear(dense)
    layer.step(torch.zeros(1, 6, dtype=torch.float64))
    delta = torch.tensor([[0.0, 2.0, 0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    wanted = dense(delta)
    with torch.no_grad():
        layer.weight[:, [0, 2, 3, 5]] = float("nan")
    torch.testing.assert_close(layer.step(delta), wanted)


def test_a_sequence_of_changes_gives_what_the_steps_give():
    dense = nn.Linear(5, 3).double()
    deltas = torch.randn(2, 7, 5, dtype=torch.float64)
    layer = DeltaLinear(dense)
    steps = torch.stack([layer.step(delta) for delta in deltas.unbind(1)], 1)
    torch.testing.assert_close(layer.sequence(deltas), steps)


def test_refreshing_takes_back_what_rounding_has_added_up():
    torch.manual_seed(0)
    dense = nn.Linear(64, 8)
    drifting, refreshed = DeltaLinear(dense), DeltaLinear(dense, refresh_every=10)
    frame = torch.zeros(1, 64)
    for _ in range(2000):
        frame = torch.randn(1, 64) * 100
        last, fresh = drifting.advance(frame), refreshed.advance(frame)
    exact = copy.deepcopy(dense).double()(frame.double())
    errors = [float((found.double() - exact).abs().max()) for found in (last, fresh)]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("refresh_every", [None, 2])
def test_changes_and_whole_frames_may_follow_each_other(refresh_every):
    torch.manual_seed(0)
    layer, frames = DeltaLinear(nn.Linear(4, 3), refresh_every), torch.randn(6, 2, 4)
    before = torch.zeros(2, 4)
    for number, frame in enumerate(frames):
        found = layer.advance(frame) if number in (1, 2, 5) else layer.step(frame - before)
        torch.testing.assert_close(found, layer.dense(frame), atol=1e-5, rtol=0)
        before = frame


def test_frames_of_another_shape_and_impossible_refreshes_are_refused():
    layer = DeltaLinear(nn.Linear(3, 2))
    layer.advance(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="reset"):
        layer.advance(torch.zeros(1, 3))
    with pytest.raises(ConfigurationError, match="refresh_every is 0"):
        DeltaLinear(nn.Linear(3, 2), refresh_every=0)


# --------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("make", [network, lambda: Residual().double()])
def test_streaming_equals_the_dense_quantised_network_at_every_frame(make, granularity):
    clip = video(time=40)
    model = to_delta(make(), clip[:, 0], granularity=granularity, theta_init=0.05).double().eval()
    dense = model(clip)
    model.reset()
    streamed = torch.stack([model.step(frame) for frame in clip.unbind(1)], 1)
    torch.testing.assert_close(streamed, dense, atol=1e-10, rtol=0)
    model.reset()
    torch.testing.assert_close(model.step(clip[:, 3]), dense[:, 3], atol=1e-10, rtol=0)


def test_fine_steps_leave_the_network_as_it_was():
    plain, clip = network(), video()
    model = to_delta(plain, clip[:, 0], theta_init=1e-5)
    wanted = plain(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
    torch.testing.assert_close(model(clip), wanted, atol=1e-3, rtol=0)
    assert isinstance(plain[2], nn.ReLU)
    assert type(plain[0]) is nn.Conv2d


@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"groups": 8, "stride": 2}, {"groups": 2, "stride": 3}])
def test_the_example_tells_how_many_products_a_change_costs(options):
    """Fan-outs are products of a frame, as they are counted for its cost, over the neurons that take part in them."""
    torch.manual_seed(0)
    middle = nn.Conv2d(8, 8, 3, padding=1, **options)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model = to_delta(plain, torch.rand(1, 2, 9, 9))
    neurons = [2 * 81, 8 * 81, plain[:3](torch.rand(1, 2, 9, 9)).numel(), 16]
    costs = [layer.dense for layer in frame_ops(plain, torch.rand(1, 1, 2, 9, 9)).layers]
    fan_outs = [layer.fan_out for layer in model.activations()]
    assert fan_outs == pytest.approx([cost / count for cost, count in zip(costs, neurons)])
    assert fan_outs[1] < 9 * 8 / middle.groups / math.prod(middle.stride)
    assert fan_outs[2:] == [16, 5]


def test_the_penalty_of_a_model_is_the_sum_over_its_activations():
    model = to_delta(network(), video()[:, 0])
    clip = video()
    model(clip)
    total = sum(float(layer.penalty().detach()) for layer in model.activations())
    assert float(model.penalty().detach()) == pytest.approx(total)


def test_the_whole_model_trains():
    clip = video(dtype=torch.float32)
    model = to_delta(network(torch.float32), clip[:, 0], rate=1.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalties = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(clip).mean(1), torch.tensor([0, 2]))
        optimizer.zero_grad()
        (loss + model.penalty()).backward()
        optimizer.step()
        penalties.append(float(model.penalty().detach()))
    assert penalties[-1] < penalties[0] / 2
    assert all(layer.theta.grad is not None for layer in model.activations())


def test_impossible_models_and_clips_are_refused():
    clip = video()
    with pytest.raises(TargetError, match=r"no nn\.ReLU"):
        to_delta(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    with pytest.raises(ConfigurationError, match="needs an example"):
        to_delta(network(), granularity="channel")
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    with pytest.raises(ConfigurationError, match="1 is called more than once"):
        to_delta(twice, torch.rand(1, 4))
    with pytest.raises(ConfigurationError, match="1 is called more than once"):
        to_threshold(twice, 0.1)
    model = to_delta(network(), clip[:, 0])
    with pytest.raises(CalibrationError, match="axis of time"):
        model(clip.transpose(1, 3))
    with pytest.raises(ConfigurationError, match="batch norm"):
        model.train().step(clip[:, 0])


@pytest.mark.parametrize("example", [None, torch.rand(1, 4)])
def test_an_activation_that_is_called_twice_for_a_frame_is_refused_at_the_latest_by_the_first(example):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.bend = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.bend(self.second(self.bend(self.first(x))))

    if example is not None:
        with pytest.raises(ConfigurationError, match="bend is called more than once"):
            to_delta(Twice(), example)
        return
    for model in (to_delta(Twice()), to_threshold(Twice(), 0.1)):
        with pytest.raises(ConfigurationError, match="bend is called more than once"):
            model(torch.rand(2, 3, 4))
        with pytest.raises(ConfigurationError, match="bend is called more than once"):
            model.eval().step(torch.rand(2, 4))


# ------------------------------------------------------------------------------------------------------ threshold


def test_a_threshold_on_what_was_sent_never_drifts_and_one_on_changes_does():
    ramp = torch.linspace(0, 1, 101).view(1, -1, 1)
    sent = DeltaThreshold(0.05)(ramp)
    assert float((sent - ramp).abs().max()) <= 0.0501
    drifted = DeltaThreshold(0.05, remember=False)(ramp)
    assert float(drifted[0, -1]) == 0.0
    torch.testing.assert_close(DeltaThreshold(0.0)(ramp), ramp)
    with pytest.raises(ConfigurationError, match="threshold is -1"):
        DeltaThreshold(-1)


@pytest.mark.parametrize("remember", [True, False])
def test_a_network_with_thresholds_streams_as_it_runs_on_clips(remember):
    clip = video()
    model = to_threshold(network(), 0.05, remember).eval()
    dense = model(clip)
    model.reset()
    streamed = torch.stack([model.step(frame) for frame in clip.unbind(1)], 1)
    torch.testing.assert_close(streamed, dense, atol=1e-10, rtol=0)


# ----------------------------------------------------------------------------------------------------------- cost


def test_products_are_counted_where_something_changes():
    linear = nn.Sequential(nn.Linear(3, 5))
    clip = torch.tensor([[[1.0, 0.0, 2.0], [1.0, 0.0, 3.0], [1.0, 0.0, 3.0]]])
    cost = delta_ops(linear, clip)
    assert (cost.dense, cost.first, cost.later) == (15, 10, 2.5)
    assert cost.live_share == pytest.approx((10 + 5 + 0) / 45)
    assert cost.layers[0].zeros == pytest.approx(5 / 6)
    assert cost.state_values == 8
    states = frame_ops(linear, clip)
    assert (states.first, states.later) == (10, 10)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": 2}, {"dilation": 2}])
def test_products_of_a_convolution_are_counted_at_its_borders_too(options):
    layer = nn.Conv2d(2, 4, 3, **options)
    clip = torch.ones(1, 1, 2, 7, 8)
    rows, columns = layer(clip[:, 0]).shape[2:]
    stride, padding, dilation = layer.stride[0], layer.padding[0], layer.dilation[0]
    # every output, kernel position and channel whose input lies inside
    inside = sum(
        0 <= y * stride + a * dilation - padding < 7 and 0 <= x * stride + b * dilation - padding < 8
        for y in range(rows)
        for x in range(columns)
        for a in range(3)
        for b in range(3)
    )
    assert delta_ops(nn.Sequential(layer), clip).dense == inside * 4 * 2 / layer.groups


def test_a_still_video_costs_its_first_frame_and_noise_costs_all():
    still = video(time=1).expand(-1, 5, -1, -1, -1).clone()
    model = to_delta(network(), still[:, 0], theta_init=0.1)
    cost = delta_ops(model, still)
    assert cost.later == 0
    assert cost.live_share == pytest.approx(cost.first / (5 * cost.dense))
    noisy = torch.rand(2, 5, 1, 16, 16, dtype=torch.float64)
    assert delta_ops(model, noisy).later_share > 0.5


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(CalibrationError, match="batch, time"):
        delta_ops(nn.Linear(3, 3), torch.rand(2, 3))
    with pytest.raises(TargetError, match=r"nn\.Linear"):
        delta_ops(nn.ReLU(), torch.rand(1, 2, 3))
