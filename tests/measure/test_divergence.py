from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.measure import divergence, perplexity
from gossamer.measure import windows as walk
from gossamer.measure.divergence import _percentile_99


def test_divergence_equals_the_definition_in_float64(llama, another_llama, tokens):
    found = divergence(llama, another_llama, tokens, 100, 50, progress=False)
    with torch.no_grad():
        p = llama.double()(tokens).logits[0, :-1].log_softmax(-1)
        q = another_llama.double()(tokens).logits[0, :-1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == 74
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(kl.max().item(), rel=1e-5)  # ceil(0.99 * 74) = 74
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_a_model_does_not_differ_from_its_copy(llama, tokens):
    found = divergence(llama, copy.deepcopy(llama), tokens, 16, 8, progress=False)
    assert (found.kl, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.dense == found.sparse


@pytest.mark.parametrize("batch_size", [1, 4])
def test_its_perplexities_are_those_of_perplexity(llama, another_llama, tokens, batch_size):
    found = divergence(llama, another_llama, tokens, 16, 8, batch_size=batch_size, progress=False)
    for model, measured in ((llama, found.dense), (another_llama, found.sparse)):
        alone = perplexity(model, tokens, 16, 8, progress=False)
        assert measured.tokens == alone.tokens
        assert measured.value == pytest.approx(alone.value, rel=1e-5)


def test_chunked_rows_do_not_change_the_result(llama, another_llama, tokens, monkeypatch):
    whole = divergence(llama, another_llama, tokens, 32, 16, progress=False)
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", 5 * 64)
    pieces = divergence(llama, another_llama, tokens, 32, 16, progress=False)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-6)
    assert pieces.top1_agreement == whole.top1_agreement


def test_tokens_ruled_out_by_both_models_contribute_nothing():
    class Masked(nn.Module):
        def __init__(self, bias: float):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([bias, 0.0, -math.inf]))

        def forward(self, ids):
            return self.bias.expand(*ids.shape, 3)

    found = divergence(Masked(math.log(3.0)), Masked(0.0), torch.tensor([[0, 1, 0]]), progress=False)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_the_99th_percentile_is_exceeded_by_at_most_one_value_in_a_hundred():
    values = torch.randperm(1000).double()
    assert _percentile_99(values) == 989
    assert (values > 989).sum() == 10


def test_models_of_different_vocabularies_are_refused(llama, tokens, build_llama):
    with pytest.raises(ConfigurationError, match="64 tokens and the sparse one 80"):
        divergence(llama, build_llama(vocab_size=80), tokens, 16, 8, progress=False)


def test_the_message_says_which_model_is_not_finite(llama, another_llama, tokens):
    with torch.no_grad():
        another_llama.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"the sparse model's logits.*model\.norm\.weight"):
        divergence(llama, another_llama, tokens, 16, 8, progress=False)
