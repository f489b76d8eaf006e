"""What a forward pass leaves behind for the backward pass, in bytes, counted exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class SavedActivations:
    """Memory that autograd holds on to.

    Attributes
    ----------
    bytes
        Held at this moment.
    peak
        The most that was held at any moment so far.
    """

    bytes: int = 0
    peak: int = 0
    _holders: dict[int, int] = field(default_factory=dict, repr=False)

    def _hold(self, address: int, size: int) -> None:
        self._holders[address] = self._holders.get(address, 0) + 1
        if self._holders[address] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.bytes -= size


class _Held:
    """A tensor in the graph, which tells when the graph lets it go."""

    def __init__(self, tensor: Tensor, counts: SavedActivations):
        storage = tensor.untyped_storage()
        self.tensor, self.counts = tensor, counts
        self.place = (storage.data_ptr(), storage.nbytes())
        counts._hold(*self.place)

    def __del__(self) -> None:
        self.counts._release(*self.place)


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Count what autograd saves within the context.

    Parameters and buffers, which are there anyway, are left out, and memory that several tensors look at counts once.
    Put the forward pass inside; where something is computed again in the backward pass, that one as well.

    Parameters
    ----------
    model
        Whose parameters and buffers do not count.

    Examples
    --------
    >>> with saved_activations(model) as saved:  # doctest: +SKIP
    ...     loss = model(tokens, labels=tokens).loss
    >>> saved.bytes  # doctest: +SKIP
    """
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = SavedActivations()

    def pack(tensor: Tensor) -> Tensor | _Held:
        return tensor if tensor.untyped_storage().data_ptr() in there else _Held(tensor, found)

    def unpack(packed: Tensor | _Held) -> Tensor:
        return packed.tensor if isinstance(packed, _Held) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield found
