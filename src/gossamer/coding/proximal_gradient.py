"""Proximal gradient steps on many signals at a time: what all solvers of sparse codes share.

Signals are worked on a chunk at a time, so that codes stay in the processor's cache between steps, and each leaves
when it is done. What "done" means is for the caller to say: that codes hardly move, or that a duality gap has closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.prox import Penalty
from gossamer.errors import ConfigurationError, NonFiniteError

Acceleration = Literal["auto", "none", "restart", "monotone"]
Done = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(signals, codes before a step, codes after it)`` → which are done, bool ``(signals,)``."""

_SAFETY = 0.99
_CHUNK_ENTRIES = 1 << 19  # codes that are worked on at a time: they stay in the second-level cache
_CHECK_EVERY = 10
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class SparseSolution:
    """Codes, and how they were arrived at.

    Attributes
    ----------
    codes
        ``(signals, atoms)``.
    converged
        Which signals met the condition to stop, bool ``(signals,)``.
    n_iter
        Steps of the signal that took most.
    history
        Mean objective before every step and after the last, if it was monitored.
    worst_rise
        Largest rise of any signal's objective in a step, relative to its objective at the start; 0 means that none
        ever rose. Only if it was monitored, without continuation.
    """

    codes: Tensor
    converged: Tensor
    n_iter: int
    history: list[float] = field(default_factory=list)
    worst_rise: float = 0.0


def lipschitz(dictionary: Tensor) -> float:
    """The square of the largest singular value: how fast the gradient of the error can change."""
    smaller = dictionary if len(dictionary) <= dictionary.shape[1] else dictionary.t()
    return float(torch.linalg.eigvalsh((smaller @ smaller.t()).double())[-1])


def objective(x: Tensor, dictionary: Tensor, codes: Tensor, penalty: Penalty) -> Tensor:
    """``½ ‖y − Σ aⱼ φⱼ‖² + Σ R(aⱼ)`` of every signal, ``(signals,)``."""
    return (x - codes @ dictionary).square().sum(1) / 2 + penalty.value(codes).sum(1)


def check_problem(x: Tensor, dictionary: Tensor) -> None:
    """Refuse signals and atoms that do not fit together.

    Raises
    ------
    ConfigurationError
        If shapes do not fit.
    NonFiniteError
        If one holds NaN or infinity.
    """
    if x.dim() != 2 or dictionary.dim() != 2 or x.shape[1] != dictionary.shape[1] or not len(dictionary):
        raise ConfigurationError(
            f"x is {tuple(x.shape)}, the dictionary {tuple(dictionary.shape)}; give (signals, size) and (atoms, size)"
        )
    for name, rows in (("signal", x), ("atom", dictionary)):
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
            raise NonFiniteError(f"{name} {bad} holds NaN or infinity; leave it out or repair it")


