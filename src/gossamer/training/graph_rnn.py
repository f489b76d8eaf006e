"""Recurrent networks whose wiring is a random graph.

An undirected graph becomes a network in three steps. Each edge points from the lower to the higher vertex, which
leaves no cycle. A vertex belongs to the layer that its longest path from a source reaches, and is one unit there. A
layer reads the layer below through a recurrent sub-layer of its own, and every layer further below from which an edge
jumps to it through another one, a *skip*; their outputs are added. Weights between units stand only where the graph has
an edge; within a sub-layer the recurrent weights are dense.

Sub-layers that end in one layer do not depend on each other, so that they run as one cell whose recurrent matrix is
block-diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    import networkx

Cell = Literal["tanh", "relu", "gru", "lstm"]
Readout = Literal["last", "sinks"]
_GATES: dict[str, int] = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class LayeredDAG:
    """A graph whose edges all point upwards.

    Attributes
    ----------
    layers
        Vertices of each layer, in their order; the first holds all sources.
    edges
        ``(from, to)`` between neighbouring layers.
    skips
        ``(from, to)`` over at least one layer.
    """

    layers: tuple[tuple[Hashable, ...], ...]
    edges: tuple[tuple[Hashable, Hashable], ...]
    skips: tuple[tuple[Hashable, Hashable], ...]

    @property
    def sinks(self) -> tuple[Hashable, ...]:
        """Vertices from which no edge leads further, layer by layer."""
        left = {source for source, _ in (*self.edges, *self.skips)}
        return tuple(vertex for layer in self.layers for vertex in layer if vertex not in left)

    def level(self) -> dict[Hashable, int]:
        """Vertex → number of its layer."""
        return {vertex: number for number, layer in enumerate(self.layers) for vertex in layer}


def layered_graph(graph: networkx.Graph) -> LayeredDAG:
    """Direct each edge from the lower to the higher vertex, and sort the vertices into layers.

    Darji, 2021, arXiv 2407.20601, after Stier & Granitzer, 2019, "Structural analysis of sparse neural networks".

    Parameters
    ----------
    graph
        Undirected (of a directed one, directions are ignored), with vertices that can be compared.

    Returns
    -------
    LayeredDAG
        A vertex lies as high as its longest path from a source.

    Raises
    ------
    ConfigurationError
        If there is no vertex, or an edge from a vertex to itself.
    """
    vertices = sorted(graph.nodes)
    if not vertices:
        raise ConfigurationError("the graph has no vertices; a network needs at least one")
    directed = sorted({(min(edge), max(edge)) for edge in graph.edges})
    loop = next((low for low, high in directed if low == high), None)
    if loop is not None:
        raise ConfigurationError(f"vertex {loop!r} has an edge to itself, which no layer can hold; remove it")
    below: dict[Hashable, list[Hashable]] = {vertex: [] for vertex in vertices}
    for low, high in directed:
        below[high].append(low)
    level: dict[Hashable, int] = {}
    for vertex in vertices:
        level[vertex] = 1 + max((level[source] for source in below[vertex]), default=-1)
    layers: list[list[Hashable]] = [[] for _ in range(max(level.values()) + 1)]
    for vertex in vertices:
        layers[level[vertex]].append(vertex)
    near = tuple(edge for edge in directed if level[edge[1]] - level[edge[0]] == 1)
    far = tuple(edge for edge in directed if level[edge[1]] - level[edge[0]] > 1)
    return LayeredDAG(tuple(map(tuple, layers)), near, far)


class _Layer(nn.Module):
    """All sub-layers that end in one layer: ``len(masks)`` cells of the same width side by side, outputs added.

    Parameters
    ----------
    masks
        For each sub-layer, True where a unit reads an input, ``(width, inputs of this sub-layer)``.
    cell
        Kind of the cell.
    """

    def __init__(self, masks: list[Tensor], cell: Cell):
        super().__init__()
        self.cell, self.parts, self.width = cell, len(masks), len(masks[0])
        rows = _GATES[cell] * self.parts * self.width
        # rows are ordered by gate, then sub-layer, then unit
        reads = torch.block_diag(*(mask.float() for mask in masks)).bool().repeat(_GATES[cell], 1)
        keeps = torch.block_diag(*[torch.ones(self.width, self.width)] * self.parts).bool().repeat(_GATES[cell], 1)
        self.register_buffer("mask_ih", reads)
        self.register_buffer("mask_hh", keeps)
        self.weight_ih = nn.Parameter(torch.empty(rows, reads.shape[1]))
        self.weight_hh = nn.Parameter(torch.empty(rows, keeps.shape[1]))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/√width, as torch starts a recurrent layer of this width."""
        bound = 1 / math.sqrt(self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.weight_ih *= self.mask_ih
        self.weight_hh *= self.mask_hh

    def forward(self, sequence: Tensor) -> Tensor:
        """``(steps, batch, inputs of all sub-layers)`` → ``(steps, batch, width)``; every state starts at zero."""
        # the product also masks the gradient, so that what is no edge never moves
        weights = [self.weight_ih * self.mask_ih, self.weight_hh * self.mask_hh, self.bias_ih, self.bias_hh]
        start = sequence.new_zeros(1, sequence.shape[1], self.parts * self.width)
        options = (weights, True, 1, 0.0, self.training, False, False)
        if self.cell == "lstm":
            output = torch.lstm(sequence, (start, start), *options)[0]
        else:
            run = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu, "gru": torch.gru}[self.cell]
            output = run(sequence, start, *options)[0]
        return output.unflatten(2, (self.parts, self.width)).sum(2)


