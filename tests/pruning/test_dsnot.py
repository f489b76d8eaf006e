from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import gossamer
from gossamer.core.patterns import NM, Pattern
from gossamer.errors import CheckpointError, ConfigurationError, PatternError, TargetError, UnknownNameError
from gossamer.pruning.dsnot import DSnoT, refine_mask
from gossamer.pruning.journal import Journal
from gossamer.pruning.sparsegpt import SparseGPT

ONES = torch.ones(6)


def toy(**options):
    """One row of six weights on inputs of mean 1, of which the three largest are kept: ε = −1 + 2 + 1 = 2."""
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0, 1.0, 5.0]])
    mask = torch.tensor([[1, 0, 0, 1, 0, 1]]).bool()
    return refine_mask(weight, mask, **{"mean": ONES, "variance": ONES, "norm": ONES, **options})


def kept(refinement, row=0):
    return refinement.mask[row].nonzero().flatten().tolist()


def test_toy_follows_the_hand_worked_sequence():
    # cycle 1: ε = 2, weight 2 (+2) comes back and 3 (−3), the only negative one kept, goes: ε = 2 − 3 − 2 = −3
    first = toy(max_cycles=1)
    assert (kept(first), first.error_after.tolist()) == ([0, 2, 5], [-3.0])
    # cycle 2: ε < 0, weight 1 (−1) comes back and 0 (4), less than 5 in Wanda's score, goes: ε = −3 + 4 + 1 = 2
    # cycle 3: ε > 0, weight 4 could come back but no negative weight is left to go: the row stops
    last = toy()
    assert (kept(last), last.error_after.tolist(), last.swaps.tolist()) == ([1, 2, 5], [2.0], [2])
    assert last.error_before.tolist() == [2.0]


def test_a_swap_that_would_turn_the_sign_stops_the_row_if_asked():
    refined = toy(same_sign=True)
    assert (kept(refined), refined.swaps.tolist()) == ([0, 3, 5], [0])


def test_low_variance_comes_back_first_and_power_zero_ignores_it():
    variance = torch.tensor([1.0, 1, 4, 1, 1, 1])  # 2/4 is less than 1/1
    assert kept(toy(variance=variance, max_cycles=1)) == [0, 4, 5]
    assert kept(toy(variance=variance, max_cycles=1, variance_power=0)) == [0, 2, 5]


def test_growing_by_magnitude_looks_at_the_weight_alone():
    mean = torch.tensor([1.0, 1, 1, 1, 5, 1])  # contribution of weight 4 becomes 5, of weight 2 stays 2
    assert kept(toy(mean=mean, max_cycles=1)) == [0, 4, 5]
    assert kept(toy(mean=mean, max_cycles=1, growing="magnitude")) == [0, 2, 5]


def test_pruning_by_contribution_takes_what_moves_the_error_most():
    weight = torch.tensor([[-1.0, -3.0, 4.0, 2.0]])
    mask = torch.tensor([[1, 1, 0, 0]]).bool()
    arguments = (weight, mask, torch.ones(4), torch.ones(4), torch.ones(4))
    assert kept(refine_mask(*arguments, max_cycles=1)) == [1, 2]
    assert kept(refine_mask(*arguments, max_cycles=1, pruning="contribution")) == [0, 2]


def test_an_error_at_the_threshold_is_left_alone():
    assert toy(threshold=2.0).swaps.tolist() == [0]
    assert toy(threshold=1.99, max_cycles=1).swaps.tolist() == [1]


def test_the_offset_of_changed_weights_counts_as_error():
    assert toy(offset=torch.tensor([-2.0])).swaps.tolist() == [0]
    assert toy(offset=torch.tensor([-1.0])).error_before.tolist() == [1.0]


def test_a_constant_channel_comes_back_first_and_gives_no_nan():
    refined = toy(variance=torch.tensor([1.0, 1, 1, 1, 0, 1]), max_cycles=1)
    assert kept(refined) == [0, 4, 5]
    assert torch.isfinite(toy(variance=torch.zeros(6)).error_after).all()


def test_dead_inputs_are_never_swapped():
    mean = torch.tensor([0.0, 1, 0, 1, 1, 0])
    refined = toy(mean=mean, norm=mean)
    changed = refined.mask[0] != torch.tensor([1, 0, 0, 1, 0, 1]).bool()
    assert not changed[mean == 0].any()


@pytest.mark.parametrize("fill", [True, False])
def test_rows_without_anything_to_swap_stay_as_they_are(fill):
    mask = torch.full((2, 6), fill)
    refined = refine_mask(torch.randn(2, 6), mask, ONES, ONES, ONES)
    assert torch.equal(refined.mask, mask)
    assert refined.swaps.tolist() == [0, 0]


