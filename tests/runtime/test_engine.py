"""An engine compresses, compiles where it can, and says what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError
from gossamer.kernels.native import available
from gossamer.runtime.choice import Choices
from gossamer.runtime.engine import Engine

needs_native = pytest.mark.skipif(not available(), reason="needs the compiled kernels")


class Letters:
    """One token for each character; the last token of the vocabulary is half a character."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    def decode(self, tokens, **_):
        return "".join(chr(97 + token) for token in tokens)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_attention_heads=2, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def choices(tmp_path):
    return Choices(tmp_path / "c.json", lambda case, storages: {s: 1.0 + (s.kind == "plain") for s in storages})


@needs_native
@pytest.mark.parametrize(("format", "kinds"), [("exact", {"dense"}), ("int8", {"dense"}), ("int4", {"nibbles"})])
def test_a_model_is_compressed_and_compiled(format, kinds, llama, choices):
    model = copy.deepcopy(llama)
    engine = Engine.of(model, Letters(), format, head="keep", choices=choices, progress=False)
    assert engine.program is not None, engine.reason
    blocks = [layer.storage.split()[0] for layer in engine.report.layers if "lm_head" not in layer.name]
    assert set(blocks) == kinds
    assert str(engine).startswith("compiled steps; ")
    assert engine.nbytes > 0


@needs_native
def test_off_leaves_the_model_and_exact_writes_the_same_text(llama, choices):
    plain = Engine.of(copy.deepcopy(llama), Letters(), "off")
    exact = Engine.of(copy.deepcopy(llama), Letters(), "exact", head="keep", choices=choices, progress=False)
    assert plain.program is None
    assert "left as it is" in str(plain)
    pieces = []
    text, found = exact.write("whales", 12, on_text=pieces.append)
    assert text == plain.write("whales", 12)[0] == "".join(pieces)
    assert found.compiled
    assert len(found.tokens) == 12


def test_a_model_that_cannot_be_compiled_still_writes(choices):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).eval()
    engine = Engine.of(model, Letters(), "exact", head="keep", choices=choices, progress=False)
    assert engine.program is None
    assert engine.reason
    assert len(engine.write("sea", 5)[1].tokens) == 5
    speed = engine.speed(prompt_tokens=8, new_tokens=4, repeats=2, warmup=0)
    assert (speed.prompt_tokens, speed.new_tokens, speed.decode.repeats) == (8, 4, 2)


def test_unknown_settings_are_refused(llama):
    with pytest.raises(ConfigurationError, match="off, exact, bfloat16, int8, int4"):
        Engine.of(llama, format="fast")
    with pytest.raises(ConfigurationError, match="head is 'big'"):
        Engine.of(llama, head="big")
