import math

import pytest
import torch

from gossamer.attention.local_windows import WindowMask, mask_density, masked_attention
from gossamer.attention.re_ttention import (
    Rettention,
    attention_with_denominator_scale,
    distribution_shift,
    softmax_share,
)
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.methods import methods
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.diffusion_transformer import DDIMSampler, DiffusionTransformer


def a_call(tokens=24, batch=1, heads=2, size=8, seed=0, key_mask=None):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(batch, heads, tokens, size, generator=generator).double() for _ in range(3))
    return AttentionCall(0, q, k, v, size**-0.5, False, key_mask=key_mask)


def links_by_hand(frames, frame, reach, text):
    n = text + frames * frame
    found = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            word = i < text or j < text
            found[i, j] = word or abs((i - text) % frame - (j - text) % frame) <= reach
    return found


WINDOWS = [(1, 40, 3, 0), (1, 40, 40, 0), (3, 8, 1, 0), (4, 9, 2, 5), (1, 70, 2, 3), (2, 70, 0, 1)]


@pytest.mark.parametrize("shape", WINDOWS)
def test_a_window_sees_the_same_places_in_every_frame_and_all_text(shape):
    frames, frame, reach, text = shape
    window = WindowMask(text + frames * frame, reach, frames, slice(0, text))
    dense = links_by_hand(*shape)
    assert torch.equal(window.to_dense()[0, 0], dense)
    assert window.density == pytest.approx(float(dense.double().mean()))
    assert mask_density(window.to_dense()) == pytest.approx(window.density)


@pytest.mark.parametrize("shape", WINDOWS)
def test_attention_in_stretches_is_that_of_the_dense_mask(shape):
    frames, frame, reach, text = shape
    window = WindowMask(text + frames * frame, reach, frames, slice(0, text))
    call = a_call(window.length, batch=2)
    real = torch.rand(2, window.length, generator=torch.Generator().manual_seed(1)) < 0.8
    for key_mask in (None, real):
        seen = links_by_hand(*shape) if key_mask is None else links_by_hand(*shape) & real[:, None, None, :]
        scores = (call.query @ call.key.mT * call.scale).masked_fill(~seen, -math.inf)
        expected = scores.softmax(-1).nan_to_num(0.0) @ call.value
        output, lse = masked_attention(call.query, call.key, call.value, window, key_mask=key_mask)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_text_may_stand_at_the_end():
    window = WindowMask(27, 1, 3, slice(24, 27))
    call = a_call(27)
    expected, _ = masked_attention(call.query, call.key, call.value, window.to_dense())
    found, _ = masked_attention(call.query, call.key, call.value, window)
    torch.testing.assert_close(found, expected)
    assert window.to_dense()[0, 0, 24:].all()
    with pytest.raises(ConfigurationError, match="at either end"):
        WindowMask(27, 1, 3, slice(10, 13))


def test_a_window_of_blocks_covers_it():
    window = WindowMask(40, 3)
    blocks = window.to_blocks(8)
    assert not (window.to_dense() & ~blocks.to_dense()).any()
    call = a_call(40)
    for mask in (blocks, blocks.to_dense()):
        found, lse = masked_attention(call.query, call.key, call.value, mask)
        scores = (call.query @ call.key.mT * call.scale).masked_fill(~blocks.to_dense(), -math.inf)
        torch.testing.assert_close(found, scores.softmax(-1) @ call.value)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1))


def test_the_share_is_what_the_kept_keys_hold_of_the_full_softmax():
    call, window = a_call(), WindowMask(24, 2)
    weights = (call.query @ call.key.mT * call.scale).softmax(-1)
    expected = (weights * window.to_dense()).sum(-1)
    torch.testing.assert_close(softmax_share(call.query, call.key, window), expected)
    torch.testing.assert_close(softmax_share(call.query, call.key, window.to_dense()), expected)


def test_scores_of_thousands_do_not_overflow_a_share():
    call = a_call()
    large = 100 * call.query
    share = softmax_share(large.float(), call.key.float(), WindowMask(24, 2))
    assert torch.isfinite(share).all()
    assert ((share >= 0) & (share <= 1)).all()


