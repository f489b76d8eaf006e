"""A tree of drafted tokens in one key-value cache: each token sees the text and its own ancestors, and no sibling."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DraftTree:
    """Tokens with their parents; token 0 is the root, which is part of the text.

    Parameters
    ----------
    tokens
        Ids, in the order in which they came; at first the root.
    parents
        Place of the token that each follows; −1 for the root.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])

    def add(self, token: int, parent: int) -> int:
        """Append a token behind another; returns its place."""
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def path(self, place: int) -> list[int]:
        """Places from the root to a token, both included."""
        found = []
        while place >= 0:
            found.append(place)
            place = self.parents[place]
        return found[::-1]

    def words(self, place: int) -> list[int]:
        """Token ids from behind the root to a token."""
        return [self.tokens[p] for p in self.path(place)[1:]]

    def pruned(self, leaves: list[int]) -> tuple[DraftTree, list[int]]:
        """The tree with the ancestors of some tokens only, and the new places of these tokens."""
        kept = sorted({place for leaf in leaves for place in self.path(leaf)})
        new = {old: place for place, old in enumerate(kept)}
        tree = DraftTree([self.tokens[p] for p in kept], [new.get(self.parents[p], -1) for p in kept])
        return tree, [new[leaf] for leaf in leaves]

    def inputs(
        self, places: list[int], slots: dict[int, int], base: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a call of the model over some of the tokens needs.

        Parameters
        ----------
        places
            The tokens to compute.
        slots
            Place → entry in the cache, counted from `base`, of all tokens computed so far and of these.
        base
            Entries of the text.
        like
            A tensor with the dtype of the mask, on its device.

        Returns
        -------
        tuple of Tensor
            Ids ``(1, n)``, positions ``(1, n)``, and an additive mask ``(1, 1, n, base + entries)``.
        """
        mask = torch.full((len(places), base + len(slots)), torch.finfo(like.dtype).min, dtype=like.dtype)
        mask[:, :base] = 0
        depths = []
        for row, place in enumerate(places):
            path = self.path(place)
            depths.append(base + len(path) - 1)
            mask[row, [base + slots[ancestor] for ancestor in path]] = 0
        ids = torch.tensor([[self.tokens[place] for place in places]], device=like.device)
        return ids, torch.tensor([depths], device=like.device), mask[None, None].to(like.device)
