"""Rows of kept tokens, read and written where they lie: the same as with copies, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from gossamer.attention import token_sparse_gradients
from gossamer.attention.lemo import TokenSparseConfig, always, apply_token_sparsity
from gossamer.attention.token_sparse_layers import token_index
from gossamer.attention.token_sparse_rows import KeptRows, WaitingProduct, norm_epsilon, put_back
from gossamer.errors import ModelError
from gossamer.kernels import native
from gossamer.measure.saved_activations import saved_activations

LENGTH, BLOCK = 44, 8
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def causal(config: type, attention: str = "sdpa", **changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**SHAPE, **changes}), attn_implementation=attention)
    for parameter in model.parameters():  # gains and biases too
        nn.init.normal_(parameter, std=0.2)
        if parameter.ndim == 1:
            parameter.data += 1
    return model.double().train()


def llama(**changes):
    model = causal(transformers.LlamaConfig, **changes)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            exact = nn.RMSNorm(model.config.hidden_size, 1e-6)
            exact.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, exact.double())  # the model's own rounds to float32
    return model


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def config(in_place: bool = True, **changes):
    rules = {"block": BLOCK, "scores": "random", "share": 0.5, "loss_layers": 0, "permutation_free": in_place}
    return TokenSparseConfig(**{**rules, **changes})


def run(model, tokens, in_place, **options):
    """Logits and gradients."""
    model.zero_grad()
    with apply_token_sparsity(model, config(in_place)):
        output = model(input_ids=tokens, labels=tokens, use_cache=False, **options)
        output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, **tolerance):
    torch.testing.assert_close(found[0], wanted[0], **tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(
            gradient, wanted[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def stored(monkeypatch):
    """Products that were added to the residual as they were stored."""
    count, before = [], token_sparse_gradients.row_product

    def counted(*arguments, **options):
        if options.get("add") and not options.get("right_turned"):
            count.append(arguments)
        return before(*arguments, **options)

    monkeypatch.setattr(token_sparse_gradients, "row_product", counted)
    return count


@pytest.mark.parametrize("adapted", ["nothing", "attention", "all-linear"])
def test_values_and_gradients_are_those_of_copies(tokens, adapted, stored):
    model = llama(attention_bias=True)
    if adapted != "nothing":
        peft = pytest.importorskip("peft")
        targets = "all-linear" if adapted == "all-linear" else None
        rules = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets)
        model = peft.get_peft_model(model, rules).double().train()
    wanted = run(model, tokens, False)
    assert not stored
    found = run(model, tokens, True)
    assert len(stored) == 6  # two branches of three layers
    assert_same(found, wanted)


def test_a_masked_layer_has_the_same_gradients(tokens):
    """The reference runs on all tokens: what is left out is hidden from attention, and keeps what it had."""
    model = llama()
    reference = copy.deepcopy(model)
    kept = {}
    with apply_token_sparsity(model, config()) as sparsity:
        choose = sparsity._layers.choose

        def note(call):
            chosen = choose(call)
            kept[call.layer] = token_index(*chosen)
            return chosen

        sparsity._layers.choose = note
        logits = model(tokens, use_cache=False).logits
        logits.square().mean().backward()
    hidden = reference.model.embed_tokens(tokens)
    embeddings = reference.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    for number, layer in enumerate(reference.model.layers):
        there = torch.zeros(2, LENGTH, dtype=torch.bool).scatter_(1, kept[number], True)
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & there[:, None, None, :]
        seen = seen | torch.eye(LENGTH, dtype=torch.bool)  # what is left out must see something to stay finite
        out = layer(hidden, attention_mask=seen, position_embeddings=embeddings)
        hidden = torch.where(there[..., None], out, hidden)
    expected = reference.lm_head(reference.model.norm(hidden))
    expected.square().mean().backward()
    torch.testing.assert_close(logits, expected)
    for (name, one), (_, other) in zip(model.named_parameters(), reference.named_parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_layers_leave_their_inputs_alone(tokens):
    model = llama()
    with apply_token_sparsity(model, config(False)):
        wanted = model(tokens, use_cache=False, output_hidden_states=True).hidden_states[1:]
    with apply_token_sparsity(model, config()):
        found = model(tokens, use_cache=False, output_hidden_states=True).hidden_states[1:]
        sum(state.square().mean() for state in found).backward()  # gradients meet at every layer
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    sum(state.square().mean() for state in wanted).backward()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient, model.model.embed_tokens.weight.grad)
    before, after = found[0], found[1]
    same = (before == after).all(-1)
    assert 0.3 < same.float().mean() < 0.7  # eliminated tokens leave a layer as they came


def test_a_step_in_float32_is_the_same_with_compiled_kernels(tokens):
    if not native.offers("row_product"):
        pytest.skip("the compiled kernels are older than products of rows")
    model = llama().float()
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 0.1)):
        model = model.to(dtype)
        found, wanted = run(model, tokens, True), run(model, tokens, False)
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
            apart = (found[1][name] - wanted[1][name]).double().norm() / wanted[1][name].double().norm()
            assert float(apart) < tolerance


def test_norms_keep_their_results_only():
    peft = pytest.importorskip("peft")
    model = llama(hidden_size=64).float()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).train()
    tokens = torch.randint(1, 50, (1, 256), generator=torch.Generator().manual_seed(2))

    def held(in_place):
        with apply_token_sparsity(model, config(in_place)), saved_activations(model) as saved:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            count = saved.bytes
        del loss
        return count

    rows = 128 * 64 * 4  # of the kept tokens, in float32
    # what adapters read is kept anyway, so that one matrix a layer is saved; the first needs no gradient of its inputs
    assert held(False) - held(True) == pytest.approx(2 * rows, rel=0.05)


OTHERS = {
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 4096, "query_pre_attn_scalar": 8},
    "GPTNeoX": {},
    "Olmo2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi": {},
    "Cohere": {},
    "StableLm": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_give_what_copies_give(tokens, name):
    dropouts = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0}
    model = causal(getattr(transformers, f"{name}Config"), "eager", **OTHERS[name], **dropouts)
    assert_same(run(model, tokens, True), run(model, tokens, False), rtol=1e-4, atol=1e-6)


def test_checkpointing_hooks_and_autocast_get_tensors(tokens, stored):
    model = llama()
    wanted = run(model, tokens, False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, tokens, True), wanted)
    model.gradient_checkpointing_disable()
    assert not stored
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    assert_same(run(model, tokens, True), wanted)
    assert seen == [torch.Tensor] * 3
    assert len(stored) == 3  # those of attention
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(model, tokens, True), run(model, tokens, False)
    assert_same(found, expected)


def test_evaluation_reads_rows_in_place_too(tokens, stored):
    model = llama().eval()
    results = []
    for in_place in (False, True):
        with apply_token_sparsity(model, config(in_place)) as sparsity, always(sparsity), torch.no_grad():
            results.append(model(tokens, use_cache=False).logits)
    assert stored
    torch.testing.assert_close(*results)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_interrupted_layer_forgets_what_it_was_given(tokens, monkeypatch):
    model = llama()
    wanted = model(tokens, use_cache=False).logits
    with apply_token_sparsity(model, config()) as sparsity:
        monkeypatch.setattr(model.model.layers[1].mlp.act_fn, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens, use_cache=False)
        monkeypatch.undo()
        sparsity.when = "never"
        torch.testing.assert_close(model(tokens, use_cache=False).logits, wanted)


def test_stand_ins_behave_like_tensors():
    whole = torch.arange(24.0).view(2, 4, 3)
    flat = torch.tensor([0, 2, 5, 6])
    rows, expected = KeptRows(whole, flat), whole.view(-1, 3)[flat].view(2, 2, 3)
    assert (rows.shape, rows.dtype, rows.device) == (expected.shape, expected.dtype, expected.device)
    weight, bias = torch.randn(3, 3), torch.randn(3)
    waiting = WaitingProduct(expected, weight, bias)
    product = nn.functional.linear(expected, weight, bias)
    for stand_in, tensor in ((rows, expected), (waiting, product)):
        for apply in (
            lambda t: t * 2,
            lambda t: 2 - t,
            lambda t: t @ weight,
            lambda t: -t[0],
            lambda t: t / 3 + t,
            lambda t: torch.cat([t, t]),
            lambda t: t.double(),
            lambda t: t.to(torch.float64),
            lambda t: torch.ones_like(expected) - t,
            lambda t: nn.functional.linear(t, weight, bias),
        ):
            found = apply(stand_in)
            found = found.tensor() if isinstance(found, KeptRows) else found
            torch.testing.assert_close(found, apply(tensor))
    assert rows.to(torch.float32) is rows
    with pytest.raises(RuntimeError, match="dtype"):
        nn.functional.linear(rows, weight.double())
    for total in (rows + waiting, waiting + rows, product + rows, rows + (waiting + expected) - expected):
        found = total.tensor() if isinstance(total, KeptRows) else total
        torch.testing.assert_close(found, expected + product)
    assert torch.equal(whole, torch.arange(24.0).view(2, 4, 3))
    torch.testing.assert_close(
        put_back(rows + product, whole, flat), whole.view(-1, 3).index_add(0, flat, product.view(-1, 3)).view(2, 4, 3)
    )
    torch.testing.assert_close(
        put_back(product, whole, flat), whole.view(-1, 3).index_copy(0, flat, product.view(-1, 3)).view(2, 4, 3)
    )


def test_rows_that_are_gone_are_not_read():
    rows = KeptRows(torch.zeros(1, 4, 3), torch.tensor([1, 2]))
    once = rows + torch.ones(1, 2, 3)
    once + torch.ones(1, 2, 3)
    with pytest.raises(ModelError, match="permutation_free=False"):
        once + torch.ones(1, 2, 3)
    assert float(rows.tensor().sum()) == 0


def test_norms_are_told_by_what_they_compute():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    gain = torch.randn(8, generator=torch.Generator().manual_seed(0))
    plain, other = LlamaRMSNorm(8, 1e-3), GemmaRMSNorm(8, 1e-3)
    for norm in (plain, other):
        norm.weight.data.copy_(gain)
    assert norm_epsilon(plain) == 1e-3
    assert norm_epsilon(plain.bfloat16()) == 1e-3
    assert norm_epsilon(nn.RMSNorm(8, 1e-4)) == 1e-4
    for module in (other, nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()):
        assert norm_epsilon(module) is None
