"""Attention over blocks and its statistics, against float64 brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.kernels import attention, attention_reference
from gossamer.kernels.attention import antidiagonal_mass, attention_with_lse, block_mass, block_sparse_attention

#: batch, heads, key heads, queries, keys, size, value size, block of queries, of keys, causal, window, padding
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 64, 64, True, None, False),
    (1, 1, 1, 128, 128, 64, 64, 64, 64, True, None, False),
    (2, 4, 2, 70, 90, 16, 24, 16, 16, True, None, True),
    (1, 2, 1, 200, 333, 80, 80, 64, 64, True, 50, True),
    (1, 2, 2, 130, 130, 96, 96, 20, 20, False, 30, False),
    (1, 3, 1, 157, 211, 33, 7, 100, 30, True, None, True),
    (1, 1, 1, 300, 300, 256, 256, 128, 128, True, None, False),
    (1, 2, 1, 5, 500, 128, 128, 64, 64, True, None, True),
    (2, 2, 2, 40, 30, 64, 64, 16, 8, False, None, True),
    (1, 4, 2, 190, 300, 17, 1, 48, 48, True, None, True),
    (1, 2, 1, 150, 333, 80, 40, 16, 16, False, None, True),
    (1, 2, 1, 70, 1100, 40, 24, 64, 64, True, None, False),
]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, BlockMask, dict]:
    batch, heads, shared, queries, keys, size, value_size, rows, columns, causal, window, padding = shape
    generator = torch.Generator().manual_seed(1)
    q = draw(batch, heads, queries, size, seed=2, dtype=dtype)
    k = draw(batch, keys, shared, size, seed=3, dtype=dtype).transpose(1, 2)  # as models hold it: not contiguous
    v = draw(batch, shared, keys, value_size, seed=4, dtype=dtype)
    blocks = torch.rand(batch, heads, -(-queries // rows), -(-keys // columns), generator=generator) < 0.6
    mask = BlockMask(blocks, queries, keys, (rows, columns), causal)
    real = torch.rand(batch, keys, generator=generator) < 0.8 if padding else None
    return q, k, v, mask, {"window": window, "key_mask": real}


def links(mask: BlockMask, window: int | None = None, key_mask: Tensor | None = None) -> Tensor:
    """Every link that may be used."""
    found = mask.to_dense().clone()
    if window is not None:
        ends = torch.arange(mask.query_length)[:, None] + mask.key_length - mask.query_length
        found &= (ends - torch.arange(mask.key_length)).abs() < window
    return found if key_mask is None else found & key_mask[:, None, None]


def brute_force(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
    """Outputs, log-sum-exps and weights in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0)
    return weights @ v, scores.logsumexp(-1), weights


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_attended_to_exactly(way, shape, dtype):
    q, k, v, mask, about = inputs(shape, dtype)
    found, lse = block_sparse_attention(q, k, v, mask, **about, return_lse=True)
    wanted, wanted_lse, _ = brute_force(q, k, v, links(mask, **about))
    assert found.dtype == dtype
    assert lse.dtype == torch.float32
    near(found, wanted, 1e-5 if dtype == torch.float32 else 1e-2)
    near(lse, wanted_lse)


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_a_full_mask_is_dense_attention(way, shape):
    q, k, v, mask, about = inputs(shape)
    everything = BlockMask.full(mask.query_length, mask.key_length, mask.block_size, mask.causal)
    found = block_sparse_attention(q, k, v, everything, **about, return_lse=True)
    dense = attention_with_lse(q, k, v, causal=mask.causal, **about)
    wanted = brute_force(q, k, v, links(everything, **about))
    for one, other, right in zip(found, dense, wanted):
        near(one, right)
        near(other, right)


