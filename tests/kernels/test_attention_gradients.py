"""Gradients of attention over blocks, and its operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.core.block_mask import BlockMask
from gossamer.kernels import attention_operators
from gossamer.kernels.attention import (
    antidiagonal_mass,
    attention_with_lse,
    block_mass,
    block_sparse_attention,
    gather_attention,
    label_attention,
    label_topk,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(causal: bool, queries: int, keys: int, size: int, block: tuple[int, int], dtype: torch.dtype) -> tuple:
    q, k, v = draw(2, 4, queries, size), draw(2, 2, keys, size, seed=1), draw(2, 2, keys, size + 3, seed=2)
    grid = -(-queries // block[0]), -(-keys // block[1])
    blocks = torch.rand(2, 4, *grid, generator=torch.Generator().manual_seed(3)) < 0.6
    real = torch.rand(2, keys, generator=torch.Generator().manual_seed(4)) < 0.8
    tensors = [x.to(dtype).requires_grad_(True) for x in (q, k, v)]
    return tensors, BlockMask(blocks, queries, keys, block, causal), real


def dense_gradients(tensors: list[Tensor], links: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of masked dense attention in float64, by those of its outputs and log-sum-exps."""
    wide = [x.detach().double().requires_grad_(True) for x in tensors]
    q, k, v = wide[0], *(x.repeat_interleave(2, 1) for x in wide[1:])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~links, -1e30)
    there = links.any(-1)
    out = torch.where(there[..., None], scores.softmax(-1), 0.0) @ v
    total = torch.where(there, scores.logsumexp(-1), 0.0)
    return torch.autograd.grad([out, total], wide, [grads[0].double(), grads[1].double()])


CASES = [
    (True, 70, 90, 16, (16, 16), None),
    (True, 130, 200, 80, (64, 64), 50),
    (False, 90, 60, 33, (20, 30), None),
    (True, 128, 128, 128, (128, 32), None),
]


@pytest.mark.parametrize(("causal", "queries", "keys", "size", "block", "window"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_masked_dense_attention(way, causal, queries, keys, size, block, window, dtype):
    tensors, mask, real = case(causal, queries, keys, size, block, dtype)
    out, lse = block_sparse_attention(*tensors, mask, window=window, key_mask=real, return_lse=True)
    grads = draw(*out.shape, seed=5, dtype=dtype), draw(*lse.shape, seed=6)
    seen = torch.where(lse == float("-inf"), 0.0, lse)
    found = torch.autograd.grad([out, seen], tensors, [grads[0], grads[1]])

    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    links = mask.to_dense() & real[:, None, None] & (distance.abs() < (window or 10**6))
    for one, right in zip(found, dense_gradients(tensors, links, grads)):
        assert one.dtype == dtype
        error = (one.double() - right).abs().max() / right.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_gradients_are_the_slopes():
    tensors, mask, real = case(True, 7, 11, 3, (4, 4), torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q, k, v, mask, key_mask=real, window=6, return_lse=True)
        return out, torch.where(lse == float("-inf"), 0.0, lse)

    assert torch.autograd.gradcheck(attend, tensors)


def test_masked_keys_get_no_gradient(way):
    q, k, v = (draw(1, 1, 40, 16, seed=i).requires_grad_(True) for i in range(3))
    real = torch.arange(40)[None] < 25
    with torch.no_grad():
        k[:, :, 25:] = v[:, :, 25:] = float("nan")
    attention_with_lse(q, k, v, causal=False, key_mask=real)[0].sum().backward()
    assert not k.grad[:, :, 25:].any()
    assert not v.grad[:, :, 25:].any()
    assert q.grad.isfinite().all()
    assert k.grad[:, :, :25].any()
    assert v.grad[:, :, :25].all()


def test_gradients_do_not_depend_on_the_number_of_threads(way):
    if way == "reference":
        pytest.skip("torch divides its own products differently")
    tensors, mask, real = case(True, 130, 200, 80, (64, 64), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = block_sparse_attention(*tensors, mask, key_mask=real)
            found.append(torch.autograd.grad(out.sum(), tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found))


def listed(lists: int, dtype: torch.dtype) -> tuple:
    """Tensors of four heads that share two, and for each list the keys that are meant, with a list of none."""
    sizes = ((2, 4, 1, 16), (2, 2, 60, 16), (2, 2, 60, 19))
    tensors = [draw(*size, seed=i, dtype=dtype).requires_grad_(True) for i, size in enumerate(sizes)]
    indices = torch.rand(2, lists, 60, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., :25]
    counts = torch.arange(2 * lists).view(2, lists) * 5 % 26
    meant = torch.arange(25) < counts[..., None]
    links = torch.zeros(2, lists, 60, dtype=torch.bool).scatter_(-1, indices, meant)
    return tensors, indices, counts, links.repeat_interleave(4 // lists, 1)[:, :, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lists", [2, 4])
def test_listed_tokens_have_the_gradients_of_masked_dense_attention(way, lists, dtype):
    tensors, indices, counts, links = listed(lists, dtype)
    out, lse = gather_attention(*tensors, indices, counts, return_lse=True)
    with torch.no_grad():
        plain, plain_lse = gather_attention(*tensors, indices, counts, return_lse=True)
    torch.testing.assert_close(out.detach(), plain)
    torch.testing.assert_close(lse.detach(), plain_lse)
    grads = draw(*out.shape, seed=5, dtype=dtype), draw(*lse.shape, seed=6)
    found = torch.autograd.grad([out, torch.where(lse == float("-inf"), 0.0, lse)], tensors, list(grads))
    for one, right in zip(found, dense_gradients(tensors, links, grads)):
        assert one.dtype == dtype
        assert (one.double() - right).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2) * right.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_chosen_by_labels_have_the_gradients_of_masked_dense_attention(way, compiled):
    tensors = listed(2, torch.float32)[0]
    q, k, v = tensors
    channels = torch.arange(4).repeat(2, 1)
    labels = k.detach()[:, :, :-1, :4].contiguous()
    given = (q, k, v, channels, labels, 9)
    chosen = label_topk(q.detach()[:, :, 0, :4], labels, 9)
    links = torch.zeros(2, 2, 60, dtype=torch.bool).scatter_(-1, chosen, True)
    links[..., -1] = True
    attend = torch.compile(label_attention, backend="aot_eager") if compiled else label_attention
    out = attend(*given, newest=True)
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), label_attention(*given, newest=True))
    grads = draw(*out.shape, seed=5), torch.zeros(2, 4, 1)
    found = torch.autograd.grad(out, tensors, grads[0])
    for one, right in zip(found, dense_gradients(tensors, links.repeat_interleave(2, 1)[:, :, None], grads)):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-5)


