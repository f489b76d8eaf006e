"""Both choices one after the other."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import FeatureChoice, MutualChoice, competing
from gossamer.features.phased_choice import PhasedChoice
from gossamer.features.zipf import ZipfFit

TOKENS, FEATURES, K = 512, 60, 4


def affinities(seed):
    """Features that are as common as a law of Zipf says."""
    chance = ZipfFit(1.0, 2.0, 1.0).at(torch.arange(1, FEATURES + 1)).float()
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(TOKENS, FEATURES, generator=draw) < chance) * (1 + torch.rand(TOKENS, FEATURES, generator=draw))


def built(rule):
    rule.build(FEATURES)
    return rule.train()


def test_all_matches_compete_until_features_choose_by_the_law_that_was_found():
    rule, alone = built(PhasedChoice(K, switch_after=20)), built(MutualChoice(K))
    for seed in range(20):
        z = affinities(seed)
        assert rule.mask(z, None).equal(alone.mask(z, None))
        assert not rule.feature_phase
    z = affinities(20)
    found = rule.mask(z, None)
    assert rule.feature_phase
    assert float(rule.law[0]) == pytest.approx(1.0, abs=0.3)
    law = (float(rule.law[0]), float(rule.law[1]))
    chosen = built(FeatureChoice(K, law))
    chosen.density.copy_(rule.feature.density)
    chosen.rank_anew()
    budgets = chosen._budgets(TOKENS)
    counts = found.sum(0)
    assert bool((counts <= budgets + 1).all())
    assert int(counts.sum()) <= K * TOKENS


def test_afterwards_a_token_does_not_depend_on_its_batch_in_either_phase():
    for batches in (5, 30):
        rule = built(PhasedChoice(K, switch_after=20))
        for seed in range(batches):
            rule.mask(affinities(seed), None)
        rule.eval()
        z = affinities(99)
        assert rule.mask(z, None)[:7].equal(rule.mask(z[:7], None))
        assert rule.feature_phase == (batches > 20)


def test_the_phase_and_its_law_are_kept_with_the_weights():
    rule = built(PhasedChoice(K, switch_after=3))
    for seed in range(6):
        rule.mask(affinities(seed), None)
    again = built(PhasedChoice(K, switch_after=3))
    again.load_state_dict(rule.state_dict())
    z = affinities(50)
    assert again.mask(z, None).equal(rule.mask(z, None))
    assert again.settings() == rule.settings()


def test_competing_is_where_k_matches_of_a_token_begin():
    z = torch.rand(200, 50, generator=torch.Generator().manual_seed(0))
    assert float((z > competing(z, 5)).sum()) / 200 == pytest.approx(5, abs=0.05)
    assert competing(torch.zeros(4, 8), 2) == 0
    assert competing(torch.rand(4, 8), 8) == 0, "all of them"


def test_a_switch_before_the_first_batch_is_refused():
    with pytest.raises(ConfigurationError, match="switch_after is 0"):
        PhasedChoice(4, 0)
