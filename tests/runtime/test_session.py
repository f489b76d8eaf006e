"""A text that several programs of one model go on with."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError
from gossamer.kernels.native import available
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.sliced_feedforward import slice_gated_ffn
from gossamer.runtime.program import DecodeProgram

pytestmark = pytest.mark.skipif(not available(), reason="there are no compiled kernels")

IDS = [3, 17, 4, 80, 11, 5]


def made(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()


def thin(model, context=64):
    cuts = [slice_gated_ffn(layer, torch.arange(0, 48, 3)) for layer in find_feed_forwards(model)]
    for cut in cuts:
        cut.apply()
    program = DecodeProgram.of(model, context, verify=False)
    for cut in cuts:
        cut.restore()
    return program, cuts


def test_a_second_program_reads_what_the_first_has_read_and_is_overwritten_by_it():
    model = made()
    full = DecodeProgram.of(model, 64)
    sparse, _cuts = thin(model)
    alone = full.session(16)
    expected = alone.feed(IDS, every=True).clone()
    session = full.session(16)
    session.feed(IDS[:3])
    session.switch(sparse)
    drafted = session.feed(IDS[3:], every=True).clone()
    assert session.length == 6
    assert not torch.allclose(drafted, expected[3:], atol=1e-3)
    session.truncate(3)
    session.switch(full)
    assert torch.equal(session.feed(IDS[3:], every=True), expected[3:])


def test_a_program_of_another_model_or_for_shorter_texts_is_refused():
    session = DecodeProgram.of(made(), 64).session(40)
    for other in (made(vocab_size=99), made(num_hidden_layers=3), made(num_key_value_heads=2)):
        with pytest.raises(ConfigurationError, match="same model"):
            session.switch(DecodeProgram.of(other, 64, verify=False))
    short = DecodeProgram.of(made(), 32, verify=False)
    with pytest.raises(ConfigurationError, match="32 tokens, the text for 40"):
        session.switch(short)
