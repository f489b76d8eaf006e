"""How small an effect a paired comparison could have seen: without it, "no difference" says nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.papers.statistics import t_quantile


def minimum_detectable_effect(differences: Sequence[float], power: float = 0.8, confidence: float = 0.95) -> float:
    """Smallest true mean difference that a two-sided paired t test would find with a given probability.

    ``(t_{1 − α/2} + t_{power}) · s / √n`` with n − 1 degrees of freedom, where s is the standard deviation of the
    differences.

    Parameters
    ----------
    differences
        One a seed, at least two.
    power
        Probability of finding it, in (0.5, 1).
    confidence
        1 − α, in (0, 1).

    Raises
    ------
    ConfigurationError
        If there are fewer than two differences, or a probability is out of range.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2 or not 0.5 < power < 1 or not 0 < confidence < 1:
        raise ConfigurationError(
            f"{values.size} differences, power {power}, confidence {confidence}: at least 2, (0.5, 1) and (0, 1) needed"
        )
    degrees = values.size - 1
    quantiles = t_quantile(0.5 + confidence / 2, degrees) + t_quantile(power, degrees)
    return quantiles * float(values.std(ddof=1)) / math.sqrt(values.size)
