"""Dictionaries judged by their directions: against the truth where it is known, and by how alike their features are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Recovery:
    """True directions and the learned ones that stand for them.

    Attributes
    ----------
    partner
        For every true direction the number of the learned one, int64 ``(true,)``; no learned one stands for two.
    cosine
        Absolute cosine of both, ``(true,)``.
    """

    partner: Tensor
    cosine: Tensor


def recovery(learned: Tensor, truth: Tensor) -> Recovery:
    """Match learned to true directions one to one, so that the sum of absolute cosines is largest.

    Parameters
    ----------
    learned, truth
        ``(features, d)`` and ``(true, d)``, of any lengths; at least as many learned ones.

    Raises
    ------
    ConfigurationError
        If there are fewer learned than true directions, or their sizes differ.
    """
    from scipy.optimize import linear_sum_assignment

    if learned.shape[1:] != truth.shape[1:] or len(learned) < len(truth):
        raise ConfigurationError(
            f"learned is {tuple(learned.shape)} and truth {tuple(truth.shape)}; give at least as many, of one size"
        )
    cosines = (_unit(truth) @ _unit(learned).t()).abs()
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    partner = torch.from_numpy(columns)[torch.from_numpy(rows).argsort()]
    return Recovery(partner, cosines.gather(1, partner[:, None])[:, 0])


def highest_cosines(learned: Tensor, truth: Tensor, chunk: int = 4096) -> Tensor:
    """Cosine of every true direction with the learned one that is nearest, ``(true,)``; several may share one."""
    own = _unit(learned)
    return torch.cat([(_unit(part) @ own.t()).amax(1) for part in truth.split(chunk)])


def absorption(learned: Tensor, truth: Tensor, parents: Tensor) -> Tensor:
    """How much of a parent the features of its children contain, beyond what the true ones do.

    A dictionary absorbs a parent if the feature of a child points to the sum of both, and the parent's own feature
    stays silent beside it.

    Parameters
    ----------
    learned, truth
        As for :func:`recovery`.
    parents
        Number of every true direction's parent, or −1, int64 ``(true,)``.

    Returns
    -------
    Tensor
        For every child: cosine of its feature, with the sign of its match, with the true parent, less that of the true
        child with the parent.
    """
    found = recovery(learned, truth).partner
    children = (parents >= 0).nonzero()[:, 0]
    true, own = _unit(truth), _unit(learned)[found]
    own = own * (own * true).sum(1, keepdim=True).sign()
    above = true[parents[children]]
    return (own[children] * above).sum(1) - (true[children] * above).sum(1)


def interference(learned: Tensor, truth: Tensor) -> float:
    """Root mean square difference of the cosines among matched features from those among the true ones."""
    found = recovery(learned, truth)
    true, own = _unit(truth), _unit(learned)[found.partner]
    own = own * (own * true).sum(1, keepdim=True).sign()
    off = ~torch.eye(len(true), dtype=torch.bool)
    return float((own @ own.t() - true @ true.t())[off].square().mean().sqrt())


def babel(dictionary: Tensor, most: int, chunk: int = 2048) -> Tensor:
    """The Babel function of a dictionary, ``μ₁(m)`` for m from 1 to `most`.

    The largest sum of absolute cosines of any feature with any m others [Tropp, 2004]. μ₁(1) is the coherence; matching
    pursuit finds every code of m features if ``μ₁(m − 1) + μ₁(m) < 1``.

    Parameters
    ----------
    dictionary
        ``(features, d)``.
    most
        Largest m, below the number of features.
    chunk
        Features that are compared with all others at a time.
    """
    if not 0 < most < len(dictionary):
        raise ConfigurationError(f"most is {most}; it must be from 1 to {len(dictionary) - 1}, one less than features")
    atoms = _unit(dictionary)
    found = atoms.new_zeros(most)
    for first in range(0, len(atoms), chunk):
        cosines = (atoms[first : first + chunk] @ atoms.t()).abs()
        rows = torch.arange(len(cosines))
        cosines[rows, first + rows] = -1
        found = torch.maximum(found, cosines.topk(most, dim=1).values.cumsum(1).amax(0))
    return found


def co_selected_babel(codes: SparseCodes, dictionary: Tensor) -> Tensor:
    """The same for the features that are active together, ``(rows,)``: the largest sum of one with all others.

    A dictionary may be highly coherent as a whole and yet choose features for a token that hardly overlap; then they
    are orthogonal conditionally [Costa et al., 2025, arXiv 2506.03093]. Rows with fewer than two features are 0.
    """
    atoms = _unit(dictionary)
    found = atoms.new_zeros(len(codes))
    for row in range(len(codes)):
        chosen = atoms[codes.indices[codes.starts[row] : codes.starts[row + 1]].long()]
        if len(chosen) > 1:
            found[row] = ((chosen @ chosen.t()).abs().sum(1) - 1).max()
    return found


@dataclass(frozen=True, eq=False)
class Modalities:
    """Where features of two kinds of inputs, such as images and their captions, are active.

    Attributes
    ----------
    first, second
        Share of the inputs of each kind in which every feature is active, ``(features,)``.
    """

    first: Tensor
    second: Tensor

    @property
    def score(self) -> Tensor:
        """``|p − q| / (p + q)``: 0 is shared evenly, 1 belongs to one kind alone; NaN where a feature is dead."""
        return (self.first - self.second).abs() / (self.first + self.second)

    @property
    def shared(self) -> int:
        """Features that are active in both kinds."""
        return int(((self.first > 0) & (self.second > 0)).sum())


def modalities(codes: SparseCodes, is_first: Tensor) -> Modalities:
    """Where the features of inputs of two kinds are active.

    Parameters
    ----------
    codes
        Of inputs of both kinds.
    is_first
        Which are of the first kind, bool ``(rows,)``.

    Raises
    ------
    ConfigurationError
        If one kind is missing, or there is not one entry for every row.
    """
    if is_first.shape != (len(codes),) or not 0 < int(is_first.sum()) < len(codes):
        raise ConfigurationError(
            f"is_first has shape {tuple(is_first.shape)} and {int(is_first.sum())} of the first kind; give one "
            f"for each of {len(codes)} rows, of both kinds"
        )
    active = codes.values.detach() > 0
    kinds = is_first[codes.row_of]
    shares = []
    for kind in (True, False):
        counted = torch.bincount(codes.indices[active & (kinds == kind)], minlength=codes.width)
        shares.append(counted.float() / int((is_first == kind).sum()))
    return Modalities(*shares)


def _unit(directions: Tensor) -> Tensor:
    return normalize(directions.detach().float().cpu(), dim=1)
