from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.core.nodes import node_groups, shrink
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.papers.super_resolution_networks import ResidualNetwork
from gossamer.training.aligned_filters import AlignedFilters, kept_counts, kept_filters, press, soft_masks

SHARED = ["head.weight", "body.0.2.weight", "body.1.2.weight", "last.weight"]


def network(width=8):
    torch.manual_seed(0)
    return ResidualNetwork(2, width, blocks=2)


def attach(model, optimizer=None, state=None, **options):
    options = {"sparsity": 0.7, "begin": 1, "agreed": 3, "end": 6, "penalty_every": 1, **options}
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)
    return AlignedFilters(**options).attach(model, optimizer, state)


def step(model, training, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small, large = torch.rand(2, 3, 6, 6, generator=generator), torch.rand(2, 3, 12, 12, generator=generator)
    training.optimizer.zero_grad()
    (model(small) - large).abs().mean().backward()
    training.optimizer.step()


@pytest.mark.parametrize("align", ["learned", "random"])
def test_what_is_left_is_a_smaller_network(align):
    model = network()
    training = attach(model, align=align)
    for number in range(9):
        assert training.masks.sparsity == 0 or number >= 6
        step(model, training, number)
    assert training.phase == "frozen"
    nodes = kept_filters(training)
    assert {name: int(kept.sum()) for name, kept in nodes.items()} == dict.fromkeys(nodes, 4)
    small = shrink(model, nodes)
    x = torch.rand(1, 3, 5, 7)
    torch.testing.assert_close(small(x), model(x))
    masks = training.finalize()
    assert masks.sparsity >= 0.7
    assert not masks.violations(model)
    weights = sum(p.numel() for n, p in small.named_parameters() if n in masks)
    assert weights == masks.kept
    removed = ~nodes["head.weight"]
    assert not model.head.bias[removed].any()
    assert not model.tail[0].weight[:, removed].any()


def test_layers_that_are_added_lose_the_same_filters():
    model = network()
    masks = attach(model, align="random").finalize()
    rows = [masks[name].flatten(1).any(1) for name in SHARED]
    assert all(torch.equal(row, rows[0]) for row in rows)
    others = masks["body.0.0.weight"].flatten(1).any(1), masks["body.1.0.weight"].flatten(1).any(1)
    assert not all(torch.equal(row, rows[0]) for row in others)


def test_filters_of_a_layer_by_itself_are_chosen_by_their_weights():
    model = network()
    expected = model.body[0][0].weight.detach().abs().flatten(1).mean(1).argsort(descending=True)[:4]
    masks = attach(model, begin=0).finalize()
    assert set(masks["body.0.0.weight"].flatten(1).any(1).nonzero().flatten().tolist()) == set(expected.tolist())


def shared(model):
    return [dict(model.named_parameters())[name] for name in SHARED]


def test_the_alignment_is_lower_where_layers_agree():
    apart = shared(network(16))
    masks = soft_masks(apart, 6)
    assert ((masks >= 0.5).sum(1) == 6).all()
    order = [weight.flatten(1).norm(dim=1).argsort() for weight in apart]
    together = soft_masks([weight[rows] for weight, rows in zip(apart, order)], 6)
    assert -(together @ together.t()).mean() < -(masks @ masks.t()).mean()


def test_the_alignment_acts_on_shared_filters_until_they_are_chosen():
    """The gradient is that of the term, by finite differences."""
    model = network().double()
    training = attach(model, torch.optim.SGD(model.parameters(), lr=1.0), begin=0, agreed=1, alignment=2.0)
    weights = [weight.detach().clone() for weight in shared(model)]

    def term(moved):
        masks = soft_masks(moved, training.extra["kept filters"]["head.weight"])
        return float(-(masks @ masks.t()).mean())

    def nothing():
        training.optimizer.zero_grad()
        sum(0 * p.sum() for p in model.parameters()).backward()
        training.optimizer.step()

    others = model.body[0][0].weight.detach().clone()
    nothing()
    for number, (before, after) in enumerate(zip(weights, shared(model))):
        for place in ((0, 0, 0, 0), (5, 2, 1, 2)):
            step = torch.zeros_like(before)
            step[place] = 1e-6
            sides = [[w + sign * step if n == number else w for n, w in enumerate(weights)] for sign in (1, -1)]
            slope = 2.0 * (term(sides[0]) - term(sides[1])) / 2e-6
            assert (before - after)[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)
    torch.testing.assert_close(model.body[0][0].weight, others, rtol=0, atol=0)
    chosen = [weight.detach().clone() for weight in shared(model)]
    nothing()  # the layers have agreed, and the penalty is still 0
    assert all(torch.equal(one, other) for one, other in zip(chosen, shared(model)))


def test_the_penalty_is_that_of_its_definition():
    model = network().double()
    group = node_groups(model)["head.weight"]
    kept = torch.arange(8) < 3
    loss = sum(0 * p.sum() for p in model.parameters())
    loss.backward()
    press(model, group, kept, 0.3)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    layers = [model.head, model.body[0][2], model.body[1][2], model.last]
    going = sum(layer.weight[3:].square().sum() + layer.bias[3:].square().sum() for layer in layers)
    (loss.detach() + 0.15 * going + sum(0 * p.sum() for p in model.parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_penalties_grow_to_their_limit_from_when_filters_are_chosen():
    model = network()
    options = {"penalty_step": 0.2, "penalty_limit": 0.5, "end": 8, "penalty_every": 1}
    training = attach(model, **options)
    seen = []
    for number in range(6):
        step(model, training, number)
        extra = training.extra
        seen.append([extra.get(f"penalty of {name}") for name in ("body.0.0.weight", "head.weight")])
    expected = [[0.0, None], [0.2, None], [0.4, 0.0], [0.5, 0.2], [0.5, 0.4], [0.5, 0.5]]
    assert [[None if v is None else pytest.approx(v) for v in row] for row in expected] == seen


@pytest.mark.parametrize("stop", [2, 7])
def test_a_run_goes_on_as_if_it_had_not_stopped(stop):
    whole, parts = network(), network()
    one, two = attach(whole), attach(parts)
    for number in range(9):
        step(whole, one, number)
        if number == stop:
            saved = copy.deepcopy((parts.state_dict(), two.optimizer.state_dict(), two.state_dict()))
            parts = network()
            optimizer = torch.optim.Adam(parts.parameters(), lr=1e-3)
            parts.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            two = attach(parts, optimizer, saved[2])
        step(parts, two, number)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)
    assert one.masks == two.masks


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_as_many_filters_stay_as_the_sparsity_allows(sparsity):
    model = network(16)
    groups = node_groups(model)
    targets = {*SHARED, "body.0.0.weight", "body.1.0.weight"}
    counts = kept_counts(model, {name: group.size for name, group in groups.items()}, targets, sparsity)
    (kept,) = set(counts.values())

    def left(q):
        return (3 * q + 5 * q * q) / (3 * 16 + 5 * 256)

    assert left(kept) <= 1 - sparsity < left(kept + 1)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigurationError, match="align is 'both'"):
        AlignedFilters(align="both")
    with pytest.raises(ConfigurationError, match="agreed is 9"):
        AlignedFilters(begin=0, end=5, agreed=9)
    with pytest.raises(ConfigurationError, match="penalty_step"):
        AlignedFilters(penalty_step=0.0)
    with pytest.raises(SparsityError, match=r"sparsity is 0\.995"):
        attach(network(), sparsity=0.995)
    with pytest.raises(SparsityError, match="no filter"):
        attach(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)), include=("2",), heads=True, exclude=())
    training = attach(network())
    with pytest.raises(ConfigurationError, match="no filter has been cut"):
        kept_filters(training)
    training.finalize()
