from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.attention.adaspa import AdaSpa
from gossamer.attention.base import Answer
from gossamer.attention.pattern_trace import PatternTrace, correlation, overlap
from gossamer.attention.re_ttention import Rettention
from gossamer.attention.sparsed import SparseD
from gossamer.attention.state import StepCache, StepwiseAttention
from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.masked_diffusion import MaskedDiffusionLM, MaskedDiffusionSampler


def a_call(layer=0, batch=1, heads=2, tokens=6, causal=False, seed=0):
    q, k, v = torch.randn(3, batch, heads, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return AttentionCall(layer, q, k, v, 0.5, causal)


def begun(steps=4, index=0):
    cache = StepCache()
    cache.begin(steps)
    cache.advance(index)
    return cache


def test_layers_and_branches_are_kept_apart():
    cache = begun()
    cache.put(a_call(0), "ratio", "layer 0")
    cache.put(a_call(1), "ratio", "layer 1")
    cache.advance(1, "class")
    cache.put(a_call(0), "ratio", "layer 0 with class")
    assert cache.get(a_call(0), "ratio") == "layer 0 with class"
    assert cache.find(a_call(1), "ratio") is None
    cache.advance(1)
    assert cache.get(a_call(0), "ratio") == "layer 0"
    assert cache.get(a_call(1), "ratio") == "layer 1"
    assert cache.named("ratio") == {
        (0, ""): "layer 0",
        (1, ""): "layer 1",
        (0, "class"): "layer 0 with class",
    }


def test_a_new_sample_forgets_the_old_one():
    cache = begun()
    cache.put(a_call(), "pattern", torch.zeros(10))
    assert cache.bytes == 40
    cache.begin(4)
    cache.advance(0)
    assert cache.bytes == 0
    with pytest.raises(ConfigurationError, match="layer 0 has no pattern at step 0"):
        cache.get(a_call(), "pattern")


def test_a_step_may_be_repeated_but_not_go_backwards_or_beyond_the_last():
    cache = begun(index=2)
    cache.advance(2)
    with pytest.raises(ConfigurationError, match="step 1 follows step 2"):
        cache.advance(1)
    with pytest.raises(ConfigurationError, match="step is 4; this sample has the steps 0 to 3"):
        cache.advance(4)


def test_what_was_found_for_another_shape_is_refused():
    cache = begun()
    cache.put(a_call(tokens=6), "pattern", 1)
    for other in (a_call(tokens=7), a_call(batch=2), a_call(heads=4)):
        with pytest.raises(ConfigurationError, match="was found for queries"):
            cache.get(other, "pattern")


def test_nothing_can_be_remembered_before_a_step():
    cache = StepCache()
    with pytest.raises(ConfigurationError, match=r"begin\(steps\) and step\(0\)"):
        cache.put(a_call(), "pattern", 1)
    with pytest.raises(ConfigurationError, match=r"call begin\(steps\) first"):
        cache.advance(0)
    cache.begin(3)
    with pytest.raises(ConfigurationError, match=r"call step\(0\) first"):
        cache.find(a_call(), "pattern")
    with pytest.raises(ConfigurationError, match="steps is 0"):
        cache.begin(0)


# ---------------------------------------------------------------------------------------------------- installation


@dataclass(kw_only=True)
class Zero(StepwiseAttention):
    """Puts out nothing from step 1 on, and remembers at which steps it was asked."""

    def mix(self, call):
        self.cache.put(call, "asked", self.cache.index)
        return None if self.cache.index == 0 else Answer(torch.zeros_like(call.value), 0.25)


def small_writer():
    torch.manual_seed(0)
    return MaskedDiffusionLM(11, 2, 16, 2, 16).eval()


def test_a_method_is_told_of_samples_and_steps_and_removed_again():
    model, method = small_writer(), Zero()
    sampler, prompt = MaskedDiffusionSampler(model, 4), torch.arange(8)[None]
    before = sampler.generate(prompt, 8)
    with method.active(model) as installed:
        sampler.generate(prompt, 8)
        assert method.cache.steps == 4
        assert method.cache.context == slice(0, 8)
        assert method.cache.named("asked") == {(0, ""): 3, (1, ""): 3}
        assert installed.report().density("prefill") == pytest.approx((1 + 3 * 0.25) / 4)
        sampler.generate(prompt, 8)  # the second sample begins anew
        with pytest.raises(ModelError, match="another attention method"):
            SparseD().install(model)
    assert torch.equal(sampler.generate(prompt, 8), before)
    installed.remove()
    assert model.listener is None


def test_causal_attention_is_refused_and_cross_attention_left_alone():
    method = Zero()
    method.begin(2)
    method.step(1)
    with pytest.raises(ConfigurationError, match=r"layer 0 is causal; Zero"):
        method.attend(a_call(causal=True))
    call = a_call()
    crossing = AttentionCall(0, call.query, call.key[:, :, :3], call.value[:, :, :3], 0.5, False)
    assert method.attend(crossing) is None


@pytest.mark.parametrize("factory", [SparseD, AdaSpa, Rettention, Zero])
def test_a_call_outside_of_a_sample_is_refused(factory):
    call, method = a_call(), factory()
    with pytest.raises(ConfigurationError, match=r"call begin\(steps\) and step\(0\) first"):
        method.attend(call)
    method.begin(4)
    with pytest.raises(ConfigurationError, match=r"call step\(0\) first"):
        method.attend(call)
    method.step(0)
    method.attend(call)
    method.reset()
    with pytest.raises(ConfigurationError, match=r"call begin\(steps\) and step\(0\) first"):
        method.attend(call)


def test_a_method_stands_in_for_torchs_attention():
    call, method = a_call(), Zero()
    method.begin(2)
    method.step(0)
    found = method(call.query, call.key, call.value, is_causal=False)
    expected = functional.scaled_dot_product_attention(call.query, call.key, call.value)
    torch.testing.assert_close(found, expected)
    method.step(1)
    assert not method(call.query, call.key, call.value, is_causal=False).any()


class Processor:
    """A stand-in for an attention processor of diffusers."""

    def __call__(self, module, x, context=None):
        context = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in (module.to_q(x), module.to_k(context), module.to_v(context))
        )
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.processor = Processor()

    def forward(self, x, context=None):
        return self.processor(self, x, context)


