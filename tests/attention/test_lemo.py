"""LeMo: tokens that a layer leaves out cost nothing, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.attention.lemo import (
    TokenSparseConfig,
    always,
    apply_token_sparsity,
    keep_share_callback,
)
from gossamer.attention.lemo_memory import channel_sparsity, offloaded_activations
from gossamer.attention.lemo_predictors import (
    BlockPredictor,
    fit_predictors,
    observe_blocks,
    predictor_loss,
    recall_of_kept,
)
from gossamer.attention.lemo_scores import attention_received
from gossamer.attention.lemo_search import mean_loss, search_thresholds
from gossamer.attention.token_sparse_layers import decoder_stack, token_index
from gossamer.core.schedules import Linear
from gossamer.core.segments import SegmentedLMLoss, in_segments
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, UnknownNameError
from gossamer.measure.saved_activations import saved_activations
from gossamer.methods import method
from gossamer.models.attention_sites import AttentionCall

LENGTH, BLOCK = 44, 8  # the last block has 4 tokens


def llama(layers=3, attention="sdpa", **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 50, "max_position_embeddings": 256, "num_hidden_layers": layers}
    config = LlamaConfig(**{**shape, **changes})
    model = LlamaForCausalLM(config).double()
    model.set_attn_implementation(attention)
    return model.train()


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def tokens():
    return torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def config(**changes):
    return TokenSparseConfig(**{"block": BLOCK, "scores": "random", "share": 0.5, "loss_layers": 0, **changes})


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, tokens, kept):
    """The reference: every layer reads its kept tokens only, by indexing, with explicit positions and mask."""
    hidden = model.model.embed_tokens(tokens)
    for layer, index in zip(model.model.layers, kept):
        rows = []
        for item, places in enumerate(index):
            part = hidden[item : item + 1, places]
            embeddings = model.model.rotary_emb(part, places[None])
            mask = torch.zeros(1, 1, len(places), len(places)).masked_fill_(places[:, None] < places, float("-inf"))
            given = {"position_ids": places[None], "position_embeddings": embeddings}
            out = layer(part, attention_mask=mask.double(), **given)
            rows.append(torch.index_copy(hidden[item], 0, places, out[0]))
        hidden = torch.stack(rows)
    return model.lm_head(model.model.norm(hidden))


def recorded(sparsity):
    """Kept tokens of each layer, from the installed sparsity, while it runs."""
    seen = {}
    choose = sparsity._layers.choose

    def note(call):
        chosen = choose(call)
        seen[call.layer] = token_index(*chosen)
        return chosen

    sparsity._layers.choose = note
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_values_and_gradients_are_those_of_a_model_that_indexes_by_hand(tokens, attention):
    model = llama(attention=attention)
    reference = copy.deepcopy(model)
    with apply_token_sparsity(model, config()) as sparsity:
        kept = recorded(sparsity)
        logits = model(tokens, use_cache=False).logits
        found = gradients(model, logits.square().mean())
    assert {index.shape[1] for index in kept.values()} < set(range(LENGTH))
    expected = by_hand(reference, tokens, [kept[layer] for layer in range(3)])
    torch.testing.assert_close(logits, expected)
    wanted = gradients(reference, expected.square().mean())
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_all_tokens_kept_is_the_dense_model_bit_for_bit(model, tokens):
    dense = model(tokens, labels=tokens, use_cache=False)
    wanted = gradients(model, dense.loss)
    with apply_token_sparsity(model, config(share=1.0)) as sparsity:
        sparse = model(tokens, labels=tokens, use_cache=False)
        found = gradients(model, sparse.loss)
        assert sparsity.report.kept == [1.0, 1.0, 1.0]
    assert torch.equal(dense.logits, sparse.logits)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_eliminated_token_leaves_the_layer_as_it_came(model, tokens):
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: None)
    with apply_token_sparsity(model, config()) as sparsity:
        kept = recorded(sparsity)
        # registered behind, so that it sees what the next layer will get
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: states.append(output.detach()))
        before = model.model.embed_tokens(tokens).detach()
        model(tokens, use_cache=False)
    for number, after in enumerate(states):
        for item, places in enumerate(kept[number]):
            out = torch.ones(LENGTH, dtype=torch.bool)
            out[places] = False
            assert out.any()
            assert torch.equal(after[item, out], before[item, out])
            assert not torch.equal(after[item, ~out], before[item, ~out])
        before = after


def test_ends_and_positions_with_labels_are_always_kept(model, tokens):
    labels = torch.full_like(tokens, -100)
    labels[0, 17] = tokens[0, 17]  # predicted by position 16, in the third block
    with apply_token_sparsity(model, config(share=0.1, loss_layers=1)) as sparsity:
        kept = recorded(sparsity)
        model(tokens, labels=labels, use_cache=False)
        for places in (*kept[0], *kept[1]):
            assert {*range(8), *range(40, 44)} <= set(places.tolist())
        assert set(range(16, 24)) <= set(kept[2][0].tolist())
        model(tokens, use_cache=False)
        assert kept[2].shape[1] == LENGTH  # nobody has told which positions bear a label
        assert sparsity.report.kept[2] > sparsity.report.kept[0]


def test_padding_is_never_kept_and_changes_nothing(model, tokens):
    short = tokens[:1, :30]
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    mask[0, :30] = 1
    mask[1] = 1
    padded = tokens.clone()
    padded[0, 30:] = 7
    rules = config(scores="attention", share=0.6)
    with apply_token_sparsity(model, rules) as sparsity:
        kept = recorded(sparsity)
        together = model(padded, attention_mask=mask, use_cache=False).logits
        first, second = kept[0]
        longer = model(tokens[1:], use_cache=False).logits
    torch.testing.assert_close(together[1], longer[0])
    assert len(second) == 28  # four of six blocks, the last of which is short
    # the other keeps two of its four blocks, and is filled up by real tokens as far as there are some
    assert {*range(8), *range(24, 30)} <= set(first.tolist())
    with apply_token_sparsity(model, config(share=1.0)):
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[0, :30], model(short).logits[0])


def test_left_padding_moves_the_first_block_that_is_kept(model):
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, :16] = 0
    with apply_token_sparsity(model, config(share=0.01)) as sparsity:
        kept = recorded(sparsity)
        model(torch.ones(1, LENGTH, dtype=torch.long), attention_mask=mask, use_cache=False)
    assert kept[0].tolist() == [[*range(16, 24), *range(40, 44)]]


def test_scores_are_the_attention_that_a_block_receives():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 20, 8, generator=generator).double()
    k, v = torch.randn(2, 2, 2, 20, 8, generator=generator).double()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 13:] = False
    links = torch.ones(20, 20, dtype=torch.bool).tril() & real[:, None, None, :]
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~links, float("-inf"))
    shares = (scores.softmax(-1) * real[:, None, :, None]).mean(1)
    call = AttentionCall(0, q, k, v, 8**-0.5)
    for item, blocks in ((0, 5), (1, 4)):
        n = int(real[item].sum())
        edges = [(b * 4, min(b * 4 + 4, n)) for b in range(blocks)]
        mean = [shares[item, :, a:z].sum() / (n - a) * blocks for a, z in edges]
        best = [shares[item].sum(0)[a:z].max() * 4 / (n - a) * blocks for a, z in edges]
        own = [shares[item, a:z, a:z].sum() / (z - a) * (b + 1) for b, (a, z) in enumerate(edges)]
        for expected, options in ((mean, {}), (best, {"pooled": "max"}), (own, {"causal": True})):
            found = attention_received(call, 4, real, **options)[item, :blocks]
            torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnknownNameError, match="mean"):
        attention_received(call, 4, real, pooled="men")


def test_memory_shrinks_with_the_share_but_not_when_keys_alone_are_skipped():
    model = llama(4, hidden_size=64, intermediate_size=192).float()
    tokens = torch.randint(50, (1, 512), generator=torch.Generator().manual_seed(1))

    def saved(**options):
        with saved_activations(model.model) as found:
            held = model.model(tokens, use_cache=False, **options).last_hidden_state
        assert held.requires_grad
        return found.bytes

    dense = saved()
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
    masked = saved(attention_mask=mask)
    mask[..., 32:256] = False
    assert saved(attention_mask=mask) == masked  # the shadow: every token is still a query
    with apply_token_sparsity(model, config(block=32, permutation_free=False)) as sparsity:
        sparse = saved()
        assert sparsity.report.share == pytest.approx(0.5)
    assert 0.48 < sparse / dense < 0.56


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, tokens, reentrant):
    def run():
        with apply_token_sparsity(model, config(scores="recent")):
            embeddings = model.model.embed_tokens(tokens)
            return gradients(model, model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss)

    wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = run()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_lora_trains_on_few_tokens(tokens):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM")).train()
    names = set(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    with apply_token_sparsity(model, config(scores="attention", loss_layers=1)) as sparsity:
        for _ in range(12):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sparsity.report.kept == [pytest.approx(0.5, abs=0.1)] * 2 + [1.0]
        assert set(model.state_dict()) == names
    assert losses[-1] < losses[0] - 0.02


def test_evaluation_and_generation_keep_all_tokens(model, tokens):
    model.eval()
    plain = model(tokens).logits
    written = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with apply_token_sparsity(model, config()) as sparsity:
        assert torch.equal(model(tokens).logits, plain)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), written)
        with always(sparsity):
            assert not torch.equal(model(tokens, use_cache=False).logits, plain)
            with pytest.raises(ConfigurationError, match="use_cache=False"):
                model(tokens, use_cache=True)
    assert torch.equal(model(tokens).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_cache_that_training_would_fill_is_left_empty(model, tokens):
    with apply_token_sparsity(model, config()):
        output = model(tokens, use_cache=True)
    assert output.past_key_values.get_seq_length() == 0


def test_causal_decisions_do_not_look_ahead(tokens):
    model = llama(initializer_range=0.5)  # that it attends to something
    later = tokens.clone()
    later[:, 24:] = (later[:, 24:] + 11) % 50
    model.eval()
    one, other = tokens[:1], later[:1]
    for causal, threshold in ((True, 0.7), (False, 0.9)):
        rules = config(scores="attention", thresholds=(threshold,) * 3, causal=causal)
        with apply_token_sparsity(model, rules) as sparsity:
            with always(sparsity), torch.no_grad():
                first, second = model(one, use_cache=False).logits, model(other, use_cache=False).logits
            assert 0.3 < sparsity.report.share < 1
        same = torch.allclose(first[:, :24], second[:, :24], atol=1e-10)
        assert same == causal


@pytest.mark.parametrize("scores", ["attention", "predicted"])
@pytest.mark.parametrize("first", [0, 1])
def test_causal_decisions_do_not_depend_on_how_much_follows(scores, first):
    model = llama(initializer_range=0.5).eval()
    torch.manual_seed(0)
    predictors = [BlockPredictor(32, 4, seed=layer) for layer in range(3)]
    for predictor in predictors:
        predictor.distance.data.normal_()
    rules = config(scores=scores, thresholds=(0.7,) * 3, causal=True, keep_first=first, keep_last=0)
    tokens = torch.randint(50, (1, 160))
    with apply_token_sparsity(model, rules, predictors) as sparsity, always(sparsity), torch.no_grad():
        alone = model(tokens[:, :48], use_cache=False).logits
        assert 0.3 < sparsity.report.share < 1
        for length in (80, 160):
            torch.testing.assert_close(model(tokens[:, :length], use_cache=False).logits[:, :48], alone)


def planted(count=40, blocks=12, width=16, seed=0):
    """Blocks that draw attention by one direction of their embedding."""
    from gossamer.attention.lemo_predictors import BlockObservation

    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        pooled = torch.randn(1, blocks, width, generator=generator)
        later = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
        shares = (1.5 * pooled[:, None, :, 0]).expand(1, blocks, -1).masked_fill(later, float("-inf")).softmax(-1)
        found.append(BlockObservation(pooled, shares.sum(1) / torch.arange(blocks, 0, -1) * blocks))
    return found


@pytest.mark.parametrize("target", ["log", "bit"])
def test_a_predictor_learns_and_holds_at_twice_the_length(target):
    from gossamer.attention.lemo_predictors import train_predictor

    predictor = train_predictor(planted(), 4, target=target, steps=500)
    assert not any(p.requires_grad for p in predictor.parameters())
    longer = planted(count=10, blocks=24, seed=1)
    untrained = BlockPredictor(16, 4)
    assert recall_of_kept([predictor], [longer], 0.5)[0] > 0.85
    assert recall_of_kept([untrained], [longer], 0.5)[0] < 0.75
    narrow = predictor.narrowed(2)
    assert narrow.rank == 2
    assert recall_of_kept([narrow], [longer], 0.5)[0] > 0.75
    with torch.no_grad():
        learnt, not_yet = (predictor_loss(p, longer[0], 0.5, target) for p in (predictor, untrained))
    assert learnt < not_yet


def test_predictors_are_fitted_to_what_the_model_attends_to(model, tokens):
    rules = TokenSparseConfig(block=BLOCK, predictor_rank=4, share=0.5)
    observed = observe_blocks(model, [tokens], BLOCK, progress=False)
    assert [len(layer) for layer in observed] == [2, 2, 2]
    assert observed[0][0].pooled.shape == (1, 6, 32)
    frozen = copy.deepcopy(model.state_dict())
    predictors = fit_predictors(model, [tokens], rules, progress=False, steps=150)
    assert all(torch.equal(frozen[name], value) for name, value in model.state_dict().items())
    assert min(recall_of_kept(predictors, observed, 0.5)) > 0.6
    with rules.wrap(model, predictors) as sparsity:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert 0.4 < sparsity.report.kept[0] < 0.7
    assert model.training


def test_thresholds_keep_the_loss_within_its_tolerance(model, tokens):
    dense = mean_loss(model, [tokens])
    start = config(scores="attention", loss_layers=1)
    narrow = search_thresholds(model, [tokens], 1e-5, start, steps=4, progress=False)
    wide = search_thresholds(model, [tokens], 0.05, start, steps=4, progress=False)
    assert sum(narrow.thresholds) < sum(wide.thresholds)
    with apply_token_sparsity(model, wide) as sparsity, always(sparsity):
        assert mean_loss(model, [tokens]) <= dense * 1.05
        assert sparsity.report.share < 1


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("segment", [7, 64])
def test_the_loss_by_segments_is_that_of_the_whole(model, tokens, frozen, segment):
    hidden = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    head = nn.Linear(32, 50).double().requires_grad_(not frozen)
    labels = tokens.clone()
    labels[0, 5:20] = -100
    whole = nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    parameters = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    wanted = torch.autograd.grad(whole * 3, parameters)
    loss = SegmentedLMLoss(segment)(hidden, head, labels)
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), abs=1e-6)
    for found, expected in zip(torch.autograd.grad(loss * 3, parameters), wanted):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_model_computes_its_own_loss_by_segments_without_logits(tokens):
    model = llama(1, vocab_size=1000)
    plain = model(tokens, labels=tokens, use_cache=False)
    wanted = gradients(model, plain.loss)
    with saved_activations(model) as dense:
        held = model(tokens, labels=tokens, use_cache=False)
    with SegmentedLMLoss(8).installed(model):
        with saved_activations(model) as segmented:
            output = model(tokens, labels=tokens, use_cache=False)
        found = gradients(model, output.loss)
        assert output.logits is None
        model.eval()
        torch.testing.assert_close(model(tokens).logits, plain.logits)
        model.train()
    assert segmented.bytes < dense.bytes
    assert held.loss.requires_grad
    assert float(output.loss.detach()) == pytest.approx(float(plain.loss.detach()), abs=1e-6)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-8)
    assert model(tokens, labels=tokens).logits is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_layers_take_segments(model, tokens, recompute):
    wanted = gradients(model, model(tokens, labels=tokens, use_cache=False).loss)
    with saved_activations(model) as whole:
        held = model(tokens, use_cache=False).logits
    with in_segments([layer.mlp for layer in model.model.layers], 10, recompute):
        found = gradients(model, model(tokens, labels=tokens, use_cache=False).loss)
        with saved_activations(model) as segmented:
            again = model(tokens, use_cache=False).logits
    torch.testing.assert_close(held, again)
    assert (segmented.bytes < 0.8 * whole.bytes) == recompute
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_trainer_anneals_what_is_kept(tmp_path, tokens):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, kept = llama().float(), []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            kept.append(logs["tokens_kept"])

    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no"
    )
    with apply_token_sparsity(model, config(share=1.0)) as sparsity:
        callback = keep_share_callback(sparsity, Linear(final=0.25, end=3, initial=1.0))
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, Reader()])
        trainer.train()
        assert sparsity.config.share == 0.25
    assert kept[0] == 1.0
    assert kept[-1] < kept[1] < 1.0


@pytest.mark.parametrize("place", ["mapped", "host"])
def test_activations_are_carried_away_and_back(model, tokens, place, tmp_path):
    with apply_token_sparsity(model, config(scores="recent")) as sparsity:
        wanted = gradients(model, model(tokens, labels=tokens, use_cache=False).loss)
        with saved_activations(model) as held, offloaded_activations(model, place, 4096, tmp_path) as sparse:
            loss = model(tokens, labels=tokens, use_cache=False).loss
            left = held.bytes
        found = gradients(model, loss)
        sparsity.when = "never"
        with offloaded_activations(model, place, 4096, tmp_path) as dense:
            model(tokens, labels=tokens, use_cache=False)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert left == 0  # the hooks inside are asked, and have taken all that is large
    assert 0 < sparse["bytes"] < 0.75 * dense["bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", [False, True])
def test_channels_are_left_out_as_well(tokens, lora):
    model = llama()
    if lora:
        peft = pytest.importorskip("peft")
        rules = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, rules).train()
    mlp = decoder_stack(model).blocks[next(iter(decoder_stack(model).blocks))].mlp
    inputs = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(3)).double()
    down = mlp.down_proj.base_layer if lora else mlp.down_proj
    middle = []
    handle = down.register_forward_pre_hook(lambda module, args: middle.append(args[0].detach()))
    mlp(inputs)
    handle.remove()
    with saved_activations(model) as whole:
        held = mlp(inputs)
    with channel_sparsity(model, 0.25, every=4) as chosen:
        with saved_activations(model) as part:
            found = mlp(inputs)
            assert part.bytes < 0.6 * whole.bytes or lora
        channels = chosen[0]
        strength = middle[0][:, ::4].abs().mean((0, 1)) * down.weight.norm(dim=0)
        assert channels.tolist() == sorted(strength.topk(12).indices.tolist())
        few = torch.zeros(48).double()
        few[channels] = 1
        handle = mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * few,))
        model.eval()
        torch.testing.assert_close(found, mlp(inputs))  # in evaluation mode all channels are there
        handle.remove()
        model.train()
        found.sum().backward()
    trained = [p for p in mlp.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    assert not torch.allclose(held, found)
    assert "forward" not in mlp.__dict__


def test_attention_of_texts_that_share_a_row_is_refused_as_such(model, tokens):
    places = torch.arange(tokens.shape[1]) % 20
    model.train()
    with apply_token_sparsity(model, config(scores="attention")), pytest.raises(ModelError, match="texts that share a"):
        model(tokens, position_ids=places.expand_as(tokens), use_cache=False)


def test_short_sequences_are_kept_whole(model):
    with apply_token_sparsity(model, config()) as sparsity:
        plain = model(torch.arange(5)[None], use_cache=False).logits
        assert sparsity.report.share == 1
    assert torch.equal(plain, model(torch.arange(5)[None], use_cache=False).logits)


def test_something_is_kept_even_where_nothing_must_be(model, tokens):
    rules = config(keep_first=0, keep_last=0, thresholds=(1e9,) * 3)
    with apply_token_sparsity(model, rules) as sparsity:
        model(tokens, use_cache=False)
        assert all(0 < share < 0.25 for share in sparsity.report.kept)
        assert "tokens kept" in str(sparsity.report)


def test_bad_input_is_named(model, tokens):
    assert method("lemo").factory is TokenSparseConfig
    for options, words in (
        ({"block": 0}, "block is 0"),
        ({"share": 0}, "share is 0"),
        ({"share": 1.5}, "share is 1.5"),
        *(({"share": share}, f"share is {share!r}") for share in (True, None, "a")),
        ({"keep_last": -1}, "keep_last is -1"),
        ({"thresholds": (float("nan"),)}, "thresholds are"),
        ({"causal": True}, "need thresholds"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            TokenSparseConfig(**options)
    with pytest.raises(UnknownNameError, match="predicted"):
        TokenSparseConfig(scores="predictd")
    with pytest.raises(CalibrationError, match="fit_predictors"):
        apply_token_sparsity(model)
    with pytest.raises(ConfigurationError, match="2 thresholds for 3 layers"):
        apply_token_sparsity(model, config(thresholds=(0.1, 0.1)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ModelError, match="one stack"):
        apply_token_sparsity(nn.Linear(3, 3), config())
    with pytest.raises(CalibrationError, match="all labels"):
        SegmentedLMLoss()(torch.ones(1, 3, 2), nn.Linear(2, 4), torch.full((1, 3), -100))
    with pytest.raises(CalibrationError, match="one label a position"):
        SegmentedLMLoss()(torch.ones(1, 3, 2), nn.Linear(2, 4), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="segment is 0"):
        SegmentedLMLoss(0)
    with pytest.raises(CalibrationError, match="no data"):
        search_thresholds(model, [], 0.1, config(scores="attention"))
    with pytest.raises(ConfigurationError, match="tolerance is 0"):
        search_thresholds(model, [tokens], 0, config(scores="attention"))
    with pytest.raises(ConfigurationError, match="predictor_rank is 64"):
        BlockPredictor(32, 64)
    with pytest.raises(ConfigurationError, match="share is 0"), channel_sparsity(model, 0):
        pass
    with pytest.raises(ModelError, match="width, 32"), channel_sparsity(llama(intermediate_size=32)):
        pass
    with pytest.raises(UnknownNameError, match="mapped"), offloaded_activations(model, "maped"):
        pass
