"""Attention over listed tokens, and their choice by labels or pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import (
    attention_with_lse,
    gather_attention,
    label_attention,
    label_topk,
    page_scores,
)
from gossamer.kernels.attention_labels import Labels, make_labels


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("batch", "heads", "shared", "queries", "keys", "size", "value_size", "tokens", "per_head"),
    [
        (1, 1, 1, 1, 64, 64, 64, 10, True),
        (2, 8, 2, 1, 300, 80, 33, 70, False),
        (2, 8, 2, 3, 300, 33, 128, 64, True),
        (1, 4, 2, 20, 500, 128, 128, 300, False),
        (1, 2, 2, 1, 3000, 96, 256, 2049, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_listed_tokens_are_attended_to_exactly(
    way, batch, heads, shared, queries, keys, size, value_size, tokens, per_head, dtype
):
    q, k = draw(batch, heads, queries, size, dtype=dtype), draw(batch, shared, keys, size, seed=1, dtype=dtype)
    v = draw(batch, keys, shared, value_size, seed=2, dtype=dtype).transpose(1, 2)
    generator = torch.Generator().manual_seed(3)
    lists = heads if per_head else shared
    indices = torch.randint(keys, (batch, lists, tokens), generator=generator)
    counts = torch.randint(tokens + 1, (batch, lists), generator=generator)
    counts[0, 0] = 0
    for some in (None, counts):
        found, lse = gather_attention(q, k, v, indices.int(), some, return_lse=True)
        for b in range(batch):
            for h in range(heads):
                row = h * lists // heads
                places = indices[b, row, : tokens if some is None else int(some[b, row])]
                key, value = (x[b, h * shared // heads, places].double() for x in (k, v))
                scores = q[b, h].double() @ key.mT * size**-0.5
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                wanted = scores.softmax(-1) @ value
                torch.testing.assert_close(found[b, h].double(), wanted, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(lse[b, h].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(gather_attention(q, k, v, indices), gather_attention(q, k, v, indices.int()))


def test_all_tokens_are_dense_attention(way):
    q, k, v = draw(1, 4, 1, 64), draw(1, 2, 200, 64, seed=1), draw(1, 2, 200, 64, seed=2)
    found = gather_attention(q, k, v, torch.arange(200).expand(1, 2, 200))
    torch.testing.assert_close(found, attention_with_lse(q, k, v)[0], rtol=1e-5, atol=1e-5)


def test_tokens_that_are_not_listed_are_not_read(way):
    q, k, v = draw(1, 1, 1, 16), draw(1, 1, 50, 16, seed=1), draw(1, 1, 50, 16, seed=2)
    indices = torch.arange(0, 50, 2)[None, None]
    wanted = gather_attention(q, k, v, indices)
    k[:, :, 1::2] = v[:, :, 1::2] = float("nan")
    assert torch.equal(gather_attention(q, k, v, indices), wanted)
    k[:, :, 4] = float("nan")
    assert gather_attention(q, k, v, indices).isnan().all()


def best(scores: list[float], count: int) -> list[int]:
    """Of equal scores the lower index."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("keys", "labels", "count"), [(100, 4, 10), (333, 8, 333), (5000, 16, 300), (70, 5, 1), (99, 3, 50), (40, 8, 99)]
)
def test_labels_choose_the_highest_scores_and_of_equal_ones_the_lower(way, keys, labels, count, dtype):
    q, k = draw(2, 4, labels, dtype=dtype).round(), draw(2, 2, keys, labels, seed=1, dtype=dtype).round()  # many ties
    real = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) < 0.7
    for pooling in ("sum", "max", None):
        for mask in (None, real):
            found = label_topk(q, k, count, key_mask=mask, pooling=pooling)
            assert found.shape == (2, 4 if pooling is None else 2, min(count, keys))
            assert found.dtype == torch.int64
            for b in range(2):
                for h in range(found.shape[1]):
                    heads = [h] if pooling is None else [2 * h, 2 * h + 1]
                    shared = h // 2 if pooling is None else h
                    each = torch.stack([k[b, shared].float() @ q[b, i].float() for i in heads])
                    scores = each.amax(0) if pooling == "max" else each.sum(0)
                    if mask is not None:
                        scores = scores.masked_fill(~mask[b], float("-inf"))
                    assert found[b, h].tolist() == best(scores.tolist(), count)


@pytest.mark.parametrize(
    "kind", ["deceptive", "equal", "two values", "falling", "rising", "infinite", "zeros of both signs"]
)
@pytest.mark.parametrize("count", [1, 60, 700, 4000, 8191])
def test_a_sample_that_deceives_changes_nothing(way, kind, count):
    keys = 8192  # of which every eighth is looked at first
    place = torch.arange(keys, dtype=torch.float32)
    noise = draw(keys)
    scores = {
        "deceptive": torch.where(place % 8 == 0, noise.abs() + 10, noise),
        "equal": torch.ones(keys),
        "two values": torch.where(place % 3 == 0, 2.0, -1.0),
        "falling": -place,
        "rising": place - keys / 2,
        "infinite": noise.masked_fill(noise > 1, float("inf")).masked_fill(noise < -1, float("-inf")),
        "zeros of both signs": torch.where(place % 2 == 0, 0.0, -0.0),
    }[kind]
    q, k = torch.ones(1, 1, 1), scores[None, None, :, None].contiguous()
    assert label_topk(q, k, count)[0, 0].tolist() == best(scores.tolist(), count)


