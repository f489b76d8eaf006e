"""How large the scores of an activation are: one streaming histogram, from which a threshold for any sparsity follows.

Sorting calibration activations costs more than computing them. A histogram on a logarithmic grid takes one pass: its
bins are the upper 16 bits of the float32 pattern, that is sign, exponent and seven bits of mantissa, so that no range
has to be known in advance and every value of a bfloat16 activation has a bin of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from mmap import mmap

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, check_sparsity

_BINS = 1 << 16  # of which magnitudes, without a sign bit, fill the lower half
_SHIFT = 16
_INFINITE = 0x7F80  # the first bin that no finite value falls into
_FEW = 100  # entries on the shorter side of a threshold, for a standard error of a tenth of that share
_compiled: Callable[[Tensor, Tensor | None, Tensor], bool] | None = None


def use_compiled(count: Callable[[Tensor, Tensor | None, Tensor], bool]) -> None:
    """Have a kernel count: ``count(x, scale, counts)`` adds ``(…, n)`` to `counts`, or returns False if it cannot."""
    global _compiled
    _compiled = count


class MagnitudeHistogram:
    """Counts of |x_j| · c_j.

    Parameters
    ----------
    name
        What error messages call the activation.
    scale
        c, ``(n,)``, or None for 1.
    """

    def __init__(self, name: str, scale: Tensor | None = None):
        self.name = name
        self.scale = None if scale is None else scale.float().cpu().contiguous()
        # such memory is taken page by page as it is used, a few of 128 here; zeros of torch or numpy may be written
        self.counts = torch.from_numpy(np.frombuffer(mmap(-1, 8 * _BINS), dtype=np.int64))
        self._coarse = scale is None

    def update(self, inputs: Tensor) -> None:
        """Count the entries of ``(…, n)``."""
        self._coarse &= inputs.dtype == torch.bfloat16
        if self.scale is not None and len(self.scale) != inputs.shape[-1]:
            raise ConfigurationError(
                f"{self.name}: inputs of {inputs.shape[-1]} channels, but a scale of {len(self.scale)}"
            )
        if _compiled is not None and _compiled(inputs, self.scale, self.counts):
            return
        scores = inputs.detach().reshape(-1, inputs.shape[-1]).abs().float()
        if self.scale is not None:
            scores = scores * self.scale.to(scores.device)
        bins = scores.flatten().view(torch.int32) >> _SHIFT
        self.counts += torch.bincount(bins, minlength=_BINS).cpu()

    @property
    def total(self) -> int:
        """Number of entries."""
        return int(self.counts.sum())

    def threshold(self, sparsity: float) -> float | None:
        """The value that `sparsity` of the entries do not exceed; None for a sparsity of 0, where nothing goes.

        Within a bin the entries are taken to lie evenly, except where all were bfloat16 values and so lie at its
        lower edge: then the bin goes as a whole or not at all, whichever is nearer. Zeros go in any case.

        Raises
        ------
        CalibrationError
            If nothing was counted.
        NonFiniteError
            If NaN or infinity was.
        """
        check_sparsity(sparsity)
        self.check()
        if sparsity == 0:
            return None
        cumulative = self.counts.cumsum(0)
        wanted = sparsity * int(cumulative[-1])
        index = int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64)))
        below = int(cumulative[index - 1]) if index else 0
        share = (wanted - below) / int(self.counts[index])
        self._warn_of_few(sparsity, int(cumulative[-1]))
        low, high = edge(index), edge(index + 1)
        if not self._coarse:
            return low + share * (high - low)
        return low if share >= 0.5 else edge(max(0, index - 1))

    def _warn_of_few(self, sparsity: float, total: int) -> None:
        beyond = min(sparsity, 1 - sparsity) * total
        if beyond < _FEW:
            warnings.warn(
                f"{self.name}: only {beyond:.0f} of {total} calibration activations lie beyond the threshold for a "
                f"sparsity of {sparsity:g}, which is a guess then; give more data",
                stacklevel=3,
            )

    def check(self) -> None:
        """Raise if nothing was counted, or something that is not a number."""
        if not self.total:
            raise CalibrationError(
                f"{self.name} never ran on the calibration data; leave it out, or give data that use it"
            )
        broken = int(self.counts[_INFINITE:].sum())
        if broken:
            raise NonFiniteError(
                f"{self.name}: {broken} calibration activations are NaN or infinite; check the model's weights and "
                f"the data, or load the model in float32"
            )


def edge(index: int) -> float:
    """Lower edge of a bin."""
    return float(torch.tensor(min(index, _INFINITE - 1) << _SHIFT, dtype=torch.int32).view(torch.float32))
