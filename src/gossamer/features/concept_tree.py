"""Concepts that form a tree: activations whose features are nested, with the truth known.

A concept is active with its probability, and only where its parent is. Its children exclude each other: an animal is a
dog or a cat. Children are orthogonal to their parent, but as alike among each other as one likes [Costa et al., 2025,
arXiv 2506.03093, on the benchmark of Bussmann et al., 2025, arXiv 2503.17547].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class ConceptTree:
    """A tree of two levels.

    At most one parent is active in an activation, as in the authors' tree, and at most one of its children. Values are
    ``1.5 + 0.25 · N(0, 1)``.

    Parameters
    ----------
    parents, children
        Parents, and children of each.
    leaves
        Concepts of the first level without children.
    parent_chance, leaf_chance, child_chance
        Probability of each parent, of each leaf, and of each child where its parent is active. Those of a group sum to
        1 at most.
    child_cosine, parent_cosine
        Of every two children of a parent, and of every two concepts of the first level, in [0, 1).
    seed
        Of the directions.
    """

    parents: int = 3
    children: int = 3
    leaves: int = 8
    parent_chance: float = 0.2
    leaf_chance: float = 0.05
    child_chance: float = 0.2
    child_cosine: float = 0.0
    parent_cosine: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.parents, self.children) < 1 or self.leaves < 0:
            raise ConfigurationError(
                f"parents is {self.parents}, children {self.children}, leaves {self.leaves}; give at least 1, 1 and 0"
            )
        first = self.parents * self.parent_chance + self.leaves * self.leaf_chance
        second = self.children * self.child_chance
        if max(first, second) > 1 + 1e-9:
            raise ConfigurationError(
                f"chances of the first level sum to {first:.3g}, of a parent's children to {second:.3g}; each may be "
                "1 at most, for they exclude each other"
            )
        if not 0 <= self.child_cosine < 1 or not 0 <= self.parent_cosine < 1:
            raise ConfigurationError(
                f"child_cosine is {self.child_cosine} and parent_cosine {self.parent_cosine}; both must be in [0, 1)"
            )

    @property
    def size(self) -> int:
        """Of an activation, and how many concepts there are."""
        return self.parents * (1 + self.children) + self.leaves

    @property
    def parent_of(self) -> Tensor:
        """For every concept its parent, or −1: first all of the first level, then the children of each parent."""
        first = torch.full((self.parents + self.leaves,), -1)
        return torch.cat([first, torch.arange(self.parents).repeat_interleave(self.children)])

    @property
    def active(self) -> float:
        """Mean number of concepts in an activation."""
        first = self.parents * self.parent_chance + self.leaves * self.leaf_chance
        return first + self.parents * self.parent_chance * self.children * self.child_chance

    def directions(self) -> Tensor:
        """Of all concepts, ``(size, size)``, each of length one."""
        drawn = torch.randn(self.size, self.size, generator=generator_for("directions of concepts", self.seed))
        basis = torch.linalg.qr(drawn.double()).Q
        first = self.parents + self.leaves
        groups = [basis[:first], *basis[first:].split(self.children)]
        alike = [self.parent_cosine, *[self.child_cosine] * self.parents]
        return torch.cat([_alike(group, cosine) for group, cosine in zip(groups, alike)]).float()

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw activations.

        Returns
        -------
        x, values
            ``(count, size)`` each: activations, and the value of every concept in them.
        """
        first = torch.tensor([self.parent_chance] * self.parents + [self.leaf_chance] * self.leaves)
        chosen = _one_of(first, count, generator)
        child = _one_of(torch.full((self.children,), self.child_chance), count, generator)
        has_child = (chosen < self.parents) & (child < self.children)
        active = torch.zeros(count, self.size + 1, dtype=torch.bool)
        rows = torch.arange(count)
        active[rows, torch.where(chosen < len(first), chosen, self.size)] = True
        place = len(first) + chosen * self.children + child
        active[rows, torch.where(has_child, place, self.size)] = True
        values = active[:, :-1] * (1.5 + 0.25 * torch.randn(count, self.size, generator=generator))
        return values @ self.directions(), values


def _one_of(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One of several that exclude each other for each draw; their number for none."""
    return torch.bucketize(torch.rand(count, generator=generator), chances.cumsum(0), right=True)


def _alike(orthonormal: Tensor, cosine: float) -> Tensor:
    """Directions of length one in the same space, every two with the same cosine."""
    count = len(orthonormal)
    wanted = torch.full((count, count), cosine, dtype=orthonormal.dtype)
    wanted.fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(wanted)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.t() @ orthonormal
