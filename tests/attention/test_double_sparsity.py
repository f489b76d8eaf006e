"""Double Sparsity: labels find the tokens, attention over them is exact, and rows come ahead of their use."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from gossamer.attention.channel_order import (
    ChannelOrder,
    calibrate_channels,
    first_channels,
    random_order,
)
from gossamer.attention.double_sparsity import DoubleSparsity, channel_count, token_count
from gossamer.attention.label_cache import LabelCache, LabelLayer, channels_of
from gossamer.attention.offloaded_decoding import OffloadedDoubleSparsity
from gossamer.attention.simulated_decoding import (
    HeavyHitters,
    LabelRanking,
    PageRanking,
    QueryChannels,
    Recent,
    SimulatedDecoding,
    TrueScores,
    best_keys,
    visible_keys,
)
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, UnknownNameError
from gossamer.kernels.attention import gather_attention
from gossamer.kernels.attention_labels import make_labels
from gossamer.methods import method
from gossamer.models.attention_sites import AttentionCall, AttentionSite

LAYERS, HEADS, SHARED, SIZE = 4, 4, 2, 16


def llama(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": SHARED, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes})).eval()


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(1))


def calls_of(model, *args, **kwargs):
    """What every layer's attention is called with."""
    found = []
    site = AttentionSite(model, lambda call: found.append(call))
    with torch.no_grad():
        model(*args, **kwargs)
    site.remove()
    return found


def random_call(queries=20, keys=20, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, HEADS, queries, SIZE, generator=generator)
    k, v = torch.randn(2, 2, SHARED, keys, SIZE, generator=generator)
    return AttentionCall(3, q, k, v, SIZE**-0.5, **options)


