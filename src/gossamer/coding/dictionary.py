"""Dictionary learning: atoms with which signals of a kind have sparse codes.

Codes of a batch are found under a penalty, then atoms move to explain the batch better, and so on
[Olshausen & Field, 1997]. Penalties that do not shrink what they keep give each atom the amplitude it needs; the l1
norm, which shrinks, has to spend more atoms for the same error. The weight of the penalty can be steered to a number of
non-zeros, so that penalties are compared at equal sparsity and not at equal weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gossamer.coding.proximal_gradient import check_problem
from gossamer.coding.thresholding import fitted_penalty, iterative_thresholding, lam_for_l0
from gossamer.core.prox import PENALTIES
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, UnknownNameError

Update = Literal["online", "gradient", "mod"]
Progress = Callable[[Iterable[Any], str], Iterator[Any]]

_SAMPLE = 512  # signals from which the first weight is found
_STEERING = 0.3  # by how much of the miss, in logarithms, the weight follows the count
_RIDGE = 1e-6


def _silent(items: Iterable[Any], _: str) -> Iterator[Any]:
    return iter(items)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Atoms that were learnt.

    Attributes
    ----------
    atoms
        ``(atoms, size)``, each of length one.
    lam
        The weight of the penalty at the end.
    error
        Mean squared error of a signal over its mean square, of each batch before atoms moved.
    counts
        Mean non-zeros of each batch.
    replaced
        How many atoms were drawn anew, as nothing used them.
    """

    atoms: Tensor
    lam: float
    error: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    replaced: int = 0


