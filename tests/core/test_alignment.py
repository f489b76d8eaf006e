"""Widths that the hardware likes, at the total that was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.alignment import aligned_widths
from gossamer.core.selection import dropped_count
from gossamer.errors import ConfigurationError


def test_widths_round_to_the_nearest_multiple_and_the_closest_call_meets_the_total():
    # ideal 150, 170, 160 of 320: each rounds to 160 by itself
    sparsities = {"a": 1 - 150 / 320, "b": 1 - 170 / 320, "c": 0.5}
    assert aligned_widths(sparsities, dict.fromkeys("abc", 320), 0.5, 32) == {"a": 160, "b": 160, "c": 160}
    # ideal 140, 140, 140 of 320 are 420 together: 13 steps of 32 are nearest, so one layer goes up
    equal = dict.fromkeys("abc", 1 - 140 / 320)
    widths = aligned_widths(equal, dict.fromkeys("abc", 320), 1 - 420 / 960, 32)
    assert sorted(widths.values()) == [128, 128, 160]


def test_a_layer_keeps_one_step_at_least_and_all_it_has_at_most():
    widths = aligned_widths({"a": 0.99, "b": 0.0}, {"a": 256, "b": 300}, 0.4, 64)
    assert widths["a"] == 64
    assert widths["b"] <= 300
    assert aligned_widths({"a": 0.999}, {"a": 10}, 0.999, 4) == {"a": 4}


def test_a_width_that_is_no_multiple_can_stay_whole():
    assert aligned_widths({"a": 0.0}, {"a": 100}, 0.0, 32) == {"a": 100}


def test_a_layer_narrower_than_the_step_stays_whole():
    assert aligned_widths({"a": 0.5, "b": 0.5}, {"a": 24, "b": 256}, 0.5, 128) == {"a": 24, "b": 128}


def test_by_default_wide_layers_align_to_128_and_narrow_ones_do_not():
    assert aligned_widths({"a": 0.3}, {"a": 1536}, 0.3) == {"a": 1024}
    assert aligned_widths({"a": 0.3}, {"a": 99}, 0.3) == {"a": 70}


def test_a_step_wider_than_every_layer_is_refused_with_a_remedy():
    with pytest.raises(ConfigurationError, match=r"align is 128.*64 channels.*such as 8"):
        aligned_widths({"a": 0.5}, {"a": 64}, 0.5, 128)


layers = st.lists(st.tuples(st.integers(1, 400), st.floats(0, 0.999)), min_size=1, max_size=6)


@given(layers, st.floats(0, 0.95), st.sampled_from([1, 3, 8, 32]))
def test_total_is_met_within_half_a_step_unless_every_layer_is_at_its_limit(layers, sparsity, align):
    widths = {str(i): width for i, (width, _) in enumerate(layers)}
    if sparsity > 0 and all(width <= align for width in widths.values()):
        return
    result = aligned_widths({str(i): s for i, (_, s) in enumerate(layers)}, widths, sparsity, align)
    for name, width in result.items():
        assert min(align, widths[name]) <= width <= widths[name]
        assert width % align == 0 or width == widths[name]
    total = sum(widths.values())
    missing = total - dropped_count(total, sparsity) - sum(result.values())
    lowest = all(result[n] == min(align, widths[n]) for n in widths)
    highest = all(result[n] == widths[n] for n in widths)
    assert abs(missing) <= align / 2 or (missing < 0 and lowest) or (missing > 0 and highest)
