"""What a classifier is like beside its accuracy: calibrated, aware of what it does not know, hard to fool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError


@dataclass(frozen=True)
class Robustness:
    """Four views of one classifier.

    Attributes
    ----------
    accuracy
        Share of right answers.
    calibration_error
        Expected calibration error: how far confidence and accuracy lie apart; 0 is best.
    nll
        Mean negative log-likelihood of the labels, in nats.
    auroc
        Probability that the confidence in an input of the kind known from training is higher than in one from
        elsewhere; 0.5 is chance. None if there were none from elsewhere.
    attacked_accuracy
        Share of right answers after one step of the fast gradient sign method.
    """

    accuracy: float
    calibration_error: float
    nll: float
    auroc: float | None
    attacked_accuracy: float


def robustness(
    model: nn.Module,
    inside: Iterable[tuple[Tensor, Tensor]],
    outside: Iterable[Tensor] = (),
    *,
    epsilon: float = 8 / 255,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    bins: int = 15,
) -> Robustness:
    """Measure a classifier in evaluation mode; its mode and its gradients stay as they were.

    Parameters
    ----------
    model
        From inputs to logits ``(n, classes)``.
    inside
        Batches of inputs and their classes.
    outside
        Batches of inputs that belong to none of the classes.
    epsilon, bounds
        Of the attack; see :func:`fast_gradient_sign`.
    bins
        Of the calibration error.

    Raises
    ------
    CalibrationError
        If there is nothing inside.
    ConfigurationError
        If a setting is out of range.
    """
    logits, labels, attacked = [], [], []
    with _evaluating(model):
        for inputs, targets in inside:
            with torch.no_grad():
                logits.append(model(inputs))
            labels.append(targets)
            with torch.enable_grad():
                moved = fast_gradient_sign(model, inputs, targets, epsilon=epsilon, bounds=bounds)
            with torch.no_grad():
                attacked.append(model(moved).argmax(1))
        with torch.no_grad():
            strange = [model(inputs).double().softmax(1).amax(1) for inputs in outside]
    if not logits:
        raise CalibrationError("there is nothing to measure robustness on; give at least one batch")
    scores, truth = torch.cat(logits).double(), torch.cat(labels)
    confidence = scores.softmax(1).amax(1)
    return Robustness(
        accuracy=float((scores.argmax(1) == truth).double().mean()),
        calibration_error=calibration_error(scores, truth, bins=bins),
        nll=float(nn.functional.cross_entropy(scores, truth)),
        auroc=auroc(confidence, torch.cat(strange)) if strange else None,
        attacked_accuracy=float((torch.cat(attacked) == truth).double().mean()),
    )


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean over bins of |accuracy − confidence|: the ECE of Guo et al., 2017, arXiv 1706.04599, eq. 3.

    Parameters
    ----------
    logits
        ``(n, classes)``.
    labels
        Classes, ``(n,)``.
    bins
        Equally wide intervals (a, b] of the confidence, which is the highest probability.

    Raises
    ------
    ConfigurationError
        If `bins` is below 1.
    CalibrationError
        If there is nothing to measure, or logits and labels differ in number.
    """
    gaps, _ = _gaps(logits, labels, bins)
    return float(gaps.abs().sum() / len(labels))


def maximum_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Largest |accuracy − confidence| of any bin that holds something: the MCE of arXiv 1706.04599, eq. 5.

    Parameters and errors are those of :func:`calibration_error`.
    """
    gaps, counts = _gaps(logits, labels, bins)
    return float((gaps.abs() / counts.clamp_min(1)).max())


def _gaps(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sum of (right − confidence) of every bin, and how many answers are in it."""
    if bins < 1:
        raise ConfigurationError(f"bins is {bins}; at least 1 is needed, such as 15")
    if not len(logits) or len(logits) != len(labels):
        raise CalibrationError(f"{len(logits)} rows of logits and {len(labels)} labels; one label a row is needed")
    confidence, answer = logits.double().softmax(1).max(1)
    place = ((confidence * bins).ceil().long().clamp(1, bins) - 1).cpu()
    gap = ((answer == labels).double() - confidence).cpu()
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap)
    return sums, torch.bincount(place, minlength=bins)


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a score of the first kind exceeds one of the second, ties counted half.

    Raises
    ------
    CalibrationError
        If one of them is empty.
    """
    if not positive.numel() or not negative.numel():
        raise CalibrationError(f"{positive.numel()} positive and {negative.numel()} negative scores; both are needed")
    ordered = negative.double().flatten().sort().values
    scores = positive.double().flatten()
    below = torch.searchsorted(ordered, scores, right=False)
    not_above = torch.searchsorted(ordered, scores, right=True)
    return float((below + not_above).double().mean() / (2 * len(ordered)))


def fast_gradient_sign(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Inputs moved by ``ε · sign(∂L/∂x)`` [Goodfellow et al., 2015, arXiv 1412.6572]; the model stays as it is.

    Parameters
    ----------
    model
        From inputs to logits.
    inputs, labels
        A batch.
    epsilon
        How far every number is moved, in units of the inputs; at least 0.
    bounds
        Between which the moved inputs are kept, or None.

    Raises
    ------
    ConfigurationError
        If `epsilon` is negative.
    """
    if not epsilon >= 0:
        raise ConfigurationError(f"epsilon is {epsilon}; it must be at least 0, such as 8/255")
    moving = inputs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(moving), labels), moving)
    moved = inputs.detach() + epsilon * gradient.sign()
    return moved if bounds is None else moved.clamp(*bounds)


@contextmanager
def _evaluating(model: nn.Module):  # type: ignore[no-untyped-def]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
