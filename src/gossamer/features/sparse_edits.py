"""Changing a few features of an activation so that it says something else.

Given an activation and the one that it should become, the features are exchanged whose differences bring it closest;
or those that an interpretation names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.features.dictionaries import Dictionary


@dataclass(frozen=True, eq=False)
class Edit:
    """Edited activations.

    Attributes
    ----------
    activations
        ``(n, d)``.
    features
        Which features were touched, ``(n, touched)`` int64; −1 where an activation needed fewer.
    magnitude
        Weight in the activation's reconstruction of the features that were touched, ``(n,)``; see
        :meth:`~gossamer.features.dictionaries.Dictionary.weights`.
    """

    activations: Tensor
    features: Tensor
    magnitude: Tensor


@torch.no_grad()
def greedy_edits(dictionary: Dictionary, x: Tensor, wanted: Tensor, counts: Sequence[int]) -> dict[int, Edit]:
    """Exchange the codes of a few features for those of the wanted activation.

    The features are chosen one after the other, each once, so that ``‖x' − x − Σ (f'ⱼ − fⱼ) dⱼ‖`` falls the most; none
    is taken that would make it rise. Distances are kept up to date from products of directions, O(features) a step.

    Parameters
    ----------
    dictionary
        The dictionary.
    x, wanted
        Activations, and what they should become, ``(n, d)``.
    counts
        Numbers of features for which the result is wanted.

    Returns
    -------
    dict
        Number of features → edit.

    Raises
    ------
    ConfigurationError
        If shapes differ, or a count is below 1.
    """
    if x.shape != wanted.shape or x.dim() != 2:
        raise ConfigurationError(f"x is {tuple(x.shape)}, wanted {tuple(wanted.shape)}; both must be (n, d)")
    if not counts or min(counts) < 1:
        raise ConfigurationError(f"counts are {list(counts)}; each must be 1 or more")
    codes = dictionary.encode(x)
    change = dictionary.encode(wanted) - codes
    used = (change != 0).any(0).nonzero()[:, 0]
    if not len(used):
        nothing = Edit(x.clone(), torch.full((len(x), 1), -1), x.new_zeros(len(x)))
        return dict.fromkeys(counts, nothing)
    change, vectors = change[:, used], dictionary.vectors[used]
    gram = vectors @ vectors.t()
    left = (wanted - x) @ vectors.t()
    # what is gained by a feature, ‖r‖² − ‖r − c d‖²; once used it gains nothing
    own = change.square() * gram.diagonal()
    free = torch.ones_like(change, dtype=torch.bool)
    shares = dictionary.weights(codes)[:, used]
    edited, chosen, weight = x.clone(), [], x.new_zeros(len(x))
    found: dict[int, Edit] = {}
    rows = torch.arange(len(x))
    for number in range(1, max(counts) + 1):
        gain = (2 * change * left - own).masked_fill(~free, 0)
        best = gain.max(1)
        better, pick = best.values > 0, best.indices
        amount = torch.where(better, change[rows, pick], 0)
        edited = edited + amount[:, None] * vectors[pick]
        left = left - amount[:, None] * gram[pick]
        weight = weight + torch.where(better, shares[rows, pick], 0)
        free[rows[better], pick[better]] = False
        chosen.append(torch.where(better, used[pick], -1))
        if number in counts:
            found[number] = Edit(edited, torch.stack(chosen, 1), weight)
    return found


@torch.no_grad()
def interpreted_edit(
    dictionary: Dictionary, x: Tensor, wanted: Tensor, old: Tensor, new: Tensor, f1: Tensor, count: int
) -> Edit:
    """Take out the features that best tell the old value, and put in those that best tell the new one.

    Parameters
    ----------
    dictionary
        The dictionary.
    x, wanted
        Activations, and others that have the new value, ``(n, d)``.
    old, new
        Values before and after, ``(n,)``.
    f1
        How well each feature tells each value, ``(features, values)``: see
        :func:`~gossamer.features.latent_scores.latent_f1`.
    count
        How many are taken out, and how many put in, of those that are active.

    Raises
    ------
    ConfigurationError
        If the count is below 1, or F1 is of other features.
    """
    if count < 1 or len(f1) != len(dictionary.vectors):
        raise ConfigurationError(
            f"count is {count} and F1 of {len(f1)} features; give at least 1, and {len(dictionary.vectors)} features"
        )
    codes, others = dictionary.encode(x), dictionary.encode(wanted)
    out, into = _telling(codes, f1[:, old].t(), count), _telling(others, f1[:, new].t(), count)
    kept_out, kept_in = (_marked(picked, codes.shape[1]) for picked in (out, into))
    moved = others.where(kept_in, codes.new_zeros(())) - codes.where(kept_out, codes.new_zeros(()))
    magnitude = dictionary.weights(codes).masked_fill(~kept_out, 0).sum(1)
    return Edit(x + moved @ dictionary.vectors, torch.cat([out, into], 1), magnitude)


def _telling(codes: Tensor, f1: Tensor, count: int) -> Tensor:
    """The active features of the highest F1, ``(n, count)``; −1 where fewer are active."""
    best = f1.masked_fill(codes <= 0, -1).topk(min(count, codes.shape[1]), dim=1)
    return torch.where(best.values >= 0, best.indices, -1)


def _marked(picked: Tensor, features: int) -> Tensor:
    """Where features were picked, bool ``(n, features)``; −1 picks none."""
    marks = torch.zeros(len(picked), features + 1, dtype=torch.bool)
    return marks.scatter_(1, picked % (features + 1), True)[:, :features]
