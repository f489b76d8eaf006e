"""How the error of autoencoders falls with the width of their dictionary, and for which tokens it does not.

Of autoencoders of growing width and about equal L0 the larger ones fail on the same tokens as the smaller ones, the
linear part of the error falls, and the nonlinear part stays [Engels et al., 2024, arXiv 2410.14670, sections 4 and 5].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from gossamer.core.regression import determination, fit_linear
from gossamer.errors import ConfigurationError
from gossamer.features.error_decomposition import (
    Autoencoder,
    ErrorReport,
    error_decomposition,
    reconstruct,
    split_rows,
)

_EXPONENTS = np.geomspace(0.02, 4.0, 24)


@dataclass(frozen=True)
class WidthLaw:
    """``FVU(width) = floor + amount · width^(−exponent)``, all from 0 up.

    Attributes
    ----------
    floor
        c, what no width would explain.
    amount, exponent
        A and α.
    """

    floor: float
    amount: float
    exponent: float

    def at(self, width: float) -> float:
        """What the law expects."""
        return self.floor + self.amount * width**-self.exponent


def fit_width_law(widths: Sequence[float], values: Sequence[float]) -> WidthLaw:
    """Fit the law by least squares, from the best exponent of a grid on.

    Raises
    ------
    ConfigurationError
        If there are not equally many, three or more different widths above 0, or a value is negative.
    """
    width, value = np.asarray(widths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if width.shape != value.shape or len(np.unique(width)) < 3 or (width <= 0).any() or not (value >= 0).all():
        raise ConfigurationError(
            f"{len(width)} widths and {len(value)} values; a law of three numbers needs three different widths above "
            "0, and a value from 0 up for each"
        )
    scaled = width / width[0]

    def miss(law: np.ndarray) -> np.ndarray:
        return law[0] + law[1] * scaled ** -law[2] - value

    found = []
    for exponent in _EXPONENTS:
        design = np.stack([np.ones_like(scaled), scaled**-exponent], 1)
        start = np.clip(np.linalg.lstsq(design, value, rcond=None)[0], 1e-12, None)
        found.append(least_squares(miss, [*start, exponent], bounds=([0, 0, 0], [np.inf, np.inf, 8.0])))
    floor, amount, exponent = min(found, key=lambda each: each.cost).x
    return WidthLaw(float(floor), float(amount * width[0] ** exponent), float(exponent))


@dataclass(frozen=True, eq=False)
class ScalingReport:
    """Errors of autoencoders of growing width on the same tokens.

    Attributes
    ----------
    widths
        Features of each.
    reports
        The decomposition of each.
    correlation
        Of ‖e‖ of the row's and the column's autoencoder over the scored tokens, ``(saes, saes)``.
    predicted
        R² on held-out tokens of ‖e‖ of the column's, from ‖e‖ of the row's.
    with_nonlinear, with_linear
        The same with the length of the row's nonlinear, or linear, error besides.
    total, nonlinear
        Laws of the FVU; None with fewer than three widths.
    """

    widths: tuple[int, ...]
    reports: tuple[ErrorReport, ...]
    correlation: Tensor
    predicted: Tensor
    with_nonlinear: Tensor
    with_linear: Tensor
    total: WidthLaw | None
    nonlinear: WidthLaw | None

    @property
    def larger_from_smaller(self) -> list[tuple[int, int]]:
        """Pairs of rows and columns in which a wider one is predicted from a narrower one."""
        count = len(self.widths)
        return [(small, large) for small in range(count) for large in range(small + 1, count)]

    def mean(self, matrix: Tensor) -> float:
        """Mean of a matrix over the pairs in which a wider one is predicted from a narrower one."""
        pairs = self.larger_from_smaller
        return float(torch.stack([matrix[pair] for pair in pairs]).mean()) if pairs else float("nan")

    def table(self) -> str:
        """One line for every width."""
        names = ("fvu", "fvu_linear", "fvu_nonlinear", "r2_vec", "r2_norm")
        lines = ["".join(f"{name:>15}" for name in ("width", *names))]
        for width, report in zip(self.widths, self.reports):
            lines.append("".join([f"{width:>15}", *(f"{getattr(report, name):>15.4f}" for name in names)]))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "widths": list(self.widths),
            "reports": [report.to_dict() for report in self.reports],
            "correlation": self.mean(self.correlation),
            "predicted": self.mean(self.predicted),
            "with nonlinear": self.mean(self.with_nonlinear),
            "with linear": self.mean(self.with_linear),
        }


def scaling_report(
    saes: Mapping[int, Autoencoder], x: Tensor, *, documents: Tensor | None = None, seed: int = 0, **options: Any
) -> ScalingReport:
    """Decompose the errors of autoencoders of growing width, and predict those of one from those of another.

    Parameters
    ----------
    saes
        Width → autoencoder.
    x
        Activations ``(tokens, d)`` that none was trained on.
    documents
        As in :func:`~gossamer.features.error_decomposition.error_decomposition`.
    seed
        Of all splits.
    options
        For the decomposition.

    Raises
    ------
    ConfigurationError
        If there is no autoencoder.
    """
    if not saes:
        raise ConfigurationError("there is no autoencoder to report on; give some by their width")
    widths = tuple(sorted(saes))
    reports, total, linear, nonlinear = [], [], [], []
    for width in widths:
        x_hat = reconstruct(saes[width], x)
        report = error_decomposition(x, x_hat, documents=documents, seed=seed, **options)
        rows = report.scored
        straight, rest = report.parts(x[rows], x_hat[rows])
        reports.append(report)
        total.append((straight + rest).double().norm(dim=1))
        linear.append(straight.double().norm(dim=1))
        nonlinear.append(rest.double().norm(dim=1))
    rows = reports[0].scored
    some = None if documents is None else torch.as_tensor(documents)[rows]
    fitted, scored = split_rows(len(rows), some, 0.5, seed + 1)
    count = len(widths)
    tables = {name: torch.ones(count, count, dtype=torch.float64) for name in ("alone", "nonlinear", "linear")}
    for small in range(count):
        for large in range(count):
            for name, more in (("alone", None), ("nonlinear", nonlinear[small]), ("linear", linear[small])):
                known = torch.stack([total[small], *([] if more is None else [more])], 1)
                found = fit_linear(known[fitted], total[large][fitted], intercept=True)
                tables[name][small, large] = determination(total[large][scored], found(known[scored])[:, 0]).mean
    laws = [
        fit_width_law(widths, [getattr(report, name) for report in reports]) if count > 2 else None
        for name in ("fvu", "fvu_nonlinear")
    ]
    correlation = torch.corrcoef(torch.stack(total)).reshape(count, count)
    return ScalingReport(
        widths, tuple(reports), correlation, tables["alone"], tables["nonlinear"], tables["linear"], laws[0], laws[1]
    )
