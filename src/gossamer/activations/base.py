"""What methods that sparsify activations without training have in common: sites, calibration, budgets, installation.

A method says which sites it treats, by which scale their channels are scored, and how a budget becomes a selection.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from gossamer.activations.budgets import GreedyAllocation, largest_within
from gossamer.activations.installed import Installed
from gossamer.activations.positions import DenseTokens
from gossamer.activations.rules import ActivationRules
from gossamer.core.channel_rules import ChannelRule, Everything, Selection, Threshold, TopK
from gossamer.core.magnitude_histogram import MagnitudeHistogram
from gossamer.core.selection import dropped_count
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, check_sparsity
from gossamer.measure.perplexity import perplexity
from gossamer.measure.runs import prepared, run_over
from gossamer.models.activation_sites import (
    ROLES,
    GateSite,
    InputSite,
    SiteRole,
    find_gate_sites,
    find_input_sites,
    layer_shapes,
    rules_at_work,
)
from gossamer.models.blocks import Batch
from gossamer.models.rotation import is_rotated

Gate = Literal["threshold", "topk"]


@dataclass(kw_only=True)
class ActivationSparsifier:
    """Sparse activations without training: calibrate, then install.

    Parameters
    ----------
    sparsity
        Share of the weights of the treated layers that a token does not read.
    allocation
        ``uniform``, ``greedy`` (:class:`GreedyAllocation`), or name of a layer → its own sparsity.
    step
        Of the greedy allocation.
    dense_prefill
        Share of a prompt, from its beginning, that stays dense.
    include, exclude
        Globs on the names of layers.

    Attributes
    ----------
    rules_
        What calibration found.
    """

    sparsity: float = 0.5
    allocation: Literal["uniform", "greedy"] | Mapping[str, float] = "uniform"
    step: float = 0.05
    dense_prefill: float = 0.01
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    rules_: ActivationRules = field(init=False, repr=False, compare=False)

    roles: ClassVar[tuple[SiteRole, ...]] = ROLES

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if isinstance(self.allocation, str) and self.allocation not in ("uniform", "greedy"):
            raise ConfigurationError(f"allocation is {self.allocation!r}; it must be uniform, greedy, or a mapping")
        if isinstance(self.allocation, Mapping):
            for name, share in self.allocation.items():
                check_sparsity(share, f"sparsity of {name}")
        GreedyAllocation(self.step)
        if self.allocation == "greedy":
            GreedyAllocation.check(self.sparsity)
        DenseTokens(self.dense_prefill)

    def scale(self, site: InputSite) -> Tensor | None:
        """C of a site's score |x_j| · c_j; None for 1."""
        return None

    def selection(self, histogram: MagnitudeHistogram, width: int, sparsity: float) -> Selection:
        """What drops a share of a site's channels: a threshold, unless the method says otherwise."""
        return by_threshold(histogram, sparsity)

    def sites(self, model: nn.Module) -> list[InputSite]:
        """The layers to treat."""
        return find_input_sites(model, self.roles, self.include, self.exclude)

    def calibrate(self, model: nn.Module, data: Iterable[Batch], progress: bool = True) -> ActivationRules:
        """Find the rules for a model on a little data; the model is not changed.

        Parameters
        ----------
        model
            The model, dense.
        data
            Batches of token ids, or of keyword arguments; padding is left out.
        progress
            Whether to show progress bars.

        Raises
        ------
        CalibrationError
            If there is no data, or it never reaches a layer.
        NonFiniteError
            If an activation is NaN or infinite.
        TargetError
            If the model has no layer to treat.
        ModelError
            If rules are at work in the model, so that it is not dense.
        """
        batches = self._begin(model, data)
        sites = self.sites(model)
        self._histograms = observe_magnitudes(model, batches, {s: self.scale(s) for s in sites}, progress)
        self._sites = _reached(sites, self._histograms)
        for site in self._sites:
            self._histograms[site.name].check()
        return self._settle(self._budget(model, batches, self._sites, self._rule, progress))

    def _begin(self, model: nn.Module, data: Iterable[Batch]) -> list[Batch]:
        """Note what the model is, and return the data without padding."""
        check_dense(model)
        self._rotated, self._layers = is_rotated(model), layer_shapes(model)
        return prepared(data)

    def at(self, sparsity: float) -> ActivationRules:
        """Rules for another sparsity, the same in all layers, from what the last calibration has counted.

        Raises
        ------
        CalibrationError
            If there was no calibration yet.
        """
        check_sparsity(sparsity)
        if not hasattr(self, "_histograms"):
            raise CalibrationError(f"{type(self).__name__} has not seen data yet; call calibrate(model, data) first")
        self.sparsity = sparsity
        rules = self._settle(dict.fromkeys((site.name for site in self._sites), sparsity))
        rules.settings["allocation"] = "uniform"
        return rules

    def within(self, model: nn.Module, tokens: Sequence[Tensor], ratio: float = 1.01, tolerance: float = 0.01) -> float:
        """Settle on the largest sparsity whose perplexity stays within a ratio of the dense model's, by bisection.

        All layers get the same, whatever :attr:`allocation` says.

        Parameters
        ----------
        model
            The calibrated model.
        tokens
            Token ids that perplexity is measured on, ``(batch, length)`` each.
        ratio
            Of perplexities, above 1.
        tolerance
            Sparsity to which the answer is known.

        Returns
        -------
        float
            The sparsity; :attr:`rules_` are those for it.
        """
        if not ratio > 1:
            raise ConfigurationError(f"ratio is {ratio}; it must be above 1, such as 1.01 for one percent")
        if not tokens:
            raise CalibrationError("there are no tokens to measure perplexity on; give at least one batch")
        window = max(part.shape[-1] for part in tokens)

        def measured() -> float:
            return perplexity(model, list(tokens), window, window, progress=False).value

        limit = ratio * measured()

        def cost(sparsity: float) -> float:
            with install(model, self.at(sparsity), self.dense_prefill):
                return measured()

        found = largest_within(cost, limit, 0.0, 0.95, tolerance)
        self.at(found)
        return found

    def _rule(self, site: InputSite, sparsity: float) -> ChannelRule:
        histogram = self._histograms[site.name]
        return ChannelRule(self.selection(histogram, site.width, sparsity), histogram.scale)

    def _settle(self, budget: dict[str, float]) -> ActivationRules:
        rules = {site.name: self._rule(site, budget[site.name]) for site in self._sites}
        self.rules_ = ActivationRules(rules, requested=budget, settings=self.settings, layers=self._layers)
        return self.rules_

    def _budget(
        self, model: nn.Module, data: list[Batch], sites: list[InputSite], rule: Any, progress: bool
    ) -> dict[str, float]:
        if isinstance(self.allocation, Mapping):
            missing = next((site.name for site in sites if site.name not in self.allocation), None)
            if missing is not None:
                raise ConfigurationError(f"allocation gives no sparsity for {missing!r}; give one for every layer")
            return {site.name: float(self.allocation[site.name]) for site in sites}
        if self.allocation == "greedy" and self.sparsity > 0:
            return GreedyAllocation(self.step).allocate(model, data, sites, rule, self.sparsity, progress)
        return dict.fromkeys((site.name for site in sites), self.sparsity)

    @property
    def settings(self) -> dict[str, Any]:
        """Method and parameters, as plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        plain = {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in fields.items()
        }
        plain |= {k: dataclasses.asdict(v) for k, v in fields.items() if dataclasses.is_dataclass(v)}
        return {"method": type(self).__name__, "rotated": getattr(self, "_rotated", False), **plain}

    def install(self, model: nn.Module, rules: ActivationRules | None = None, kernels: bool = False) -> Installed:
        """Put rules to work until ``remove()`` is called, or as a context manager until its end.

        Parameters
        ----------
        model
            The model that they are for.
        rules
            By default those of the last :meth:`calibrate`.
        kernels
            Whether to read the weights of live channels only; see :class:`~gossamer.activations.installed.Installed`.

        Raises
        ------
        CalibrationError
            If there are none yet.
        ModelError
            If they are for another model.
        """
        rules = rules if rules is not None else getattr(self, "rules_", None)
        if rules is None:
            raise CalibrationError(f"{type(self).__name__} has no rules yet; call calibrate(model, data) first")
        return install(model, rules, self.dense_prefill, kernels)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[Installed]:
        """Rules at work inside the context."""
        with self.install(model) as installed:
            yield installed


def install(model: nn.Module, rules: ActivationRules, dense_prefill: float = 0.01, kernels: bool = False) -> Installed:
    """Put rules to work in a model; see :meth:`ActivationSparsifier.install`."""
    if rules.settings.get("rotated", is_rotated(model)) != is_rotated(model):
        wanted = "a rotated model; call models.rotation.orthogonalise(model) first"
        unwanted = "a model that is not rotated; load it again"
        raise ModelError(f"these rules are for {unwanted if is_rotated(model) else wanted}")
    inputs = {site.name: site for site in find_input_sites(model)}
    gates = {site.name: site for site in find_gate_sites(model)} if rules.gates else {}
    return Installed(model, rules, inputs, gates, dense_prefill, kernels)


def check_dense(model: nn.Module) -> None:
    """Refuse to calibrate a model in which rules are at work.

    Raises
    ------
    ModelError
        If there are.
    """
    if rules_at_work(model):
        raise ModelError("activation rules are at work in this model, so it is not dense; call their remove() first")


def _reached(sites: list[InputSite], histograms: Mapping[str, MagnitudeHistogram]) -> list[InputSite]:
    """The sites that calibration data has reached; warns about others, such as those for images: they stay dense."""
    reached = [site for site in sites if histograms[site.name].total]
    silent = [site.name for site in sites if not histograms[site.name].total]
    if reached and silent:
        warnings.warn(
            f"{len(silent)} of {len(sites)} layers never ran on the calibration data and stay dense, such as "
            f"{silent[0]}; give data that use them, or exclude them",
            stacklevel=3,
        )
    return reached or sites


def by_threshold(histogram: MagnitudeHistogram, sparsity: float) -> Selection:
    """The threshold that drops a share of what a histogram has counted; nothing goes at 0."""
    value = histogram.threshold(sparsity)
    return Everything() if value is None else Threshold(value)


def by_top_k(width: int, sparsity: float) -> Selection:
    """Dropping ⌊sparsity · width⌋ channels of every token."""
    dropped = dropped_count(width, sparsity)
    return Everything() if dropped == 0 else TopK(width - dropped)


def observe_magnitudes(
    model: nn.Module,
    data: Sequence[Batch],
    sites: Mapping[InputSite, Tensor | None] | Mapping[GateSite, Tensor | None],
    progress: bool = True,
) -> dict[str, MagnitudeHistogram]:
    """Run a model over data and count the scores at each site, in one pass.

    Layers that receive the very same tensor, and score it by magnitude, share one histogram.

    Parameters
    ----------
    model, data
        The model, and batches without padding.
    sites
        Site → its c.

    Returns
    -------
    dict
        Name of a site → histogram.
    """
    found: dict[str, MagnitudeHistogram] = {}
    last: list[Any] = [None, None]

    def count(name: str, values: Tensor, scale: Tensor | None) -> None:
        if scale is None and last[0] is not None and last[0]() is values:
            found.setdefault(name, last[1])
            return
        if name not in found:  # half a megabyte of counters
            found[name] = MagnitudeHistogram(name, scale)
        histogram = found[name]
        histogram.update(values)
        if scale is None:
            last[:] = [weakref.ref(values), histogram]  # held, its memory would not be there for the next layer

    handles = []
    for site, scale in sites.items():
        if isinstance(site, InputSite):
            hook = lambda module, args, name=site.name, scale=scale: count(name, args[0], scale)  # noqa: E731
            handles.append(site.module.register_forward_pre_hook(hook))
        else:
            hook = lambda module, args, output, name=site.name, scale=scale: count(name, output, scale)  # noqa: E731
            handles.append(site.activation.register_forward_hook(hook))
    try:
        run_over(model, data, "calibrating", progress)
    finally:
        for handle in handles:
            handle.remove()
    return {site.name: found[site.name] if site.name in found else MagnitudeHistogram(site.name) for site in sites}
