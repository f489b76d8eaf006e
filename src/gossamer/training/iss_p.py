"""Iterative soft shrinkage: pull the smallest weights towards zero in every step, and cut only at the end.

To zero the smallest weights after every step stops them for good: the next gradient rarely lifts one above the others.
Here they are multiplied by a factor a little below one instead, a pull in proportion to their size. Those that the loss
needs grow back faster than they are pulled, so that the structure settles while the weights train, from random ones,
without a dense model before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.core.patterns import NM, Pattern, Unstructured
from gossamer.core.registry import register
from gossamer.core.selection import keep_highest_jointly
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.sparsifier import Phase, Sparsifier
from gossamer.errors import ConfigurationError, SparsityError

Pull = Literal["shrink", "penalty", "fixed penalty"]
HIGHEST = 0.995
"""More than this share of a layer is never cut, as in the authors' code."""
_PENALTIES: WeakKeyDictionary[SparseTraining, RemovableHandle] = WeakKeyDictionary()


@register(
    "iss-p",
    paper="iss-p",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="uniform",
    aims=("inference",),
)
@dataclass(kw_only=True)
class IterativeSoftShrinkage(Sparsifier):
    """Multiply the smallest weights by a factor below one after every step; cut them at `end` and train on.

    Wang, Wang, Zhang, Fu & Tao, 2023, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
    arXiv 2303.09650. The smallest are chosen anew in every step; the others are left alone. In the authors' settings
    the rate of the optimiser (Adam, 2e-4) is constant up to `end`, after 100,000 steps.

    Adam's steps do not become smaller with a weight, so that a pull has to outweigh the rate: look at
    :func:`residual_mass`, the share that the cut takes away, which is kept as ``training.extra["residual mass"]``.

    Parameters
    ----------
    sparsity
        P, of every layer (or of all together); at most 0.995.
    shrink
        α in [0, 1), the factor; 0 is iterative hard thresholding.
    pull
        ``shrink``; or, to compare with, a growing penalty on the squares of the smallest weights [GReg, Wang et al.,
        2021, arXiv 2012.09243]: of those that are the smallest at the moment (``penalty``), or were at the start
        (``fixed penalty``, which is GReg-1, and SRP where it starts from a trained model).
    penalty_step, penalty_every, penalty_limit
        Of the penalty: what is added every so many steps, and where it stops.
    end
        Step of the cut.
    pattern
        Shape of the zeros: by default anywhere in a layer; ``unstructured:model`` for one ranking of all; N:M such as
        ``1:20``, n kept of m (the authors write the zeros first: 19:20).
    fast_sample
        Weights of a layer that are looked at to find the threshold; the authors take 32,400. By default all.
    exclude
        By default, as there, the layers for the mean of colours and those that put the image together.
    """

    sparsity: float = 0.95
    shrink: float = 0.95
    pull: Pull = "shrink"
    penalty_step: float = 1e-4
    penalty_every: int = 20
    penalty_limit: float = 0.5
    end: int = 100_000
    pattern: str | Pattern | None = None
    fast_sample: int | None = None
    exclude: tuple[str, ...] = ("*mean*", "*tail*")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity > HIGHEST:
            raise SparsityError(f"sparsity is {self.sparsity}; at most {HIGHEST}, so that every layer keeps something")
        if not 0 <= self.shrink < 1:
            raise ConfigurationError(f"shrink is {self.shrink}; it must lie in [0, 1): 0.95, or 0 to zero at once")
        if self.pull not in ("shrink", "penalty", "fixed penalty"):
            raise ConfigurationError(f"pull is {self.pull!r}; use 'shrink', 'penalty' or 'fixed penalty'")
        if self.end < 1 or self.penalty_every < 1:
            raise ConfigurationError(f"end is {self.end} and penalty_every {self.penalty_every}; both must be >= 1")
        if not (self.penalty_step > 0 and self.penalty_limit > 0):
            raise ConfigurationError(
                f"penalty_step and penalty_limit are {self.penalty_step} and {self.penalty_limit}; both must be > 0"
            )
        self.pattern = Unstructured("layer") if self.pattern is None else Pattern.parse(self.pattern)
        if isinstance(self.pattern, NM):
            self.pattern.resolve(self.sparsity)
        if self.fast_sample is not None and (self.fast_sample < 100 or self.pattern != Unstructured("layer")):
            raise ConfigurationError(
                f"fast_sample is {self.fast_sample} with {self.pattern}; at least 100 are needed, and zeros "
                f"anywhere in a layer"
            )

    def start(self, training: SparseTraining) -> None:
        """Note the penalties; nothing is masked before the cut."""
        for name, target in training.targets.items():
            self._pattern().check_shape(tuple(target.shape), name)
            if isinstance(target.module, SparseWeight):
                raise ConfigurationError(
                    f"{name} stores no zeros, and nothing is zero before the cut; use a dense layer"
                )
        if self.pull != "shrink":
            for name, keep in self.kept(training).items():
                training.extra[f"penalty of {name}"] = torch.zeros_like(training.weight(name))
                if self.pull == "fixed penalty":
                    training.extra[f"kept of {name}"] = keep

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> SparseTraining:
        """Start; see :meth:`gossamer.core.sparsifier.Sparsifier.attach`. Penalties act right before each step."""
        training = super().attach(model, optimizer, state)
        if self.pull != "shrink" and training.step < self.end:
            hook = training.optimizer.register_step_pre_hook(lambda *_: self._penalize(training))
            _PENALTIES[training] = hook
        return training

    def change(self, training: SparseTraining) -> None:
        """Pull, or cut."""
        if training.step > self.end:
            return
        if self.pull == "shrink":
            for name, keep in self.kept(training).items():
                weight = training.weight(name)
                weight.copy_(torch.where(keep.to(weight.device), weight, weight * self.shrink))
        elif training.step % self.penalty_every == 0:
            self._grow_penalties(training)
        if training.step == self.end:
            self._cut(training)

    def finish(self, training: SparseTraining) -> None:
        """Cut, if training has ended before."""
        if training.step < self.end:
            self._cut(training)
        _release(training)

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "explore" if step < self.end else "frozen"

    def kept(self, training: SparseTraining, exact: bool = False) -> dict[str, Tensor]:
        """Which weights are not among the smallest at present, by name: bool ``(out, in, kernel…)``.

        Parameters
        ----------
        training
            The run.
        exact
            Whether all weights are ranked even if a sample would do.
        """
        sizes = {name: training.weight(name).abs() for name in training.targets}
        if self.fast_sample is not None and not exact:
            return {name: self._above_sampled(size, training.generator) for name, size in sizes.items()}
        pattern = self._pattern()
        if isinstance(pattern, Unstructured) and pattern.scope == "layer":
            return {name: pattern.select(size, self._share(size.numel()), name) for name, size in sizes.items()}
        if isinstance(pattern, Unstructured) and pattern.scope == "model":
            total = sum(size.numel() for size in sizes.values())
            return keep_highest_jointly({n: s.cpu() for n, s in sizes.items()}, self._count(total))
        return {name: pattern.select(size, self.sparsity, name) for name, size in sizes.items()}

    def _pattern(self) -> Pattern:
        assert isinstance(self.pattern, Pattern)
        return self.pattern

    def _count(self, size: int) -> int:
        """⌈P n⌉, but never more than 99.5 %."""
        exact = Fraction(self.sparsity).limit_denominator(10**9)
        return min(math.ceil(exact * size), int(HIGHEST * size))

    def _share(self, size: int) -> Fraction:
        return Fraction(self._count(size), size)

    def _above_sampled(self, size: Tensor, generator: torch.Generator) -> Tensor:
        flat = size.flatten()
        if flat.numel() > self.fast_sample:  # type: ignore[operator]
            flat = flat[torch.randint(flat.numel(), (self.fast_sample,), generator=generator).to(flat.device)]
        return size >= flat.sort().values[self._count(flat.numel())]

    def _grow_penalties(self, training: SparseTraining) -> None:
        fixed = self.pull == "fixed penalty"
        kept = {n: training.extra[f"kept of {n}"] for n in training.targets} if fixed else self.kept(training)
        for name, keep in kept.items():
            penalty: Tensor = training.extra[f"penalty of {name}"]
            if float(penalty.max()) <= self.penalty_limit:  # a new tensor: a saved state must not grow with the run
                training.extra[f"penalty of {name}"] = penalty.add((~keep).to(penalty), alpha=self.penalty_step)

    @torch.no_grad()
    def _penalize(self, training: SparseTraining) -> None:
        """Add the gradient of ``½ Σ λ w²`` before a step."""
        if training.step >= self.end:
            return
        for name, target in training.targets.items():
            if target.parameter.grad is None:
                continue
            grad = target.parameter.grad if target.index is None else target.parameter.grad[target.index]
            grad = grad.transpose(0, 1) if target.transposed else grad
            grad.addcmul_(training.extra[f"penalty of {name}"], training.weight(name))

    def _cut(self, training: SparseTraining) -> None:
        training.extra["residual mass"] = residual_mass(training)
        training.assign({name: keep.cpu() for name, keep in self.kept(training, exact=True).items()})
        _release(training)


def _release(training: SparseTraining) -> None:
    if hook := _PENALTIES.pop(training, None):
        hook.remove()


def residual_mass(training: SparseTraining) -> float:
    """Share of the sum of squares that lies in the weights which the cut would take away, all layers together."""
    method: Any = training.method
    cut, whole = 0.0, 0.0
    for name, keep in method.kept(training, exact=True).items():
        squares = training.weight(name).double().square()
        cut += float(squares[~keep.to(squares.device)].sum())
        whole += float(squares.sum())
    return cut / whole if whole else 0.0
