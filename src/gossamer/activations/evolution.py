"""Evolving the division of a budget: which share of each layer's weights is read as channels, and how many in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.progress import track
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError

Cost = Callable[[dict[str, float], dict[str, float]], float]
"""From the α and the sparsity of every layer to what is to be small."""


@dataclass(frozen=True)
class Evolution:
    """An evolutionary search of (α, s) for every layer.

    The best quarter of each generation lives on; the others are children of two of them, with each layer's pair from
    either, moved by up to `mutation` with probability `mutation_rate`; then sparsities are shifted so that the weights
    read stay the same in total. One of the first genomes has α = 1 everywhere, another one α = 0.9.

    Attributes
    ----------
    population, generations
        Size of the search.
    kept
        Share of each generation that lives on.
    mutation, mutation_rate
        Largest change, and how often.
    sequences
        Calibration sequences by which genomes are judged.
    seed
        Of all draws.
    """

    population: int = 32
    generations: int = 5
    kept: float = 0.25
    mutation: float = 0.1
    mutation_rate: float = 0.1
    sequences: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 4 or self.generations < 1:
            raise ConfigurationError(
                f"population is {self.population}, generations {self.generations}; there must be at least 4 and 1"
            )
        if not 0 < self.kept < 1 or self.sequences < 1:
            raise ConfigurationError(
                f"kept is {self.kept}, sequences {self.sequences}; they must be between 0 and 1, and at least 1"
            )

    def run(
        self, cost: Cost, sizes: dict[str, int], budget: dict[str, float], progress: bool = True
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The best α and sparsities found, by layer.

        Parameters
        ----------
        cost
            What to make small.
        sizes
            Weights of each layer.
        budget
            Sparsity of each layer to start from; the weights read in total stay as they are here.
        """
        generator = generator_for("evolution of activation budgets", self.seed)
        names = list(budget)
        weights = torch.tensor([float(sizes[name]) for name in names], dtype=torch.float64)
        start = torch.tensor([budget[name] for name in names], dtype=torch.float64)
        genomes = self._first(start, weights, generator)
        scored: list[tuple[float, int, Tensor]] = []
        survivors = min(max(2, round(self.kept * self.population)), self.population - 1)
        born = 0
        for generation in track(range(self.generations + 1), "evolving budgets", enabled=progress):
            for genome in genomes:
                named = _named(names, genome)
                scored.append((cost(*named), born, genome))
                born += 1
            scored = sorted(scored, key=lambda item: item[:2])[:survivors]
            if generation < self.generations:
                parents = [genome for _, _, genome in scored]
                genomes = [self._child(parents, start, weights, generator) for _ in range(self.population - survivors)]
        return _named(names, scored[0][2])

    def _first(self, start: Tensor, weights: Tensor, generator: torch.Generator) -> list[Tensor]:
        genomes = [torch.stack([torch.full_like(start, alpha), start]) for alpha in (1.0, 0.9)]
        while len(genomes) < self.population:
            alpha = torch.rand(start.shape, generator=generator, dtype=torch.float64)
            genomes.append(self._balanced(torch.stack([alpha, start]), start, weights))
        return genomes

    def _child(self, parents: list[Tensor], start: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        first, second = torch.randperm(len(parents), generator=generator)[:2].tolist()
        from_first = torch.rand(start.shape, generator=generator) < 0.5
        child = torch.where(from_first, parents[first], parents[second])
        moved = torch.rand(child.shape, generator=generator) < self.mutation_rate
        change = (2 * torch.rand(child.shape, generator=generator, dtype=torch.float64) - 1) * self.mutation
        return self._balanced(child + change * moved, start, weights)

    def _balanced(self, genome: Tensor, start: Tensor, weights: Tensor) -> Tensor:
        """Clamp, and shift the sparsities until the weights read are those of the start."""
        # a start beyond the usual bounds moves them, or its total could not be kept
        low, high = min(0.02, float(start.min())), max(0.95, float(start.max()))
        alpha, sparsity = genome[0].clamp(0, 1), genome[1].clamp(low, high)
        wanted = (start * weights).sum()
        for _ in range(50):
            gap = (wanted - (sparsity * weights).sum()) / weights.sum()
            if abs(gap) < 1e-12:
                break
            sparsity = (sparsity + gap).clamp(low, high)
        return torch.stack([alpha, sparsity])


def _named(names: list[str], genome: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    alphas, sparsities = genome.tolist()
    return dict(zip(names, alphas)), dict(zip(names, sparsities))
