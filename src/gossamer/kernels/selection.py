"""The highest scores of rows by compiled code: of many short ones, as N:M masks need it, and of long ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.selection import use_compiled
from gossamer.kernels.native import available, native

_LONG = 1 << 12  # scores of a row from which on counting digits is faster than a partition


def keep_highest_of_rows(scores: Tensor, dropped: int) -> Tensor | None:
    """Mask of the highest scores of every row, of equal ones the later.

    Parameters
    ----------
    scores
        ``(rows, m)``, without NaN.
    dropped
        How many of a row are not kept.

    Returns
    -------
    Tensor or None
        ``(rows, m)`` bool; None where there is no compiled code for this device, dtype or m.
    """
    if not available() or scores.device.type != "cpu" or scores.dtype != torch.float32:
        return None
    rows, m = scores.shape
    scores = scores.detach().contiguous()
    keep = torch.empty(rows, m, dtype=torch.bool)
    threads = torch.get_num_threads()
    if m >= _LONG and 0 < dropped < m:
        native().keep_highest_of_long_rows(rows, m, dropped, scores.data_ptr(), keep.data_ptr(), threads)
        return keep
    return keep if native().keep_highest(rows, m, dropped, scores.data_ptr(), keep.data_ptr(), threads) else None


use_compiled(keep_highest_of_rows)
