"""From candidates to one model: the mean of all, a greedily chosen mean, or the best one alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.averaging import average_models, recalibrate_batch_norm
from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError

State: TypeAlias = dict[str, Tensor]
Mix = Literal["uniform", "greedy", "best"]
Evaluate: TypeAlias = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Mixed:
    """What became of the candidates.

    Attributes
    ----------
    chosen
        Numbers of those that are in the mean.
    scores
        Validation score of each candidate, where they were needed.
    state
        The mean.
    """

    chosen: tuple[int, ...]
    scores: tuple[float, ...]
    state: State


def check_mix(
    method: Mix, model: nn.Module, count: int, evaluate: Evaluate | None, batches: Sequence[Any] | None
) -> None:
    """Refuse, before anything is trained, what could not be mixed afterwards.

    Raises
    ------
    ConfigurationError
        If a score is needed and cannot be had, or the model has batch norm and there is no data for it.
    """
    if method != "uniform" and evaluate is None:
        raise ConfigurationError(
            f"a {method} soup is chosen by validation score; give evaluate, on data that judge nothing else"
        )
    if count > 1 and method != "best" and not batches and has_batch_norm(model):
        raise ConfigurationError(
            "the model has batch norm, whose statistics do not fit the mean of several models; "
            "give batches of training data to measure them anew"
        )


def mix(
    method: Mix,
    model: nn.Module,
    masks: MaskSet,
    states: Sequence[State],
    evaluate: Evaluate | None = None,
    batches: Sequence[Any] | None = None,
    fraction: float = 1.0,
) -> Mixed:
    """Make one model of several that share their masks.

    The greedy soup begins with the best candidate; the others are tried from the best down, and each stays if the
    validation score of the mean, its batch norm measured anew, is no lower with it [Wortsman et al., 2022, arXiv
    2203.05482].

    Parameters
    ----------
    method
        ``"uniform"``, ``"greedy"`` or ``"best"``.
    model
        Of the shape of the candidates; it stays as it is.
    masks
        Zeros of every candidate.
    states
        The candidates.
    evaluate
        Model in evaluation mode → validation score, higher is better.
    batches, fraction
        For :func:`gossamer.core.averaging.recalibrate_batch_norm`.

    Raises
    ------
    ConfigurationError
        If the zeros of a candidate differ from the masks, or something needed is missing.
    """
    check_mix(method, model, len(states), evaluate, batches)
    everyone = tuple(range(len(states)))

    def mean(chosen: Sequence[int]) -> State:
        return _mean(model, masks, [states[number] for number in chosen], batches, fraction)

    def score(state: State) -> float:
        assert evaluate is not None
        return float(evaluate(with_state(model, state).eval()))

    if method == "uniform" or len(states) == 1:
        return Mixed(everyone, (), mean(everyone))
    found = tuple(score(state) for state in states)
    first, *others = sorted(everyone, key=lambda number: -found[number])
    chosen, highest = [first], found[first]
    for number in others if method == "greedy" else ():
        reached = score(mean([*chosen, number]))
        if reached >= highest:
            chosen, highest = [*chosen, number], reached
    return Mixed(tuple(sorted(chosen)), found, mean(sorted(chosen)))


def _mean(
    model: nn.Module, masks: MaskSet, states: Sequence[State], batches: Sequence[Any] | None, fraction: float
) -> State:
    if len(states) == 1:
        return states[0]
    mean = with_state(model, average_models(states, masks=masks))
    if batches:
        recalibrate_batch_norm(mean, batches, fraction)
    return {name: tensor.detach().clone() for name, tensor in mean.state_dict().items()}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model keeps statistics that belong to its weights."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights and buffers."""
    made = copy.deepcopy(model)
    made.load_state_dict(state)
    return made
