"""Corrected decoding writes the same text however the two models compute, and wherever their weights live."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from gossamer.activations.contextual import ContextualSparse
from gossamer.activations.sirius import Sirius, SiriusGenerator
from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.native import available

PROMPT = torch.tensor([[5, 9, 3, 44, 80, 13, 7, 51, 23]])
OPTIONS = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
needs_kernels = pytest.mark.skipif(not available(), reason="there are no compiled kernels")


@pytest.fixture
def model():
    """Random, with heads that compiled steps can take, and guesses that differ enough for rollbacks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 16}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return made


def generator(model, kind="griffin", **settings):
    return SiriusGenerator(model, ContextualSparse(model, kind), **{"kernel_size": 6, **settings})


def written(made, prompt=PROMPT, **options):
    out = made.generate(input_ids=prompt, **{**OPTIONS, **options})
    return out.sequences.tolist(), [(w.drafted, w.accepted, w.advance, w.read) for w in out.stats.windows]


@needs_kernels
@pytest.mark.parametrize("settings", [{}, {"accept": "exact"}, {"rollback": False}, {"kernel_size": 1}])
def test_compiled_steps_write_the_text_of_the_models_own_code(settings, model):
    eager, native = generator(model, **settings), generator(model, runtime="native", **settings)
    for prompt in (PROMPT, PROMPT[:, :4]):
        assert written(native, prompt) == written(eager, prompt)
    end = written(eager)[0][0][14]
    assert written(native, eos_token_id=end) == written(eager, eos_token_id=end)
    rules = {"repetition_penalty": 1.7}
    assert written(native, **rules) == written(eager, **rules) != written(eager)


@needs_kernels
def test_compiled_steps_are_made_again_for_a_longer_text(model):
    native = generator(model, runtime="native", rollback=False, kernel_size=64)
    assert written(native) == written(generator(model, rollback=False, kernel_size=64))
    long = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(0))
    assert written(native, long) == written(generator(model, rollback=False, kernel_size=64), long)


@needs_kernels
def test_compiled_steps_refuse_what_they_do_not_know(model, tiny_llama):
    with pytest.raises(ModelError, match="multiple of 16"):
        generator(tiny_llama, runtime="native")
    elsewhere = ContextualSparse(tiny_llama)
    with pytest.raises(ModelError, match="on meta"):
        SiriusGenerator(tiny_llama.to("meta"), elsewhere, runtime="native")
    with pytest.raises(ConfigurationError, match="inputs_embeds"):
        generator(model, runtime="native").loop(
            model, PROMPT, past_key_values=transformers.DynamicCache(), inputs_embeds=torch.zeros(1, 9, 32)
        )


def test_one_graph_for_each_model_serves_all_windows_and_texts(model):
    """Windows of any length, ends that come early, other prompts with other neurons, and a text that goes on."""
    counter = CompileCounter()
    eager, compiled = generator(model), generator(model, runtime="compile", backend=counter)
    assert written(compiled) == written(eager)
    assert counter.frame_count == 2
    end = written(eager)[0][0][14]
    assert written(compiled, PROMPT + 1, eos_token_id=end) == written(eager, PROMPT + 1, eos_token_id=end)
    caches = [transformers.DynamicCache(), transformers.DynamicCache()]
    for made, cache in zip((eager, compiled), caches):
        first = made.generate(input_ids=PROMPT, past_key_values=cache, **OPTIONS).sequences
        assert cache.get_seq_length() == first.shape[1] - 1
        made.more = written(made, torch.cat([first, PROMPT], 1), past_key_values=cache)
    assert compiled.more == eager.more
    for ours, theirs in zip(caches[1].layers, caches[0].layers):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_neurons_chosen_by_token_are_compiled_too(model):
    counter = CompileCounter()
    compiled = generator(model, "cats", runtime="compile", backend=counter)
    assert written(compiled) == written(generator(model, "cats"))
    assert counter.frame_count == 2


def test_a_backend_that_fails_is_told_with_a_way_out(model):
    def backend(graph, inputs):
        raise RuntimeError("no compiler in sight")

    with pytest.raises(ConfigurationError, match=r"(?s)no compiler in sight.*runtime='eager'"):
        written(generator(model, runtime="compile", backend=backend))
    assert written(generator(model))  # the model is left as it was


@pytest.mark.slow
def test_the_compiler_of_torch_writes_the_same_text(model):
    assert written(generator(model, runtime="compile")) == written(generator(model))


# ------------------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("settings", [{}, {"tree_width": 3}, {"rewrite": False}])
def test_offloading_changes_no_text_and_moves_whole_matrices_for_checks_only(settings, tiny_llama):
    expected = written(generator(tiny_llama, **settings))
    offloaded = generator(tiny_llama, offload="cpu", **settings)
    streamed, moved = offloaded.streamed, []
    layer = 3 * 48 * 72 * 4  # bytes of the matrices of one of the three layers

    class Spy(SiriusGenerator):
        def _draft(self, text, steps):
            moved.append(streamed.bytes_moved)
            found = super()._draft(text, steps)
            assert streamed.bytes_moved == moved[-1]  # drafting reads the cut matrices, which are there
            return found

    offloaded.__class__ = Spy
    assert written(offloaded) == expected
    # the prompt brings all layers and the first again; every check the others and that
    assert moved == [(4 + 3 * check) * layer for check in range(len(expected[1]))]
    offloaded.remove()
    assert written(generator(tiny_llama, **settings)) == expected


def test_the_registered_method_passes_its_runtime_on(model):
    made = Sirius(kernel_size=6, offload="cpu").install(model)
    assert made.streamed.device == torch.device("cpu")
    made.remove()
    if available():
        assert written(Sirius(kernel_size=6, runtime="native").install(model)) == written(generator(model))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"runtime": "fast"}, "eager, compile or native"),
        ({"runtime": "compile", "tree_width": 2}, "tree_width=2"),
        ({"runtime": "native", "rewrite": False}, "rewrite=False"),
        ({"runtime": "compile", "offload": "cpu"}, "offload='cpu'"),
        ({"runtime": "native", "kind": "cats"}, "griffin"),
        ({"offload": "cpu", "kind": "cats"}, "griffin"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, match, model):
    with pytest.raises(ConfigurationError, match=match):
        generator(model, **settings)
    if "rewrite" not in settings:
        with pytest.raises(ConfigurationError, match=match):
            Sirius(**settings)


def test_a_text_has_to_begin(model):
    for runtime in ("compile", *(["native"] if available() else [])):
        with pytest.raises(ConfigurationError, match="begin"):
            _ = generator(model, runtime=runtime)._text.length
