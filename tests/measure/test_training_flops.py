from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError
from gossamer.measure.training_flops import TrainingFlops

GPT3_XL = {"layers": 24, "width": 2048, "context": 2048, "vocabulary": 50_257}


def test_gpt3_xl_costs_what_was_published_and_three_quarters_of_zeros_save_two_and_a_half_times():
    dense = TrainingFlops.of_shape(**GPT3_XL)
    assert dense.linear / 1e9 == pytest.approx(2.42, abs=0.005)
    assert dense.attention / 1e9 == pytest.approx(0.40, abs=0.005)
    assert dense.head / 1e9 == pytest.approx(0.21, abs=0.005)
    assert dense.forward / 1e9 == pytest.approx(3.03, abs=0.01)
    sparse = dense.at(0.25)
    assert sparse.forward / 1e9 == pytest.approx(1.21, abs=0.005)
    assert sparse.saving() == pytest.approx(2.49, abs=0.005)


def test_training_takes_three_forward_passes_and_fine_tuning_is_dense():
    flops = TrainingFlops(linear=8, attention=1, head=1, density=0.5)
    assert flops.pretrain(10) == 3 * (4 + 1 + 1) * 10
    assert flops.end_to_end(10, 2) == 3 * 6 * 10 + 3 * 10 * 2
    assert flops.saving(10, 2) == (3 * 10 * 12) / (3 * 6 * 10 + 3 * 10 * 2)
    assert flops.fixed_share == 0.2


def test_a_model_and_its_configuration_give_the_formula():
    config = GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=100, n_positions=64)
    expected = TrainingFlops.of_shape(layers=3, width=32, context=16, vocabulary=100)
    assert TrainingFlops.of_config(config, context=16) == expected


def test_gated_layers_and_shared_keys_are_counted_as_they_are():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, head_dim=16,
    )  # fmt: skip
    flops = TrainingFlops.of_model(LlamaForCausalLM(config), context=8)
    assert flops.linear == 2 * 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48)
    assert flops.attention == 4 * 8 * 2 * 64
    assert flops.head == 2 * 64 * 32


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigurationError, match=r"density is 1\.5"):
        TrainingFlops(1, 1, 1, 1.5)
    with pytest.raises(ConfigurationError, match="layers is 0"):
        TrainingFlops.of_shape(**{**GPT3_XL, "layers": 0})
    with pytest.raises(ConfigurationError, match="of_shape"):
        TrainingFlops.of_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), context=4)
    with pytest.raises(ConfigurationError, match="context is 0"):
        TrainingFlops.of_model(nn.Linear(2, 2), context=0)
    with torch.device("meta"), pytest.raises(ConfigurationError, match="linear is -1"):
        TrainingFlops(-1, 0, 0)
