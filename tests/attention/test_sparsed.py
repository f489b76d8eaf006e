import math

import pytest
import torch

from gossamer.attention.sparsed import SparseD
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.methods import methods
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.masked_diffusion import MaskedDiffusionLM, MaskedDiffusionSampler


def a_call(tokens=24, batch=1, heads=2, size=8, seed=0, layer=0, scale=None, key_mask=None):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(batch, heads, tokens, size, generator=generator).double() for _ in range(3))
    return AttentionCall(layer, q, k, v, size**-0.5 if scale is None else scale, False, key_mask=key_mask)


def begun(method, steps=10, context=slice(0, 16), index=0):
    method.begin(steps, context)
    method.step(index)
    return method


def pattern_of(method, call):
    begun(method)
    method.step(method.pattern_step)
    method.attend(call)
    return method.cache.get(call, "pattern")


def by_hand(call, first, block, select):
    """The release's selection, one block of queries at a time, with the n × n matrix."""
    n = call.query.shape[2]
    blocks = math.ceil(n / block)
    kept = torch.zeros(*call.query.shape[:2], blocks, blocks, dtype=torch.bool)
    scores = call.query @ call.key.mT * call.scale
    for start, dropped in ((0, slice(first, None)), (first, slice(0, first))):
        weights = scores[..., start * block :].softmax(-1)
        for row in range(blocks):
            part = weights[:, :, row * block : (row + 1) * block]
            mass = torch.stack([tile.sum((-2, -1)) for tile in part.split(block, -1)], -1)
            keep = min(mass.shape[-1], max(1, int(mass.shape[-1] * select) + 1))
            best = torch.zeros(*mass.shape[:2], blocks, dtype=torch.bool)
            best[..., start:].scatter_(-1, mass.topk(keep).indices, True)
            best[..., dropped] = False
            kept[:, :, row] |= best
    return kept


@pytest.mark.parametrize("tokens", [24, 27])
def test_the_pattern_is_that_of_the_whole_matrix_chosen_apart(tokens):
    call = a_call(tokens, batch=2)
    mask = pattern_of(SparseD(block_size=4, select=0.3), call)
    assert torch.equal(mask.blocks, by_hand(call, 4, 4, 0.3))
    assert mask.block_size == (4, 4)


def test_a_long_prompt_does_not_starve_what_is_written():
    """The written part is 8 of 168 tokens, and no query looks at it by itself."""
    call = a_call(168)
    call.key[:, :, 160:] = 0
    call.key[:, :, :160] = call.query.mean(2, keepdim=True) * 3
    for isolated in (True, False):
        method = SparseD(block_size=4, select=0.3, isolated=isolated, generation_length=8)
        kept = pattern_of(method, call).blocks[..., 40:].sum(-1)
        assert kept.min() == (1 if isolated else 0)


def test_dense_steps_then_one_pattern_for_the_rest():
    method, seen = SparseD(skip=0.2, select=0.3, block_size=4), []
    pattern = BlockMask.full(24, block_size=4, causal=False)
    method.begin(10, slice(0, 16))
    for index in range(10):
        method.step(index)
        call = a_call(seed=index)
        answer = method.attend(call)
        seen.append("dense" if answer is None else answer.density)
        if answer is not None and answer.density < 1:
            links = pattern.to_dense()
            scores = (call.query @ call.key.mT * call.scale).masked_fill(~links, -math.inf)
            torch.testing.assert_close(answer.output, scores.softmax(-1) @ call.value)
        if index == 3:
            torch.testing.assert_close(answer.output, call.dense())
            pattern = method.cache.get(call, "pattern")
    assert method.pattern_step == 3
    assert seen[:4] == ["dense"] * 3 + [1.0]
    assert set(seen[4:]) == {pattern.density}
    assert pattern.density < 0.7


@pytest.mark.parametrize(("skip", "steps", "expected"), [(0.2, 10, 3), (0.0, 10, 1), (0.29, 100, 30), (1.0, 8, 9)])
def test_the_pattern_step_follows_the_share_of_steps(skip, steps, expected):
    assert begun(SparseD(skip=skip), steps).pattern_step == expected


