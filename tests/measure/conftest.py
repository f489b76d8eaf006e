from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def _build_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # large enough that predictions are far from uniform
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


@pytest.fixture
def build_llama():
    return _build_llama


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return _build_llama()


@pytest.fixture
def another_llama() -> LlamaForCausalLM:
    return _build_llama(seed=1)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(64, (1, 75), generator=torch.Generator().manual_seed(7))
