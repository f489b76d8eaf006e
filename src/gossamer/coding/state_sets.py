"""The few states of the latent causes on which a truncated posterior lives.

They are ``K = {none} ∪ {every single cause} ∪ {2 to γ of the H' candidates of a point}``, always in this order: first
the empty state, then for every value that is not zero all causes alone, then the combinations of candidates by their
size. [Lücke and Eggert, 2010, Journal of Machine Learning Research 11:2855]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

LARGEST = 100_000
"""Combinations of candidates that are too many to enumerate for every point."""


def count_combinations(h_prime: int, gamma: int, values: int = 1) -> int:
    """States with 2 to γ of H' causes, each with one of so many values."""
    return sum(comb(h_prime, size) * values**size for size in range(2, gamma + 1))


@dataclass(frozen=True, eq=False)
class StateSet:
    """All combinations of 2 to γ candidates.

    Attributes
    ----------
    h_prime, gamma
        Candidates of a point, and how many of them may be active together.
    values
        What an active cause can be, without zero.
    states
        ``(states, h_prime)`` float64: the value of every candidate.
    """

    h_prime: int
    gamma: int
    values: tuple[float, ...]
    states: Tensor

    @cached_property
    def active(self) -> Tensor:
        """Which candidates are not zero, float64 ``(states, h_prime)``."""
        return (self.states != 0).to(self.states.dtype)

    @cached_property
    def value_counts(self) -> Tensor:
        """How often a state has each value, float64 ``(states, values)``."""
        counts = [(self.states == value).sum(1) for value in self.values]
        return torch.stack(counts, 1).to(self.states.dtype)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Positions ``i ≤ j`` of the candidates that a quadratic form of a state runs over."""
        first, second = torch.triu_indices(self.h_prime, self.h_prime)
        return first, second

    @cached_property
    def moments(self) -> Tensor:
        """``s_i`` and ``s_i s_j`` of every state, ``(states, h_prime + pairs)``.

        A quadratic energy of all states is one product with this matrix, and first and second moments of a posterior
        are one product with its transpose.
        """
        first, second = self.pairs
        return torch.cat([self.states, self.states[:, first] * self.states[:, second]], 1)

    def supports(self, size: int) -> Tensor:
        """Positions of the candidates that are active in the states of a size, int64 ``(states of it, size)``."""
        return torch.tensor(list(combinations(range(self.h_prime), size)), dtype=torch.int64).view(-1, size)


@lru_cache(maxsize=32)
def state_set(h_prime: int, gamma: int, values: tuple[float, ...] = (1.0,)) -> StateSet:
    """Enumerate the combinations of candidates.

    Parameters
    ----------
    h_prime, gamma
        Candidates, and the most that are active together.
    values
        What an active cause can be.

    Raises
    ------
    ConfigurationError
        If γ is not in [1, H'], or there are more than 100,000 combinations.

    Examples
    --------
    >>> len(state_set(8, 5).states)
    210
    """
    if not 1 <= gamma <= h_prime:
        raise ConfigurationError(f"gamma is {gamma} and h_prime {h_prime}; they must satisfy 1 ≤ gamma ≤ h_prime")
    count = count_combinations(h_prime, gamma, len(values))
    if count > LARGEST:
        raise ConfigurationError(
            f"h_prime {h_prime} and gamma {gamma} give {count:,} states of {len(values)} values for every point; "
            f"at most {LARGEST:,} can be enumerated: lower one of them"
        )
    if count == 0:
        return StateSet(h_prime, gamma, values, torch.zeros(0, h_prime, dtype=torch.float64))
    sizes = [_states_of(h_prime, size, values) for size in range(2, gamma + 1)]
    return StateSet(h_prime, gamma, values, torch.cat(sizes))


def _states_of(h_prime: int, size: int, values: tuple[float, ...]) -> Tensor:
    """All choices of so many candidates, and for each all choices of their values."""
    where = torch.tensor(list(combinations(range(h_prime), size)))
    chosen = torch.tensor(list(product(values, repeat=size)), dtype=torch.float64)
    states = torch.zeros(len(where), len(chosen), h_prime, dtype=torch.float64)
    states.scatter_(2, where[:, None].expand(-1, len(chosen), -1), chosen.expand(len(where), -1, -1))
    return states.flatten(0, 1)
