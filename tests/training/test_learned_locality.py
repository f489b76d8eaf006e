from __future__ import annotations

import pytest
import torch

from gossamer.errors import UnknownNameError
from gossamer.training.dynamic_signal_distribution import PatchTraining, error_rate, make_dsd, random_directions
from gossamer.training.learned_locality import MaskedPatchNet, learn_local, locality

K, D = 4, 12


def task(n=150):
    signal = random_directions((), D, torch.Generator().manual_seed(0))
    x, y, _ = make_dsd(n, K, D, 0.2, signal, seed=1)
    test, labels, _ = make_dsd(500, K, D, 0.2, signal, seed=2)
    return x, y, test, labels


@pytest.mark.parametrize("search", ["rigl", "hebbian", "l1", "static"])
def test_as_many_weights_remain_as_a_locally_connected_network_has(search):
    x, y, test, labels = task()
    predict, mask = learn_local(x, y, search, PatchTraining(120))
    assert mask.shape == (K, K * D)
    assert int(mask.sum()) == K * D
    assert float(error_rate(predict(test), labels)) < 0.3
    again = learn_local(x, y, search, PatchTraining(120))
    assert torch.equal(again[1], mask)
    assert torch.equal(again[0](test), predict(test))


def test_searching_moves_the_mask_and_a_static_one_stays():
    x, y, _, _ = task()
    _, static = learn_local(x, y, "static", PatchTraining(60))
    for search in ("rigl", "hebbian"):
        assert not torch.equal(learn_local(x, y, search, PatchTraining(60))[1], static)


def test_locality_is_one_for_blocks_and_least_for_an_even_spread():
    blocks = torch.eye(K, dtype=torch.bool).repeat_interleave(D, 1)
    assert locality(blocks, D) == 1
    assert locality(torch.ones(K, K * D, dtype=torch.bool), D) == pytest.approx(1 / K)
    blocks[0] = False
    assert locality(blocks, D) == 1


def test_the_linear_layer_computes_what_the_patch_network_does():
    net = MaskedPatchNet(K, D, 0.1)
    x = torch.randn(5, K, D)
    z = x.flatten(1) @ net.filters.weight.t()
    torch.testing.assert_close(net(x), (z.sign() * (z.abs() - 0.1).clamp_min(0)).sum(1))


def test_an_unknown_search_is_refused():
    x, y, _, _ = task(10)
    with pytest.raises(UnknownNameError, match="rigl"):
        learn_local(x, y, "rigL")
