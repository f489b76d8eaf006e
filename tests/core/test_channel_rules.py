import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.channel_rules import (
    ChannelRule,
    Elbow,
    Everything,
    GroupTopK,
    Threshold,
    TopK,
    column_norms,
    farthest_from_chord,
    union_over_chunks,
)
from gossamer.errors import ConfigurationError, ModelError, SparsityError


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_top_k_keeps_exactly_k_and_the_largest(width, tokens, seed, data):
    keep = data.draw(st.integers(1, width))
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    live = ChannelRule(TopK(keep)).live(x)
    assert (live.sum(1) == keep).all()
    kept, dropped = x.abs().masked_fill(~live, torch.inf), x.abs().masked_fill(live, -torch.inf)
    assert (kept.min(1).values >= dropped.max(1).values).all()


def test_top_k_of_equal_scores_still_keeps_exactly_k():
    assert TopK(2).live(torch.ones(3, 5)).sum(1).tolist() == [2, 2, 2]


def test_a_threshold_is_strict_and_lets_nan_through():
    x = torch.tensor([[0.5, -0.5, 0.50001, -2.0, float("nan"), 0.0]])
    assert ChannelRule(Threshold(0.5)).live(x).tolist() == [[False, False, True, True, True, False]]


def test_thresholds_for_kernels_select_what_the_rule_selects():
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 0
    rule = ChannelRule(Threshold(0.8), column_norms(weight))
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x.abs() > rule.thresholds(9), rule.live(x))
    assert torch.isinf(rule.thresholds(9)[3])
    assert (ChannelRule(Everything()).thresholds(4) == -1).all()
    assert ChannelRule(TopK(1)).thresholds(4) is None


def test_group_top_k_counts_in_every_group():
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    assert (GroupTopK(1, 4).live(x.abs()).view(4, 3, 4).sum(2) == 1).all()
    with pytest.raises(ConfigurationError, match="groups of 5 do not divide 12"):
        GroupTopK(1, 5).live(x)


def test_the_elbow_separates_what_is_large_from_a_flat_rest():
    scores = torch.tensor([[1.0, 50.0, 1.1, 0.9, 60.0, 1.0, 1.05, 0.95]])
    assert Elbow().live(scores).nonzero()[:, 1].tolist() == [1, 4]


def test_the_elbow_of_equal_scores_keeps_all_of_them():
    assert Elbow().live(torch.full((2, 5), 3.0)).all()


def test_the_farthest_point_agrees_with_the_distance_to_the_line_by_brute_force():
    values = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values.flip(1)
    steps = torch.arange(30, dtype=torch.float64)
    slope = (values[:, -1] - values[:, 0]) / 29
    distance = (slope[:, None] * steps - values + values[:, :1]).abs() / (slope[:, None] ** 2 + 1).sqrt()
    assert torch.equal(farthest_from_chord(values), distance.argmax(1))


def test_the_union_over_a_chunk_is_what_any_of_its_tokens_needs():
    live = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    found = union_over_chunks(live, 2)
    assert found.tolist() == [[True, True, False]] * 2 + [[False, False, True]] * 2 + [[True, False, False]]


def test_bad_rules_are_refused():
    with pytest.raises(SparsityError, match="keep is 6, but there are only 5"):
        TopK(6).live(torch.ones(1, 5))
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigurationError, match="keep is"):
            TopK(wrong)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="threshold is"):
            Threshold(wrong)
    with pytest.raises(ModelError, match="3 channels, the input has 4"):
        ChannelRule(TopK(1), torch.ones(3)).live(torch.ones(1, 4))
    with pytest.raises(ConfigurationError, match="chunk is 0"):
        union_over_chunks(torch.ones(2, 2, dtype=torch.bool), 0)
