"""Whether two lists of numbers put the same things first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossamer.errors import ConfigurationError


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of ranks, tied values sharing their mean rank; 0 if one side is constant.

    Raises
    ------
    ConfigurationError
        If there are fewer than two pairs.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ConfigurationError(f"{len(x)} and {len(y)} values have no rank correlation; give two or more pairs")
    first, second = (_ranks(np.asarray(values, dtype=float)) for values in (x, y))
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
