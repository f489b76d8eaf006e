"""What is counted as computed is what has weight: values that name their keys show which links a method used."""

from __future__ import annotations

import pytest
import torch

from gossamer.attention.adaspa import AdaSpa
from gossamer.attention.block_sparse import BlockSparse
from gossamer.attention.channel_order import ChannelOrder
from gossamer.attention.density import Tally
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.attention.flex_prefill import FlexPrefill
from gossamer.attention.local_windows import WindowMask, mask_density
from gossamer.attention.quest import Quest
from gossamer.attention.re_ttention import Rettention
from gossamer.attention.s2_attention import S2Attention
from gossamer.attention.simulated_decoding import Recent, SimulatedDecoding
from gossamer.attention.sparsed import SparseD
from gossamer.attention.vertical_slash import VerticalSlash
from gossamer.attention.xattention import XAttention
from gossamer.core.block_mask import BlockMask
from gossamer.models.attention_sites import AttentionCall

KEYS, SIZE = 71, 16
PREFILL = {
    "xattention": lambda: XAttention(block_size=16, stride=4, threshold=0.5),
    "s2": lambda: S2Attention(block_size=8, local_blocks=1, vert_stride=4, dense_layers=()),
    "vertical-slash": lambda: VerticalSlash(vertical_size=8, slash_size=8, block_size=16, local=8),
    "flex-prefill": lambda: FlexPrefill(alpha=0.5, min_budget=4, block_size=16, local=4),
    "block-sparse": lambda: BlockSparse(chunk_size=8, top_chunks=3),
    "simulated": lambda: SimulatedDecoding(ranking=Recent(), tokens=9, start=5),
    "dense": lambda: XAttention(dense_layers=(0,)),
}
DECODING = {
    "quest": lambda: Quest(token_budget=8, page_size=4),
    "double-sparsity": lambda: DoubleSparsity(tokens=9, channels=4, dense_layers=(), channel_order=ORDER),
    "newest alone": lambda: DoubleSparsity(tokens=1, channels=4, dense_layers=(), channel_order=ORDER),
    "s2": PREFILL["s2"],
    "dense": PREFILL["dense"],
}
STEPWISE = {
    "sparsed": lambda: SparseD(skip=0.0, select=0.3, block_size=8),
    "adaspa": lambda: AdaSpa(sparsity=0.6, block_size=8, search_steps=(1,), text_tokens=slice(0, 0)),
    "re-ttention": lambda: Rettention(keep=0.2, dense_steps=0, residual=False),
    "frames": lambda: Rettention(keep=0.2, mask="frames", frames=7, dense_steps=0, residual=False),
}
ORDER = ChannelOrder({0: torch.arange(SIZE).expand(2, -1).clone()})


class InWindows(XAttention):
    """Layers with a sliding window are treated as well."""

    treats_windows = True


def padding(side: str | None) -> torch.Tensor | None:
    """Two sequences, of which the second has 26 tokens of padding and the first three, if these are not its last."""
    real = torch.ones(2, KEYS, dtype=torch.bool)
    if side == "left":
        real[0, :3], real[1, :26] = False, False
    elif side == "right":
        real[1, -26:] = False
    return None if side is None else real


def made(queries: int, side: str | None, **options) -> AttentionCall:
    generator = torch.Generator().manual_seed(4)
    query, key = (
        torch.randn(2, heads, length, SIZE, generator=generator) for heads, length in ((4, queries), (2, KEYS))
    )
    value = torch.eye(KEYS).expand(2, 2, -1, -1)  # what comes out are the weights
    return AttentionCall(0, query, key, value, SIZE**-0.5, key_mask=padding(side), **options)


def counted(call: AttentionCall, answer) -> tuple[float, float]:
    """Links with any weight, and links that are allowed, of queries that are no padding: per head."""
    weights = call.dense() if answer is None else answer.output
    assert weights.shape[-1] == KEYS
    allowed = torch.ones(2, 1, call.query.shape[2], KEYS, dtype=torch.bool) if call.links() is None else call.links()
    if call.key_mask is not None:
        allowed = allowed & call.key_mask[:, None, -call.query.shape[2] :, None]
    allowed = allowed.expand(2, 4, -1, -1)
    return float(((weights > 0) & allowed).sum()) / 4, float(allowed.sum()) / 4


def check(call: AttentionCall, answer) -> Tally:
    tally = Tally()
    tally.add(call, answer)
    computed, allowed = counted(call, answer)
    assert tally.allowed == allowed
    assert tally.computed == pytest.approx(computed, rel=1e-12)
    if answer is not None:
        assert answer.density == pytest.approx(computed / allowed, rel=1e-12)
    return tally


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("queries", [KEYS, 37])
@pytest.mark.parametrize("name", PREFILL)
def test_of_prompts_what_is_counted_is_what_has_weight(name, queries, side):
    call = made(queries, side)
    tally = check(call, PREFILL[name]().attend(call))
    assert (tally.density < 1) == (name != "dense")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODING)
def test_of_decoding_what_is_counted_is_what_has_weight(name, side):
    call = made(1, side)
    tally = check(call, DECODING[name]().attend(call))
    assert (tally.density < 1) == (name != "dense")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    "method", [XAttention(), InWindows(block_size=8, stride=4, threshold=0.3)], ids=["dense", "sparse"]
)
@pytest.mark.parametrize("window", [1, 20, KEYS, KEYS + 9])
def test_within_a_window_no_more_counts_than_it_holds(window, method, side):
    call = made(37, side, window=window)
    check(call, None if type(method) is XAttention else method.attend(call))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", STEPWISE)
def test_of_both_directions_what_is_counted_is_what_has_weight(name, side):
    call, method = made(KEYS, side, causal=False), STEPWISE[name]()
    if name == "frames":
        method.begin(10, slice(0, 1))
    else:
        method.begin(10)
    densities = []
    for step in range(3):
        method.step(step)
        densities.append(check(call, method.attend(call)).density)
    assert densities[0] == 1
    assert densities[2] < 1


def test_queries_that_are_not_keys_are_no_padding():
    tally = Tally()
    tally.add(made(37, "left", causal=False), None)
    assert tally.computed == tally.allowed == 37 * (68 + 45)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("frames", [1, 7])
def test_windows_blocks_and_links_of_one_mask_are_equally_dense(frames, side):
    window = WindowMask(KEYS, 3, frames, slice(0, 1))
    links, real = window.to_dense(), padding(side)
    blocks = BlockMask.from_tokens(links, 1, causal=False)
    expected = mask_density(links, real)
    if real is not None:
        pairs = real[:, None, :, None] & real[:, None, None]
        assert expected == pytest.approx(int((links & pairs).sum()) / int(pairs.sum()), rel=1e-12)
    assert mask_density(window, real) == pytest.approx(expected, rel=1e-12)
    assert mask_density(blocks, real) == pytest.approx(expected, rel=1e-12)
