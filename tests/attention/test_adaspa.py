import itertools
import math

import pytest
import torch

from gossamer.attention.adaspa import AdaSpa, bounded, head_levels, tile_order
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.kernels.attention import block_mass
from gossamer.methods import methods
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.diffusion_transformer import DDIMSampler, DiffusionTransformer


def a_call(tokens=40, batch=1, heads=4, size=8, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (spread * torch.randn(batch, heads, tokens, size, generator=generator).double() for _ in range(3))
    return AttentionCall(0, q, k, v, size**-0.5, False)


def masses(call, block):
    weights = (call.query @ call.key.mT * call.scale).softmax(-1)
    rows = [part.sum(-2) for part in weights.split(block, -2)]
    return torch.stack([torch.stack([p.sum(-1) for p in row.split(block, -1)], -1) for row in rows], -2)


def after_search(method, call, steps=50, context=slice(0, 0)):
    method.begin(steps, context)
    method.step(method.search_steps[0] - 1)
    answer = method.attend(call)
    return answer, method.cache.get(call, "pattern")


@pytest.mark.parametrize("tokens", [40, 45])
def test_the_search_keeps_the_heaviest_blocks_of_every_row(tokens):
    call = a_call(tokens, batch=2)
    answer, mask = after_search(AdaSpa(block_size=8, sparsity=0.6, head_adaptive=False), call)
    torch.testing.assert_close(answer.output, call.dense())
    expected = masses(call, 8)
    keep = math.ceil(0.4 * math.ceil(tokens / 8))
    best = torch.zeros_like(expected, dtype=torch.bool).scatter_(-1, expected.topk(keep).indices, True)
    assert torch.equal(mask.blocks, best)


def test_the_second_pass_gives_the_sums_of_the_whole_matrix():
    call, method = a_call(45), AdaSpa(block_size=8)
    after_search(method, call)
    mass = method._mass(call, method.cache.get(call, "log-sum-exp"))
    torch.testing.assert_close(mass.double(), masses(call, 8), atol=1e-5, rtol=0)


def test_steps_are_dense_then_searched_then_sparse_then_searched_again():
    method = AdaSpa(block_size=8, sparsity=0.6, search_steps=(3, 6), head_adaptive=False)
    method.begin(8)
    patterns = []
    for index in range(8):
        method.step(index)
        call = a_call(seed=index)
        answer = method.attend(call)
        if index < 2:
            assert answer is None
            continue
        patterns.append(method.cache.get(call, "pattern"))
        links = patterns[-1].to_dense() if index > 2 else torch.ones(1, dtype=torch.bool)
        scores = (call.query @ call.key.mT * call.scale).masked_fill(~links, -math.inf)
        torch.testing.assert_close(answer.output, scores.softmax(-1) @ call.value)
    changed = [not torch.equal(one.blocks, two.blocks) for one, two in itertools.pairwise(patterns)]
    assert changed == [False, False, True, False, False]  # only by the sixth step


def test_a_search_with_old_sums_ranks_as_the_exact_one_does_when_little_changed():
    method = AdaSpa(block_size=8, sparsity=0.6, search_steps=(1, 2), head_adaptive=False)
    call = a_call()
    after_search(method, call)
    later = AttentionCall(0, call.query + 0.01 * torch.randn_like(call.query), call.key, call.value, call.scale, False)
    method.step(1)
    method.attend(later)
    found = method.cache.get(later, "pattern").blocks
    _, exact = after_search(AdaSpa(block_size=8, sparsity=0.6, search_steps=(1,), head_adaptive=False), later)
    assert (found == exact.blocks).double().mean() > 0.97


def test_old_sums_that_are_far_too_small_do_not_overflow():
    call = a_call(spread=30.0)
    call = AttentionCall(0, *(part.float() for part in (call.query, call.key, call.value)), call.scale, False)
    stale = torch.full(call.query.shape[:3], -100.0)
    assert not torch.isfinite(block_mass(call.query, call.key, stale, 8, causal=False)).all()
    safe = block_mass(call.query, call.key, bounded(call, stale), 8, causal=False)
    assert torch.isfinite(safe).all()
    lse = (call.query @ call.key.mT * call.scale).logsumexp(-1)
    mild = call.query * 0.1
    mild = AttentionCall(0, mild, call.key * 0.1, call.value, call.scale, False)
    lse = (mild.query @ mild.key.mT * mild.scale).logsumexp(-1)
    assert torch.equal(bounded(mild, lse), lse)  # sums that fit are left alone


def test_levels_of_heads_by_hand():
    recall = torch.tensor([[0.9, 0.5, 0.85, 0.6, 0.7, 0.4]])
    found = head_levels(recall, 0.8, 0.8)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.7, 0.9, 0.8, 0.8, 0.7]], dtype=torch.float64))
    assert found.mean() == pytest.approx(0.8)
    # more than half of the heads are easy: the groups stay disjoint
    torch.testing.assert_close(
        head_levels(torch.tensor([[0.9, 0.85, 0.95]]), 0.5, 0.8),
        torch.tensor([[0.5, 0.25, 0.75]], dtype=torch.float64),
    )
    assert (head_levels(recall, 0.8, 1.0) == 0.8).all()


