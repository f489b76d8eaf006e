"""Peak memory of a piece of code, and the two numbers that bound every kernel on this machine."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_PROCESS = Path("/proc/self")
# Measurements that are under way: resetting the kernel's mark for one must not lose it for the others.
_open: list[PeakMemory] = []


@dataclass
class PeakMemory:
    """Resident memory of this process around a block of code, in bytes; final once the block has ended.

    Attributes
    ----------
    before
        At the start of the block.
    peak
        Highest value during the block.
    exact
        True if the kernel kept the mark; False if memory was sampled, which can miss short peaks.
    """

    before: int
    peak: int
    exact: bool

    @property
    def increase(self) -> int:
        """How far the block rose above where it started."""
        return self.peak - self.before

    def _raise_to(self, value: int) -> None:
        self.peak = max(self.peak, value)


@contextmanager
def peak_memory(interval: float = 0.005) -> Iterator[PeakMemory]:
    """Measure the peak resident memory of a block of code.

    Linux keeps a high-water mark that can be reset; where it cannot, a thread samples the resident size.
    Blocks may be nested.

    Parameters
    ----------
    interval
        Seconds between two samples, where sampling is needed.

    Examples
    --------
    >>> with peak_memory() as peak:
    ...     buffer = bytearray(10_000_000)
    >>> peak.increase > 0
    True
    """
    resident = _resident()
    exact = _reset_high_water()
    measurement = PeakMemory(before=resident, peak=resident, exact=exact)
    _open.append(measurement)
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(measurement, stop, interval), daemon=True)
    if not exact:
        sampler.start()
    try:
        yield measurement
    finally:
        stop.set()
        if exact:
            measurement._raise_to(_high_water())
        else:
            sampler.join()
        measurement._raise_to(_resident())
        _open.remove(measurement)


def _sample(measurement: PeakMemory, stop: threading.Event, interval: float) -> None:
    process = psutil.Process()
    while not stop.wait(interval):
        measurement._raise_to(process.memory_info().rss)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark to the present size; return whether that is possible here."""
    try:
        reached = _high_water()
        (_PROCESS / "clear_refs").write_text("5")
    except (OSError, ValueError):
        return False
    for measurement in _open:
        measurement._raise_to(reached)
    return True


def _high_water() -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM in the process status")


def read_bandwidth(repeats: int = 7) -> float:
    """Return the measured memory read bandwidth of this machine, in bytes per second.

    Sums a buffer several times as large as the last-level cache with torch's current number of threads and
    takes the median. Measured once per process and number of threads.
    """
    return _read_bandwidth(torch.get_num_threads(), repeats)


@functools.cache
def _read_bandwidth(threads: int, repeats: int) -> float:
    size = max(256 * 2**20, 4 * last_level_cache())
    size = min(size, psutil.virtual_memory().available // 4)
    # Ones, not empty: untouched pages would all map to one page of zeros and stay in the cache.
    buffer = torch.ones(max(1, size // 4), dtype=torch.float32)
    return buffer.nbytes / _median_seconds(buffer.sum, repeats)


def peak_flops(repeats: int = 7, size: int = 1536) -> float:
    """Return the measured float32 matrix-multiplication rate of this machine, in operations per second.

    Multiplies two square matrices of `size` with torch's current number of threads and takes the median.
    Measured once per process, number of threads and size.
    """
    return _peak_flops(torch.get_num_threads(), repeats, size)


@functools.cache
def _peak_flops(threads: int, repeats: int, size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    out = torch.empty(size, size)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(left, right, out=out), repeats)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def last_level_cache() -> int:
    """Return the size of the largest cache of the first processor in bytes, or 64 MiB where it is not told."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes, default=0) or 64 * 2**20
