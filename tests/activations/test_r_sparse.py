import pytest
import torch

from gossamer.activations.evolution import Evolution
from gossamer.activations.r_sparse import (
    RSparse,
    Split,
    bias_view_error,
    importance_map,
    singular_factors,
)
from gossamer.activations.rules import ActivationRules
from gossamer.core.channel_rules import ChannelRule, TopK, column_norms
from gossamer.errors import CalibrationError, ConfigurationError, SparsityError


def test_a_budget_is_divided_as_stated():
    assert Split.of((40, 100), 0.5, 0.8) == Split(40, (2000 - 40 * 40) // 140)
    assert Split.of((40, 100), 0.5, 1.0) == Split(50, 0)
    assert Split.of((40, 100), 0.5, 0.0) == Split(0, 2000 // 140)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_no_more_weights_are_read_than_the_budget_has(alpha):
    for shape in [(40, 100), (100, 40), (64, 64)]:
        assert Split.of(shape, 0.5, alpha).weights_read(shape) <= 0.5 * shape[0] * shape[1]


def test_factors_are_those_of_the_weight_and_their_row_norms_its_column_norms():
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    left, right = singular_factors(weight)
    assert torch.allclose(left @ right, weight, atol=1e-5)
    scaled = (right.T * left.norm(dim=0)).norm(dim=1)
    assert torch.allclose(scaled, column_norms(weight), atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_a_layer_adds_what_counts_exactly_to_the_rest_at_low_rank(tiny_llama, batches, alpha):
    name = "model.layers.1.self_attn.o_proj"
    method = RSparse(sparsity=0.5, alpha=alpha)
    rules = method.calibrate(tiny_llama, batches, progress=False)
    layer, rule = tiny_llama.get_submodule(name), rules.inputs[name]
    x = torch.randn(3, 4, 48)
    live = rule.live(x)
    expected = (x * live) @ layer.weight.T
    if alpha < 1:
        split = Split.of((48, 48), 0.5, alpha)
        left, right = singular_factors(layer.weight)
        low = left[:, : split.rank] @ right[: split.rank]
        expected = expected + (x * ~live) @ low.T
    with method.active(tiny_llama):
        assert torch.allclose(layer(x), expected, atol=1e-5)
    if alpha == 0:
        assert not live.any()


def test_a_sparsity_of_zero_is_exactly_dense(tiny_llama, batches):
    method = RSparse(sparsity=0.0, alpha=0.9)
    method.calibrate(tiny_llama, batches, progress=False)
    before = tiny_llama(batches[0]).logits
    with method.active(tiny_llama):
        assert torch.equal(tiny_llama(batches[0]).logits, before)


def test_a_bias_is_added_once():
    torch.manual_seed(0)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(3.0)
    method = RSparse(sparsity=0.5)
    rules = method.calibrate(model, [torch.randint(40, (2, 16))], progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    rule, factors = rules.inputs["model.layers.0.self_attn.q_proj"], rules.low_rank["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 16)
    live = rule.live(x)
    expected = (x * live) @ layer.weight.T + (x * ~live) @ (factors.left @ factors.right).T + 3.0
    with method.active(model):
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_factors_count_among_the_weights_read(tiny_llama, batches):
    method = RSparse(sparsity=0.5, alpha=0.0, dense_prefill=0.0)
    rules = method.calibrate(tiny_llama, batches, progress=False)
    with method.active(tiny_llama) as installed, torch.no_grad():
        tiny_llama(batches[0])
        read = installed.weights_read
    head = 97 * 48
    assert read.read == pytest.approx(head + sum(factors.size for factors in rules.low_rank.values()))


def test_the_search_keeps_the_budget_and_is_never_worse_than_its_first_genomes(tiny_llama, batches):
    sizes = {"a": 10, "b": 30}
    tried = []

    def cost(alphas, budget):
        assert sum(budget[n] * sizes[n] for n in sizes) == pytest.approx(20.0, abs=1e-6)
        assert all(0 <= a <= 1 for a in alphas.values())
        value = (alphas["a"] - 0.2) ** 2 + (alphas["b"] - 0.6) ** 2 + (budget["a"] - 0.8) ** 2
        tried.append(value)
        return value

    search = Evolution(12, 6, mutation_rate=0.5)
    alphas, budget = search.run(cost, sizes, {"a": 0.5, "b": 0.5}, progress=False)
    assert cost(alphas, budget) == min(tried)
    assert min(tried) < min(tried[:12])
    assert search.run(cost, sizes, {"a": 0.5, "b": 0.5}, progress=False) == (alphas, budget)


def test_a_searched_division_runs_end_to_end(tiny_llama, batches):
    method = RSparse(sparsity=0.6, alpha="search", search=Evolution(4, 1, sequences=1))
    rules = method.calibrate(tiny_llama, batches, progress=False)
    assert set(rules.settings["alphas"]) == set(rules.inputs)
    other = method.at(0.5)
    assert other.settings["alphas"] == rules.settings["alphas"]
    assert set(other.settings["budget"].values()) == {0.5}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_what_is_requested_is_the_share_of_channels_that_is_realised(tiny_llama, batches, alpha):
    method = RSparse(sparsity=0.5, alpha=alpha, dense_prefill=0.0)
    rules = method.calibrate(tiny_llama, batches, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    assert rules.requested[name] == pytest.approx(1 - Split.of((48, 48), 0.5, alpha).channels / 48)
    assert set(rules.settings["budget"].values()) == {0.5}
    with method.active(tiny_llama) as installed, torch.no_grad():
        for batch in batches:
            tiny_llama(batch)
    # later layers meet inputs that earlier ones have made sparse; the first meets those of the calibration
    assert installed.realised[name] == pytest.approx(rules.requested[name], abs=0.01)


def test_the_largest_sparsity_at_a_price_is_found_though_some_leave_nothing_to_read(tiny_llama, batches):
    method = RSparse(alpha=0.0)
    method.calibrate(tiny_llama, batches, progress=False)
    with pytest.raises(SparsityError):
        method.at(0.95)  # where the search begins
    found = method.within(tiny_llama, batches[:1], ratio=1.05, tolerance=0.1)
    assert 0 <= found < 0.95
    assert set(method.rules_.settings["budget"].values()) == {found}


def test_factors_hold_no_more_memory_than_their_own_numbers_take(tiny_llama, batches):
    rules = RSparse(sparsity=0.5).calibrate(tiny_llama, batches, progress=False)
    for factors in rules.low_rank.values():
        held = sum(part.untyped_storage().nbytes() for part in (factors.left, factors.right))
        assert held == 4 * factors.size


def test_rules_and_their_settings_survive_a_file(tiny_llama, batches, tmp_path):
    rules = RSparse(sparsity=0.5).calibrate(tiny_llama, batches, progress=False)
    rules.save(tmp_path / "rules.safetensors")
    read = ActivationRules.load(tmp_path / "rules.safetensors")
    assert read.settings == rules.settings
    for name, factors in rules.low_rank.items():
        assert torch.equal(read.low_rank[name].left, factors.left)
        assert torch.equal(read.low_rank[name].right, factors.right)


@pytest.mark.parametrize("sparsity", [0.0, 0.97])
def test_the_search_keeps_extreme_budgets_too(sparsity):
    def cost(alphas, budget):
        assert 10 * budget["a"] + 30 * budget["b"] == pytest.approx(40 * sparsity, abs=1e-6)
        return -alphas["a"]

    Evolution(8, 2, mutation_rate=0.5).run(cost, {"a": 10, "b": 30}, {"a": sparsity, "b": sparsity}, progress=False)


def test_constants_stand_in_the_better_the_more_there_are():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 16, generator=generator), torch.randn(64, 16, generator=generator) + 1
    errors = [bias_view_error(weight, x, ChannelRule(TopK(4)), levels) for levels in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigurationError, match="levels is 0"):
        bias_view_error(weight, x, ChannelRule(TopK(4)), 0)


def test_the_importance_map_is_the_mean_size_of_each_product():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 6, generator=generator), torch.randn(30, 6, generator=generator)
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = torch.stack([(values[:, None] * right * row.double()).abs() for row in x]).mean(0)
    assert torch.allclose(importance_map(weight, x), expected)


def test_bad_settings_are_refused(tiny_llama, batches):
    for wrong in (1.5, -0.1, "best"):
        with pytest.raises(ConfigurationError, match="alpha is"):
            RSparse(alpha=wrong)
    with pytest.raises(ConfigurationError, match="searches its budgets"):
        RSparse(allocation="greedy")
    with pytest.raises(SparsityError, match="nothing to read"):
        Split.of((4, 4), 0.9, 0.0)
    with pytest.raises(ConfigurationError, match="population is 1"):
        Evolution(population=1)
    with pytest.raises(ConfigurationError, match="kept is 1"):
        Evolution(kept=1)
    with pytest.raises(SparsityError, match=r"1\.5"):
        Split.of((40, 100), 1.5, 0.5)
    with pytest.raises(ConfigurationError, match="alpha gives nothing for 'model"):
        RSparse(alpha={"a": 0.5}).calibrate(tiny_llama, batches, progress=False)
    with pytest.raises(CalibrationError, match="needs a calibration before"):
        RSparse().at(0.6)
