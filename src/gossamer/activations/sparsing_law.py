"""How sparse a model's activations are, said in a way that can be compared: at the price of p percent of perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.optimize import curve_fit
from torch import Tensor, nn

from gossamer.activations.base import check_dense, install
from gossamer.activations.budgets import largest_within
from gossamer.activations.installed import Installed
from gossamer.activations.positions import DenseTokens
from gossamer.activations.rules import ActivationRules
from gossamer.activations.truncation import Truncation, middle_activations
from gossamer.core.channel_rules import ChannelRule, Everything, Selection, Threshold, TopK, column_norms
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.perplexity import perplexity
from gossamer.measure.runs import prepared
from gossamer.models.activation_sites import GateSite, InputSite, find_gate_sites, find_input_sites, layer_shapes
from gossamer.models.blocks import Batch
from gossamer.models.rotation import is_rotated

Metric = Literal["cett", "top-k", "fat"]


@dataclass(frozen=True, eq=False)
class PPLSparsity:
    """Activation sparsity at a price.

    Attributes
    ----------
    setting
        The tolerance (CETT), the share kept (top-k) or the threshold (FAT) at which the price is met.
    ratio
        Perplexity with sparse activations over dense, as realised.
    activation_ratio
        A, mean share of active neurons.
    per_layer
        Name of a feed-forward layer's last matrix (of the layer, where gates decide) → its share of active neurons.
    rules
        What :func:`gossamer.activations.base.install` takes.
    exact_ratio
        Share of neurons that are not exactly zero in the dense model; 1 for smooth activation functions.
    """

    setting: float
    ratio: float
    activation_ratio: float
    per_layer: dict[str, float]
    rules: ActivationRules = field(repr=False)
    exact_ratio: float

    @property
    def sparsity(self) -> float:
        """1 − A."""
        return 1 - self.activation_ratio


def ppl_p_sparsity(
    model: nn.Module,
    data: Iterable[Batch],
    p: float = 1.0,
    *,
    metric: Metric = "cett",
    tolerance: float = 1e-3,
    sampled: int = 2048,
    progress: bool = True,
) -> PPLSparsity:
    """The activation sparsity of a model's feed-forward layers that costs p% of perplexity [Luo et al., 2024].

    One tolerance for all layers is found by bisection; from it follows the threshold of every layer, and a neuron is
    active for a token if |x_i| ‖W_down[:, i]‖ is above that. arXiv 2411.02335, section 3.

    Parameters
    ----------
    model
        A language model.
    data
        Token ids; the thresholds and the perplexity come from the same ones, as in the paper.
    p
        Price in percent.
    metric
        ``cett``, the paper's; or what it compares with: ``top-k``, the same number of neurons for all layers and
        tokens by the size of their gates, or ``fat``, one threshold on gates for all layers.
    tolerance
        Bracket of the setting at which bisection ends (of its logarithm for ``fat``).
    sampled
        Tokens, spread evenly over the data, from which CETT thresholds are found.
    progress
        Whether to show progress bars.

    Raises
    ------
    CalibrationError
        If there are no batches of token ids.
    ConfigurationError
        If p is not above 0, or the metric is unknown.
    """
    return ppl_p_of_checkpoints(
        [model], data, p, metric=metric, tolerance=tolerance, sampled=sampled, progress=progress
    )[0]


def ppl_p_of_checkpoints(
    models: Sequence[nn.Module],
    data: Iterable[Batch],
    p: float = 1.0,
    *,
    metric: Metric = "cett",
    tolerance: float = 1e-3,
    sampled: int = 2048,
    progress: bool = True,
) -> list[PPLSparsity]:
    """As :func:`ppl_p_sparsity` for checkpoints of one training, at one setting that costs p% on average.

    So the activation ratios of different stages are compared under the same tolerance.

    Parameters
    ----------
    models
        The checkpoints, each a model of its own.
    data, p, metric, tolerance, sampled, progress
        See there; the ratio that is to be 1 + p/100 is the mean over the checkpoints.

    Returns
    -------
    list of PPLSparsity
        One for each checkpoint, all with the same setting.
    """
    _check_price(p)
    if metric not in _BRACKETS:
        raise ConfigurationError(f"metric {metric!r} is unknown; it must be cett, top-k or fat")
    batches = prepared(data)
    if not models or not all(isinstance(batch, Tensor) for batch in batches):
        raise CalibrationError("PPL-p% sparsity is a price in perplexity; give a model and batches of token ids")
    priced = [_Priced(model, batches, metric, sampled, progress) for model in models]

    def ratio(setting: float) -> float:
        return float(np.mean([each.at(setting).ratio for each in priced]))

    low, high = _BRACKETS[metric]
    best = largest_within(ratio, 1 + p / 100, low, high, tolerance)
    return [each.at(best) for each in priced]


def _check_price(p: float) -> None:
    if not p > 0:
        raise ConfigurationError(f"p is {p!r}; it must be a price in percent above 0, such as 1")


class _Priced:
    """A model, and what it becomes and costs at any setting."""

    def __init__(self, model: nn.Module, batches: list[Any], metric: Metric, sampled: int, progress: bool):
        self._model, self._batches, self._metric = model, batches, metric
        check_dense(model)
        self._sites, self._layers = find_input_sites(model, ["down"]), layer_shapes(model)
        samples = middle_activations(model, batches, self._sites, sampled, progress)
        self._exact = float(np.mean([(sample != 0).double().mean() for sample in samples.values()]))
        cuts = self._sites if metric == "cett" else []
        self._truncations = {site.name: Truncation(samples[site.name], site.target.matrix()) for site in cuts}
        self._gates = find_gate_sites(model) if metric != "cett" else []
        self._dense = self._perplexity()
        self._known: dict[float, PPLSparsity] = {}

    def at(self, setting: float) -> PPLSparsity:
        """Its sparsity at a setting, and the price of that; known ones are not measured again."""
        if setting not in self._known:
            self._known[setting] = self._measured(setting)
        return self._known[setting]

    def _measured(self, setting: float) -> PPLSparsity:
        rules = _rules(self._metric, setting, self._sites, self._truncations, self._gates)
        rules.settings["rotated"], rules.layers = is_rotated(self._model), self._layers
        with install(self._model, rules, dense_prefill=0.0) as installed:
            ratio = self._perplexity() / self._dense
            active = {name: 1 - share for name, share in installed.realised.items()}
        return PPLSparsity(setting, ratio, float(np.mean(list(active.values()))), active, rules, self._exact)

    def _perplexity(self) -> float:
        window = max(part.shape[1] for part in self._batches)
        return perplexity(self._model, self._batches, window, window, progress=False).value


_BRACKETS: dict[str, tuple[float, float]] = {"cett": (0.0, 1.0), "top-k": (0.0, 1.0), "fat": (-12.0, 3.0)}


def _rules(
    metric: Metric,
    setting: float,
    sites: Sequence[InputSite],
    truncations: dict[str, Truncation],
    gates: Sequence[GateSite],
) -> ActivationRules:
    settings = {"method": "ppl-p", "metric": metric, "setting": setting}
    if metric == "cett":
        found = {
            site.name: ChannelRule(
                Threshold(truncations[site.name].threshold(setting)), column_norms(site.target.matrix())
            )
            for site in sites
        }
        return ActivationRules(found, settings=settings)

    def selection(width: int) -> Selection:
        if metric == "fat":
            return Threshold(10.0**setting)
        keep = max(1, round((1 - setting) * width))
        return Everything() if keep == width else TopK(keep)

    return ActivationRules({}, {gate.name: ChannelRule(selection(gate.width)) for gate in gates}, settings=settings)


@register(
    "ppl-p",
    paper="sparsing-law",
    when="at inference",
    granularity="activations",
    criterion=("activation", "magnitude"),
    allocation="measured",
)
@dataclass(kw_only=True)
class PPLBudget:
    """Feed-forward neurons dropped until perplexity rises by p% [Luo et al., 2024, arXiv 2411.02335, section 3].

    A third way to come by thresholds, beside quantiles and the greedy search: the price is given and the sparsity
    follows.

    Parameters
    ----------
    p
        Price in percent.
    dense_prefill
        Share of a prompt that stays dense.
    """

    p: float = 1.0
    dense_prefill: float = 0.01
    rules_: ActivationRules = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_price(self.p)
        DenseTokens(self.dense_prefill)

    def calibrate(self, model: nn.Module, data: Iterable[Batch], progress: bool = True) -> ActivationRules:
        """Find the thresholds; see :func:`ppl_p_sparsity`."""
        self.rules_ = ppl_p_sparsity(model, data, self.p, progress=progress).rules
        return self.rules_

    def install(self, model: nn.Module, rules: ActivationRules | None = None, kernels: bool = False) -> Installed:
        """Put the rules to work; see :meth:`gossamer.activations.base.ActivationSparsifier.install`."""
        found = rules if rules is not None else getattr(self, "rules_", None)
        if found is None:
            raise CalibrationError("PPLBudget has no rules yet; call calibrate(model, data) first")
        return install(model, found, self.dense_prefill, kernels)


Form = Literal["relu", "silu", "constant"]


@dataclass(frozen=True)
class SparsingLaw:
    """A fitted law of the activation ratio against the amount of training data.

    Attributes
    ----------
    form
        ``silu``: A = A₀ − c D^−α, rising; ``relu``: A = A₀ + exp(b − c D^α), falling; or ``constant``.
    parameters
        By name.
    r_squared
        Share of the variance that is explained.
    aic
        Akaike's criterion, n ln(RSS/n) + 2k with the correction for small n.
    """

    form: Form
    parameters: dict[str, float]
    r_squared: float
    aic: float

    @property
    def limit(self) -> float:
        """A₀, where training without end leads."""
        return self.parameters["limit"]

    def predict(self, data: Sequence[float]) -> np.ndarray:
        """A at amounts of data."""
        return _LAWS[self.form][0](np.asarray(data, dtype=float), *self.parameters.values())


def _falling(data: Any, alpha: float, b: float, c: float, limit: float) -> Any:
    return limit + np.exp(np.clip(b - c * data**alpha, -700, 50))


def _rising(data: Any, alpha: float, c: float, limit: float) -> Any:
    return limit - c * data**-alpha


_LAWS: dict[Form, tuple[Callable[..., Any], tuple[str, ...], list[float], list[float]]] = {
    "relu": (_falling, ("alpha", "b", "c", "limit"), [0.05, -20.0, 0.0, 0.0], [3.0, 20.0, 1e3, 1.0]),
    "silu": (_rising, ("alpha", "c", "limit"), [0.02, 0.0, 0.0], [5.0, 1e3, 1.0]),
    "constant": (lambda data, limit: np.full(np.shape(data), limit), ("limit",), [0.0], [1.0]),
}
_STARTS = 24


def fit_sparsing_law(data: Sequence[float], ratio: Sequence[float], form: Form = "relu") -> SparsingLaw:
    """Fit a law to activation ratios along training by bounded least squares, from many starting points.

    Parameters
    ----------
    data
        Amounts of training data D, above 0; scaled by their geometric mean before the fit, so the unit does not matter.
    ratio
        Activation ratios A in [0, 1].
    form
        Of the law.

    Raises
    ------
    CalibrationError
        If there are fewer points than the law has parameters plus two, or values outside their range.
    """
    amounts, values = np.asarray(data, dtype=float), np.asarray(ratio, dtype=float)
    if form not in _LAWS:
        raise ConfigurationError(f"form is {form!r}; it must be relu, silu or constant")
    law, names, low, high = _LAWS[form]
    if len(amounts) != len(values) or len(amounts) < len(names) + 2:
        raise CalibrationError(
            f"{len(amounts)} amounts and {len(values)} ratios; a {form} law needs {len(names) + 2} pairs"
        )
    if not (np.isfinite(amounts).all() and (amounts > 0).all() and (values >= 0).all() and (values <= 1).all()):
        raise CalibrationError("amounts of data must be above 0 and activation ratios in [0, 1], all of them finite")
    unit = math.exp(float(np.log(amounts).mean()))
    best: tuple[float, np.ndarray] | None = None
    generator = np.random.default_rng(0)
    for _ in range(_STARTS):
        start = [generator.uniform(max(a, -3.0), min(b, 3.0)) for a, b in zip(low, high)]
        try:
            found, _ = curve_fit(law, amounts / unit, values, start, bounds=(low, high), maxfev=20_000)
        except RuntimeError:  # one starting point may lead nowhere
            continue
        rss = float(((law(amounts / unit, *found) - values) ** 2).sum())
        if best is None or rss < best[0]:
            best = (rss, found)
    if best is None:
        raise CalibrationError(f"no {form} law fits the {len(amounts)} points; give more, spread over more data")
    rss, found = best
    named = dict(zip(names, (float(v) for v in found)))
    return SparsingLaw(form, _unscaled(form, named, unit), _explained(rss, values), _aic(rss, len(values), len(names)))


def _unscaled(form: Form, parameters: dict[str, float], unit: float) -> dict[str, float]:
    """The parameters for D in the user's unit."""
    if form == "relu":
        return parameters | {"c": parameters["c"] * unit ** -parameters["alpha"]}
    if form == "silu":
        return parameters | {"c": parameters["c"] * unit ** parameters["alpha"]}
    return parameters


def _explained(rss: float, values: np.ndarray) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    return 1 - rss / total if total > 0 else 0.0


def _aic(rss: float, n: int, k: int) -> float:
    k += 1  # the variance of the residuals
    correction = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf
    return n * math.log(max(rss, 1e-30) / n) + 2 * k + correction
