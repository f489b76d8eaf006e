from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.measure import perplexity
from gossamer.measure import windows as walk


def token_by_token(model, ids: torch.Tensor, window: int, stride: int) -> list[float]:
    """Score each token of (n,) by a forward pass of its own, in float64, straight from the definition."""
    model = model.double()
    n = ids.numel()
    scores = []
    for position in range(1, n):
        # The first window that reaches this token; windows start at multiples of the stride.
        start = 0
        while start + window <= position:
            start += stride
        if start == position:  # without overlap: nothing to predict it from
            continue
        with torch.no_grad():
            logits = model(ids[None, start:position]).logits[0, -1]
        scores.append(-logits.log_softmax(-1)[ids[position]].item())
    return scores


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 16), (32, 1), (100, 50)])
def test_perplexity_equals_scoring_token_by_token_in_float64(llama, tokens, window, stride):
    found = perplexity(llama, tokens, window, stride, progress=False)
    expected = token_by_token(llama, tokens[0], window, stride)
    assert found.tokens == len(expected)
    assert found.nll_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 16), (2, 2), (100, 50)])
def test_first_token_of_the_model_stands_before_every_window(llama, tokens, window, stride):
    llama.config.bos_token_id = 3
    ids = torch.cat([torch.tensor([3]), tokens[0]])
    found = perplexity(llama, ids, window, stride, progress=False)
    model, expected = llama.double(), []
    step = min(stride, window - 1)
    for position in range(1, ids.numel()):
        start = 1
        while start + window - 1 <= position:
            start += step
        context = torch.cat([ids[:1], ids[start:position]])
        with torch.no_grad():
            expected.append(-model(context[None]).logits[0, -1].log_softmax(-1)[ids[position]].item())
    assert found.tokens == ids.numel() - 1
    assert found.nll_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_sequence_without_the_first_token_is_scored_as_it_is(llama, tokens):
    llama.config.bos_token_id = None
    plain = perplexity(llama, tokens, 16, 8, progress=False)
    llama.config.bos_token_id = int(tokens[0, 0]) + 1
    assert perplexity(llama, tokens, 16, 8, progress=False) == plain


def test_no_overlap_gives_the_mean_over_separate_chunks(llama, tokens):
    losses = []
    for chunk in tokens.split(25, dim=1):
        losses.append(llama(chunk, labels=chunk).loss.item())
    found = perplexity(llama, tokens, 25, 25, progress=False)
    assert found.nll_per_token == pytest.approx(sum(losses) / 3, rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batching_does_not_change_the_result(llama, tokens, batch_size):
    several = [tokens, tokens[:, :40], tokens[:, 5:70]]
    one = perplexity(llama, several, 16, 8, progress=False)
    many = perplexity(llama, several, 16, 8, batch_size=batch_size, progress=False)
    assert many.tokens == one.tokens
    assert many.value == pytest.approx(one.value, rel=1e-5)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-4)


def test_chunked_rows_do_not_change_the_result(llama, tokens, monkeypatch):
    whole = perplexity(llama, tokens, 32, 16, progress=False)
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", 3 * 64)
    assert perplexity(llama, tokens, 32, 16, progress=False).value == pytest.approx(whole.value, rel=1e-6)


def test_padding_is_not_scored_and_not_seen(llama, tokens):
    padded = torch.cat([torch.full((1, 9), 3), tokens, torch.full((1, 4), 3)], dim=1)
    mask = torch.zeros_like(padded)
    mask[:, 9:-4] = 1
    assert perplexity(llama, padded, 16, 8, mask=mask, progress=False) == perplexity(
        llama, tokens, 16, 8, progress=False
    )


def test_uniform_predictions_have_the_vocabulary_as_perplexity(llama, tokens):
    nn.init.zeros_(llama.lm_head.weight)
    found = perplexity(llama, tokens, 16, 8, progress=False)
    assert found.value == pytest.approx(64, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-4)


def test_standard_error_treats_windows_as_the_sample(llama, tokens):
    sequences = [tokens[:, i : i + 15] for i in range(0, 75, 15)]
    found = perplexity(llama, sequences, 16, 8, progress=False)
    means = torch.tensor([perplexity(llama, s, 16, 8, progress=False).nll_per_token for s in sequences])
    assert found.standard_error == pytest.approx(found.value * means.std().item() / math.sqrt(5), rel=1e-4)
    assert perplexity(llama, sequences[0], 16, 8, progress=False).standard_error is None


def test_logits_are_asked_for_only_where_tokens_are_scored(llama, tokens, monkeypatch):
    rows = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    perplexity(llama, tokens, 32, 8, progress=False)
    assert sorted(rows)[:-1] == sorted([9, 9, 9, 9, 9, 4])


def test_plain_modules_that_return_tensors_work(tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).item()
    assert perplexity(model, tokens, 16, 8, progress=False).nll_per_token == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_are_accumulated_in_float32(llama, tokens):
    exact = perplexity(llama, tokens, 16, 8, progress=False)
    half = perplexity(llama.bfloat16(), tokens, 16, 8, progress=False)
    assert half.value != exact.value
    assert half.nll_per_token == pytest.approx(exact.nll_per_token, rel=0.02)


def test_the_model_stays_as_it_was(llama, tokens):
    llama.train()
    perplexity(llama, tokens, 16, 8, progress=False)
    assert all(module.training for module in llama.modules())
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_a_weight_that_is_not_finite_is_named(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        perplexity(llama, tokens, 16, 8, progress=False)
    assert "\n" not in str(caught.value)


def test_overflowing_activations_are_told_from_bad_weights(llama, tokens):
    llama.lm_head.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(NonFiniteError, match=r"token 1 of sequence 0.*all weights are finite"):
        perplexity(llama, tokens, 100, 50, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 1}, ConfigurationError, "window is 1"),
        ({"window": 16, "stride": 17}, ConfigurationError, "stride is 17"),
        ({"batch_size": 0}, ConfigurationError, "batch_size is 0"),
    ],
)
def test_bad_settings_are_refused(llama, tokens, arguments, error, message):
    with pytest.raises(error, match=message):
        perplexity(llama, tokens, progress=False, **arguments)


def test_windows_longer_than_the_model_reads_are_refused(tokens, build_llama):
    with pytest.raises(ConfigurationError, match="75 tokens; this model reads at most 64"):
        perplexity(build_llama(max_position_embeddings=64), tokens, progress=False)


def test_tokens_of_another_vocabulary_are_refused(llama):
    with pytest.raises(CalibrationError, match="token id 64 is outside the model's vocabulary of 64"):
        perplexity(llama, torch.tensor([[1, 64, 2]]), progress=False)
