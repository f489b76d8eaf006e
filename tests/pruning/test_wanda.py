from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import gossamer
from gossamer.core.calibration import InputNorm, Statistics
from gossamer.core.patterns import Pattern
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError
from gossamer.models.blocks import find_stacks
from gossamer.pruning.dsnot import DSnoT
from gossamer.pruning.wanda import Wanda, cumulative_share


def layer(weight):
    weight = torch.as_tensor(weight)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return nn.Sequential(module)


def prune(weight, inputs, method="wanda", **options):
    model = layer(weight)
    result = gossamer.prune(model, method, calibration=[inputs], progress=False, **options)
    return result.masks["0.weight"], model[0].weight.detach()


def loud(tokens, features, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator) * torch.logspace(-spread, spread, features)


WEIGHT = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])


def test_the_score_is_the_weight_times_the_norm_of_its_input():
    inputs = torch.diag(torch.tensor([1.0, 2.0, 8.0, 3.0])).repeat(4, 1)  # norms 2, 4, 16, 6
    target = find_targets(layer(WEIGHT), heads=True)[0]
    stats = Statistics((InputNorm,), 4, "cpu")
    stats.update(inputs)
    expected = [[8.0, 0.0, 16.0, 6.0], [6.0, 8.0, 16.0, 18.0], [6.0, 4.0, 0.0, 12.0]]
    assert Wanda().score(target, stats).tolist() == expected
    mask, weight = prune(WEIGHT, inputs)
    assert mask.tolist() == [[True, False, True, False], [False, False, True, True], [True, False, False, True]]
    assert torch.equal(weight, WEIGHT * mask)


def test_weights_compete_within_their_row_and_leave_the_rest_untouched():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 21, generator=generator) * torch.logspace(-2, 2, 9).unsqueeze(1)
    inputs = loud(200, 21)
    for sparsity, dropped in ((0.5, 10), (0.3, 6), (0.77, 16)):  # rounded down
        mask, pruned = prune(weight, inputs, sparsity=sparsity)
        assert (~mask).sum(1).tolist() == [dropped] * 9
        assert torch.equal(pruned, weight * mask)
        score = weight.abs() * inputs.double().norm(dim=0)
        for row in range(9):
            assert score[row][mask[row]].min() >= score[row][~mask[row]].max()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_weights_compete_within_their_group(pattern):
    kept, size = map(int, pattern.split(":"))
    weight, inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), loud(100, 32)
    mask, _ = prune(weight, inputs, pattern=pattern)
    score = (weight.abs() * inputs.norm(dim=0)).unflatten(1, (-1, size))
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(kept, dim=2).indices, True)
    assert torch.equal(mask, expected.flatten(1))


def test_features_of_equal_variance_make_it_magnitude_per_row():
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    signs = torch.randn(64, 40, generator=torch.Generator().manual_seed(3)).sign()  # every norm is 8
    mask, _ = prune(weight, signs)
    expected, _ = prune(weight, signs, "magnitude", pattern="unstructured:row")
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("dropped", [3, 5, 8])
def test_orthogonal_features_make_the_mask_the_best_there_is(dropped):
    generator = torch.Generator().manual_seed(dropped)
    weight = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(30, 10, generator=generator, dtype=torch.float64)).Q
    inputs = basis * torch.logspace(-1, 1, 10, dtype=torch.float64)
    mask, _ = prune(weight, inputs, sparsity=dropped / 10)
    error = (inputs @ (weight * ~mask).t()).square().sum(0)
    for row in range(4):
        subsets = itertools.combinations(range(10), dropped)
        best = min((inputs[:, list(gone)] @ weight[row, list(gone)]).square().sum().item() for gone in subsets)
        assert error[row].item() == pytest.approx(best, rel=1e-9)


def test_batches_and_constant_factors_do_not_matter():
    weight, inputs = torch.randn(8, 24, generator=torch.Generator().manual_seed(4)), loud(96, 24)
    whole, _ = prune(weight, inputs)
    models = [layer(weight), layer(weight)]
    parts = gossamer.prune(models[0], "wanda", calibration=list(inputs.split(7)), progress=False)
    scaled = gossamer.prune(models[1], "wanda", calibration=[inputs * 32], progress=False)
    assert torch.equal(parts.masks["0.weight"], whole)
    assert torch.equal(scaled.masks["0.weight"], whole)


def test_padding_is_not_text(tiny_llama, batches):
    padded = []
    for batch in batches:
        ids = torch.cat([batch, torch.zeros(2, 9, dtype=torch.long)], 1)
        mask = torch.cat([torch.ones_like(batch), torch.zeros(2, 9, dtype=torch.long)], 1)
        padded.append({"input_ids": ids, "attention_mask": mask})
    other = copy.deepcopy(tiny_llama)
    plain = gossamer.prune(tiny_llama, "wanda", calibration=batches, progress=False)
    without = gossamer.prune(other, "wanda", calibration=padded, progress=False)
    assert without.masks.distance(plain.masks) < 1e-3  # sequences are then run one by one, which rounds otherwise


def bisected(score, sparsity):
    """The published search, in plain words: a share of each row's mass, halved until the sparsity is right."""
    ordered = score.sort(dim=1).values
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        count = (ordered.cumsum(1) <= share * score.sum(1, keepdim=True)).sum(1)
        if count.sum() > sparsity * score.numel():
            high = share
        else:
            low = share
    return (ordered.cumsum(1) <= low * score.sum(1, keepdim=True)).sum(1)


