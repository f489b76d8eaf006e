"""Does a fully connected network find out by itself which connections a task needs?

Under the mask of a locally connected network it needs fewer samples. Here the mask is not given but looked for, by
methods that know nothing of patches: exchanging weights by gradient (RigL) or by correlation (Hebbian) while training,
or an L1 penalty whose survivors are trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.topology import GROWTHS
from gossamer.errors import UnknownNameError
from gossamer.training.dynamic_signal_distribution import PatchNet, PatchTraining, logistic_loss, soft_threshold
from gossamer.training.exchanging import Exchanging
from gossamer.training.hebbian import HebbianScore
from gossamer.training.static import Static

Search = Literal["rigl", "hebbian", "l1", "static"]


class MaskedPatchNet(nn.Module):
    """The fully connected :class:`~gossamer.training.dynamic_signal_distribution.PatchNet` on a linear layer.

    Sparse training finds its weights as those of any other model.

    Parameters
    ----------
    k, d, threshold
        As there.
    """

    def __init__(self, k: int, d: int, threshold: float = 0.25) -> None:
        super().__init__()
        self.threshold = threshold
        self.filters = nn.Linear(k * d, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, k, d)`` → scores ``(n,)``."""
        return soft_threshold(self.filters(x.flatten(1)), self.threshold).sum(1)


@dataclass(kw_only=True)
class _Exchange(Exchanging):
    """Exchange small weights for those that one score likes best."""

    growth: Literal["gradient", "hebbian"] = "gradient"
    score: HebbianScore | None = None

    def wants_gradient(self, step: int) -> bool:
        return self.growth == "gradient" and self.exchanges(step)

    def change(self, training: SparseTraining) -> None:
        if self.exchanges(training.step):
            training.exchange(self.exchange, GROWTHS["gradient"] if self.score is None else self.score)
            if self.score is not None:
                self.score.forget()


def learn_local(
    x: Tensor,
    y: Tensor,
    search: Search,
    training: PatchTraining | None = None,
    threshold: float = 0.25,
    l1: float = 0.01,
    every: int = 20,
    seed: int = 0,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Train a fully connected network down to as many weights as a locally connected one has.

    Parameters
    ----------
    x, y
        ``(n, k, d)`` and labels ±1, ``(n,)``.
    search
        ``"rigl"`` or ``"hebbian"``: a random mask whose smallest weights are exchanged until three quarters of the
        steps, for those with the largest gradient or correlation; ``"l1"``: train all weights under an L1 penalty,
        keep the largest and train them on, as many steps again; ``"static"``: the random mask is kept.
    training
        Steps, their share without threshold, and learning rate. Default: those of :class:`PatchTraining`.
    threshold
        Of the units.
    l1
        Weight of the penalty.
    every
        Steps between two exchanges.
    seed
        Of the first weights and masks.

    Returns
    -------
    predict, mask
        A function from ``(m, k, d)`` to scores ``(m,)``, and what remains, ``(k, kd)`` bool, ``kd`` of ``k²d`` True.

    Raises
    ------
    UnknownNameError
        If there is no such search.
    """
    if search not in get_args(Search):
        raise UnknownNameError("search for a mask", search, get_args(Search))
    training = training or PatchTraining()
    k, d = x.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    if search == "l1":
        return _by_penalty(x, y, PatchNet(k, d, "fcn", threshold), training, l1, generator)
    model = MaskedPatchNet(k, d, threshold)
    with torch.no_grad():
        model.filters.weight.copy_(torch.randn(k, k * d, generator=generator) * 1e-3)
    rate = training.learning_rate * k
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    run = _method(search, k, training.steps, every, seed, model).attach(model, optimizer)
    score = getattr(run.method, "score", None)
    if score is not None:
        score.attach(run)
    for step in range(training.steps):
        model.threshold = 0.0 if step < training.warm * training.steps else threshold
        optimizer.zero_grad()
        logistic_loss(model(x), y).backward()
        optimizer.step()
    if score is not None:
        score.detach()
    masks = run.finalize()
    model.threshold = threshold
    return lambda test: model(test).detach(), masks["filters.weight"]


def _method(search: str, k: int, steps: int, every: int, seed: int, model: MaskedPatchNet) -> Sparsifier:
    shared = {"sparsity": 1 - 1 / k, "allocation": "uniform", "heads": True, "seed": seed}
    if search == "static" or k == 1:
        return Static(**shared)
    score = HebbianScore(activation=lambda z: soft_threshold(z, model.threshold)) if search == "hebbian" else None
    growth = "gradient" if score is None else "hebbian"
    return _Exchange(**shared, every=every, end=max(1, steps * 3 // 4), growth=growth, score=score)


def _by_penalty(
    x: Tensor, y: Tensor, model: PatchNet, training: PatchTraining, l1: float, generator: torch.Generator
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    steps = {"steps": training.steps, "warm": training.warm, "learning_rate": training.learning_rate}
    model.reset_parameters(generator=generator)
    PatchTraining(**steps, l1=l1).fit(model, x, y)
    size = model.weight.abs().flatten()
    mask = torch.zeros(size.shape, dtype=torch.bool)
    mask[size.topk(len(size) // model.k).indices] = True
    mask = mask.view_as(model.weight)
    with torch.no_grad():
        model.weight.mul_(mask)
    # the survivors go on from where they are; a gradient that is masked leaves the others at zero
    handle = model.weight.register_hook(lambda gradient: gradient * mask)
    PatchTraining(**{**steps, "warm": 0.0}).fit(model, x, y)
    handle.remove()
    return lambda test: model(test).detach(), mask


def locality(mask: Tensor, d: int) -> float:
    """Mean over units of the largest share of their weights that lies in one patch: 1 for a block mask.

    Units without a weight do not count; a random mask has a little more than 1/k.

    Parameters
    ----------
    mask
        ``(units, kd)`` bool.
    d
        Numbers in a patch.
    """
    counts = mask.unflatten(1, (-1, d)).sum(2).double()
    active = counts.sum(1) > 0
    return float(functional.normalize(counts[active], p=1.0, dim=1).amax(1).mean())
