"""Selection against sorting, with ties, zeros of both signs and NaN; encoding against products in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.kernels import encode_select, native
from gossamer.kernels.encode_select import PreparedEncoder, encode_topk, highest_of_rows


@pytest.fixture(params=["reference", *native.instruction_sets()])
def path(request, monkeypatch):
    """Every way in which features are chosen on this machine, with torch alone first."""
    if request.param == "reference":
        monkeypatch.setattr(encode_select, "offers", lambda name: False)
        yield request.param
    else:
        if not native.offers("code_encode"):
            pytest.skip("the compiled kernels are older than encoding")
        with native.using(request.param):
            yield request.param


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(scores, k, positive=False):
    best = scores.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
    return kept & (scores > 0) if positive else kept


def mask_of(codes):
    assert bool((codes.sorted().indices == codes.indices).all()), "features of a row ascend"
    return torch.zeros(codes.shape, dtype=torch.bool).index_put(
        (codes.row_of, codes.indices.long()), torch.tensor(True)
    )


KINDS = {
    "spread": lambda scores: scores,
    "plateaus": lambda scores: (2 * scores).round(),
    "negative": lambda scores: -scores.abs(),
    "zeros": lambda scores: torch.where(scores > 1.5, scores, scores.sign() * 0.0),
    "infinite": lambda scores: torch.where(scores > 2, torch.inf, torch.where(scores < -2, -torch.inf, scores)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 7), (33, 5), (2048, 128), (2049, 1), (5000, 300)])
def test_the_highest_are_those_that_sorting_finds_and_of_equal_ones_the_first(path, kind, dtype, width, k):
    scores = KINDS[kind](draw(5, width)).to(dtype)
    for positive in (False, True):
        found = highest_of_rows(scores, k, positive)
        assert mask_of(found).equal(by_sorting(scores, k, positive))
        assert found.values.equal(scores[found.row_of, found.indices.long()])
        assert found.values.dtype == dtype


def test_rows_that_do_not_lie_together_are_read_where_they_lie(path):
    scores = draw(9, 50)
    assert mask_of(highest_of_rows(scores[:, 3:40], 4)).equal(by_sorting(scores[:, 3:40], 4))
    assert mask_of(highest_of_rows(scores.t(), 4)).equal(by_sorting(scores.t(), 4))
    assert len(highest_of_rows(scores[:0], 4)) == 0


def test_a_score_that_is_no_number_is_refused(path):
    scores = draw(4, 3000)
    scores[2, 2999] = float("nan")
    with pytest.raises(NonFiniteError):
        highest_of_rows(scores, 3)


def compare(found, x, encoder, bias, k):
    """Against float64: who is chosen may differ only where affinities are as good as equal."""
    exact = (x.double() @ encoder.double().t() + (0 if bias is None else bias.double())).relu()
    wanted = exact.topk(k, dim=1).values
    counts = (wanted > 1e-6).sum(1)
    assert bool((found.counts >= counts).all())
    assert bool((found.counts <= k).all())
    dense = found.to_dense().double()
    torch.testing.assert_close(dense.topk(k, dim=1).values, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense, torch.where(dense > 0, exact, 0), rtol=1e-5, atol=1e-5)
    assert bool((found.values > 0).all())
    mask_of(found)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "size", "features", "k"),
    [(1, 5, 3, 3), (4, 16, 40, 2), (5, 7, 33, 33), (70, 24, 50, 3), (130, 64, 1000, 16), (97, 33, 4097, 100)],
)
def test_encoding_finds_the_highest_affinities(path, tokens, size, features, k, rounded):
    x, bias = draw(tokens, size, seed=1), 0.1 * draw(features, seed=3)
    # lengths of encoders differ a lot, and with them how far rounding moves a product
    encoder = draw(features, size, seed=2) * torch.linspace(0, 3, features)[:, None]
    compare(encode_topk(x, encoder, bias, k, rounded), x, encoder, bias, k)
    compare(encode_topk(x, encoder, None, k, rounded), x, encoder, None, k)


@pytest.mark.parametrize("rounded", [False, True])
def test_what_lay_in_memory_before_does_not_matter(path, rounded):
    if path == "reference":
        pytest.skip("only compiled code prepares an encoder")
    x, encoder = draw(70, 24, seed=1), draw(500, 24, seed=2)
    prepared = PreparedEncoder.of(encoder, len(x), rounded)
    for room in (prepared.lengths, prepared.errors, prepared.rounded):
        room.fill_(torch.nan)
    for _ in range(2):
        compare(encode_topk(x, encoder, None, 3, prepared=prepared), x, encoder, None, 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 90), st.integers(1, 40), st.integers(1, 200), st.sampled_from([1e-3, 1, 50]))
def test_rounding_changes_nothing(seed, tokens, size, features, scale):
    x, encoder = scale * draw(tokens, size, seed=seed), draw(features, size, seed=seed + 1)
    k = 1 + seed % features
    ways = [encode_topk(x, encoder, None, k, rounded) for rounded in (False, True)]
    assert ways[0].indices.equal(ways[1].indices)
    assert ways[0].values.equal(ways[1].values)


def test_equal_affinities_are_chosen_in_order(path):
    x = torch.zeros(70, 32)
    assert len(encode_topk(x, draw(500, 32), None, 5).values) == 0
    level = encode_topk(x, draw(500, 32), torch.full((500,), 0.1), 5)
    assert level.indices.reshape(70, 5).long().equal(torch.arange(5).expand(70, 5))
    twins = draw(1, 32).expand(500, 32).contiguous()
    same = encode_topk(draw(1, 32).expand(70, 32).contiguous(), twins, None, 7)
    assert same.indices.reshape(70, 7).long().equal(torch.arange(7).expand(70, 7))


def test_a_token_does_not_depend_on_the_batch_nor_on_threads(path):
    x, encoder, bias = draw(200, 40, seed=1), draw(300, 40, seed=2), 0.1 * draw(300, seed=3)
    whole = encode_topk(x, encoder, bias, 6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = encode_topk(x, encoder, bias, 6)
    finally:
        torch.set_num_threads(threads)
    assert whole.values.equal(again.values)
    for begin, end in ((0, 1), (1, 4), (4, 60), (60, 200)):
        part = encode_topk(x[begin:end].contiguous(), encoder, bias, 6)
        assert part.indices.equal(whole[begin:end].indices)
        torch.testing.assert_close(part.values, whole[begin:end].values, rtol=1e-5, atol=1e-6)
        if path != "reference":
            assert part.values.equal(whole[begin:end].values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_the_way_of_torch(dtype):
    x, encoder = draw(9, 12).to(dtype), draw(30, 12, seed=1).to(dtype)
    found = encode_topk(x, encoder, None, 4)
    assert found.values.dtype == dtype
    assert mask_of(found).equal(by_sorting(x @ encoder.t(), 4, positive=True))


def test_what_does_not_fit_is_refused(path):
    x, encoder = draw(6, 8), draw(20, 8)
    for k in (0, 21):
        with pytest.raises(ConfigurationError, match=f"k is {k}"):
            encode_topk(x, encoder, None, k)
        with pytest.raises(ConfigurationError, match=f"k is {k}"):
            highest_of_rows(encoder.t(), k)
    with pytest.raises(ConfigurationError, match=r"x is \(6, 7\)"):
        encode_topk(x[:, :7], encoder, None, 2)
    with pytest.raises(ConfigurationError, match=r"bias is \(8,\)"):
        encode_topk(x, encoder, x[0], 2)
    with pytest.raises(ConfigurationError, match=r"scores are \(6,\)"):
        highest_of_rows(x[:, 0], 2)
    encoder[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="encoder"):
        encode_topk(x, encoder, None, 2)