def test_rows_of_scaled_weights_are_those_of_full_attention():
    """With the true share, kept weights are exactly the full ones: a row sums to it and not to one."""
    call, window = a_call(), WindowMask(24, 2)
    weights = (call.query @ call.key.mT * call.scale).softmax(-1) * window.to_dense()
    share = softmax_share(call.query, call.key, window)
    found = attention_with_denominator_scale(call.query, call.key, call.value, window, share)
    torch.testing.assert_close(found, weights @ call.value)
    with pytest.raises(ConfigurationError, match="clamp it"):
        attention_with_denominator_scale(call.query, call.key, call.value, window, share + 0.5)


def test_the_shift_of_weights_by_hand():
    call, window = a_call(), WindowMask(24, 2)
    full = (call.query @ call.key.mT * call.scale).softmax(-1)
    true = softmax_share(call.query, call.key, window)
    kept = full * window.to_dense()
    for used in (torch.ones_like(true), true, (true + 0.1).clamp(max=1)):
        weights = kept / true[..., None] * used[..., None]
        logs = torch.where(weights > 0, weights * (weights / full).log(), 0.0)
        expected = (logs - weights + full).sum(-1)
        torch.testing.assert_close(distribution_shift(used, true), expected)


# ------------------------------------------------------------------------------------------------------- the schedule


def test_images_and_videos_are_full_at_the_steps_of_the_paper():
    image = Rettention()
    assert [i for i in range(20) if image.kind(i, 20) == "dense"] == [0, 1, 2, 3, 4]
    assert [i for i in range(20) if image.kind(i, 20) == "refresh"] == [5, 10, 15]
    video = Rettention(mask="frames", frames=8, dense_steps=0.3)
    assert [i for i in range(50) if video.kind(i, 50) == "dense"] == list(range(15))
    assert [i for i in range(50) if video.kind(i, 50) == "refresh"] == [15, 20, 25, 30, 35, 40, 45]
    assert image.expected_cost(20, 0.1) == pytest.approx((5 + 3 * 1.1 + 12 * 0.1) / 20)


def stepped(method, calls, steps=20, context=slice(0, 0)):
    """Answers at steps 5, 6, … for calls in turn."""
    method.begin(steps, context)
    found = []
    for index, call in enumerate(calls, 5):
        method.step(index)
        found.append(method.attend(call))
    return found


def test_a_sparse_step_is_the_scaled_window_and_the_rest_of_the_last_full_step():
    method = Rettention(keep=0.25, drift=0.05)
    calls = [a_call(seed=seed) for seed in range(3)]
    full, first, second = stepped(method, calls)
    window = WindowMask.keeping(0.25, 24)
    share = softmax_share(calls[0].query, calls[0].key, window)
    torch.testing.assert_close(full.output, calls[0].dense())
    kept = [masked_attention(call.query, call.key, call.value, window)[0] for call in calls]
    rest = full.output - share[..., None] * kept[0]
    torch.testing.assert_close(first.output, share[..., None] * kept[1] + rest)
    drifted = (share + 0.05).clamp(max=1)
    torch.testing.assert_close(second.output, drifted[..., None] * kept[2] + rest)
    assert (share + 0.05 > 1).any()  # or the clamp would go untested
    assert second.density == pytest.approx(window.density)


def test_parts_can_be_left_out():
    calls = [a_call(seed=seed) for seed in range(2)]
    window = WindowMask.keeping(0.25, 24)
    kept = [masked_attention(call.query, call.key, call.value, window)[0] for call in calls]
    share = softmax_share(calls[0].query, calls[0].key, window)[..., None]
    expected = {
        (True, False): share * kept[1],
        (False, True): kept[1] + calls[0].dense() - kept[0],
        (False, False): kept[1],
    }
    for (ratio, residual), output in expected.items():
        method = Rettention(keep=0.25, ratio=ratio, residual=residual)
        torch.testing.assert_close(stepped(method, calls)[1].output, output)


