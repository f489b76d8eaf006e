"""XAttention: its scores find lines, its masks keep the promised mass, and it works in models."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pytest
import torch

from gossamer.attention.scores import exact_mass, score_blocks
from gossamer.attention.thresholds import HeadThresholds
from gossamer.attention.xattention import XAttention
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, ModelError, NonFiniteError
from gossamer.models.attention_sites import AttentionCall


def call_of(queries=192, keys=192, heads=4, key_heads=2, size=16, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, queries, size, generator=generator)
    key, value = (torch.randn(2, key_heads, keys, size, generator=generator) for _ in range(2))
    return AttentionCall(0, query, key, value, size**-0.5, **options)


def brute_antidiagonal(call, stride, block):
    """Means over antidiagonals of every tile, a softmax over the tiles a row of tiles may see, sums over blocks."""
    key = call.key.repeat_interleave(call.group, 1).double()
    scores = (call.query.double() @ key.transpose(-1, -2)) * call.scale
    rows, columns = scores.shape[-2] // stride, scores.shape[-1] // stride
    tiles = scores.unflatten(-1, (columns, stride)).unflatten(-3, (rows, stride))  # rows, stride, columns, stride
    means = torch.stack([tiles[..., :, s, :, stride - 1 - s] for s in range(stride)]).sum(0) / stride
    hidden = torch.arange(columns) > torch.arange(rows)[:, None] + (columns - rows)
    shares = means.masked_fill(hidden, float("-inf")).softmax(-1)
    fold = block // stride
    return shares.unflatten(-1, (-1, fold)).unflatten(-3, (-1, fold)).sum((-1, -3))


@pytest.mark.parametrize(
    ("queries", "keys", "stride", "block"), [(192, 192, 8, 32), (64, 192, 4, 16), (96, 96, 16, 48)]
)
def test_scores_are_means_over_antidiagonals(queries, keys, stride, block):
    call = call_of(queries, keys)
    found = score_blocks(call, "antidiagonal", stride, block)
    torch.testing.assert_close(found.double(), brute_antidiagonal(call, stride, block), rtol=1e-4, atol=1e-6)


def slash(length=256, distance=96, size=32):
    """Every query looks exactly `distance` tokens back."""
    marks = torch.nn.functional.normalize(torch.randn(length, size, generator=torch.Generator().manual_seed(0)), dim=-1)
    query = torch.roll(marks, distance, 0)[None, None] * 30
    return AttentionCall(0, query, marks[None, None], torch.zeros(1, 1, length, size), 1.0)


def recall_of_line(distance, scoring):
    call = slash(distance=distance)
    method = XAttention(threshold=0.6, stride=8, block_size=32, scoring=scoring, keep_sink=False, keep_recent=False)
    return method.select(method.score(call), call).recall(exact_mass(call, 32)).item()


@pytest.mark.parametrize("distance", [99, 101, 103])
def test_antidiagonals_find_a_diagonal_line_where_diagonals_do_not(distance):
    assert recall_of_line(distance, "antidiagonal") > 0.7
    assert recall_of_line(distance, "diagonal") < recall_of_line(distance, "antidiagonal") - 0.1


def test_lines_at_even_distances_are_the_blind_spot_of_even_strides():
    assert recall_of_line(98, "antidiagonal") < recall_of_line(98, "exact") - 0.15


@pytest.mark.parametrize("scoring", ["antidiagonal", "diagonal", "random", "mean", "sum", "exact"])
def test_every_scoring_gives_every_row_its_mass_on_what_it_may_read(scoring):
    call = call_of(100, 150, key_mask=torch.arange(150).expand(2, -1) >= torch.tensor([[0], [40]]))
    scores = score_blocks(call, scoring, 4, 16)
    assert scores.shape == (2, 4, 7, 10)
    assert bool((scores >= 0).all())
    assert not scores[1, :, :, :2].any(), "padding has no mass"
    assert bool((scores.sum(-1) > 0).all())


def test_a_threshold_of_one_is_dense_attention():
    for options in ({}, {"causal": False}):
        call = call_of(150, 150, **options)
        method = XAttention(threshold=1.0, stride=4, block_size=32)
        mask = method.select(method.score(call), call)
        assert mask.density == 1
        torch.testing.assert_close(
            method(call.query, call.key, call.value, is_causal=call.causal), call.dense(), rtol=1e-4, atol=1e-5
        )


def test_lower_thresholds_read_less_and_never_lose_sink_and_diagonal():
    call = call_of(256, 256)
    densities = []
    for threshold in (0.95, 0.7, 0.3):
        method = XAttention(threshold=threshold, stride=8, block_size=32)
        mask = method.select(method.score(call), call)
        densities.append(mask.density)
        assert bool(mask.blocks[..., 0].all())
        assert bool(mask.blocks.diagonal(dim1=-2, dim2=-1).all())
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1]


@pytest.mark.parametrize("length", [1, 5, 31, 33, 100])
def test_sequences_of_any_length_give_what_dense_attention_gives_over_the_same_links(length):
    call = call_of(length, length)
    method = XAttention(threshold=0.5, stride=8, block_size=32)
    answer = method.attend(call)
    mask = method.prefill(call)
    if answer is None:
        assert length <= 32
        return
    links = mask.to_dense()
    expected = torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, links, scale=call.scale, enable_gqa=True
    )
    torch.testing.assert_close(answer.output, expected, rtol=1e-4, atol=1e-5)
    assert answer.density == mask.density


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, 80), generator=torch.Generator().manual_seed(2))


def test_in_a_model_padding_changes_nothing_and_density_is_reported(tiny_llama, tokens):
    method = XAttention(threshold=0.6, stride=4, block_size=8)
    mask = torch.ones_like(tokens)
    mask[0, :16] = 0
    with torch.no_grad(), method.active(tiny_llama) as installed:
        alone = tiny_llama(tokens[:1, 16:]).logits
        installed.reset()
        together = tiny_llama(tokens, attention_mask=mask).logits
        report = installed.report()
    torch.testing.assert_close(together[:1, 16:], alone, rtol=1e-4, atol=1e-5)
    assert 0 < report.density("prefill") < 1
    assert set(report.layers("prefill")) == {0, 1, 2}
    assert "prefill" in str(report)
    assert report.to_dict().keys() == {"prefill"}


def test_generation_decodes_densely_after_a_sparse_prompt(tiny_llama, tokens):
    method = XAttention(threshold=0.6, stride=4, block_size=8)
    with torch.no_grad(), method.active(tiny_llama) as installed:
        tiny_llama.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        report = installed.report()
    assert report.density("prefill") < 1
    assert report.density("decode") == 1


@pytest.fixture
def sharper(tiny_llama):
    """A model whose heads look at few tokens."""
    model = copy.deepcopy(tiny_llama)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
    return model


def test_calibrated_thresholds_cover_the_true_mass(sharper, tokens, tmp_path):
    method = XAttention(stride=4, block_size=8)
    found = method.calibrate(sharper, [tokens], coverage=0.8, progress=False)
    recalls = []

    def look(call):
        recalls.append(method.select(method.score(call), call).recall(exact_mass(call, 8)).min().item())

    from gossamer.attention.thresholds import observe_calls

    observe_calls(sharper, [tokens], look, progress=False)
    assert min(recalls) >= 0.8
    assert found.mean < 1
    found.save(tmp_path / "heads.safetensors")
    again = HeadThresholds.load(tmp_path / "heads.safetensors")
    assert all(again.layers[layer].equal(values) for layer, values in found.layers.items())
    (tmp_path / "heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="calibrate again"):
        HeadThresholds.load(tmp_path / "heads.safetensors")


def test_a_calibrated_threshold_is_the_share_that_the_lowest_wanted_block_of_every_row_asks_for(sharper, tokens):
    from gossamer.attention.thresholds import observe_calls

    method = XAttention(stride=4, block_size=8)
    calls = []
    observe_calls(sharper, [tokens[:1]], calls.append, progress=False)
    found = method.calibrate(sharper, [tokens[:1]], coverage=0.8, progress=False)
    for call in calls:
        truth, estimate = exact_mass(call, 8)[0].double(), method.score(call)[0].double()
        for head in range(truth.shape[0]):
            kept = 0.0
            for true, estimated in zip(truth[head].tolist(), estimate[head].tolist()):
                order = sorted(range(len(true)), key=lambda block: -true[block])
                wanted = next(
                    order[:n] for n in range(1, len(order) + 1) if sum(true[b] for b in order[:n]) >= 0.8 * sum(true)
                )
                kept += sum(mass for mass in estimated if mass >= min(estimated[block] for block in wanted))
            assert found.layers[call.layer][head].item() == pytest.approx(kept / estimate[head].sum().item(), abs=1e-6)


def test_calibrated_thresholds_are_the_threshold_from_then_on(tiny_llama, tokens, tmp_path):
    method = XAttention(stride=4, block_size=8)
    found = method.calibrate(tiny_llama, [tokens], progress=False)
    assert method.threshold is found
    assert dataclasses.replace(method, keep_sink=False).threshold is found
    assert "HeadThresholds(3 layers, mean" in repr(method)
    found.save(tmp_path / "heads.safetensors")
    again = XAttention(stride=4, block_size=8, threshold=HeadThresholds.load(tmp_path / "heads.safetensors"))
    call = call_of(64, 64)
    assert again.prefill(call).blocks.equal(method.prefill(call).blocks)
    method.threshold = 0.3
    assert method.prefill(call).blocks.equal(XAttention(stride=4, block_size=8, threshold=0.3).prefill(call).blocks)


def test_the_search_lowers_thresholds_only_while_quality_lasts(tiny_llama, tokens):
    method = XAttention(threshold=0.9, stride=4, block_size=8)
    free = method.search(tiny_llama, [tokens], trials=24, tolerance=10.0, progress=False)
    assert free.mean == pytest.approx(0.9**3)
    assert method.threshold is free
    method.threshold = 0.9
    strict = method.search(tiny_llama, [tokens], trials=24, tolerance=0.0, progress=False)
    assert strict.mean > free.mean


def test_thresholds_of_another_model_are_refused(tiny_llama, tokens):
    method = XAttention(stride=4, block_size=8)
    method.threshold = HeadThresholds({0: torch.ones(4), 1: torch.ones(7)})
    with pytest.raises(ModelError, match="7 heads in layer 1"), method.active(tiny_llama), torch.no_grad():
        tiny_llama(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold is 0.0; it must be in \(0, 1\]"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": "a"}, "threshold is 'a'; it must be"),
        ({"threshold": None}, "threshold is None"),
        ({"threshold": True}, "threshold is True"),
        ({"scoring": "spiral"}, "scoring is 'spiral'; it must be one of antidiagonal"),
        ({"stride": 8.0}, "stride is 8.0; it must be a whole number"),
        ({"stride": 7}, "stride is 7; it must be a whole number that divides the block size 128"),
        ({"stride": 0}, "stride is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        XAttention(**options)


def test_bad_input_is_refused(tiny_llama):
    method = XAttention(stride=4, block_size=8)
    call = call_of(40, 40)
    for options, said in (({}, "query of attention"), ({"layer": 3}, "query of layer 3")):
        with pytest.raises(NonFiniteError, match=said):
            method(call.query * float("nan"), call.key, call.value, **options)
    with pytest.raises(ConfigurationError, match="multiple"):
        method(torch.zeros(1, 3, 8, 4), torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))
    with pytest.raises(ConfigurationError, match="at least as many keys"):
        method(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), is_causal=True)
    with pytest.raises(CalibrationError, match="longer than a block of 8"):
        method.calibrate(tiny_llama, [torch.ones(1, 6, dtype=torch.long)], progress=False)
    with pytest.raises(ConfigurationError, match="scoring is 'spiral'"):
        score_blocks(call_of(40, 40), "spiral", 4, 8)


NEEDS_A_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a compiler of C++"
)


@NEEDS_A_COMPILER
def test_inductor_compiles_what_is_around_a_selection():
    method, call = XAttention(threshold=0.5, stride=4, block_size=8), call_of(40, 40)

    def attend(q, k, v):
        return method(q * 2, k, v, is_causal=True) + 1

    tensors = (call.query, call.key, call.value)
    torch.testing.assert_close(torch.compile(attend)(*tensors), attend(*tensors))


@NEEDS_A_COMPILER
@pytest.mark.slow
def test_inductor_compiles_a_model_around_its_selections(tiny_llama, tokens):
    with torch.no_grad(), XAttention(threshold=0.5, stride=4, block_size=8).active(tiny_llama) as installed:
        wanted = tiny_llama(tokens, use_cache=False).logits
        torch.testing.assert_close(torch.compile(tiny_llama)(tokens, use_cache=False).logits, wanted)
        assert installed.report().density("prefill") < 1


def test_padding_is_not_counted(tiny_llama, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :48] = 0
    densities = []
    for options in ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens}):
        with torch.no_grad(), XAttention(threshold=1.0, stride=4, block_size=8).active(tiny_llama) as installed:
            tiny_llama.generate(**options, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
            densities += [installed.report().density(phase) for phase in ("prefill", "decode")]
    assert densities == [1, 1, 1, 1]
