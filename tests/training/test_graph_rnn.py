from __future__ import annotations

import sys

import networkx
import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError, MissingDependencyError, UnknownNameError
from gossamer.training.graph_rnn import GraphRNN, LayeredDAG, layered_graph
from gossamer.training.graph_study import random_graph

CELLS = ["tanh", "relu", "gru", "lstm"]


def graph_of(*edges, nodes=()):
    graph = networkx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


#     4        layer 2: 4 reads 2 (edge) and 1 (skip)
#   2   3      layer 1: both read 0, 3 reads 1 too and leads nowhere
#   0   1      layer 0
DIAMOND = graph_of((0, 2), (0, 3), (1, 3), (2, 4), (4, 1))


def test_a_vertex_lies_as_high_as_its_longest_path():
    structure = layered_graph(DIAMOND)
    assert structure.layers == ((0, 1), (2, 3), (4,))
    assert structure.edges == ((0, 2), (0, 3), (1, 3), (2, 4))
    assert structure.skips == ((1, 4),)
    assert structure.sinks == (3, 4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["watts-strogatz", "barabasi-albert"])
def test_layers_agree_with_the_generations_of_networkx(kind, seed):
    graph = random_graph(kind, 23, seed)
    structure = layered_graph(graph)
    directed = networkx.DiGraph((min(edge), max(edge)) for edge in graph.edges)
    assert structure.layers == tuple(tuple(sorted(g)) for g in networkx.topological_generations(directed))
    assert sorted(structure.edges + structure.skips) == sorted(directed.edges)
    level = structure.level()
    assert all(level[high] - level[low] == 1 for low, high in structure.edges)
    assert all(level[high] - level[low] > 1 for low, high in structure.skips)


def test_what_cannot_be_layered_is_refused():
    with pytest.raises(ConfigurationError, match="no vertices"):
        layered_graph(networkx.Graph())
    with pytest.raises(ConfigurationError, match="vertex 1 has an edge to itself"):
        layered_graph(graph_of((0, 1), (1, 1)))


def unit_by_unit(network, sequence):
    """What the network computes, from the graph: a cell of torch for each sub-layer, dense, under a mask."""
    structure, results = network.structure, []
    level = structure.level()
    for number, layer in enumerate(network.layers):
        read = [sequence] if number == 0 else [results[source] for source in network.sources[number - 1]]
        ends = torch.tensor([0, *(part.shape[2] for part in read)]).cumsum(0).tolist()
        total = 0
        for part, inputs in enumerate(read):
            mask = torch.ones(layer.width, inputs.shape[2], dtype=torch.float64)
            if number:
                there = structure.layers[network.sources[number - 1][part]]
                edges = set(structure.edges + structure.skips)
                mask = torch.tensor(
                    [[float((low, high) in edges) for low in there] for high in structure.layers[number]]
                )
            cell = dense_cell(network.cell, layer, part, slice(ends[part], ends[part + 1]), mask)
            state, outputs = None, []
            for step in inputs:
                state = cell(step, state)
                outputs.append(state[0] if network.cell == "lstm" else state)
            total = total + torch.stack(outputs)
        results.append(total)
    last = structure.layers[-1] if network.readout == "last" else structure.sinks
    return torch.stack([results[level[v]][:, :, structure.layers[level[v]].index(v)] for v in last], 2)


def dense_cell(kind, layer, part, columns, mask):
    """The cell of one sub-layer; its gates have other sub-layers' rows between them."""
    options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
    build = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind]
    cell = build(mask.shape[1], layer.width, **options).double()
    gates = cell.weight_hh.shape[0] // layer.width
    rows = [(gate * layer.parts + part) * layer.width + unit for gate in range(gates) for unit in range(layer.width)]
    own = slice(part * layer.width, (part + 1) * layer.width)
    with torch.no_grad():
        cell.weight_ih.copy_(layer.weight_ih[rows, columns] * mask.repeat(gates, 1))
        cell.weight_hh.copy_(layer.weight_hh[rows, own])
        cell.bias_ih.copy_(layer.bias_ih[rows])
        cell.bias_hh.copy_(layer.bias_hh[rows])
    return cell


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("readout", ["last", "sinks"])
def test_the_network_is_a_dense_one_under_masks(cell, readout):
    torch.manual_seed(0)
    for graph in (DIAMOND, random_graph("watts-strogatz", 14, 2), random_graph("barabasi-albert", 20, 1)):
        network = GraphRNN(graph, cell, readout=readout).double()
        with torch.no_grad():  # what is no edge must not matter, even if somebody writes to it
            for layer in network.layers:
                layer.weight_ih[~layer.mask_ih] = 7.0
                layer.weight_hh[~layer.mask_hh] = -3.0
        sequence = torch.randn(6, 3, network.input_size, dtype=torch.float64)
        expected = unit_by_unit(network, sequence)
        output, last = network(sequence)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(last, expected[-1])


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_no_edge_stays_zero_through_training(cell):
    torch.manual_seed(0)
    network = GraphRNN(random_graph("watts-strogatz", 16, 0), cell)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.1)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(5, 8, network.input_size))[1].square().sum().backward()
        optimizer.step()
    masks = network.masks
    assert not masks.violations(network)
    moved = {name: value != before[name] for name, value in network.named_parameters()}
    assert all(moved[name][mask].float().mean() > 0.5 for name, mask in masks.items())


def test_weights_are_counted_by_the_edges():
    network = GraphRNN(DIAMOND, "gru")
    reading = 2 * 2 + len(DIAMOND.edges)  # two sources that read two features, and an edge each
    recurrent = 2 * 2 + 2 * 2 + 1 + 1  # the last unit has a cell for the edge and one for the skip
    assert network.masks.kept == 3 * (reading + recurrent)
    assert network.active_parameters == 3 * (reading + recurrent) + 2 * 3 * (2 + 2 + 1 + 1)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_change_the_last_state(cell):
    torch.manual_seed(0)
    network = GraphRNN(DIAMOND, cell, input_size=3)
    short, long = torch.randn(4, 1, 3), torch.randn(7, 1, 3)
    padded = torch.zeros(7, 2, 3)
    padded[:4, :1], padded[:, 1:] = short, long
    _, last = network(padded, torch.tensor([4, 7]))
    torch.testing.assert_close(last, torch.cat([network(short)[1], network(long)[1]]))


def test_batches_may_come_first():
    torch.manual_seed(0)
    network = GraphRNN(DIAMOND, "lstm", readout="sinks")
    other = GraphRNN(DIAMOND, "lstm", batch_first=True, readout="sinks")
    other.load_state_dict(network.state_dict())
    sequence = torch.randn(5, 4, network.input_size)
    torch.testing.assert_close(other(sequence.transpose(0, 1))[0], network(sequence)[0].transpose(0, 1))
    assert network.output_size == 2


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"cell": "elman"}, UnknownNameError, "elman"),
        ({"readout": "first"}, UnknownNameError, "first"),
        ({"input_size": 0}, ConfigurationError, "input_size is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, named):
    with pytest.raises(error, match=named):
        GraphRNN(DIAMOND, **arguments)


def test_an_input_of_another_width_is_named():
    with pytest.raises(ConfigurationError, match=r"\(5, 2, 3\).*last 2"):
        GraphRNN(DIAMOND)(torch.zeros(5, 2, 3))


def test_without_networkx_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gossamer\[graphs\]'"):
        random_graph("watts-strogatz", 20, 0)
    structure = LayeredDAG(((0,), (1,)), ((0, 1),), ())
    assert GraphRNN(structure)(torch.zeros(2, 1, 1))[0].shape == (2, 1, 1)
