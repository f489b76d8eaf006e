"""Gradients of a model's loss at one of its modules, against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from gossamer.errors import CalibrationError, ModelError
from gossamer.features.gradients import loss_gradient
from gossamer.features.splicing import edited
from gossamer.measure.windows import evaluation_mode


def summed_loss(model, text):
    return cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="sum")


@pytest.mark.parametrize(("position", "channel"), [(0, 3), (5, 11), (8, 47)])
def test_a_gradient_is_the_change_of_the_summed_loss_at_that_token(tiny_llama, position, channel):
    model, step = tiny_llama.double(), 1e-3  # its norms compute in float32
    text = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    x, gradient = loss_gradient(model, model.model.layers[1], text)

    def moved(by):
        def edit(states):
            assert states.equal(x)
            changed = states.clone()
            changed[0, position, channel] += by
            return changed

        with torch.no_grad(), edited(model, 1, edit):
            return summed_loss(model, text)

    slope = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(gradient[0, position, channel], slope, rtol=3e-4, atol=1e-5)


def test_nothing_of_the_model_is_left_changed(tiny_llama):
    text = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in tiny_llama.parameters()]
    with evaluation_mode(tiny_llama):
        inside = loss_gradient(tiny_llama, tiny_llama.model.layers[0], text)[1]
    assert inside.equal(loss_gradient(tiny_llama, tiny_llama.model.layers[0], text)[1])
    assert [(p.requires_grad, p.grad) for p in tiny_llama.parameters()] == before
    assert not tiny_llama.model.layers[0]._forward_hooks


def test_what_has_no_gradient_is_refused(tiny_llama):
    text = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match="at least 2"):
        loss_gradient(tiny_llama, tiny_llama.model.layers[0], text[:, :1])
    with pytest.raises(ModelError, match="main path"):
        loss_gradient(tiny_llama, torch.nn.Linear(2, 2), text, "spare")
