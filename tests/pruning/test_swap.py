from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.core.patterns import Pattern
from gossamer.errors import ConfigurationError, TargetError, UnknownNameError
from gossamer.pruning.dsnot import DSnoT
from gossamer.pruning.swap import SwapRefinement, swap_mask


def problem(seed, rows=4, columns=8, tokens=12, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    if correlated:
        inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.t() @ inputs, torch.rand(rows, columns, generator=generator)


def row_errors(weight, mask, gram):
    residual = weight * ~mask
    return ((residual @ gram) * residual).sum(1)


def neighbours(mask, group=None):
    """All masks one swap away from the mask of a row."""
    for out, back in itertools.product(range(len(mask)), repeat=2):
        if mask[out] and not mask[back] and (group is None or out // group == back // group):
            other = mask.clone()
            other[out], other[back] = False, True
            yield other


def best_neighbour(weight, mask, gram, group=None):
    return min((row_errors(weight[None], other[None], gram).item() for other in neighbours(mask, group)), default=None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_the_first_swap_is_the_best_of_all(seed, sparsity):
    weight, gram, scores = problem(seed)
    mask = Pattern.parse("unstructured").select(scores, sparsity)
    refined = swap_mask(weight, mask, gram, candidates=None, max_rounds=1, swaps_per_round=1)
    before = row_errors(weight, mask, gram)
    for row in range(len(weight)):
        best = best_neighbour(weight[row], mask[row], gram)
        expected = float(before[row]) if best is None else min(best, float(before[row]))
        assert float(refined.error_after[row]) == pytest.approx(expected, rel=1e-9, abs=1e-9 * float(before[row]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["2:4", "1:4", "3:4", "2:8"]))
def test_the_first_swap_within_groups_is_the_best_of_all(seed, text):
    weight, gram, scores = problem(seed, columns=16, tokens=30)
    pattern = Pattern.parse(text)
    mask = pattern.select(scores)
    refined = swap_mask(weight, mask, gram, group=pattern.m, max_rounds=1)
    before = row_errors(weight, mask, gram)
    for row in range(len(weight)):
        expected = min(best_neighbour(weight[row], mask[row], gram, pattern.m), float(before[row]))
        assert float(refined.error_after[row]) == pytest.approx(expected, rel=1e-9, abs=1e-9 * float(before[row]))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from(["unstructured:row", "2:4", "1:4", "3:4"]), st.sampled_from([None, 1, 3, 5])
)
def test_swaps_keep_the_pattern_and_never_raise_the_error(seed, text, candidates):
    weight, gram, scores = problem(seed, rows=6, columns=24, tokens=40)
    pattern = Pattern.parse(text)
    mask = pattern.select(scores, pattern.sparsity or 0.6)
    refined = swap_mask(weight, mask, gram, group=getattr(pattern, "m", None), candidates=candidates)
    pattern.verify(refined.mask, pattern.sparsity or 0.6)
    before, after = row_errors(weight, mask, gram), row_errors(weight, refined.mask, gram)
    assert torch.allclose(refined.error_before, before, rtol=1e-9)
    assert torch.allclose(refined.error_after, after, rtol=1e-9, atol=1e-9 * float(before.max()))
    assert (refined.error_after <= refined.error_before).all()
    assert torch.equal(refined.mask.sum(1), mask.sum(1))
    changed = (refined.mask != mask).any(1)
    assert (refined.swaps[changed] > 0).all()
    assert (refined.error_after[changed] < refined.error_before[changed]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 2, 4]), st.integers(1, 4))
def test_with_everything_listed_no_swap_is_left_that_helps(seed, group, swaps_per_round):
    weight, gram, scores = problem(seed, columns=8)
    mask = Pattern.parse(f"{group // 2}:{group}" if group else "unstructured:row").select(scores, 0.5)
    refined = swap_mask(weight, mask, gram, group=group, candidates=None, swaps_per_round=swaps_per_round)
    for row in range(len(weight)):
        best = best_neighbour(weight[row], refined.mask[row], gram, group)
        reached = float(row_errors(weight[row : row + 1], refined.mask[row : row + 1], gram))
        assert best >= reached - 1e-9 * float(refined.error_before[row])


def test_every_round_lowers_the_error_of_every_row_that_swaps():
    weight, gram, scores = problem(5, rows=20, columns=40, tokens=100)
    mask = Pattern.parse("unstructured:row").select(scores, 0.6)
    runs = [swap_mask(weight, mask, gram, candidates=8, max_rounds=count, swaps_per_round=1) for count in range(1, 12)]
    for earlier, later in itertools.pairwise(runs):
        swapped = later.swaps > earlier.swaps
        assert torch.equal(later.error_after < earlier.error_after, swapped)