def still(tolerance: float) -> Done:
    """Done when no code of a signal moved by more than this share of its largest; never if it is 0."""

    def done(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        if tolerance == 0:
            return torch.zeros(len(after), dtype=torch.bool, device=after.device)
        return (after - before).abs().amax(1) <= tolerance * after.abs().amax(1)

    return done


class ProximalGradient:
    """Proximal gradient steps for one penalty on one dictionary.

    Parameters
    ----------
    dictionary
        ``(atoms, size)``.
    penalty
        What codes cost.
    done
        When a signal leaves; asked every ten steps.
    max_iter
        Steps at most.
    step
        γ; by default 0.99 over :func:`lipschitz`.

    Raises
    ------
    ConfigurationError
        If the step is not above 0.
    """

    def __init__(
        self, dictionary: Tensor, penalty: Penalty, done: Done, max_iter: int = 200, step: float | None = None
    ):
        self.dictionary, self.penalty, self.done, self.max_iter = dictionary, penalty, done, max_iter
        self.step = _SAFETY / max(lipschitz(dictionary), _TINY) if step is None else step
        if not 0 < self.step < math.inf:
            raise ConfigurationError(f"step is {step}; it must be above 0")
        self._forward = _Forward(dictionary, self.step)

    def solve(
        self, x: Tensor, start: Tensor, acceleration: Acceleration = "auto", monitor: bool = False
    ) -> SparseSolution:
        """Codes of signals, from given ones; see :func:`gossamer.coding.thresholding.iterative_thresholding`."""
        kind = self._kind(acceleration)
        rows = max(64, _CHUNK_ENTRIES // len(self.dictionary))
        parts = [self._chunk(x[i : i + rows], start[i : i + rows], kind, monitor) for i in range(0, len(x), rows)]
        if not parts:
            return SparseSolution(start, torch.zeros(0, dtype=torch.bool, device=x.device), 0)
        return SparseSolution(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.converged for part in parts]),
            max(part.n_iter for part in parts),
            _mean_history(parts) if monitor else [],
            max(part.worst_rise for part in parts),
        )

    def _kind(self, acceleration: Acceleration) -> Acceleration:
        if acceleration not in get_args(Acceleration):
            raise ConfigurationError(
                f"acceleration is {acceleration!r}; use one of {', '.join(get_args(Acceleration))}"
            )
        if acceleration == "restart" and not self.penalty.convex:
            raise ConfigurationError(
                f"{type(self.penalty).__name__} is not convex, Nesterov's steps need not descend; "
                f"use acceleration='monotone'"
            )
        if acceleration == "auto":
            return "restart" if self.penalty.convex else "none"
        return acceleration

    def _chunk(self, x: Tensor, start: Tensor, kind: Acceleration, monitor: bool) -> SparseSolution:
        codes, converged = start.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        left = torch.arange(len(x), device=x.device)
        state = _State(x, self._forward.of(x), start, start, x.new_ones(len(x), 1))
        watch = _Monitor(self, x, codes) if monitor else None
        steps = 0
        while steps < self.max_iter and len(left):
            before = state.codes
            self._advance(state, kind)
            steps += 1
            if watch is not None:
                codes[left] = state.codes
                watch.see(codes)
            if steps % _CHECK_EVERY == 0 or steps == self.max_iter:
                codes[left] = state.codes
                finished = self.done(state.x, before, state.codes)
                converged[left[finished]] = True
                if bool(finished.any()):
                    left = left[~finished]
                    state.keep(~finished)
        return SparseSolution(codes, converged, steps, watch.history if watch else [], watch.rise if watch else 0.0)

    def _advance(self, state: _State, kind: Acceleration) -> None:
        found = self.penalty.prox(state.forward(state.ahead), self.step)
        if kind == "none":
            state.codes = state.ahead = found
            return
        moved = found - state.codes
        against = ((state.ahead - found) * moved).sum(1, keepdim=True) > 0
        if kind == "monotone":
            plain = self.penalty.prox(state.forward(state.codes), self.step)
            worse = self._objective(state.x, found) > self._objective(state.x, plain)
            found = torch.where(worse[:, None], plain, found)
            moved = found - state.codes
            against |= worse[:, None]
        momentum = torch.where(against, 1.0, state.momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        state.ahead = torch.addcmul(found, (momentum - 1) / following, moved)
        state.codes, state.momentum = found, following

    def _objective(self, x: Tensor, codes: Tensor) -> Tensor:
        return objective(x, self.dictionary, codes, self.penalty)


def _mean_history(parts: list[SparseSolution]) -> list[float]:
    """Of all signals, those that were done keep their last value."""
    longest = max(len(part.history) for part in parts)
    padded = [part.history + part.history[-1:] * (longest - len(part.history)) for part in parts]
    sizes = [len(part.codes) for part in parts]
    return [sum(n * value for n, value in zip(sizes, values)) / sum(sizes) for values in zip(*padded)]


class _Forward:
    """The gradient step ``a + γ (x − aΦ) Φᵀ``, through the products of atoms where that is less work."""

    def __init__(self, dictionary: Tensor, step: float):
        self.dictionary, self.step = dictionary, step
        self.kept: Tensor | None = None
        if len(dictionary) <= 2 * dictionary.shape[1]:
            self.kept = dictionary @ dictionary.t() * -step
            self.kept.diagonal().add_(1)

    def of(self, x: Tensor) -> _ForwardOf:
        """Of these signals."""
        return _ForwardOf(self, x, x @ self.dictionary.t() * self.step if self.kept is not None else None)


@dataclass(frozen=True, eq=False)
class _ForwardOf:
    shared: _Forward
    x: Tensor
    drive: Tensor | None

    def __call__(self, codes: Tensor) -> Tensor:
        if self.drive is not None:
            return torch.addmm(self.drive, codes, self.shared.kept)
        residual = torch.addmm(self.x, codes, self.shared.dictionary, alpha=-1)
        return torch.addmm(codes, residual, self.shared.dictionary.t(), alpha=self.shared.step)

    def keep(self, rows: Tensor) -> _ForwardOf:
        return _ForwardOf(self.shared, self.x[rows], None if self.drive is None else self.drive[rows])


@dataclass(eq=False)
class _State:
    """Signals that are not done: their codes, the point ahead of them, and the momentum of each."""

    x: Tensor
    forward: _ForwardOf
    codes: Tensor
    ahead: Tensor
    momentum: Tensor

    def keep(self, rows: Tensor) -> None:
        self.x, self.forward = self.x[rows], self.forward.keep(rows)
        self.codes, self.ahead, self.momentum = self.codes[rows], self.ahead[rows], self.momentum[rows]


class _Monitor:
    """Watches whether the objective of any signal rises."""

    def __init__(self, solver: ProximalGradient, x: Tensor, codes: Tensor):
        self.solver, self.x = solver, x
        self.last = solver._objective(x, codes)
        self.scale = self.last.clamp(min=_TINY)
        self.history, self.rise = [float(self.last.mean())], 0.0

    def see(self, codes: Tensor) -> None:
        now = self.solver._objective(self.x, codes)
        self.rise = max(self.rise, float(((now - self.last) / self.scale).max()))
        self.last = now
        self.history.append(float(now.mean()))
