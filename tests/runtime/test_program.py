"""Whole decoding steps in compiled code agree with the models they were read off."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.blocks import CsrMatrix, FourRowMatrix, SixteenRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.groups import GroupMatrix
from gossamer.kernels.matrix import round_inputs
from gossamer.kernels.native import available, instruction_sets, using
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix
from gossamer.runtime import program as program_module
from gossamer.runtime.program import DecodeProgram, relative_difference

pytestmark = pytest.mark.skipif(not available(), reason="there are no compiled kernels")

VOCABULARY = 199
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with tied head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama with scaled rotations": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama with seven queries to a key": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1})
    ),
    "llama with odd sizes": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 36, "intermediate_size": 71})
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=9, attn_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=ALTERNATING, final_logit_softcapping=5.0)
    ),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A random model whose norms, biases and all else matter."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens[None], use_cache=False).logits[0].float()


def read(program: DecodeProgram, tokens: Tensor, at_once: int, **options: object) -> Tensor:
    """Logits of all tokens: the first ones read together, the others one by one."""
    session = program.session(len(tokens), dtype=options.pop("dtype", torch.float32))
    found = [session.feed(tokens[:at_once], every=True, **options)]
    found += [session.feed(tokens[at : at + 1], **options).clone()[None] for at in range(at_once, len(tokens))]
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("at_once", [1, 2, 5, 70])
def test_program_computes_the_logits_of_the_model(name: str, at_once: int) -> None:
    model, tokens = make(name), text(at_once + 20)
    found = read(DecodeProgram.of(model, 128), tokens, at_once)
    # float32 on both sides: some hundred roundings
    assert relative_difference(found, expected_logits(model, tokens)) < 2e-5


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_every_instruction_set_agrees(isa: str, name: str) -> None:
    model, tokens = make(name), text(90)
    program = DecodeProgram.of(model, 128)
    with using(isa):
        found = read(program, tokens, 70)
    assert relative_difference(found, expected_logits(model, tokens)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama with seven queries to a key", "gemma3"])
def test_result_does_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    program, tokens = DecodeProgram.of(make(name), 256), text(150)
    one, two, three = (read(program, tokens, 70, threads=threads, dtype=dtype) for threads in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_program_inside_a_parallel_region_of_one_thread_gives_the_same() -> None:
    program, tokens = DecodeProgram.of(make("llama"), 64), text(20)
    before = torch.get_num_threads()
    expected = read(program, tokens, 5, threads=2)
    torch.set_num_threads(1)
    try:
        assert torch.equal(read(program, tokens, 5), expected)
    finally:
        torch.set_num_threads(before)


def test_reading_at_once_and_token_by_token_agree() -> None:
    program, tokens = DecodeProgram.of(make("gemma3"), 128), text(100)
    assert relative_difference(read(program, tokens, 100), read(program, tokens, 1)) < 1e-5


def test_bfloat16_cache_is_half_as_large_and_rounds_only_keys_and_values() -> None:
    model, tokens = make("llama"), text(100)
    program = DecodeProgram.of(model, 128)
    exact, rounded = read(program, tokens, 70), read(program, tokens, 70, dtype=torch.bfloat16)
    assert program.session(dtype=torch.bfloat16).nbytes * 2 == program.session().nbytes
    with torch.no_grad():
        expected = model(tokens[None], past_key_values=RoundedCache(), use_cache=True).logits[0]
    # a key that lies between two bfloat16 numbers may be rounded either way
    assert relative_difference(rounded, expected) < 1e-3 < relative_difference(rounded, exact)


def test_bfloat16_model_is_followed_within_its_own_rounding() -> None:
    model, tokens = make("llama").to(torch.bfloat16), text(40)
    program = DecodeProgram.of(model, 64)
    wide = make("llama")
    wide.load_state_dict(model.state_dict())
    wide.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()  # rounded by `to`, and in no state_dict
    # the program computes in float32, so it is closer to the float32 model of the same weights
    assert relative_difference(read(program, tokens, 20), expected_logits(wide, tokens)) < 2e-5


class RoundedCache(DynamicCache):
    """Keys and values in bfloat16, read as float32."""

    def update(self, keys: Tensor, values: Tensor, *rest: object, **options: object) -> tuple[Tensor, Tensor]:
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *rest, **options)


PACKS = {
    "dense int8": lambda weight: DenseMatrix.from_dense(weight, "int8"),
    "dense bfloat16": lambda weight: DenseMatrix.from_dense(weight.bfloat16()),
    "bitmask float32": lambda weight: BitmaskMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0)),
    "bitmask bfloat16": lambda weight: BitmaskMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0).bfloat16()),
    "bitmask float16": lambda weight: BitmaskMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0).half()),
    "bitmask int8": lambda weight: BitmaskMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0), "int8"),
    "csr bfloat16": lambda weight: CsrMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0).bfloat16()),
    "blocks of 4 in int8": lambda weight: FourRowMatrix.from_dense(weight, "int8"),
    "blocks of 16": lambda weight: SixteenRowMatrix.from_dense(weight * (torch.arange(weight.shape[1]) % 3 > 0)),
    "2:4": lambda weight: NMMatrix.from_dense(halved(weight)),
    "2:4 in int8": lambda weight: NMMatrix.from_dense(halved(weight), "int8"),
    "bitmask int4": lambda weight: BitmaskMatrix.from_dense(weight.masked_fill(weight.abs() < 0.2, 0), "int4"),
    "groups": lambda weight: GroupMatrix.from_dense(weight),
    "four bits": lambda weight: NibbleMatrix.from_dense(weight),
    "four bits without offsets": lambda weight: NibbleMatrix.from_dense(weight, 64, offsets=False),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", ["llama with tied head", "gemma3"])
def test_every_storage_computes_what_its_dense_weights_compute(pack: str, name: str) -> None:
    model, tokens = make(name), text(40)
    program = DecodeProgram.of(model, 64, lambda _, weight: PACKS[pack](weight))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                matrix = PACKS[pack](module.weight)
                module.weight.copy_(matrix.expand())
                if isinstance(matrix, NibbleMatrix):
                    module.forward = partial(nibble_product, matrix)
                elif matrix.rounds(1):
                    module.forward = partial(rounded_product, module.weight)
    # an input between two numbers of eight bits may be rounded either way
    bound = 1e-2 if pack.startswith(("four bits", "groups")) else 2e-5
    assert relative_difference(read(program, tokens, 20), expected_logits(model, tokens)) < bound


@pytest.mark.parametrize("pack", ["blocks of 16", "bitmask int8"])
def test_a_pool_that_grants_fewer_threads_than_were_asked_for_changes_nothing(pack: str) -> None:
    code = f"""
