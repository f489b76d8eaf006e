"""ProSparse: stages, penalty and threshold in training, and layers that skip closed channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gossamer.activations.activation_predictor import (
    ActivationPredictor,
    collect_activity,
    predictor_quality,
    train_predictor,
)
from gossamer.activations.penalized_training import PenaltyMixin, penalty_callback
from gossamer.activations.prosparse import RECIPES, ProSparse, shift_threshold
from gossamer.activations.sparse_feedforward import SparseGatedFFN, install_sparse_feed_forwards
from gossamer.core.schedules import SineStages
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, TargetError
from gossamer.measure.activation_density import activation_density
from gossamer.methods import method
from gossamer.models.activation_functions import FATReLU, relufy
from gossamer.models.feedforward_taps import feed_forward_taps

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 30, (12, 8), generator=torch.Generator().manual_seed(2))


def train(model, tokens, method, steps=30):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = method.attach(model, optimizer)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss + run.loss()).backward()
        run.log(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return run


def sparsity(model, tokens):
    return activation_density(model, tokens, feed_forward_taps(model)).sparsity


def test_the_recipes_are_those_of_the_paper():
    seven = RECIPES["llama2-7b"]
    assert [seven.weight(t) for t in (5000, 6000, 10000, 12000, 16000, 16500)] == [0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1]
    assert (seven.learning_rate, seven.context) == (3e-5, 4096)
    thirteen = RECIPES["llama2-13b"]
    assert [thirteen.weight(t) for t in (5500, 6750, 10750, 11000, 15000, 16000)] == [0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2]
    one = RECIPES["minicpm-1b"]
    assert [one.weight(t) for t in (10_000, 15_000, 20_000, 25_000, 35_000, 95_000)] == [
        0,
        1e-3,
        5e-3,
        5e-3,
        5e-2,
        5e-2,
    ]
    assert one.weight(95_001) == one.weight(101_000) == 1e-2  # instructions are learned under a lower weight, not none


def test_the_penalty_makes_zeros_and_the_weight_follows_the_stages(model, tokens):
    stages = SineStages((10.0, 400.0), (10, 20), begin=5)
    run = train(model, tokens, ProSparse(stages=stages, threshold=0))
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES))
    train(plain, tokens, ProSparse(stages=lambda step: 0.0, threshold=0))
    weights = [row["weight"] for row in run.history]
    assert weights[0] == 0
    assert weights[-1] == 400
    assert all(after >= before for before, after in itertools.pairwise(weights))
    assert run.history[-1]["ratio"] > 0
    assert sparsity(model, tokens) > sparsity(plain, tokens) + 0.2


def test_the_end_of_training_raises_the_threshold_and_all_can_be_undone(model, tokens):
    before_all = model.model.layers[0].mlp.act_fn
    run = train(model, tokens, ProSparse(stages=lambda step: 1.0, threshold=0.05), steps=3)
    before = sparsity(model, tokens)
    run.finish()
    run.finish()  # twice does no harm
    assert isinstance(model.model.layers[0].mlp.act_fn, FATReLU)
    assert sparsity(model, tokens) > before
    model.train()(input_ids=tokens)  # no hook is left that would count this
    run.undo()
    assert model.model.layers[0].mlp.act_fn is before_all
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_a_relu_can_be_shifted(model):
    with pytest.raises(TargetError, match="SiLU"):
        shift_threshold(model)


def test_a_threshold_that_no_activation_can_take_is_refused_before_training(model, tokens):
    before = model.model.layers[0].mlp.act_fn
    with pytest.raises(ConfigurationError, match="there is only ShiftedReLU; use threshold=0"):
        ProSparse(activation="shifted-relu").attach(model)
    with pytest.raises(ConfigurationError, match="there is only SiLU"):
        ProSparse(activation="keep").attach(model)
    assert model.model.layers[0].mlp.act_fn is before
    relufy(model)
    for allowed in (
        ProSparse(activation="shifted-relu", threshold=0.0, stages=lambda step: 1.0),
        ProSparse(activation="keep", stages=lambda step: 1.0),
    ):
        run = train(model, tokens, allowed, steps=1)
        run.finish()
        run.undo()


def test_bad_parameters_are_named():
    with pytest.raises(ConfigurationError, match="threshold is -1"):
        ProSparse(threshold=-1)
    with pytest.raises(ConfigurationError, match="activation is 'gelu'"):
        ProSparse(activation="gelu")
    assert method("prosparse").factory is ProSparse


# ---------------------------------------------------------------------------------------------------- Trainer


def arguments(folder, **more):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options | more)


def rows(tokens):
    return [{"input_ids": row, "labels": row} for row in tokens]


def test_the_trainer_of_transformers_is_penalised_and_logs_it(tmp_path, model, tokens):
    callback = penalty_callback(ProSparse(stages=SineStages((1.0,), (3,)), threshold=0.02))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(tokens), callbacks=[callback])
    trainer.train()
    logged = callback.training.history
    assert [(row["step"], row["weight"]) for row in logged[:2]] == [(2.0, 1.0), (4.0, 1.0)]
    assert all(row["penalty"] > 0 and row["ratio"] > 0 for row in logged)
    assert callback.training.penalty.step == 4
    assert isinstance(model.model.layers[0].mlp.act_fn, FATReLU)
    assert not model._forward_hooks


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_accumulated_gradients_carry_the_penalty_once(tmp_path, tokens, way):
    """One step of plain descent on four batches of three moves the weights as one step on twelve rows does."""

    def weights(batch, accumulated):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES))
        method = ProSparse(stages=lambda step: 5.0, threshold=0)
        options = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        options |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        if way == "callback":
            trainer = Trainer(
                model, arguments(tmp_path, **options), train_dataset=rows(tokens), callbacks=[penalty_callback(method)]
            )
        else:

            class Penalised(PenaltyMixin, Trainer):
                pass

            trainer = Penalised(model, arguments(tmp_path, **options), train_dataset=rows(tokens))
            trainer.penalized = method.attach(model)
        trainer.train()
        return model.model.layers[0].mlp.gate_proj.weight.detach().clone()

    whole = weights(12, 1)
    assert torch.allclose(weights(3, 4), whole, atol=1e-5)


def test_a_loss_that_the_penalty_cannot_reach_is_refused(tmp_path, model, tokens):
    callback = penalty_callback(ProSparse())
    trainer = Trainer(
        model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(tokens), callbacks=[callback]
    )
    with pytest.raises(ConfigurationError, match="label smoothing"):
        trainer.train()


# ------------------------------------------------------------------------------------------- closed channels


@pytest.mark.parametrize("activation", ["relu", "fatrelu"])
@pytest.mark.parametrize("compiled", [True, False])
def test_skipping_closed_channels_changes_nothing(model, tokens, activation, compiled):
    relufy(model, activation, threshold=0.02)
    model.eval()
    with torch.set_grad_enabled(not compiled):  # with gradients torch computes it
        expected = model(input_ids=tokens).logits
        installed = install_sparse_feed_forwards(model)
        found = model(input_ids=tokens).logits
        assert torch.allclose(found, expected, atol=1e-5)
        installed.remove()
        assert torch.equal(model(input_ids=tokens).logits, expected)


def test_only_live_channels_are_computed():
    torch.manual_seed(0)
    gate, up, down = torch.randn(12, 4), torch.randn(12, 4), torch.randn(4, 12)
    bias = torch.full((12,), -100.0)
    bias[:3] = 100
    layer = SparseGatedFFN(gate, up, down, nn.ReLU(), (bias, None, None))
    x = torch.randn(2, 3, 4)
    expected = ((x @ gate.T + bias).relu() * (x @ up.T)) @ down.T
    assert torch.allclose(layer(x), expected, atol=1e-3)
    assert layer.live == 3 / 12


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.widen, self.act, self.back = nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4)

    def forward(self, x):
        return self.back(self.act(self.widen(x)))


class UpFirst(nn.Module):
    """Defines its up projection before its gate, with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.act, self.back = nn.Linear(4, 10), nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4)

    def forward(self, x):
        return self.back(self.one(x) * self.act(self.two(x)))


