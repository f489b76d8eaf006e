import pytest
import torch

from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.features.circuit_edges import acdc, acdc_scores, edge_attribution, edge_effects, forward_edges
from gossamer.features.circuit_scores import (
    circuit_roc,
    completeness,
    faithfulness,
    random_circuits,
    top_heads,
)
from gossamer.features.circuit_tasks import CircuitTask
from gossamer.features.head_importance import (
    ablation_effects,
    attribution_patching,
    head_gradients,
    mean_difference,
    subnetwork_probing,
)
from gossamer.features.head_paths import HeadPaths
from gossamer.features.heads import HeadGrid, gated_heads, last_logits, mean_heads


@pytest.fixture
def task(tiny_llama):
    """What the random model happens to predict, so that it is solved."""
    generator = torch.Generator().manual_seed(2)
    positive = [torch.randint(97, (6,), generator=generator) for _ in range(4)]
    negative = [
        torch.cat([prompt[:2], torch.randint(97, (1,), generator=generator), prompt[3:]]) for prompt in positive
    ]
    with torch.no_grad():
        logits = last_logits(tiny_llama, torch.stack(positive))
    return CircuitTask(positive, negative, logits.argmax(1)[:, None], logits.argmin(1)[:, None])


def test_nothing_added_changes_nothing(tiny_llama, task):
    tokens = torch.stack(task.positive)
    paths = HeadPaths(tiny_llama, tokens)
    zeros = torch.zeros(1, 1, 4, 48)
    with torch.no_grad():
        wanted = last_logits(tiny_llama, tokens)
        found = paths.run(tokens, lambda layer: zeros if layer < 3 else None)
        assert torch.allclose(paths.run(tokens), wanted, atol=1e-6)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_is_added_for_all_heads_of_a_layer_is_added_to_what_attention_reads(tiny_llama, task):
    tokens = torch.stack(task.positive)
    added = torch.randn(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = HeadPaths(tiny_llama, tokens).run(
            tokens, lambda layer: added.expand(4, 6, 4, 48) if layer == 1 else None
        )
        hook = tiny_llama.model.layers[1].input_layernorm.register_forward_pre_hook(
            lambda module, args: (args[0] + added,)
        )
        wanted = last_logits(tiny_llama, tokens)
        hook.remove()
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_is_added_for_one_head_changes_its_output_alone(tiny_llama, task):
    tokens = torch.stack(task.positive)
    paths = HeadPaths(tiny_llama, tokens)
    added = torch.zeros(4, 48)
    added[0] = 1
    with torch.no_grad():
        paths.run(tokens)
        before = paths.outputs[1]
        paths.run(tokens, lambda layer: added if layer == 1 else None)
    same = [torch.allclose(before[:, :, head], paths.outputs[1][:, :, head], atol=1e-6) for head in range(4)]
    # heads 0 and 1 share keys and values
    assert same == [False, False, True, True]


def test_cutting_every_edge_into_the_logits_replaces_all_that_heads_write_there(tiny_llama, task):
    found = acdc(tiny_llama, task, threshold=1e9)
    assert not found.edges.any()
    assert not found.heads.any()
    # readers that nothing reads are passed over, so only edges into the logits were tried
    assert found.runs == 1 + 12


def test_acdc_without_tolerance_keeps_what_matters(tiny_llama, task):
    found = acdc(tiny_llama, task, threshold=1e-9)
    assert found.edges[:, -1].any()
    assert not (found.edges & ~forward_edges(HeadGrid.of(tiny_llama))).any()
    scores, runs = acdc_scores(tiny_llama, task, [1e-9, 1e9])
    assert torch.equal(scores > 0, found.heads)
    assert runs > found.runs


def test_edges_cut_alone_agree_with_acdc_on_what_matters(tiny_llama, task):
    effects = edge_effects(tiny_llama, task)
    possible = forward_edges(HeadGrid.of(tiny_llama))
    assert bool((effects[possible] >= -1e-6).all())
    assert not effects[~possible].any()
    # the only edges that ACDC keeps at a threshold that just one edge reaches
    best = int(effects[:, -1].argmax())
    kept = acdc(tiny_llama, task, float(effects.max()) * 0.99).edges
    assert kept.sum() <= 3 or kept[best, -1]


def test_edge_attribution_is_the_slope_of_the_metric(tiny_llama, task):
    task = task.part([0])
    tokens, twin = torch.stack(task.positive), torch.stack(task.negative)
    scores = edge_attribution(tiny_llama, task)
    paths, step, (writer, reader) = HeadPaths(tiny_llama, tokens), 1e-2, (1, 2)
    with torch.no_grad():
        paths.run(twin)
        instead = paths.outputs[0][:, :, writer]
        base = task.score(paths.run(tokens), torch.tensor([0]))
        change = instead - paths.outputs[0][:, :, writer]

        def shift(layer):
            added = torch.zeros(1, 6, 4, 48)
            added[:, :, reader] = step * change
            return added if layer == 1 else None

        moved = task.score(paths.run(tokens, shift), torch.tensor([0]))
    assert float((moved - base) / step) == pytest.approx(float(scores[writer, 4 + reader]), rel=0.05, abs=1e-5)
    assert float(scores[4:8, :8].abs().sum()) == 0


def test_single_ablations_agree_with_runs_of_the_whole_model(tiny_llama, task):
    means = mean_heads(tiny_llama, task.prompts)
    found = ablation_effects(tiny_llama, task, means)
    whole = float(task.measure(tiny_llama).mean())
    for head in (0, 5, 11):
        gates = torch.ones(12)
        gates[head] = 0
        wanted = 1 - float(task.measure(tiny_llama, gates, means).mean()) / whole
        assert float(found[head]) == pytest.approx(wanted, abs=1e-5)
    assert "forward" not in tiny_llama.model.layers[0].__dict__


def test_attribution_patching_is_the_slope_towards_the_twin(tiny_llama, task):
    task = task.part([1])
    found = attribution_patching(tiny_llama, task)
    tokens, twin = torch.stack(task.positive), torch.stack(task.negative)
    seen, step = {}, 1e-2

    def moved(head):
        proj = tiny_llama.model.layers[2].self_attn.o_proj
        hook = proj.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
        last_logits(tiny_llama, twin)
        hook.remove()
        z = seen["z"]

        def mix(module, args):
            x = args[0].clone()
            part = slice(12 * head, 12 * head + 12)
            x[..., part] += step * (z[..., part] - x[..., part])
            return (x,)

        hook = proj.register_forward_pre_hook(mix)
        value = task.score(last_logits(tiny_llama, tokens), torch.tensor([0]))
        hook.remove()
        return float(value)

    with torch.no_grad():
        base = float(task.measure(tiny_llama))
        for head in range(4):
            wanted = abs(moved(head) - base) / step
            assert wanted == pytest.approx(float(found[8 + head]), rel=0.1, abs=1e-4)


def test_gradients_need_no_trainable_weights(tiny_llama, task):
    wanted = attribution_patching(tiny_llama, task)
    tiny_llama.requires_grad_(False)
    assert torch.allclose(attribution_patching(tiny_llama, task), wanted, atol=1e-6)
    assert head_gradients(tiny_llama, task).shape == (12,)
    assert edge_attribution(tiny_llama, task).any()


def test_subnetwork_probing_opens_nothing_if_gates_are_dear(tiny_llama, task):
    means = mean_heads(tiny_llama, task.prompts)
    dear = subnetwork_probing(tiny_llama, task, means, penalty=100.0, steps=60)
    free = subnetwork_probing(tiny_llama, task, means, penalty=0.0, steps=10)
    assert float(dear.max()) < 0.2 < 0.8 < float(free.min())
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_whole_and_empty_circuits(tiny_llama, task):
    means = mean_heads(tiny_llama, task.prompts)
    everything = torch.ones(12, dtype=torch.bool)
    assert faithfulness(tiny_llama, everything, task, means) == pytest.approx(1, abs=1e-5)
    assert completeness(tiny_llama, ~everything, task, means) == pytest.approx(1, abs=1e-5)
    with torch.no_grad(), gated_heads(tiny_llama, torch.zeros(12), means):
        wanted = task.score(last_logits(tiny_llama, torch.stack(task.positive)), torch.arange(4)).mean()
    whole = task.measure(tiny_llama).mean()
    assert faithfulness(tiny_llama, ~everything, task, means) == pytest.approx(float(wanted / whole), abs=1e-5)


def test_roc_by_hand_with_ties():
    scores, truth = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, False, False])
    found = circuit_roc(scores, truth)
    # of four pairs three are right and one ties
    assert found.auc == pytest.approx(3.5 / 4)
    assert found.recall == [1.0, 1.0, 0.5]
    assert found.precision == pytest.approx([0.5, 2 / 3, 1.0])
    assert found.best_f1 == pytest.approx(0.8)
    assert circuit_roc(torch.ones(4), truth).auc == 0.5


def test_random_circuits_have_the_size_of_the_circuit():
    circuit = torch.arange(12) < 5
    drawn = random_circuits(circuit, 7)
    assert drawn.sum(1).tolist() == [5] * 7
    assert len({tuple(row.tolist()) for row in drawn}) > 1
    assert top_heads(torch.tensor([1.0, 3.0, 3.0]), 1).tolist() == [False, True, False]


def test_mean_difference_by_hand():
    outputs = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    assert mean_difference(outputs, torch.tensor([True, False, False])).tolist() == [5.0]


def test_bad_input_is_named(tiny_llama, task):
    with pytest.raises(CalibrationError, match="some must, and some not"):
        circuit_roc(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(CalibrationError, match=r"scores are \(3,\)"):
        circuit_roc(torch.ones(3), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="threshold is -1"):
        acdc(tiny_llama, task, -1)
    backwards = CircuitTask(task.positive, task.negative, task.wrong, task.right)
    with pytest.raises(ConfigurationError, match="must be above 0"):
        faithfulness(tiny_llama, torch.ones(12, dtype=torch.bool), backwards, mean_heads(tiny_llama, task.positive))
    with pytest.raises(ConfigurationError, match="must be above 0"):
        ablation_effects(tiny_llama, backwards, mean_heads(tiny_llama, task.positive))
    with pytest.raises(ConfigurationError, match="steps 0"):
        subnetwork_probing(tiny_llama, task, steps=0)


def test_fused_queries_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)).eval()
    with pytest.raises(ModelError, match="matrices of their own"):
        HeadPaths(model, torch.zeros(1, 3, dtype=torch.int64))
