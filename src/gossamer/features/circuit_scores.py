"""How good a circuit is: against heads that are known to belong to it, and by what the model does with it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.circuit_tasks import CircuitTask


@dataclass(frozen=True)
class CircuitROC:
    """Scores of heads against the truth.

    Attributes
    ----------
    auc
        Area under the curve of hits over false alarms; heads with equal scores count half.
    precision, recall, thresholds
        At every different score, ascending.
    best_f1
        Highest harmonic mean of precision and recall.
    """

    auc: float
    precision: list[float]
    recall: list[float]
    thresholds: list[float]
    best_f1: float


def circuit_roc(scores: Tensor, truth: Tensor) -> CircuitROC:
    """Compare scores with known heads.

    Parameters
    ----------
    scores
        ``(heads,)``, the higher the more likely.
    truth
        Bool ``(heads,)``.

    Raises
    ------
    CalibrationError
        If shapes differ, or the truth is empty or everything.

    Examples
    --------
    >>> circuit_roc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False])).auc
    1.0
    """
    if scores.shape != truth.shape or scores.dim() != 1:
        raise CalibrationError(
            f"scores are {tuple(scores.shape)}, the truth {tuple(truth.shape)}; both must be (heads,)"
        )
    if not bool(truth.any()) or bool(truth.all()):
        raise CalibrationError(
            f"{int(truth.sum())} of {len(truth)} heads belong to the circuit; some must, and some not"
        )
    known, found = truth.numpy(), scores.double().numpy()
    precision, recall, thresholds = precision_recall_curve(known, found)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return CircuitROC(
        float(roc_auc_score(known, found)),
        precision[:-1].tolist(),
        recall[:-1].tolist(),
        thresholds.tolist(),
        float(f1.max()),
    )


def faithfulness(model: nn.Module, circuit: Tensor, task: CircuitTask, means: Sequence[Tensor]) -> float:
    """The task's metric with all heads outside a circuit at their means, as a share of the whole model's.

    Parameters
    ----------
    model, task
        The model and its task.
    circuit
        Bool ``(heads,)``.
    means
        As :func:`~gossamer.features.heads.mean_heads` gives them.

    Raises
    ------
    ConfigurationError
        If the whole model does not solve the task.
    """
    whole = float(task.measure(model).mean())
    if whole <= 0:
        raise ConfigurationError(f"the metric of the whole model is {whole:.3g}; it must be above 0 to have a share of")
    return float(task.measure(model, circuit.float(), means).mean()) / whole


def completeness(model: nn.Module, circuit: Tensor, task: CircuitTask, means: Sequence[Tensor]) -> float:
    """The same with the heads of the circuit at their means, and all others as they are: 0 if nothing else helps."""
    return faithfulness(model, ~circuit, task, means)


def random_circuits(circuit: Tensor, count: int, seed: int = 0) -> Tensor:
    """As many heads as a circuit has, drawn at random, bool ``(count, heads)``."""
    generator = generator_for("random circuits", seed)
    order = torch.rand(count, len(circuit), generator=generator).argsort(1)
    return order < int(circuit.sum())


def top_heads(scores: Tensor, count: int) -> Tensor:
    """The heads of the highest scores, bool; the earlier of two that tie."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen
