from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gossamer.measure import memory, peak_flops, peak_memory, read_bandwidth

MIB = 2**20


@contextmanager
def touched(mebibytes: int) -> Iterator[None]:
    """Memory of the system's own that is in use for a while: what malloc gives may have been resident before."""
    with mmap.mmap(-1, mebibytes * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        yield


def linux_only() -> None:
    if not memory._reset_high_water():
        pytest.skip("this system keeps no high-water mark that can be reset")


def test_memory_that_was_freed_before_the_end_is_seen():
    linux_only()
    with peak_memory() as peak, touched(64):
        pass
    assert peak.exact
    assert 60 * MIB <= peak.increase <= 80 * MIB


def test_earlier_peaks_do_not_count():
    linux_only()
    with touched(128):
        pass
    with peak_memory() as peak, touched(16):
        pass
    assert peak.increase <= 40 * MIB


def test_an_inner_measurement_does_not_hide_the_outer_peak():
    linux_only()
    with peak_memory() as outer:
        with touched(96):
            pass
        with peak_memory() as inner, touched(16):
            pass
    assert outer.increase >= 90 * MIB
    assert inner.increase <= 40 * MIB


def test_sampling_takes_over_where_the_kernel_keeps_no_mark(monkeypatch):
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    with peak_memory(interval=0.001) as peak, touched(64):
        time.sleep(0.2)
    assert not peak.exact
    assert peak.increase >= 60 * MIB


def test_a_failing_block_still_reports_and_closes():
    with pytest.raises(RuntimeError, match="stop"), peak_memory() as peak:
        raise RuntimeError("stop")
    assert peak.peak >= peak.before
    assert not memory._open


def test_bandwidth_and_peak_are_measured_once(monkeypatch):
    monkeypatch.setattr(memory, "last_level_cache", lambda: MIB)
    memory._read_bandwidth.cache_clear()
    memory._peak_flops.cache_clear()
    first = read_bandwidth(repeats=1), peak_flops(repeats=1, size=64)
    assert min(first) > 0
    assert (read_bandwidth(repeats=1), peak_flops(repeats=1, size=64)) == first
    memory._read_bandwidth.cache_clear()
    memory._peak_flops.cache_clear()


def test_the_last_level_cache_has_a_plausible_size():
    assert 2**16 <= memory.last_level_cache() <= 2**34
