from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure import Timing, generation_speed, interleave, ratio


def test_a_timing_gives_median_and_quartiles():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0], unit="ms")
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert (timing.repeats, timing.samples) == (5, (5.0, 1.0, 2.0, 4.0, 3.0))
    assert str(timing) == "3 ms (2 to 4, 5 runs)"


def test_one_measurement_is_its_own_spread():
    timing = Timing.of([2.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 2.0, 2.0)


def test_contenders_take_turns_in_changing_order():
    calls: list[str] = []
    timings = interleave({name: lambda n=name: calls.append(n) for name in "ab"}, repeats=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert {name: timing.repeats for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round():
    found = ratio(Timing.of([2.0, 40.0, 6.0]), Timing.of([1.0, 10.0, 2.0]))
    assert (found.low, found.median, found.high, found.unit) == (2.5, 3.0, 3.5, "x")


def test_ratios_of_unpaired_timings_are_refused():
    with pytest.raises(ConfigurationError, match="2 and 1 rounds"):
        ratio(Timing.of([1.0, 2.0]), Timing.of([1.0]))


@pytest.mark.parametrize(
    ("contenders", "repeats", "warmup"), [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, 1, -1), ({"a": int}, 1.5, 0)]
)
def test_impossible_races_are_refused(contenders, repeats, warmup):
    with pytest.raises(ConfigurationError, match=r"contenders|repeats|warmup"):
        interleave(contenders, repeats, warmup)


def test_garbage_collection_is_off_while_timing_and_on_again_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fail})
    assert gc.isenabled()


def test_generation_follows_the_greedy_path_of_the_model(llama):
    inputs: list[torch.Tensor] = []
    llama.model.embed_tokens.register_forward_hook(lambda module, args, output: inputs.append(args[0].clone()))
    speed = generation_speed(llama, prompt_tokens=9, new_tokens=6, repeats=1, warmup=0)
    assert [ids.shape[1] for ids in inputs] == [9, 1, 1, 1, 1, 1, 1]
    found = torch.cat(inputs, dim=1)
    for end in range(9, 15):
        assert llama(found[:, :end], use_cache=False).logits[0, -1].argmax() == found[0, end]
    assert (speed.prompt_tokens, speed.new_tokens, speed.batch_size) == (9, 6, 1)


def test_every_counted_run_gives_one_sample(llama):
    speed = generation_speed(llama, prompt_tokens=4, new_tokens=2, repeats=3, warmup=2, batch_size=2)
    assert speed.prefill.repeats == speed.decode.repeats == 3
    assert speed.decode.unit == "tokens/s"
    assert all(sample > 0 for sample in (*speed.prefill.samples, *speed.decode.samples))


def test_a_tokenizer_makes_the_prompt_from_language(llama):
    seen: list[str] = []

    def tokenizer(text):
        seen.append(text)
        return {"input_ids": [3, 1, 4]}

    prompts: list[torch.Tensor] = []
    llama.model.embed_tokens.register_forward_hook(lambda module, args, output: prompts.append(args[0]))
    generation_speed(llama, tokenizer, prompt_tokens=7, new_tokens=1, repeats=1, warmup=0)
    assert prompts[0].tolist() == [[3, 1, 4, 3, 1, 4, 3]]
    assert "harbour" in seen[0]


def test_models_without_a_cache_are_refused(llama):
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 64)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, ids, use_cache=False):
            return self.embedding(ids)

    with pytest.raises(ModelError, match="Forgetful returned no past_key_values"):
        generation_speed(Forgetful(), prompt_tokens=4, new_tokens=1)


@pytest.mark.parametrize("setting", ["prompt_tokens", "new_tokens", "batch_size", "repeats"])
def test_numbers_below_one_are_refused(llama, setting):
    with pytest.raises(ConfigurationError, match=f"{setting} is 0"):
        generation_speed(llama, **{setting: 0})
