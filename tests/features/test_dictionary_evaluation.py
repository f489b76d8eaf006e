import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.activation_rules import TopK
from gossamer.features.dictionaries import Dictionary
from gossamer.features.dictionary_evaluation import (
    Counterfactual,
    Probes,
    approximation,
    control,
    evaluate_dictionary,
)
from gossamer.features.dictionary_failures import occlusion_curve, splits, two_modes, two_variables
from gossamer.features.gated import Gated, GatedLearner, train_on_rows
from gossamer.features.latent_scores import latent_f1
from gossamer.features.sae import SAE
from gossamer.features.sections import Node, head_node, node_gradients, read_nodes, replaced_logits
from gossamer.features.sparse_edits import greedy_edits, interpreted_edit
from gossamer.features.training import TrainingSettings


def coordinates(width=6):
    """The dictionary of positive and negative coordinates."""
    eye = torch.eye(width)
    vectors = torch.cat([eye, -eye])
    return Dictionary(vectors, torch.zeros(width), lambda x: (x @ vectors.t()).relu())


def random_dictionary(features=9, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(features, width, generator=generator)
    encoder = torch.randn(features, width, generator=generator)
    return Dictionary(vectors, torch.randn(width, generator=generator), lambda x: (x @ encoder.t()).relu())


def greedy_by_trying(dictionary, x, wanted, count):
    """One activation at a time, every feature tried."""
    edited, chosen = x.clone(), []
    for row in range(len(x)):
        change = dictionary.encode(wanted[row : row + 1])[0] - dictionary.encode(x[row : row + 1])[0]
        picked = []
        for _ in range(count):
            now = float((wanted[row] - edited[row]).norm())
            options = {
                j: float((wanted[row] - edited[row] - change[j] * dictionary.vectors[j]).norm())
                for j in range(len(change))
                if j not in picked
            }
            best = min(options, key=options.get)
            if options[best] >= now - 1e-9:
                break
            edited[row] += change[best] * dictionary.vectors[best]
            picked.append(best)
        chosen.append(picked + [-1] * (count - len(picked)))
    return edited, chosen


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_greedy_edits_agree_with_trying_every_feature(seed, count):
    generator = torch.Generator().manual_seed(seed)
    dictionary = random_dictionary(seed=seed)
    x, wanted = torch.randn(2, 4, 5, generator=generator)
    found = greedy_edits(dictionary, x, wanted, [count])[count]
    edited, chosen = greedy_by_trying(dictionary, x, wanted, count)
    assert found.features.tolist() == chosen
    assert torch.allclose(found.activations, edited, atol=1e-4)


def test_coordinates_are_exchanged_one_by_one():
    x, wanted = torch.tensor([[3.0, 0.0, 1.0, 0, 0, 0]]), torch.tensor([[0.0, 2.0, 1.0, 0, 0, 0]])
    found = greedy_edits(coordinates(), x, wanted, [1, 2, 3])
    assert found[1].activations.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert torch.equal(found[2].activations, wanted)
    assert found[3].features.tolist() == [[0, 1, -1]]
    # of the weights 9/10 and 1/10 the first was touched; what is put in had none
    assert found[2].magnitude.tolist() == pytest.approx([0.9])


def test_weights_sum_up_to_one():
    dictionary = random_dictionary()
    codes = dictionary.encode(torch.randn(20, 5, generator=torch.Generator().manual_seed(1)))
    codes = codes[codes.any(1)]
    assert torch.allclose(dictionary.weights(codes).sum(1), torch.ones(len(codes)), atol=1e-4)


def test_interpreted_edits_exchange_what_tells_the_values():
    dictionary = coordinates()
    f1 = torch.zeros(12, 2)
    f1[0, 0], f1[1, 1], f1[2] = 1.0, 1.0, 0.5
    x, wanted = torch.tensor([[3.0, 0.0, 1.0, 0, 0, 0]]), torch.tensor([[0.0, 2.0, 1.0, 5.0, 0, 0]])
    found = interpreted_edit(dictionary, x, wanted, torch.tensor([0]), torch.tensor([1]), f1, 1)
    assert found.activations.tolist() == [[0, 2, 1, 0, 0, 0]]
    assert found.features.tolist() == [[0, 1]]
    # at most as many as are active
    many = interpreted_edit(dictionary, x, wanted, torch.tensor([0]), torch.tensor([1]), f1, 12)
    assert torch.allclose(many.activations, wanted)


def test_autoencoders_are_taken_back_into_the_units_of_activations():
    sae = SAE(5, 20, TopK(3))
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 7 + 2
    sae.prepare(x)
    sae.eval()
    assert torch.allclose(Dictionary.of_sae(sae).reconstruct(x), sae(x).output.detach(), atol=1e-4)


def test_principal_components_reconstruct_everything_if_all_are_kept():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    whole, part = Dictionary.principal(x, 5), Dictionary.principal(x, 5, k=2)
    assert torch.allclose(whole.reconstruct(x), x, atol=1e-5)
    assert (part.encode(x) > 0).sum(1).max() <= 2
    assert (part.reconstruct(x) - x).norm() > 0.1
    with pytest.raises(ConfigurationError, match="components is 6"):
        Dictionary.principal(x, 6)


def brute_force_f1(active, value, size):
    precision = (active & (value == size)).sum() / max(1, int(active.sum()))
    recall = (active & (value == size)).sum() / max(1, int((value == size).sum()))
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def test_f1_agrees_with_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(200, 6, generator=generator) < 0.3
    active[:, 5] = False
    labels = {"a": torch.randint(4, (200,), generator=generator)}
    found = latent_f1(active, labels)
    for feature in range(6):
        for value in range(4):
            wanted = brute_force_f1(active[:, feature], labels["a"], value)
            assert float(found.table["a"][feature, value]) == pytest.approx(wanted, abs=1e-6)
    assert float(found.best()[5]) == 0
    assert (found.grouped["a"] >= found.table["a"].amax(1) - 1e-6).all()


def test_a_union_of_values_is_found():
    value = torch.arange(300) % 6
    found = latent_f1(((value == 1) | (value == 4))[:, None], {"a": value})
    assert float(found.table["a"].max()) == pytest.approx(2 / 3)
    assert float(found.grouped["a"][0]) == 1
    assert float(latent_f1(((value == 1) | (value == 4))[:, None], {"a": value}, 1).grouped["a"][0]) < 0.7
    assert found.interpretable() == 1
    assert found.cover() == {"a": 0.0}
    assert found.cover(0.6)["a"] == pytest.approx(2 / 6)


def linear_patch(x):
    """Logits that are the activations."""
    return x


def first_over_second(logits):
    return logits[:, 0] - logits[:, 1]


def test_a_perfect_dictionary_suffices_and_is_needed():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    x[:30, 0] += 3
    mean = torch.zeros(6)
    good = approximation(x, x, mean, linear_patch, first_over_second)
    none = approximation(x, mean.expand_as(x), mean, linear_patch, first_over_second)
    assert (good.recovered, good.agreement, good.divergence) == (1, 1, 0)
    assert none.recovered == 0
    assert none.divergence > 0
    with pytest.raises(CalibrationError, match="choose a place that matters"):
        approximation(x, x, x.mean(0), linear_patch, first_over_second)


def counterfactual(count=400):
    """Two variables in coordinates of their own; the answer is the first."""
    generator = torch.Generator().manual_seed(0)
    old = {"a": torch.randint(3, (count,), generator=generator), "b": torch.randint(2, (count,), generator=generator)}
    new = {**old, "a": (old["a"] + 1) % 3}

    def activations(labels):
        x = torch.zeros(count, 6)
        x[torch.arange(count), labels["a"]] = 2
        x[torch.arange(count), 3 + labels["b"]] = 3
        return x

    def moved(logits):
        return logits[torch.arange(len(logits)), new["a"]] - logits[torch.arange(len(logits)), old["a"]]

    task = Counterfactual("a", activations(old), activations(new), old, new, lambda x: x[:, :3], moved)
    return task, Probes(task.x, old)


def test_the_wanted_activation_is_perfect_control_and_none_is_none():
    task, probes = counterfactual()
    perfect, none = control(task, task.wanted, probes), control(task, task.x, probes)
    assert (perfect.distance, perfect.agreement, perfect.moved, perfect.preserved) == (0, 1, 1, 1)
    assert (none.distance, none.agreement, none.moved) == (1, 0, 0)
    spoiled = task.wanted.clone()
    spoiled[:, 3:5] = spoiled[:, 3:5].flip(1)
    assert control(task, spoiled, probes).preserved == 0


def test_a_dictionary_of_the_variables_needs_two_features_for_an_edit():
    task, _ = counterfactual()
    report = evaluate_dictionary(
        coordinates(), task.x, task.old, task.x, torch.square, lambda logits: logits.sum(1), [task], k=(1, 2)
    )
    assert report.sufficiency.recovered == pytest.approx(1)
    assert report.necessity.recovered == pytest.approx(0, abs=1e-6)
    assert report.features_for("a") == 2
    assert report.control["a"][1].moved == pytest.approx(0.5)
    assert report.interpreted["a"][1].moved == pytest.approx(1)
    assert report.f1.cover() == {"a": 1.0, "b": 1.0}
    assert report.to_dict()["control"]["a"]["2"]["agreement"] == 1


def test_gates_decide_apart_from_values():
    sae = SAE(4, 8, Gated())
    with torch.no_grad():
        sae.activation.shift.fill_(5.0)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    codes = sae.encode(x).to_dense()
    affinity = sae.affinity(x)
    assert torch.equal(codes > 0, affinity > 0)
    assert torch.allclose(codes[codes > 0], affinity[codes > 0] + 5)


def test_a_gated_autoencoder_learns_sparse_directions():
    x, _ = two_variables(1.5, values=6, width=16, count=1500)
    sae = SAE(16, 24, Gated())
    settings_ = TrainingSettings(steps=600, batch_size=500, learning_rate=3e-3, sparsity=0.05, auxiliary="none")
    learner = train_on_rows(sae, x, settings_)
    assert isinstance(learner, GatedLearner)
    found = sae(x)
    left = float((found.output.detach() - x).square().sum() / (x - x.mean(0)).square().sum())
    assert left < 0.3
    assert float(found.codes.counts.float().mean()) < 10
    assert learner.history[-1]["loss"] < learner.history[0]["loss"]


def test_occlusion_is_measured_on_both_variables():
    points = occlusion_curve(lambda x: Dictionary.random(x, 5, 1), [1.0, 2.0], values=4, width=8, count=500)
    assert [point.ratio for point in points] == [1.0, 2.0]
    assert all(0 <= point.smaller <= 1 for point in points)
    x, labels = two_variables(3.0, values=4, width=8, count=500, noise=0.0)
    # a dictionary with the larger variable's vectors alone
    means = torch.stack([x[labels["larger"] == value].mean(0) for value in range(4)])
    directions = torch.nn.functional.normalize(means - x.mean(0), dim=1)

    def nearest(y):
        scores = (y - x.mean(0)) @ directions.t()
        return torch.nn.functional.one_hot(scores.argmax(1), 4).float()

    (point,) = occlusion_curve(
        lambda _: Dictionary(directions, x.mean(0), nearest), [3.0], values=4, width=8, count=500, noise=0.0
    )
    assert point.larger > 0.9 > 0.6 > point.smaller


def test_splits_count_features_that_keep_to_a_mode():
    x, labels = two_modes(separation=20.0, width=4)
    mode = labels["mode"]
    half = x[:, 0] > x[mode == 1, 0].median()
    marks = torch.stack([mode == 0, (mode == 1) & half, (mode == 1) & ~half, mode >= 0], 1)
    dictionary = Dictionary(torch.eye(4), torch.zeros(4), lambda y: marks.float())
    assert splits(dictionary, x, mode) == pytest.approx(1.5)
    with pytest.raises(ConfigurationError, match=r"ratio is 0\.5"):
        two_variables(0.5)


def test_nodes_are_read_and_replaced(tiny_llama, batches):
    tokens = torch.cat(batches[:2])
    nodes = [Node("model.layers.1", "output", -1), head_node(tiny_llama, 9, "read", 5)]
    values = read_nodes(tiny_llama, tokens, nodes, batch=3)
    assert [tuple(value.shape) for value in values] == [(4, 48), (4, 12)]
    plain = replaced_logits(tiny_llama, tokens, nodes, [])
    assert torch.allclose(replaced_logits(tiny_llama, tokens, nodes, values, batch=3), plain, atol=1e-5)
    # the stream at the last token decides all
    swapped = replaced_logits(tiny_llama, tokens, nodes[:1], [values[0].flip(0)])
    later = torch.stack([torch.zeros(48)] * 4)
    assert not torch.allclose(swapped, plain, atol=1e-3)
    assert not torch.allclose(replaced_logits(tiny_llama, tokens, nodes[:1], [later]), swapped, atol=1e-3)


@pytest.mark.parametrize(
    ("part", "module", "first"), [("query", "q_proj", 12), ("key", "k_proj", 0), ("value", "v_proj", 0)]
)
def test_heads_have_queries_and_share_keys(tiny_llama, part, module, first):
    node = head_node(tiny_llama, 5, part, 2)
    assert node == Node(f"model.layers.1.self_attn.{module}", "output", 2, first, 12)


def test_node_gradients_are_slopes(tiny_llama, batches):
    tokens, nodes = batches[0], [Node("model.layers.0", "output", 3), head_node(tiny_llama, 7, "value", 4)]
    slopes = node_gradients(tiny_llama, tokens, nodes, lambda logits, rows: logits[:, 5], batch=1)
    values = read_nodes(tiny_llama, tokens, nodes)
    step = 1e-3
    for number in range(2):
        ends = []
        for sign in (1, -1):
            moved = [value.clone() for value in values]
            moved[number] += sign * step
            ends.append(replaced_logits(tiny_llama, tokens, nodes, moved)[:, 5])
        assert torch.allclose((ends[0] - ends[1]) / (2 * step), slopes[number].sum(1), rtol=0.05, atol=5e-3)


def test_bad_input_is_named(tiny_llama, batches):
    x = torch.zeros(3, 6)
    with pytest.raises(ConfigurationError, match=r"wanted \(2, 6\)"):
        greedy_edits(coordinates(), x, x[:2], [1])
    with pytest.raises(ConfigurationError, match=r"counts are \[0\]"):
        greedy_edits(coordinates(), x, x, [0])
    with pytest.raises(ConfigurationError, match="count is 0"):
        interpreted_edit(coordinates(), x, x, torch.zeros(3).long(), torch.zeros(3).long(), torch.zeros(12, 1), 0)
    with pytest.raises(CalibrationError, match="labels are"):
        latent_f1(torch.zeros(3, 2, dtype=torch.bool), {"a": torch.zeros(2)})
    with pytest.raises(ConfigurationError, match="max_group is 0"):
        latent_f1(torch.zeros(3, 2, dtype=torch.bool), {"a": torch.zeros(3)}, 0)
    with pytest.raises(ConfigurationError, match="there are 12 heads"):
        head_node(tiny_llama, 12, "read", 0)
    with pytest.raises(ConfigurationError, match="no module 'lm'"):
        read_nodes(tiny_llama, batches[0], [Node("lm", "output", 0)])
    with pytest.raises(ConfigurationError, match="1 values"):
        replaced_logits(tiny_llama, batches[0], [], [x])
