"""Codes of which most are zero: for every row, a few features and their values.

The common currency of sparse autoencoders, sparse coding and stored latents. Rows may hold different numbers of
features, so the features of all rows lie one after the other, as in compressed sparse rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """A ``(rows, features)`` matrix without its zeros.

    Attributes
    ----------
    indices
        Feature of every stored value, ``(stored,)`` int32 or int64; those of a row are different from each other.
    values
        ``(stored,)``. They may require gradients.
    starts
        ``(rows + 1,)`` int64: row i holds the entries from ``starts[i]`` to ``starts[i + 1]``.
    width
        Number of features.

    Examples
    --------
    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> codes.counts.tolist(), codes.shape
    ([1, 2], (2, 3))
    """

    indices: Tensor
    values: Tensor
    starts: Tensor
    width: int

    def __post_init__(self) -> None:
        shapes = (tuple(self.indices.shape), tuple(self.values.shape), tuple(self.starts.shape))
        if self.indices.dim() != 1 or self.values.shape != self.indices.shape or self.starts.dim() != 1:
            raise ConfigurationError(f"indices, values and starts are {shapes}; each is a vector, the first two alike")
        if len(self.starts) < 1 or self.width < 1:
            raise ConfigurationError(f"{len(self.starts)} starts and width {self.width}; there must be one of each")

    @classmethod
    def from_rows(cls, indices: Tensor, values: Tensor, width: int) -> SparseCodes:
        """The same number of features in every row: both ``(rows, k)``."""
        rows, count = indices.shape
        starts = torch.arange(rows + 1, device=indices.device) * count
        return cls(indices.reshape(-1), values.reshape(-1), starts, width)

    @classmethod
    def from_dense(cls, codes: Tensor) -> SparseCodes:
        """What is not zero in ``(rows, features)``; gradients of the values reach `codes`."""
        return cls.from_mask(codes, codes != 0)

    @classmethod
    def from_mask(cls, codes: Tensor, mask: Tensor) -> SparseCodes:
        """What `mask` keeps of ``(rows, features)``, zeros included; gradients of the values reach `codes`."""
        if codes.dim() != 2 or mask.shape != codes.shape:
            raise ConfigurationError(
                f"codes {tuple(codes.shape)} and mask {tuple(mask.shape)} must be (rows, features)"
            )
        starts = torch.zeros(len(codes) + 1, dtype=torch.int64, device=codes.device)
        torch.cumsum(mask.sum(1), 0, out=starts[1:])
        return cls(mask.nonzero()[:, 1], codes[mask], starts, codes.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and features."""
        return len(self), self.width

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Tensor:
        """Features stored in every row, ``(rows,)``."""
        return self.starts.diff()

    @property
    def row_of(self) -> Tensor:
        """Row of every stored value, ``(stored,)`` int64."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.starts.device), self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of all three parts."""
        return sum(part.numel() * part.element_size() for part in (self.indices, self.values, self.starts))

    def to_dense(self) -> Tensor:
        """``(rows, features)`` with its zeros; gradients reach the values."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put((self.row_of, self.indices.long()), self.values)

    def to_csr(self) -> Tensor:
        """The same as a sparse tensor of torch, without gradients."""
        ordered = self.sorted()
        parts = (ordered.starts, ordered.indices.long(), ordered.values.detach())
        return torch.sparse_csr_tensor(*parts, self.shape, check_invariants=True)

    def sorted(self) -> SparseCodes:
        """The features of every row in ascending order."""
        order = (self.row_of * self.width + self.indices.long()).argsort()
        return SparseCodes(self.indices[order], self.values[order], self.starts, self.width)

    def transposed(self) -> SparseCodes:
        """``(features, rows)``: for every feature, the rows that hold it, ascending."""
        order = self.indices.argsort(stable=True)
        starts = torch.zeros(self.width + 1, dtype=torch.int64, device=self.indices.device)
        torch.cumsum(self.activity(), 0, out=starts[1:])
        return SparseCodes(self.row_of[order], self.values[order], starts, max(len(self), 1))

    def activity(self) -> Tensor:
        """How many rows hold each feature, int64 ``(features,)``."""
        return torch.bincount(self.indices, minlength=self.width)

    def __getitem__(self, rows: slice) -> SparseCodes:
        """Some consecutive rows."""
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ConfigurationError(f"rows are taken in steps of {step}; take consecutive ones")
        last = max(first, last)
        part = slice(int(self.starts[first]), int(self.starts[last]))
        starts = self.starts[first : last + 1] - self.starts[first]
        return SparseCodes(self.indices[part], self.values[part], starts, self.width)

    @staticmethod
    def cat(parts: Sequence[SparseCodes]) -> SparseCodes:
        """Rows of several codes, one after the other.

        Raises
        ------
        ConfigurationError
            If there are none, or they have different widths.
        """
        widths = {part.width for part in parts}
        if len(widths) != 1:
            raise ConfigurationError(f"codes of {sorted(widths) or 'no'} features; put together codes of one width")
        counts = torch.cat([part.counts for part in parts])
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=starts[1:])
        indices, values = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
        return SparseCodes(indices, values, starts, widths.pop())

    def check(self, name: str = "codes") -> None:
        """Refuse what a kernel must not follow.

        Raises
        ------
        CheckpointError
            If starts do not ascend from 0 to the number of values, or a feature lies outside the width.
        """
        if int(self.starts[0]) != 0 or int(self.starts[-1]) != len(self.values) or bool((self.counts < 0).any()):
            raise CheckpointError(f"{name}: starts do not ascend from 0 to {len(self.values)}; the file is damaged")
        if len(self.indices) and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < self.width:
            raise CheckpointError(
                f"{name}: a feature lies outside the {self.width} that there are; the file is damaged"
            )

    def __repr__(self) -> str:
        rows, mean = len(self), len(self.values) / max(len(self), 1)
        return f"SparseCodes({rows} rows of {self.width} features, {mean:.1f} stored in each, {self.nbytes} bytes)"
