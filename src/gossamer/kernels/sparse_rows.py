"""Products with matrices of which only the non-zeros exist, for training: forward, and both gradients.

The values of a matrix are one vector, in the order of its rows. Beside them an index says where they stand. It is kept
twice, for the matrix and for its transpose, since the gradient of the inputs goes through the columns; each has two
bytes for a place and, where its order is not that of the values, four for a position.

Columns are divided into ranges. A tile of 64 positions of the batch is turned so that every feature of a range lies
together; it stays in the second cache while all rows go through it, and a non-zero is one broadcast and four products.
After Elsen, Dukhan, Gale and Simonyan, 2020, arXiv 1911.09723, section 3, and, for the gradient of the non-zeros, the
sampled product of Gale, Zaharia, Young and Elsen, 2020, arXiv 2006.10901, section 6.

A weight that does not exist takes no part: an infinite input does not become NaN by meeting it, as it would by meeting
a stored zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.native import available, native

WIDTH = 1280  # columns of a range: 64 positions of them are 320 KiB, which leave room for outputs in the second cache


@dataclass(frozen=True, eq=False, repr=False)
class SparseRows:
    """Which weights of a matrix exist, in the order in which kernels go through them.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    starts
        ``(ranges · rows + 1,)`` int32: where the non-zeros of each row begin, in the first range of columns, then in
        the next.
    places
        ``(nonzeros,)`` int16: columns, counted from the first of their range.
    order
        ``(nonzeros,)`` int32: which value stands where; None if the values lie in this order.
    """

    shape: tuple[int, int]
    starts: Tensor
    places: Tensor
    order: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparseRows:
        """Index of the matrix itself, whose values are in row-major order.

        Parameters
        ----------
        mask
            ``(rows, columns)`` bool, True where a weight exists.
        """
        _check_mask(mask)
        return cls((len(mask), mask.shape[1]), *_starts_and_places(mask), _order_of_rows(mask))

    @classmethod
    def transposed(cls, mask: Tensor) -> SparseRows:
        """Index of the transpose, ``(columns, rows)``, for the same values in the same order.

        Parameters
        ----------
        mask
            ``(rows, columns)`` bool, True where a weight of the matrix exists.
        """
        _check_mask(mask)
        return cls((mask.shape[1], len(mask)), *_starts_and_places(mask.t()), _order_of_columns(mask))

    @property
    def nonzeros(self) -> int:
        """How many weights exist."""
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        parts = (self.starts, self.places, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{type(self).__name__}({rows} × {columns}, {self.nonzeros} weights)"

    def positions(self) -> Tensor:
        """Where each value stands in the flat matrix of this shape, ``(nonzeros,)`` int64, in the order of values."""
        rows, columns = self.shape
        width = width_of(columns)
        counts = self.starts.diff().to(torch.int64)
        line = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        column = line // max(1, rows) * width + self.places.to(torch.int64)
        flat = line % max(1, rows) * columns + column
        if self.order is None:
            return flat
        found = torch.empty_like(flat)
        found[self.order.to(torch.int64)] = flat
        return found

    def mask(self) -> Tensor:
        """``(rows, columns)`` bool, True where a weight exists."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.starts.device)
        mask.view(-1)[self.positions()] = True
        return mask

    def expand(self, values: Tensor) -> Tensor:
        """The dense matrix, ``(rows, columns)`` in the dtype of the values."""
        dense = values.new_zeros(self.shape)
        dense.view(-1)[self.positions()] = values
        return dense

    def multiply(self, values: Tensor, x: Tensor, bias: Tensor | None = None, threads: int | None = None) -> Tensor:
        """Products of the matrix with vectors.

        Parameters
        ----------
        values
            ``(nonzeros,)``.
        x
            ``(positions, columns)``, or images as ``(images, columns, positions)``.
        bias
            ``(rows,)``.
        threads
            How many; by default as many as torch uses. The result does not depend on it.

        Returns
        -------
        Tensor
            ``(positions, rows)`` or ``(images, rows, positions)``. Compiled code needs float32 on the CPU; anything
            else is multiplied by torch with the dense matrix.

        Raises
        ------
        ConfigurationError
            If shapes do not fit.
        """
        self._check(values, x)
        rows = self.shape[0]
        if bias is not None and bias.shape != (rows,):
            raise ConfigurationError(f"bias is {tuple(bias.shape)}; {rows} rows take ({rows},)")
        if not _compiled(self, values, x, bias) or 0 in (*x.shape, rows):
            return _dense_product(self.expand(values), x, bias)
        x, images, positions = _laid_out(x)
        result = x.new_empty((positions, rows) if x.ndim == 2 else (images, rows, positions))
        native().sparse_multiply(
            *self._address(),
            _address(values.detach().contiguous()),
            _address(None if bias is None else bias.detach().contiguous()),
            *(images, positions, x.data_ptr(), *_strides(x), result.data_ptr(), *_strides(result)),
            threads or torch.get_num_threads(),
        )
        return result

    def outer(self, x: Tensor, outputs: Tensor, threads: int | None = None) -> Tensor:
        """Gradient of the values: Σ over positions of ``outputs[:, row] · x[:, column]``, for each non-zero.

        Parameters
        ----------
        x
            ``(positions, columns)``, or images as ``(images, columns, positions)``.
        outputs
            Gradient of the products, ``(positions, rows)`` or ``(images, rows, positions)``.
        threads
            As in :meth:`multiply`.

        Returns
        -------
        Tensor
            ``(nonzeros,)``, in the order of values.

        Raises
        ------
        ConfigurationError
            If shapes do not fit.
        """
        self._check(None, x)
        rows = self.shape[0]
        expected = (len(x), rows) if x.ndim == 2 else (len(x), rows, x.shape[2])
        if outputs.shape != expected:
            raise ConfigurationError(f"outputs are {tuple(outputs.shape)}; inputs of {tuple(x.shape)} give {expected}")
        if not _compiled(self, x, outputs) or 0 in (*x.shape, rows, self.nonzeros):
            dense = outputs.t() @ x if x.ndim == 2 else torch.einsum("nrp,ncp->rc", outputs, x)
            return dense.reshape(-1)[self.positions()]
        x, images, positions = _laid_out(x)
        outputs, _, _ = _laid_out(outputs)
        gradient = x.new_empty(self.nonzeros)
        native().sparse_outer(
            *self._address(),
            *(images, positions, x.data_ptr(), *_strides(x), outputs.data_ptr(), *_strides(outputs)),
            *(gradient.data_ptr(), threads or torch.get_num_threads()),
        )
        return gradient

    def _address(self) -> tuple[int, ...]:
        rows, columns = self.shape
        places = (_address(self.starts), _address(self.places), _address(self.order))
        return (rows, columns, width_of(columns), *places)

    def _check(self, values: Tensor | None, x: Tensor) -> None:
        if values is not None and values.shape != (self.nonzeros,):
            raise ConfigurationError(f"values are {tuple(values.shape)}; {self!r} takes ({self.nonzeros},)")
        if x.ndim not in (2, 3) or x.shape[1] != self.shape[1]:
            raise ConfigurationError(
                f"x is {tuple(x.shape)}; give (positions, {self.shape[1]}) or (images, {self.shape[1]}, positions)"
            )

    def validate(self, name: str = "sparse rows") -> None:
        """Check every part against every other.

        Raises
        ------
        CheckpointError
            If counts or indices contradict each other, so that a kernel would read where nothing is.
        """
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name}: {problem}; make the index again from the mask")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        width = width_of(columns)
        lines = -(-columns // width) * rows
        if self.starts.shape != (lines + 1,) or self.starts.dtype != torch.int32:
            return f"starts are {tuple(self.starts.shape)} {self.starts.dtype} instead of ({lines + 1},) int32"
        if int(self.starts[0]) or int(self.starts[-1]) != self.nonzeros or bool((self.starts.diff() < 0).any()):
            return f"starts do not rise from 0 to {self.nonzeros}"
        if self.places.dtype != torch.int16 or (self.nonzeros and not int(self.places.min()) >= 0):
            return f"places are {self.places.dtype} and must be int16 from 0 on"
        line = torch.arange(lines).repeat_interleave(self.starts.diff())
        if bool((self.places + line // max(1, rows) * width >= columns).any()) or bool((self.places >= width).any()):
            return f"a place is outside its range of {width} of {columns} columns"
        if self.order is not None and not torch.equal(
            self.order.sort().values, torch.arange(self.nonzeros, dtype=torch.int32)
        ):
            return f"order is no permutation of {self.nonzeros} values"
        return None


def width_of(columns: int) -> int:
    """Columns of a range, so that ranges are equally wide."""
    ranges = max(1, -(-columns // WIDTH))
    return max(1, -(-columns // ranges))


def _check_mask(mask: Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ConfigurationError(f"the mask is {tuple(mask.shape)} {mask.dtype}; give (rows, columns) bool")
    if mask.count_nonzero() >= 1 << 31:
        raise ConfigurationError(f"{int(mask.count_nonzero())} weights are kept; an index of 32 bits has {1 << 31}")


def _starts_and_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    ranges = mask.split(width_of(mask.shape[1]), 1) if mask.shape[1] else ()
    starts = torch.zeros(len(ranges) * len(mask) + 1, dtype=torch.int32)
    places = torch.empty(0, dtype=torch.int16)
    if ranges:
        starts[1:] = torch.cat([part.sum(1) for part in ranges]).cumsum(0)
        places = torch.cat([part.nonzero()[:, 1].to(torch.int16) for part in ranges])
    return starts, places


def _order_of_rows(mask: Tensor) -> Tensor | None:
    """Which value stands where in ranges of columns; None if there is but one range."""
    ranges = mask.split(width_of(mask.shape[1]), 1) if mask.shape[1] else ()
    if len(ranges) < 2:
        return None
    order = []
    begin = mask.sum(1).cumsum(0) - mask.sum(1)  # of what is left of every row
    for part in ranges:
        counts = part.sum(1)
        shift = begin - (counts.cumsum(0) - counts)
        order.append((torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)).to(torch.int32))
        begin = begin + counts
    return torch.cat(order)


def _order_of_columns(mask: Tensor) -> Tensor | None:
    """Which value stands where if columns are the lines, in ranges of rows; None if that is the order of rows too."""
    order, begin = [torch.empty(0, dtype=torch.int32)], 0
    for part in mask.split(width_of(len(mask))) if len(mask) else ():
        count = int(part.count_nonzero())
        numbers = torch.zeros(part.shape, dtype=torch.int32)
        numbers[part] = torch.arange(begin, begin + count, dtype=torch.int32)
        order.append(numbers.t()[part.t()])
        begin += count
    joined = torch.cat(order)
    return None if torch.equal(joined, torch.arange(begin, dtype=torch.int32)) else joined


def _compiled(index: SparseRows, *tensors: Tensor | None) -> bool:
    there = [tensor for tensor in tensors if tensor is not None]
    fitting = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in there)
    return available() and fitting and index.places.device.type == "cpu"


def _laid_out(x: Tensor) -> tuple[Tensor, int, int]:
    """`x` with features or positions side by side, and its number of images and of positions."""
    x = x.detach()
    if 1 not in (x.stride(-2), x.stride(-1)):
        x = x.contiguous()
    return (x, 1, len(x)) if x.ndim == 2 else (x, len(x), x.shape[2])


def _strides(x: Tensor) -> tuple[int, int, int]:
    """From one image, position and feature to the next."""
    if x.ndim == 2:
        return 0, x.stride(0), x.stride(1)
    return x.stride(0), x.stride(2), x.stride(1)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense_product(dense: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if x.ndim == 2:
        return torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    product = torch.matmul(dense.to(x.dtype), x)
    return product if bias is None else product + bias.to(x.dtype)[:, None]
