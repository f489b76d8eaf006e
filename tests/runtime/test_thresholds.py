"""Compiled steps with thresholds of activations write what the model writes when they are set to zero by hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.channels import ChannelMatrix
from gossamer.kernels.native import available, instruction_sets, using
from gossamer.runtime.choice import Choices
from gossamer.runtime.compress import compress
from gossamer.runtime.engine import Engine
from gossamer.runtime.generation import generate
from gossamer.runtime.program import DecodeProgram, relative_difference
from gossamer.runtime.thresholds import Thresholds, lay_out_

pytestmark = pytest.mark.skipif(not available(), reason="there are no compiled kernels")

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=9)),
}


def make(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def calibrate(model: nn.Module, sparsity: float, gates: bool, prompt: bool = True) -> Thresholds:
    """Thresholds that silence this share of a text's activations, other ones for each channel."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            handles.append(module.register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0]})))
        if gates and name.endswith("act_fn"):
            handles.append(module.register_forward_hook(lambda _, a, out, name=name: seen.update({name: out})))
    model(text(60, 3)[None])
    for handle in handles:
        handle.remove()
    # not exactly a size that occurs, for rounding would decide on it
    found = {name: 1.0007 * x.flatten(0, -2).abs().float().quantile(sparsity, 0) for name, x in seen.items()}
    inputs = {name: t for name, t in found.items() if not name.endswith("act_fn")}
    if gates:
        inputs = {name: t for name, t in inputs.items() if "up_proj" not in name and "down_proj" not in name}
    return Thresholds(inputs, {n.removesuffix(".act_fn"): t for n, t in found.items() if n.endswith("act_fn")}, prompt)


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hooked_logits(model: nn.Module, thresholds: Thresholds, tokens: Tensor) -> Tensor:
    with thresholds.holding(model):
        return model(tokens[None], use_cache=False).logits[0].float()


def read(program: DecodeProgram, tokens: Tensor, at_once: int, **options: object) -> Tensor:
    session = program.session(len(tokens))
    found = [session.feed(tokens[:at_once], every=True, **options)]
    found += [session.feed(tokens[at : at + 1], **options).clone()[None] for at in range(at_once, len(tokens))]
    return torch.cat(found)


