from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.models.masked_diffusion import MaskedDiffusionLM, MaskedDiffusionSampler, masked_loss


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskedDiffusionLM(13, 2, 16, 2, 24).eval()


def tokens(*shape, seed=0):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


def test_every_position_sees_both_directions(model):
    one = tokens(1, 10)
    with torch.no_grad():
        before = model(one)
        for changed, watched in ((9, 0), (0, 9)):
            other = one.clone()
            other[0, changed] = (other[0, changed] + 1) % 13
            assert not torch.allclose(model(other)[0, watched], before[0, watched])


def test_padding_is_not_seen(model):
    short = tokens(1, 6)
    padded = torch.cat([short, tokens(1, 4, seed=1)], 1)
    real = torch.arange(10)[None] < 6
    with torch.no_grad():
        torch.testing.assert_close(model(padded, real)[:, :6], model(short))


def test_a_longer_sequence_than_the_model_takes_is_refused(model):
    with pytest.raises(ConfigurationError, match="25 tokens; the model takes at most 24"):
        model(tokens(1, 25))


def test_the_loss_is_the_weighted_sum_over_hidden_tokens(model):
    x = tokens(3, 10)
    found = masked_loss(model, x, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    share = ((torch.rand((), generator=generator) + torch.arange(3) / 3) % 1).clamp(min=0.02)
    hidden = torch.rand(3, 10, generator=generator) < share[:, None]
    logits = model(x.masked_fill(hidden, 13))
    expected = 0.0
    for row in range(3):
        for place in range(10):
            if hidden[row, place]:
                expected += functional.cross_entropy(logits[row, place], x[row, place]) / share[row]
    torch.testing.assert_close(found, expected / 30)


def test_what_may_not_be_hidden_never_is(model):
    x = tokens(2, 10)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(5):
        masked_loss(model, x, torch.Generator().manual_seed(seed), torch.arange(10) >= 4)
    assert all(torch.equal(ids[:, :4], x[:, :4]) for ids in seen)
    assert any((ids[:, 4:] == 13).any() for ids in seen)


def test_each_step_commits_its_share_and_keeps_what_is_written(model):
    states = []
    sampler = MaskedDiffusionSampler(model, 4, block_length=5)
    prompt = tokens(2, 3)
    found = sampler.generate(prompt, 10, watch=lambda step, ids: states.append(ids.clone()))
    assert torch.equal(found[:, :3], prompt)
    assert [int((ids[0] == 13).sum()) for ids in states] == [7, 5, 2, 0]  # 3 of 5, then 2, in each block
    assert all((ids[:, 8:] == 13).all() for ids in states[:2])  # the second block waits
    for earlier, later in pairwise(states):
        written = earlier != 13
        assert torch.equal(later[written], earlier[written])


def test_the_surest_predictions_are_kept_first(model):
    prompt = tokens(1, 4)
    states = []
    MaskedDiffusionSampler(model, 6).generate(prompt, 6, watch=lambda step, ids: states.append(ids.clone()))
    with torch.no_grad():
        start = torch.cat([prompt, torch.full((1, 6), 13)], 1)
        best = model(start)[0, 4:].softmax(-1).max(-1)
    place = int(best.values.argmax())
    assert int((states[0][0, 4:] != 13).nonzero()) == place
    assert states[0][0, 4 + place] == best.indices[place]


def test_random_draws_follow_their_generator(model):
    for options in ({"temperature": 1.0}, {"remasking": "random"}):
        sampler = MaskedDiffusionSampler(model, 4, **options)
        one, again = (sampler.generate(tokens(2, 3), 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(one, again)
    assert not (one == 13).any()


def test_padded_prompts_write_what_they_write_alone(model):
    prompt = tokens(1, 5)
    alone = MaskedDiffusionSampler(model, 4).generate(prompt, 8)
    # padding behind would shift positions, so it stands for hidden tokens: unseen ones change nothing
    mask = torch.tensor([[True, True, True, False, False]])
    other = prompt.clone()
    other[0, 3:] = (other[0, 3:] + 1) % 13
    sampler = MaskedDiffusionSampler(model, 4)
    one, two = sampler.generate(prompt, 8, mask), sampler.generate(other, 8, mask)
    assert torch.equal(one[:, 5:], two[:, 5:])
    assert alone.shape == one.shape


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"steps": 0}, 8, "steps is 0"),
        ({"steps": 4, "block_length": 0}, 8, "block_length is 0"),
        ({"steps": 4, "temperature": -1.0}, 8, "temperature is -1.0"),
        ({"steps": 4, "remasking": "lowest"}, 8, "low_confidence or random"),
        ({"steps": 4, "block_length": 3}, 8, "multiple of the block length 3"),
        ({"steps": 3, "block_length": 4}, 8, "a multiple of 2 blocks"),
        ({"steps": 16}, 8, "at most 8"),
    ],
)
def test_impossible_plans_are_refused(model, options, length, message):
    with pytest.raises(ConfigurationError, match=message):
        MaskedDiffusionSampler(model, **options).generate(tokens(1, 3), length)


def test_a_prompt_of_another_kind_is_refused(model):
    with pytest.raises(CalibrationError, match="token ids"):
        MaskedDiffusionSampler(model, 4).generate(torch.rand(1, 3), 8)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigurationError, match="multiple of the 3 heads"):
        MaskedDiffusionLM(13, 1, 16, 3, 8)