def test_operators_agree_with_their_fake_versions():
    tensors, mask, real = case(True, 40, 50, 16, (16, 16), torch.float32)
    arguments = (*tensors, mask.blocks, real, list(mask.block_size), True, None, 0.25)
    torch.library.opcheck(attention_operators.block_attention, arguments)


def test_operators_of_statistics_and_tokens_agree_with_their_fake_versions():
    q, k, lse, real = draw(1, 4, 40, 8), draw(1, 2, 50, 8), draw(1, 4, 40).abs() + 9, torch.ones(1, 50).bool()
    torch.library.opcheck(attention_operators.block_mass, (q, k, lse, [16, 16], True, None, real, 0.3))
    torch.library.opcheck(attention_operators.antidiagonal_mass, (q, k, 4, 16, True, 0.3, real))
    indices = torch.arange(20).expand(1, 2, 20).contiguous()
    torch.library.opcheck(attention_operators.gather_attention, (q, k, k.clone(), indices, None, 0.3))
    torch.library.opcheck(attention_operators.label_topk, (q[:, :, :1], k, 7, real, "sum"))
    channels = torch.arange(4).repeat(k.shape[1], 1)
    given = (q[:, :, :1], k, k.clone(), channels, k[:, :, :-1, :4].contiguous(), 7, True, None, "sum", 0.3)
    torch.library.opcheck(attention_operators.label_attention, given)


def test_compiled_functions_give_what_the_others_give():
    q, k, v = draw(1, 4, 40, 16), draw(1, 2, 50, 16), draw(1, 2, 50, 16)

    def decode(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        chosen = label_topk(q[:, :, -1, :4], k[..., :4], 20)
        _, lse = attention_with_lse(q, k, v)
        return gather_attention(q[:, :, -1:], k, v, chosen), block_mass(q, k, lse, 16), antidiagonal_mass(q, k, 4, 16)

    found = torch.compile(decode, backend="aot_eager", fullgraph=True)(q, k, v)
    for one, other in zip(found, decode(q, k, v)):
        torch.testing.assert_close(one, other)


def test_compiled_models_see_attention():
    tensors, mask, _ = case(True, 40, 50, 16, (16, 16), torch.float32)
    blocks = mask.blocks

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.gossamer.block_attention(q, k, v, blocks, None, [16, 16], True, None, 0.25)[0] * 2

    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors)
    wanted = attend(*tensors)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(x.sum(), tensors) for x in (found, wanted)]
    assert all(torch.allclose(one, other) for one, other in zip(*grads))