def all_pairs(weight, mask, gram):
    """What every swap of a row would change, ``(in, in)``; infinite where it is none."""
    reach = gram @ (weight * ~mask)
    own = weight.square() * gram.diagonal()
    go = (own + 2 * weight * reach).masked_fill(~mask, torch.inf)
    come = (own - 2 * weight * reach).masked_fill(mask, torch.inf)
    return go[:, None] + come - 2 * torch.outer(weight, weight) * gram


@pytest.mark.parametrize(
    ("kind", "sparsity"),
    [
        ("independent", 0.5),
        ("correlated", 0.3),
        ("correlated", 0.7),
        ("one direction", 0.6),
        ("mean", 0.5),
        ("twins", 0.5),
    ],
)
def test_every_swap_of_wide_rows_is_the_best_of_all_pairs(kind, sparsity):
    weight, gram, scores = problem(3, rows=5, columns=90, tokens=200, correlated=kind == "correlated")
    generator = torch.Generator().manual_seed(9)
    shift = torch.randn(90, generator=generator, dtype=torch.float64)
    if kind in ("one direction", "mean"):  # where bounds are loose: every pair of inputs is correlated
        gram = gram + (2000 if kind == "mean" else 100) * torch.outer(shift, shift)
    if kind == "twins":
        gram[45:], gram[:, 45:] = gram[:45], gram[:, :45].clone()
        gram = 0.5 * (gram + gram.t())
    mask = Pattern.parse("unstructured:row").select(scores, sparsity)
    for count in range(1, 16):
        refined = swap_mask(weight, mask, gram, max_rounds=count)
        for row in range(5):
            earlier = swap_mask(weight[row : row + 1], mask[row : row + 1], gram, max_rounds=count - 1 or 1)
            state = mask[row] if count == 1 else earlier.mask[0]
            before = row_errors(weight[row : row + 1], state[None], gram).item()
            best = min(0.0, all_pairs(weight[row], state, gram).min().item())
            assert refined.error_after[row].item() == pytest.approx(before + best, rel=1e-9)
    assert (refined.swaps == 15).any()


def test_the_shortlist_comes_close_to_the_full_search():
    weight, gram, _ = problem(7, rows=32, columns=96, tokens=400)
    mask = Pattern.parse("unstructured:row").select(weight.abs() * gram.diagonal().sqrt(), 0.6)
    full = swap_mask(weight, mask, gram)
    short = swap_mask(weight, mask, gram, candidates=16, swaps_per_round=4)
    assert full.error_after.sum() < 0.8 * full.error_before.sum()
    assert short.error_after.sum() < 1.02 * full.error_after.sum()


def test_weights_in_single_precision_are_accounted_for_exactly():
    weight, gram, scores = problem(11, rows=16, columns=48, tokens=200)
    weight, gram = weight.float(), gram.float()
    mask = Pattern.parse("unstructured:row").select(scores, 0.6)
    refined = swap_mask(weight, mask, gram)
    exact = row_errors(weight.double(), refined.mask, gram.double())
    assert torch.allclose(refined.error_after, exact, rtol=1e-9)


def test_a_zero_weight_goes_for_nothing():
    weight = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    refined = swap_mask(weight, torch.tensor([[1, 1, 0, 0]]).bool(), torch.eye(4))
    assert refined.mask.tolist() == [[False, True, True, False]]
    assert (refined.error_before.item(), refined.error_after.item()) == (5.0, 1.0)


def test_correlated_inputs_are_seen_through():
    # inputs 0 and 1 are the same: 2 and −2 cancel, so keeping only one of them is the worst mask
    gram = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0.5]])
    weight = torch.tensor([[2.0, -2.0, 1.0]])
    refined = swap_mask(weight, torch.tensor([[1, 0, 0]]).bool(), gram)
    assert refined.mask.tolist() == [[False, False, True]]
    assert refined.error_after.item() == 0.0


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("group", [None, 4])
def test_rows_without_a_pair_stay_as_they_are(fill, group):
    mask = torch.full((2, 8), fill)
    refined = swap_mask(torch.randn(2, 8), mask, torch.eye(8), group=group)
    assert torch.equal(refined.mask, mask)
    assert refined.swaps.tolist() == [0, 0]


