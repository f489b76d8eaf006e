"""Learning rates after pruning: what remains has to be trained again, and how fast decides what it reaches.

Every schedule is made of the learning rates of the original training. Fine-tuning (FT) goes on with the last one [Han
et al., 2015, arXiv 1506.02626]; rewinding (LRW) repeats the last part of them [Renda et al., 2020, arXiv 2003.02389];
scaled restarting (SLR) repeats all of them in less time, and cyclic restarting (CLR) goes down a cosine from the
highest to the lowest [Le & Hua, 2021, arXiv 2105.03193]; the linear schedule (LLR) goes from the highest straight down
to zero, and the adaptive one (ALLR) starts the lower the less the pruning has hurt [Zimmer, Spiegel & Pokutta, 2021,
arXiv 2111.00843].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError, TargetError

RetrainingSchedule = Literal["llr", "allr", "ft", "lrw", "slr", "clr"]
_WITHOUT_WARM_UP = ("ft", "lrw")


def retraining_rates(
    schedule: RetrainingSchedule,
    original: Sequence[float],
    steps: int,
    *,
    distortion: float | None = None,
    peak: float | None = None,
    warm_up: float = 0.1,
    original_warm_up: int = 0,
) -> list[float]:
    """Learning rate of every step of a retraining.

    Parameters
    ----------
    schedule
        ``"llr"``, ``"allr"``, ``"ft"``, ``"lrw"``, ``"slr"`` or ``"clr"``.
    original
        Learning rates of the original training, one for each step.
    steps
        Of the retraining; at least 1.
    distortion
        d₁ for ``"allr"``; see :func:`pruning_distortion`.
    peak
        Highest rate, in the place of what the schedule would choose.
    warm_up
        Share of the steps in which the rate rises along half a cosine from zero to its highest, in [0, 1); a tenth in
        the authors' code. ``"ft"`` and ``"lrw"`` have none.
    original_warm_up
        Steps of the original training's own warm-up; they do not count as its lowest rates, and are not repeated.

    Returns
    -------
    list of float
        `steps` rates.

    Raises
    ------
    ConfigurationError
        If the name is unknown, a number out of range, or the original training too short to be rewound.
    """
    _check(schedule, original, steps, distortion, peak, warm_up, original_warm_up)
    highest, lowest = max(original), min(original[original_warm_up:])
    if schedule in _WITHOUT_WARM_UP:
        rates = [lowest] * steps if schedule == "ft" else list(original[len(original) - steps :])
        return rates if peak is None else [rate * peak / max(rates) for rate in rates]
    start = highest
    if schedule == "allr":
        assert distortion is not None
        start = highest * min(1.0, max(distortion, steps / len(original)))
    start = start if peak is None else peak
    rising = int(warm_up * steps)
    rest = steps - rising
    warm = [start * (1 - math.cos(math.pi * step / rising)) / 2 for step in range(rising)]
    if schedule == "clr":
        low = min(lowest, start)
        return warm + [low + (start - low) * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)]
    if schedule == "slr":
        kept = [highest] * original_warm_up + list(original[original_warm_up:])
        return warm + [kept[step * len(kept) // rest] * (start / highest) for step in range(rest)]
    return warm + [start * (1 - step / rest) for step in range(rest)]


def pruning_distortion(before: Mapping[str, Tensor], masks: MaskSet, share: float) -> float:
    """How much pruning has moved the weights: ``d₁ = ‖W − W_p‖ / (‖W‖ √s)`` [arXiv 2111.00843].

    0 if only zeros were removed. 1 is what a mask that knows nothing of the weights does on average.

    Parameters
    ----------
    before
        Parameter name → weights that were there before; of these, the norm is taken over those that have a mask.
    masks
        What remains.
    share
        s: part of the weights that were still there that has been removed, in (0, 1).

    Raises
    ------
    ConfigurationError
        If `share` is outside (0, 1).
    TargetError
        If a mask belongs to no weight.
    """
    if not 0 < share < 1:
        raise ConfigurationError(f"share is {share}; it must lie in (0, 1): the part of the weights that was removed")
    total = removed = 0.0
    for name, mask in masks.items():
        if name not in before:
            raise TargetError(f"there is no weight {name!r}: these masks belong to another model")
        squares = before[name].detach().double().square()
        total += float(squares.sum())
        removed += float(squares[~mask.to(squares.device)].sum())
    return math.sqrt(removed / total / share) if total else 0.0


def _check(
    schedule: str,
    original: Sequence[float],
    steps: int,
    distortion: float | None,
    peak: float | None,
    warm_up: float,
    original_warm_up: int,
) -> None:
    if schedule not in get_args(RetrainingSchedule):
        raise ConfigurationError(f"schedule is {schedule!r}; use {', '.join(get_args(RetrainingSchedule))}")
    if not original or not all(0 <= rate < math.inf for rate in original) or max(original) == 0:
        raise ConfigurationError("original must hold the learning rates of the original training, one for each step")
    if steps < 1 or not 0 <= warm_up < 1 or not 0 <= original_warm_up < len(original):
        raise ConfigurationError(
            f"steps, warm_up and original_warm_up are {steps}, {warm_up} and {original_warm_up}; at least 1 step, a "
            f"share in [0, 1) and fewer than the {len(original)} original steps are needed"
        )
    if schedule == "lrw" and steps > len(original):
        raise ConfigurationError(
            f"{steps} steps cannot be rewound in a training of {len(original)}; retrain for less, or use llr"
        )
    if schedule == "allr" and (distortion is None or not distortion >= 0):
        raise ConfigurationError(f"distortion is {distortion}; allr needs a number from 0 up, of pruning_distortion")
    if peak is not None and not 0 < peak < math.inf:
        raise ConfigurationError(f"peak is {peak}; it must be a positive learning rate, such as 0.1")
