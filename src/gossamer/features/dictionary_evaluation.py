"""What a dictionary is good for: approximating, controlling and explaining what a model computes.

The model is only known through a function from activations to logits, so that any place of any model will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CalibrationError
from gossamer.features.dictionaries import Dictionary
from gossamer.features.latent_scores import LatentF1, latent_f1
from gossamer.features.sparse_edits import Edit, greedy_edits, interpreted_edit

Patch = Callable[[Tensor], Tensor]
"""Activations ``(prompts, d)`` that take the place of the model's own → logits ``(prompts, vocabulary)``."""


@dataclass(frozen=True)
class Approximation:
    """What the model still does.

    Attributes
    ----------
    recovered
        Metric less that with the mean activation, as a share of what the model's own activations give.
    agreement
        Share of the prompts on which the best token is the same.
    divergence
        Mean Kullback–Leibler divergence from the model as it is, in nats.
    """

    recovered: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Control:
    """What editing achieves, compared with putting in the activation that the edit aims at.

    Attributes
    ----------
    distance
        Mean distance left to the wanted activation, as a share of that before.
    agreement
        Share of the prompts on which the best token is the one with the wanted activation.
    moved
        How far the metric moved, as a share of what the wanted activation moves it.
    magnitude
        Mean weight in the reconstruction of the features that were touched; None where there are no features.
    preserved
        Share of the values of other variables that read the same from the edited activation as from the wanted one.
    """

    distance: float
    agreement: float
    moved: float
    magnitude: float | None
    preserved: float


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Prompts, and what is wanted of them.

    Attributes
    ----------
    attribute
        The variable that changes.
    x, wanted
        Activations on the prompts, and on the same prompts with another value, ``(n, d)``.
    old, new
        All variables before and after.
    patch
        Into the prompts as they were.
    metric
        Logits → ``(n,)``; what the change should move.
    """

    attribute: str
    x: Tensor
    wanted: Tensor
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    patch: Patch
    metric: Callable[[Tensor], Tensor]

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Logits before, and with the wanted activations."""
        return self.patch(self.x), self.patch(self.wanted)


@dataclass(frozen=True, eq=False)
class DictionaryReport:
    """All that there is to say of a dictionary.

    Attributes
    ----------
    sufficiency
        With reconstructions alone.
    necessity
        With the mean and what reconstructions miss: a good dictionary leaves nothing.
    control
        Variable → number of features → what exchanging so many achieves.
    interpreted
        The same with the features that F1 names.
    f1
        How well features tell values.
    unexplained
        Fraction of the variance of the activations that is not reconstructed.
    """

    sufficiency: Approximation
    necessity: Approximation
    control: dict[str, dict[int, Control]] = field(default_factory=dict)
    interpreted: dict[str, dict[int, Control]] = field(default_factory=dict)
    f1: LatentF1 | None = None
    unexplained: float = 0.0

    def features_for(self, attribute: str, share: float = 0.9) -> int | None:
        """The fewest features with which an edit moves the metric by a share of what is possible; None if none do."""
        return next((count for count, found in sorted(self.control[attribute].items()) if found.moved >= share), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sufficiency": vars(self.sufficiency),
            "necessity": vars(self.necessity),
            "unexplained": self.unexplained,
            "control": _plain(self.control),
            "interpreted": _plain(self.interpreted),
            "interpretable": self.f1.interpretable() if self.f1 else None,
            "cover": self.f1.cover() if self.f1 else {},
        }


def _plain(control: Mapping[str, Mapping[int, Control]]) -> dict[str, dict[str, Any]]:
    return {name: {str(count): vars(found) for count, found in part.items()} for name, part in control.items()}


def approximation(
    x: Tensor, instead: Tensor, mean: Tensor, patch: Patch, metric: Callable[[Tensor], Tensor]
) -> Approximation:
    """Compare what a model does with other activations, with its own, and with their mean.

    Parameters
    ----------
    x, instead
        The model's activations, and others, ``(prompts, d)``.
    mean
        ``(d,)``.
    patch, metric
        Activations → logits → ``(prompts,)``.

    Raises
    ------
    CalibrationError
        If the activations make no difference to the metric, so that there is nothing to recover.
    """
    whole, other, flat = (patch(part) for part in (x, instead, mean.expand_as(x)))
    best, found, worst = (float(metric(logits).double().mean()) for logits in (whole, other, flat))
    if abs(best - worst) < 1e-6 * max(1.0, abs(best)):
        raise CalibrationError("the mean activation does as well as the model's own; choose a place that matters")
    log, log_whole = other.log_softmax(-1), whole.log_softmax(-1)
    divergence = (log_whole.exp() * (log_whole - log)).sum(-1).mean()
    agreement = (other.argmax(-1) == whole.argmax(-1)).float().mean()
    return Approximation((found - worst) / (best - worst), float(agreement), float(divergence))


