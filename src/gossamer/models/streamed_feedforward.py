"""Feed-forward layers whose whole matrices live elsewhere and come in one layer ahead of their use.

A model that does not fit on its device can keep there what every token needs (attention, embeddings, norms, and feed
forward layers cut down to some channels) and two buffers, each as large as one layer. While a layer computes from one
buffer, the next one's matrices are copied into the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError
from gossamer.models.feedforward import FeedForward
from gossamer.models.offload import is_offloaded

_ALIGNED = 256  # bytes


class StreamedFeedForwards:
    """Feed-forward layers that are streamed in for calls with whole matrices, until :meth:`remove`.

    While a :class:`~gossamer.models.sliced_feedforward.SlicedFeedForward` is in a layer, nothing moves. With CUDA the
    matrices are pinned in the host's memory, and copies run beside the computation.

    Parameters
    ----------
    model
        All of it but the matrices of `layers` is copied to `device`; these stay where they are.
    layers
        Of the model, in the order of their use; from
        :func:`~gossamer.models.feedforward_search.find_feed_forwards`.
    device
        Where the model computes.

    Attributes
    ----------
    device
        The same.
    bytes_moved
        Bytes of matrices that have been copied in so far.
    buffer_bytes
        Of the two buffers together.

    Raises
    ------
    ConfigurationError
        If there are no layers or no such device, accelerate streams the model already, or another streaming is at work.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FeedForward], device: torch.device | str):
        if not layers:
            raise ConfigurationError("there are no feed-forward layers to stream; find_feed_forwards(model) names them")
        if is_offloaded(model):
            raise ConfigurationError(
                "accelerate streams this model's weights already, and does so for whole calls only; leave offload out"
            )
        if any("_streamed" in vars(layer.module) for layer in layers):
            raise ConfigurationError("the layers of this model are streamed already; call remove() there first")
        self.device = _device(device)
        self.bytes_moved = 0
        self._layers = list(layers)
        self._homes = [[_home(target, self.device) for target in layer.targets] for layer in self._layers]
        self._before = _moved(model, {id(home) for homes in self._homes for home in homes}, self.device)
        largest = max(_places(homes)[-1] for homes in self._homes)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._holds: list[int | None] = [None, None]
        self._pace = _Pace(self.device)
        self._handles: list[Any] = []
        for number, layer in enumerate(self._layers):
            vars(layer.module)["_streamed"] = self
            self._handles.append(layer.module.register_forward_pre_hook(self._bringing(number)))
            self._handles.append(layer.module.register_forward_hook(self._leaving(number), always_call=True))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.numel() for buffer in self._buffers)

    def remove(self) -> None:
        """Bring everything back to where it was; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            vars(layer.module).pop("_streamed", None)
        for stored, name, tensor in self._before:
            stored[name] = tensor
        self._before, self._buffers = [], []

    def _bringing(self, number: int) -> Any:
        def before(module: nn.Module, args: tuple) -> None:
            if self._cut(number):
                return
            slot = self._slot(number)
            self._pace.wait(slot)
            for target, values in zip(self._layers[number].targets, self._views(number, slot)):
                target.module._parameters[target.attribute] = nn.Parameter(values, requires_grad=False)
            self._slot((number + 1) % len(self._layers), other_than=slot)

        return before

    def _leaving(self, number: int) -> Any:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if self._cut(number) or number not in self._holds:
                return
            for target, home in zip(self._layers[number].targets, self._homes[number]):
                target.module._parameters[target.attribute] = home
            self._pace.used(self._holds.index(number))

        return after

    def _cut(self, number: int) -> bool:
        return "_sliced" in vars(self._layers[number].down.module)

    def _slot(self, number: int, other_than: int | None = None) -> int:
        """The buffer that holds a layer, after copying it there if none does."""
        if number in self._holds:
            return self._holds.index(number)
        slot = 1 - other_than if other_than is not None else 0
        with self._pace.copying(slot):
            for values, home in zip(self._views(number, slot), self._homes[number]):
                values.copy_(home.detach(), non_blocking=True)
                self.bytes_moved += home.nbytes
        self._holds[slot] = number
        return slot

    def _views(self, number: int, slot: int) -> list[Tensor]:
        """Tensors in a buffer for the matrices of a layer."""
        homes = self._homes[number]
        places = _places(homes)
        return [
            self._buffers[slot][begin : begin + home.nbytes].view(home.dtype).view(home.shape)
            for begin, home in zip(places, homes)
        ]


class _Pace:
    """Who waits for whom: a layer for its copy, and a copy for the layer that computes from its buffer."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[Any] = [None, None]
        self._used: list[Any] = [None, None]
        for slot in range(2):
            self.used(slot)  # what the memory of the buffers was before

    @contextmanager
    def copying(self, slot: int) -> Iterator[None]:
        """Have the copies into a buffer run beside the computation."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(self._used[slot])
        with torch.cuda.stream(self._stream):
            yield
            self._copied[slot] = self._stream.record_event()

    def wait(self, slot: int) -> None:
        """Let the computation wait for what is copied into a buffer."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[slot])

    def used(self, slot: int) -> None:
        """Note that a buffer has been computed from."""
        if self._stream is not None:
            self._used[slot] = torch.cuda.current_stream(self._stream.device).record_event()


def _device(wanted: torch.device | str) -> torch.device:
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigurationError(f"offload is {wanted!r}, which is no device; give one such as 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"offload is {wanted!r}, but torch finds no GPU; leave offload out")
    return device


def _moved(model: nn.Module, staying: set[int], device: torch.device) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put copies on a device in the place of parameters and buffers; returns where which were before."""
    before = []
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        of_module: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for stored in of_module:
            for name, tensor in stored.items():
                if tensor is None or id(tensor) in staying or tensor.device == device:
                    continue
                if id(tensor) not in copies:  # tied ones stay tied
                    there = tensor.detach().to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(there, requires_grad=False) if is_parameter else there
                before.append((stored, name, tensor))
                stored[name] = copies[id(tensor)]
    return before


def _home(target: Target, device: torch.device) -> nn.Parameter:
    parameter = target.parameter
    if device.type == "cuda" and parameter.device.type == "cpu":
        parameter.data = parameter.data.pin_memory()
    return parameter


def _places(homes: Sequence[Tensor]) -> list[int]:
    """Where each matrix begins in a buffer, and where the last one ends."""
    return [0, *accumulate(-(-home.nbytes // _ALIGNED) * _ALIGNED for home in homes)]
