from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.papers.connectome import synapse_matrix
from gossamer.papers.digits import Digits
from gossamer.papers.recurrent_tasks import TASKS, context_decision, delay_match, draw_trials, row_digits, two_afc


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_to_fixate_until_the_last_step(task):
    trials = draw_trials(task, 200, seeded())
    assert trials.inputs.shape == (8, 200, 7 if task == "CXT" else 3)
    assert not trials.targets[:-1].any()
    assert set(trials.targets[-1].tolist()) == {1, 2}
    assert (trials.inputs[:-1, :, 0] == 1).all()
    assert not trials.inputs[-1, :, 0].any()
    assert torch.equal(draw_trials(task, 200, seeded()).inputs, trials.inputs)


def test_the_stronger_stimulus_is_the_answer():
    trials = two_afc(2000, noise=0.0, generator=seeded())
    seen = trials.inputs[:-1, :, 1] - trials.inputs[:-1, :, 2]
    assert torch.equal(seen, seen[:1].expand_as(seen))
    levels = seen[0].abs().mul(1000).round().int().unique().tolist()
    assert levels == [0, 64, 128, 256, 512]
    clear = seen[0] != 0
    answers = trials.targets[-1]
    assert torch.equal(seen[0][clear] > 0, answers[clear] == 1)
    noisy = two_afc(2000, generator=seeded()).inputs[:-1, :, 1:].sum(2) - 1
    assert noisy.std() == pytest.approx(0.1 * 2**0.5, rel=0.05)


def test_the_answer_tells_whether_the_sample_comes_again():
    trials = delay_match(500, noise=0.0, generator=seeded())
    first, second = trials.inputs[0, :, 1:], trials.inputs[-2, :, 1:]
    assert torch.equal(first.abs(), torch.ones(500, 2))
    assert torch.equal((first == second).all(1), trials.targets[-1] == 1)
    assert not trials.inputs[1:-2, :, 1:].any()
    assert not trials.inputs[-1].any()


def test_the_context_says_which_modality_counts():
    trials = context_decision(2000, noise=0.0, generator=seeded())
    context = trials.inputs[0, :, 5:].argmax(1)
    assert torch.equal(trials.inputs[:, :, 5:], trials.inputs[:1, :, 5:].expand(8, 2000, 2))
    pairs = trials.inputs[0, :, 1:5].view(2000, 2, 2)
    evidence = (pairs[..., 0] - pairs[..., 1])[torch.arange(2000), context]
    assert torch.equal(evidence > 0, trials.targets[-1] == 1)
    other = (pairs[..., 0] - pairs[..., 1])[torch.arange(2000), 1 - context]
    assert ((other > 0) == (evidence > 0)).double().mean() == pytest.approx(0.5, abs=0.05)
    assert not trials.inputs[2:, :, 1:5].any()


def test_digits_are_read_row_by_row():
    data = Digits(torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1]))
    trials = row_digits(data, torch.tensor([2, 0]))
    assert trials.inputs.shape == (28, 2, 28)
    assert torch.equal(trials.inputs[5, 0], data.images[2, 0, 5])
    assert trials.targets[-1].tolist() == [4, 3]
    assert (trials.targets[:-1] == -100).all()
    halved = row_digits(data, torch.tensor([2, 0]), pool=2)
    assert halved.inputs.shape == (14, 2, 14)
    torch.testing.assert_close(halved.inputs[0, 1, 0], data.images[0, 0, :2, :2].mean())


def test_synapses_are_placed_by_sender_and_signed_by_transmitter():
    edges = [("AVAL", "DD01", 3.0), ("DD01", "AVAL", 2.0), ("DD01", "dBWML1", 5.0)]
    names, synapses = synapse_matrix(edges)
    assert names == ["AVAL", "DD01"]
    assert synapses.tolist() == [[0.0, -2.0], [3.0, 0.0]]


def test_bad_input_is_refused():
    with pytest.raises(UnknownNameError, match="2AF"):
        draw_trials("2AFC", 5)
    with pytest.raises(ConfigurationError, match="batch"):
        two_afc(0)
    with pytest.raises(ConfigurationError, match="shown"):
        context_decision(5, shown=8)