@pytest.mark.parametrize("keys", [60, 6000])
def test_a_nan_label_is_chosen(way, keys):
    q, k = draw(1, 1, 8), draw(1, 1, keys, 8, seed=1)
    k[0, 0, 37, 2] = float("nan")
    for pooling in ("sum", "max", None):
        assert 37 in label_topk(q, k, 3, pooling=pooling)[0, 0].tolist()


def draw_rounded(heads: int, keys: int, channels: int, bits: int, dtype: torch.dtype) -> Labels:
    """Labels of two samples whose scores of whole queries are exact, and some tokens behind them that do not count."""
    generator = torch.Generator().manual_seed(5)
    width = channels if bits == 8 else (channels + 1) // 2
    codes = torch.randint(256, (2, heads, keys + 4, width), generator=generator).to(torch.uint8)
    low, step = (torch.randint(-2, 3, (2, heads, keys + 4, 1), generator=generator).to(dtype) for _ in range(2))
    return Labels(codes, low, step, channels, bits).first(keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("keys", "labels", "count"),
    [
        (1, 1, 1),
        (15, 2, 4),
        (16, 4, 5),
        (19, 8, 6),
        (35, 8, 30),
        (5000, 8, 300),
        (333, 5, 20),
        (90, 70, 9),
        (64, 16, 64),
    ],
)
def test_rounded_labels_choose_by_what_they_stand_for(way, keys, labels, count, bits, dtype):
    q, rounded = draw(2, 4, labels, dtype=dtype).round(), draw_rounded(2, keys, labels, bits, dtype)
    k, real = rounded.values(torch.float32), torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) < 0.7
    for pooling in ("sum", "max", None):
        for mask in (None, real):
            about = {"key_mask": mask, "pooling": pooling}
            assert label_topk(q, rounded, count, **about).equal(label_topk(q.float(), k, count, **about))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_rounded_labels_choose_and_read_in_one_pass(way, bits):
    q, k, v = draw(2, 4, 1, 64), draw(2, 2, 150, 64, seed=1), draw(2, 2, 150, 64, seed=2)
    channels = torch.stack([torch.arange(6), torch.arange(8, 14)])
    of_keys = k.gather(-1, channels[None, :, None].expand(2, -1, 150, -1))
    labels = make_labels(of_keys, bits).first(149)
    of_queries = q.gather(-1, channels.repeat_interleave(2, 0)[None, :, None].expand(2, -1, -1, -1))[:, :, 0]
    chosen = label_topk(of_queries.to(labels.values().dtype), labels, 20)
    wanted = gather_attention(q, k, v, torch.cat([chosen, torch.full((2, 2, 1), 149)], -1))
    found = label_attention(q, k, v, channels, labels, 20, newest=True)
    assert found.equal(wanted)
    compiled = torch.compile(label_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, channels, labels, 20, newest=True), found)
    with pytest.raises(ConfigurationError, match=r"k_labels \(2, 2, 148, 6\)"):
        label_attention(q, k, v, channels, labels.first(148), 20, newest=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "shared", "keys", "size", "value_size", "labels", "count", "label_heads"),
    [
        (1, 8, 8, 1500, 128, 128, 8, 600, 8),
        (2, 4, 2, 300, 33, 70, 5, 40, 2),
        (1, 4, 2, 90, 64, 64, 4, 200, 4),  # labels of every head; more tokens than there are
        (1, 1, 1, 700, 80, 16, 16, 1, 1),  # fewer lists than threads
    ],
)
def test_choosing_and_reading_in_one_pass_is_both_after_each_other(
    way, batch, heads, shared, keys, size, value_size, labels, count, label_heads, dtype
):
    q, k = draw(batch, heads, 1, size, dtype=dtype), draw(batch, shared, keys, size, seed=1, dtype=dtype)
    v = draw(batch, shared, keys, value_size, seed=2, dtype=dtype)
    channels = torch.rand(label_heads, size, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :labels]
    by_head = channels.repeat_interleave(heads // label_heads, 0)[None, :, None].expand(batch, -1, -1, -1)
    real = torch.rand(batch, keys, generator=torch.Generator().manual_seed(0)) < 0.7
    for newest in (False, True):
        k_labels = draw(batch, label_heads, keys - newest, labels, seed=4).bfloat16()
        q_labels = q.gather(-1, by_head)[:, :, 0].bfloat16()
        for mask in (None, real[:, : keys - newest].contiguous()):
            for pooling in ("sum", "max", None):
                about = {"key_mask": mask, "pooling": pooling}
                chosen = label_topk(q_labels, k_labels, count, **about)
                if newest:
                    chosen = torch.cat([chosen, torch.full((*chosen.shape[:2], 1), keys - 1)], -1)
                wanted = gather_attention(q, k, v, chosen, scale=0.3)
                found = label_attention(q, k, v, channels, k_labels, count, newest=newest, scale=0.3, **about)
                assert torch.equal(found, wanted)


def test_the_newest_token_alone(way):
    q, k, v = draw(1, 2, 1, 16), draw(1, 1, 9, 16, seed=1), draw(1, 1, 9, 16, seed=2)
    found = label_attention(q, k, v, torch.arange(4)[None], k[:, :, :8, :4], 0, newest=True)
    torch.testing.assert_close(found, v[:, :, 8:].expand(1, 2, 1, 16))


@pytest.mark.parametrize("channel", [-1, 16])
def test_a_channel_that_does_not_exist_is_refused(way, channel):
    q, k = draw(1, 2, 1, 16), draw(1, 2, 9, 16, seed=1)
    channels = torch.tensor([[0, 3], [channel, 2]])
    with pytest.raises(ConfigurationError, match="a head has channels 0 … 15"):
        label_attention(q, k, k, channels, k[..., :2], 3)


def test_labels_that_do_not_fit_are_refused():
    q, k = draw(1, 4, 1, 16), draw(1, 2, 9, 16, seed=1)
    labels, channels = k[..., :4], torch.arange(4).repeat(2, 1)
    with pytest.raises(ConfigurationError, match="k_labels"):
        label_attention(q, k, k, channels, labels, 3, newest=True)  # the newest has none
    with pytest.raises(ConfigurationError, match="channels is"):
        label_attention(q, k, k, channels.int(), labels, 3)
    with pytest.raises(ConfigurationError, match="at least 1 key"):
        label_attention(q, k, k, channels, labels, 0)
    with pytest.raises(ConfigurationError, match="must be floating-point"):
        label_attention(q, k, k, channels, labels.int(), 3)
    with pytest.raises(ConfigurationError, match="key_mask"):
        label_attention(q, k, k, channels, labels, 3, key_mask=torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="pooling"):
        label_attention(q, k, k, channels, labels, 3, pooling="mean")


def test_choice_and_attention_do_not_depend_on_threads(way):
    q, k = draw(1, 4, 1, 64), draw(1, 2, 3000, 64, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            chosen = label_topk(q[:, :, 0, :4], k[..., :4], 1500)
            together = label_attention(q, k, k, torch.arange(4).repeat(2, 1), k[..., :4], 1500)
            found.append((chosen, gather_attention(q, k, k, chosen), together))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    if way != "reference":  # where torch divides its own products differently
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][2], found[1][2])