def reference(weight, mask, mean, variance, norm, group=None, cycles=50, threshold=0.1):
    """One row, one weight at a time, as the paper tells it."""
    kept, contribution = mask.tolist(), (weight * mean).tolist()
    useful = (weight * mean / variance).tolist()
    score = (weight.abs() * norm).tolist()
    candidates = [j for j in range(len(kept)) if not kept[j]]
    removable = [j for j in range(len(kept)) if kept[j]]
    error = first = sum(contribution[j] for j in candidates)
    swaps = 0
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        sign = 1 if error > 0 else -1
        back = max((j for j in candidates if sign * contribution[j] > 0), key=lambda j: sign * useful[j], default=None)
        if back is None:
            break
        allowed = [j for j in removable if (j // group == back // group if group else sign * contribution[j] < 0)]
        if not allowed:
            if group is None:
                break
            candidates.remove(back)
            continue
        out = min(allowed, key=lambda j: score[j])
        after = error + contribution[out] - contribution[back]
        if group and after * first <= 0:
            break
        candidates.remove(back)
        removable.remove(out)
        kept[back], kept[out], error, swaps = True, False, after, swaps + 1
    return kept, swaps


def problem(seed, rows=7, columns=24):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mean = torch.randn(columns, generator=generator, dtype=torch.float64)
    variance = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    norm = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    scores = torch.rand(rows, columns, generator=generator)
    return (weight, mean, variance, norm), scores


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9), st.integers(1, 60))
def test_unstructured_refinement_agrees_with_a_loop_over_weights(seed, sparsity, cycles):
    (weight, *statistics), scores = problem(seed)
    mask = Pattern.parse("unstructured").select(scores, sparsity)  # rows lose different numbers
    refined = refine_mask(weight, mask, *statistics, max_cycles=cycles)
    for row in range(len(weight)):
        expected, swaps = reference(weight[row], mask[row], *statistics, cycles=cycles)
        assert (refined.mask[row].tolist(), int(refined.swaps[row])) == (expected, swaps)
    assert torch.equal(refined.mask.sum(1), mask.sum(1))
    recomputed = (weight * statistics[0] * ~refined.mask).sum(1)
    assert torch.allclose(refined.error_after, recomputed, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["2:4", "4:8", "1:4", "3:4", "1:2"]))
def test_nm_refinement_agrees_with_a_loop_and_keeps_the_pattern(seed, text):
    (weight, *statistics), scores = problem(seed)
    pattern = Pattern.parse(text)
    mask = pattern.select(scores)
    refined = refine_mask(weight, mask, *statistics, group=pattern.m)
    pattern.verify(refined.mask)
    for row in range(len(weight)):
        expected, swaps = reference(weight[row], mask[row], *statistics, group=pattern.m)
        assert (refined.mask[row].tolist(), int(refined.swaps[row])) == (expected, swaps)
    assert (refined.error_after * refined.error_before >= 0).all()


@pytest.mark.parametrize("cycles", [1, 2, 5, 50])
def test_the_error_on_the_books_is_the_error_of_the_mask_after_every_cycle(cycles):
    (weight, *statistics), scores = problem(3, rows=50, columns=64)
    mask = Pattern.parse("unstructured:row").select(scores, 0.6)
    weight, statistics = weight.float(), [s.float() for s in statistics]
    refined = refine_mask(weight, mask, *statistics, max_cycles=cycles)
    recomputed = (weight * statistics[0] * ~refined.mask).double().sum(1)
    assert torch.allclose(refined.error_after, recomputed, rtol=0, atol=1e-5)


def test_the_expected_error_of_wide_rows_falls_more_than_tenfold():
    (weight, *statistics), scores = problem(0, rows=64, columns=1024)
    mask = Pattern.parse("unstructured:row").select(scores, 0.6)
    refined = refine_mask(weight, mask, *statistics)
    assert refined.error_after.abs().mean() < 0.1 * refined.error_before.abs().mean()
    assert (refined.swaps <= 50).all()


# --- on models ---


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).eval()


def batches(count=4, length=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (1, length), generator=generator) for _ in range(count)]


def run(method, model=None, data=None, **options):
    model = model or llama()
    result = gossamer.prune(model, method, calibration=data or batches(), progress=False, **options)
    return model, result