def test_the_same_input_again_gives_full_attention():
    """What was kept and what was cached add up, at any width and with any mask."""
    call = a_call(28)
    for options in ({"keep": 0.1}, {"mask": "frames", "frames": 3, "keep": 0.2}):
        method = Rettention(**options)
        answers = stepped(method, [call, call], context=slice(0, 4))
        torch.testing.assert_close(answers[1].output, call.dense())
    blocks = BlockMask(torch.rand(1, 2, 4, 4) < 0.5, 28, 28, (7, 7), causal=False)
    torch.testing.assert_close(stepped(Rettention(mask=blocks), [call, call])[1].output, call.dense())


def test_a_solver_that_asks_twice_at_a_step_does_not_drift_twice():
    method = Rettention(keep=0.25, drift=0.1)
    calls = [a_call(seed=seed) for seed in range(2)]
    once = stepped(method, calls)[1].output
    method.begin(20)
    for index, call in enumerate(calls, 5):
        method.step(index)
        method.attend(call)
        again = method.attend(call)
    torch.testing.assert_close(again.output, once)


def painter(size=(8, 8)):
    torch.manual_seed(0)
    model = DiffusionTransformer(size, 2, 1, 2, 16, 2, 3, text_tokens=2).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


def drawn(model, **options):
    return DDIMSampler(model, 12, **options).sample(torch.tensor([0, 2]), torch.Generator().manual_seed(0))


def test_a_window_over_everything_is_dense_and_narrow_ones_drift_away():
    model = painter()
    dense = drawn(model)
    with Rettention(keep=1.0).active(model):
        torch.testing.assert_close(drawn(model), dense, atol=1e-4, rtol=1e-4)
    with Rettention(keep=1 / 8).active(model) as installed:
        assert float((drawn(model) - dense).norm()) > 1e-3
    assert installed.report().density("prefill") < 0.9


def test_both_halves_of_guidance_keep_their_own():
    model = painter((3, 8, 8))
    with Rettention(mask="frames", frames=3, keep=0.2).active(model):
        together, apart = drawn(model), drawn(model, together=False)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_a_second_sample_is_not_touched_by_the_first():
    model = painter()
    with Rettention(keep=1 / 8).active(model):
        first = drawn(model)
        DDIMSampler(model, 12).sample(torch.tensor([1, 1]), torch.Generator().manual_seed(5))
        assert torch.equal(drawn(model), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.2}, "keep is 1.2"),
        ({"mask": "stripes"}, "band, frames, or a BlockMask"),
        ({"mask": "frames"}, "frames is 1"),
        ({"dense_steps": -1}, "dense_steps is -1"),
        ({"dense_steps": math.nan}, "dense_steps is nan"),
        ({"dense_steps": math.inf}, "dense_steps is inf"),
        ({"refresh_every": 0}, "refresh_every 0"),
        ({"refresh_every": math.nan}, "refresh_every nan"),
        ({"drift": math.nan}, "drift is nan"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Rettention(**options)


def test_windows_of_no_token_and_uneven_frames_are_refused():
    for options, tokens, message in (
        ({"keep": 1 / 32}, 24, "a window of no token in frames of 24"),
        ({"mask": "frames", "frames": 4, "keep": 0.1}, 24, "a window of no token in frames of 6"),
        ({"mask": "frames", "frames": 5, "keep": 0.5}, 24, "equally many tokens"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            stepped(Rettention(**options), [a_call(tokens)])


def test_masks_for_another_length_are_refused():
    call = a_call(24)
    with pytest.raises(ConfigurationError, match="made for 20 tokens, not 24"):
        masked_attention(call.query, call.key, call.value, WindowMask(20, 2))
    with pytest.raises(ConfigurationError, match="must be bool and end with"):
        masked_attention(call.query, call.key, call.value, torch.ones(20, 20, dtype=torch.bool))


def test_it_is_registered():
    assert methods()["re-ttention"].factory is Rettention
