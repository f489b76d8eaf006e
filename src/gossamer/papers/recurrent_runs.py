"""Many recurrent networks trained side by side, each until it is good enough.

Networks that are compared for how much they have changed must have learnt equally well: one that has not finished looks
lazy. So each is kept as it was when its loss on held-out trials first fell to a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.papers.recurrent_tasks import Trials
from gossamer.training.ctrnn import CTRNN

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Finished:
    """What :func:`train_until` leaves of a stack.

    Attributes
    ----------
    weights
        Name → ``(copies, …)``, each network when it reached the target, or at the end.
    steps
        After how many steps that was, ``(copies,)``; −1 where the target was not reached.
    loss
        On the held-out trials, ``(copies,)``.
    """

    weights: Weights
    steps: Tensor
    loss: Tensor

    def quickest(self, group: list[int]) -> int | None:
        """Which of some networks, such as one at several learning rates, reached the target first; None if none did."""
        reached = [(int(self.steps[place]), place) for place in group if self.steps[place] >= 0]
        return min(reached)[1] if reached else None


def losses(model: CTRNN, trials: Trials) -> Tensor:
    """Cross-entropy of each network of a stack, over all steps that have an answer, ``(copies,)``."""
    outputs = model(trials.inputs)[0].transpose(0, 1)  # copies first
    targets = trials.targets.expand(len(outputs), *trials.targets.shape)
    each = functional.cross_entropy(outputs.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=-100)
    return each.view(len(outputs), -1).sum(1) / (trials.targets >= 0).sum()


@torch.no_grad()
def decisions(model: CTRNN, trials: Trials) -> Tensor:
    """Share of right answers at the last step, ``(copies,)``."""
    return (model(trials.inputs)[0][-1].argmax(-1) == trials.targets[-1]).double().mean(-1)


def train_until(
    model: CTRNN,
    draw: Callable[[], Trials],
    held_out: Trials,
    rates: Tensor,
    target: float,
    steps: int,
    every: int = 25,
    momentum: float = 0.9,
) -> Finished:
    """Train a stack by SGD with momentum on the same batches, and keep each network when it is good enough.

    Parameters
    ----------
    model
        With ``copies=(s,)``; changed in place.
    draw
        Gives the next batch.
    held_out
        Trials by which it is decided whether a network is good enough.
    rates
        Learning rate of each, ``(s,)``.
    target
        Loss at which a network is kept.
    steps
        At most; training ends earlier once all are good enough.
    every
        Steps between two looks.
    momentum
        Of SGD.
    """
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    reached = torch.full((len(rates),), -1)
    final = torch.full((len(rates),), torch.nan)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                now = losses(model, held_out)
            open_ = reached < 0
            final = torch.where(open_, now, final)
            for name, value in parameters.items():
                kept[name][open_] = value.detach()[open_]
            reached[open_ & (now <= target)] = step
            if step == steps or (reached >= 0).all():
                break
        gradients = torch.autograd.grad(losses(model, draw()).sum(), list(parameters.values()))
        with torch.no_grad():
            for (name, value), gradient in zip(parameters.items(), gradients):
                velocity[name].mul_(momentum).add_(gradient)
                value.sub_(velocity[name] * rates.view(-1, 1, 1))
    return Finished(kept, reached, final)


def take(weights: Weights, copies: list[int], mask: Tensor | None = None) -> CTRNN:
    """A stack of some networks of another, in this order."""
    chosen = {name: value[copies] for name, value in weights.items()}
    model = CTRNN(
        chosen["input"].shape[2],
        chosen["input"].shape[1],
        chosen["readout"].shape[1],
        copies=(len(copies),),
        mask=None if mask is None else mask[copies],
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(chosen[name])
    return model


def single(weights: Weights, copy: int, mask: Tensor | None = None) -> CTRNN:
    """One network of a stack, by itself."""
    sizes = weights["input"].shape[2], weights["input"].shape[1], weights["readout"].shape[1]
    model = CTRNN(*sizes, mask=None if mask is None else mask[copy])
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights[name][copy])
    return model
