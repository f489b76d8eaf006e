from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError
from gossamer.measure import count_flops
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_ledger import TrainingLedger
from gossamer.training.sparse_layers import SparseLinear

ROWS = 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 2))


def step(model, optimizer, rows=ROWS, passes=1):
    optimizer.zero_grad()
    for _ in range(passes):
        model(torch.randn(rows, 6)).square().mean().backward()
    optimizer.step()


@dataclass(kw_only=True)
class Halving(Sparsifier):
    """Half of the weights after the second step; the dense gradient at the third."""

    def change(self, training):
        if training.step == 2:
            training.prune(0.5)

    def wants_gradient(self, step):
        return step == 3


class Kept(Sparsifier):
    """Masks that are given and stay."""

    def __init__(self, masks):
        super().__init__(sparsity=0.5)
        self.masks = masks

    def start(self, training):
        training.assign(self.masks)


def test_a_dense_run_costs_three_passes_for_every_sample():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = 60 + 80 + 16
    with TrainingLedger(model, optimizer, torch.zeros(3, 6)) as ledger:
        for rows in (4, 5):
            step(model, optimizer, rows)
    cost = ledger.cost
    assert (cost.steps, cost.units, cost.unit) == (2, 9, "samples")
    assert cost.training_flops == cost.dense_training_flops == 9 * 3 * 2 * weights
    assert cost.inference_flops == cost.dense_inference_flops == 2 * weights
    assert cost.parameters == cost.active_parameters == cost.average_parameters == weights + 2
    assert cost.seconds > 0


def test_the_masks_of_the_moment_are_integrated_over_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = Halving(sparsity=0.5, heads=False).attach(model, optimizer)
    ledger = TrainingLedger(model, optimizer, torch.zeros(1, 6), training)
    for _ in range(4):
        step(model, optimizer)
    cost = ledger.close()
    full, half = 2 * 156, 2 * (70 + 16)
    # two dense steps, one with a dense gradient of the weights, one sparse
    assert cost.training_flops == ROWS * (2 * 3 * full + (2 * half + full) + 3 * half)
    assert cost.dense_training_flops == ROWS * 4 * 3 * full
    assert cost.average_parameters == (2 * 158 + 2 * 88) / 4
    assert (cost.active_parameters, cost.parameters) == (88, 158)
    assert cost.inference_flops == half
    assert half / full < cost.bytes_moved / cost.dense_bytes_moved < 1


def test_averages_over_samples_and_over_steps_differ_when_batches_do():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = Halving(sparsity=0.5).attach(model, optimizer)
    ledger = TrainingLedger(model, optimizer, torch.zeros(1, 6), training, of="prunable")
    for rows in (1, 1, 6, 6):
        step(model, optimizer, rows)
    assert ledger.cost.average_over_steps == (140 + 70) / 2
    assert ledger.cost.average_parameters == (2 * 140 + 12 * 70) / 14


def test_accumulated_passes_belong_to_one_step_and_evaluation_to_none():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = TrainingLedger(model, optimizer, torch.zeros(1, 6))
    step(model, optimizer, passes=3)
    with torch.no_grad():
        model(torch.randn(50, 6))
    model.eval()
    model(torch.randn(50, 6))
    assert (ledger.cost.steps, ledger.cost.units) == (1, 3 * ROWS)


def test_bytes_follow_their_formula():
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    ledger = TrainingLedger(model, optimizer, torch.zeros(3, 4), MaskSet({"weight": torch.eye(2, 4).bool()}))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    activations = 3 * 4 * 3 * (4 + 2)
    dense = 8 * 4 * (2 + 1 + 3) + 2 * 8 * 2 * 4 + activations  # two moments of Adam, read and written
    sparse = 2 * 4 * 6 + 2 * 2 * 2 * 4 + 2 * 8 / 8 + activations
    assert ledger.cost.dense_bytes_moved == 2 * dense
    assert ledger.cost.bytes_moved == 2 * sparse


