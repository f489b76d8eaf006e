from __future__ import annotations

import copy

import pytest
import torch

from gossamer.core.patterns import NM, Unstructured
from gossamer.core.quantization import Quantizer
from gossamer.core.targets import find_targets
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.pruning.column_sweep import factor, prune_columns
from gossamer.pruning.sparsegpt import SparseGPT


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    return torch.randn(20, 48, generator=generator), inputs


def output_error(weight, pruned, inputs):
    return float(((weight - pruned) @ inputs.t()).norm())


def test_the_block_size_does_not_matter_for_a_fixed_mask(problem):
    weight, inputs = problem
    factored = factor(inputs.t() @ inputs)
    whole, mask, loss = prune_columns(weight, factored, Unstructured(), 0.5, block_size=48)
    for block in (1, 7, 16):
        parts, same, lost = prune_columns(weight, factored, Unstructured(), block_size=block, mask=mask)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(same, mask)
        assert lost == pytest.approx(loss, rel=1e-4)


def test_without_correlations_it_is_magnitude_pruning(problem):
    weight, _ = problem
    pruned, mask, _ = prune_columns(weight, factor(torch.eye(48)), Unstructured(), 0.5, block_size=48)
    assert torch.equal(mask, Unstructured().select(weight.abs(), 0.5))
    torch.testing.assert_close(pruned, weight * mask, rtol=0, atol=0)


def test_one_pruned_weight_gets_the_closed_form_update(problem):
    weight, inputs = problem
    gram = inputs.t() @ inputs
    damping = 1e-6
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0, 0] = False  # the first column: everything after it may make up for it
    pruned, _, _ = prune_columns(weight, factor(gram, damping), Unstructured(), mask=mask)
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(48, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    expected = weight[0].double() - weight[0, 0].double() / inverse[0, 0] * inverse[:, 0]
    expected[0] = 0
    torch.testing.assert_close(pruned[0].double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(pruned[1:], weight[1:])


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4)])
@pytest.mark.parametrize("order", ["natural", "hessian"])
def test_the_update_lowers_the_output_error_and_the_best_refit_bounds_it(problem, pattern, order):
    weight, inputs = problem
    gram = inputs.t() @ inputs
    pruned, mask, _ = prune_columns(weight, factor(gram, order=order, group=4), pattern, 0.5, block_size=16)
    assert not (pruned[~mask] != 0).any()
    refit = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        solved = torch.linalg.solve(gram[kept][:, kept].double(), gram[kept].double() @ weight[row].double())
        refit[row, kept] = solved.float()
    best, found = output_error(weight, refit, inputs), output_error(weight, pruned, inputs)
    assert best <= found * 1.001
    assert found < output_error(weight, weight * mask, inputs)
    if isinstance(pattern, NM):
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_few_tokens_and_dead_features_are_survived():
    inputs = torch.randn(5, 32)
    inputs[:, 7] = 0
    pruned, mask, _ = prune_columns(torch.randn(8, 32), factor(inputs.t() @ inputs), Unstructured(), 0.5)
    assert torch.isfinite(pruned).all()
    assert not pruned[:, 7].any()
    assert int((~mask).sum()) == 128


def test_zeros_that_are_there_are_kept_and_counted(problem):
    weight, inputs = problem
    weight[:, ::4] = 0
    pruned, mask, _ = prune_columns(
        weight, factor(inputs.t() @ inputs), Unstructured(), 0.5, fixed_zeros=weight == 0, block_size=16
    )
    assert not mask[:, ::4].any()
    assert not pruned[:, ::4].any()
    assert int((~mask).sum()) == mask.numel() // 2


def test_what_remains_can_be_rounded_in_the_same_sweep(problem):
    weight, inputs = problem
    quantizer = Quantizer(bits=4)
    pruned, mask, _ = prune_columns(
        weight, factor(inputs.t() @ inputs), Unstructured(), 0.5, quantizer=quantizer, block_size=16
    )
    grid = quantizer.fit(weight, dim=1)
    torch.testing.assert_close(grid.round(pruned) * mask, pruned, rtol=1e-5, atol=1e-5)
    plain = quantizer.fit(weight, dim=1).round(weight) * mask
    assert output_error(weight, pruned, inputs) < output_error(weight, plain, inputs)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigurationError, match="multiple of 8"):
        SparseGPT(pattern="4:8", block_size=12)
    with pytest.raises(ConfigurationError, match="not 16x1"):
        SparseGPT(pattern="16x1")


