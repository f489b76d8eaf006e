"""R-Sparse: the channels that count exactly, all others through a few singular vectors of the weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.activations.base import (
    ActivationSparsifier,
    by_threshold,
    install,
    observe_magnitudes,
)
from gossamer.activations.evolution import Evolution
from gossamer.activations.rules import ActivationRules, LowRank
from gossamer.core.channel_rules import ChannelRule, Threshold, column_norms
from gossamer.core.magnitude_histogram import MagnitudeHistogram
from gossamer.core.progress import track
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError, SparsityError, check_sparsity
from gossamer.measure.perplexity import perplexity
from gossamer.models.activation_sites import InputSite
from gossamer.models.blocks import Batch


@dataclass(frozen=True)
class Split:
    """How a layer spends the weights that it may read.

    Attributes
    ----------
    channels
        K, the input channels that are multiplied exactly.
    rank
        r, the singular vectors for the others.
    """

    channels: int
    rank: int

    @classmethod
    def of(cls, shape: tuple[int, int], sparsity: float, alpha: float) -> Split:
        """Divide the budget n m (1 − s): K = max(1, ⌊n (1−s) α⌋), r = max(1, ⌊(budget − K m) / (n + m)⌋).

        With α = 1 nothing is left for singular vectors, with α = 0 nothing for channels.

        Parameters
        ----------
        shape
            ``(m, n)``: outputs, inputs.
        sparsity, alpha
            s, and the share of the budget that goes to channels.

        Raises
        ------
        SparsityError
            If the budget pays for neither, or the sparsity is not in [0, 1).
        """
        check_sparsity(sparsity)
        m, n = shape
        budget = n * m * (1 - sparsity)
        channels = 0 if alpha == 0 else max(1, math.floor(n * (1 - sparsity) * alpha + 1e-9))
        rank = 0 if alpha == 1 else max(1, math.floor((budget - channels * m) / (n + m) + 1e-9))
        if channels + rank == 0 or (alpha == 0 and budget < n + m):
            raise SparsityError(f"sparsity {sparsity} leaves a layer of {m} × {n} weights nothing to read; lower it")
        return cls(channels, min(rank, m, n))

    def weights_read(self, shape: tuple[int, int]) -> int:
        """K m + r (n + m)."""
        m, n = shape
        return self.channels * m + self.rank * (n + m)


@register(
    "r-sparse",
    paper="r-sparse",
    when="at inference",
    granularity="activations",
    criterion=("activation", "magnitude"),
    allocation="measured",
)
@dataclass(kw_only=True)
class RSparse(ActivationSparsifier):
    """Important channels exactly, the others through a truncated SVD [Zhang et al., 2025, arXiv 2504.19449].

    y = W (m ⊙ x) + U_r S_r V_rᵀ ((1 − m) ⊙ x), with m_j = 1[|x_j| ‖W[:, j]‖ > t], under one budget of weights read per
    token; the norm of row j of V S is that of column j of W. The share α of the budget that pays for channels is one
    number, or searched for each layer together with the layer's sparsity. At α = 1 channels are scored by |x_j| alone,
    as in the authors' code.

    W stays in memory beside its factors: :attr:`~gossamer.activations.rules.LowRank.size` more weights for each layer.

    Parameters
    ----------
    alpha
        In [0, 1], name of a layer → its own, or ``search``.
    search
        Settings of the search; the paper gives only its result, so these are ours.
    dense_prefill
        Share of a prompt that stays dense. The authors evaluate with 0.9; 1 means that only decoding is sparse.
    """

    alpha: float | Literal["search"] | Mapping[str, float] = 0.9
    search: Evolution = field(default_factory=Evolution)

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in self.alpha.values() if isinstance(self.alpha, Mapping) else [self.alpha]:
            if value != "search" and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ConfigurationError(f"alpha is {value!r}; it must be from 0 to 1, or 'search'")
        if self.allocation == "greedy":
            raise ConfigurationError("allocation is 'greedy'; R-Sparse searches its budgets with alpha='search'")

    def calibrate(
        self, model: nn.Module, data: Iterable[Batch], progress: bool = True, material: Material | None = None
    ) -> ActivationRules:
        """Decompose every weight and find every threshold; with ``alpha='search'``, the best division as well.

        `material` that was made of the same model before is used again; see the base class for the rest.
        """
        batches = self._begin(model, data)
        sites = self.sites(model)
        if isinstance(self.alpha, Mapping):
            missing = next((site.name for site in sites if site.name not in self.alpha), None)
            if missing is not None:
                raise ConfigurationError(f"alpha gives nothing for {missing!r}; give one for every layer")
        self._material = material = material or Material.of(model, batches, sites, progress)
        budget = self._budget(model, batches, sites, None, progress)
        if self.alpha == "search":
            alphas, budget = self._searched(model, batches, material, budget, progress)
        elif isinstance(self.alpha, Mapping):
            alphas = {site.name: float(self.alpha[site.name]) for site in sites}
        else:
            alphas = dict.fromkeys(budget, float(self.alpha))
        self._alphas = alphas
        return self._settled(alphas, budget)

    def at(self, sparsity: float) -> ActivationRules:
        """Rules for another sparsity, the same in all layers, with the α of the last calibration.

        Raises
        ------
        CalibrationError
            If there was no calibration yet.
        """
        check_sparsity(sparsity)
        if not hasattr(self, "_alphas"):
            raise CalibrationError("another sparsity needs a calibration before; call calibrate(model, data) first")
        self.sparsity = sparsity
        rules = self._settled(self._alphas, dict.fromkeys(self._alphas, sparsity))
        rules.settings["allocation"] = "uniform"
        return rules

    def _settled(self, alphas: dict[str, float], budget: dict[str, float]) -> ActivationRules:
        self.rules_ = self._material.rules(alphas, budget)
        self.rules_.settings, self.rules_.layers = self.settings | self.rules_.settings, self._layers
        return self.rules_

    def _searched(
        self, model: nn.Module, batches: list[Batch], material: Material, budget: dict[str, float], progress: bool
    ) -> tuple[dict[str, float], dict[str, float]]:
        tokens = [batch for batch in batches if isinstance(batch, Tensor)][: self.search.sequences]
        if not tokens:
            raise CalibrationError("alpha='search' judges by perplexity and needs batches of token ids")

        def cost(alphas: dict[str, float], budget: dict[str, float]) -> float:
            try:
                rules = material.rules(alphas, budget)
            except SparsityError:  # a layer that could read nothing
                return math.inf
            with install(model, rules, self.dense_prefill):
                window = max(part.shape[1] for part in tokens)
                return perplexity(model, tokens, window, window, progress=False).nll_per_token

        sizes = {site.name: site.size for site in material.sites}
        return self.search.run(cost, sizes, budget, progress)


@dataclass(eq=False)
class Material:
    """What rules of any division are made of: singular vectors, column norms and histograms of every layer."""

    sites: list[InputSite]
    factors: dict[str, tuple[Tensor, Tensor]]
    weighted: dict[str, MagnitudeHistogram]
    plain: dict[str, MagnitudeHistogram]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[Batch],
        sites: list[InputSite],
        progress: bool = True,
        factors: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Material:
        """Decompose, unless `factors` of the same weights are at hand, and look at the data with norms and without."""
        if factors is None:
            walk = track(sites, "singular vectors", enabled=progress)
            factors = {site.name: singular_factors(site.target.matrix()) for site in walk}
        norms = {site: column_norms(site.target.matrix()) for site in sites}
        weighted = observe_magnitudes(model, batches, norms, progress)
        plain = observe_magnitudes(model, batches, dict.fromkeys(sites), progress)
        return cls(sites, factors, weighted, plain)

    def rules(
        self, alphas: Mapping[str, float], budget: Mapping[str, float], weighted: bool = False
    ) -> ActivationRules:
        """Rules for a division of the budget of every layer; `weighted` scores by norm at α = 1 too.

        What is requested of a site is the share of its channels that K leaves out; `alphas` and `budget`, the share of
        its weights that are not read, are in the settings.
        """
        inputs, requested, low_rank = {}, {}, {}
        for site in self.sites:
            alpha, sparsity = alphas[site.name], budget[site.name]
            m, n = site.target.shape
            split = Split.of((m, n), sparsity, alpha)
            histogram = self.plain[site.name] if alpha == 1 and not weighted else self.weighted[site.name]
            dropped = 0.0 if sparsity == 0 else 1 - split.channels / n
            selection = by_threshold(histogram, dropped) if dropped < 1 else Threshold(math.inf)
            inputs[site.name], requested[site.name] = ChannelRule(selection, histogram.scale), dropped
            if split.rank and sparsity > 0:
                low_rank[site.name] = self._low_rank(site, split.rank)
        settings = {"alphas": dict(alphas), "budget": dict(budget)}
        return ActivationRules(inputs, requested=requested, low_rank=low_rank, settings=settings)

    def _low_rank(self, site: InputSite, rank: int) -> LowRank:
        """The first singular vectors; a copy, for a view would hold all of them in memory."""
        left, right = self.factors[site.name]
        dtype = site.target.parameter.dtype
        return LowRank(left[:, :rank].to(dtype, copy=True), right[:rank].to(dtype, copy=True))


def singular_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U S and Vᵀ of a matrix, decomposed in float64 and kept in float32: ``(out, r)``, ``(r, in)``."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (left * values).float(), right.float()


@torch.no_grad()
def bias_view_error(weight: Tensor, inputs: Tensor, rule: ChannelRule, levels: int) -> float:
    """How well a few constants stand in for the channels that do not count, as a share of what they contribute.

    The contributions W ((1−m) ⊙ x) of all tokens are grouped into `levels` clusters by their size along their main
    direction, and each is replaced by the mean of its cluster: a step function with that many phases.

    Parameters
    ----------
    weight
        ``(out, in)``.
    inputs
        ``(tokens, in)``.
    rule
        Which channels count.
    levels
        L ≥ 1.
    """
    if not 1 <= levels <= len(inputs):
        raise ConfigurationError(f"levels is {levels}; it must be from 1 to the {len(inputs)} tokens")
    rest = (inputs.double() * ~rule.live(inputs)) @ weight.double().T
    centred = rest - rest.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    order = (centred @ direction).argsort(stable=True)
    replaced = torch.empty_like(rest)
    for part in order.tensor_split(levels):
        replaced[part] = rest[part].mean(0)
    return float((rest - replaced).norm() / rest.norm().clamp_min(1e-300))


@torch.no_grad()
def importance_map(weight: Tensor, inputs: Tensor) -> Tensor:
    """C[i, j] = E|σ_i v_ij x_j|: what channel j brings to singular value i on average, ``(r, in)`` float64."""
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (values.unsqueeze(1) * right).abs() * inputs.double().abs().mean(0)
