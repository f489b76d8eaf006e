"""Adam on directions against torch's with the same corrections around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.features.dictionary_adam import DictionaryAdam
from gossamer.kernels import native


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    dictionary = nn.functional.normalize(torch.randn(13, 21, generator=generator, dtype=dtype), dim=1)
    return [
        nn.Parameter(part)
        for part in (dictionary, torch.randn(9, 5, generator=generator, dtype=dtype), torch.zeros(7, dtype=dtype))
    ]


@pytest.mark.parametrize("way", ["reference", *native.instruction_sets()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch_with_straight_gradients_and_lengths_of_one(way, dtype, monkeypatch):
    if way == "reference":
        monkeypatch.setattr("gossamer.features.dictionary_adam.offers", lambda name: False)
    elif not native.offers("code_adam"):
        pytest.skip("the compiled kernels are older than this one")
    else:
        native.native().use_instruction_set(way)
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = DictionaryAdam(ours, 1e-2, (0.8, 0.95), directions=[ours[0]])
    torchs = torch.optim.Adam(theirs, 1e-2, betas=(0.8, 0.95))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for mine_one, their_one in zip(ours, theirs):
            mine_one.grad = torch.randn(mine_one.shape, generator=generator, dtype=dtype)
            their_one.grad = mine_one.grad.clone()
        mine.step()
        with torch.no_grad():
            grad = theirs[0].grad
            grad -= (grad * theirs[0]).sum(1, keepdim=True) * theirs[0]
            torchs.step()
            theirs[0].copy_(nn.functional.normalize(theirs[0], dim=1))
    if way != "reference":
        native.native().use_instruction_set(native.instruction_sets()[-1])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    again = torch.optim.Adam(theirs, 1e-2)
    again.load_state_dict(mine.state_dict())
    torch.testing.assert_close(again.state[theirs[0]]["exp_avg"], torchs.state[theirs[0]]["exp_avg"])


def test_a_weight_without_a_gradient_stays():
    ours = parameters(torch.float32)
    optimizer = DictionaryAdam(ours, 1e-2, directions=[ours[0]])
    before = ours[1].detach().clone()
    ours[0].grad = torch.ones_like(ours[0])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert ours[1].equal(before)
    assert ours[1] not in optimizer.state
