from __future__ import annotations

import math

import pytest
import torch

from gossamer.core.masks import MaskSet
from gossamer.core.retraining_rates import pruning_distortion, retraining_rates
from gossamer.errors import ConfigurationError, TargetError

ORIGINAL = [0.0, 0.4] + [0.4] * 3 + [0.2] * 3 + [0.1, 0.04]  # two steps of warm-up, then stairs


def rates(schedule, steps=10, **options):
    return retraining_rates(schedule, ORIGINAL, steps, original_warm_up=2, **options)


def test_fine_tuning_goes_on_with_the_lowest_rate_and_rewinding_repeats_the_end():
    assert rates("ft", 3) == [0.04] * 3
    assert rates("lrw", 3) == [0.2, 0.1, 0.04]
    assert rates("lrw", 10) == ORIGINAL


def test_the_linear_schedule_rises_for_a_tenth_and_falls_to_zero():
    found = rates("llr", 20)
    assert found[0] == 0
    assert found[1] == pytest.approx(0.2)
    assert found[2] == 0.4
    assert found[11] == pytest.approx(0.2)
    assert found[-1] == pytest.approx(0.4 / 18)
    assert rates("llr", 4, warm_up=0) == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_cyclic_schedule_goes_down_a_cosine_to_the_lowest_rate():
    found = rates("clr", 4, warm_up=0)
    assert found == pytest.approx([0.04 + 0.36 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def test_scaled_restarting_repeats_everything_in_less_time_without_its_warm_up():
    assert rates("slr", 5, warm_up=0) == [0.4, 0.4, 0.4, 0.2, 0.1]
    assert rates("slr", 10, warm_up=0) == [0.4] * 5 + [0.2] * 3 + [0.1, 0.04]


@pytest.mark.parametrize(
    ("distortion", "steps", "start"), [(0.25, 1, 0.1), (0.25, 6, 0.24), (0.9, 6, 0.36), (7, 2, 0.4)]
)
def test_the_adaptive_schedule_starts_as_high_as_the_damage_or_the_time_allows(distortion, steps, start):
    assert rates("allr", steps, distortion=distortion, warm_up=0)[0] == pytest.approx(start)


def test_a_peak_takes_the_place_of_the_highest_rate():
    assert max(rates("llr", 20, peak=1.0)) == 1
    assert max(rates("lrw", 3, peak=1.0)) == 1
    assert rates("ft", 2, peak=0.5) == [0.5, 0.5]


def test_distortion_worked_by_hand():
    before = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "bias": torch.tensor([100.0])}
    masks = MaskSet({"w": torch.tensor([[False, True], [True, True]])})
    assert pruning_distortion(before, masks, 0.25) == pytest.approx(3 / 5 / 0.5)
    nothing = MaskSet({"w": torch.tensor([[True, False], [False, True]])})
    assert pruning_distortion(before, nothing, 0.5) == 0


def test_distortion_is_one_for_a_mask_that_knows_nothing_and_less_for_magnitude():
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    blind = torch.rand(400, 400, generator=torch.Generator().manual_seed(1)) >= 0.3
    lowest = weight.abs() > weight.abs().flatten().kthvalue(48_000).values
    assert pruning_distortion({"w": weight}, MaskSet({"w": blind}), 0.3) == pytest.approx(1, abs=0.02)
    assert pruning_distortion({"w": weight}, MaskSet({"w": lowest}), 0.3) < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "llrr"}, "schedule is 'llrr'"),
        ({"schedule": "lrw", "steps": 11}, "cannot be rewound"),
        ({"schedule": "allr"}, "distortion is None"),
        ({"schedule": "llr", "steps": 0}, "steps, warm_up"),
        ({"schedule": "llr", "warm_up": 1.0}, "steps, warm_up"),
        ({"schedule": "llr", "peak": 0.0}, "peak is"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        rates(**{"steps": 5, **options})


def test_an_empty_original_and_foreign_masks_are_refused():
    with pytest.raises(ConfigurationError, match="original must hold"):
        retraining_rates("llr", [], 5)
    with pytest.raises(TargetError, match="no weight 'x'"):
        pruning_distortion({}, MaskSet({"x": torch.ones(2, dtype=torch.bool)}), 0.5)
    with pytest.raises(ConfigurationError, match="share is 0"):
        pruning_distortion({}, MaskSet(), 0)