def test_no_key_of_a_page_beats_its_score():
    q, k = draw(2, 4, 3, 16), draw(2, 2, 64, 16, seed=1)
    pages = k.unflatten(2, (8, 8))
    found = page_scores(q, pages.amin(3), pages.amax(3))
    bound = torch.maximum(
        q[:, :, :, None] * pages.amin(3).repeat_interleave(2, 1)[:, :, None],
        q[:, :, :, None] * pages.amax(3).repeat_interleave(2, 1)[:, :, None],
    ).sum(-1)
    torch.testing.assert_close(found, bound)
    every = (q @ k.repeat_interleave(2, 1).mT).unflatten(-1, (8, 8)).amax(-1)
    assert (every <= found + 1e-4).all()


@pytest.mark.parametrize(
    ("indices", "counts", "text"),
    [
        (torch.zeros(1, 3, 5, dtype=torch.int64), None, "2 or 1"),
        (torch.zeros(1, 1, 5), None, "int32 or int64"),
        (torch.full((1, 1, 5), 50), None, "0 … 49"),
        (torch.full((1, 1, 5), -1), None, "from -1"),
        (torch.zeros(1, 1, 5, dtype=torch.int64), torch.tensor([[6]]), "0 … 5"),
        (torch.zeros(1, 1, 5, dtype=torch.int64), torch.tensor([6]), "counts is"),
    ],
)
def test_bad_lists_are_refused(indices, counts, text):
    q, k = draw(1, 2, 1, 16), draw(1, 1, 50, 16)
    with pytest.raises(ConfigurationError, match=text):
        gather_attention(q, k, k, indices, counts)


def test_bad_labels_are_refused():
    q, k = draw(1, 2, 4), draw(1, 1, 50, 4)
    with pytest.raises(ConfigurationError, match="count is 0"):
        label_topk(q, k, 0)
    with pytest.raises(ConfigurationError, match="pooling is 'mean'"):
        label_topk(q, k, 3, pooling="mean")
    with pytest.raises(ConfigurationError, match="batch and head size"):
        label_topk(q, k[..., :3], 3)
