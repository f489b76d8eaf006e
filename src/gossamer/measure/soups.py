"""Several models of one shape: how far apart they lie, how good each is, and what their answers are worth together.

These are the diagnostics of model averaging. A mean is worth something if the models lie close around it in one basin;
the answers of all together are what it would cost m times the work to reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.averaging import average_models
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.corruptions import corruptions
from gossamer.measure.robustness import calibration_error, maximum_calibration_error

_BATCH = 500


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest of some numbers."""

    low: float
    mean: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one number."""
        return cls(min(values), math.fsum(values) / len(values), max(values))


@dataclass(frozen=True)
class SoupGeometry:
    """Where models lie.

    Attributes
    ----------
    distance
        ‖θ_i − θ_j‖₂ over all pairs.
    angle
        Between θ_i and θ_j as seen from zero, in degrees, over all pairs.
    from_barycentre
        ‖θ_i − θ̄‖₂ over all models.
    norm
        ‖θ̄‖₂, with which distances compare.
    """

    distance: Spread
    angle: Spread
    from_barycentre: Spread
    norm: float


def soup_geometry(models: Sequence[nn.Module] | Sequence[Mapping[str, Tensor]]) -> SoupGeometry:
    """Distances and angles between models: of their parameters, not of buffers.

    Parameters
    ----------
    models
        At least two modules, or states; of a state every floating tensor counts but running statistics.

    Raises
    ------
    ConfigurationError
        If there are fewer than two.
    TargetError
        If they are of different shapes.
    """
    if len(models) < 2:
        raise ConfigurationError(f"{len(models)} models have no distance from each other; give at least two")
    states = [_parameters(model) for model in models]
    barycentre = average_models(states, require_same_mask=False)
    norms = [math.sqrt(_dot(state, state)) for state in states]
    distances, angles = [], []
    for i, j in combinations(range(len(states)), 2):
        distances.append(_distance(states[i], states[j]))
        cosine = _dot(states[i], states[j]) / (norms[i] * norms[j]) if norms[i] * norms[j] else 1.0
        angles.append(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))))
    return SoupGeometry(
        distance=Spread.of(distances),
        angle=Spread.of(angles),
        from_barycentre=Spread.of([_distance(state, barycentre) for state in states]),
        norm=math.sqrt(_dot(barycentre, barycentre)),
    )


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    statistics = ("running_mean", "running_var")
    return {n: t.detach().double() for n, t in model.items() if t.is_floating_point() and not n.endswith(statistics)}


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.fsum(float((tensor * b[name]).sum()) for name, tensor in a.items())


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.sqrt(math.fsum(float((tensor - b[name]).square().sum()) for name, tensor in a.items()))


@dataclass(frozen=True)
class Quality:
    """What a classifier, or several that answer together, is worth on one set of data.

    Attributes
    ----------
    accuracy, worst_class
        Share of right answers, of all and of the class with the fewest.
    loss
        Mean negative log-likelihood of the labels, in nats.
    ece, mce
        Expected and maximum calibration error.
    """

    accuracy: float
    worst_class: float
    loss: float
    ece: float
    mce: float


def quality(models: nn.Module | Sequence[nn.Module], inputs: Tensor, labels: Tensor, *, bins: int = 15) -> Quality:
    """Measure one classifier, or the mean of the probabilities of several: the prediction ensemble.

    Parameters
    ----------
    models
        From inputs to logits; measured in evaluation mode, which is then as it was.
    inputs, labels
        ``(n, …)`` and ``(n,)``.
    bins
        Of the calibration errors.

    Raises
    ------
    CalibrationError
        If there is no model, or not one label for each input.
    """
    members = [models] if isinstance(models, nn.Module) else list(models)
    if not members or not len(inputs) or len(inputs) != len(labels):
        raise CalibrationError(
            f"{len(members)} models, {len(inputs)} inputs and {len(labels)} labels; at least one model and one label "
            f"for each input are needed"
        )
    probabilities = torch.stack([_probabilities(member, inputs) for member in members]).mean(0)
    right = probabilities.argmax(1) == labels
    logits = probabilities.clamp_min(torch.finfo(torch.float64).tiny).log()
    return Quality(
        accuracy=float(right.double().mean()),
        worst_class=min(float(right[labels == label].double().mean()) for label in labels.unique()),
        loss=float(nn.functional.nll_loss(logits, labels)),
        ece=calibration_error(logits, labels, bins=bins),
        mce=maximum_calibration_error(logits, labels, bins=bins),
    )


def _probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part).double().softmax(1) for part in inputs.split(_BATCH)])
    finally:
        for module, training in modes:
            module.training = training


def corrupted_accuracy(model: nn.Module | Sequence[nn.Module], images: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Mean accuracy over all corruptions and severities of :mod:`gossamer.measure.corruptions`."""
    found = [quality(model, worse, labels).accuracy for _, _, worse in corruptions(images, seed)]
    return sum(found) / len(found)


def soup_metrics(
    soup: nn.Module, candidates: Sequence[nn.Module], inputs: Tensor, labels: Tensor, *, bins: int = 15
) -> dict[str, Any]:
    """Everything about one soup: it, its candidates, their ensemble, and how they lie.

    Parameters
    ----------
    soup
        The mean, its batch norm measured anew.
    candidates
        What it was made of; at least two.
    inputs, labels
        Data that have decided nothing.
    bins
        Of the calibration errors.

    Returns
    -------
    dict
        ``soup`` and ``ensemble`` (:class:`Quality`), ``candidates`` (a list of them), ``geometry``, and ``gain``: the
        soup's accuracy minus the mean of its candidates'.
    """
    each = [quality(candidate, inputs, labels, bins=bins) for candidate in candidates]
    mean = quality(soup, inputs, labels, bins=bins)
    return {
        "soup": mean,
        "candidates": each,
        "ensemble": quality(candidates, inputs, labels, bins=bins),
        "geometry": soup_geometry(candidates),
        "gain": mean.accuracy - sum(one.accuracy for one in each) / len(each),
    }