def test_rows_that_adapt_lose_the_same_share_of_their_mass():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 50, generator=generator, dtype=torch.float64)
    weight = weight.sign() * weight.abs() ** torch.linspace(0.3, 3, 16, dtype=torch.float64).unsqueeze(1)
    inputs = loud(64, 50, spread=0.3)
    mask, _ = prune(weight.float(), inputs, adaptive_rows=True, sparsity=0.6)
    score = weight.abs() * inputs.double().norm(dim=0)
    assert (~mask).sum() == 480
    assert ((~mask).sum(1) - bisected(score, 0.6)).abs().max() <= 1
    assert len((~mask).sum(1).unique()) > 5
    for row in range(16):
        assert score[row][mask[row]].min() >= score[row][~mask[row]].max()
    share = cumulative_share(score)
    assert share[mask].min() >= share[~mask].max() - 1e-5


def test_rows_cannot_adapt_to_a_fixed_pattern():
    with pytest.raises(ConfigurationError, match="adaptive_rows is True, but the pattern 2:4"):
        Wanda(pattern="2:4", adaptive_rows=True)


def test_blocks_see_the_pruned_blocks_before_them_unless_told_otherwise(tiny_llama, batches):
    dense = copy.deepcopy(tiny_llama)
    runs = [copy.deepcopy(tiny_llama) for _ in range(2)]
    options = {"calibration": batches, "progress": False, "sparsity": 0.6}
    block_by_block, one_pass = (
        gossamer.prune(model, "wanda", sequential=sequential, **options)
        for model, sequential in zip(runs, (True, False), strict=True)
    )
    names = [f"{name}." for stack in find_stacks(dense) for name in stack.blocks]
    same = {name: torch.equal(block_by_block.masks[name], one_pass.masks[name]) for name in one_pass.masks}
    assert all(value for name, value in same.items() if name.startswith(names[0]))
    assert not any(value for name, value in same.items() if name.startswith(names[2]))
    # the whole model at once, dense, is the reference of one pass
    from gossamer.core.calibration import observe

    with torch.no_grad(), observe(find_targets(dense), (InputNorm,)) as seen:
        for batch in batches:
            dense(batch)
    for target in find_targets(dense):
        score = target.matrix().abs() * seen[target.name][InputNorm].norm.float()
        expected = Pattern.parse("unstructured:row").select(score, 0.6)
        assert (one_pass.masks[target.name] != expected).float().mean() < 1e-3


def test_one_pass_belongs_to_the_walk_of_wanda_itself(tiny_llama, batches):
    refiner = DSnoT(initial="wanda", initial_settings={"sequential": False})
    with pytest.raises(ConfigurationError, match="only Wanda's own prune can do"):
        gossamer.prune(tiny_llama, refiner, calibration=batches, progress=False)


@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_experts_that_saw_nothing_are_pruned_by_magnitude_and_named(method):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    model = MixtralForCausalLM(config).eval()
    router = next(parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight"))
    with torch.no_grad():
        router.zero_()  # all tokens go to one expert
    dense = {target.name: target.matrix().clone() for target in find_targets(model)}
    data = [torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))]
    with pytest.warns(UserWarning, match=r"6 layers saw fewer than 16 calibration tokens: .*experts.*\(0\)"):
        gossamer.prune(model, method, calibration=data, progress=False)
    unseen = 0
    for target in find_targets(model):
        expected = Pattern.parse("unstructured:row").select(dense[target.name].abs(), 0.5)
        unseen += target.index is not None and torch.equal(target.matrix() != 0, expected)
    if method == "wanda":
        assert unseen >= 6


def test_a_layer_whose_inputs_are_all_zero_is_pruned_by_magnitude():
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(6))
    mask, _ = prune(weight, torch.zeros(40, 12))
    expected, _ = prune(weight, torch.zeros(40, 12), "magnitude", pattern="unstructured:row")
    assert torch.equal(mask, expected)


def test_enough_text_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(torch.randn(4, 8), torch.randn(16, 8))


def test_outlier_features_do_not_overflow_in_half_precision():
    weight = torch.ones(2, 8, dtype=torch.float16)
    inputs = torch.ones(64, 8, dtype=torch.float16)
    inputs[:, 3], inputs[:, 5] = 60_000, 50_000
    mask, pruned = prune(weight, inputs, sparsity=0.75)
    assert mask.nonzero()[:, 1].tolist() == [3, 5, 3, 5]
    assert pruned.dtype == torch.float16


def test_relative_importance_looks_at_rows_and_columns():
    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    # (1/4 + 1/4)·√n_j and (3/4 + 3/4)·√n_j with norms 16 and 1
    inputs = torch.zeros(16, 2)
    inputs[:, 0], inputs[0, 1] = 4, 1
    from gossamer.pruning.wanda import RelativeImportance

    target = find_targets(layer(weight), heads=True)[0]
    stats = Statistics((InputNorm,), 2, "cpu")
    stats.update(inputs)
    assert RelativeImportance().score(target, stats).tolist() == [[2.0, 1.5], [6.0, 0.5]]
    assert RelativeImportance(power=0.0).score(target, stats).tolist() == [[0.5, 1.5], [1.5, 0.5]]
