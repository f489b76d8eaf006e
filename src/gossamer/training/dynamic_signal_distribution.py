"""A signal in one noisy patch, and the three networks that look for it: what sparse and shared connections save.

An image of k patches is noise, and one patch, another one each time, also holds an unknown vector whose sign is the
label. A fully connected network has to find out where the patches are and to learn the vector k times; a locally
connected one, which is the same network under a block mask, knows where to look; a convolutional one, the same mask
with all blocks tied, learns the vector once. How many samples each needs is what
:mod:`gossamer.measure.sample_complexity` estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, UnknownNameError

Kind = Literal["fcn", "lcn", "cnn"]


def make_dsd(
    n: int,
    k: int,
    d: int,
    sigma: float,
    signal: Tensor | None = None,
    dynamic: bool = True,
    seed: int | torch.Generator = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from the Dynamic Signal Distribution.

    Lahoti et al., 2024, "Role of Locality and Weight Sharing in Image-Based Tasks", arXiv 2403.15707: label
    ``y = ±1``, position ``i`` uniform in 0 … k−1, patches ``x_j = σ ξ_j`` with ``ξ_j ~ N(0, I_d)``, and ``y·w`` added
    to patch i.

    Parameters
    ----------
    n, k, d
        Samples, patches, and numbers in a patch.
    sigma
        Standard deviation of the noise, positive.
    signal
        ``w``, of length 1, ``(..., d)``; leading dimensions draw as many independent sets side by side. Default: a
        random direction.
    dynamic
        Whether the position changes from sample to sample; if not, it is always the first patch (the static control).
    seed
        Or a generator.

    Returns
    -------
    x, y, position
        ``(..., n, k, d)`` float32, ``(..., n)`` float32 of ±1, and ``(..., n)`` int64.

    Raises
    ------
    ConfigurationError
        If a size or the noise is out of range, or the signal is not of `d` numbers and length 1.
    """
    if min(n, k, d) < 1 or not sigma > 0:
        raise ConfigurationError(f"n, k, d and sigma are {n}, {k}, {d} and {sigma}; all must be positive")
    generator = generator_for("dynamic signals", seed) if isinstance(seed, int) else seed
    if signal is None:
        signal = random_directions((), d, generator)
    if signal.shape[-1:] != (d,) or not torch.allclose(signal.norm(dim=-1), signal.new_ones(()), atol=1e-4):
        raise ConfigurationError(
            f"the signal has shape {tuple(signal.shape)}; it must have {d} numbers last, of length 1"
        )
    lead = (*signal.shape[:-1], n)
    y = 1 - 2 * torch.randint(2, lead, generator=generator).float()
    position = torch.randint(k if dynamic else 1, lead, generator=generator)
    x = torch.randn((*lead, k, d), generator=generator).mul_(sigma)
    added = (y.unsqueeze(-1) * signal.float().unsqueeze(-2)).unsqueeze(-2)
    index = position[..., None, None].expand(*lead, 1, d)
    return x.scatter_add_(-2, index, added), y, position


