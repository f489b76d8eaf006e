"""Independent pieces of work in this process, in several of this machine, or on a Ray cluster, with equal results.

What makes results equal is that every piece starts from its own seed and runs on the same number of threads wherever
it runs: sums that are split among threads are rounded differently.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from gossamer.errors import ConfigurationError, MissingDependencyError

Backend = Literal["processes", "ray"]


class Workers(Protocol):
    """What :func:`workers` gives."""

    def run(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the position of a piece and its result, as they are finished.

        Raises
        ------
        ConfigurationError
            If a piece cannot be sent to another process, or that process died.
        """


@contextmanager
def workers(n_jobs: int = 1, backend: Backend = "processes", threads: int = 1) -> Iterator[Workers]:
    """Start workers, and end them with the block.

    Parameters
    ----------
    n_jobs
        How many pieces run at a time. 1 runs them here, one after the other; −1 takes one a core.
    backend
        ``"processes"`` of this machine, freshly started so that no lock or thread of this one is inherited, or
        ``"ray"``: tasks on the cluster that Ray is connected to, or on a local one.
    threads
        Of torch in every worker, also when everything runs here.

    Raises
    ------
    ConfigurationError
        If a number or a name is out of range.
    MissingDependencyError
        If Ray is asked for and not installed.
    """
    if backend not in get_args(Backend):
        raise ConfigurationError(f"backend is {backend!r}; use {' or '.join(get_args(Backend))}")
    if threads < 1 or n_jobs < -1 or n_jobs == 0:
        raise ConfigurationError(
            f"n_jobs and threads are {n_jobs} and {threads}; both must be at least 1, or n_jobs −1 for every core"
        )
    if backend == "ray":
        yield _Ray(threads)
    elif n_jobs == 1:
        yield _Here(threads)
    else:
        pool = ProcessPoolExecutor(
            n_jobs if n_jobs > 0 else os.cpu_count(), _context(), torch.set_num_threads, (threads,)
        )
        try:
            yield _Processes(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _context() -> BaseContext:
    """How processes start: from one that has imported this package and done nothing else, where there can be such."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # importing takes seconds, which all workers together pay once
    return context


class _Here:
    def __init__(self, threads: int):
        self.threads = threads

    def run(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for position, piece in enumerate(pieces):
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                result = function(piece)
            finally:
                torch.set_num_threads(before)
            yield position, result


class _Processes:
    def __init__(self, pool: ProcessPoolExecutor):
        self.pool = pool

    def run(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        # bytes and not tensors: those would travel in shared memory, of which a container has little
        positions: dict[Future[bytes], int] = {
            self.pool.submit(_from_bytes, _to_bytes(function, piece)): position for position, piece in enumerate(pieces)
        }
        try:
            for future in as_completed(positions):
                yield positions[future], pickle.loads(future.result())
        except BrokenProcessPool as error:
            raise ConfigurationError(
                "a worker process ended without a result, perhaps for want of memory, or because the script that "
                "started it does so when it is imported; guard it with __name__ == '__main__', or lower n_jobs"
            ) from error
        finally:
            for future in positions:
                future.cancel()


class _Ray:
    def __init__(self, threads: int):
        try:
            import ray
        except ImportError:
            raise MissingDependencyError("ray", "cluster", "running branches on a cluster") from None
        self.ray, self.threads = ray, threads
        if not ray.is_initialized():
            ray.init(log_to_driver=False)

    def run(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        task = self.ray.remote(num_cpus=self.threads)(_with_threads)
        waiting = {task.remote(self.threads, _to_bytes(function, piece)): i for i, piece in enumerate(pieces)}
        while waiting:
            (finished, *_), _ = self.ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(finished), pickle.loads(self.ray.get(finished))


def _to_bytes(function: Callable[[Any], Any], piece: Any) -> bytes:
    try:
        return pickle.dumps((function, piece))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"the work cannot be sent to another process ({error}); define its functions at the top of a module, "
            f"or run it here with n_jobs=1"
        ) from error


def _from_bytes(sent: bytes) -> bytes:
    function, piece = pickle.loads(sent)
    return pickle.dumps(function(piece))


def _with_threads(threads: int, sent: bytes) -> bytes:
    torch.set_num_threads(threads)
    return _from_bytes(sent)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the generators of torch, numpy and Python from a seed; afterwards they go on where they were.

    Parameters
    ----------
    seed
        In [0, 2³²).
    """
    kept_numpy, kept_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - whatever others draw from
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(kept_numpy)  # noqa: NPY002
            random.setstate(kept_python)
