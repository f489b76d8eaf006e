from __future__ import annotations

import pytest

from gossamer.errors import ConfigurationError
from gossamer.kernels.native import available
from gossamer.structured import group_size
from gossamer.structured.group_size import choose_group_size

native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")
SHAPES = [(32, 16, 1, 1), (32, 16, 1, 1), (16, 8, 3, 3), (24, 20)]


def clock(seconds, calls=None):
    """A measurement that really runs each contender once, and then says what it is told."""

    def measure(runs):
        outputs = [run().shape for run in runs.values()]
        assert len(set(outputs)) == 1
        if calls is not None:
            calls.append(outputs[0])
        return {name: seconds[int(name)] for name in runs}

    return measure


@native_only
@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 1.0, 8: 1.0, 16: 1.0}, 4),
        ({4: 1.09, 8: 1.0, 16: 1.0}, 4),
        ({4: 1.2, 8: 1.05, 16: 1.0}, 8),
        ({4: 3.0, 8: 2.0, 16: 1.0}, 16),
    ],
)
def test_the_smallest_size_that_is_nearly_as_fast_is_chosen(seconds, chosen):
    assert choose_group_size(SHAPES, 0.5, side=6, measure=clock(seconds)) == chosen


@native_only
def test_layers_alike_are_measured_once_and_count_as_often_as_they_are():
    calls = []

    def measure(runs):
        first = not calls
        calls.append(next(iter(runs.values()))().shape)
        fast, slow = (1.0, 1.4) if first else (1.5, 1.0)  # the layer that is there twice favours four
        return {"4": fast, "8": slow, "16": 9.0}

    assert choose_group_size(SHAPES, 0.5, slack=0.0, side=6, measure=measure) == 8
    assert calls == [(1, 32, 6, 6), (1, 16, 6, 6), (1, 24, 6, 6)]
    calls.clear()
    assert choose_group_size([*SHAPES[:2], SHAPES[0], SHAPES[0]], 0.5, slack=0.0, side=6, measure=measure) == 4


def test_without_compiled_kernels_a_register_decides(monkeypatch):
    monkeypatch.setattr(group_size, "available", lambda: False)
    assert choose_group_size(SHAPES, 0.5) == 16


def test_a_negative_slack_is_refused():
    with pytest.raises(ConfigurationError, match="slack"):
        choose_group_size(SHAPES, 0.5, slack=-0.1)
