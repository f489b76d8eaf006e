"""Families of features and roles of heads, on attention whose pattern is written down."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import CalibrationError
from gossamer.features.activation_rules import ReLU, TopK
from gossamer.features.attention_sae import AttentionSAE
from gossamer.features.attention_trace import AttentionTrace
from gossamer.features.head_survey import (
    FamilyRules,
    HeadSurvey,
    after_repeats,
    feature_family,
    survey_heads,
)


def identity(heads, size):
    """Feature i is number i of z."""
    sae = AttentionSAE(heads, size, heads * size, ReLU()).eval()
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(heads * size))
        sae.decoder.copy_(torch.eye(heads * size))
    return sae


def reading(sources, tokens):
    """One head whose last token reads these tokens alike; every value is 1."""
    length = len(tokens)
    pattern = torch.zeros(1, length, length)
    pattern[0, -1, list(sources)] = 1 / len(sources)
    return AttentionTrace(0, torch.tensor(tokens), pattern, torch.ones(1, length, 1))


@pytest.mark.parametrize(
    ("sources", "family"),
    [
        ([6], "induction"),  # behind the 5 at place 5
        ([78, 79, 75], "local"),
        ([10, 20], "long-range"),
        ([45, 50, 55], "other"),
        (range(8, 80), "long-range"),
    ],
)
def test_families_by_where_attribution_comes_from(sources, family):
    tokens = list(range(100, 180))
    tokens[5] = tokens[-1] = 5
    trace = reading(list(sources), tokens)
    found = feature_family(identity(1, 1), [trace], [(0, 79)], 0)
    assert found.family == family
    assert found.examples == 1
    if family == "induction":
        assert found.induction == pytest.approx(1)
        assert found.by_chance == pytest.approx(1 / 79)


def test_the_first_token_counts_apart_and_rules_can_change():
    trace = reading([0, 75], list(range(80)))
    found = feature_family(identity(1, 1), [trace], [(0, 79)], 0)
    assert found.from_first == pytest.approx(0.5)
    assert found.local == pytest.approx(1)
    assert found.spread == 1
    assert feature_family(identity(1, 1), [trace], [(0, 79)], 0, FamilyRules(local_reach=3)).family == "other"
    assert feature_family(identity(1, 1), [trace], [], 0).family == "silent"


def test_tokens_behind_an_earlier_occurrence():
    tokens = torch.tensor([3, 1, 3, 4, 3])
    assert after_repeats(tokens, 4).tolist() == [False, True, False, True, False]
    assert after_repeats(tokens, 2).tolist() == [False, True, False, False, False]
    assert not after_repeats(tokens, 3).any()


def test_heads_with_labels_of_two_kinds_do_several_things():
    labels = [["local", "local"], ["local", "induction"], ["local", "other"], ["local", "local", "induction"]]
    survey = HeadSurvey(torch.zeros(4, 2), torch.zeros(4, 2), {}, labels)
    assert survey.polysemantic() == [False, True, False, True]
    assert survey.polysemantic(at_least=2) == [False, False, False, False]
    assert "head 1   several" in survey.table()


def test_a_survey_takes_the_features_of_the_largest_share_that_are_alive(tiny_llama, batches):
    documents = [row for batch in batches for row in batch]
    sae = AttentionSAE(4, 12, 40, TopK(6), seed=1).eval()
    survey = survey_heads(tiny_llama, sae, 1, documents, count=5, labels={0: "mine"})
    assert survey.features.shape == (4, 5)
    assert bool((survey.shares.diff(dim=1) <= 0).all())
    assert set(survey.families) == set(survey.features.flatten().tolist())
    assert all(family.examples for family in survey.families.values())
    for row, labels in zip(survey.features.tolist(), survey.labels):
        expected = ["mine" if feature == 0 else survey.families[feature].family for feature in row]
        assert labels == expected
    with pytest.raises(CalibrationError, match="no document"):
        survey_heads(tiny_llama, sae, 1, [])
    with pytest.raises(CalibrationError, match="more text"):
        survey_heads(tiny_llama, sae, 1, documents, count=41)
