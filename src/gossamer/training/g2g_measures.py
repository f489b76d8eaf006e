"""What the wiring of a network in groups is like: how modular, with which degrees, with how many paths.

Followed over a run in which edges move, these numbers tell whether training keeps the plan that it started with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.core.sparse_training import SparseTraining
from gossamer.errors import ConfigurationError


def wiring_measures(mask: Tensor, out_groups: Tensor, in_groups: Tensor) -> dict[str, float]:
    """How modular the edges of a layer are.

    Parameters
    ----------
    mask
        ``(out, in)`` bool.
    out_groups, in_groups
        Group of each unit.

    Returns
    -------
    dict of str to float
        ``inter_fraction``: share of edges between groups; ``modularity``: share of edges within groups less what
        chance gives for the same degrees (Barber, 2007, for bipartite graphs); ``assortativity``: the same as a share
        of the most that is possible (Newman, 2003); mean, standard deviation, least and largest ``in_degree`` (edges of
        an output unit) and ``out_degree`` (of an input unit).

    Raises
    ------
    ConfigurationError
        If groups do not fit the mask, or it has no edge.
    """
    if mask.dim() != 2 or mask.shape != (len(out_groups), len(in_groups)) or not mask.any():
        raise ConfigurationError(
            f"the mask has shape {tuple(mask.shape)} and {int(mask.sum())} edges; it must have edges, and be "
            f"({len(out_groups)}, {len(in_groups)}) as the groups are"
        )
    number = int(max(out_groups.max(), in_groups.max())) + 1
    member = [nn.functional.one_hot(groups, number).double() for groups in (out_groups, in_groups)]
    share = member[0].t() @ mask.double() @ member[1] / mask.sum()
    within, by_chance = float(share.trace()), float(share.sum(1) @ share.sum(0))
    measures = {
        "inter_fraction": 1 - within,
        "modularity": within - by_chance,
        "assortativity": (within - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0,
    }
    for name, degrees in (("in_degree", mask.sum(1).double()), ("out_degree", mask.sum(0).double())):
        measures[f"{name}_mean"] = float(degrees.mean())
        measures[f"{name}_deviation"] = float(degrees.std(correction=0))
        measures[f"{name}_least"] = float(degrees.min())
        measures[f"{name}_largest"] = float(degrees.max())
    return measures


def path_count(masks: Sequence[Tensor]) -> float:
    """Number of paths from any input to any output, through masks ``(out, in)`` in the order of the layers.

    Raises
    ------
    ConfigurationError
        If a layer does not follow on the one before.
    """
    paths: Tensor | None = None
    for number, mask in enumerate(masks):
        if paths is not None and mask.shape[1] != len(paths):
            raise ConfigurationError(f"layer {number} reads {mask.shape[1]} units, and {len(paths)} come before it")
        paths = mask.double().sum(1) if paths is None else mask.double() @ paths
    if paths is None:
        raise ConfigurationError("no mask is given, and so there are no paths; at least one is needed")
    return float(paths.sum())


def group_measures(training: SparseTraining) -> dict[str, dict[str, float]]:
    """:func:`wiring_measures` of every layer that :class:`G2G` follows, by the groups that it started with."""
    extra: dict[str, Any] = training.extra
    return {
        name: wiring_measures(
            training.mask(name).flatten(2).any(2) if training.mask(name).dim() > 2 else training.mask(name),
            extra[f"groups of {name}, out"],
            extra[f"groups of {name}, in"],
        )
        for name in training.targets
    }
