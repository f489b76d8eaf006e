"""Three tasks that are given to animals and to recurrent networks, and rows of digits.

A trial is a few steps of noisy channels; the right answer is 0, *keep fixating*, until the last step, where it is one
of two choices. Channels, noise and timing are those of the paper by Liu et al., 2024 (arXiv 2310.08513), who took them
from neurogym (Molano-Mazón et al., 2022): steps of 100 ms, noise of 0.1 for each (0.14 with a context), eight steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.papers.digits import Digits

COHERENCES = (0.0, 0.064, 0.128, 0.256, 0.512)
CONTEXT_COHERENCES = (0.05, 0.15, 0.5)
STEPS = 8


@dataclass(frozen=True)
class Trials:
    """A batch.

    Attributes
    ----------
    inputs
        ``(steps, batch, channels)``; the first channel says *fixate*.
    targets
        The right answer at each step, ``(steps, batch)`` int64.
    """

    inputs: Tensor
    targets: Tensor


def two_afc(batch: int, steps: int = STEPS, noise: float = 0.1, generator: torch.Generator | None = None) -> Trials:
    """Which of two noisy stimuli is stronger? Channels: fixation, left, right. Answers: fixate, left, right.

    The stimuli are ``(1 ± c)/2`` in all steps but the last, with a coherence c drawn from :data:`COHERENCES`, of which
    0 leaves nothing but to guess.
    """
    inputs, targets = _empty(batch, steps, 3)
    choice = torch.randint(2, (batch,), generator=generator)
    coherence = _drawn(COHERENCES, batch, generator)
    inputs[:-1, :, 0] = 1
    inputs[:-1, :, 1:] = _evidence(choice, coherence)
    inputs[:-1, :, 1:] += noise * torch.randn(steps - 1, batch, 2, generator=generator)
    targets[-1] = 1 + choice
    return Trials(inputs, targets)


def delay_match(batch: int, steps: int = STEPS, noise: float = 0.1, generator: torch.Generator | None = None) -> Trials:
    """Is the second stimulus the first again? Channels: fixation and two directions. Answers: fixate, same, other.

    The first step shows the sample, the last but one the test, ``cos`` of the angle to each direction; between them
    is a delay, and in the last step the answer is due.
    """
    inputs, targets = _empty(batch, steps, 3)
    sample = torch.randint(2, (batch,), generator=generator)
    other = torch.randint(2, (batch,), generator=generator)
    inputs[:-1, :, 0] = 1
    for step, shown in ((0, sample), (steps - 2, sample ^ other)):
        signs = (1 - 2 * shown).float()
        inputs[step, :, 1:] = torch.stack([signs, -signs], 1)
        inputs[step, :, 1:] += noise * torch.randn(batch, 2, generator=generator)
    targets[-1] = 1 + other
    return Trials(inputs, targets)


def context_decision(
    batch: int,
    steps: int = STEPS,
    noise: float = 0.1 * math.sqrt(2),
    shown: int = 2,
    generator: torch.Generator | None = None,
) -> Trials:
    """Which stimulus is stronger in the one of two modalities that the context names?

    Channels: fixation, two stimuli of the first and two of the second modality, and two of the context, which lasts
    for the whole trial. Stimuli are seen in the first `shown` steps, with coherences of
    :data:`CONTEXT_COHERENCES`; then comes a delay, and the answer in the last step. Answers: fixate, left, right.
    """
    inputs, targets = _empty(batch, steps, 7)
    if not 1 <= shown < steps:
        raise ConfigurationError(f"stimuli are shown for {shown} of {steps} steps; give 1 to {steps - 1}")
    context = torch.randint(2, (batch,), generator=generator)
    choices = torch.randint(2, (2, batch), generator=generator)
    inputs[:-1, :, 0] = 1
    for modality, choice in enumerate(choices):
        channels = slice(1 + 2 * modality, 3 + 2 * modality)
        inputs[:shown, :, channels] = _evidence(choice, _drawn(CONTEXT_COHERENCES, batch, generator))
    inputs[:shown, :, 1:5] += noise * torch.randn(shown, batch, 4, generator=generator)
    inputs[:, torch.arange(batch), 5 + context] = 1
    targets[-1] = 1 + choices[context, torch.arange(batch)]
    return Trials(inputs, targets)


TASKS: dict[str, Callable[..., Trials]] = {"2AF": two_afc, "DMS": delay_match, "CXT": context_decision}
"""Generators by the short names of the paper."""


def draw_trials(task: str, batch: int, generator: torch.Generator | None = None) -> Trials:
    """Draw from a task by its name.

    Raises
    ------
    UnknownNameError
        If there is no such task.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    return TASKS[task](batch, generator=generator)


def row_digits(data: Digits, rows: Tensor, pool: int = 1) -> Trials:
    """Images read row by row, 28 steps of 28 pixels; the answer counts at the last step only (others are −100).

    With `pool`, squares of so many pixels a side are averaged first, which makes trials as much shorter.
    """
    images = functional.avg_pool2d(data.images[rows], pool)
    inputs = images[:, 0].transpose(0, 1)
    targets = torch.full(inputs.shape[:2], -100)
    targets[-1] = data.labels[rows]
    return Trials(inputs.contiguous(), targets)


def _empty(batch: int, steps: int, channels: int) -> tuple[Tensor, Tensor]:
    if batch < 1 or steps < 3:
        raise ConfigurationError(f"batch and steps are {batch} and {steps}; at least 1 and 3 are needed")
    return torch.zeros(steps, batch, channels), torch.zeros(steps, batch, dtype=torch.int64)


def _drawn(values: tuple[float, ...], batch: int, generator: torch.Generator | None) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (batch,), generator=generator)]


def _evidence(choice: Tensor, coherence: Tensor) -> Tensor:
    """``(1 ± c)/2`` for the chosen stimulus and the other, ``(batch, 2)``."""
    signed = coherence * (1 - 2 * choice)
    return (1 + torch.stack([signed, -signed], 1)) / 2