@pytest.mark.parametrize("gates", [False, True], ids=["inputs", "gates"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_with_hooks(name, gates):
    model, tokens = make(name), text(70)
    plain = model(tokens[None]).logits[0].detach()
    thresholds = calibrate(model, 0.5, gates)
    expected = hooked_logits(model, thresholds, tokens)
    assert relative_difference(plain, expected) > 0.05  # they change something
    lay_out_(model, thresholds)
    program = DecodeProgram.of(model, 80, thresholds=thresholds)
    for at_once in (1, 5, 70):
        assert relative_difference(read(program, tokens, at_once), expected) < 1e-4
    assert relative_difference(read(program, tokens, 70, sparse=False), plain) < 1e-4
    assert relative_difference(model(tokens[None]).logits[0].detach(), plain) < 1e-5  # which can be used as before


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("gates", [False, True], ids=["inputs", "gates"])
def test_tokens_are_those_of_the_model_with_hooks(isa, gates):
    model = make()
    thresholds = calibrate(model, 0.6, gates)
    with thresholds.holding(model):
        expected = generate(model, text(7).tolist(), 40).tokens
    with using(isa):
        program = DecodeProgram.of(model, 64, thresholds=thresholds)
        assert generate(program, text(7).tolist(), 40).tokens == expected
        for at_once in (1, 9):
            one, *others = (read(program, text(30), at_once, threads=threads) for threads in (1, 2, 3, 7))
            assert all(torch.equal(one, other) for other in others)


def test_a_prompt_may_be_read_densely():
    model = make()
    thresholds = calibrate(model, 0.6, True, prompt=False)
    with thresholds.holding(model):
        expected = generate(model, text(7).tolist(), 30).tokens
    program = DecodeProgram.of(model, 64, thresholds=thresholds)
    assert generate(program, text(7).tolist(), 30).tokens == expected
    plain = make()(text(7)[None]).logits[0].detach()
    assert relative_difference(program.session().feed(text(7), every=True), plain) < 1e-4


def test_a_weight_is_kept_once():
    model = make()
    thresholds = calibrate(model, 0.5, True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = lay_out_(model, thresholds)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    program = DecodeProgram.of(model, 64, thresholds=thresholds)
    stored = {tensor.data_ptr() for weight in program._kept[-3] for tensor in weight.tensors if tensor is not None}
    assert {model.get_submodule(name).weight.data_ptr() for name in names} <= stored
    assert program.nbytes <= sum(p.nbytes for p in model.parameters()) + 512 * len(names)


def test_dense_share_counts_what_is_read_in_any_case():
    model = make()
    inputs, gates = calibrate(model, 0.5, False), calibrate(model, 0.5, True)
    head = model.lm_head.weight.nbytes
    layers = sum(m.weight.nbytes for m in model.model.modules() if isinstance(m, nn.Linear))
    assert DecodeProgram.of(model, 64).dense_share == 1
    share = DecodeProgram.of(model, 64, thresholds=inputs).dense_share
    assert share == pytest.approx(head / (head + layers), rel=0.06)
    only = Thresholds({}, gates.gates)
    fired = sum(m.weight.nbytes for n, m in model.named_modules() if n.endswith(("up_proj", "down_proj")))
    share = DecodeProgram.of(model, 64, thresholds=only).dense_share
    assert share == pytest.approx(1 - fired / (head + layers), rel=0.06)


@pytest.mark.parametrize("format", ["exact", "bfloat16", "int8", "int4"])
def test_an_engine_runs_thresholds_in_every_format(format, tmp_path: Path):
    model = make()
    thresholds = calibrate(model, 0.5, True)
    choices = Choices(tmp_path / "choices.json", lambda case, storages: {s: float(i) for i, s in enumerate(storages)})
    engine = Engine.of(
        model, format=format, head="keep", context=64, choices=choices, progress=False, thresholds=thresholds
    )
    assert engine.program is not None, engine.reason
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear) == (format == "exact")
    expected = hooked_logits(model, thresholds, text(20))
    found = read(engine.program, text(20), 4)
    assert relative_difference(found, expected) < (1e-4 if format in ("exact", "bfloat16") else 0.2)


def test_thresholds_hold_where_no_program_runs_the_model():
    model = make()
    thresholds = calibrate(model, 0.6, False)
    engine = Engine.of(model, format="off", thresholds=thresholds)
    with engine._silencing():
        found = model(text(9)[None]).logits[0].detach()
    assert relative_difference(found, hooked_logits(make(), thresholds, text(9))) < 1e-6
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path):
    model = make()
    thresholds = calibrate(model, 0.5, True)
    name = next(iter(thresholds.inputs))
    for wrong, match in (
        (Thresholds({"model.layers.9.mlp.up_proj": torch.zeros(48)}), "layers.9"),
        (Thresholds({}, {"model.layers.0.self_attn": torch.zeros(72)}), "no gated feed-forward"),
        (Thresholds({name: torch.zeros(49)}), "49"),
        (Thresholds({name: -torch.ones(48)}), "negative"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            DecodeProgram.of(model, 64, thresholds=wrong)
        with pytest.raises(ConfigurationError, match=match):
            Engine.of(model, thresholds=wrong)
    choices = Choices(tmp_path / "choices.json", lambda case, storages: {s: -float(i) for i, s in enumerate(storages)})
    compress(model, head="keep", choices=choices, progress=False)
    with pytest.raises(ModelError, match="keep it dense"):
        DecodeProgram.of(model, 64, thresholds=thresholds)


def test_layers_of_one_input_may_have_different_thresholds():
    model = make()
    thresholds = Thresholds({"model.layers.0.self_attn.q_proj": torch.full((48,), 0.7)})
    program = DecodeProgram.of(model, 64, thresholds=thresholds)
    assert relative_difference(read(program, text(12), 3), hooked_logits(model, thresholds, text(12))) < 1e-5
    assert ChannelMatrix.of_view(model.model.layers[0].self_attn.q_proj.weight) is None  # it was copied
