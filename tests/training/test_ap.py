from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gossamer.core.rounds import Round
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError
from gossamer.training.ap import ActivateWhilePruning
from gossamer.training.importance import SynFlow


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))


def train(model, masks=None, steps=5):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(torch.randn(16, 20)) - 1).square().mean().backward()
        optimiser.step()


def ended(model, start=None):
    """A round that has just ended, nothing removed before it."""
    targets = find_targets(model)
    start = start or {target.name: target.matrix().clone() for target in targets}
    alive = {target.name: torch.ones(target.shape, dtype=torch.bool) for target in targets}
    return Round(0, model, targets, alive, start, start, torch.Generator().manual_seed(123))


def trained():
    model = network()
    start = {target.name: target.matrix().clone() for target in find_targets(model)}
    train(model)
    return ended(model, start)


def test_a_cycle_worked_out_by_hand():
    layer = nn.Sequential(nn.Linear(10, 1), nn.ReLU())
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[0.1, -0.2, 3.0, -4.0, -5.0, 6.0, -7.0, 8.0, -9.0, 10.0]]))
    moved = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.1, 0.0, 0.9, 0.0, 0.3, 0.0]])
    round_ = ended(layer, {"0.weight": layer[0].weight.detach() - moved})
    masks, counts = ActivateWhilePruning(rate=0.4, ap_fraction=0.2, sparsity=0.4).choose(round_, 0.4)
    # the host takes 0.1 and −0.2; of −4, −5, −7 and −9 those that moved least are −5 and −9
    assert masks["0.weight"].int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 1, 0, 1]]
    assert counts == (2, 2, 2)


@pytest.mark.parametrize("host", ["magnitude", "lamp", "random", SynFlow((20,))])
def test_both_shares_of_a_cycle_are_exact(host):
    round_ = trained()
    total = round_.total
    masks, counts = ActivateWhilePruning(host=host).choose(round_, 0.2)
    assert counts == (round(0.18 * total), round(0.02 * total), round(0.02 * total))
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.2 * total)


@pytest.mark.parametrize("pick", ["least-moved", "most-moved", "random"])
@pytest.mark.parametrize("sign", ["negative", "positive"])
def test_activation_touches_only_weights_of_its_sign(sign, pick):
    round_ = trained()
    method = ActivateWhilePruning(sign=sign, pick=pick, rate=0.2, ap_fraction=0.1)
    alone, _ = ActivateWhilePruning(rate=0.2, ap_fraction=0.0).choose(round_, 0.1)
    both, _ = method.choose(round_, 0.2)
    gone, left, moved = [], [], []
    for target in round_.targets:
        extra = alone[target.name] & ~both[target.name]
        gone.append(target.matrix()[extra])
        side = target.matrix() < 0 if sign == "negative" else target.matrix() > 0
        moved.append(round_.movement(target)[extra])
        left.append(round_.movement(target)[both[target.name] & side])
    weights, moved, left = torch.cat(gone), torch.cat(moved), torch.cat(left)
    assert len(weights) == round_.total // 10
    assert (weights < 0).all() if sign == "negative" else (weights > 0).all()
    if pick == "least-moved":
        assert moved.max() <= left.min()
    if pick == "most-moved":
        assert moved.min() >= left.max()


def test_the_random_control_takes_both_signs():
    round_ = trained()
    masks, _ = ActivateWhilePruning(sign="any", pick="random", ap_fraction=0.19).choose(round_, 0.2)
    gone = torch.cat([target.matrix()[~masks[target.name]] for target in round_.targets])
    assert 0.4 < float((gone < 0).double().mean()) < 0.6


def test_without_a_share_the_host_is_alone():
    round_ = trained()
    masks, counts = ActivateWhilePruning(ap_fraction=0.0).choose(round_, 0.2)
    weights = torch.cat([target.matrix().abs().flatten() for target in round_.targets])
    kept = torch.cat([masks[target.name].flatten() for target in round_.targets])
    assert counts[1:] == (0, 0)
    assert weights[~kept].max() <= weights[kept].min()


def test_the_first_layer_can_be_left_to_the_host():
    round_ = trained()
    alone, _ = ActivateWhilePruning(ap_fraction=0.0, rate=0.2).choose(round_, 0.1)
    both, _ = ActivateWhilePruning(ap_fraction=0.1, exclude_first=True).choose(round_, 0.2)
    assert torch.equal(alone["0.weight"], both["0.weight"])
    assert not torch.equal(alone["2.weight"], both["2.weight"])