@pytest.mark.parametrize("initial", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured:row", "2:4"])
def test_every_start_is_refined_at_the_same_sparsity(initial, pattern):
    pruner = DSnoT(sparsity=0.5, pattern=pattern, initial=initial, skip=(), threshold=0.01)
    model, result = run(pruner)
    assert result.masks.sparsity == 0.5
    assert result.masks.violations(model) == {}
    for name in result.masks:
        Pattern.parse(pattern).verify(result.masks[name], 0.5, name)
    assert len(pruner.refinements) == 14
    assert sum(report.swaps for report in pruner.refinements.values()) > 0


def test_kept_weights_are_dense_weights():
    dense = llama().state_dict()
    model, result = run(DSnoT(sparsity=0.6, skip=()))
    for name in result.masks:
        mask = result.masks[name]
        assert torch.equal(model.state_dict()[name][mask], dense[name][mask])


def test_sparsegpt_weights_stay_updated_and_regrown_ones_are_dense():
    arguments = {"sparsity": 0.6, "pattern": "unstructured:row", "include": ("*layers.0.self_attn.q_proj",)}
    dense = llama().state_dict()
    start, initial = run(SparseGPT(**arguments))
    model, result = run(DSnoT(initial="sparsegpt", threshold=0.0, **arguments))
    (name,) = result.masks
    regrown = result.masks[name] & ~initial.masks[name]
    stayed = result.masks[name] & initial.masks[name]
    assert regrown.any()
    assert torch.equal(model.state_dict()[name][regrown], dense[name][regrown])
    assert torch.equal(model.state_dict()[name][stayed], start.state_dict()[name][stayed])
    assert not torch.equal(model.state_dict()[name][stayed], dense[name][stayed])


def test_feed_forward_layers_keep_their_initial_mask_unless_told_otherwise():
    arguments = {"sparsity": 0.6, "include": ("model.layers.0.*",)}
    pruner = DSnoT(**arguments)
    _, result = run(pruner)
    _, wanda = run("wanda", **arguments)
    same = {name: bool((result.masks[name] == wanda.masks[name]).all()) for name in result.masks}
    assert set(pruner.refinements) == {name for name in same if ".self_attn." in name}
    assert all(same[name] for name in same if ".mlp." in name and "down_proj" not in name)
    assert not all(same[name] for name in pruner.refinements)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
FAMILIES = {
    "opt": (OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)),
    "bert": (BertModel, BertConfig(**SMALL, intermediate_size=32)),
    "gpt2": (GPT2Model, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_attention_is_refined_whatever_a_model_calls_its_layers(family):
    kind, config = FAMILIES[family]
    pruner = DSnoT(sparsity=0.6, exclude=("*pooler*",))
    _, result = run(pruner, kind(config).eval())
    refined = {name for name in result.masks if "attn" in name or "attention" in name}
    assert set(pruner.refinements) == refined
    assert 0 < len(refined) < len(result.masks)


def test_the_defaults_are_those_of_the_released_code():
    pruner = DSnoT()
    assert (pruner.max_cycles, pruner.threshold, pruner.variance_power) == (50, 0.1, 1.0)
    assert (pruner.same_sign, pruner.sequence_length, pruner.initial) == (False, None, "wanda")


def test_the_expected_error_is_the_mean_change_of_the_output():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 8, bias=False))
    inputs = torch.randn(3, 20, 16) + torch.randn(16)
    before = layer(inputs)
    pruner = DSnoT(sparsity=0.5, skip=())
    gossamer.prune(layer, pruner, calibration=[inputs], progress=False)
    # summed over the twenty tokens of a sequence, averaged over the three sequences
    change = (before - layer(inputs)).detach().sum(1).mean(0)
    assert pruner.refinements["0.weight"].error_after == pytest.approx(float(change.abs().mean()), rel=1e-4)


def test_the_threshold_is_meant_for_a_calibration_sequence_however_they_are_batched():
    single = list(batches())
    together = [torch.cat(single)]
    runs = [DSnoT(sparsity=0.6, skip=()) for _ in range(3)]
    runs[2].sequence_length = 32
    masks = [run(pruner, data=data)[1].masks for pruner, data in zip(runs, (single, together, single))]
    reports = [next(iter(pruner.refinements.values())) for pruner in runs]
    assert reports[0].error_before == pytest.approx(reports[1].error_before, rel=1e-4)
    assert masks[2] == masks[0]
    per_token = DSnoT(sparsity=0.6, skip=(), sequence_length=1)
    run(per_token)
    report = next(iter(per_token.refinements.values()))
    assert report.error_before == pytest.approx(reports[0].error_before / 32, rel=1e-4)


def test_current_zeros_are_refined_with_the_dense_weights():
    dense = {name: value.clone() for name, value in llama().state_dict().items()}
    model, first = run("magnitude", sparsity=0.6, pattern="unstructured:row")
    pruner = DSnoT(initial="current", dense=dense, skip=(), threshold=0.01)
    _, second = run(pruner, model)
    assert second.masks.sparsity == first.masks.sparsity
    assert second.masks != first.masks
    for name in second.masks:
        assert torch.equal(model.state_dict()[name], dense[name] * second.masks[name])


