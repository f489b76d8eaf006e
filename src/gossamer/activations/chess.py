"""CHESS: thresholds of their own for the channels of a gate, and attention sparsified where errors do not last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.activations.base import ActivationSparsifier, by_threshold, observe_magnitudes
from gossamer.activations.rules import ActivationRules
from gossamer.core.channel_rules import ChannelRule, column_norms
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure.runs import run_over
from gossamer.models.activation_sites import GateSite, InputSite, SiteRole, find_gate_sites, find_input_sites
from gossamer.models.blocks import Batch

Attention = Literal["selective", "all", "none"]
_ATTENTION_ROLES: dict[Attention, tuple[SiteRole, ...]] = {
    "selective": ("q", "o"),
    "all": ("q", "k", "v", "qkv", "o"),
    "none": (),
}


@register(
    "chess",
    paper="chess",
    when="at inference",
    granularity="activations",
    criterion=("activation",),
)
@dataclass(kw_only=True)
class Chess(ActivationSparsifier):
    """Close a gate where gate times what usually comes through it is small [He et al., 2024, arXiv 2409.01366].

    A gated feed-forward layer computes W_down (a ⊙ u), with a = act(W_gate x) and u = W_up x. Deciding by a alone which
    u need not be computed costs (a_i u_i)² at channel i, of which u_i² is not known yet; its mean over calibration
    tokens, M_i, takes its place. The importance of a channel is a_i² M_i, one bound τ on it drops the given share over
    all channels and tokens of a layer, and a channel's threshold on |a_i| is √(τ / M_i). In attention only the inputs
    of query and output matrices are thresholded: errors of keys and values would stay in the cache.

    The paper's τ is the mean of the quantiles of groups of four sequences, which bounds the memory of sorting; here it
    is the quantile over all of the data, from a histogram.

    Parameters
    ----------
    attention
        ``selective`` (query and output), ``all``, or ``none`` ("CHESS w/o").
    channel_thresholds
        False for one threshold on |a| for all channels of a layer, which is CATS [Lee et al., 2024, arXiv 2404.08763].
    use_down_norm
        Whether M_i also counts the norm of the column of W_down, which the paper takes to be about constant.
    """

    attention: Attention = "selective"
    channel_thresholds: bool = True
    use_down_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in _ATTENTION_ROLES:
            raise ConfigurationError(f"attention is {self.attention!r}; it must be selective, all or none")
        if self.use_down_norm and not self.channel_thresholds:
            raise ConfigurationError("use_down_norm is set, but a single threshold counts no norms; drop one of them")
        if self.allocation != "uniform":
            raise ConfigurationError(
                f"allocation is {self.allocation!r}; CHESS has one sparsity for all layers: uniform"
            )

    def sites(self, model: nn.Module) -> list[InputSite]:  # noqa: D102
        roles = _ATTENTION_ROLES[self.attention]
        return find_input_sites(model, roles, self.include, self.exclude) if roles else []

    def calibrate(self, model: nn.Module, data: Iterable[Batch], progress: bool = True) -> ActivationRules:
        """Two passes: the moments M of what the gates let through, then the thresholds; see the base class."""
        batches = self._begin(model, data)
        gates, sites = find_gate_sites(model, self.include, self.exclude), self.sites(model)
        scales = self._scales(model, batches, gates, progress) if self.channel_thresholds else dict.fromkeys(gates)
        self._sites, self._gates = sites, gates
        self._histograms = observe_magnitudes(model, batches, {**dict.fromkeys(sites), **scales}, progress)
        return self._settle(dict.fromkeys(self._histograms, self.sparsity))

    def _settle(self, budget: dict[str, float]) -> ActivationRules:
        found = {
            name: ChannelRule(by_threshold(histogram, self.sparsity), histogram.scale)
            for name, histogram in self._histograms.items()
        }
        gates = {gate.name: _with_scale(found.pop(gate.name), gate.width) for gate in self._gates}
        self.rules_ = ActivationRules(
            found, gates, dict.fromkeys(self._histograms, self.sparsity), settings=self.settings, layers=self._layers
        )
        return self.rules_

    def _scales(
        self, model: nn.Module, data: Sequence[Batch], gates: list[GateSite], progress: bool
    ) -> dict[GateSite, Tensor | None]:
        """√M of every gate, ``(m,)`` float32; None where nothing is gated, which leaves bfloat16 values as they are."""
        moments = partner_moments(model, data, gates, progress)
        scales: dict[GateSite, Tensor | None] = {}
        for gate in gates:
            moment = moments.get(gate.name)
            if self.use_down_norm:
                norms = column_norms(gate.layer.down.matrix()).double().square().cpu()
                moment = norms if moment is None else moment * norms
            scales[gate] = None if moment is None else moment.sqrt().float()
        return scales


def _with_scale(rule: ChannelRule, width: int) -> ChannelRule:
    """The same rule with a scale, which says how wide the gate is."""
    return ChannelRule(rule.selection, torch.ones(width)) if rule.scale is None else rule


def partner_moments(
    model: nn.Module, data: Sequence[Batch], gates: Sequence[GateSite], progress: bool = True
) -> dict[str, Tensor]:
    """M_i = E[u_i²] over all tokens, name of a gated layer → ``(m,)`` float64."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    handles = []

    def add(name: str, values: Tensor) -> None:
        rows = values.detach().float().reshape(-1, values.shape[-1])
        sums[name] = (
            sums.get(name, torch.zeros(rows.shape[1], dtype=torch.float64)) + rows.square().sum(0).double().cpu()
        )
        tokens[name] = tokens.get(name, 0) + len(rows)

    for gate in gates:
        if gate.up is None:
            continue
        if gate.up is not gate.gate:
            hook = lambda module, args, output, name=gate.name: add(name, output)  # noqa: E731
            handles.append(gate.called(gate.up).register_forward_hook(hook))
        else:
            handles += _watch_fused(gate, add)
    try:
        run_over(model, data, "moments of gated channels", progress)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


def _watch_fused(gate: GateSite, add: object) -> list[object]:
    """Gate and up from one matrix: up is the half that the activation function does not get."""
    halves: list[Tensor] = []

    def split(module: nn.Module, args: tuple, output: Tensor) -> None:
        halves[:] = output.chunk(2, dim=-1)

    def choose(module: nn.Module, args: tuple) -> None:
        first, second = halves
        if not any(_same(args[0], half) for half in halves):
            raise ModelError(
                f"{gate.name}: its activation function gets neither half of the fused matrix, so the partner is not "
                f"known; choose a method that works on the inputs of layers, such as 'teal'"
            )
        add(gate.name, second if _same(args[0], first) else first)  # type: ignore[operator]

    return [gate.called(gate.gate).register_forward_hook(split), gate.activation.register_forward_pre_hook(choose)]


def _same(one: Tensor, other: Tensor) -> bool:
    # NaN is for calibration to report
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
