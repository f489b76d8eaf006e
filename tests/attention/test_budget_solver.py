"""Budgets: what was asked for is what a model computes."""

from __future__ import annotations

import pytest
import torch

from gossamer.attention.budget_solver import ALL_RULES, budget_for, granularity, rule_of
from gossamer.attention.snap_kv import SnapKV
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError
from gossamer.measure.long_context.isoflops import EVICTING

LENGTH = 512


def test_methods_that_evict_are_those_that_the_price_of_decoding_knows():
    made = {name: budget_for(name, LENGTH, 0.5) for name, rule in ALL_RULES.items() if not rule.adaptive}
    assert {name for name, method in made.items() if isinstance(method, SnapKV)} == EVICTING


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def realised(model, method, ids, phase):
    with torch.no_grad(), method.active(model) as installed:
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        model(input_ids=ids[:, -1:], past_key_values=cache)
    return 1 - installed.report().density(phase)


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [(name, sparsity) for name in ALL_RULES for sparsity in (0.5, 0.9) if name != "flex-prefill"]
    + [("flex-prefill", 0.8)],
)
def test_realised_sparsity_is_within_two_percent(name, sparsity, tiny_llama, prompts):
    options = {"dense_layers": (0,) if sparsity == 0.5 else ()} if name == "double-sparsity" else {}
    method = budget_for(name, LENGTH, sparsity, tiny_llama, [prompts], **options)
    assert realised(tiny_llama, method, prompts, rule_of(name).phase) == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("name", list(ALL_RULES))
def test_no_sparsity_is_dense(name, tiny_llama, prompts):
    ids = prompts[:1, :128]
    method = budget_for(name, 128, 0.0, tiny_llama, [ids])
    assert realised(tiny_llama, method, ids, rule_of(name).phase) == 0.0


@pytest.mark.parametrize("length", [16384, 32768])
@pytest.mark.parametrize("name", ["quest", "block-sparse", "snap-kv", "ada-snap-kv"])
def test_long_prompts_get_the_papers_granularity(name, length):
    method = budget_for(name, length, 0.9)
    expected = {"quest": ("page_size", 16), "block-sparse": ("chunk_size", 64), "snap-kv": ("local_window", 128)}
    field, value = expected.get(name, ("local_window", 128))
    assert getattr(method, field) == value


def test_block_budgets_match_the_closed_form_of_the_paper():
    method = budget_for("block-sparse", 16384, 0.95, chunk_size=16)
    blocks, top = 1024, method.top_chunks
    chosen = top * (top + 1) / 2 + (blocks - top) * top
    assert 1 - chosen / (blocks * (blocks + 1) / 2) == pytest.approx(0.95, abs=0.002)


def test_unreachable_sparsities_are_refused_with_what_can_be_reached():
    with pytest.raises(SparsityError, match=r"block-sparse at 256 tokens comes no nearer to sparsity 0.95 than 0.8"):
        budget_for("block-sparse", 256, 0.95)
    with pytest.raises(SparsityError, match="vertical-slash"):
        budget_for("vertical-slash", 512, 0.99, local=64)


def test_layers_that_stay_dense_count(tiny_llama, prompts):
    with pytest.raises(SparsityError, match=r"double-sparsity at 512 tokens comes no nearer to sparsity 0.5 than 0.33"):
        budget_for("double-sparsity", LENGTH, 0.5, tiny_llama, [prompts])  # two of three layers stay dense


@pytest.mark.parametrize("name", ["flex-prefill", "xattention", "double-sparsity"])
def test_adaptive_methods_need_a_model_and_data(name):
    with pytest.raises(ConfigurationError, match="depends on the text"):
        budget_for(name, 512, 0.5)


def test_unknown_methods_and_lengths_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'quest'"):
        budget_for("quests", 512, 0.5)
    with pytest.raises(ConfigurationError, match="length is 8"):
        budget_for("quest", 8, 0.5)
    with pytest.raises(SparsityError):
        budget_for("quest", 512, 1.0)


def test_granularity_shrinks_with_short_prompts():
    assert [granularity(length, 64) for length in (128, 512, 1000, 4096, 100_000)] == [2, 8, 8, 64, 64]
