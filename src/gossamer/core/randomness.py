"""Random numbers of one's own.

A generator that starts from the seed with which somebody else has made the weights of a model repeats the very numbers
that became those weights: a "random" mask of the first layer would keep its largest ones. Everything that draws
therefore starts from its seed *and* its purpose.
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """Return a generator on the CPU that shares no numbers with one of another purpose, or with ``manual_seed(seed)``.

    Parameters
    ----------
    purpose
        What it draws, such as ``"random masks"``.
    seed
        Any integer.
    """
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
