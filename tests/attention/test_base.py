"""What all sparse attention methods share: torch's signature, masks, counting, autocast."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gossamer.attention.ada_snap_kv import AdaSnapKV
from gossamer.attention.block_sparse import BlockSparse
from gossamer.attention.channel_order import ChannelOrder
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.attention.flex_prefill import FlexPrefill
from gossamer.attention.quest import Quest
from gossamer.attention.s2_attention import S2Attention
from gossamer.attention.snap_kv import SnapKV
from gossamer.attention.thresholds import HeadThresholds
from gossamer.attention.vertical_slash import VerticalSlash
from gossamer.attention.xattention import XAttention
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.methods import create, methods

PREFILL = {
    "xattention": lambda: XAttention(block_size=16, stride=4, threshold=0.7),
    "s2": lambda: S2Attention(block_size=8, local_blocks=1, vert_stride=4, dense_layers=()),
    "vertical-slash": lambda: VerticalSlash(vertical_size=8, slash_size=8, block_size=16, local=8),
    "flex-prefill": lambda: FlexPrefill(alpha=0.5, min_budget=4, block_size=16, local=4),
    "block-sparse": lambda: BlockSparse(chunk_size=8, top_chunks=3),
}
DECODING = {
    "quest": lambda: Quest(token_budget=8, page_size=4),
    "snap-kv": lambda: SnapKV(token_capacity=20, approximation=8, local_window=8),
    "ada-snap-kv": lambda: AdaSnapKV(token_capacity=20, approximation=8, local_window=8),
    "double-sparsity": lambda: DoubleSparsity(tokens=8, channels=4, dense_layers=()),
}


def draw(queries=64, keys=64, batch=2, heads=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, size, generator=generator) for length in (queries, keys, keys)]


def ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------------------- as a function


def test_the_signature_is_that_of_torch():
    method = XAttention(threshold=1.0)
    taken = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in taken[3:]] == [
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    q, k, v = draw()
    for args, options in (
        ((), {}),
        ((None, 0.0, True), {}),
        ((), {"is_causal": True, "scale": 0.3}),
        ((), {"attn_mask": None, "dropout_p": 0.0}),
    ):
        torch.testing.assert_close(
            method(q, k, v, *args, **options), scaled_dot_product_attention(q, k, v, *args, **options)
        )
    grouped = method(q, k[:, :2], v[:, :2], enable_gqa=True)
    torch.testing.assert_close(grouped, scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True))


CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril()
PADDING = (torch.arange(64) >= torch.tensor([[0], [11]]))[:, None, None, :]


@pytest.mark.parametrize(
    "mask",
    [CAUSAL, CAUSAL[None, None], PADDING, CAUSAL & PADDING, PADDING.expand(-1, -1, 64, -1), PADDING[:1]],
    ids=["causal", "causal 4d", "padding", "both", "padding of all rows", "one for the batch"],
)
@pytest.mark.parametrize("added", [False, True])
def test_masks_of_causality_and_padding_are_followed(mask, added):
    given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if added else mask
    q, k, v = draw()
    links = mask.expand(2, 1, 64, 64) if mask.dim() == 4 else mask.expand(2, 1, -1, -1)
    expected = torch.where(links.any(-1, keepdim=True), scaled_dot_product_attention(q, k, v, mask), 0)
    for method in (XAttention(threshold=1.0), XAttention(threshold=0.999999, block_size=16, stride=4)):
        torch.testing.assert_close(method(q, k, v, given), expected, rtol=1e-3, atol=1e-3)


def test_a_single_query_is_a_step_of_decoding():
    q, k, v = draw(queries=1)
    method = Quest(token_budget=8, page_size=4)
    found = method(q, k, v)
    assert not torch.allclose(found, scaled_dot_product_attention(q, k, v), atol=1e-3)
    torch.testing.assert_close(found, method(q, k, v, is_causal=True))
    real = torch.arange(64) >= torch.tensor([[0], [11]])
    torch.testing.assert_close(method(q, k, v, real[:, None, None]), method(q, k, v, key_mask=real))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
        ({"attn_mask": CAUSAL.tril(-1) | CAUSAL.roll(5, 0)}, "more than causality and padding"),
        ({"attn_mask": CAUSAL.expand(2, 4, 64, 64)}, "the same for all heads"),
        ({"attn_mask": torch.where(CAUSAL, -0.5, float("-inf"))}, "more than causality and padding"),
        ({"attn_mask": CAUSAL[:, :60]}, r"attn_mask is \(64, 60\)"),
        ({"attn_mask": CAUSAL.expand(3, 1, 64, 64)}, r"broadcastable to \(batch, 1, queries, keys\), \(2, 1, 64, 64\)"),
        ({"attn_mask": CAUSAL, "is_causal": True}, "leave is_causal"),
        ({"attn_mask": CAUSAL, "key_mask": torch.ones(2, 64, dtype=torch.bool)}, "leave is_causal, key_mask"),
    ],
)
def test_what_a_method_cannot_follow_is_refused_by_name(options, said):
    with pytest.raises(ConfigurationError, match=said):
        XAttention()(*draw(), **options)


def test_a_function_of_no_layer_in_particular_is_never_dense():
    for q, k, v, method in (
        (*draw(), S2Attention(block_size=8, local_blocks=1, vert_stride=4, dense_period=1)),
        (*draw(), XAttention(block_size=16, stride=4, threshold=0.5, dense_layers=(0, 1))),
        (*draw(), XAttention(block_size=16, stride=4, threshold=0.5, dense_layers=(0, 1), scoring="random")),
        (*draw(queries=1), Quest(token_budget=8, page_size=4, dense_layers=(0,))),
    ):
        dense = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        assert not torch.allclose(method(q, k, v, is_causal=True), dense, atol=1e-3)
        torch.testing.assert_close(method(q, k, v, is_causal=True, layer=0), dense)


def test_methods_calibrated_by_layers_ask_which_layer_a_call_is():
    q, k, v = draw(queries=1)
    with pytest.raises(CalibrationError, match="has not seen data yet"):
        DoubleSparsity(tokens=4)(q, k, v)
    order = ChannelOrder({layer: torch.arange(16).repeat(4, 1) for layer in (0, 2)})
    by_order = DoubleSparsity(tokens=4, channel_order=order)
    by_heads = XAttention(block_size=16, stride=4, threshold=HeadThresholds({2: torch.full((4,), 0.5)}))
    for method, args in ((by_order, (q, k, v)), (by_heads, draw())):
        with pytest.raises(ConfigurationError, match=r"layer is None.*2\].*layer=2\)"):
            method(*args, is_causal=True)
        assert method(*args, is_causal=True, layer=2).shape == args[0].shape


@pytest.mark.parametrize("name", [name for name, spec in methods().items() if "dense_layers" in spec.parameters])
def test_every_method_refuses_what_are_no_layers(name):
    for wrong, said in (
        (3, "is 3"),
        (None, "is None"),
        ((0, -1), r"is \(0, -1\)"),
        ("0", "is '0'"),
        ([1.0], r"is \[1.0\]"),
    ):
        with pytest.raises(ConfigurationError, match=f"dense_layers {said}; give the numbers of layers"):
            create(name, dense_layers=wrong)
    for right in ((), (0, 3), [2], range(4)):
        assert create(name, dense_layers=right).dense_layers == right


def test_under_autocast_the_function_takes_its_dtype():
    q, k, v = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = scaled_dot_product_attention(q, k, v.bfloat16(), is_causal=True)
        found = XAttention(threshold=1.0)(q, k, v.bfloat16(), is_causal=True)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("name", [*PREFILL, *DECODING])
def test_every_method_trains_and_generates_under_autocast(tiny_llama, name):
    method = {**PREFILL, **DECODING}[name]()
    if isinstance(method, DoubleSparsity):
        method.calibrate(tiny_llama, [ids(2, 64)], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), method.active(tiny_llama) as installed:
        tiny_llama.train()(ids(2, 64), labels=ids(2, 64), use_cache=False).loss.backward()
        tiny_llama.eval().generate(ids(2, 64), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        report = installed.report()
    assert all(bool(torch.isfinite(p.grad).all()) for p in tiny_llama.parameters())
    assert 0 < report.density("prefill" if name in PREFILL else "decode") < 1


def test_a_batch_padded_beyond_its_longest_sequence_is_read_sparsely(tiny_llama):
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[:, 76:], mask[1, 70:] = 0, 0
    method, masks = XAttention(block_size=8, stride=4, threshold=0.5), []
    method.prefill, prefill = lambda call: masks.append(prefill(call)) or masks[-1], method.prefill
    with torch.no_grad(), method.active(tiny_llama) as installed:
        padded = tiny_llama(ids(2, 80), attention_mask=mask).logits
        tallies = installed.report().tallies
    real = mask.bool()[:, None, :, None] & mask.bool()[:, None, None]
    for layer, chosen in enumerate(masks):
        tally = tallies[layer, "prefill"]
        assert tally.masked_calls == 0
        assert tally.allowed == 76 * 77 / 2 + 70 * 71 / 2
        assert tally.computed == pytest.approx(int((chosen.to_dense() & real).sum()) / 4, rel=1e-12)
        assert tally.density < 1
    with torch.no_grad(), XAttention(threshold=1.0).active(tiny_llama):
        dense = tiny_llama(ids(2, 80), attention_mask=mask).logits
    assert bool(torch.isfinite(padded).all())
    assert not torch.allclose(padded[0, 60:70], dense[0, 60:70], atol=1e-3)


def test_packed_sequences_are_counted_as_dense_and_told_once(tiny_llama):
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None]
    with torch.no_grad():
        expected = tiny_llama(ids(1, 64), position_ids=positions, use_cache=False).logits
        with XAttention(block_size=8, stride=4, threshold=0.5).active(tiny_llama) as installed:
            with pytest.warns(UserWarning, match="packed sequences have; XAttention leaves such calls dense"):
                found = tiny_llama(ids(1, 64), position_ids=positions, use_cache=False).logits
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tiny_llama(ids(1, 64), position_ids=positions, use_cache=False)
            report = installed.report()
            tiny_llama(ids(1, 64))
            both = installed.report()
    torch.testing.assert_close(found, expected)
    assert report.density("prefill") == 1
    assert report.tallies[0, "prefill"].allowed == 2 * (40 * 41 / 2 + 24 * 25 / 2)
    assert (
        str(report)
        == "attention computed: prefill 100.0%; 6 of 6 calls dense, by masks of more than causality and padding"
    )
    assert 0 < both.density("prefill") < 1
    assert "6 of 9 calls dense" in str(both)


def test_padding_does_not_hide_the_first_real_block_from_block_sparse():
    q, k, v = draw(256, 256, batch=1)
    real = (torch.arange(256) >= 72)[None]
    method = BlockSparse(chunk_size=8, top_chunks=4)
    rows = []
    method.prefill, prefill = lambda call: rows.append(prefill(call)) or rows[-1], method.prefill
    padded = method(q, k, v, is_causal=True, key_mask=real)
    alone = method(q[:, :, 72:], k[:, :, 72:], v[:, :, 72:], is_causal=True)
    assert rows[0].blocks[..., 9:, 9].all()
    assert torch.equal(rows[0].blocks[..., 9:, 9:], rows[1].blocks)
    torch.testing.assert_close(padded[:, :, 72:], alone)


@pytest.mark.parametrize("factory", [SnapKV, AdaSnapKV])
def test_the_density_of_evicted_layers_counts_what_was_seen_and_not_what_is_stored(tiny_llama, factory):
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, :20] = 0
    method = factory(token_capacity=12, local_window=4, sinks=1, approximation=8, dense_layers=(0,))
    with torch.no_grad(), method.active(tiny_llama) as installed:
        tiny_llama.generate(ids(2, 48), attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
        report = installed.report()
    allowed = 49 + 29
    assert {tally.allowed for (_, phase), tally in report.tallies.items() if phase == "decode"} == {allowed}
    assert report.layers("decode")[0] == 1
    assert report.layers("decode")[1] == pytest.approx(26 / allowed)
