"""Which heads matter, by other means than codes: what circuit finding by autoencoders has to beat.

All give one number a head, ``(heads,)``, the higher the more the head matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.core.gates import draw_noise
from gossamer.core.progress import track
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.circuit_tasks import CircuitTask
from gossamer.features.heads import HeadGrid, by_length, evaluating, gated_heads, last_logits, watched
from gossamer.features.replay import Replay
from gossamer.models.blocks import run_batch

_STRETCH = (-0.1, 1.1)  # of a hard concrete gate, so that zeros and ones are exact
_TEMPERATURE = 2 / 3


def ablation_effects(model: nn.Module, task: CircuitTask, means: Sequence[Tensor], progress: bool = False) -> Tensor:
    """How far the metric falls when a single head is replaced by its mean, as a share of the metric.

    The exhaustive way: one run on all prompts for every head, from its layer on.

    Parameters
    ----------
    model, task
        The model and its task.
    means
        As :func:`~gossamer.features.heads.mean_heads` gives them.
    progress
        Whether to show a bar.

    Raises
    ------
    ConfigurationError
        If the model does not solve the task at all.
    """
    grid = HeadGrid.of(model)
    batches = by_length(task.positive)
    metric, whole = torch.zeros(len(grid)), 0.0
    bar = iter(track(range(len(batches) * len(grid)), "ablating heads", enabled=progress))
    with evaluating(model), torch.no_grad():
        for rows, tokens in batches:
            replay = Replay(model, tokens)
            whole += float(task.score(replay.logits, rows).sum())
            for head, (layer, _) in enumerate(grid.names):
                next(bar)
                gates = torch.ones(len(grid))
                gates[head] = 0
                with replay.skipping(replay.before(grid.layers[layer].name)), gated_heads(model, gates, means):
                    metric[head] += task.score(last_logits(model, tokens), rows).sum()
    next(bar, None)
    if whole <= 0:
        raise ConfigurationError(
            f"the metric of the whole model is {whole / len(task):.3g}; it must be above 0 to have a share of"
        )
    return 1 - metric / whole


def mean_difference(outputs: Tensor, labels: Tensor) -> Tensor:
    """Distance of the mean outputs on positives and negatives: the simplest way.

    Parameters
    ----------
    outputs
        ``(prompts, heads, d)``.
    labels
        Bool ``(prompts,)``.
    """
    return (outputs[labels].mean(0) - outputs[~labels].mean(0)).norm(dim=-1)


def head_gradients(model: nn.Module, task: CircuitTask, means: Sequence[Tensor] | None = None) -> Tensor:
    """Mean over prompts of ``|∂metric / ∂gate|``, the importance of heads of Michel et al. [2019, arXiv 1905.10650].

    Parameters
    ----------
    model, task
        The model and its task.
    means
        What a closed gate leaves; None for zeros, as in that paper.
    """
    total = torch.zeros(len(HeadGrid.of(model)))
    with evaluating(model), torch.enable_grad():
        for rows, tokens in by_length(task.positive):
            gates = torch.ones(len(rows), len(total), requires_grad=True)
            with gated_heads(model, gates, means):
                metric = task.score(last_logits(model, tokens), rows).sum()
            total += torch.autograd.grad(metric, gates)[0].abs().sum(0)
    return total / len(task)


def attribution_patching(model: nn.Module, task: CircuitTask) -> Tensor:
    """How much the metric would change with each head's output on the twin, to first order; the size of the mean.

    The change of what the head reads times the gradient, summed over tokens [Nanda, 2023; arXiv 2310.10348].
    """
    grid = HeadGrid.of(model)
    total = torch.zeros(len(grid))
    with evaluating(model):
        for rows, tokens in by_length(task.positive):
            twins: list[Tensor] = []
            reads: list[Tensor] = []
            with torch.no_grad(), watched(grid, lambda number, z, twins=twins: twins.append(z.clone())):
                run_batch(model, torch.stack([task.negative[int(row)].reshape(-1) for row in rows]))

            def follow(number: int, z: Tensor, reads: list[Tensor] = reads) -> Tensor:
                # a leaf of its own, so that gradients are there even if no weight has any
                reads.append(z if z.requires_grad else z.detach().requires_grad_())
                return reads[-1]

            with torch.enable_grad(), watched(grid, follow):
                metric = task.score(last_logits(model, tokens), rows).sum()
                slopes = torch.autograd.grad(metric, reads)
            parts = [((twin - read.detach()) * slope).sum((0, 1, 3)) for twin, read, slope in zip(twins, reads, slopes)]
            total += torch.cat(parts).float()
    return (total / len(task)).abs()


def subnetwork_probing(
    model: nn.Module,
    task: CircuitTask,
    means: Sequence[Tensor] | None = None,
    penalty: float = 0.1,
    steps: int = 100,
    lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Probability that a head's gate is open, once gates are learned to keep predictions with few heads.

    Hard concrete gates; the loss is the divergence from the whole model's predictions and the expected number of open
    gates, times a weight [Cao et al., 2021, arXiv 2104.03514].

    Parameters
    ----------
    model, task
        The model and its task.
    means
        What a closed gate leaves; None for zeros.
    penalty
        Weight of the expected share of open gates.
    steps, lr
        Of Adam.
    seed
        Of the noise.

    Raises
    ------
    ConfigurationError
        If the penalty is negative, or steps or the rate are not above 0.
    """
    if penalty < 0 or steps < 1 or not lr > 0:
        raise ConfigurationError(
            f"penalty is {penalty}, steps {steps}, lr {lr}; give at least 0, at least 1, and above 0"
        )
    logits = torch.full((len(HeadGrid.of(model)),), 2.0, requires_grad=True)
    generator = generator_for("gates of a subnetwork", seed)
    optimizer = torch.optim.Adam([logits], lr)
    batches = by_length(task.positive)
    with evaluating(model):
        with torch.no_grad():
            whole = [last_logits(model, tokens).log_softmax(-1) for _, tokens in batches]
        for _ in range(steps):
            gates = _hard_concrete(logits, generator)
            loss = penalty * _open(logits).mean()
            for (_, tokens), wanted in zip(batches, whole):
                with torch.enable_grad(), gated_heads(model, gates, means):
                    found = last_logits(model, tokens).log_softmax(-1)
                loss = loss + (wanted.exp() * (wanted - found)).sum() / len(task)
            (slope,) = torch.autograd.grad(loss, logits)
            logits.grad = slope
            optimizer.step()
    return _open(logits).detach()


def _hard_concrete(logits: Tensor, generator: torch.Generator) -> Tensor:
    low, high = _STRETCH
    soft = ((logits + draw_noise(logits, "logistic", generator)) / _TEMPERATURE).sigmoid()
    return (low + (high - low) * soft).clamp(0, 1)


def _open(logits: Tensor) -> Tensor:
    """Probability that a gate is not closed [Louizos et al., 2018, arXiv 1712.01312, eq. 12]."""
    low, high = _STRETCH
    return (logits - _TEMPERATURE * torch.tensor(-low / high).log()).sigmoid()
