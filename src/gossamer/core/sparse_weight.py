"""What a layer must offer whose zeros are not stored at all, for its topology to be changed while it trains."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class SparseWeight(nn.Module):
    """A layer that holds the non-zeros of its weight matrix as one list, in row-major order.

    Attributes
    ----------
    values
        The non-zeros, ``(nnz,)``. The parameter stays the same object when the topology changes.
    collect_gradient
        Whether the next backward passes also add up the gradient of the whole matrix, zeros included.
    dense_gradient
        That gradient, ``(out, in)``, or None.
    apart
        Whether the layer averages the gradient of its values over all ranks by itself; see
        :func:`gossamer.core.ranks.leave_out_of_ddp`.
    """

    values: nn.Parameter
    collect_gradient: bool
    dense_gradient: Tensor | None
    apart: bool = False

    @abstractmethod
    def mask(self) -> Tensor:
        """Which weights there are, ``(out, in, kernel…)`` bool."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight with its zeros, ``(out, in, kernel…)``, detached; a copy."""

    @abstractmethod
    def set_mask(self, mask: Tensor) -> Tensor:
        """Change which weights there are; grown ones start at zero, and a gradient is dropped.

        Returns
        -------
        Tensor
            int64, for every new value its place among the old ones, −1 where it has grown.
        """

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """The same layer with its zeros stored."""
