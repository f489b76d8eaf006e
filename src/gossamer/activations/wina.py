"""WINA: an input channel counts by its magnitude times the norm of the weights that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.activations.base import ActivationSparsifier, by_threshold, by_top_k
from gossamer.core.channel_rules import ChannelRule, Selection, column_norms
from gossamer.core.magnitude_histogram import MagnitudeHistogram
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.models.activation_sites import ROLES, InputSite, SiteRole, find_input_sites
from gossamer.models.rotation import is_rotated


@register(
    "wina",
    paper="wina",
    when="at inference",
    granularity="activations",
    criterion=("activation", "magnitude"),
    allocation="measured",
)
@dataclass(kw_only=True)
class Wina(ActivationSparsifier):
    """Skip input channels by |x_j| · ‖W[:, j]‖₂ [Chen et al., 2025, arXiv 2505.19427, algorithm 1].

    What dropping channels costs, ‖W x − W (m ⊙ x)‖², is the sum of (x_j ‖W[:, j]‖)² over them if the columns are
    orthogonal, so that keeping the largest scores is the best choice there is. In a model rotated by
    :func:`gossamer.models.rotation.orthogonalise` the key and gate matrices have such columns (or those that they are
    fused with, or the one that widens where there is no gate), and only they are scored by norm, the other layers by
    magnitude; in any other model, all layers are scored by norm.

    Parameters
    ----------
    gate
        ``topk`` keeps the same number of channels for every token, ``threshold`` a quantile over the calibration.
    norm_sites
        Roles of the layers scored by norm; None for the rule above.
    """

    gate: Literal["topk", "threshold"] = "topk"
    norm_sites: Sequence[SiteRole] | None = None
    dense_prefill: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in ("topk", "threshold"):
            raise ConfigurationError(f"gate is {self.gate!r}; it must be topk or threshold")
        for role in self.norm_sites or ():
            if role not in ROLES:
                raise UnknownNameError("role of a layer", role, ROLES)

    def sites(self, model: nn.Module) -> list[InputSite]:  # noqa: D102
        if self.norm_sites is not None:
            self._by_norm: Sequence[SiteRole] = self.norm_sites
        elif not is_rotated(model):
            self._by_norm = ROLES
        else:
            gated = any(site.role == "gate" for site in find_input_sites(model))
            self._by_norm = ("k", "qkv", "gate", "gate_up") if gated else ("k", "qkv", "gate_up", "up")
        return super().sites(model)

    def scale(self, site: InputSite) -> Tensor | None:  # noqa: D102
        return column_norms(site.target.matrix()) if site.role in self._by_norm else None

    def selection(self, histogram: MagnitudeHistogram, width: int, sparsity: float) -> Selection:  # noqa: D102
        return by_top_k(width, sparsity) if self.gate == "topk" else by_threshold(histogram, sparsity)


@torch.no_grad()
def output_error(weight: Tensor, inputs: Tensor, rule: ChannelRule) -> Tensor:
    """‖W x − W (m ⊙ x)‖₂ of each token, ``(…,)`` float64: what a rule costs at a layer.

    Parameters
    ----------
    weight
        ``(out, in)``.
    inputs
        ``(…, in)``.
    rule
        The rule.
    """
    dropped = inputs.double() * ~rule.live(inputs)
    return (dropped @ weight.double().T).norm(dim=-1)


@torch.no_grad()
def error_bound(weight: Tensor, inputs: Tensor, rule: ChannelRule) -> Tensor:
    """An upper bound of :func:`output_error`: the norms of the dropped contributions times how much columns overlap.

    ‖Σ x_j W_j‖² ≤ λ_max(C) Σ (x_j ‖W_j‖)² over the dropped j, with C the matrix of cosines between columns, whose
    largest eigenvalue is 1 when they are orthogonal. The bound is then attained.
    """
    wide = weight.double()
    norms = wide.norm(dim=0)
    directions = wide / norms.clamp_min(torch.finfo(torch.float64).tiny)
    overlap = torch.linalg.matrix_norm(directions, 2)
    dropped = inputs.double() * norms * ~rule.live(inputs)
    return overlap * dropped.norm(dim=-1)