def test_too_few_negative_weights_are_reported_and_the_host_makes_up_for_them():
    model = network()
    with torch.no_grad():
        for target in find_targets(model):
            target.matrix().abs_()
        model[2].weight[0, :3] = -5.0
    round_ = ended(model)
    masks, (pruned, activated, wanted) = ActivateWhilePruning().choose(round_, 0.2)
    assert (activated, wanted) == (3, 30)
    assert pruned + activated == 300
    assert not masks["2.weight"][0, :3].any()


@pytest.mark.parametrize("variant", ["lite", "full"])
def test_tickets_shrink_by_a_fifth_and_end_where_asked(variant):
    runs = []

    def watched(model, masks):
        runs.append(masks.sparsity)
        train(model)

    tickets = ActivateWhilePruning(sparsity=0.6, variant=variant).tickets(network(), watched)
    assert [t.masks.sparsity for t in tickets] == pytest.approx([0.2, 0.36, 0.488, 0.5904, 0.6], abs=1e-3)
    assert tickets[-1].masks.sparsity == 0.6
    for before, after in itertools.pairwise(tickets):
        assert (after.masks & before.masks) == after.masks
    masks = [0.0, *(ticket.masks.sparsity for ticket in tickets)]
    expected = masks[:-1] if variant == "lite" else [s for pair in itertools.pairwise(masks) for s in pair]
    assert runs == expected


def test_movement_is_that_of_the_cycle_or_of_all_cycles():
    def tickets(movement):
        method = ActivateWhilePruning(sparsity=0.6, ap_fraction=0.15, movement=movement)
        return [t.masks for t in method.tickets(network(), train, restart=False)]

    one, other = tickets("since_rewind"), tickets("since_initial")
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_attached_to_one_training_it_prunes_at_equal_distances_and_holds():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    run = ActivateWhilePruning(sparsity=0.6, begin=4, end=24).attach(model, optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        (model(torch.randn(16, 20)) - 1).square().mean().backward()
        optimizer.step()
    assert [step for step, _ in run.history] == [0, 8, 12, 16, 20, 24]
    assert run.history[-1][1] == 600
    assert run.extra["activated"] > 0
    masks = run.finalize()
    assert masks.sparsity == 0.6
    assert not masks.violations(model)


def test_a_run_that_ends_early_reaches_its_sparsity():
    model = network()
    run = ActivateWhilePruning(sparsity=0.5, end=100).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert run.finalize().sparsity == 0.5


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped():
    def start():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, ActivateWhilePruning(sparsity=0.6, end=10, host="random").attach(model, optimizer)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            (model(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))) - 1).square().mean().backward()
            optimizer.step()

    model, optimizer, run = start()
    go(model, optimizer, range(12))
    again, second, resumed = start()
    go(again, second, range(5))
    state = again.state_dict(), second.state_dict(), resumed.state_dict()
    other, third, last = start()
    other.load_state_dict(state[0])
    third.load_state_dict(state[1])
    last.load_state_dict(state[2])
    go(other, third, range(5, 12))
    assert last.finalize() == run.finalize()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_synflow_is_the_gradient_of_the_flow_and_equal_in_sum():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[-2.0, 3.0]]))
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    round_ = Round(0, model, find_targets(model, heads=True), {}, {}, {}, torch.Generator())
    found = SynFlow((3,))(round_)
    assert found["0.weight"].tolist() == [[2.0, 4.0, 1.0], [0.0, 3.0, 3.0]]
    assert found["2.weight"].tolist() == [[7.0, 6.0]]
    assert model.training
    assert model[2].weight.grad is None
    assert model[0].weight[0, 1].item() == -2.0


def test_a_diverged_training_is_named():
    def diverge(model, masks):
        model[2].weight.data[0, 0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        ActivateWhilePruning().tickets(network(), diverge)


@pytest.mark.parametrize(
    "options",
    [
        *({"ap_fraction": 0.2}, {"ap_fraction": -0.1}, {"rate": 1.0}, {"rate": 0.0}, {"sign": "zero"}),
        *({"pick": "best"}, {"host": "wanda"}, {"variant": "pro"}, {"movement": "never"}, {"begin": 5, "end": 5}),
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigurationError):
        ActivateWhilePruning(**options)


def test_a_sparsity_that_has_been_passed_is_refused():
    round_ = trained()
    thinned, _ = ActivateWhilePruning().choose(round_, 0.5)
    later = Round(1, round_.model, round_.targets, thinned, round_.initial, round_.start, round_.generator)
    with pytest.raises(SparsityError, match="below"):
        ActivateWhilePruning().choose(later, 0.4)