def random_directions(lead: tuple[int, ...], d: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform unit vectors, ``(*lead, d)``."""
    return functional.normalize(torch.randn((*lead, d), generator=generator), dim=-1)


def oracle_labels(x: Tensor, signal: Tensor) -> Tensor:
    """Labels by one who knows the signal: the sign of the patch that correlates most with it.

    Near the best there is as long as ``σ √(2 log k) < 1``; its error is the floor of every network.

    Parameters
    ----------
    x
        ``(..., n, k, d)``.
    signal
        ``(..., d)``.

    Returns
    -------
    Tensor
        ±1, ``(..., n)``.
    """
    matches = torch.einsum("...nkd,...d->...nk", x, signal)
    largest = matches.abs().argmax(-1, keepdim=True)
    return matches.gather(-1, largest).squeeze(-1).sign()


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """``sign(z) · max(|z| − b, 0)``: odd, zero in between; the identity for b = 0."""
    return functional.softshrink(values, threshold) if threshold else values


class PatchNet(nn.Module):
    """One hidden layer of k units, each with one output of weight 1: ``f(x) = Σ_j φ_b(⟨w_j, x⟩)``.

    Parameters
    ----------
    k, d
        Patches, and numbers in a patch.
    kind
        ``"fcn"``: each unit sees all patches, ``k·kd`` weights; ``"lcn"``: unit j sees only patch j, ``kd`` weights;
        ``"cnn"``: the same, with one filter for all, ``d`` weights. :meth:`dense_weight` writes each as the matrix of
        the first, and :func:`gossamer.training.locally_connected.weight_map` as a mask with ties.
    threshold
        ``b`` of :func:`soft_threshold`: above the noise of a unit, below the signal.
    copies
        Shape of a stack of independent networks that run side by side.

    Raises
    ------
    UnknownNameError
        If there is no such kind.
    ConfigurationError
        If a size or the threshold is out of range.
    """

    def __init__(
        self, k: int, d: int, kind: Kind = "fcn", threshold: float = 0.25, copies: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise UnknownNameError("patch network", kind, get_args(Kind))
        if min(k, d) < 1 or threshold < 0:
            raise ConfigurationError(f"k, d and threshold are {k}, {d} and {threshold}; k, d >= 1 and b >= 0 is needed")
        self.k, self.d, self.kind, self.threshold, self.copies = k, d, kind, threshold, copies
        shape = {"fcn": (k, k * d), "lcn": (k, d), "cnn": (1, d)}[kind]
        self.weight = nn.Parameter(torch.zeros(*copies, *shape))

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1e-3, generator: torch.Generator | None = None) -> PatchNet:
        """Draw small Gaussian weights, whose distribution no rotation changes."""
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * scale)
        return self

    def units(self, x: Tensor) -> Tensor:
        """``⟨w_j, x⟩``: ``(*copies, n, k, d)`` → ``(*copies, n, k)``."""
        if self.kind == "fcn":
            return x.flatten(-2) @ self.weight.mT
        if self.kind == "lcn":
            return (x * self.weight.unsqueeze(-3)).sum(-1)
        # patches of all samples in one row, so that a stack of copies is one batched product
        return (x.flatten(-3, -2) @ self.weight.mT).view(*self.copies, -1, self.k)

    def forward(self, x: Tensor) -> Tensor:
        """Scores whose sign is the label, ``(*copies, n, k, d)`` → ``(*copies, n)``."""
        return soft_threshold(self.units(x), self.threshold).sum(-1)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weights as a fully connected layer has them, ``(*copies, k, kd)``."""
        if self.kind == "fcn":
            return self.weight.clone()
        rows = self.weight.expand(*self.copies, self.k, self.d)
        return (torch.eye(self.k).unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)

    def extra_repr(self) -> str:  # noqa: D102
        return f"k={self.k}, d={self.d}, kind={self.kind}, threshold={self.threshold}"


def logistic_loss(scores: Tensor, y: Tensor) -> Tensor:
    """``log(1 + exp(−y f))``, averaged over samples and summed over copies, so that copies do not mix."""
    return functional.softplus(-y * scores).mean(-1).sum()


@dataclass(frozen=True)
class PatchTraining:
    """Full-batch training of a :class:`PatchNet`, or of a stack of them.

    A unit with an odd threshold and weights near zero has no gradient at all, so that the first steps are made
    without the threshold.

    Parameters
    ----------
    steps
        All together.
    warm
        Share of them with b = 0.
    learning_rate
        Of the optimiser. For ``"gd"``, multiplied by :meth:`scale`.
    optimizer
        ``"gd"``, the plain one, which does not care about a rotation of the inputs; or ``"adam"``, which does.
    l1
        Weight of an L1 penalty, applied as a soft threshold after each step (proximal gradient). Default: none.

    Raises
    ------
    ConfigurationError
        If a value is out of range.
    """

    steps: int = 300
    warm: float = 1 / 3
    learning_rate: float = 0.3
    optimizer: Literal["gd", "adam"] = "gd"
    l1: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warm <= 1 or not self.learning_rate > 0 or self.l1 < 0:
            raise ConfigurationError(
                f"steps, warm, learning_rate and l1 are {self.steps}, {self.warm}, {self.learning_rate} and {self.l1}; "
                "steps >= 1, warm in [0, 1], a positive rate and l1 >= 0 are needed"
            )
        if self.optimizer not in ("gd", "adam"):
            raise UnknownNameError("optimizer", self.optimizer, ("gd", "adam"))

    @staticmethod
    def scale(model: PatchNet) -> float:
        """What a filter of this kind lacks in gradient: one that sees the signal in a k-th of the samples gets k."""
        return 1.0 if model.kind == "cnn" else float(model.k)

    def fit(self, model: PatchNet, x: Tensor, y: Tensor) -> PatchNet:
        """Train in place on ``(*copies, n, k, d)`` and labels ±1, ``(*copies, n)``."""
        rate, final = self.learning_rate, model.threshold
        if self.optimizer == "gd":
            rate *= self.scale(model)
            update: torch.optim.Optimizer = torch.optim.SGD([model.weight], lr=rate)
        else:
            update = torch.optim.Adam([model.weight], lr=rate)
        try:
            for step in range(self.steps):
                model.threshold = 0.0 if step < self.warm * self.steps else final
                update.zero_grad()
                logistic_loss(model(x), y).backward()
                update.step()
                if self.l1:
                    with torch.no_grad():
                        model.weight.copy_(soft_threshold(model.weight, rate * self.l1))
        finally:
            model.threshold = final
        return model


@torch.no_grad()
def error_rate(scores: Tensor, y: Tensor) -> Tensor:
    """Share of wrong signs, ``(..., n)`` → ``(...)`` float64; a score of zero is wrong by half."""
    return (0.5 - 0.5 * (scores.sign() * y)).double().mean(-1)


def noise_is_bearable(k: int, sigma: float) -> bool:
    """Whether the largest of k noises stays below the signal, ``σ √(2 log k) < 1``."""
    return sigma * math.sqrt(2 * math.log(k)) < 1
