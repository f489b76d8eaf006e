"""N:M in both directions: masks whose transpose follows the pattern too.

Every M × M block keeps N in each row and N in each column, so that a product with the matrix and one with its
transpose can both be sparse. Which entries are best is an assignment problem; taking the largest that still fits is
within a factor of two of the optimum (Hubara et al., 2021, arXiv 2102.08124), and where that paints itself into a
corner, exchanges lead out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.patterns import Pattern
from gossamer.core.selection import Sparsity, check_scores
from gossamer.errors import PatternError

_BLOCKS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class TransposableNM(Pattern):
    """Exactly `n` of every `m` along the inputs, and along the outputs.

    Parameters
    ----------
    n, m
        Kept and group size, ``1 <= n <= m``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise PatternError(f"transposable {self.n}:{self.m} is impossible: 1 <= n <= m is needed")

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"transposable {self.n}:{self.m}"

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:  # noqa: D102
        super().check_shape(shape, name)
        if shape[0] % self.m or shape[1] % self.m:
            raise PatternError(
                f"{name} has shape {tuple(shape)}: {self} needs both dimensions to be multiples of {self.m}; "
                f"exclude this layer or choose another pattern"
            )

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:
        """Mask of what is kept; among equal scores the higher index is taken first, as everywhere."""
        self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        m = self.m
        blocks = check_scores(scores, name).detach().unflatten(1, (-1, m)).unflatten(0, (-1, m))
        order = (0, 2, *range(4, blocks.dim()), 1, 3)
        stacked = blocks.permute(order)
        kept = torch.cat([_choose(part, self.n) for part in stacked.reshape(-1, m, m).split(_BLOCKS_AT_ONCE)])
        back = [order.index(place) for place in range(blocks.dim())]
        return kept.view(stacked.shape).permute(back).flatten(2, 3).flatten(0, 1).contiguous()

    def verify(self, mask: Tensor, sparsity: Sparsity | None = None, name: str = "mask") -> None:
        """Raise :class:`PatternError` unless every block has `n` in each row and in each column."""
        self.resolve(sparsity)
        self.check_shape(mask.shape, name)
        groups = (mask.unflatten(1, (-1, self.m)).sum(2), mask.unflatten(0, (-1, self.m)).sum(1))
        if any((counts != self.n).any() for counts in groups):
            raise PatternError(f"{name} has {int((~mask).sum())} zeros of {mask.numel()} that do not follow {self}")


def _choose(scores: Tensor, n: int) -> Tensor:
    """Blocks ``(blocks, m, m)`` of scores → bool of the same shape."""
    blocks, m, _ = scores.shape
    # turned round, because of equal scores the first is found, and the last is wanted
    scores = scores.flip(1, 2).clamp_min(torch.finfo(scores.dtype).min)
    left, kept = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    rows, columns = (torch.zeros(blocks, m, dtype=torch.int64, device=scores.device) for _ in range(2))
    every = torch.arange(blocks, device=scores.device)
    for _ in range(n * m):
        place = left.flatten(1).argmax(1)
        row, column = place // m, place % m
        fits = left[every, row, column] > -torch.inf
        kept[every, row, column] |= fits
        left[every, row, column] = -torch.inf
        rows[every, row] += fits
        columns[every, column] += fits
        left[every, row] = left[every, row].masked_fill((rows[every, row] == n).unsqueeze(1), -torch.inf)
        full = (columns[every, column] == n).unsqueeze(1)
        left[every, :, column] = left[every, :, column].masked_fill(full, -torch.inf)
    while (short := (rows < n).any(1)).any():
        _exchange(scores, kept, rows, columns, n, short)
    return kept.flip(1, 2)


def _exchange(scores: Tensor, kept: Tensor, rows: Tensor, columns: Tensor, n: int, short: Tensor) -> None:
    """Give one more to a row and to a column of every block that lacks some.

    An entry (i, j) goes, and (r, j) and (i, c) come, where row r and column c are short; or (r, c) itself comes.
    """
    at = short.nonzero().flatten()
    values, mask = scores[at], kept[at]
    row, column = (rows[at] < n).int().argmax(1), (columns[at] < n).int().argmax(1)
    few = torch.arange(len(at), device=at.device)
    of_row, of_column = mask[few, row], mask[few, :, column]
    possible = mask & ~of_row.unsqueeze(1) & ~of_column.unsqueeze(2)
    gain = values[few, row].unsqueeze(1) + values[few, :, column].unsqueeze(2) - values
    gain = gain.nan_to_num().masked_fill(~possible, -torch.inf)
    direct = ~of_row[few, column]
    gain[few, row, column] = gain[few, row, column].masked_fill(direct, torch.inf)
    best = gain.flatten(1).argmax(1)
    i, j = best // kept.shape[1], best % kept.shape[1]
    indirect = ~direct
    kept[at[indirect], i[indirect], j[indirect]] = False
    kept[at, row, torch.where(direct, column, j)] = True
    kept[at, torch.where(direct, row, i), column] = True
    rows[at, row] += 1
    columns[at, column] += 1
