from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.training.ctrnn import CTRNN


@pytest.mark.parametrize("leak", [1.0, 0.3])
def test_it_follows_its_equation_step_by_step(leak):
    torch.manual_seed(0)
    net = CTRNN(2, 5, 3, leak=leak)
    sequence = torch.randn(4, 6, 2)
    outputs, activity = net(sequence)
    state = torch.zeros(6, 5)
    for step in range(4):
        pull = state @ net.recurrent.t() + sequence[step] @ net.input.t()
        state = torch.relu((1 - leak) * state + leak * pull)
        torch.testing.assert_close(activity[step], state)
        torch.testing.assert_close(outputs[step], state @ net.readout.t())


def test_a_run_goes_on_from_a_state():
    torch.manual_seed(0)
    net, sequence = CTRNN(2, 5, 3), torch.randn(6, 4, 2)
    whole = net(sequence)[1]
    first = net(sequence[:2])[1]
    torch.testing.assert_close(net(sequence[2:], first[-1])[1], whole[2:])


def test_copies_run_side_by_side():
    torch.manual_seed(0)
    stack = CTRNN(2, 5, 3, copies=(2, 3))
    sequence = torch.randn(4, 6, 2)
    outputs, activity = stack(sequence)
    assert outputs.shape == (4, 2, 3, 6, 3)
    alone = CTRNN(2, 5, 3)
    with torch.no_grad():
        for one, many in zip(alone.parameters(), stack.parameters()):
            one.copy_(many[1, 2])
    torch.testing.assert_close(activity[:, 1, 2], alone(sequence)[1])


def test_masked_connections_stay_zero_while_it_trains():
    torch.manual_seed(0)
    mask = torch.rand(5, 5) < 0.4
    net = CTRNN(2, 5, 3, torch.randn(5, 5), mask=mask)
    before = net.recurrent.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 6, 2))[0].square().mean().backward()
        optimizer.step()
    assert not net.recurrent[~mask].any()
    assert not torch.equal(net.recurrent[mask], before[mask])


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="leak"):
        CTRNN(2, 5, 3, leak=0.0)
    with pytest.raises(ConfigurationError, match="recurrent has shape"):
        CTRNN(2, 5, 3, torch.zeros(4, 4))
    with pytest.raises(ConfigurationError, match="batch, 2"):
        CTRNN(2, 5, 3)(torch.zeros(4, 6, 3))