def test_dense_attention_is_that_of_torch(way):
    q, k, v = draw(2, 4, 77, 64), draw(2, 2, 77, 64, seed=1), draw(2, 2, 77, 64, seed=2)
    found, _ = attention_with_lse(q, k, v)
    near(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounded_weights_err_by_no_more_than_their_rounding(way, shape):
    """Weights and outputs are each rounded to eight bits, by at most 2⁻⁹; products and sums are exact beside that."""
    q, k, v, mask, about = inputs(shape, torch.bfloat16)
    found, lse = block_sparse_attention(q, k, v, mask, **about, return_lse=True)
    wanted, wanted_lse, _ = brute_force(q, k, v, links(mask, **about))
    assert (found.double() - wanted).abs().max() <= 2**-8 * (1 + 1e-3) * v.double().abs().max()
    near(lse, wanted_lse, 4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_are_zero(way, dtype):
    q, k, v = (draw(1, 1, 80, 16, seed=seed, dtype=dtype) for seed in range(3))
    blocks = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    blocks[:, :, 1] = False
    found, lse = block_sparse_attention(q, k, v, BlockMask(blocks, 80, 80, (32, 32)), return_lse=True)
    assert not found[:, :, 32:64].any()
    assert (lse[:, :, 32:64] == float("-inf")).all()
    assert found[:, :, :32].all()
    assert lse[:, :, 64:].isfinite().all()
    nothing = torch.zeros(1, 80, dtype=torch.bool)
    found, lse = attention_with_lse(q, k, v, key_mask=nothing)
    assert not found.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_may_hold_anything(way, dtype):
    q, k, v = (draw(1, 1, 20, 16, seed=seed, dtype=dtype) for seed in range(3))
    real = torch.arange(20)[None] < 13
    wanted, _ = attention_with_lse(q, k, v, causal=False, key_mask=real)
    k[:, :, 13:] = v[:, :, 13:] = float("nan")
    found, _ = attention_with_lse(q, k, v, causal=False, key_mask=real)
    near(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_are_not_read_may_hold_anything(way, dtype):
    if way == "reference":
        pytest.skip("torch multiplies weights of 0, too")
    q, k, v = (draw(1, 1, 64, 40, seed=seed, dtype=dtype) for seed in range(3))
    for column in range(4):  # a block on either side of the one that is left out is read
        blocks = torch.arange(4)[None, None, None].expand(1, 1, 4, 4) != column
        mask = BlockMask(blocks, 64, 64, (16, 16), causal=False)
        wanted = block_sparse_attention(q, k, v, mask)
        broken_k, broken_v = k.clone(), v.clone()
        broken_k[:, :, 16 * column : 16 * column + 16] = broken_v[:, :, 16 * column : 16 * column + 16] = float("nan")
        assert torch.equal(block_sparse_attention(q, broken_k, broken_v, mask), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_the_rows_that_see_it_and_no_others(way, dtype):
    q, k, v = (draw(1, 2, 96, 16, seed=seed, dtype=dtype) for seed in range(3))
    k[0, 0, 40, 3] = float("nan")
    found, lse = block_sparse_attention(q, k, v, BlockMask.full(96, block_size=32), return_lse=True)
    assert found[0, 0, 40:].isnan().all()
    assert lse[0, 0, 40:].isnan().all()
    assert found[0, 0, :40].isfinite().all()
    assert found[0, 1].isfinite().all()
    q[0, 1, 5] = float("nan")
    found, _ = attention_with_lse(q, k, v)
    assert found[0, 1, 5].isnan().all()
    assert found[0, 1, 6].isfinite().all()


def test_scores_far_apart_neither_overflow_nor_vanish(way):
    q, k, v = draw(1, 1, 40, 8) * 60, draw(1, 1, 40, 8, seed=1) * 60, draw(1, 1, 40, 8, seed=2)
    found, lse = attention_with_lse(q, k, v)
    wanted, wanted_lse, _ = brute_force(q, k, v, links(BlockMask.full(40)))
    near(found, wanted, 1e-3)
    near(lse, wanted_lse, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_taken_as_given(way, dtype):
    q, k, v = (draw(1, 1, 30, 16, seed=seed, dtype=dtype) for seed in range(3))
    for scale in (0.7, -1.0, 0.0):
        found, lse = attention_with_lse(q, k, v, scale=scale)
        wanted, wanted_lse, _ = brute_force(q, k, v, links(BlockMask.full(30)), scale)
        near(found, wanted, 1e-5 if dtype == torch.float32 else 1e-2)
        near(lse, wanted_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(way, dtype):
    q, k, v, mask, about = inputs(SHAPES[3], dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, lse = block_sparse_attention(q, k, v, mask, **about, return_lse=True)
            real = about["key_mask"]
            found.append((out, lse, block_mass(q, k, lse, 64), antidiagonal_mass(q, k, 8, 64, key_mask=real)))
    finally:
        torch.set_num_threads(before)
    if way != "reference":  # where torch divides its own products differently
        assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("shape", [s for s in SHAPES if not (s[9] and s[10])], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mass_of_blocks_is_that_of_all_weights(way, shape, dtype):
    q, k, v, mask, about = inputs(shape, dtype)
    _, lse = attention_with_lse(q, k, v, causal=mask.causal, **about)
    found = block_mass(q, k, lse, mask.block_size, causal=mask.causal, **about)
    everything = BlockMask.full(mask.query_length, mask.key_length, mask.block_size, mask.causal)
    weights = brute_force(q, k, v, links(everything, **about))[2]
    near(found, attention_reference.block_sums(weights, mask.block_size), 1e-4)


def antidiagonals(q: Tensor, k: Tensor, stride: int, block: int, causal: bool, scale: float) -> Tensor:
    """Antidiagonal scoring number by number."""
    queries, keys = q.shape[2], k.shape[2]
    rows, columns = -(-queries // stride), -(-keys // stride)
    scores = q.double() @ k.double().mT * scale
    means = torch.full((*q.shape[:2], rows, columns), float("-inf"), dtype=torch.float64)
    for i, j in itertools.product(range(rows), range(columns)):
        if causal and j * stride > keys - queries + i * stride + stride - 1:
            continue
        means[:, :, i, j] = 0.0
        for s in range(stride):
            query, key = i * stride + stride - 1 - s, j * stride + s
            if query < queries and key < keys:
                means[:, :, i, j] += scores[:, :, query, key] / stride
    return attention_reference.block_sums(means.softmax(-1), (block // stride, block // stride))


@pytest.mark.parametrize(
    ("queries", "keys", "size", "stride", "block", "causal"),
    [
        (64, 64, 16, 8, 16, True),
        (50, 50, 33, 4, 16, True),
        (21, 45, 8, 4, 8, True),
        (40, 30, 8, 8, 8, False),
        (90, 130, 7, 1, 80, True),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_antidiagonals_rank_blocks(way, queries, keys, size, stride, block, causal, dtype):
    q, k = draw(2, 4, queries, size, dtype=dtype), draw(2, 2, keys, size, seed=1, dtype=dtype)
    found = antidiagonal_mass(q, k, stride, block, causal=causal)
    near(found, antidiagonals(q, k.repeat_interleave(2, 1), stride, block, causal, size**-0.5), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_antidiagonals_leave_masked_keys_out(way, dtype):
    q, k = draw(1, 1, 64, 16, dtype=dtype), draw(1, 1, 64, 16, seed=1, dtype=dtype)
    real = torch.arange(64)[None] >= 32
    found = antidiagonal_mass(q, k, 8, 16, causal=False, key_mask=real)
    assert not found[..., :2].any()
    near(found[..., 2:], antidiagonals(q, k[:, :, 32:], 8, 16, False, 0.25), 1e-4)


def test_a_slash_is_seen_by_antidiagonals():
    """A head that always looks 41 tokens back; a slash of even distance passes between the cells of antidiagonals."""
    n, back = 256, 41
    q = torch.eye(n)[(torch.arange(n) - back).clamp(min=0)][None, None] * 30
    found = antidiagonal_mass(q, torch.eye(n)[None, None], 8, 16, scale=1.0)
    _, lse = attention_with_lse(q, torch.eye(n)[None, None], q, scale=1.0)
    best = block_mass(q, torch.eye(n)[None, None], lse, 16, scale=1.0)
    assert (found[0, 0, 4:].topk(2).indices.sort().values == best[0, 0, 4:].topk(2).indices.sort().values).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": draw(1, 3, 64, 16)}, "multiple of those of k"),
        ({"q": draw(1, 2, 64, 8)}, "head size must be equal"),
        ({"q": draw(1, 2, 64, 0), "k": draw(1, 2, 64, 0)}, "size at least 1"),
        ({"q": draw(2, 64, 16)}, "must be \\(batch, heads, tokens, head size\\)"),
        ({"k": draw(1, 2, 64, 16).int()}, "float32"),
        ({"v": draw(1, 2, 60, 16)}, "all but the head size"),
        ({"v": draw(1, 2, 64, 16).double()}, "different dtypes"),
        ({"mask": BlockMask.full(32)}, "select blocks again"),
        ({"mask": BlockMask(torch.ones(3, 1, 1, 1, dtype=torch.bool), 64, 64)}, "a batch of 3"),
        ({"key_mask": torch.ones(1, 63, dtype=torch.bool)}, "True for real keys"),
        ({"key_mask": torch.ones(1, 64)}, "True for real keys"),
        ({"window": 0}, "at least 1 token"),
        ({"scale": float("nan")}, "finite number"),
    ],
)
def test_bad_input_is_refused_with_its_reason(change, text):
    x = draw(1, 2, 64, 16)
    given = {"q": x, "k": x, "v": x, "mask": BlockMask.full(64), **change}
    with pytest.raises(ConfigurationError, match=text) as caught:
        block_sparse_attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("mask"), **given)
    assert "\n" not in str(caught.value)


def test_bad_parameters_of_statistics_are_refused():
    x = draw(1, 2, 64, 16)
    with pytest.raises(ConfigurationError, match="lse is"):
        block_mass(x, x, draw(1, 2, 63), 16)
    with pytest.raises(ConfigurationError, match="block_size is 0"):
        block_mass(x, x, draw(1, 2, 64), 0)
    with pytest.raises(ConfigurationError, match="must divide the block size"):
        antidiagonal_mass(x, x, 6, 16)
    with pytest.raises(ConfigurationError, match="at least as many keys"):
        attention.attention_with_lse(x, x[:, :, :3], x[:, :, :3])