def test_current_zeros_must_exist_and_need_dense_weights():
    model = llama()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="pass dense="):
        DSnoT(initial="current")
    with pytest.raises(ConfigurationError, match="exactly 'current'"):
        DSnoT(dense=dense)
    with pytest.raises(TargetError, match="has no zeros to start from"):
        run(DSnoT(initial="current", dense=dense), model)
    run("magnitude", model, sparsity=0.5)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(TargetError, match=f"{name} is missing in the dense weights"):
        run(DSnoT(initial="current", dense={k: v for k, v in dense.items() if k != name}), model)
    with pytest.raises(PatternError, match="do not follow 2:4"):
        run(DSnoT(initial="current", dense=dense, pattern="2:4"), model)


def test_nm_goes_by_the_score_of_the_initial_method():
    torch.manual_seed(0)
    arguments = {"pattern": "2:4", "threshold": 0.0, "heads": True}
    data = [torch.randn(4, 10, 32) * torch.rand(32) * 3 + torch.randn(32)]
    masks = {}
    for initial in ("wanda", "ria"):
        layer = nn.Sequential(nn.Linear(32, 16, bias=False))
        with torch.no_grad():
            layer[0].weight.copy_(torch.randn(16, 32, generator=torch.Generator().manual_seed(2)))
        dense = layer[0].weight.detach().clone()
        pruner = DSnoT(initial=initial, **arguments)
        masks[initial] = gossamer.prune(layer, pruner, calibration=data, progress=False).masks["0.weight"]
        NM(2, 4).verify(masks[initial])
        assert torch.equal(layer[0].weight, dense * masks[initial])
    assert not torch.equal(masks["wanda"], masks["ria"])


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "options", [{"initial": "magnitude"}, {"skip": ()}, {"pattern": "2:4", "initial": "sparsegpt"}]
)
def test_a_resumed_run_equals_an_uninterrupted_one_with_its_report(options, tmp_path, monkeypatch):
    options = {"sparsity": 0.5, "threshold": 0.01, **options}
    whole, interrupted, resumed = (DSnoT(**options) for _ in range(3))
    expected_model, expected = run(whole)
    keep, done = Journal.keep, []

    def keep_once(self, block, entries):
        if done:
            raise _Interrupted
        keep(self, block, entries)
        done.append(block)

    monkeypatch.setattr(Journal, "keep", keep_once)
    with pytest.raises(_Interrupted):
        run(interrupted, workspace=tmp_path)
    monkeypatch.setattr(Journal, "keep", keep)
    model, result = run(resumed, workspace=tmp_path)
    assert result.masks == expected.masks
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in expected_model.state_dict().items())
    assert resumed.refinements == whole.refinements
    assert len(resumed.refinements) in (8, 14)
    again = DSnoT(**options)
    run(again, workspace=tmp_path)
    assert again.refinements == whole.refinements


def test_a_damaged_report_is_refused(tmp_path):
    run(DSnoT(sparsity=0.5), workspace=tmp_path)
    (tmp_path / "refinements.json").write_text('{"layer": {"swaps": 1')
    with pytest.raises(CheckpointError, match=r"refinements\.json is damaged"):
        run(DSnoT(sparsity=0.5), workspace=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cycles": 0}, "max_cycles is 0"),
        ({"threshold": -1.0}, "threshold -1.0"),
        ({"variance_power": -1.0}, "variance_power -1.0"),
        ({"growing": "luck"}, "growing is 'luck'; it must be one of contribution, magnitude"),
        ({"pruning": "luck"}, "pruning is 'luck'; it must be one of wanda, contribution"),
        ({"pruning": "contribution", "pattern": "2:4"}, "the initial score decides"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"pattern": "16x1"}, "DSnoT exchanges weights within a row"),
        ({"pattern": "2:4@0"}, "DSnoT exchanges weights within a row"),
        ({"pattern": "unstructured:model"}, "DSnoT exchanges weights within a row"),
    ],
)
def test_impossible_settings_are_refused_with_a_remedy(options, message):
    with pytest.raises(ConfigurationError, match=message):
        DSnoT(**options)


def test_unknown_initial_methods_are_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="unknown initial method 'wandaa'; did you mean 'wanda'"):
        DSnoT(initial="wandaa")
    with pytest.raises(UnknownNameError, match="unknown initial method 'cfsp'"):
        DSnoT(initial="cfsp")
    with pytest.raises(ConfigurationError, match="wanda has no parameter 'speed'"):
        DSnoT(initial_settings={"speed": 1})