def by_hand(call, kept):
    """Softmax attention over the kept keys, bool ``(batch, heads, queries, keys)``."""
    k, v = (x.repeat_interleave(HEADS // SHARED, 1).double() for x in (call.key, call.value))
    scores = (call.query.double() @ k.mT * call.scale).masked_fill(~kept, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("importance", ["qk", "q", "k", "pairs", "variance"])
def test_channels_are_sorted_by_a_statistic_over_all_samples(model, tokens, importance):
    batches = [tokens[:1], tokens[1:, :40]]
    sums = [0.0] * LAYERS
    samples = [calls_of(model, batch, use_cache=False) for batch in batches]
    for layer in range(LAYERS):
        pairs = []
        for calls in samples:
            q = calls[layer].query[0].double()
            k = calls[layer].key[0].double().repeat_interleave(2, 0)
            n = q.shape[1]
            products = torch.einsum("hic,hjc->hcij", q, k)
            causal = products[:, :, torch.ones(n, n, dtype=torch.bool).tril()]
            diagonal = products.diagonal(dim1=-2, dim2=-1)
            pairs.append(
                {"qk": diagonal.abs(), "q": q.abs().mT, "k": k.abs().mT, "pairs": causal.abs()}.get(importance, causal)
            )
        whole = torch.cat(pairs, -1)
        value = whole.var(-1, unbiased=False) if importance == "variance" else whole.mean(-1)
        sums[layer] = value
    by_head = calibrate_channels(model, batches, importance, "head", progress=False)
    by_group = calibrate_channels(model, batches, importance, "group", progress=False)
    for layer, value in enumerate(sums):
        assert torch.equal(by_head.layers[layer], value.argsort(dim=1, descending=True))
        grouped = value.unflatten(0, (SHARED, 2)).sum(1)
        assert torch.equal(by_group.layers[layer], grouped.argsort(dim=1, descending=True))
    assert by_head.tokens == 110


def test_padding_does_not_take_part_in_calibration(model, tokens):
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, 40:] = 0
    padded = calibrate_channels(model, [{"input_ids": tokens, "attention_mask": mask}], "pairs", progress=False)
    apart = calibrate_channels(model, [tokens[:1, :40], tokens[1:]], "pairs", progress=False)
    assert padded.tokens == apart.tokens == 110
    assert padded.agreement(apart) > 0.999


def test_orders_agree_with_themselves_and_not_with_chance(model, tokens):
    order = calibrate_channels(model, [tokens], progress=False)
    assert order.agreement(order) == 1
    assert order.agreement(ChannelOrder({n: o.flip(1) for n, o in order.layers.items()})) == pytest.approx(-1)
    assert abs(order.agreement(random_order(order))) < 0.5
    assert first_channels(order).layers[0].tolist() == [list(range(SIZE))] * 2
    with pytest.raises(CalibrationError, match="like with like"):
        order.agreement(ChannelOrder({0: order.layers[0]}))


def test_an_order_is_kept_in_a_file_and_damage_is_found(tmp_path, model, tokens):
    order = calibrate_channels(model, [tokens], "pairs", progress=False)
    order.save(tmp_path / "order.safetensors")
    again = ChannelOrder.load(tmp_path / "order.safetensors")
    assert (again.importance, again.tokens) == ("pairs", 140)
    assert all(torch.equal(again.layers[layer], order.layers[layer]) for layer in order.layers)
    data = bytearray((tmp_path / "order.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:20])
    for name in ("altered", "short", "missing"):
        with pytest.raises(CheckpointError):
            ChannelOrder.load(tmp_path / name)


@pytest.mark.parametrize(("scope", "share_tokens"), [("group", False), ("group", True), ("head", False)])
def test_a_step_attends_exactly_to_what_its_labels_rank_highest(scope, share_tokens):
    call = random_call(queries=1, keys=40)
    rules = DoubleSparsity(tokens=6, channels=4, label_bits=32, scope=scope, share_tokens=share_tokens)
    heads = SHARED if scope == "group" else HEADS
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(heads)])
    rules.order_ = ChannelOrder({3: order})
    kept = torch.zeros(2, HEADS, 1, 40, dtype=torch.bool)
    for b in range(2):
        scores = []
        for h in range(HEADS):
            few = order[h // (HEADS // heads), :4]
            scores.append(call.key[b, h // 2][:, few] @ call.query[b, h, 0, few])
        for h in range(HEADS):
            ranked = sum(scores[h // 2 * 2 : h // 2 * 2 + 2]) if share_tokens else scores[h]
            kept[b, h, 0, ranked[:39].topk(5).indices] = True
    kept[..., 39] = True
    answer = rules.attend(call)
    assert answer.density == pytest.approx(6 / 40)
    torch.testing.assert_close(answer.output.double(), by_hand(call, kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scope", "share_tokens"), [("group", False), ("group", True), ("head", False)])
@pytest.mark.parametrize("tokens", [1, 7, 0.5])
@pytest.mark.parametrize("label_bits", [32, 16, 8])
def test_a_step_in_one_pass_reads_what_the_selection_lists(scope, share_tokens, tokens, label_bits):
    method = DoubleSparsity(
        tokens=tokens, channels=5, label_bits=label_bits, scope=scope, share_tokens=share_tokens, dense_layers=()
    )
    heads = HEADS if scope == "head" else SHARED
    generator = torch.Generator().manual_seed(5)
    method.order_ = ChannelOrder({3: torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(heads)])})
    call = random_call(1, 33)
    selection = method.decode(call)
    wanted = gather_attention(call.query, call.key, call.value, selection.indices, scale=call.scale)
    answer = method.attend(call)
    assert torch.equal(answer.output, wanted)
    assert answer.density == selection.density(33)


def test_padding_is_never_chosen_and_the_newest_token_always_is():
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :36] = False
    call = random_call(queries=1, keys=40, key_mask=real)
    call.key[:, :, -1] *= -10
    rules = DoubleSparsity(tokens=8, channels=1.0, label_bits=32)
    rules.order_ = ChannelOrder({3: torch.arange(SIZE).expand(SHARED, -1)})
    found = rules.decode(call)
    listed = [set(found.indices[1, h, : int(found.counts[1, h])].tolist()) for h in range(HEADS)]
    assert listed == [{36, 37, 38, 39}] * HEADS
    assert all(39 in found.indices[0, h].tolist() for h in range(HEADS))
    kept = real[:, None, None].expand(2, HEADS, 1, 40).clone()
    torch.testing.assert_close(rules.attend(call).output[1].double(), by_hand(call, kept)[1], rtol=1e-5, atol=1e-6)
    rules.tokens = 1
    assert rules.decode(call).indices.flatten().unique().tolist() == [39]


def test_a_budget_that_is_not_smaller_than_the_context_reads_it_whole(model, tokens):
    rules = DoubleSparsity(tokens=100, dense_layers=())
    rules.calibrate(model, [tokens], progress=False)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    with rules.active(model) as installed:
        assert torch.equal(model.generate(tokens, **options), plain)
        assert installed.report().density("decode") == 1


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_labels_are_written_when_a_token_enters_the_cache(bits):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, SHARED, 30, SIZE, generator=generator)
    order = torch.stack([torch.randperm(SIZE, generator=generator)[:5] for _ in range(HEADS)])
    layer = LabelLayer(order, bits)
    for part in states.split([17, 1, 1, 11], dim=2):
        layer.update(part, part)
    expected = torch.stack([states[:, h // 2][..., order[h]] for h in range(HEADS)], 1)
    assert torch.equal(channels_of(states, order), expected)
    width = expected.amax(-1, keepdim=True) - expected.amin(-1, keepdim=True)
    allowed = {4: width / 30, 8: width / 510, 16: expected.abs() * 2**-8, 32: torch.zeros(())}[bits]
    assert bool(((layer.labels.values().float() - expected).abs() <= allowed + 1e-6).all())
    layer.crop(-3)
    assert torch.equal(layer.labels.values(), make_labels(expected[:, :, :27], bits).values())
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.update(states[:, :, 27:], states[:, :, 27:])
    assert layer.labels.codes.shape[2] == 30
    assert torch.equal(layer.labels.values()[:, :, :27], make_labels(expected[[1, 1], :, :27], bits).values())


def test_few_bits_take_few_bytes():
    values = torch.randn(1, 2, 100, 8)
    assert [make_labels(values, bits).codes.nbytes for bits in (4, 8, 16, 32)] == [800, 1600, 3200, 6400]
    constant = make_labels(torch.full((1, 1, 3, 4), 0.5), 4)
    assert torch.equal(constant.values(), torch.full((1, 1, 3, 4), 0.5))


@pytest.mark.parametrize("make", [lambda model, rules: None, lambda model, rules: DynamicCache(), "labels"])
def test_decoding_is_what_the_simulation_says_with_any_cache(model, tokens, make):
    rules = DoubleSparsity(tokens=12, channels=4, label_bits=32, dense_layers=(0,))
    rules.calibrate(model, [tokens], progress=False)
    cache = rules.make_cache(model) if make == "labels" else make(model, rules)
    simulated = SimulatedDecoding(ranking=LabelRanking(rules.order_, 4, 32), tokens=12, start=50, dense_layers=(0,))
    with torch.no_grad():
        with simulated.active(model):
            wanted = model(tokens, use_cache=False).logits[:, 50:]
        with rules.active(model) as installed:
            output = model(tokens[:, :50], past_key_values=cache, use_cache=True)
            found = []
            for place in range(50, 70):
                output = model(tokens[:, place : place + 1], past_key_values=output.past_key_values)
                found.append(output.logits)
            held = output.past_key_values.layers
            assert [isinstance(layer, LabelLayer) for layer in held] == [False, True, True, True]
            assert installed.report().layers("decode")[0] == 1
            assert installed.report().layers("decode")[1] == pytest.approx(12 / 60.5, rel=0.01)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-4)
    assert type(model.generate(tokens, max_new_tokens=2, return_dict_in_generate=True).past_key_values.layers[1]) is (
        type(DynamicCache(config=model.config).layers[1])
    )


def test_a_cache_made_before_is_read_without_labels(model, tokens):
    rules = DoubleSparsity(tokens=12, channels=4, label_bits=32, dense_layers=())
    rules.calibrate(model, [tokens], progress=False)
    with torch.no_grad():
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        with rules.active(model):
            found = model(tokens[:, 60:61], past_key_values=cache).logits
            fresh = model(tokens[:, :60], use_cache=True).past_key_values
            wanted = model(tokens[:, 60:61], past_key_values=fresh).logits
    torch.testing.assert_close(found, wanted)


def test_sliding_layers_stay_dense(tokens):
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=50,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    model = MistralForCausalLM(config).eval()
    rules = DoubleSparsity(tokens=12, channels=4, dense_layers=())
    rules.calibrate(model, [tokens], progress=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    with rules.active(model) as installed:
        assert torch.equal(model.generate(tokens, **options), plain)
        assert installed.report().density("decode") == 1


@pytest.mark.parametrize("offset", [0, 7])
def test_each_simulated_query_reads_its_own_best_tokens(offset):
    call = random_call(queries=20 - offset, keys=20)
    order = ChannelOrder({3: torch.stack([torch.randperm(SIZE) for _ in range(SHARED)])})
    few = order.layers[3][:, :4].repeat_interleave(2, 0)
    kept = torch.zeros(2, HEADS, 20 - offset, 20, dtype=torch.bool)
    for b in range(2):
        for h in range(HEADS):
            scores = call.query[b, h][:, few[h]] @ call.key[b, h // 2][:, few[h]].T
            for i in range(20 - offset):
                place = i + offset
                best = scores[i, :place].topk(min(4, place)).indices
                kept[b, h, i, best] = True
                kept[b, h, i, place] = True
    answer = SimulatedDecoding(ranking=LabelRanking(order, 4, 32), tokens=5).attend(call)
    torch.testing.assert_close(answer.output.double(), by_hand(call, kept), rtol=1e-5, atol=1e-6)
    visible = (20 - offset) * 20 - (20 - offset) * (19 - offset) / 2
    assert answer.density == pytest.approx(float(kept[0, 0].sum()) / visible)


def test_other_rankings_read_what_they_say():
    call = random_call(queries=40, keys=40)
    visible = visible_keys(call, 0, 40)

    def kept(ranking, tokens=8):
        return best_keys(ranking.scores(call, 0, 40), visible, tokens, 0)[0, 1]

    assert torch.equal(kept(QueryChannels(1.0)), kept(TrueScores()))
    assert kept(Recent(sinks=2))[30].nonzero().flatten().tolist() == [0, 1, 25, 26, 27, 28, 29, 30]
    q, k = call.query[0, 1, 20], call.key[0, 0]
    largest = q.abs().topk(4).indices
    scores = k[:20, largest] @ q[largest]
    assert set(kept(QueryChannels(4))[20].nonzero().flatten().tolist()) == {20, *scores.topk(7).indices.tolist()}
    bounds = [torch.maximum(q * page.amin(0), q * page.amax(0)).sum() for page in k[:40].split(4)]
    best = torch.stack(bounds[:5]).topk(1).indices.item()
    # at place 20 a page has just begun: itself, and the best one before it
    pages = kept(PageRanking(4), 5)[20]
    assert set(pages.nonzero().flatten().tolist()) == {20, *range(4 * best, 4 * best + 4)}


def test_heavy_hitters_never_get_back_what_they_evicted():
    call = random_call(queries=30, keys=30)
    k, v = (x.repeat_interleave(2, 1) for x in (call.key, call.value))
    scores = call.query @ k.mT * call.scale
    found = HeavyHitters(tokens=6, start=10).attend(call).output
    for b in range(2):
        for h in range(HEADS):
            shares = scores[b, h, :10, :30].masked_fill(~torch.ones(10, 30).tril().bool(), float("-inf")).softmax(-1)
            drawn = shares.sum(0)
            older = drawn[:7].topk(2).indices.tolist()
            held = sorted([*older, 7, 8, 9])
            for row in range(10, 30):
                held.append(row)
                share = scores[b, h, row, held].softmax(-1)
                torch.testing.assert_close(found[b, h, row], share @ v[b, h, held], rtol=1e-4, atol=1e-5)
                drawn[held] += share
                assert len(held) == 6
                held.remove(min((t for t in held if t < row - 2), key=lambda t: float(drawn[t])))


@pytest.mark.parametrize("place", ["mapped", "host"])
def test_offloaded_decoding_is_exact_when_neighbouring_layers_are_alike(tokens, place, tmp_path):
    model = llama()
    for layer in model.model.layers[:-1]:  # layers that add nothing: the approximate query is the true one
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :20] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    plain = DoubleSparsity(tokens=9, channels=4, dense_layers=(0,))
    order = plain.calibrate(model, [tokens], progress=False)
    rules = OffloadedDoubleSparsity(
        tokens=9, channels=4, dense_layers=(0,), dense_last=False, count_hits=True, place=place, folder=tmp_path
    )
    rules.order_ = order
    with plain.active(model):
        wanted = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
    with rules.active(model) as installed:
        found = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
        assert rules.hits.rates == {1: 1.0, 2: 1.0, 3: 1.0}
        assert rules.hits.fetched_bytes == 3 * 5 * 2 * HEADS * 8 * SIZE * 4 * 2
        keys = 73 - 20 / 2  # one of two rows has 20 tokens of padding
        assert installed.report().density("decode") == pytest.approx((1 + 3 * 9 / keys) / 4, abs=0.005)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    assert list(tmp_path.iterdir()) == []  # the files have no name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_are_fetched_ahead_of_layers_that_differ_too(model, tokens):
    rules = OffloadedDoubleSparsity(tokens=9, channels=4, dense_layers=(0,), count_hits=True)
    rules.calibrate(model, [tokens], progress=False)
    with rules.active(model):
        model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert rules.dense_layers == (0, 3)
        assert all(0 < rate < 1 for rate in rules.hits.rates.values())


def test_an_order_can_be_given_and_is_kept_by_copies(model, tokens, tmp_path):
    rules = DoubleSparsity(tokens=9, channels=4, dense_layers=(0,))
    assert not hasattr(rules, "order_")
    rules.calibrate(model, [tokens], progress=False).save(tmp_path / "order.safetensors")
    fewer = dataclasses.replace(rules, tokens=5)
    assert fewer.order_ is rules.channel_order
    given = DoubleSparsity(
        tokens=9, channels=4, dense_layers=(0,), channel_order=ChannelOrder.load(tmp_path / "order.safetensors")
    )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    found = []
    for method_ in (rules, given):
        with method_.active(model):
            found.append(torch.stack(model.generate(tokens, return_dict_in_generate=True, **options).logits))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DoubleSparsity, {"label_bits": 8}),
        (DoubleSparsity, {"label_bits": 16}),
        (OffloadedDoubleSparsity, {"place": "host"}),
        (OffloadedDoubleSparsity, {"place": "mapped"}),
    ],
)
def test_a_prompt_read_in_inference_mode_can_be_decoded_outside_of_it(model, tokens, kind, options):
    rules = kind(tokens=9, channels=4, dense_layers=(0,), **options)
    rules.calibrate(model, [tokens], progress=False)
    found = []
    for reading in (torch.inference_mode, torch.no_grad):
        cache = DynamicCache(config=model.config)
        with rules.active(model):
            with reading():
                model(tokens[:, :60], past_key_values=cache)
                model(tokens[:, 60:61], past_key_values=cache)
            with torch.no_grad():
                found.append(model(tokens[:, 61:62], past_key_values=cache).logits)
    assert torch.equal(*found)


def test_bad_input_is_named(model, tokens):
    assert method("double-sparsity").factory is DoubleSparsity
    for options, words in (
        ({"channels": 0}, "head_dim"),
        ({"channels": 1.5}, "head_dim"),
        ({"channels": -2}, "channels is -2"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 0.0}, "tokens is 0.0"),
        ({"tokens": True}, "tokens is True"),
        ({"label_bits": 5}, "label_bits is 5"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            DoubleSparsity(**options)
    for options, words in (({"importance": "zz"}, "importance 'zz'"), ({"scope": "heads"}, "did you mean 'head'")):
        with pytest.raises(UnknownNameError, match=words):
            DoubleSparsity(**options)
    with pytest.raises(ConfigurationError, match="at most head_dim, which is 16"):
        channel_count(17, 16)
    assert [token_count(1 / 16, n) for n in (1, 16, 17, 160)] == [1, 1, 2, 10]
    with pytest.raises(CalibrationError, match="calibrate"):
        DoubleSparsity().install(model)
    with pytest.raises(CalibrationError, match="calibrate"):
        OffloadedDoubleSparsity().install(model)
    with pytest.raises(CalibrationError, match="empty"):
        calibrate_channels(model, [], progress=False)
    with pytest.raises(UnknownNameError, match="importance 'qq'"):
        calibrate_channels(model, [tokens], "qq")
    rules = DoubleSparsity(channels=20, dense_layers=())
    rules.calibrate(model, [tokens], progress=False)
    with pytest.raises(ConfigurationError, match="head_dim"), rules.active(model):
        model.generate(tokens, max_new_tokens=2, pad_token_id=0)
    shared = DoubleSparsity(scope="head", share_tokens=True)
    shared.order_ = ChannelOrder({3: torch.arange(SIZE).expand(HEADS, -1)})
    with pytest.raises(ConfigurationError, match="scope='group'"):
        shared.attend(random_call(queries=1, keys=40))
    with pytest.raises(UnknownNameError, match="mapped"):
        OffloadedDoubleSparsity(place="maped")
    with pytest.raises(ConfigurationError, match="label_bits is 3"):
        LabelCache([torch.zeros(2, 4, dtype=torch.long)], 3)
    other = copy.deepcopy(rules)
    other.order_ = ChannelOrder({n: o[:1].expand(3, -1) for n, o in rules.order_.layers.items()})
    other.channels = 4
    with pytest.raises(CalibrationError, match="calibrate on this model"), other.active(model):
        model.generate(tokens, max_new_tokens=2, pad_token_id=0)