import torch
from test_program import PACKS, DecodeProgram, make, read, text

program = DecodeProgram.of(make("llama"), 32, lambda _, weight: PACKS[{pack!r}](weight))
assert torch.equal(read(program, text(20), 5, threads=3), read(program, text(20), 5, threads=1))
"""
    # a limit that OpenMP looks at when it is loaded
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent)


def halved(weight: Tensor) -> Tensor:
    return weight * NM(2, 4).select(weight.abs())


def rounded_product(weight: Tensor, x: Tensor) -> Tensor:
    return round_inputs(x.reshape(-1, x.shape[-1])).view(x.shape) @ weight.t()


def nibble_product(matrix: NibbleMatrix, x: Tensor) -> Tensor:
    """What compiled kernels compute: codes minus 8 meet rounded inputs, all else the inputs themselves."""
    dense = matrix.expand()
    middle = replace(matrix, words=torch.full_like(matrix.words, -0x77777778))
    offsets = 0 * dense if matrix.offsets is None else middle.expand()
    flat = x.reshape(-1, x.shape[-1])
    return (round_inputs(flat) @ (dense - offsets).t() + flat @ offsets.t()).view(*x.shape[:-1], -1)


def test_layers_may_have_different_numbers_of_heads_and_channels() -> None:
    model, tokens = make("llama"), text(40)
    attention, feedforward = model.model.layers[1].self_attn, model.model.layers[1].mlp
    narrow = nn.Linear(48, 32, bias=False), nn.Linear(32, 48, bias=False)
    attention.q_proj, attention.o_proj, attention.num_key_value_groups = *narrow, 1
    feedforward.gate_proj, feedforward.up_proj = nn.Linear(48, 23, bias=False), nn.Linear(48, 23, bias=False)
    feedforward.down_proj = nn.Linear(23, 48, bias=False)
    found = read(DecodeProgram.of(model, 64), tokens, 20)
    assert relative_difference(found, expected_logits(model, tokens)) < 2e-5


def test_best_is_the_first_of_the_largest_logits() -> None:
    session = DecodeProgram.of(make("llama"), 64).session()
    for token in text(10):
        logits = session.feed([int(token)])
        assert session.best == int(logits.argmax())


def test_truncated_session_goes_on_as_if_nothing_had_been() -> None:
    program, tokens = DecodeProgram.of(make("gemma3"), 64), text(30)
    session = program.session()
    session.feed(tokens)
    session.truncate(10)
    found = session.feed(tokens[10:], every=True)
    fresh = program.session()
    fresh.feed(tokens[:10])
    assert torch.equal(found, fresh.feed(tokens[10:], every=True))


def test_full_cache_is_refused_before_anything_is_written() -> None:
    session = DecodeProgram.of(make("llama"), 64).session(8)
    session.feed(text(7))
    with pytest.raises(ConfigurationError, match="7 tokens and 2 more do not fit into a cache for 8"):
        session.feed([1, 2])
    session.feed([1])
    with pytest.raises(ConfigurationError, match="8 tokens and 1 more"):
        session.feed([1])


@pytest.mark.parametrize(("tokens", "said"), [([], "at least one"), ([VOCABULARY], "outside"), ([-1], "outside")])
def test_impossible_tokens_are_refused(tokens: list[int], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        DecodeProgram.of(make("llama"), 64).session().feed(tokens)


def test_impossible_sessions_are_refused() -> None:
    program = DecodeProgram.of(make("llama"), 64)
    with pytest.raises(ConfigurationError, match="1 to 64"):
        program.session(65)
    with pytest.raises(ConfigurationError, match="float32 or bfloat16"):
        program.session(dtype=torch.float16)


def test_model_of_other_parts_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        DecodeProgram.of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)))


def test_rotations_that_change_with_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match="dynamic"):
        DecodeProgram.of(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval())


def test_layer_with_an_unknown_part_is_refused() -> None:
    model = make("llama")
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"layers.1.mlp.extra \(Linear\)"):
        DecodeProgram.of(model)


def test_model_that_computes_something_else_is_refused() -> None:
    model = make("llama")
    attention = model.model.layers[2].self_attn
    before = attention.forward
    attention.forward = lambda *args, **kwargs: (lambda out: (1.02 * out[0], *out[1:]))(before(*args, **kwargs))
    with pytest.raises(ModelError, match="differs from the model"):
        DecodeProgram.of(model)


def test_nan_in_a_weight_is_not_hidden() -> None:
    model = make("llama")
    program = DecodeProgram.of(model, 64)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = torch.nan
    assert torch.isnan(program.session().feed([1, 2, 3])).all()


def test_missing_kernels_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "available", lambda: False)
    with pytest.raises(ModelError, match="no compiled kernels"):
        DecodeProgram.of(make("llama"))
