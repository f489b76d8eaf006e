"""What every method that acts during training must do. A new one joins by being registered."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gossamer.core.nm_sparsifier import NMSparsifier
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, SparsityError, TargetError
from gossamer.methods import create, methods

STEPS = 24
SPARSIFIERS = [
    name
    for name, spec in methods().items()
    if spec.when == "during training" and isinstance(spec.factory, type) and issubclass(spec.factory, Sparsifier)
]


class Reader(nn.Module):
    """A recurrent layer between two linear ones, and convolutions: something for every method."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.rnn = nn.LSTM(16, 12, batch_first=True)
        self.conv = nn.Conv1d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        states = self.rnn(torch.relu(self.first(x)))[0]
        return self.head(torch.relu(self.conv(states.transpose(1, 2))).mean(2))


def perceptron():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def convolutional(first=16, second=32):
    body = [nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 1), nn.ReLU()]
    body += [nn.Conv2d(second, first, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(first, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 5)), *body)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 5, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)


def network(name, data):
    torch.manual_seed(0)
    if name == "random-search":  # which knows fully connected networks
        return perceptron(), (data[0][:, 0], data[1])
    if name in ("fast-sparse-convnets", "sparsebytenn"):
        return convolutional(), data
    if is_nm(name):  # whose groups of five the widths must divide
        return convolutional(20, 40), data
    return Reader(), data


def is_nm(name):
    return issubclass(methods()[name].factory, NMSparsifier)


def method(name, data, **more):
    known = methods()[name].parameters
    settings = {
        "sparsity": 0.6,
        "end": 18,
        "total": STEPS,
        "every": 3,
        "n_trials": 4,
        "data": data,
        "groups": 4,
        **more,
    }
    if name == "granet":
        settings["end"] = STEPS
    if is_nm(name):
        settings["pattern"] = "2:5"
    if name == "structure-decay":
        settings["kind"] = ("4:5", "3:5", "2:5")
    if known.get("growth") == "hebbian":
        settings["growth"] = "random"
    return create(name, **{key: value for key, value in settings.items() if key in known})


def begin(name, data, state=None, model=None):
    net, batch = network(name, data)
    net = model or net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.05)
    return net, optimizer, method(name, batch).attach(net, optimizer, state), batch


def train(net, optimizer, batch, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*stays dense")
@pytest.mark.parametrize("name", SPARSIFIERS)
class TestEverySparsifier:
    def test_nothing_that_is_masked_ever_moves(self, name, data):
        net, optimizer, run, batch = begin(name, data)
        for _ in range(STEPS):
            train(net, optimizer, batch, 1)
            for target in run.targets:
                assert not run.weight(target)[~run.mask(target)].any()
        masks = run.finalize()
        assert masks.violations(net) == {}
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters())

    def test_it_is_what_its_taxonomy_says(self, name, data):
        net, optimizer, run, batch = begin(name, data)
        starts_dense, came_back = run.masks.sparsity == 0, False
        before = run.masks
        for _ in range(STEPS):
            train(net, optimizer, batch, 1)
            now = run.masks
            came_back |= bool((now & ~before).kept)
            before = now
        said = methods()[name].taxonomy
        starts = {path.split("-")[0] for path in said.path}
        # what decides before training, or after it, is sparse as soon as it is attached
        assert ("dense" if starts_dense else "sparse") in starts or said.timing != "during training"
        assert came_back == (said.topology == "dynamic")
        run.finalize()

    def test_the_sparsity_is_reached(self, name, data):
        net, optimizer, run, batch = begin(name, data)
        train(net, optimizer, batch, STEPS)
        masks = run.finalize()
        # counted by layer or together, a weight may be lost to rounding in each; nodes and kernels are coarser
        coarse = {"random-search": 0.3, "sparsebytenn": 0.04}.get(name, len(run.targets) / masks.total + 1e-9)
        assert masks.sparsity == pytest.approx(0.6, abs=coarse)

    def test_a_run_repeats_bit_for_bit(self, name, data):
        first, optimizer, one, batch = begin(name, data)
        train(first, optimizer, batch, STEPS)
        second, optimizer, other, batch = begin(name, data)
        train(second, optimizer, batch, STEPS)
        assert one.finalize() == other.finalize()
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("stop", [4, 9])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, name, stop, data):
        whole, optimizer, run, batch = begin(name, data)
        train(whole, optimizer, batch, STEPS)
        half, optimizer, part, batch = begin(name, data)
        train(half, optimizer, batch, stop)
        file = io.BytesIO()
        torch.save([half.state_dict(), optimizer.state_dict(), part.state_dict()], file)
        file.seek(0)
        weights, memory, state = torch.load(file)  # nothing in a state needs trust
        resumed, batch = network(name, data)
        resumed.load_state_dict(weights)
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2, weight_decay=0.05)
        optimizer.load_state_dict(memory)
        part = method(name, batch).attach(resumed, optimizer, state)
        train(resumed, optimizer, batch, STEPS - stop)
        assert part.history == run.history
        assert part.finalize() == run.finalize()
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_what_is_excluded_stays_dense(self, name, data):
        net, batch = network(name, data)
        excluded = next(target for target in find_targets(net, recurrent=True) if "rnn" not in target.name)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        run = method(name, batch, exclude=(excluded.module_name,)).attach(net, optimizer)
        train(net, optimizer, batch, STEPS)
        run.finalize()
        assert (excluded.matrix() != 0).all()

    def test_a_model_without_matching_layers_is_refused(self, name, data):
        net, batch = network(name, data)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        with pytest.raises(TargetError):
            method(name, batch, include=("no.such.*",)).attach(net, optimizer)

    @pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
    def test_an_impossible_sparsity_is_refused(self, name, sparsity, data):
        with pytest.raises(SparsityError):
            method(name, network(name, data)[1], sparsity=sparsity)

    def test_two_methods_on_one_model_are_refused(self, name, data):
        net, optimizer, run, batch = begin(name, data)
        with pytest.raises(ConfigurationError, match="already followed"):
            method(name, batch).attach(net, optimizer)
        run.finalize()

    def test_the_weights_of_the_model_are_its_own(self, name, data):
        net, optimizer, run, batch = begin(name, data)
        names = set(net.state_dict())
        copy.deepcopy(net)
        train(net, optimizer, batch, 3)
        run.finalize()
        assert set(net.state_dict()) == names