@dataclass(frozen=True)
class DictionaryLearning:
    """How a dictionary is learnt.

    Attributes
    ----------
    n_components
        Atoms.
    penalty
        One of :data:`gossamer.core.prox.PENALTIES`.
    lam, target_l0
        Its weight, or in its place how many codes of a signal are to be other than zero in the mean; the weight then
        follows the counts of batches.
    epochs, batch_size
        How often signals are gone through, and how many at a time.
    coding_iter
        Steps of thresholding for the codes of a batch.
    update
        ``"online"``: block-coordinate descent on what all batches so far have in common, of which each counts less
        the older it is [Mairal et al., 2010]. ``"gradient"``: ``Φ ← Φ + η (y − Φa) aᵀ``, averaged over the batch
        [Olshausen & Field, 1997]. ``"mod"``: least squares for the codes of a batch [Engan et al., 1999].
    rate
        η of ``"gradient"``.
    forget
        What counts of the past with each batch of ``"online"``.
    warm_up
        Share of batches, at the beginning, that are coded with soft thresholds: hard ones let atoms die early.
    least_use
        An atom is drawn anew when in an epoch, or 20 batches if that is more, it was used by less than this share of
        its fair share, ``mean count / n_components``.
    parameters
        Of the penalty, besides its weight.
    seed
        Of the first atoms and the order of signals.
    """

    n_components: int
    penalty: str = "cel0"
    lam: float | None = None
    target_l0: float | None = None
    epochs: int = 10
    batch_size: int = 512
    coding_iter: int = 50
    update: Update = "online"
    rate: float = 1.0
    forget: float = 0.98
    warm_up: float = 0.1
    least_use: float = 0.01
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UnknownNameError("penalty", self.penalty, PENALTIES)
        if self.update not in get_args(Update):
            raise ConfigurationError(f"update is {self.update!r}; use one of {', '.join(get_args(Update))}")
        if self.penalty == "k-sparse":
            if "k" not in self.parameters or self.lam is not None or self.target_l0 is not None:
                raise ConfigurationError("k-sparse takes parameters={'k': …}, and neither lam nor target_l0")
        elif (self.lam is None) == (self.target_l0 is None):
            raise ConfigurationError(f"lam is {self.lam} and target_l0 {self.target_l0}; give one of the two")
        for name in ("n_components", "epochs", "batch_size", "coding_iter"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("forget", "warm_up", "least_use"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not self.rate > 0:
            raise ConfigurationError(f"rate is {self.rate}; it must be above 0")

    def fit(self, x: Tensor, start: Tensor | None = None, progress: Progress = _silent) -> Dictionary:
        """Learn from signals.

        Parameters
        ----------
        x
            ``(signals, size)``.
        start
            First atoms, ``(n_components, size)``; signals drawn at random, with a little noise, by default.
        progress
            Called with batches and a description, as :func:`gossamer.core.progress.track`.

        Raises
        ------
        ConfigurationError
            If shapes do not fit, or there is no signal but zero.
        NonFiniteError
            If a signal holds NaN or infinity.
        """
        return Learning(self, x, start).run(progress)


class Learning:
    """Atoms that are being learnt, what codes had in common with them so far, and the weight.

    Parameters
    ----------
    how
        Settings.
    x, start
        As in :meth:`DictionaryLearning.fit`; to go on with other signals, see :meth:`more`.
    """

    def __init__(self, how: DictionaryLearning, x: Tensor, start: Tensor | None):
        self.how, self.x = how, x
        self.generator = generator_for("dictionary learning", how.seed)
        if x.dim() != 2 or not len(x) or not bool((x != 0).any()):
            raise ConfigurationError(f"x is {tuple(x.shape)}; give (signals, size), of which some are not zero")
        size = (how.n_components, x.shape[1])
        if start is not None and start.shape != size:
            raise ConfigurationError(f"start is {tuple(start.shape)}; give {size}, the atoms")
        self.atoms = self._drawn() if start is None else unit_rows(start)
        check_problem(x, self.atoms)
        self.of_codes = x.new_zeros(how.n_components, how.n_components)
        self.of_signals = torch.zeros_like(self.atoms)
        self.use = x.new_zeros(how.n_components)
        self.coded, self.replaced = 0.0, 0
        self.kind, self.lam = how.penalty, 0.0
        self.error: list[float] = []
        self.counts: list[float] = []

    @torch.no_grad()
    def run(self, progress: Progress = _silent) -> Dictionary:
        """All epochs, soft thresholds first."""
        batches = [batch for _ in range(self.how.epochs) for batch in self._order()]
        soft = math.ceil(self.how.warm_up * len(batches))
        patience = max(20, math.ceil(len(self.x) / self.how.batch_size))
        for step, batch in enumerate(progress(batches, "learning atoms")):
            kind = "l1" if step < soft else self.how.penalty
            if step == 0 or kind != self.kind:
                self._code_with(kind)
            self._step(self.x[batch])
            if (step + 1) % patience == 0 and step + 1 < len(batches):
                self._replace(self.x[batch])
        return self.result()

    @torch.no_grad()
    def more(self, x: Tensor) -> Dictionary:
        """One pass over further signals ``(signals, size)``, without soft thresholds and without atoms anew."""
        check_problem(x, self.atoms)
        self.x = x
        if not self.error:
            self._code_with(self.how.penalty)
        for batch in self._order():
            self._step(x[batch])
        return self.result()

    def result(self) -> Dictionary:
        """What was learnt so far."""
        return Dictionary(self.atoms.clone(), self.lam, self.error, self.counts, self.replaced)

    def _code_with(self, kind: str) -> None:
        self.kind = kind
        self.lam = self._weight()

    def _step(self, y: Tensor) -> None:
        codes = self._encode(y)
        residual = y - codes @ self.atoms
        self.error.append(float(residual.square().sum() / y.square().sum().clamp(min=1e-30)))
        self.counts.append(float((codes != 0).sum(1, dtype=torch.float64).mean()))
        self._steer(self.counts[-1])
        self.use += (codes != 0).sum(0)
        self.coded += self.counts[-1] * len(y)
        getattr(self, f"_{self.how.update}")(y, codes, residual)

    def _encode(self, y: Tensor) -> Tensor:
        own = self.how.parameters if self.kind == self.how.penalty else {}
        one = fitted_penalty(self.kind, self.lam, self.atoms, own)
        return iterative_thresholding(y, self.atoms, one, max_iter=self.how.coding_iter, tolerance=1e-3).codes

    def _online(self, y: Tensor, codes: Tensor, residual: Tensor) -> None:
        self.of_codes.mul_(self.how.forget).addmm_(codes.t(), codes)
        self.of_signals.mul_(self.how.forget).addmm_(codes.t(), y)
        energy = self.of_codes.diagonal()
        for j in (energy > 1e-10).nonzero().flatten().tolist():
            better = self.atoms[j] + (self.of_signals[j] - self.of_codes[j] @ self.atoms) / energy[j]
            length = float(better.norm())
            if length > 0:
                self.atoms[j] = better / length

    def _gradient(self, y: Tensor, codes: Tensor, residual: Tensor) -> None:
        self.atoms = unit_rows(self.atoms + self.how.rate * (codes.t() @ residual) / len(y))

    def _mod(self, y: Tensor, codes: Tensor, residual: Tensor) -> None:
        gram = (codes.t() @ codes).double()
        # towards the old atoms, where codes say little or nothing
        ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30)
        gram.diagonal().add_(ridge)
        right = (codes.t() @ y).double() + ridge * self.atoms.double()
        self.atoms = unit_rows(torch.linalg.solve(gram, right).to(y.dtype))

    def _steer(self, count: float) -> None:
        if self.how.target_l0 is not None:
            self.lam *= (max(count, 0.1) / self.how.target_l0) ** (_STEERING * (1 if self.kind == "l1" else 2))

    def _weight(self) -> float:
        """λ for what is coded with now; the warm-up has the sparsity of what comes after it."""
        sample = self.x[torch.randperm(len(self.x), generator=self.generator)[:_SAMPLE]]
        options = {"max_iter": self.how.coding_iter, "rounds": 8}
        if self.kind == "k-sparse":
            return 0.0
        if self.kind == self.how.penalty:
            if self.how.lam is not None:
                return self.how.lam
            return lam_for_l0(
                sample, self.atoms, self.kind, self.how.target_l0, parameters=self.how.parameters, **options
            )
        target = self.how.target_l0
        if target is None:
            target = float(self.how.parameters.get("k", 0)) or self._count_under_own(sample)
        return lam_for_l0(sample, self.atoms, "l1", min(max(target, 0.1), self.how.n_components - 0.5), **options)

    def _count_under_own(self, sample: Tensor) -> float:
        one = fitted_penalty(self.how.penalty, float(self.how.lam or 0), self.atoms, self.how.parameters)
        codes = iterative_thresholding(sample, self.atoms, one, max_iter=self.how.coding_iter).codes
        return float((codes != 0).sum(1, dtype=torch.float64).mean())

    def _replace(self, y: Tensor) -> None:
        """Draw atoms anew that hardly a signal used: as what is worst explained."""
        fair = self.coded / self.how.n_components
        idle = (self.use < self.how.least_use * fair).nonzero().flatten()
        residual = y - self._encode(y) @ self.atoms
        worst = residual.square().sum(1).topk(min(len(idle), len(y)))
        for j, row in zip(idle.tolist(), worst.indices[worst.values > 0].tolist()):
            self.atoms[j] = residual[row] / residual[row].norm()
            self.of_codes[j], self.of_codes[:, j], self.of_signals[j] = 0, 0, 0
            self.replaced += 1
        self.use.zero_()
        self.coded = 0.0

    def _order(self) -> list[Tensor]:
        return list(torch.randperm(len(self.x), generator=self.generator).split(self.how.batch_size))

    def _drawn(self) -> Tensor:
        """Signals at random; where there are too few, more of them with more noise."""
        able = (self.x != 0).any(1).nonzero().flatten()
        order = torch.cat(
            [
                able[torch.randperm(len(able), generator=self.generator)]
                for _ in range(-(-self.how.n_components // len(able)))
            ]
        )
        atoms = unit_rows(self.x[order[: self.how.n_components]])
        noise = torch.randn(atoms.shape, generator=self.generator, dtype=atoms.dtype).to(atoms.device)
        return unit_rows(atoms + 0.1 * noise / math.sqrt(atoms.shape[1]))


def unit_rows(atoms: Tensor) -> Tensor:
    """Rows of length one; those that are zero stay so."""
    return torch.nn.functional.normalize(atoms, dim=1)
