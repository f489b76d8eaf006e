"""Rules at work in a model: what they drop is dropped in every call, and counted, until they are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.positions import DenseTokens
from gossamer.activations.rules import ActivationRules, LowRank
from gossamer.core.channel_rules import ChannelRule, TopK
from gossamer.errors import ModelError
from gossamer.kernels.channel_products import input_sparse
from gossamer.kernels.channels import ChannelMatrix, lay_by_channels
from gossamer.measure.weights_read import WeightsRead, weights_read
from gossamer.models.activation_sites import GateSite, InputSite
from gossamer.models.rotation import rotation_size


@dataclass
class Tally:
    """Channels met and channels that counted, over all tokens to which a rule applied.

    Attributes
    ----------
    live, seen
        Counts.
    tokens
        Number of tokens.
    """

    live: int = 0
    seen: int = 0
    tokens: int = 0

    @property
    def sparsity(self) -> float:
        """Share of channels that did not count; NaN before the first token."""
        return 1 - self.live / self.seen if self.seen else float("nan")


@dataclass(eq=False)
class Site:
    """A rule in its place."""

    rule: ChannelRule
    tokens: DenseTokens
    tally: Tally
    low_rank: LowRank | None = None

    def masked(self, values: Tensor) -> Tensor:
        """`values` with zeros where channels do not count."""
        live = self.live(values)
        return torch.where(live, values, torch.zeros((), dtype=values.dtype, device=values.device))

    def live(self, values: Tensor) -> Tensor:
        """The channels that count, all of them in dense tokens; counted."""
        live = self.rule.live(values)
        dense = self.tokens.dense
        if dense is None:
            self._count(live)
            return live
        dense = dense.to(values.device)
        if values.shape[:-1] != dense.shape:
            if values.shape[:-1].numel() != dense.numel():
                raise ModelError(
                    f"an activation of shape {tuple(values.shape)} does not belong to the {dense.shape[0]} × "
                    f"{dense.shape[1]} tokens of the call, so the dense ones cannot be told; set dense_prefill=0"
                )
            dense = dense.reshape(values.shape[:-1])
        self._count(live[~dense])
        return live | dense.unsqueeze(-1)

    def _count(self, live: Tensor) -> None:
        self.tally.live += int(live.count_nonzero())
        self.tally.seen += live.numel()
        self.tally.tokens += live.shape[:-1].numel()


class Installed:
    """Rules in a model, from the moment it is made.

    Parameters
    ----------
    model
        The model.
    rules
        What calibration found.
    inputs, gates
        The sites of the model.
    dense_prefill
        Share of a prompt that stays dense; see :class:`DenseTokens`.
    kernels
        Whether layers whose rules are thresholds lay their weights by channels, in place and for good, so that calls
        of few tokens, none of them dense, read the live channels only. The parameters keep their values and shapes.

    Raises
    ------
    ModelError
        If the rules are for another model, or other rules are at work there.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: ActivationRules,
        inputs: Mapping[str, InputSite],
        gates: Mapping[str, GateSite],
        dense_prefill: float,
        kernels: bool = False,
    ):
        _check(rules, inputs, gates)
        if getattr(model, "_activation_rules", None) is not None:
            raise ModelError("other activation rules are at work in this model; call their remove() first")
        self.model, self.rules = model, rules
        self.tokens = DenseTokens(dense_prefill)
        self.sites: dict[str, Site] = {}
        self._sizes = {name: site.target for name, site in inputs.items()}
        self._gates = {name: gates[name] for name in rules.gates}
        self._handles: list[Any] = []
        try:
            self._hook(inputs, kernels)
        except BaseException:
            self.remove()
            raise
        model._activation_rules = self  # type: ignore[assignment]

    def _hook(self, inputs: Mapping[str, InputSite], kernels: bool) -> None:
        rules = self.rules
        self._handles += self.tokens.attach(self.model)
        for name, rule in rules.inputs.items():
            self.sites[name] = site = Site(rule, self.tokens, Tally(), rules.low_rank.get(name))
            thresholds = rule.thresholds(inputs[name].width) if kernels and site.low_rank is None else None
            self._handles += _hook_input(inputs[name].module, site, thresholds)
        for name, rule in rules.gates.items():
            self.sites[name] = site = Site(rule, self.tokens, Tally())
            self._handles.append(self._gates[name].activation.register_forward_hook(_masking_output(site)))

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self.model, "_activation_rules", None) is self:
            del self.model._activation_rules

    def reset(self) -> None:
        """Begin counting anew."""
        for site in self.sites.values():
            site.tally.live = site.tally.seen = site.tally.tokens = 0

    @property
    def realised(self) -> dict[str, float]:
        """Site → share of channels dropped so far, in tokens that rules apply to."""
        return {name: site.tally.sparsity for name, site in self.sites.items()}

    @property
    def weights_read(self) -> WeightsRead:
        """Weights that a token reads, over the whole model, head included."""
        live: dict[str, float] = {}
        for name, site in self.sites.items():
            share = 1 - site.tally.sparsity
            if name in self._gates:
                gate = self._gates[name]
                # a fused matrix makes gate and up, of which only up is spared
                if gate.up is not None:
                    live[gate.up.module_name] = (1 + share) / 2 if gate.up is gate.gate else share
                live[gate.layer.down.module_name] = share
            else:
                extra = site.low_rank.size / self._sizes[name].shape.numel() if site.low_rank else 0.0
                live[name] = share + extra
        return weights_read(self.model, live, rotation_size(self.model))

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _hook_input(module: nn.Module, site: Site, thresholds: Tensor | None) -> list[Any]:
    if thresholds is not None and type(module) is nn.Linear and module.weight.device.type == "cpu":
        return [_LiveChannels(module, site, thresholds)]
    if site.low_rank is None:
        return [module.register_forward_pre_hook(_masking_input(site))]
    factors = site.low_rank
    rest: list[Tensor] = []

    def before(module: nn.Module, args: tuple) -> tuple:
        kept = site.masked(args[0])
        rest.append(args[0] - kept)
        return (kept, *args[1:])

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + factors.product(rest.pop())

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


