"""DEFT: the density loss reaches the few parameters that train, whatever they are."""

from __future__ import annotations

import builtins
import copy
import math

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from gossamer.activations.deft import DEFT, DensityLoss, density_change, density_taps, training_defaults
from gossamer.activations.efficient_modules import Adapter, add_adapters, efficient, four_bit_loading, round_base_
from gossamer.activations.penalized_training import penalty_callback
from gossamer.core.schedules import Exponential
from gossamer.core.taps import Tap
from gossamer.errors import ConfigurationError, MissingDependencyError, TargetError, UnknownNameError
from gossamer.measure.activation_density import activation_density
from gossamer.methods import method

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, num_labels=3, max_position_embeddings=32, **SIZES)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def translator():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 30}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    )


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[:, 5:] = 0
    tokens = torch.randint(0, 30, (6, 7), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(6) % 3}


def captured(model, batch):
    """What the activations of the two layers put out, and the loss."""
    seen = []
    places = [layer.intermediate.intermediate_act_fn for layer in model.bert.encoder.layer]
    handles = [place.register_forward_hook(lambda module, args, output: seen.append(output)) for place in places]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_the_loss_is_the_smooth_count_of_real_tokens(classifier, batch):
    classifier.eval()
    real = batch["attention_mask"].bool()
    expected = [(a[real].square() / (a[real].square() + 1e-3)).mean() for a in captured(classifier, batch)]
    classifier.train()
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with DensityLoss(classifier, weight=2.0, eps=1e-3) as loss:
        classifier(**batch)
        assert float(loss.loss().detach()) == pytest.approx(2 * float(sum(expected).detach()) / 2, rel=1e-5)


