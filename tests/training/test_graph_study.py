from __future__ import annotations

import networkx
import pytest

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.training.graph_study import graph_features, random_graph, structure_study


def graph_of(*edges):
    graph = networkx.Graph()
    graph.add_edges_from(edges)
    return graph


DIAMOND = graph_of((0, 2), (0, 3), (1, 3), (2, 4), (4, 1))


def test_features_of_a_path_are_those_worked_out_by_hand():
    features = graph_features(networkx.path_graph(3))
    expected = {"layers": 3, "nodes": 3, "edges": 2, "sources": 1, "sinks": 1, "last_layer": 1, "diameter": 2}
    assert {name: features[name] for name in expected} == expected
    assert features["density"] == pytest.approx(2 / 6)
    assert features["average_shortest_path"] == pytest.approx(4 / 3)
    assert features["eccentricity_mean"] == pytest.approx(5 / 3)
    assert features["eccentricity_variance"] == pytest.approx(1 / 3)
    assert features["degree_mean"] == pytest.approx(2 / 3)
    assert features["closeness_mean"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert features["node_betweenness_mean"] == pytest.approx(1 / 3)
    assert features["edge_betweenness_mean"] == pytest.approx(2 / 3)
    assert features["edge_betweenness_deviation"] == 0
    assert len(features) == 24


def test_graphs_without_distances_are_refused():
    with pytest.raises(ConfigurationError, match="connected"):
        graph_features(graph_of((0, 1), (2, 3)))
    with pytest.raises(ConfigurationError, match="at least 3"):
        graph_features(graph_of((0, 1)))


def test_random_graphs_repeat_by_seed_and_have_the_edges_of_their_kind():
    ring, again = (random_graph("watts-strogatz", 20, 3) for _ in range(2))
    assert set(ring.edges) == set(again.edges)
    assert ring.number_of_edges() == 20 * (20 // 5) // 2
    grown = random_graph("barabasi-albert", 30, 3)
    assert grown.number_of_edges() == 3 * (30 - 3)
    assert networkx.is_connected(ring)
    with pytest.raises(ConfigurationError, match="nodes is 9"):
        random_graph("barabasi-albert", 9, 0)
    with pytest.raises(UnknownNameError, match="watts-strogatz"):
        random_graph("watts-strogats", 20, 0)


def test_a_study_puts_results_beside_features():
    rows = structure_study(lambda n: random_graph("watts-strogatz", 10 + n, n), 3, lambda graph, n: {"accuracy": n / 2})
    assert [row["accuracy"] for row in rows] == [0, 0.5, 1]
    assert [row["nodes"] for row in rows] == [10, 11, 12]
    with pytest.raises(ConfigurationError, match="'edges'"):
        structure_study(lambda n: DIAMOND, 1, lambda graph, n: {"edges": 1.0})
    with pytest.raises(ConfigurationError, match="n_graphs is 0"):
        structure_study(lambda n: DIAMOND, 0, lambda graph, n: {})
