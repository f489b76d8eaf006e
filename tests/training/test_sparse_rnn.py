from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gossamer.core import scores
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError, TargetError, UnknownNameError
from gossamer.training.sparse_rnn import SparseRNN, gates, prune_rnn, recurrent_targets, regain

LAYERS = [nn.RNN, nn.GRU, nn.LSTM]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.body = nn.GRU(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens))[0][:, -1])


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger()


def test_the_smallest_weights_of_each_matrix_go():
    layer = nn.RNN(2, 2)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[0.1, -4.0], [3.0, -0.2]]))
        layer.weight_hh_l0.copy_(torch.tensor([[-5.0, 0.3], [0.4, 6.0]]))
    masks = prune_rnn(layer, 0.5)
    assert layer.weight_ih_l0.tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert layer.weight_hh_l0.tolist() == [[-5.0, 0.0], [0.0, 6.0]]
    assert masks["weight_ih_l0"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.77, 1.0])
def test_every_matrix_of_every_layer_and_direction_loses_exactly_its_share(kind, amount):
    layer = kind(5, 7, num_layers=2, bidirectional=True)
    biases = {name: value.clone() for name, value in layer.named_parameters() if "bias" in name}
    masks = prune_rnn(layer, amount)
    assert len(masks) == 8
    for mask in masks.values():
        assert int((~mask).sum()) == int(round(amount * 100) * mask.numel() // 100)
    assert not masks.violations(layer)
    assert all(torch.equal(dict(layer.named_parameters())[name], value) for name, value in biases.items())


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_are_pruned_too(kind):
    cell = kind(5, 7)
    assert set(prune_rnn(cell, 0.5)) == {"weight_ih", "weight_hh"}


def test_one_threshold_can_empty_a_gate_and_one_for_each_gate_cannot():
    torch.manual_seed(0)
    whole, split = nn.LSTM(6, 5), nn.LSTM(6, 5)
    with torch.no_grad():
        whole.weight_hh_l0[5:10] *= 1e-3  # the forget gate
    split.load_state_dict(whole.state_dict())
    joint = prune_rnn(whole, 0.4)["weight_hh_l0"].view(4, -1)
    alone = prune_rnn(split, 0.4, per_gate=True)["weight_hh_l0"].view(4, -1)
    assert joint.sum(1)[1] == 0
    assert alone.sum(1).tolist() == [15] * 4
    # within a gate the largest remain
    for gate, mask in zip(whole.weight_hh_l0.view(4, -1).abs(), joint):
        assert not mask.any() or gate[mask].min() >= gate[~mask].max()


def test_only_the_chosen_matrices_change(tagger):
    before = {name: value.clone() for name, value in tagger.state_dict().items()}
    masks = prune_rnn(tagger, 0.5, which=["hh"])
    assert set(masks) == {"body.weight_hh_l0", "body.weight_hh_l1"}
    changed = {name for name, value in tagger.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(masks)
    assert set(prune_rnn(tagger, 0.5, which="ih")) == {"body.weight_ih_l0", "body.weight_ih_l1"}


def test_a_ranking_of_the_model_lets_matrices_compete():
    torch.manual_seed(0)
    layer = nn.GRU(4, 4)
    with torch.no_grad():
        layer.weight_ih_l0 *= 1e-3
    masks = prune_rnn(layer, 0.5, scope="model")
    assert not masks["weight_ih_l0"].any()
    assert masks["weight_hh_l0"].all()


def test_another_score_may_decide():
    layer = nn.GRU(4, 4)
    draw = functools.partial(scores.random, generator=torch.Generator().manual_seed(3))
    first = prune_rnn(layer, 0.5, score=draw)
    other = nn.GRU(4, 4)
    again = prune_rnn(other, 0.5, score=functools.partial(scores.random, generator=torch.Generator().manual_seed(3)))
    assert first == again


def test_all_gone_leaves_an_output_that_does_not_depend_on_the_input():
    layer = nn.LSTM(3, 4)
    prune_rnn(layer, 1.0)
    a, b = layer(torch.randn(5, 1, 3))[0], layer(torch.randn(5, 1, 3))[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"amount": 1.2}, SparsityError, "1.2"),
        ({"amount": -0.1}, SparsityError, "-0.1"),
        ({"amount": True}, SparsityError, "True"),
        ({"amount": float("nan")}, SparsityError, "nan"),
        ({"amount": 0.5, "which": ["io"]}, UnknownNameError, "io"),
        ({"amount": 0.5, "which": []}, ConfigurationError, "which is empty"),
        ({"amount": 0.5, "scope": "layer"}, ConfigurationError, "'layer'"),
        ({"amount": 0.5, "scope": "model", "per_gate": True}, ConfigurationError, "per_gate"),
    ],
)
def test_bad_arguments_are_named_in_one_line_and_nothing_changes(arguments, error, named):
    layer = nn.GRU(3, 3)
    before = [value.clone() for value in layer.parameters()]
    with pytest.raises(error) as caught:
        prune_rnn(layer, **arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(before, layer.parameters()))