def test_dead_inputs_leave_the_search_finite():
    weight, gram, scores = problem(2, columns=16)
    gram[3], gram[:, 3] = 0, 0
    mask = Pattern.parse("unstructured:row").select(scores, 0.5)
    assert torch.isfinite(swap_mask(weight, mask, gram).error_after).all()
    assert swap_mask(weight, mask, torch.zeros(16, 16)).swaps.sum() == 0


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


@pytest.mark.parametrize("initial", ["wanda", "magnitude", "sparsegpt", "dsnot"])
@pytest.mark.parametrize("pattern", ["unstructured:row", "unstructured", "2:4"])
def test_no_layer_of_a_model_gets_worse(initial, pattern):
    if (initial, pattern) == ("dsnot", "unstructured"):
        pattern = "4:8"
    model = llama()
    pruner = SwapRefinement(sparsity=0.5, pattern=pattern, initial=initial)
    result = gossamer.prune(model, pruner, calibration=batches(), progress=False)
    assert result.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.masks.violations(model) == {}
    assert len(pruner.refinements) == 14
    for report in pruner.refinements.values():
        assert report.error_after <= report.error_before
        assert (report.error_after < report.error_before) == (report.swaps > 0)
    for name in result.masks:
        Pattern.parse(pattern).verify(result.masks[name], 0.5, name)


@pytest.mark.parametrize("layer", [nn.Linear(24, 10), nn.Conv2d(8, 6, 3, groups=2), nn.Conv1d(4, 8, 3)])
def test_the_output_on_the_calibration_data_gets_closer_to_the_dense_one(layer):
    torch.manual_seed(0)
    shapes = {nn.Linear: (50, 24), nn.Conv2d: (3, 8, 9, 9), nn.Conv1d: (3, 4, 20)}
    inputs = torch.randn(shapes[type(layer)])
    inputs = inputs.cumsum(-1)  # neighbours are alike
    dense, state = layer(inputs), {name: value.clone() for name, value in layer.state_dict().items()}
    errors = []
    for method in ("wanda", SwapRefinement(sparsity=0.5)):
        layer.load_state_dict(state)
        options = {"sparsity": 0.5} if method == "wanda" else {}
        gossamer.prune(nn.Sequential(layer), method, calibration=[inputs], progress=False, **options)
        errors.append(float((layer(inputs) - dense).detach().square().sum()))
    assert errors[1] < errors[0]


def test_a_refinement_can_start_from_another():
    chained = SwapRefinement(sparsity=0.6, initial="dsnot", initial_settings={"skip": ()}, skip=("*",))
    single = DSnoT(sparsity=0.6, skip=())
    masks = [gossamer.prune(llama(), p, calibration=batches(), progress=False).masks for p in (chained, single)]
    assert masks[0] == masks[1]


def test_skipped_layers_keep_the_initial_mask():
    models = [llama(), llama()]
    options = {"sparsity": 0.5, "include": ("model.layers.0.self_attn.*",)}
    pruner = SwapRefinement(skip=("*.o_proj", "*.v_proj"), **options)
    refined = gossamer.prune(models[0], pruner, calibration=batches(), progress=False)
    wanda = gossamer.prune(models[1], "wanda", calibration=batches(), progress=False, **options)
    for name in refined.masks:
        same = torch.equal(refined.masks[name], wanda.masks[name])
        assert same == (name.split(".")[-2] in ("o_proj", "v_proj"))


def test_the_zeros_of_a_pruned_model_can_be_refined_later():
    model = llama()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    gossamer.prune(model, "wanda", calibration=batches(), progress=False, sparsity=0.6)
    pruner = SwapRefinement(initial="current", dense=dense)
    result = gossamer.prune(model, pruner, calibration=batches(), progress=False)
    assert all(report.swaps > 0 for report in pruner.refinements.values())
    for name in result.masks:
        assert torch.equal(model.state_dict()[name], dense[name] * result.masks[name])


@pytest.mark.parametrize("options", [{"max_rounds": 0}, {"candidates": 0}, {"swaps_per_round": 0}])
def test_impossible_settings_are_refused_with_a_remedy(options):
    (name, value), *_ = options.items()
    with pytest.raises(ConfigurationError, match=f"{name} {value}|{name} is {value}"):
        SwapRefinement(**options)


def test_starts_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'magnitude'"):
        SwapRefinement(initial="magnitud")
    dense = llama().state_dict()
    with pytest.raises(TargetError, match="has no zeros to start from"):
        gossamer.prune(llama(), SwapRefinement(initial="current", dense=dense), calibration=batches(), progress=False)
