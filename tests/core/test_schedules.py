from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.schedules import (
    Cosine,
    Cubic,
    Exponential,
    Geometric,
    Ladder,
    Linear,
    OneShot,
    Sine,
    SineStages,
)
from gossamer.errors import ConfigurationError

ALL = (OneShot, Linear, Cubic, Cosine, Sine, Geometric, Ladder)


@pytest.mark.parametrize("kind", ALL)
@given(begin=st.integers(-5, 50), length=st.integers(1, 200), initial=st.floats(0, 0.5), final=st.floats(0.5, 1))
def test_a_schedule_rises_from_its_initial_to_exactly_its_final_value(kind, begin, length, initial, final):
    schedule = kind(final, begin + length, initial, begin)
    values = [schedule(step) for step in range(begin - 2, begin + length + 3)]
    assert values[:3] == [initial] * 3
    assert values[-3:] == [final] * 3
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("kind", ALL)
def test_the_default_is_one_step(kind):
    assert [kind(0.8)(step) for step in (0, 1)] == [0, 0.8]


def test_halfway_values_worked_by_hand():
    halfway = {kind: kind(0.8, 10)(5) for kind in ALL}
    assert halfway == {
        OneShot: pytest.approx(0.8),
        Linear: pytest.approx(0.4),
        Cubic: pytest.approx(0.8 * 7 / 8),
        Cosine: pytest.approx(0.4),
        Sine: pytest.approx(0.8 * math.sqrt(0.5)),
        Geometric: pytest.approx(1 - math.sqrt(0.2)),
        Ladder: pytest.approx(0.4),
    }


def test_one_shot_acts_at_the_first_step_after_its_beginning():
    schedule = OneShot(0.5, 10, begin=3)
    assert [schedule(step) for step in (3, 4, 10)] == [0, 0.5, 0.5]


@given(st.floats(0, 0.9), st.floats(0.9, 0.99), st.integers(2, 40))
def test_geometric_steps_remove_the_same_share_of_what_remains(initial, final, steps):
    schedule = Geometric(final, steps, initial)
    density = [1 - schedule(step) for step in range(steps + 1)]
    shares = [after / before for before, after in itertools.pairwise(density)]
    assert shares == pytest.approx([shares[0]] * steps, rel=1e-6)


@pytest.mark.parametrize("rungs", [1, 3, 10, 100])
def test_a_ladder_has_equal_rungs_and_reaches_each_on_time(rungs):
    schedule = Ladder(1.0, 100 * rungs, rungs=rungs)
    assert [schedule(100 * rung) for rung in range(rungs + 1)] == pytest.approx([r / rungs for r in range(rungs + 1)])
    assert len({schedule(step) for step in range(100 * rungs + 1)}) == rungs + 1


def test_a_ladder_of_as_many_rungs_as_steps_is_a_line():
    assert [Ladder(1.0, 100, rungs=100)(step) for step in range(101)] == pytest.approx([s / 100 for s in range(101)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(0.5, end=3, begin=3), "ends at step 3"),
        (lambda: Linear(float("nan")), "final is nan"),
        (lambda: Linear(0.5, initial=float("inf")), "initial is inf"),
        (lambda: Geometric(1.5), "at most 1"),
        (lambda: Ladder(0.5, rungs=0), "0 rungs"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_sine_stages_pass_the_points_of_the_paper():
    stages = SineStages((5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (6000, 10000, 12000, 16000, 16500), begin=5000)
    assert [stages(step) for step in (0, 5000, 5001, 6000)] == [0, 0, 5e-3, 5e-3]
    assert stages(8000) == pytest.approx((5e-3 + 5e-2) / 2)
    assert [stages(step) for step in (10000, 11000, 12000)] == pytest.approx([5e-2] * 3)
    assert stages(13000) == pytest.approx(5e-2 + 0.15 * (math.sin(-math.pi / 4) + 1) / 2)
    assert [stages(step) for step in (16000, 16500, 99999)] == pytest.approx([2e-1] * 3)
    values = [stages(step) for step in range(0, 17000, 50)]
    assert all(after >= before for before, after in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("peaks", "steps", "begin"),
    [
        ((), (), 0),
        ((1.0,), (2, 3), 0),
        ((2.0, 1.0), (2, 3), 0),
        ((1.0, 2.0), (3, 3), 0),
        ((1.0,), (3,), 3),
        ((-1.0,), (3,), 0),
    ],
)
def test_stages_that_fall_or_stand_still_are_refused(peaks, steps, begin):
    with pytest.raises(ConfigurationError):
        SineStages(peaks, steps, begin)


def test_an_exponential_schedule_has_equal_ratios():
    schedule = Exponential(final=1e-7, end=10, initial=1e-2)
    values = [schedule(step) for step in range(11)]
    assert values[0] == 1e-2
    assert values[-1] == 1e-7
    assert [b / a for a, b in itertools.pairwise(values)] == pytest.approx([10**-0.5] * 10)
    with pytest.raises(ConfigurationError, match="above 0"):
        Exponential(final=0.0)
