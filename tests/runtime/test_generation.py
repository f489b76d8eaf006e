"""Writing text: which token is chosen, when the text ends, and that both ways of computing write the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError, ModelError, NonFiniteError
from gossamer.kernels.native import available
from gossamer.runtime.generation import Sampling, generate
from gossamer.runtime.program import DecodeProgram

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def source_of(model: nn.Module) -> DecodeProgram | nn.Module:
    return DecodeProgram.of(model, 64) if available() else model


def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sampling.seed)
    found = [sampling.choose(LOGITS, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(LOGITS)) / count


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert Sampling().choose(LOGITS, torch.Generator()) == 1


def test_draws_follow_the_probabilities() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(0)
        # five standard errors of 4000 draws
        assert (draws(Sampling(temperature)) - expected).abs().max() < 5 * 0.5 / 4000**0.5


def test_top_k_keeps_the_k_most_likely() -> None:
    found = draws(Sampling(1.0, top_k=2))
    assert found[[0, 2, 4]].sum() == 0
    assert abs(float(found[1]) - float(LOGITS[[1, 3]].softmax(0)[0])) < 5 * 0.5 / 4000**0.5


def test_top_p_keeps_the_fewest_that_reach_the_share() -> None:
    # probabilities 0.64, 0.24, 0.09, 0.03, 0.01 in descending order
    assert set(draws(Sampling(1.0, top_p=0.6)).nonzero().flatten().tolist()) == {1}
    assert set(draws(Sampling(1.0, top_p=0.8)).nonzero().flatten().tolist()) == {1, 3}
    assert set(draws(Sampling(1.0, top_p=0.9)).nonzero().flatten().tolist()) == {1, 2, 3}


def test_top_p_counts_within_top_k() -> None:
    # among the two most likely the first has 0.73
    assert set(draws(Sampling(1.0, top_k=2, top_p=0.7)).nonzero().flatten().tolist()) == {1}


def test_top_p_beyond_the_first_thousand_tokens_is_exact() -> None:
    flat = torch.linspace(0, 1e-3, 3000)
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(1.0, top_p=0.9)
    found = {sampling.choose(flat, generator) for _ in range(3000)}
    order = flat.argsort(descending=True)
    probabilities = flat.softmax(0)[order]
    kept = int((probabilities.cumsum(0) - probabilities < 0.9).sum())
    assert found <= set(order[:kept].tolist())
    assert len(found & set(order[1024:].tolist())) > 500


def test_equal_seeds_write_equal_texts(model: nn.Module) -> None:
    source = source_of(model)
    texts = [generate(source, [1, 2], 20, Sampling(1.0, seed=seed)).tokens for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.skipif(not available(), reason="there are no compiled kernels")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=20, top_p=0.95, seed=5)])
def test_program_and_model_write_the_same(model: nn.Module, sampling: Sampling) -> None:
    program = DecodeProgram.of(model, 64)
    ours, theirs = generate(program, [5, 6, 7], 30, sampling), generate(model, [5, 6, 7], 30, sampling)
    assert ours.compiled
    assert not theirs.compiled
    assert ours.tokens == theirs.tokens


def test_greedy_text_is_the_one_of_hugging_face(model: nn.Module) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(source_of(model), [5, 6, 7], 20).tokens == expected[0, 3:].tolist()


def test_text_ends_after_a_stop_token(model: nn.Module) -> None:
    whole = generate(source_of(model), [5, 6, 7], 20).tokens
    stop = whole[4]
    found = generate(source_of(model), [5, 6, 7], 20, stop=[stop])
    assert found.ended
    assert found.tokens == whole[: whole.index(stop) + 1]


def test_tokens_arrive_one_by_one_and_the_listener_can_end_the_text(model: nn.Module) -> None:
    heard: list[int] = []

    def listen(token: int) -> bool:
        heard.append(token)
        return len(heard) < 3

    found = generate(source_of(model), [1], 20, on_token=listen)
    assert found.tokens == heard
    assert len(heard) == 3
    assert not found.ended


def test_model_without_a_program_writes_through_itself() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).eval()
    with pytest.raises(ModelError, match="Hugging Face"):
        DecodeProgram.of(model)
    found = generate(model, [1, 2], 5)
    expected = model.generate(
        torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens == expected[0, 2:].tolist()
    assert not found.compiled


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"temperature": -1}, "temperature is -1"), ({"top_k": -1}, "top_k is -1"), ({"top_p": 0}, "top_p is 0")],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Sampling(**wrong)


def test_impossible_lengths_are_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="prompt is empty"):
        generate(model, [], 5)
    with pytest.raises(ConfigurationError, match="new_tokens is 0"):
        generate(model, [1], 0)


@pytest.mark.skipif(not available(), reason="there are no compiled kernels")
def test_text_longer_than_the_program_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="1 to 32 tokens"):
        generate(DecodeProgram.of(model, 32), [1, 2, 3], 31)


def test_nan_in_the_logits_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="logit 1"):
        Sampling().choose(torch.tensor([1.0, torch.nan, 2.0]), torch.Generator())
