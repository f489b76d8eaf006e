"""Lottery tickets beside one-shot masks: is what costs nothing to remove also what an expensive search would remove?

Iterative magnitude pruning trains, removes the smallest of the weights that are left, rewinds the others to where
they started, and repeats. [Frankle & Carbin, 2019, arXiv 1803.03635; rewinding to a pretrained model: Chen et al.,
2020, arXiv 2007.12223]. Within the essential range its masks and those of one shot nearly coincide; beyond it they
part. :func:`mask_similarity` shows that layer by layer, next to what two unrelated masks of the same density share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.masks import MaskSet
from gossamer.core.rounds import Round, drop_lowest, prune_in_rounds
from gossamer.core.selection import dropped_count
from gossamer.core.targets import Target
from gossamer.errors import SparsityError, check_sparsity

_COMPONENTS = {
    "attention": r"attn|attention|(^|[._])[qkvo]_proj|(^|[._])(query|key|value|c_attn|out_proj)([._]|$)",
    "feed-forward": r"mlp|ffn|feed_?forward|expert|(^|[._])(fc\d*|(up|gate|down)_proj|intermediate|output)([._]|$)",
}


def iterative_magnitude_pruning(
    model: nn.Module,
    train: Callable[[nn.Module, MaskSet], Any],
    sparsities: Sequence[float],
    *,
    rewind: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
) -> list[MaskSet]:
    """Find lottery tickets of growing sparsity by training, pruning globally and rewinding, round after round.

    Parameters
    ----------
    model
        The initial or pretrained model; it is copied and stays as it is.
    train
        ``train(copy, masks)`` trains in place; removed weights are held at zero. The optimiser must be made inside.
    sparsities
        Sparsity after each round, strictly increasing in (0, 1). The usual 20% of the rest a round is
        ``1 - 0.8 ** k``.
    rewind
        Trains the copy for a while before everything starts; later rounds return to that state. By default they
        return to `model`.
    seed
        Of torch's generator in every round.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`.

    Returns
    -------
    list of MaskSet
        The ticket of each round; each is part of the one before.

    Raises
    ------
    SparsityError
        If the sparsities are not strictly increasing in (0, 1).
    NonFiniteError
        If training diverged; names the layer.
    """
    sparsities = _check_rounds(sparsities)

    def smallest(ended: Round) -> dict[str, Tensor]:
        goal = dropped_count(ended.total, sparsities[ended.number])
        return drop_lowest(ended.alive, ended.scores(_magnitude), goal - (ended.total - ended.remaining))

    return prune_in_rounds(
        model,
        train,
        smallest,
        len(sparsities),
        rewind=rewind,
        seed=seed,
        include=include,
        exclude=exclude,
        heads=heads,
    )


def _check_rounds(sparsities: Sequence[float]) -> list[float]:
    rounds = [float(check_sparsity(s, f"sparsities[{i}]")) for i, s in enumerate(sparsities)]
    if not rounds or any(after <= before for before, after in pairwise([0.0, *rounds])):
        raise SparsityError(f"sparsities is {rounds}; one for each round is needed, strictly increasing in (0, 1)")
    return rounds


def _magnitude(target: Target) -> Tensor:
    target.check_finite()
    return scores.magnitude(target.matrix())


def mask_similarity(a: MaskSet, b: MaskSet) -> list[dict[str, Any]]:
    """Compare two sets of masks layer by layer.

    Returns
    -------
    list of dict
        A row for each parameter: ``layer``, ``weights``, ``sparsity_a``, ``sparsity_b``, ``jaccard`` (kept by both
        over kept by either), ``cosine`` (of the masks as 0/1 vectors), and ``chance``, the Jaccard index to be
        expected of unrelated masks of these densities. ``pandas.DataFrame(rows)`` makes a table of them.

    Raises
    ------
    TargetError
        If the sets cover different parameters.
    """
    a.distance(b)  # raises where they do not compare
    rows = []
    for name in a:
        first, second = MaskSet({name: a[name]}), MaskSet({name: b[name]})
        both = first.density * second.density
        either = first.density + second.density - both
        rows.append(
            {
                "layer": name,
                "weights": first.total,
                "sparsity_a": first.sparsity,
                "sparsity_b": second.sparsity,
                "jaccard": first.jaccard(second),
                "cosine": first.cosine(second),
                "chance": both / either if either else 1.0,
            }
        )
    return rows


def layer_profile(masks: MaskSet) -> list[dict[str, Any]]:
    """Which weights go: a row for each parameter, in order.

    Returns
    -------
    list of dict
        ``layer``, ``component`` (``attention``, ``feed-forward`` or ``other``, by name), ``weights``, ``sparsity``,
        and ``share``, its part of all the zeros.
    """
    zeros = {name: round(share * masks.shapes[name].numel()) for name, share in masks.layer_sparsity().items()}
    total = sum(zeros.values()) or 1
    return [
        {
            "layer": name,
            "component": _component(name),
            "weights": masks.shapes[name].numel(),
            "sparsity": count / max(1, masks.shapes[name].numel()),
            "share": count / total,
        }
        for name, count in zeros.items()
    ]


def component_profile(masks: MaskSet) -> dict[str, float]:
    """Component (attention, feed-forward, other) → its sparsity."""
    weights: dict[str, float] = {}
    zeros: dict[str, float] = {}
    for row in layer_profile(masks):
        weights[row["component"]] = weights.get(row["component"], 0) + row["weights"]
        zeros[row["component"]] = zeros.get(row["component"], 0) + row["weights"] * row["sparsity"]
    return {component: zeros[component] / size for component, size in weights.items()}


def _component(name: str) -> str:
    return next((kind for kind, words in _COMPONENTS.items() if re.search(words, name.lower())), "other")
