import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.features.circuits import (
    DiscreteSAECircuit,
    count_unique,
    discretise,
    geometric_median,
    named_in_best,
    train_head_sae,
)


def planted(heads=6, prompts=12, width=10, circuit=(1, 4), seed=0):
    """Heads that write one of two patterns; on positives those of the circuit write one of three others."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(heads, 5, width, generator=generator) * 2
    labels = torch.arange(2 * prompts) < prompts
    which = torch.randint(2, (2 * prompts, heads), generator=generator)
    for head in circuit:
        which[labels, head] = torch.randint(2, 5, (prompts,), generator=generator)
    outputs = torch.stack([patterns[head][which[:, head]] for head in range(heads)], 1)
    return outputs + 0.05 * torch.randn(outputs.shape, generator=generator), labels


def brute_force_unique(codes, positive):
    columns = range(codes.shape[1])
    sets = [(set(codes[positive, c].tolist()), set(codes[~positive, c].tolist())) for c in columns]
    return [len(one - other) for one, other in sets], [len(one | other) for one, other in sets]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_counting_agrees_with_sets(rows, columns, codes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(codes, (rows, columns), generator=generator)
    positive = torch.rand(rows, generator=generator) < 0.5
    unique, distinct = count_unique(values, positive)
    assert (unique.tolist(), distinct.tolist()) == brute_force_unique(values, positive)


def test_heads_with_codes_of_their_own_on_positives_score_highest():
    outputs, labels = planted()
    found = DiscreteSAECircuit(n_codes=20, l1=0.05, epochs=300, lr=0.01).fit(outputs, labels)
    assert set(found.node_scores_.topk(2).indices.tolist()) == {1, 4}
    assert found.circuit(0.2).nonzero()[:, 0].tolist() == [1, 4]
    assert float(found.edge_scores_[1, 4]) == found.edge_scores_.max()
    assert set(found.edge_node_scores_.topk(2).indices.tolist()) == {1, 4}


def test_shuffled_labels_leave_nothing_to_find():
    outputs, labels = planted(prompts=40)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    found = DiscreteSAECircuit(n_codes=20, l1=0.05, epochs=200, lr=0.01).fit(outputs, shuffled)
    assert found.node_scores_.max() <= 2


def test_order_of_prompts_does_not_matter_to_counts():
    outputs, labels = planted()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    kwargs = {"n_codes": 20, "epochs": 50, "n_examples": len(labels)}
    one = DiscreteSAECircuit(**kwargs).fit(outputs, labels)
    codes = discretise(one.sae_, outputs[order])
    assert torch.equal(count_unique(codes, labels[order])[0].float(), one.node_scores_)


def test_edges_agree_with_a_loop_over_pairs():
    outputs, labels = planted(heads=4, circuit=(1, 3))
    found = DiscreteSAECircuit(n_codes=7, epochs=20).fit(outputs, labels)
    for a in range(4):
        for b in range(4):
            pairs = [tuple(row) for row in found.codes_[:, [a, b]].tolist()]
            ones = {pair for pair, label in zip(pairs, labels) if label}
            zeros = {pair for pair, label in zip(pairs, labels) if not label}
            assert a == b or found.edge_scores_[a, b] == len(ones - zeros)


def test_normalized_scores_are_shares():
    outputs, labels = planted()
    found = DiscreteSAECircuit(n_codes=20, epochs=20, normalize=True).fit(outputs, labels)
    assert 0 <= float(found.node_scores_.min()) <= float(found.node_scores_.max()) <= 1


@pytest.mark.parametrize(("unit", "axis"), [("features", 1), ("coordinates", 0)])
def test_weights_stay_of_length_one(unit, axis):
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    sae = train_head_sae(rows, n_codes=9, epochs=5, unit=unit)
    assert torch.allclose(sae.encoder.norm(dim=1), torch.ones(9))
    assert torch.allclose(sae.decoder.norm(dim=axis), torch.ones(sae.decoder.shape[1 - axis]), atol=1e-6)


def test_training_lowers_the_loss_and_the_penalty_silences():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))

    def error(sae):
        return float((sae(rows).output.detach() - rows).square().mean())

    assert error(train_head_sae(rows, 16, 0.0, 300, 1e-2)) < 0.5 * error(train_head_sae(rows, 16, 0.0, 1, 1e-2))
    silent = train_head_sae(rows, 16, 100.0, 500, 1e-2)
    assert (discretise(silent, rows) == 16).float().mean() > 0.9


def test_rescaling_makes_the_unit_of_outputs_irrelevant():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    one, other = (discretise(train_head_sae(rows * by, 8, epochs=30, rescale=True), rows * by) for by in (1.0, 64.0))
    assert torch.equal(one, other)


def test_geometric_median_ignores_an_outlier():
    rows = torch.cat([torch.zeros(9, 2), torch.tensor([[1000.0, 0.0]])])
    assert geometric_median(rows).norm() < 1e-3
    # for three equal distances it is the centre
    triangle = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    assert torch.allclose(geometric_median(triangle), torch.zeros(2), atol=1e-5)


def test_pairs_that_tie_at_the_border_share_what_is_left():
    scores = torch.zeros(4, 4)
    scores[0, 1] = scores[1, 0] = 2
    found = named_in_best(scores, entries=4)
    # one pair is best; the other five share one pair
    assert torch.allclose(found, torch.tensor([1 + 2 / 5, 1 + 2 / 5, 3 / 5, 3 / 5]))
    assert float(found.sum()) == pytest.approx(4)


def test_best_edges_lead_forward():
    outputs, labels = planted()
    found = DiscreteSAECircuit(n_codes=20, l1=0.05, epochs=300, lr=0.01).fit(outputs, labels)
    layer_of = torch.tensor([0, 0, 0, 1, 1, 1])
    edges = found.edges(3, layer_of)
    assert edges[0].tolist() == [1, 4]
    assert all(layer_of[a] < layer_of[b] for a, b in edges.tolist())
    assert len(found.edges(100, layer_of)) == 9


def test_softmax_may_be_taken_in_each_layer():
    outputs, labels = planted()
    found = DiscreteSAECircuit(n_codes=20, epochs=20).fit(outputs, labels)
    layer_of = torch.tensor([0, 0, 0, 1, 1, 1])
    assert float(found.probabilities().sum()) == pytest.approx(1)
    assert float(found.probabilities(layer_of=layer_of).sum()) == pytest.approx(2)


def test_examples_are_of_both_kinds_even_if_one_is_rare():
    labels = torch.tensor([True] * 30 + [False])
    chosen = DiscreteSAECircuit(n_examples=10)._examples(labels)
    assert len(set(chosen.tolist())) == 10
    assert 30 in chosen.tolist()


def test_it_is_an_estimator():
    first = DiscreteSAECircuit(n_codes=5, l1=0.1)
    assert clone(first).get_params() == first.get_params()


def test_bad_input_is_named():
    outputs, labels = planted()
    with pytest.raises(CalibrationError, match="prompts, heads"):
        DiscreteSAECircuit().fit(outputs[0], labels)
    with pytest.raises(CalibrationError, match="all labels are the same"):
        DiscreteSAECircuit().fit(outputs, torch.ones_like(labels))
    with pytest.raises(ConfigurationError, match="n_codes is 0"):
        DiscreteSAECircuit(n_codes=0).fit(outputs, labels)
    outputs[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="outputs of heads"):
        DiscreteSAECircuit(n_examples=24).fit(outputs, labels)
