"""1,797 real handwritten digits of 8 × 8 pixels: the smallest images on which a network learns something.

Alpaydin & Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI (CC BY 4.0), as they come with scikit-learn
(BSD), of which nothing but that file is used.
"""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
import torch

from gossamer.errors import CheckpointError
from gossamer.models.packages import fetch, file_digest
from gossamer.papers.digits import Digits

SIDE = 8
_VERSION = "1.9.1"
_FILE = "sklearn/datasets/data/digits.csv.gz"
_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


@cache
def small_digits() -> Digits:
    """All images, ``(1797, 1, 8, 8)`` in [0, 1]; they are downloaded the first time, in a package of some 10 MB.

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    # the package differs from one platform to the next, the file does not
    path = fetch("scikit-learn", _VERSION) / _FILE
    try:
        if file_digest(path) != _SHA256:
            raise ValueError("another checksum than expected")
        with gzip.open(path, "rt") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error
    return Digits(table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 16, table[:, -1].long())
