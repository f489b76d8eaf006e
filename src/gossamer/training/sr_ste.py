"""SR-STE: train an N:M network from scratch, and pull the weights that do not count towards zero.

The straight-through estimator gives a weight that the mask has removed the gradient of a weight that is there. So
removed weights wander by gradients that were not meant for them, cross the largest of their group, and the network
changes under its own training. A small decay on removed weights alone ends that: the mask comes to rest, and the
gradient is taken ever closer to the weights that it moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.core.nm_sparsifier import NMSparsifier, as_nm
from gossamer.core.patterns import NM, Pattern
from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase
from gossamer.core.topology import magnitude
from gossamer.errors import ConfigurationError

Mode = Literal["in-gradient", "decoupled"]


@register(
    "ste",
    paper="sr-ste",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class STE(NMSparsifier):
    """Train N:M from scratch with the straight-through estimator: new masks after every step, gradients for all.

    The baseline of Zhou et al., 2021, arXiv 2102.04010.
    """


@register(
    "sr-ste",
    paper="sr-ste",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class SRSTE(NMSparsifier):
    """Train N:M from scratch with the straight-through estimator and a decay of the weights that do not count.

    Zhou et al., 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", arXiv 2102.04010:
    ``W ← W − γ (∂L/∂W̃ + λ (1 − m) ⊙ W)``. It adds to the weight decay of the optimiser, which acts on all
    weights. Averages over steps should be updated within ``training.dense_weights()``.

    Parameters
    ----------
    decay
        λ. The paper takes 2e-4 with SGD. Below 0 removed weights grow, which is the paper's control.
    mode
        ``in-gradient``: λ is part of the gradient, as above, added after clipping and unscaling; momentum and the
        step size of Adam apply to it. ``decoupled``: removed weights shrink by the factor ``1 − γ λ``, whatever the
        optimiser makes of the gradient; take a larger λ, for Adam's steps have the size of γ.
    """

    decay: float = 2e-4
    mode: Mode = "in-gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.decay):
            raise ConfigurationError(f"decay is {self.decay}; it must be a finite number, such as 2e-4")
        if self.mode not in get_args(Mode):
            raise ConfigurationError(f"mode is {self.mode!r}; use {' or '.join(map(repr, get_args(Mode)))}")

    def prepare(self, training: SparseTraining) -> None:
        """Pull at what does not count."""
        pull(training, self.decay, self.mode)


@torch.no_grad()
def pull(training: SparseTraining, decay: float, mode: Mode = "in-gradient") -> None:
    """Decay the weights that do not count, in a step whose dense weights have been put back.

    Parameters
    ----------
    training
        Of an N:M method.
    decay, mode
        See :class:`SRSTE`. A parameter that has no gradient in this step is left alone.
    """
    optimizer: Any = training.optimizer
    if decay == 0 or bool(getattr(optimizer, "found_inf", None) or False):  # a fused optimiser skips the step itself
        return
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    # a fused optimiser unscales gradients within its step
    scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
    for site in training.projected().values():
        gradient, aside = site.parameter.grad, site.aside
        if gradient is None or aside is None:
            continue
        if mode == "decoupled":
            site.parameter.add_(aside, alpha=-rates[id(site.parameter)] * decay)
        else:
            gradient.add_(aside, alpha=decay * scale)


@register(
    "asp",
    paper="sr-ste",
    when="during training",
    needs_data=False,
    timing="after training",
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class ASP(NMSparsifier):
    """Prune a trained network to N:M at once by magnitude, and train on under that mask.

    The procedure of NVIDIA's automatic sparsity, Mishra et al., 2021, arXiv 2104.08378: the baseline that needs a
    dense training first, and then as long a one again.

    Parameters
    ----------
    begin
        Steps before the weights are pruned; 0 for a network that is trained.
    """

    begin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin < 0:
            raise ConfigurationError(f"begin is {self.begin}; it must be 0 steps or more")

    def site(self, name: str, targets: Any) -> None:
        """Weights that are pruned do not train."""

    def pattern_at(self, step: int, final: NM) -> Pattern | None:
        """Dense until the network is pruned."""
        return final if step >= self.begin else None

    def wants_gradient(self, step: int) -> bool:  # noqa: D102
        return False

    def change(self, training: SparseTraining) -> None:
        """Prune, if it is time."""
        if training.step == self.begin:
            self._prune(training)

    def finish(self, training: SparseTraining) -> None:
        """Prune now, if training ended before."""
        if training.step < self.begin:
            self._prune(training)

    def _prune(self, training: SparseTraining) -> None:
        masks = {}
        for name, target in training.targets.items():
            target.check_finite()
            masks[name] = self.pattern_of(target).select(magnitude(training, name).cpu(), name=name)
        training.assign(masks)

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "frozen"


class _Refined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * weight.masked_fill(mask, 0), None, None


def refined_straight_through(
    weight: Tensor, pattern: str | Pattern, decay: float = 2e-4, mask: Tensor | None = None
) -> Tensor:
    """The masked weight, whose gradient is ``g + λ (1 − m) ⊙ W``: SR-STE within a forward pass of one's own.

    Parameters
    ----------
    weight
        ``(out, in)`` or ``(out, in, kernel…)``.
    pattern
        N:M.
    decay
        λ; 0 is the plain estimator.
    mask
        Bool of the same shape, instead of the N largest of every M.

    Returns
    -------
    Tensor
        ``m ⊙ W``. It can be differentiated once; a second derivative is an error of torch.
    """
    chosen = as_nm(pattern).select(weight.detach().abs()) if mask is None else mask
    return _Refined.apply(weight, chosen, decay)