def test_too_few_tokens_for_a_full_hessian_are_warned_about(tiny_llama, batches):
    with pytest.warns(UserWarning, match=r"24 calibration tokens for 48 features"):
        SparseGPT(sparsity=0.5).prune(tiny_llama, [batches[0][:1]], progress=False)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_size_of_the_calibration_batches_does_not_matter(tiny_llama, batches, pattern):
    together = [torch.cat(batches)]
    apart = [row[None] for batch in batches for row in batch]
    results = []
    for data in (together, batches, apart):
        model = copy.deepcopy(tiny_llama)
        result = SparseGPT(sparsity=0.5, pattern=pattern).prune(model, data, progress=False)
        results.append((result.masks, model.state_dict()))
    (masks, weights), *others = results
    for other_masks, other_weights in others:
        assert other_masks.distance(masks) <= masks.total // 1000  # sums of another order: near ties may flip
        for layer in "qkv":  # what comes later follows the flips
            name = f"model.layers.0.self_attn.{layer}_proj.weight"
            assert torch.equal(other_masks[name], masks[name])
            torch.testing.assert_close(other_weights[name], weights[name], rtol=1e-3, atol=1e-5)


def test_layers_that_share_an_input_are_swept_together_with_the_result_of_each_alone(tiny_llama, batches):
    alone = copy.deepcopy(tiny_llama)
    together = SparseGPT(sparsity=0.5).prune(tiny_llama, batches, progress=False)

    class OneByOne(SparseGPT):
        def prepare_layers(self, targets, stats, sparsities):
            seen.append([target.name.split(".")[-2] for target in targets])

    seen = []
    apart = OneByOne(sparsity=0.5).prune(alone, batches, progress=False)
    assert seen[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert apart.masks.distance(together.masks) <= together.masks.total // 1000
    assert apart.masks["model.layers.0.self_attn.q_proj.weight"].equal(
        together.masks["model.layers.0.self_attn.q_proj.weight"]
    )


def test_without_update_the_weights_that_remain_are_the_dense_ones(tiny_llama, batches):
    dense = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    result = SparseGPT(sparsity=0.5, update=False).prune(tiny_llama, batches, progress=False)
    for name, mask in result.masks.items():
        assert torch.equal(tiny_llama.state_dict()[name], dense[name] * mask)


def test_pruning_again_with_the_mask_preserved_only_adds_zeros(tiny_llama, batches):
    first = SparseGPT(sparsity=0.4).prune(tiny_llama, batches, progress=False)
    second = SparseGPT(sparsity=0.6, preserve_mask=True).prune(tiny_llama, batches, progress=False)
    assert second.masks & first.masks == second.masks
    assert second.sparsity == pytest.approx(0.6, abs=0.02)


def test_an_expert_without_tokens_and_a_grouped_convolution_are_refused_by_name(batches):
    layer = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(ConfigurationError, match="grouped convolution"):
        SparseGPT(sparsity=0.5).prune(layer, [torch.randn(8, 4, 5)], progress=False)
    target = find_targets(torch.nn.Sequential(torch.nn.Linear(3, 2)), heads=True)[0]
    with pytest.raises(CalibrationError, match=r"no calibration token reached 0\.weight"):
        SparseGPT(sparsity=0.5).prune_layer(target, None, 0.5)


def test_a_run_stopped_in_the_middle_of_a_block_goes_on_to_the_same_result(tiny_llama, batches, tmp_path, monkeypatch):
    whole, broken, resumed = tiny_llama, copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    options = {"sparsity": 0.5, "order": "hessian", "block_size": 32}
    expected = SparseGPT(**options).prune(whole, batches, progress=False)
    plain, done = SparseGPT.prune_layer, []

    def stop_in_the_second_block(self, target, stats, sparsity):
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(target.name)
        return plain(self, target, stats, sparsity)

    with monkeypatch.context() as patch:
        patch.setattr(SparseGPT, "prune_layer", stop_in_the_second_block)
        with pytest.raises(KeyboardInterrupt):
            SparseGPT(**options).prune(broken, batches, workspace=tmp_path, progress=False)
    result = SparseGPT(**options).prune(resumed, batches, workspace=tmp_path, progress=False)
    assert result.masks == expected.masks
    assert [r.error for r in result.layers] == [r.error for r in expected.layers]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