def test_easy_heads_pay_for_hard_ones():
    call = a_call(heads=4, tokens=80)
    call.query[:, 0] *= 0.0  # looks everywhere: low recall
    call.query[:, 1] = 0.0
    call.query[:, 1, :, 0], call.key[:, 1, :8, 0] = 40.0, 10.0  # looks at one block: high recall
    _, mask = after_search(AdaSpa(block_size=8, sparsity=0.6), call)
    counts = mask.blocks.sum(-1)[0, :, 0].tolist()
    assert counts[1] == 2
    assert counts[0] == 6
    assert sum(counts) == 16


def test_text_is_always_read_both_ways():
    call = a_call(44)
    for method, context in (
        (AdaSpa(block_size=8, sparsity=0.8), slice(0, 4)),
        (AdaSpa(block_size=8, sparsity=0.8, text_tokens=slice(0, 4)), slice(0, 0)),
    ):
        _, mask = after_search(method, call, context=context)
        assert mask.blocks[..., 0].all()
        assert mask.blocks[..., 0, :].all()
        # it comes out of the same budget: two blocks a row
        assert (mask.blocks[:, :, 1:].sum(-1).double().mean(-1) >= 1).all()


def test_rows_may_differ_where_they_need_not_be_alike():
    call = a_call(tokens=80)
    call.query[:, :, :8] *= 10
    options = {"block_size": 8, "sparsity": 0.8, "head_adaptive": False}
    _, alike = after_search(AdaSpa(**options), call)
    _, free = after_search(AdaSpa(**options, row_wise=False), call)
    assert (alike.blocks.sum(-1) == 2).all()
    assert (free.blocks.sum((-2, -1)) == 20).all()
    assert free.blocks.sum(-1).unique().numel() > 1
    assert free.blocks.any(-1).all()


def test_tiles_bring_neighbours_together():
    order = tile_order((2, 4, 4), (1, 2, 2), text_tokens=3)
    assert order[:3].tolist() == [0, 1, 2]
    assert (order[3:11] - 3).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order.sort().values.tolist() == list(range(35))
    with pytest.raises(ConfigurationError, match="must divide that of the grid"):
        tile_order((2, 4, 4), (1, 3, 2))


def test_reordered_tokens_come_back_in_their_places():
    call = a_call(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    options = {"block_size": 8, "sparsity": 0.5, "head_adaptive": False, "search_steps": (1,)}
    method = AdaSpa(**options, reorder=order)
    method.begin(2)
    method.step(0)
    torch.testing.assert_close(method.attend(call).output, call.dense())
    method.step(1)
    found = method.attend(call).output
    moved = AttentionCall(0, call.query[:, :, order], call.key[:, :, order], call.value[:, :, order], call.scale, False)
    plain = AdaSpa(**options)
    plain.begin(2)
    plain.step(0)
    plain.attend(moved)
    plain.step(1)
    torch.testing.assert_close(found[:, :, order], plain.attend(moved).output)
    with pytest.raises(ConfigurationError, match="places for 40 tokens"):
        after_search(method, a_call(40))


def video_model():
    torch.manual_seed(0)
    model = DiffusionTransformer((3, 8, 8), 2, 1, 2, 16, 4, 3, text_tokens=4).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


def drawn(model, **options):
    return DDIMSampler(model, 8, **options).sample(torch.tensor([0, 2]), torch.Generator().manual_seed(0))


def test_sparsity_zero_is_dense_and_higher_ones_drift_away():
    model = video_model()
    dense = drawn(model)
    with AdaSpa(block_size=8, sparsity=0.0, head_adaptive=False, search_steps=(2, 5)).active(model):
        torch.testing.assert_close(drawn(model), dense)
    errors = []
    for sparsity in (0.4, 0.8):
        with AdaSpa(block_size=8, sparsity=sparsity, search_steps=(2, 5)).active(model) as installed:
            errors.append(float((drawn(model) - dense).norm()))
        assert installed.report().density("prefill") < 1
    assert 1e-4 < errors[0] < errors[1]


def test_guidance_in_one_call_or_two_finds_the_same_patterns():
    model = video_model()
    with AdaSpa(block_size=8, sparsity=0.6, search_steps=(2, 5)).active(model):
        together, apart = drawn(model), drawn(model, together=False)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_the_expected_cost_is_that_of_the_paper():
    assert AdaSpa().expected_cost(50) == pytest.approx((10 + 8 + 1) / 50)
    assert AdaSpa(search_steps=(10,)).expected_cost(50) == pytest.approx((10 + 8 + 0.5) / 50)
    assert AdaSpa().expected_cost(5) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": 0.3}, "at least 1/3"),
        ({"recall": 0.0}, "recall is 0.0"),
        ({"search_steps": ()}, "search_steps"),
        ({"search_steps": (0, 5)}, "ascending steps from 1"),
        ({"search_steps": (9, 5)}, "ascending steps from 1"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        AdaSpa(**options)


def test_levels_below_a_third_are_refused():
    with pytest.raises(SparsityError, match="head_adaptive=False"):
        head_levels(torch.rand(1, 4), 0.2)
    AdaSpa(sparsity=0.2, head_adaptive=False)


def test_it_is_registered():
    assert methods()["adaspa"].factory is AdaSpa