def test_a_module_without_recurrence_and_damaged_weights_are_refused():
    with pytest.raises(TargetError, match="Linear"):
        prune_rnn(nn.Linear(2, 2), 0.5)
    layer = nn.GRU(3, 3)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight_hh_l0"):
        prune_rnn(layer, 0.5)


def test_gates_are_those_that_torch_stacks():
    for kind in (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell):
        layer = kind(3, 5)
        for target in recurrent_targets(layer):
            assert gates(layer) * 5 == target.shape[0]


def train_for(model, steps, weight_decay=0.0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(5, (16, 4), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 3).backward()
        optimizer.step()


def test_retraining_counts_epochs_and_keeps_zeros(tagger):
    masks = prune_rnn(tagger, 0.5)
    readings = iter([0.5, 0.7, 0.9, 1.0])
    found = regain(tagger, masks, lambda: train_for(tagger, 3, 0.1), lambda: next(readings), wanted=0.9, epochs=5)
    assert found.accuracies == (0.5, 0.7, 0.9)
    assert found.epochs == 2
    assert not masks.violations(tagger)


def test_retraining_gives_up_and_says_so(tagger):
    masks = prune_rnn(tagger, 0.9)
    found = regain(tagger, masks, lambda: None, lambda: 0.5, wanted=0.9, epochs=2)
    assert found.epochs is None
    assert len(found.accuracies) == 3
    assert regain(tagger, masks, lambda: None, lambda: 0.95, wanted=0.9).epochs == 0
    with pytest.raises(ConfigurationError, match="epochs is 0"):
        regain(tagger, masks, lambda: None, lambda: 0.5, 0.9, epochs=0)


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_the_method_prunes_as_the_function_does_and_holds_through_training(tagger, scope):
    twin = Tagger()
    twin.load_state_dict(tagger.state_dict())
    expected = prune_rnn(twin, 0.6, scope=scope)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.01)
    run = SparseRNN(sparsity=0.6, scope=scope).attach(tagger, optimizer)
    assert run.masks == expected
    before = tagger.body.weight_hh_l0.clone()
    for _ in range(3):
        optimizer.zero_grad()
        tagger(torch.randint(5, (4, 4))).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, tagger.body.weight_hh_l0)
    assert run.finalize() == expected
    assert not expected.violations(tagger)


def test_the_method_takes_only_layers_that_are_named():
    model = nn.ModuleDict({"one": nn.GRU(3, 3), "two": nn.GRU(3, 3)})
    names = [target.name for target in SparseRNN(exclude=("two",), which=("hh",)).targets(model)]
    assert names == ["one.weight_hh_l0"]
    with pytest.raises(TargetError, match="three"):
        SparseRNN(include=("three",)).targets(model)