@register(
    "graph-rnn",
    paper="sparse-rnn",
    when="layer",
    granularity="edges",
    needs_data=False,
    criterion=("random", "structure"),
)
class GraphRNN(nn.Module):
    """A recurrent network with the wiring of a graph.

    Darji, 2021, "Investigating Sparsity in Recurrent Neural Networks", arXiv 2407.20601.

    Parameters
    ----------
    graph
        See :func:`layered_graph`; or the layered graph itself.
    cell
        ``"tanh"``, ``"relu"``, ``"gru"`` or ``"lstm"``, with the equations of :mod:`torch.nn`.
    input_size
        Features of the input, which every source reads; by default as many as there are sources.
    batch_first
        Whether batches come before steps in input and output.
    readout
        What the output consists of: the units of the last layer, as in the author's code, or those of all sinks,
        wherever they lie.

    Raises
    ------
    UnknownNameError
        If there is no such cell or readout.
    ConfigurationError
        If the graph has no layers or `input_size` is below 1.

    Examples
    --------
    >>> import networkx
    >>> network = GraphRNN(networkx.path_graph(3), cell="gru")
    >>> output, last = network(torch.zeros(7, 2, network.input_size))
    >>> output.shape, last.shape
    (torch.Size([7, 2, 1]), torch.Size([2, 1]))
    """

    def __init__(
        self,
        graph: networkx.Graph | LayeredDAG,
        cell: Cell = "tanh",
        input_size: int | None = None,
        batch_first: bool = False,
        readout: Readout = "last",
    ):
        super().__init__()
        if cell not in get_args(Cell):
            raise UnknownNameError("recurrent cell", cell, get_args(Cell))
        if readout not in get_args(Readout):
            raise UnknownNameError("readout", readout, get_args(Readout))
        if input_size is not None and input_size < 1:
            raise ConfigurationError(f"input_size is {input_size}; it must be at least 1")
        self.structure = graph if isinstance(graph, LayeredDAG) else layered_graph(graph)
        self.cell, self.batch_first, self.readout = cell, batch_first, readout
        self.input_size = input_size or len(self.structure.layers[0])
        self.sources: list[list[int]] = []  # of each layer but the first: the layers that it reads
        layers = [_Layer([torch.ones(len(self.structure.layers[0]), self.input_size, dtype=torch.bool)], cell)]
        for number in range(1, len(self.structure.layers)):
            read = _masks_into(self.structure, number)
            self.sources.append(list(read))
            layers.append(_Layer(list(read.values()), cell))
        self.layers = nn.ModuleList(layers)
        level, last = self.structure.level(), len(layers) - 1
        read_out = self.structure.layers[last] if readout == "last" else self.structure.sinks
        self._read_out = [(level[v], self.structure.layers[level[v]].index(v)) for v in read_out]

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return len(self._read_out)

    @property
    def masks(self) -> MaskSet:
        """What the graph leaves of each weight matrix."""
        state = dict(self.named_buffers())
        return MaskSet({name.replace("mask_", "weight_"): mask.cpu() for name, mask in state.items()})

    @property
    def active_parameters(self) -> int:
        """Weights that exist, and biases."""
        return self.masks.kept + sum(value.numel() for name, value in self.named_parameters() if "bias" in name)

    def forward(self, sequence: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a batch of sequences.

        Parameters
        ----------
        sequence
            ``(steps, batch, input_size)``, or ``(batch, steps, input_size)`` with `batch_first`.
        lengths
            Steps of each sequence before its padding, ``(batch,)``, at least 1. Default: all of them.

        Returns
        -------
        output, last
            All steps, ``(steps, batch, output_size)`` (or batch first), and the last step of each sequence before its
            padding, ``(batch, output_size)``.

        Raises
        ------
        ConfigurationError
            If the input has another number of features or dimensions.
        """
        if sequence.dim() != 3 or sequence.shape[2] != self.input_size:
            raise ConfigurationError(
                f"the input has shape {tuple(sequence.shape)}; three dimensions are needed, the last {self.input_size}"
            )
        steps_first = sequence.transpose(0, 1) if self.batch_first else sequence
        results = [self.layers[0](steps_first)]
        for layer, sources in zip(self.layers[1:], self.sources):
            results.append(layer(torch.cat([results[source] for source in sources], 2)))
        output = torch.stack([results[level][:, :, unit] for level, unit in self._read_out], 2)
        end = torch.full((output.shape[1],), len(output)) if lengths is None else lengths
        last = output[end.to(output.device) - 1, torch.arange(output.shape[1], device=output.device)]
        return output.transpose(0, 1) if self.batch_first else output, last

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.output_size}, cell={self.cell}, layers={len(self.layers)}"


def _masks_into(structure: LayeredDAG, number: int) -> dict[int, Tensor]:
    """Layer → which of its units each unit of layer `number` reads, ``(units here, units there)``, nearest first."""
    here = structure.layers[number]
    level = structure.level()
    read: dict[int, Tensor] = {}
    for source, target in (*structure.edges, *structure.skips):
        if level[target] != number:
            continue
        there = structure.layers[level[source]]
        mask = read.setdefault(level[source], torch.zeros(len(here), len(there), dtype=torch.bool))
        mask[here.index(target), there.index(source)] = True
    return dict(sorted(read.items(), reverse=True))
