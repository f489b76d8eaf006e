"""What every registered pruner must do. A new method joins by being registered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.patterns import Unstructured
from gossamer.core.targets import find_targets
from gossamer.errors import (
    CalibrationError,
    ConfigurationError,
    NonFiniteError,
    PatternError,
    SparsityError,
    TargetError,
    UnknownNameError,
)
from gossamer.methods import create, methods

PRUNERS = [name for name, spec in methods().items() if spec.when == "after training"]
WEIGHTS = [name for name in PRUNERS if methods()[name].granularity == "weights"]


def prune(model, name, batches, **options):
    data = batches if methods()[name].needs_data else None
    return gossamer.prune(model, name, calibration=data, progress=False, **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_the_sparsity_is_exact(name, sparsity, tiny_llama, batches):
    result = prune(tiny_llama, name, batches, sparsity=sparsity)
    pattern = create(name).pattern
    if isinstance(pattern, Unstructured) and pattern.scope == "model":
        total = result.masks.total
        assert total - result.masks.kept == int(round(sparsity * 100) * total // 100)
    elif name != "sparsegpt":  # which counts within slabs of columns
        for mask in result.masks.values():
            groups = mask.flatten(1) if pattern.scope == "row" else mask.reshape(1, -1)
            assert set((~groups).sum(1).tolist()) == {int(round(sparsity * 100) * groups.shape[1] // 100)}
    else:
        assert result.sparsity == pytest.approx(sparsity, abs=1e-3)
    assert not result.masks.violations(tiny_llama)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "global-magnitude"])
def test_two_of_four_are_kept(name, tiny_llama, batches):
    result = prune(tiny_llama, name, batches, pattern="2:4")
    for mask in result.masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert not result.masks.violations(tiny_llama)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_run_repeats_bit_for_bit(name, tiny_llama, batches):
    again = copy.deepcopy(tiny_llama)
    first = prune(tiny_llama, name, batches, sparsity=0.5)
    second = prune(again, name, batches, sparsity=0.5)
    assert first.masks == second.masks
    assert same(state(tiny_llama), state(again))


@pytest.mark.parametrize("name", PRUNERS)
def test_the_dtype_stays_and_the_model_still_runs(name, tiny_llama, batches):
    model = tiny_llama.to(torch.bfloat16)
    prune(model, name, batches, sparsity=0.5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(batches[0]).logits).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_excluded_or_no_target_stays_as_it_was(name, tiny_llama, batches):
    before = state(tiny_llama)
    result = prune(tiny_llama, name, batches, sparsity=0.5, exclude=["*.self_attn.*"])
    touched = set(result.masks)
    assert touched
    assert not any("self_attn" in parameter for parameter in touched)
    for parameter, tensor in tiny_llama.state_dict().items():
        if parameter not in touched:
            assert torch.equal(tensor, before[parameter]), parameter


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_is_pruned_at_sparsity_zero(name, tiny_llama, batches):
    before = state(tiny_llama)
    result = prune(tiny_llama, name, batches, sparsity=0.0)
    assert result.sparsity == 0
    for parameter, tensor in tiny_llama.state_dict().items():
        torch.testing.assert_close(tensor, before[parameter], rtol=0, atol=0)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1])
def test_an_impossible_sparsity_is_refused(name, sparsity):
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        create(name, sparsity=sparsity)


@pytest.mark.parametrize("name", [name for name in PRUNERS if methods()[name].needs_data])
def test_data_is_asked_for(name, tiny_llama):
    with pytest.raises(CalibrationError):
        gossamer.prune(tiny_llama, name, progress=False)
    with pytest.raises(CalibrationError, match="empty"):
        gossamer.prune(tiny_llama, name, calibration=[], progress=False)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_weight_is_named_before_anything_changes(name, tiny_llama, batches):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    before = state(tiny_llama)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        prune(tiny_llama, name, batches)
    for parameter, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor.isnan(), before[parameter].isnan())
        assert torch.equal(tensor.nan_to_num(), before[parameter].nan_to_num())


@pytest.mark.parametrize("name", PRUNERS)
def test_a_model_without_matching_layers_is_refused(name, tiny_llama, batches):
    with pytest.raises(TargetError):
        prune(tiny_llama, name, batches, include=["no.such.*"])


@pytest.mark.parametrize("name", ["magnitude", "wanda", "random", "ria"])
def test_a_pattern_that_does_not_divide_is_refused_by_name(name, tiny_llama, batches):
    before = state(tiny_llama)
    with pytest.raises(PatternError, match=r"q_proj.*multiple of 7"):
        prune(tiny_llama, name, batches, pattern="3:7")
    assert same(state(tiny_llama), before)


def test_an_unknown_method_or_parameter_gets_a_suggestion(tiny_llama):
    with pytest.raises(UnknownNameError, match="did you mean 'wanda'"):
        gossamer.prune(tiny_llama, "wandaa")
    with pytest.raises(ConfigurationError, match="no parameter 'sparsitty'"):
        create("wanda", sparsitty=0.5)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["wanda", "ria", "sparsegpt", "dsnot", "swap", "magnitude", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, tiny_llama, batches, tmp_path, monkeypatch):
    from gossamer.pruning.journal import Journal

    whole, halves = tiny_llama, copy.deepcopy(tiny_llama)
    original = copy.deepcopy(tiny_llama)
    expected = prune(whole, name, batches, sparsity=0.5)
    keep = Journal.keep
    done = []

    def keep_once(self, block, entries):
        if done:
            raise _Interrupted
        keep(self, block, entries)
        done.append(block)

    monkeypatch.setattr(Journal, "keep", keep_once)
    with pytest.raises(_Interrupted):
        prune(halves, name, batches, sparsity=0.5, workspace=tmp_path / "run")
    monkeypatch.setattr(Journal, "keep", keep)
    result = prune(original, name, batches, sparsity=0.5, workspace=tmp_path / "run")
    assert len(done) == 1
    assert result.masks == expected.masks
    assert same(state(original), state(whole))


def test_every_pruner_works_on_a_plain_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 3))
    data = [torch.randn(16, 13) for _ in range(3)]
    for name in WEIGHTS:
        copied = copy.deepcopy(model)
        result = prune(copied, name, data, sparsity=0.5)
        assert len(result.layers) == len(find_targets(model)) == 2
        assert not result.masks.violations(copied)
