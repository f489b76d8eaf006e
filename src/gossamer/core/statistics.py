"""Streaming summaries of the rows of a layer's input: norms, moments, Gram matrices, quantiles, samples.

Accumulation is in float32 or float64 whatever the dtype of the model: squares of outlier features overflow float16,
and long sums stop growing in bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gossamer.errors import CalibrationError


class Statistic(ABC):
    """A streaming summary of the rows of a layer's input.

    Parameters
    ----------
    features
        Width of the input.
    device
        Where to accumulate.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.features = features
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Take in ``(tokens, features)`` rows of any floating dtype."""
        self.tokens += len(inputs)
        self.accumulate(inputs)

    @abstractmethod
    def accumulate(self, inputs: Tensor) -> None:
        """Add the rows to the summary."""

    @abstractmethod
    def check(self) -> Tensor:
        """A tensor that is finite exactly if all the inputs were."""


class InputNorm(Statistic):
    """Sum of squares of every input feature. ``norm`` is ‖X_j‖₂ over all tokens, ``(in_features,)`` float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.square_sum = torch.zeros(features, dtype=torch.float64, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        self.square_sum += inputs.float().square().sum(0)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens."""
        return self.square_sum.sqrt()

    def check(self) -> Tensor:  # noqa: D102
        return self.square_sum


class InputMoments(InputNorm):
    """Mean and variance of every input feature, ``(in_features,)`` float64, and with them the norm.

    Sums of x and x² in float32 within a batch and in float64 across batches. The variance is what remains of them, so
    a feature whose mean is large beside its deviation in the first batch is counted from that mean on instead of from
    zero; otherwise the mean would swallow the variance's digits.
    """

    _LARGE = 8.0  # mean over deviation

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._sum = torch.zeros_like(self.square_sum)
        self._origin = torch.zeros(features, dtype=torch.float32, device=device)
        self._begun = self._shifted = False

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        inputs = inputs.float()
        if not self._begun and len(inputs):
            mean, variance = inputs.double().mean(0), inputs.double().var(0, correction=0)
            large = mean.square() > self._LARGE**2 * variance
            self._origin = mean.where(large, 0).float()
            self._begun, self._shifted = True, bool(large.any())
        if self._shifted:
            inputs = inputs - self._origin
        self._sum += inputs.sum(0)
        super().accumulate(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean of every feature."""
        return self._sum / max(1, self.tokens) + self._origin

    @property
    def variance(self) -> Tensor:
        """Population variance of every feature."""
        count = max(1, self.tokens)
        return (self.square_sum / count - (self._sum / count).square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens."""
        # to the bit that of InputNorm where the origin is zero, so that a mask does not depend on who else listens
        return (self.variance + self.mean.square()).mul(self.tokens).sqrt().where(self._origin != 0, super().norm)

    def check(self) -> Tensor:  # noqa: D102
        return self.square_sum + self._sum


class Gram(Statistic):
    """XᵀX over all tokens, ``(in_features, in_features)`` float32.

    Only panels on and above the diagonal are multiplied, which saves three eighths of the work of the full product.
    """

    _PANELS = 4

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._upper = torch.zeros(features, features, dtype=torch.float32, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        inputs = inputs.float()
        width = -(-self.features // self._PANELS)
        for start in range(0, self.features, width):
            panel = inputs[:, start : start + width]
            self._upper[start : start + width, start:].addmm_(panel.t(), inputs[:, start:])

    @property
    def matrix(self) -> Tensor:
        """The whole symmetric matrix, a new tensor."""
        whole = self._upper.triu()
        width = -(-self.features // self._PANELS)
        for start in range(0, self.features, width):
            stop = min(start + width, self.features)
            block = whole[start:stop, start:stop]
            block += block.triu(1).t()
            whole[stop:, start:stop] = whole[start:stop, stop:].t()
        return whole

    @property
    def diagonal(self) -> Tensor:
        """Sums of squares, ``(in_features,)``."""
        return self._upper.diagonal()

    def check(self) -> Tensor:  # noqa: D102
        return self._upper.diagonal()


class AbsoluteHistogram(Statistic):
    """Histogram of |x| over all features, on a logarithmic grid that needs no range in advance.

    A bin is the exponent and the first five mantissa bits of the float32 value, so that every quantile is known to a
    relative error of 1/32 at most; zeros have a bin of their own.
    """

    _KEPT_BITS = 5

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._shift = 23 - self._KEPT_BITS
        self.counts = torch.zeros(1 << (8 + self._KEPT_BITS), dtype=torch.int64, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        bins = inputs.float().abs().flatten().view(torch.int32) >> self._shift
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def quantile(self, q: float) -> float:
        """Largest bin edge below which at most a fraction `q` of the values lies (0 ≤ q ≤ 1)."""
        total = int(self.counts.sum())
        if not total:
            raise CalibrationError("no values were observed: run the model on data first")
        cumulative = self.counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.tensor(q * total, dtype=torch.float64), right=True))
        edge = torch.tensor(min(index, len(self.counts) - 1) << self._shift, dtype=torch.int32)
        return float(edge.view(torch.float32))

    def check(self) -> Tensor:  # noqa: D102
        not_finite = self.counts[255 << self._KEPT_BITS :].sum()
        return torch.where(not_finite > 0, torch.nan, 0.0).unsqueeze(0)


class InputSample(Statistic):
    """The first rows seen, at most `SIZE` of them: enough to measure a relative output error."""

    SIZE = 256

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._rows: list[Tensor] = []

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        room = self.SIZE - sum(map(len, self._rows))
        if room > 0:
            # spread over the batch: neighbouring tokens are alike
            chosen = torch.linspace(0, len(inputs) - 1, min(room, len(inputs), self.SIZE // 4)).long()
            self._rows.append(inputs[chosen.to(inputs.device)].float().clone())

    @property
    def rows(self) -> Tensor:
        """``(at most SIZE, in_features)`` float32."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.features)

    def check(self) -> Tensor:  # noqa: D102
        return self.rows.sum(0)