def control(task: Counterfactual, edited: Tensor, probes: Probes, magnitude: Tensor | None = None) -> Control:
    """Judge edited activations."""
    (before, wanted), found = task.ends, task.patch(edited)
    ends = [float(task.metric(logits).double().mean()) for logits in (before, found, wanted)]
    reach = ends[2] - ends[0]
    distance = (edited - task.wanted).norm(dim=1) / (task.x - task.wanted).norm(dim=1).clamp(min=1e-12)
    return Control(
        float(distance.mean()),
        float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        (ends[1] - ends[0]) / reach if abs(reach) > 1e-6 else 0.0,
        None if magnitude is None else float(magnitude.mean()),
        probes.preserved(edited, task.wanted, task.attribute),
    )


class Probes:
    """Ridge regressions that read variables from activations, to see what an edit disturbs.

    Parameters
    ----------
    x
        Activations, ``(prompts, d)``.
    labels
        Variable → its value on every prompt.
    ridge
        Weight of the penalty, as a share of the mean variance.
    """

    def __init__(self, x: Tensor, labels: Mapping[str, Tensor], ridge: float = 1e-2):
        self.mean = x.mean(0)
        centred = (x - self.mean).double()
        gram = centred.t() @ centred
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.weights = {
            name: torch.linalg.solve(gram, centred.t() @ _centred_one_hot(value)).float()
            for name, value in labels.items()
        }

    def read(self, x: Tensor, name: str) -> Tensor:
        """The likeliest value, ``(prompts,)``."""
        return ((x - self.mean) @ self.weights[name]).argmax(1)

    def preserved(self, one: Tensor, other: Tensor, but: str) -> float:
        """Share of the values of all variables but one that read the same from both."""
        same = [self.read(one, name) == self.read(other, name) for name in self.weights if name != but]
        return float(torch.stack(same).float().mean()) if same else 1.0


def _centred_one_hot(value: Tensor) -> Tensor:
    marks = torch.nn.functional.one_hot(value).double()
    return marks - marks.mean(0)


def evaluate_dictionary(
    dictionary: Dictionary,
    training: Tensor,
    training_labels: Mapping[str, Tensor],
    x: Tensor,
    patch: Patch,
    metric: Callable[[Tensor], Tensor],
    counterfactuals: Sequence[Counterfactual] = (),
    k: Sequence[int] = (1, 2, 4, 8),
) -> DictionaryReport:
    """Ask the three questions of a dictionary.

    Parameters
    ----------
    dictionary
        The dictionary.
    training, training_labels
        Activations with known variables, on which the mean, F1 and probes are found.
    x
        Activations on other prompts, ``(prompts, d)``.
    patch, metric
        Into those prompts; see :func:`approximation`.
    counterfactuals
        Prompts of which a variable is to be changed.
    k
        Numbers of features to exchange.
    """
    mean = training.mean(0)
    output = dictionary.reconstruct(x)
    f1 = latent_f1(dictionary.encode(training) > 0, training_labels)
    probes = Probes(training, training_labels)
    by_distance: dict[str, dict[int, Control]] = {}
    by_meaning: dict[str, dict[int, Control]] = {}
    for task in counterfactuals:
        name = task.attribute
        edits = greedy_edits(dictionary, task.x, task.wanted, k)
        by_distance[name] = {count: _judge(task, edit, probes) for count, edit in edits.items()}
        named = {
            count: interpreted_edit(
                dictionary, task.x, task.wanted, task.old[name], task.new[name], f1.table[name], count
            )
            for count in k
        }
        by_meaning[name] = {count: _judge(task, edit, probes) for count, edit in named.items()}
    return DictionaryReport(
        approximation(x, output, mean, patch, metric),
        approximation(x, mean + x - output, mean, patch, metric),
        by_distance,
        by_meaning,
        f1,
        float((x - output).square().sum() / (x - x.mean(0)).square().sum()),
    )


def _judge(task: Counterfactual, edit: Edit, probes: Probes) -> Control:
    return control(task, edit.activations, probes, edit.magnitude)
