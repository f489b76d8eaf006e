"""Random graphs, the numbers that describe them, and a study that puts these beside what their networks are worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigurationError, MissingDependencyError, UnknownNameError
from gossamer.training.graph_rnn import layered_graph

if TYPE_CHECKING:
    import networkx


def random_graph(kind: str, nodes: int, seed: int) -> networkx.Graph:
    """A connected random graph as the thesis draws them.

    Parameters
    ----------
    kind
        ``"watts-strogatz"``: a ring of n/5 neighbours of which every edge is rewired; ``"barabasi-albert"``: each new
        vertex attaches to n/10 others, sooner to those with many edges.
    nodes
        At least 10.
    seed
        Of networkx' generator.

    Raises
    ------
    MissingDependencyError
        If networkx is not installed.
    ConfigurationError
        If there are fewer than 10 nodes.
    UnknownNameError
        If there is no such kind.
    """
    nx = _networkx("drawing a random graph")
    if nodes < 10:
        raise ConfigurationError(f"nodes is {nodes}; both kinds of graphs need at least 10 to have edges")
    if kind == "watts-strogatz":
        return nx.connected_watts_strogatz_graph(nodes, nodes // 5, 1.0, seed=seed)
    if kind == "barabasi-albert":
        return nx.barabasi_albert_graph(nodes, nodes // 10, seed=seed)
    raise UnknownNameError("kind of random graph", kind, ["watts-strogatz", "barabasi-albert"])


def graph_features(graph: networkx.Graph) -> dict[str, float]:
    """Numbers that describe a graph and its layers, as the thesis collects them.

    Parameters
    ----------
    graph
        Undirected, connected, with at least three vertices.

    Returns
    -------
    dict of str to float
        Number of layers, nodes, edges, sources and sinks, width of the last layer, diameter, density of the directed
        graph, average length of a shortest path; and mean, sample variance and standard deviation of eccentricity,
        degree centrality, closeness, betweenness of nodes and of edges.

    Raises
    ------
    MissingDependencyError
        If networkx is not installed.
    ConfigurationError
        If the graph is not connected, or too small for a variance.
    """
    nx = _networkx("describing a graph")
    nodes, edges = graph.number_of_nodes(), graph.number_of_edges()
    if nodes < 3 or not nx.is_connected(graph):
        raise ConfigurationError(
            f"a graph of {nodes} vertices and {edges} edges has no distances between all of them; "
            f"it must be connected, with at least 3 vertices"
        )
    structure = layered_graph(graph)
    eccentricity = nx.eccentricity(graph)
    features: dict[str, float] = {
        "layers": len(structure.layers),
        "nodes": nodes,
        "edges": edges,
        "sources": len(structure.layers[0]),
        "sinks": len(structure.sinks),
        "last_layer": len(structure.layers[-1]),
        "diameter": max(eccentricity.values()),
        "density": edges / (nodes * (nodes - 1)),
        "average_shortest_path": nx.average_shortest_path_length(graph),
    }
    measures: dict[str, Mapping[Any, float]] = {
        "eccentricity": eccentricity,
        "degree": nx.degree_centrality(graph),
        "closeness": nx.closeness_centrality(graph),
        "node_betweenness": nx.betweenness_centrality(graph),
        "edge_betweenness": nx.edge_betweenness_centrality(graph),
    }
    for name, measure in measures.items():
        values = list(measure.values())
        features[f"{name}_mean"] = statistics.fmean(values)
        features[f"{name}_variance"] = statistics.variance(values)
        features[f"{name}_deviation"] = statistics.stdev(values)
    return features


def structure_study(
    generator: Callable[[int], networkx.Graph],
    n_graphs: int,
    train_fn: Callable[[networkx.Graph, int], Mapping[str, float]],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[dict[str, float]]:
    """Train a network on each of many graphs, and put what came out beside what the graph is like.

    Parameters
    ----------
    generator
        Number of the graph → graph.
    n_graphs
        How many.
    train_fn
        Graph and its number → named results, such as ``{"gru": 0.97}``.
    progress
        Wraps the numbers, to show how far it is.

    Returns
    -------
    list of dict
        One row a graph: its features and results; ``pandas.DataFrame(rows)`` makes a table of it.

    Raises
    ------
    ConfigurationError
        If there is nothing to do, or a result has the name of a feature.
    """
    if n_graphs < 1:
        raise ConfigurationError(f"n_graphs is {n_graphs}; at least 1 is needed")
    rows = []
    for number in progress(range(n_graphs)):
        graph = generator(number)
        features, results = graph_features(graph), dict(train_fn(graph, number))
        shared = features.keys() & results.keys()
        if shared:
            raise ConfigurationError(f"a result is called {min(shared)!r}, which is a feature of the graph; rename it")
        rows.append(features | results)
    return rows


def _networkx(purpose: str) -> Any:
    try:
        import networkx as nx
    except ImportError as error:
        raise MissingDependencyError("networkx", "graphs", purpose) from error
    return nx
