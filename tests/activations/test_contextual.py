from __future__ import annotations

import pytest
import torch

from gossamer.activations.contextual import ContextualSparse, PromptStatistic, kept_count
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, SparsityError

PROMPT = torch.tensor([[5, 9, 3, 44, 80, 13, 7]])


@torch.no_grad()
def middles(model, ids):
    """What goes into every matrix that maps back, by a hook of our own."""
    seen = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].double()))
        for block in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_griffin_keeps_the_neurons_with_the_largest_norm_over_tokens_of_norm_one(tiny_llama):
    sparse = ContextualSparse(tiny_llama, "griffin", 0.25)
    with sparse.observing(), torch.no_grad():
        tiny_llama(PROMPT)
    for z, cut in zip(middles(tiny_llama, PROMPT), sparse.cuts, strict=True):
        statistic = (z / z.norm(dim=1, keepdim=True)).norm(dim=0)
        assert cut.index.tolist() == sorted(statistic.topk(18).indices.tolist())


def test_cats_keeps_exactly_the_largest_gates_of_every_token(tiny_llama):
    sparse = ContextualSparse(tiny_llama, "cats", 0.25)
    with sparse.active():
        seen = middles(tiny_llama, PROMPT)
    assert all(((z != 0).sum(1) == 18).all() for z in seen)
    assert all(((z != 0).sum(1) == 72).all() for z in middles(tiny_llama, PROMPT))


@pytest.mark.parametrize("kind", ["griffin", "cats"])
@torch.no_grad()
def test_it_is_on_inside_of_the_context_only_and_leaves_no_trace(kind, tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    dense = tiny_llama(PROMPT).logits
    sparse = ContextualSparse(tiny_llama, kind)
    with sparse.observing():
        assert torch.equal(tiny_llama(PROMPT).logits, dense)
    with sparse.active():
        assert not torch.equal(tiny_llama(PROMPT).logits, dense)
    assert torch.equal(tiny_llama(PROMPT).logits, dense)
    sparse.remove()
    sparse.remove()
    assert torch.equal(tiny_llama(PROMPT).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("kind", ["griffin", "cats"])
def test_it_works_inside_of_inference_mode(kind, tiny_llama):
    found = []
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            sparse = ContextualSparse(tiny_llama, kind)
            with sparse.observing():
                tiny_llama(PROMPT)
            with sparse.active():
                found.append(tiny_llama(PROMPT).logits)
            sparse.remove()
    assert torch.equal(*found)


@torch.no_grad()
def test_keeping_all_is_dense(tiny_llama):
    dense = tiny_llama(PROMPT).logits
    for kind in ("griffin", "cats"):
        sparse = ContextualSparse(tiny_llama, kind, 1.0)
        with sparse.observing():
            tiny_llama(PROMPT)
        with sparse.active():
            torch.testing.assert_close(tiny_llama(PROMPT).logits, dense)
        assert sparse.density == 1
        sparse.remove()


def test_density_counts_dense_attention_and_head_and_the_gate_that_cats_reads(tiny_llama):
    attention, forward, head = 3 * (2 * 48 * 48 + 2 * 48 * 24), 3 * 3 * 48 * 72, 97 * 48
    total = attention + forward + head
    assert ContextualSparse(tiny_llama, "griffin").density == pytest.approx((total - forward / 2) / total)
    assert ContextualSparse(tiny_llama, "cats").density == pytest.approx((total - forward / 3) / total)


def test_a_second_prompt_chooses_anew(tiny_llama):
    sparse, chosen = ContextualSparse(tiny_llama), []
    for prompt in (PROMPT, torch.arange(20, 40)[None]):
        with sparse.observing(), torch.no_grad():
            tiny_llama(prompt)
        chosen.append([cut.index.tolist() for cut in sparse.cuts])
    assert chosen[0] != chosen[1]


def test_bad_settings_and_prompts_are_refused(tiny_llama):
    with pytest.raises(ConfigurationError, match="griffin"):
        ContextualSparse(tiny_llama, "oracle")
    for keep in (0, 1.5, -1):
        with pytest.raises(SparsityError, match=r"\(0, 1\]"):
            ContextualSparse(tiny_llama, keep=keep)
    sparse = ContextualSparse(tiny_llama)
    with pytest.raises(CalibrationError, match="seen no prompt"):
        sparse.on()
    with pytest.raises(CalibrationError, match="at least 2"), sparse.observing(), torch.no_grad():
        tiny_llama(PROMPT[:, :1])
    with pytest.raises(ConfigurationError, match="2 sequences"), sparse.observing(), torch.no_grad():
        tiny_llama(PROMPT.repeat(2, 1))
    with pytest.raises(CalibrationError, match="no layer saw"), sparse.observing():
        pass


def test_broken_activations_are_seen():
    statistic = PromptStatistic("layer", 4)
    statistic.update(torch.tensor([[1.0, 2.0, float("nan"), 0.0], [1.0, 1.0, 1.0, 1.0]]))
    with pytest.raises(NonFiniteError, match="layer"):
        statistic.largest(0.5)


def test_counts_are_exact():
    assert [kept_count(10, keep) for keep in (0.71, 0.7, 0.3, 0.01, 1)] == [8, 7, 3, 1, 10]