_FEW = 32  # vectors; with more, the union of what they want is nearly everything


class _LiveChannels:
    """Stands in for a linear layer: few tokens read the channels that some of them wants, many take it all."""

    def __init__(self, module: nn.Linear, site: Site, thresholds: Tensor):
        if ChannelMatrix.of_view(module.weight.detach()) is None:
            module.weight.data = lay_by_channels(module.weight)
        matrix = ChannelMatrix.of_view(module.weight.detach())
        assert matrix is not None
        self._module, self._before, dense = module, vars(module).get("forward"), module.forward
        # everything counts where a threshold is below zero, which for the kernel is no threshold but for zeros
        bounds = thresholds.clamp_min(0)

        def forward(x: Tensor) -> Tensor:
            few = x.shape[:-1].numel() <= _FEW and x.dtype in (torch.float32, torch.bfloat16)
            if not few or site.tokens.dense is not None or torch.is_grad_enabled():
                return dense(site.masked(x))
            site.live(x)
            return input_sparse(matrix, x, bounds, module.bias)

        module.forward = forward  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the layer its own product back; the layout of its weight stays."""
        if self._before is None:
            self._module.__dict__.pop("forward", None)
        else:  # someone had put another in its place before
            self._module.forward = self._before  # type: ignore[method-assign]


def _masking_input(site: Site) -> Any:
    return lambda module, args: (site.masked(args[0]), *args[1:])


def _masking_output(site: Site) -> Any:
    return lambda module, args, output: site.masked(output)


def _check(rules: ActivationRules, inputs: Mapping[str, InputSite], gates: Mapping[str, GateSite]) -> None:
    places: list[tuple[str, ChannelRule, InputSite | GateSite | None]] = [
        *((name, rule, inputs.get(name)) for name, rule in rules.inputs.items()),
        *((name, rule, gates.get(name)) for name, rule in rules.gates.items()),
    ]
    for name, rule, site in places:
        if site is None:
            raise ModelError(f"the rules are for a model with a layer {name!r}, which this one lacks; calibrate on it")
        if rule.scale is not None and len(rule.scale) != site.width:
            raise ModelError(
                f"{name}: the rule is for {len(rule.scale)} channels, this model has {site.width}; calibrate on it"
            )
        if isinstance(rule.selection, TopK) and rule.selection.keep > site.width:
            raise ModelError(
                f"{name}: the rule keeps {rule.selection.keep} channels, this model has {site.width}; calibrate on it"
            )
    for name, factors in rules.low_rank.items():
        place = inputs.get(name)
        found = (factors.left.shape[0], factors.right.shape[1])
        if place is None or name not in rules.inputs or found != tuple(place.target.shape):
            raise ModelError(
                f"{name}: the low-rank part is of {found[0]} × {found[1]} weights; calibrate on this model"
            )