class Pipe(nn.Module):
    """A stand-in for a transformer of diffusers: self-attention, then cross-attention to three text tokens."""

    def __init__(self):
        super().__init__()
        self.own, self.cross = Attention(), Attention()

    def forward(self, x, timestep):
        if not torch.isfinite(x).all():
            raise ValueError("noise")
        return x + self.own(x) + self.cross(x, x[:, :3])


def test_processors_of_diffusers_are_answered_and_steps_are_told_by_times():
    torch.manual_seed(0)
    model, method, x = Pipe().eval(), Zero(), torch.randn(1, 5, 8)
    with torch.no_grad():
        dense = model(x, timestep=torch.tensor(900))
        with method.active(model):
            for _ in range(2):
                method.begin(2)
                assert torch.equal(model(x, timestep=torch.tensor(900)), dense)
                assert torch.equal(model(x, timestep=torch.tensor(900)), dense)  # a solver that asks twice
                assert method.cache.index == 0
                sparse = model(x, timestep=torch.tensor(500))
                assert method.cache.index == 1
                torch.testing.assert_close(sparse, x + model.cross(x, x[:, :3]))
            method.begin(2)
            with pytest.raises(ValueError, match="noise"):
                model(x * float("nan"), timestep=torch.tensor(900))
            with pytest.raises(ModelError, match="timestep"):
                model(x, 500)
        assert torch.equal(model(x, timestep=torch.tensor(500)), dense)
        q = torch.randn(1, 2, 5, 4)
        assert functional.scaled_dot_product_attention(q, q, q).any()


def test_a_failure_inside_a_processor_leaves_torch_as_it_was():
    model, method = Pipe().eval(), Zero()
    with method.active(model):
        method.begin(2)
        model(torch.randn(1, 5, 8), timestep=1.0)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 7), timestep=0.5)
        q = torch.randn(1, 2, 5, 4)
        assert functional.scaled_dot_product_attention(q, q, q).any()


def test_hugging_face_models_work_in_a_loop_of_ones_own():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model, ids = transformers.BertModel(config).eval(), torch.arange(12)[None]
    with torch.no_grad():
        dense = model(ids).last_hidden_state
        for select, near in ((1.0, True), (0.1, False)):
            method = SparseD(skip=0.0, select=select, block_size=2)
            with method.active(model) as installed:
                method.begin(3, slice(0, 8))
                for index in range(3):
                    method.step(index)
                    found = model(ids).last_hidden_state
            assert torch.allclose(found, dense, atol=1e-5) == near
            assert (installed.report().density("prefill") == 1) == near
        assert torch.equal(model(ids).last_hidden_state, dense)


def test_a_module_without_attention_to_replace_is_refused():
    with pytest.raises(ModelError, match="not a Hugging Face model"):
        Zero().install(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------- diagnostics


def test_overlap_and_correlation_of_small_arrays():
    one = torch.tensor([[[True, True], [False, False]]])
    other = torch.tensor([[[True, False], [True, False]]])
    assert overlap(one, other).item() == pytest.approx(1 / 3)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 5.0, 7.0])).item() == pytest.approx(1)
    assert correlation(torch.ones(3), torch.rand(3)).item() == 0


def test_a_trace_tells_what_stays_from_what_differs():
    trace = PatternTrace(block_size=2)
    trace.begin(3)
    with pytest.raises(CalibrationError, match="nothing to compare"):
        trace.between_steps()
    call = a_call(batch=2, heads=3, tokens=12)
    for index in range(3):
        trace.step(index)
        trace.attend(call)
    assert trace.between_steps(0.5) == 1
    assert trace.sum_correlation() == pytest.approx(1)
    assert trace.between_heads(0.5) < 0.9
    assert trace.between_inputs(0.5) < 0.9
    assert trace.sum_correlation(across="heads") < 0.9
    expected = torch.softmax(call.query @ call.key.mT * 0.5, -1)
    sums = expected.unflatten(-1, (6, 2)).unflatten(-3, (6, 2)).sum((-1, -3))
    torch.testing.assert_close(trace.masses[1, 0], sums)