def writer():
    torch.manual_seed(0)
    model = MaskedDiffusionLM(13, 2, 16, 2, 48).eval()
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_skipping_all_steps_or_selecting_all_blocks_is_dense():
    model = writer()
    sampler, prompt = MaskedDiffusionSampler(model, 8, 8), torch.arange(12)[None]
    dense = sampler.generate(prompt, 16)
    with SparseD(skip=1.0, block_size=4).active(model) as installed:
        assert torch.equal(sampler.generate(prompt, 16), dense)
        assert installed.report().density("prefill") == 1
    with SparseD(select=1.0, block_size=4).active(model) as installed:
        assert torch.equal(sampler.generate(prompt, 16), dense)
        assert installed.report().density("prefill") == 1


def test_the_step_of_the_whole_sample_decides_in_semi_autoregressive_blocks():
    """Four blocks of two steps each: patterns are found once, in the third step, and not once a block."""
    model, method, found = writer(), SparseD(skip=0.2, select=0.3, block_size=4), []
    pattern = method.pattern
    method.pattern = lambda call, lse: found.append(method.cache.index) or pattern(call, lse)
    with method.active(model) as installed:
        MaskedDiffusionSampler(model, 8, 4).generate(torch.arange(12)[None], 16)
        assert found == [2, 2]  # both layers
        assert 3 / 8 < installed.report().density("prefill") < 1
        MaskedDiffusionSampler(model, 8, 4).generate(torch.arange(12)[None] % 5, 16)
    assert found == [2, 2, 2, 2]  # a new prompt has its own


def test_a_batch_gives_what_its_prompts_give_alone():
    model, method = writer(), SparseD(select=0.3, block_size=4)
    prompts = torch.stack([torch.arange(12), torch.arange(12).flip(0)])
    sampler = MaskedDiffusionSampler(model, 8)
    with method.active(model):
        together = sampler.generate(prompts, 16)
        alone = torch.cat([sampler.generate(prompt[None], 16) for prompt in prompts])
    assert torch.equal(together, alone)


def test_padding_is_never_chosen():
    real = torch.ones(1, 24, dtype=torch.bool)
    real[:, :8] = False
    call = a_call(key_mask=real)
    mask = pattern_of(SparseD(block_size=4, select=0.1), call)
    assert not mask.blocks[..., :2].any()
    assert mask.blocks.any(-1).all()


def test_grouped_heads_have_patterns_of_their_own():
    call = a_call(heads=4)
    grouped = AttentionCall(0, call.query, call.key[:, :2], call.value[:, :2], call.scale, False)
    spread = AttentionCall(0, call.query, call.key[:, [0, 0, 1, 1]], call.value[:, [0, 0, 1, 1]], call.scale, False)
    found, expected = (pattern_of(SparseD(block_size=4), each) for each in (grouped, spread))
    assert torch.equal(found.blocks, expected.blocks)


def test_a_sequence_shorter_than_a_block_is_one_block():
    call = a_call(5)
    assert pattern_of(SparseD(generation_length=2), call).blocks.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": -0.1}, "skip is -0.1"),
        ({"skip": 1.1}, "skip is 1.1"),
        ({"select": 0.0}, "select is 0.0"),
        ({"select": 1.5}, "select is 1.5"),
        ({"block_size": 0}, "block_size is 0"),
        ({"generation_length": 0}, "generation_length is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SparseD(**options)


def test_a_pattern_of_another_length_is_refused():
    method = SparseD(block_size=4, skip=0.0)
    begun(method).step(1)
    method.attend(a_call(24))
    method.step(2)
    with pytest.raises(ConfigurationError, match="call begin"):
        method.attend(a_call(28))


def test_a_step_that_was_left_out_is_told():
    method = SparseD(block_size=4, skip=0.0)
    begun(method).step(5)
    with pytest.raises(ConfigurationError, match="layer 0 has no pattern at step 5"):
        method.attend(a_call())


def test_nothing_to_write_is_refused():
    method = SparseD(block_size=4, skip=0.0)
    begun(method, context=slice(0, 24)).step(1)
    with pytest.raises(ConfigurationError, match="0 of 24 tokens are being written"):
        method.attend(a_call())


def test_it_is_registered():
    spec = methods()["sparsed"]
    assert (spec.factory, spec.granularity, spec.when) == (SparseD, "blocks", "at inference")