def test_tokens_are_counted_for_language_models(tiny_llama):
    optimizer = torch.optim.AdamW(tiny_llama.parameters())
    tiny_llama.train()
    tokens = torch.randint(0, 97, (2, 12))
    with TrainingLedger(tiny_llama, optimizer, {"input_ids": tokens}, of="without embeddings") as ledger:
        tiny_llama(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    cost = ledger.cost
    assert (cost.unit, cost.units) == ("tokens", 24)
    assert cost.training_flops == pytest.approx(3 * count_flops(tiny_llama, tokens).dense)
    embeddings = tiny_llama.model.embed_tokens.weight.numel()
    assert cost.parameters == sum(p.numel() for p in tiny_llama.parameters()) - embeddings


def test_a_function_may_say_which_masks_hold():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    holding = [MaskSet({"0.weight": torch.ones(10, 6).bool()}), MaskSet({"0.weight": torch.zeros(10, 6).bool()})]
    ledger = TrainingLedger(model, optimizer, torch.zeros(1, 6), lambda: holding[0])
    step(model, optimizer)
    holding.pop(0)
    step(model, optimizer)
    assert ledger.cost.average_parameters == 158 - 30


class Stored(SparseWeight):
    """Four of eight weights, in a list."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.ones(4))

    def mask(self):
        return torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()

    def dense_weight(self):
        return torch.zeros(2, 4).masked_scatter(self.mask(), self.values)

    def set_mask(self, mask):
        raise NotImplementedError

    def to_dense(self):
        raise NotImplementedError

    def forward(self, x):
        return nn.functional.linear(x, self.dense_weight())


def test_a_layer_without_stored_zeros_counts_as_one_that_stores_them():
    model = nn.Sequential(Stored(), nn.Linear(2, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = MaskSet({"0.weight": model[0].mask()})
    with TrainingLedger(model, optimizer, torch.zeros(5, 4), masks) as ledger:
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    cost = ledger.cost
    assert (cost.parameters, cost.active_parameters) == (8 + 6, 4 + 6)
    assert (cost.inference_flops, cost.dense_inference_flops) == (2 * 10, 2 * 14)


def test_a_run_of_layers_that_store_no_zeros_costs_what_a_masked_one_does():
    costs = []
    for stored in (False, True):
        model = network()
        masks = {"0.weight": torch.arange(60).view(10, 6) % 3 == 0, "2.weight": torch.arange(80).view(8, 10) % 4 == 0}
        if stored:
            for place in (0, 2):
                model[place] = SparseLinear.from_dense(model[place], masks[f"{place}.weight"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        training = Kept(masks).attach(model, optimizer)
        ledger = TrainingLedger(model, optimizer, torch.zeros(ROWS, 6), training)
        for _ in range(2):
            step(model, optimizer)
        costs.append({**ledger.close().to_dict(), "seconds": 0})
    assert costs[0].pop("dense_bytes_moved") > 0
    costs[1].pop("dense_bytes_moved")
    assert costs[0] == costs[1]


def test_a_resumed_ledger_ends_where_an_uninterrupted_one_does():
    costs = []
    for parts in ([4], [2, 2]):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = None
        for part in parts:
            ledger = TrainingLedger(model, optimizer, torch.zeros(1, 6))
            if state is not None:
                ledger.load_state_dict(state)
            for _ in range(part):
                step(model, optimizer)
            state = ledger.state_dict()
            ledger.close()
        costs.append({**ledger.cost.to_dict(), "seconds": 0})
    assert costs[0] == costs[1]
    with pytest.raises(CheckpointError, match="state of a ledger"):
        ledger.load_state_dict({"steps": 3})


def test_closing_leaves_no_hooks():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrainingLedger(model, optimizer, torch.zeros(1, 6)).close()
    step(model, optimizer)
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="of is 'half'"):
        TrainingLedger(model, optimizer, torch.zeros(1, 6), of="half")
    with pytest.raises(ConfigurationError, match="'other' of the masks"):
        TrainingLedger(model, optimizer, torch.zeros(1, 6), MaskSet({"other": torch.ones(2, 2).bool()}))
    with pytest.raises(ConfigurationError, match="without a tensor"):
        TrainingLedger(model, optimizer, (1,))
    assert not optimizer._optimizer_step_post_hooks


def test_costs_add_up_and_survive_storage():
    values = dict.fromkeys(TrainingCost.__dataclass_fields__, 10) | {"unit": "tokens", "counted": "all parameters"}
    first = TrainingCost(**values)
    second = TrainingCost(**values | {"units": 30, "average_parameters": 2.0, "active_parameters": 3})
    both = first + second
    assert (both.units, both.steps, both.training_flops) == (40, 20, 20)
    assert both.average_parameters == (10 * 10 + 30 * 2) / 40
    assert both.active_parameters == 3
    assert TrainingCost.from_dict(both.to_dict()) == both
    with pytest.raises(GossamerError, match="cannot be added"):
        _ = first + TrainingCost(**values | {"unit": "samples"})
    with pytest.raises(CheckpointError, match="'steps'"):
        TrainingCost.from_dict({k: v for k, v in values.items() if k != "steps"})
