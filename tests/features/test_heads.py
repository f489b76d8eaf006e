import pytest
import torch

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.heads import HeadGrid, by_length, gated_heads, head_outputs, heads_of, last_logits, mean_heads


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(97, (length,), generator=generator) for length in (5, 8, 5, 3)]


def attention_outputs(model, prompt):
    """What each attention layer adds, read where it leaves the module."""
    found = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(prompt[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([output[0] for output in found])


@pytest.mark.parametrize("position", ["mean", "last", 1])
def test_outputs_of_heads_sum_up_to_that_of_attention(tiny_llama, prompts, position):
    found = head_outputs(tiny_llama, prompts, position)
    assert found.shape == (4, 12, 48)
    for prompt, row in zip(prompts, found):
        layers = attention_outputs(tiny_llama, prompt)
        wanted = layers.mean(1) if position == "mean" else layers[:, -1 if position == "last" else position]
        assert torch.allclose(row.unflatten(0, (3, 4)).sum(1), wanted, atol=1e-5)


def test_a_closed_gate_silences_its_head_alone(tiny_llama, prompts):
    tokens = prompts[1][None]
    gates = torch.ones(12)
    gates[5] = 0
    with torch.no_grad(), gated_heads(tiny_llama, gates):
        found = last_logits(tiny_llama, tokens)
    weight = tiny_llama.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 12:24] = 0
        wanted = last_logits(tiny_llama, tokens)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_open_gates_change_nothing_and_rows_have_gates_of_their_own(tiny_llama, prompts):
    tokens = prompts[1].repeat(2, 1)
    gates = torch.ones(2, 12)
    gates[1, 3] = 0
    means = mean_heads(tiny_llama, prompts)
    with torch.no_grad():
        plain = last_logits(tiny_llama, tokens)
        with gated_heads(tiny_llama, gates, means):
            found = last_logits(tiny_llama, tokens)
    assert torch.allclose(found[0], plain[0], atol=1e-6)
    assert not torch.allclose(found[1], plain[1], atol=1e-4)


def test_means_are_over_all_tokens(tiny_llama, prompts):
    seen = []
    hook = tiny_llama.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    found = mean_heads(tiny_llama, prompts)
    hook.remove()
    assert torch.allclose(found[2].flatten(), torch.cat(seen).mean(0), atol=1e-6)


def test_gradients_reach_gates(tiny_llama, prompts):
    gates = torch.ones(12, requires_grad=True)
    with gated_heads(tiny_llama, gates):
        last_logits(tiny_llama, prompts[0][None])[0, 3].backward()
    step = 1e-2
    changed = torch.ones(12)
    changed[7] += step
    with torch.no_grad():
        base = float(last_logits(tiny_llama, prompts[0][None])[0, 3])
        with gated_heads(tiny_llama, changed):
            moved = float(last_logits(tiny_llama, prompts[0][None])[0, 3])
    assert (moved - base) / step == pytest.approx(float(gates.grad[7]), abs=0.05 * float(gates.grad.abs().max()))


def test_prompts_of_equal_length_run_together(prompts):
    batches = by_length(prompts)
    assert [(numbers.tolist(), tokens.shape[1]) for numbers, tokens in batches] == [([3], 3), ([0, 2], 5), ([1], 8)]
    assert [len(numbers) for numbers, _ in by_length(prompts, at_most=1)] == [1, 1, 1, 1]


def test_heads_are_named_by_layer(tiny_llama):
    grid = HeadGrid.of(tiny_llama)
    assert len(grid) == 12
    assert grid.names[7] == (1, 3)
    assert grid.layer_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert heads_of([(1, 3), (0, 0)], grid).nonzero()[:, 0].tolist() == [0, 7]
    with pytest.raises(ConfigurationError, match=r"no head \(3, 0\)"):
        heads_of([(3, 0)], grid)


def test_bad_input_is_named(tiny_llama, prompts):
    with pytest.raises(ConfigurationError, match="position is 'first'"):
        head_outputs(tiny_llama, prompts, "first")
    with pytest.raises(CalibrationError, match="3 tokens"):
        head_outputs(tiny_llama, prompts, 4)
    with pytest.raises(CalibrationError, match="0 prompts"):
        head_outputs(tiny_llama, [])
    with pytest.raises(ConfigurationError, match="12 heads"), gated_heads(tiny_llama, torch.ones(5)):
        pass
    with (
        pytest.raises(ConfigurationError, match="means are of"),
        gated_heads(tiny_llama, torch.ones(12), [torch.ones(2, 3)]),
    ):
        pass
