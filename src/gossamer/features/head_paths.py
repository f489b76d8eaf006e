"""A model in which every attention head reads a residual stream of its own.

What a head reads is the sum of what all earlier parts wrote. If something is added to that sum for one head alone, an
edge between two heads can be cut, by taking out what the first writes and putting in what it would write on another
prompt; and the gradient with respect to what is added is the worth of all edges into that head.

Normalisation is computed anew for every head. Keys and values that several heads share see the mean of what is added
for those heads. What goes through feed-forward layers is not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target
from gossamer.errors import ModelError
from gossamer.features.heads import HeadGrid, last_logits
from gossamer.models.blocks import run_batch
from gossamer.models.heads import AttentionHeads

Shift = Callable[[int], Tensor | None]
"""Number of a layer → what is added to the stream that each of its heads reads, ``(batch, tokens, heads, d)``, or None.

The number after the last layer asks for what is added before the logits, ``(batch, tokens, d)``."""


class HeadPaths:
    """Runs a model with streams of their own for its heads.

    Parameters
    ----------
    model
        A causal transformer, with matrices of their own for queries, keys and values, that adds what heads write to a
        residual stream.
    tokens
        Any, ``(batch, length)``, on which it is found out what normalises the stream before attention.

    Attributes
    ----------
    outputs
        What heads have written in the latest run, ``(batch, tokens, heads, d)`` for each layer.

    Raises
    ------
    ModelError
        If queries, keys and values of a layer are made by one matrix, or there is no matrix that makes logits.
    """

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.model, self.grid = model, HeadGrid.of(model)
        self.outputs: list[Tensor] = []
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise ModelError(
                f"{type(model).__name__} does not say which matrix makes its logits: get_output_embeddings()"
            )
        for layer in self.grid.layers:
            if layer.query is None or len(layer.shared) != 2:
                raise ModelError(
                    f"{layer.name}: queries, keys and values must have matrices of their own for heads to read apart"
                )
        self._queries = [layer.query.module for layer in self.grid.layers if layer.query is not None]
        self._norms = _normalising(model, [*self._queries, head], tokens)
        self._last = self._norms[-1] or head
        self._matrices = [layer.slices() for layer in self.grid.layers]
        self._streams: dict[int, Tensor] = {}

    def run(self, tokens: Tensor, shift: Shift = lambda layer: None) -> Tensor:
        """Logits after the last token, ``(batch, vocabulary)``; gradients pass if they are enabled."""
        self.outputs = []
        with self._hooked(shift):
            return last_logits(self.model, tokens)

    @contextmanager
    def _hooked(self, shift: Shift) -> Iterator[None]:
        handles = []
        for number, layer in enumerate(self.grid.layers):
            reader = self._norms[number] or self._queries[number]
            handles.append(reader.register_forward_pre_hook(self._reading(number, shift)))
            for target in (layer.query, *layer.shared):
                if target is not None:
                    handles.append(target.module.register_forward_hook(self._making(number, layer, target)))
            handles.append(layer.output.module.register_forward_pre_hook(self._writing(number, layer)))
        handles.append(self._last.register_forward_pre_hook(self._ending(shift)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._streams.clear()

    def _reading(self, number: int, shift: Shift) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            added = shift(number)
            self._streams.pop(number, None)
            if added is not None:
                self._streams[number] = args[0].unsqueeze(2) + added

        return hook

    def _making(self, number: int, layer: AttentionHeads, target: Target) -> Any:
        """Queries, or keys or values, of streams of their own."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            streams = self._streams.get(number)
            if streams is None:
                return None
            groups = layer.count if target is layer.query else layer.groups
            streams = streams.unflatten(2, (groups, -1)).mean(3)
            norm = self._norms[number]
            # not called, so that hooks on it stay silent
            x = streams if norm is None else norm.forward(streams)
            made = torch.einsum("btgd,gsd->btgs", x, _weight(target).unflatten(0, (groups, -1)))
            bias = getattr(target.module, "bias", None)
            return made.flatten(2) if bias is None else made.flatten(2) + bias

        return hook

    def _writing(self, number: int, layer: AttentionHeads) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            z = args[0].unflatten(-1, (layer.count, -1))
            self.outputs.append(torch.einsum("bthv,hdv->bthd", z, self._matrices[number]))

        return hook

    def _ending(self, shift: Shift) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            added = shift(len(self.grid.layers))
            return None if added is None else (args[0] + added, *args[1:])

        return hook


def _weight(target: Target) -> Tensor:
    return target.parameter.t() if target.transposed else target.parameter


def _normalising(model: nn.Module, readers: list[nn.Module], tokens: Tensor) -> list[nn.Module | None]:
    """The module whose output each reader gets as it is; None if that is no module without submodules."""
    made: list[tuple[nn.Module, Tensor]] = []
    found: dict[int, nn.Module | None] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == output.shape:
            made.append((module, output))

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        found[id(module)] = next((one for one, output in reversed(made) if output is args[0]), None)

    handles = [reader.register_forward_pre_hook(read) for reader in readers]
    # what has weights of two dimensions mixes, and does not only normalise
    plain = [m for m in model.modules() if not any(m.children()) and all(p.dim() < 2 for p in m.parameters())]
    handles += [module.register_forward_hook(note) for module in plain]
    try:
        with torch.no_grad():
            run_batch(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(id(reader)) for reader in readers]