def test_encoder_and_decoder_are_averaged_apart_and_added(translator):
    taps = density_taps(translator)
    assert [tap.group for tap in taps] == ["encoder.block"] * 2 + ["decoder.block"] * 2
    seen = {}
    handles = [
        tap.module.register_forward_hook(lambda module, args, output, name=tap.name: seen.update({name: output}))
        for tap in taps
    ]
    translator.train()
    with DensityLoss(translator, eps=1e-2) as loss:
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        translator(input_ids=torch.arange(5).view(1, 5), attention_mask=mask, labels=torch.arange(4).view(1, 4))
        found = float(loss.loss().detach())
    for handle in handles:
        handle.remove()
    share = [(a.square() / (a.square() + 1e-2)).detach() for a in (seen[tap.name] for tap in taps)]
    expected = (share[0][:, :3].mean() + share[1][:, :3].mean()) / 2 + (share[2].mean() + share[3].mean()) / 2
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "adapter", "prefix", "prompt"])
def test_the_few_that_train_learn_to_silence_the_frozen(classifier, batch, kind):
    if kind != "adapter":
        pytest.importorskip("peft")
    frozen = copy.deepcopy(classifier.bert.state_dict())
    model = efficient(classifier, kind, **({} if kind in ("adapter", "lora") else {"num_virtual_tokens": 4}))
    few = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(few, lr=0.03)
    run = DEFT(weight=20.0, eps=1e-2).attach(model, optimizer)
    model.train()
    values = []
    for _ in range(12):
        loss = model(**batch).loss + run.loss()
        values.append(run.penalty.value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    run.finish()
    assert run.penalty.step == 12
    assert values[-1] < values[0]
    after = {name.replace("base_layer.", ""): value for name, value in classifier.bert.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_an_adapter_starts_as_the_layer_it_wraps_and_leaves_the_head_free(classifier, batch):
    classifier.eval()
    before = classifier(**batch).logits
    add_adapters(classifier, reduction=4)
    assert torch.equal(classifier(**batch).logits, before)
    free = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert all("narrow" in name or "wide" in name or name.startswith("classifier") for name in free)
    assert sum(isinstance(module, Adapter) for module in classifier.modules()) == 2
    assert Adapter(nn.Linear(8, 8), 8, 2).narrow.out_features == 4
    with pytest.raises(ConfigurationError, match="reduction is 9"):
        Adapter(nn.Linear(8, 8), 8, 9)


def test_a_narrowing_width_reaches_large_activations_first(classifier, batch):
    schedule = Exponential(final=1e-7, end=10, initial=1.0)
    run = DEFT(eps=schedule).attach(classifier)
    classifier.train()(**batch)
    wide = float(run.loss().detach())
    for _ in range(10):
        run.advance()
    classifier(**batch)
    assert run.penalty.current_eps == 1e-7
    assert wide < float(run.loss().detach())  # under a narrow width nearly all entries count as one


def test_a_trainer_goes_on_under_the_callback(tmp_path, classifier, batch):
    rows = [{name: value[i] for name, value in batch.items()} for i in range(6)]
    callback = penalty_callback(DEFT(weight=5.0, eps=1e-2))
    options = {"max_steps": 4, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps"}
    arguments = training_defaults(str(tmp_path), **options, eval_steps=2, logging_steps=1)
    assert (arguments.lr_scheduler_type, arguments.per_device_train_batch_size) == ("linear", 64)
    assert isinstance(arguments, TrainingArguments)
    Trainer(classifier, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]).train()
    penalties = [row["penalty"] for row in callback.training.history]
    assert penalties[-1] < penalties[0]
    assert not any(module._forward_hooks for module in classifier.modules())


@pytest.mark.parametrize("base", ["rounded", "pruned"])
def test_the_loss_works_on_a_base_that_was_made_smaller(classifier, batch, base):
    if base == "rounded":
        assert round_base_(classifier, 4, group_size=8) > 0
        weight = classifier.bert.encoder.layer[0].output.dense.weight
        assert all(len(group.unique()) <= 16 for group in weight.detach().view(-1, 8))
    else:
        weight = classifier.bert.encoder.layer[0].output.dense.weight
        weight.data[weight.abs() < weight.abs().median()] = 0
    add_adapters(classifier)
    run = DEFT().attach(classifier)
    classifier.train()
    (classifier(**batch).loss + run.loss()).backward()
    adapter = classifier.bert.encoder.layer[0].output.dense
    assert float(adapter.wide.weight.grad.abs().sum()) > 0
    with pytest.raises(ConfigurationError, match="does not divide"):
        round_base_(classifier.bert.encoder, 4, group_size=7)


def test_rounding_to_eight_bits_stays_close(classifier):
    before = classifier.bert.encoder.layer[0].output.dense.weight.detach().clone()
    round_base_(classifier, 8)
    after = classifier.bert.encoder.layer[0].output.dense.weight.detach()
    step = before.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(before, after)
    assert bool(((after - before).abs() <= 0.51 * step + 1e-7).all())


def test_activations_that_are_no_modules_are_read_behind_the_gate(classifier):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(nn.functional.gelu(self.up(x)))

    assert [tap.side for tap in density_taps(nn.Sequential(Block(), Block()))] == ["input", "input"]
    assert {tap.side for tap in density_taps(classifier)} == {"output"}
    with pytest.raises(TargetError):
        density_taps(nn.Sequential(Block()), "activation")


def test_a_base_whose_matrices_are_packed_is_penalised_too(classifier, batch):
    """As in 4 bits: what the layer holds has not the shape of its matrix, and half as many bytes."""

    class Packed(nn.Linear):
        def forward(self, x):
            shape = (self.out_features, self.in_features)
            return nn.functional.linear(x, self.weight.flatten().view(torch.float32).view(shape), self.bias)

    for module in list(classifier.bert.encoder.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                packed = Packed(child.in_features, child.out_features)
                held = child.weight.detach().flatten().view(torch.uint8).view(-1, 1)
                packed.weight = nn.Parameter(held, requires_grad=False)
                setattr(module, name, packed)
    assert [tap.name.rpartition(".")[2] for tap in density_taps(classifier)] == ["intermediate_act_fn"] * 2
    run = DEFT().attach(classifier)
    classifier.train()(**batch)
    assert float(run.loss().detach()) > 0


def test_exact_zeros_of_gelu_begin_where_digits_end():
    gelu = nn.GELU()
    model = nn.Sequential(gelu)
    x = torch.tensor([[-4.0, -30.0, 2.0, 0.0]])
    assert activation_density(model, x, [Tap("gelu", gelu, "output")]).density == 0.5
    assert activation_density(model, x, [Tap("gelu", gelu, "output")], tolerance=1e-3).density == 0.25


def test_the_change_of_density_is_the_papers():
    assert density_change(0.5, 0.25) == 50
    assert density_change(0.2, 0.3) == pytest.approx(-50)
    with pytest.raises(ConfigurationError, match="densities"):
        density_change(0.0, 0.1)


def test_bad_names_and_missing_libraries_are_named(monkeypatch, classifier):
    with pytest.raises(UnknownNameError, match="l0"):
        DEFT(penalty="l00")
    with pytest.raises(UnknownNameError, match="middle"):
        DEFT(sites="midle")
    with pytest.raises(UnknownNameError, match="lora"):
        efficient(classifier, "lore")
    with pytest.raises(ConfigurationError, match="above 0"):
        DEFT(eps=-math.inf).attach(classifier)
    assert method("deft").factory is DEFT
    plain = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependencyError, match="recovery"):
        efficient(classifier, "lora")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="bitsandbytes"):
        four_bit_loading()
