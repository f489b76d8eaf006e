"""Inputs in int8 are chosen only where they are asked for, and survive in files, layers and compiled steps."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.errors import ConfigurationError
from gossamer.kernels.integer import IntegerBitmaskMatrix, IntegerDenseMatrix
from gossamer.kernels.matrix import round_inputs
from gossamer.kernels.native import available
from gossamer.models.packed import load_packed
from gossamer.runtime.choice import Case, Choices, Storage, candidates, measure_storages
from gossamer.runtime.compress import compress
from gossamer.runtime.engine import check_engine
from gossamer.runtime.program import DecodeProgram, relative_difference
from gossamer.storage.layers import SparseLinear

pytestmark = pytest.mark.skipif(not available(), reason="there are no compiled kernels")

KINDS = ("integer_dense", "integer_bitmask")


def preferring(kind):
    """Choices by a made-up measurement in which one kind of storage is the fastest, if it may be chosen at all."""

    def measure(case, storages):
        return {storage: 1.0 if storage.kind == kind else 2.0 for storage in storages}

    return measure


def layer(kind="integer_bitmask", rows=24, columns=80):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(rows, columns) < 0.5, 0)
    return linear, SparseLinear.from_linear(linear, kind, "int8")


def test_they_are_candidates_only_where_they_are_asked_for():
    integers = [Storage(kind, "int8", 64) for kind in KINDS]
    assert not set(integers) & set(candidates(["int8", "bfloat16"], torch.bfloat16, 64))
    asked = candidates(["int8", "bfloat16"], torch.bfloat16, 64, activations="int8")
    assert set(integers) <= set(asked)
    assert {storage.format for storage in asked if storage.kind in KINDS} == {"int8"}
    case = Case(40, 100, 0.5, torch.bfloat16, 2)
    assert set(measure_storages(case, integers, repeats=1)) == set(integers)


@pytest.mark.parametrize("kind", KINDS)
def test_compress_takes_them_only_when_asked_and_files_keep_the_choice(kind, tiny_llama, tmp_path):
    silent = copy.deepcopy(tiny_llama)
    chosen = Choices(tmp_path / "c.json", preferring(kind))
    report = compress(silent, "int8", choices=chosen, progress=False)
    assert all(one.storage.split()[0] not in KINDS for one in report.layers)
    model = copy.deepcopy(tiny_llama)
    report = compress(model, "int8", activations="int8", choices=chosen, progress=False)
    assert {one.storage for one in report.layers} == {f"{kind} int8"}
    assert report.settings["activations"] == "int8"
    known = json.loads((tmp_path / "c.json").read_text())
    assert all(f"{kind} int8" in times and "dense int8" in times for times in known.values())
    gossamer.save(model, tmp_path / "model")
    again = load_packed(tmp_path / "model", None, torch.device("cpu"), None)
    layers = [module for module in again.modules() if isinstance(module, SparseLinear)]
    assert layers
    assert all(module.matrix.activations == "int8" for module in layers)
    ids = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_does_not_fit_together_is_refused():
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(ConfigurationError, match="activations is 'int4'; it must be one of float, int8"):
        compress(model, "int8", activations="int4", progress=False)
    with pytest.raises(ConfigurationError, match="ask for int8 in one"):
        compress(model, "bfloat16", head="keep", activations="int8", progress=False)
    with pytest.raises(ConfigurationError, match="activations is 'half'"):
        check_engine("int8", "int8", "half")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_work_under_compile_and_give_gradients_to_inputs(kind):
    linear, packed = layer(kind)
    assert f"{kind} int8" in repr(packed)
    x = torch.randn(3, 80)
    expected = packed(x)
    assert torch.allclose(expected, round_inputs(x) @ packed.weight.t() + linear.bias, atol=1e-5)
    assert torch.equal(torch.compile(packed, backend="eager", fullgraph=True)(x), expected)
    tracked = x.clone().requires_grad_()
    packed(tracked).sum().backward()
    assert torch.allclose(tracked.grad, packed.weight.sum(0).expand(3, -1), atol=1e-5)
    with pytest.raises(ConfigurationError, match="cannot be trained"):
        packed.train_values()


@pytest.fixture
def decoder():
    """A small language model with heads that compiled steps take."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("kind", [IntegerDenseMatrix, IntegerBitmaskMatrix])
def test_compiled_steps_round_as_layers_do(kind, decoder):
    model, vocabulary = decoder, decoder.config.vocab_size
    tokens = torch.randint(vocabulary, (30,), generator=torch.Generator().manual_seed(2))
    program = DecodeProgram.of(model, 64, lambda _, weight: kind.from_dense(weight))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(kind.from_dense(module.weight).expand())
                module.forward = partial(rounded_product, module.weight)
        expected = model(tokens[None], use_cache=False).logits[0]
    one, two = (read(program, tokens, threads) for threads in (1, 2))
    assert torch.equal(one, two)
    # an input between two numbers of eight bits may be rounded either way
    assert relative_difference(one, expected) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_of_a_compressed_model_are_compared_without_rounding(kind, decoder, tmp_path):
    compress(
        decoder, "int8", activations="int8", choices=Choices(tmp_path / "c.json", preferring(kind)), progress=False
    )
    assert DecodeProgram.of(decoder, 64).verify(decoder) < 1e-4


def read(program, tokens, threads):
    """Logits of all tokens: the first ones read together, the others one by one."""
    session = program.session(len(tokens))
    found = [session.feed(tokens[:20], every=True, threads=threads)]
    found += [session.feed(tokens[at : at + 1], threads=threads).clone()[None] for at in range(20, len(tokens))]
    return torch.cat(found)


def rounded_product(weight, x):
    return round_inputs(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1) @ weight.t()