class Fused(nn.Module):
    """Gate and up in one matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.act, self.back = nn.Linear(4, 20, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.back(self.act(gate) * up)


@pytest.mark.parametrize("kind", [Plain, UpFirst, Fused])
def test_the_gate_is_found_wherever_it_is(kind):
    layer, x = kind(), torch.randn(5, 4)
    assert torch.allclose(SparseGatedFFN.from_dense(layer)(x), layer(x), atol=1e-6)


def test_what_is_no_feed_forward_layer_is_refused(model):
    with pytest.raises(TargetError):
        SparseGatedFFN.from_dense(model.model.layers[0].self_attn)
    with pytest.raises(ModelError, match=r"\(3, 4\)"):
        SparseGatedFFN(torch.zeros(3, 4), None, torch.zeros(3, 4), nn.ReLU())

    class More(Plain):
        def forward(self, x):
            return super().forward(x) + x

    with pytest.raises(ModelError, match="more than"):
        SparseGatedFFN.from_dense(More())


# --------------------------------------------------------------------------------------------------- predictors


def test_a_predictor_learns_which_channels_open():
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(6, 20, generator=generator), torch.randn(3000, 6, generator=generator)
    active = x @ matrix > 1.5
    predictor, quality = train_predictor(x, active, 64, epochs=20, learning_rate=1e-2, seed=0)
    assert quality.recall > 0.9
    assert abs(quality.predicted_sparsity - quality.true_sparsity) < 0.1
    again, _ = train_predictor(x, active, 64, epochs=20, learning_rate=1e-2, seed=0)
    assert torch.equal(predictor(x), again(x))


def test_quality_worked_by_hand():
    predictor = ActivationPredictor(1, 2, 1)
    predictor.logits = lambda x: torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    found = predictor_quality(predictor, torch.zeros(2, 1), torch.tensor([[True, True], [False, True]]))
    assert (found.recall, found.predicted_sparsity, found.true_sparsity) == (pytest.approx(2 / 3), 0.25, 0.25)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_perfect_predictor_changes_nothing_and_a_blind_one_silences_the_layer(compiled):
    dense, x = UpFirst(), torch.randn(7, 4)
    perfect = SparseGatedFFN.from_dense(dense, lambda tokens: dense.two(tokens) > 0)
    blind = SparseGatedFFN.from_dense(dense, lambda tokens: torch.zeros(len(tokens), 10, dtype=torch.bool))
    with torch.set_grad_enabled(not compiled):
        assert torch.allclose(perfect(x), dense(x), atol=1e-6)
        assert torch.allclose(blind(x), dense.back.bias.expand(7, 4), atol=1e-6)


def test_activity_is_collected_for_each_layer_without_padding(model, tokens):
    relufy(model)
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    found = collect_activity(model, [{"input_ids": tokens, "attention_mask": mask}], limit=50)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for inputs, active in found.values():
        assert inputs.shape == (50, 16)
        assert active.shape == (50, 24)
        assert 0.2 < float(active.float().mean()) < 0.8
    mlp = model.model.layers[0].mlp
    inputs, active = found["model.layers.0.mlp"]
    assert torch.equal(mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs) != 0, active)


def test_predictors_need_something_to_learn_from(model):
    with pytest.raises(CalibrationError, match="no data"):
        collect_activity(model, [])
    with pytest.raises(CalibrationError, match="0 active"):
        predictor_quality(ActivationPredictor(2, 3, 4), torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="too few"):
        train_predictor(torch.zeros(1, 2), torch.ones(1, 3).bool(), 4)
    with pytest.raises(ConfigurationError, match="threshold"):
        ActivationPredictor(2, 3, 4, threshold=1.0)
