"""What all tests share: one thread, quiet libraries, a tiny language model and text for it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@pytest.fixture
def tiny_llama(_tiny_llama):
    """A copy of a random three-layer Llama, 48 wide."""
    return copy.deepcopy(_tiny_llama)


@pytest.fixture(scope="session")
def batches():
    """Four batches of token ids, ``(2, 24)``."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (2, 24), generator=generator) for _ in range(4)]
