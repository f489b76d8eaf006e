"""Rules at work in a model: what they drop is dropped in every call, and counted, until they are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.positions import DenseTokens, token_stacks
from gossamer.activations.rules import ActivationRules, LowRank
from gossamer.core.backward_passes import recomputing
from gossamer.core.channel_rules import ChannelRule, GroupTopK, TopK
from gossamer.errors import ModelError
from gossamer.kernels import channels_triton
from gossamer.kernels.channel_products import input_sparse
from gossamer.kernels.channels import DEVICES, ChannelMatrix, lay_by_channels
from gossamer.measure.weights_read import WeightsRead, weights_read
from gossamer.models.activation_sites import GateSite, InputSite, RuleAtWork, rules_at_work
from gossamer.models.rotation import rotation_size


@dataclass
class Tally:
    """Channels met and channels that counted, over all tokens to which a rule applied.

    Attributes
    ----------
    live
        How many counted, int64 where the activations are, so that counting waits for no device.
    seen
        How many there were.
    tokens
        Number of tokens.
    """

    live: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    seen: int = 0
    tokens: int = 0

    def add(self, live: Tensor, tokens: int) -> None:
        """Count the channels of some tokens, ``(…, n)`` bool."""
        self.live = self.live.to(live.device) + live.count_nonzero()
        self.seen += tokens * live.shape[-1]
        self.tokens += tokens

    @property
    def sparsity(self) -> float:
        """Share of channels that did not count; NaN before the first token."""
        return 1 - int(self.live) / self.seen if self.seen else float("nan")


@dataclass(eq=False)
class Site(RuleAtWork):
    """A rule in its place; its methods are hooks, so that a copy of the model has sites of its own."""

    rule: ChannelRule
    tokens: DenseTokens
    tally: Tally
    low_rank: LowRank | None = None
    _rest: Tensor | None = field(default=None, repr=False)

    def masked(self, values: Tensor) -> Tensor:
        """`values` with zeros where channels do not count."""
        live = self.live(values)
        return torch.where(live, values, torch.zeros((), dtype=values.dtype, device=values.device))

    def live(self, values: Tensor) -> Tensor:
        """The channels that count, all of them in dense tokens; counted, but not when they are computed again."""
        self.rule = self.rule.to(values.device)
        live, dense = self.rule.live(values), self.tokens.among(values)
        if not recomputing():
            if dense is None:
                self.tally.add(live, live.shape[:-1].numel())
            else:
                self.tally.add(live & ~dense, self.tokens.sparse)
        return live if dense is None else live | dense

    def mask_input(self, module: nn.Module, args: tuple) -> tuple:
        """Before the layer: leave out channels, and keep them where something else computes with them."""
        kept = self.masked(args[0])
        if self.low_rank is not None:
            self._rest = args[0] - kept
        return (kept, *args[1:])

    def mask_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """After an activation function."""
        return self.masked(output)

    def add_rest(self, module: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
        """After the layer: what the other channels contribute, through few directions; nothing where it has failed."""
        rest, self._rest = self._rest, None
        if output is None or rest is None:
            return None
        self.low_rank = self.low_rank.to(rest.device, rest.dtype)  # type: ignore[union-attr]
        return output + self.low_rank.product(rest)


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
        Share of a prompt that stays dense; see :class:`DenseTokens`. It is for the tokens of a language model: layers
        outside of its stacks, such as those of an encoder of images, have no dense ones.
    kernels
        Whether layers whose rules are thresholds lay their weights by channels, in place and for good, so that calls
        of few tokens, none of them dense, read the live channels only. The parameters keep their values and shapes; a
        weight that is replaced later is multiplied in full, with the same result, if it lies otherwise. On a GPU this
        needs Triton.

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
        rules.check_model(model)
        _check(rules, inputs, gates)
        if rules_at_work(model):
            raise ModelError("other activation rules are at work in this model; call their remove() first")
        self.model, self.rules = model, rules
        self.tokens = DenseTokens(dense_prefill)
        self._stacks = {name: (self.tokens, owner) for name, owner in token_stacks(model).items()}
        if len(self._stacks) > 1:  # an encoder and its decoder do not read the same number of tokens
            stacks = self._stacks.items()
            self._stacks = {name: (DenseTokens(dense_prefill, strict=False), owner) for name, (_, owner) in stacks}
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
        for name, (tokens, owner) in self._stacks.items():
            self._handles += tokens.attach(owner, self.model.get_submodule(name).children())
        if not self._stacks:
            self._handles += self.tokens.attach(self.model)
        for name, rule in rules.inputs.items():
            self.sites[name] = site = Site(rule, self._tokens_of(name), Tally(), rules.low_rank.get(name))
            thresholds = rule.thresholds(inputs[name].width) if kernels and site.low_rank is None else None
            self._handles += _hook_input(inputs[name].module, site, thresholds)
        for name, rule in rules.gates.items():
            self.sites[name] = site = Site(rule, self._tokens_of(name), Tally())
            self._handles.append(self._gates[name].activation.register_forward_hook(site.mask_output))

    def _tokens_of(self, name: str) -> DenseTokens:
        if not self._stacks:
            return self.tokens
        # nobody follows the calls around other layers, which have no dense tokens
        return next((t for stack, (t, _) in self._stacks.items() if name.startswith(f"{stack}.")), DenseTokens(0.0))

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
            site.tally = Tally()

    @property
    def realised(self) -> dict[str, float]:
        """Site → share of channels dropped so far, in tokens that rules apply to."""
        return {name: site.tally.sparsity for name, site in self.sites.items()}

    @property
    def weights_read(self) -> WeightsRead:
        """Weights that a token reads, over the whole model, head included; a site that has met no token reads all."""
        live: dict[str, float] = {}
        for name, site in self.sites.items():
            share = 1 - site.tally.sparsity if site.tally.seen else 1.0
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
    if thresholds is not None and type(module) is nn.Linear and _product(module.weight.device) is not None:
        return [_LiveChannels(module, site, thresholds)]
    handles: list[Any] = [module.register_forward_pre_hook(site.mask_input)]
    if site.low_rank is not None:
        # a layer that raises, as checkpointing's second pass does on purpose, must not keep what it was given
        handles.append(module.register_forward_hook(site.add_rest, always_call=True))
    return handles


_FEW = 32  # vectors; with more, the union of what they want is nearly everything


class _LiveChannels(RuleAtWork):
    """Stands in for a linear layer: few tokens read the channels that some of them wants, many take it all."""

    def __init__(self, module: nn.Linear, site: Site, thresholds: Tensor):
        if ChannelMatrix.of_view(module.weight.detach(), DEVICES) is None:
            module.weight.data = lay_by_channels(module.weight)
        self._module, self._site = module, site
        # everything counts where a threshold is below zero, which for the kernel is no threshold but for zeros
        self._bounds = thresholds.clamp_min(0)
        self._before, self._dense = vars(module).get("forward"), module.forward
        self._seen: tuple[Any, ChannelMatrix | None] = (None, None)
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with the channels that count."""
        site, bias = self._site, self._module.bias
        few = x.shape[:-1].numel() <= _FEW and x.dtype in (torch.float32, torch.bfloat16)
        if not few or site.tokens.dense is not None or torch.is_grad_enabled():
            return self._dense(site.masked(x))
        matrix = self._matrix()
        if matrix is None or matrix.values.device != x.device:
            return self._dense(site.masked(x))
        site.live(x)
        self._bounds = self._bounds.to(x.device)
        return _product(x.device)(matrix, x, self._bounds, bias)

    def _matrix(self) -> ChannelMatrix | None:
        """The weight as it lies now: it may have been changed, replaced or moved since the last call."""
        weight = self._module.weight.detach()
        place = (weight.data_ptr(), weight.dtype, weight.device, weight.stride())
        if self._seen[0] != place:
            self._seen = (place, ChannelMatrix.of_view(weight, DEVICES) if _product(weight.device) else None)
        return self._seen[1]

    def remove(self) -> None:
        """Give the layer its own product back; the layout of its weight stays."""
        if self._before is None:
            self._module.__dict__.pop("forward", None)
        else:  # someone had put another in its place before
            self._module.forward = self._before  # type: ignore[method-assign]


def _product(device: torch.device) -> Any:
    """The product of few channels on a device; None if there is none."""
    if device.type == "cpu":
        return input_sparse
    return channels_triton.input_sparse if device.type == "cuda" and channels_triton.triton is not None else None


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
        if isinstance(rule.selection, GroupTopK) and site.width % rule.selection.group:
            raise ModelError(
                f"{name}: the rule is for groups of {rule.selection.group} channels, which do not divide this model's "
                f"{site.width}; calibrate on it"
            )
    for name, factors in rules.low_rank.items():
        place = inputs.get(name)
        found = (factors.left.shape[0], factors.right.shape[1])
        if place is None or name not in rules.inputs or found != tuple(place.target.shape):
            raise ModelError(
                f"{name}: the low-rank part is of {found[0]} × {found[1]} weights; calibrate on this model"
            )
