"""Penalties on activations: what makes neurons fall silent while a model trains.

A penalty listens at taps of a model. Its value is computed on the spot, so that no activation is kept for it: what
waits for :meth:`ActivationPenalty.loss` is one number for each tap, with its gradient. It may be asked after every
forward pass, as gradient accumulation does, and forgets what nobody asked for; passes without gradients, such as
those of an evaluation, are not heard; and when activation checkpointing repeats a forward pass, the repetition is not
counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.taps import Listening, Tap, weighted_mean
from gossamer.errors import ConfigurationError, NonFiniteError, UnknownNameError

Kind = Literal["l1", "l0", "hoyer", "tanh"]
Reduction = Literal["mean", "token", "sum"]
Factor = float | Callable[[int], float]


def l1(values: Tensor, eps: float) -> Tensor:
    """``Σ_j |a_j|`` of every token, ``(…, features)`` → ``(…)``."""
    return values.abs().sum(-1)


def l0(values: Tensor, eps: float) -> Tensor:
    """``Σ_j a_j² / (a_j² + ε)``: a smooth count of what is not zero.

    Its slope ``2 ε a / (a² + ε)²`` is next to nothing where |a| is well above √ε: large activations are left alone.
    """
    squares = values.square()
    return (squares / (squares + eps)).sum(-1)


def hoyer(values: Tensor, eps: float) -> Tensor:
    """``(Σ_j |a_j|)² / Σ_j a_j²``: between 1 and the number of features, whatever the scale; 0 where all are zero.

    Yang, Wen & Li, 2020, "DeepHoyer", arXiv 1908.09979.
    """
    squares = values.square().sum(-1)
    return values.abs().sum(-1).square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)


def tanh(values: Tensor, eps: float) -> Tensor:
    """``Σ_j tanh(|a_j| / √ε)``: a count whose slope is steepest at zero."""
    return (values.abs() / math.sqrt(eps)).tanh().sum(-1)


PENALTIES: dict[str, Callable[[Tensor, float], Tensor]] = {"l1": l1, "l0": l0, "hoyer": hoyer, "tanh": tanh}
"""Kind → function of ``(…, features)`` and ε that gives ``(…)``, a value of each token."""


class ActivationPenalty:
    """A penalty on the activations at some taps of a model.

    Parameters
    ----------
    model
        The one that is called in training; if it is wrapped for training (by PEFT, for instance), the wrapped one.
    taps
        Where.
    kind
        One of :data:`PENALTIES`.
    weight
        What the penalty is multiplied by: a number, or a function of the step.
    eps
        ε of ``l0`` and ``tanh``, above 0, or a function of the step: lowered from a large one, it reaches first what
        is large and then what is left.
    reduction
        ``mean``: over tokens and features and over the taps of a group, added over groups. ``token``: added over
        features and taps, mean over tokens, which is the formula as most papers print it. ``sum``: added over all.
        The weight has a meaning only together with it; see :func:`rescaled_weight`.

    Attributes
    ----------
    step
        Steps of training so far; :meth:`advance` counts them.
    value, per_tap
        The last penalty without its weight, and the part of each tap, as numbers.

    Raises
    ------
    UnknownNameError
        If there is no such kind.
    ConfigurationError
        If a number is out of range.
    TargetError
        If there is no tap.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> penalty = ActivationPenalty(layer, [Tap("in", layer)], "l1", weight=0.5, reduction="token")
    >>> _ = layer(torch.tensor([[1.0, -3.0]], requires_grad=True))
    >>> float(penalty.loss().detach())
    2.0
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[Tap],
        kind: str = "l1",
        *,
        weight: Factor = 1.0,
        eps: Factor = 1e-7,
        reduction: Reduction = "mean",
    ) -> None:
        if kind not in PENALTIES:
            raise UnknownNameError("penalty", kind, PENALTIES)
        if reduction not in get_args(Reduction):
            raise ConfigurationError(f"reduction is {reduction!r}; use one of {', '.join(get_args(Reduction))}")
        self.kind, self.reduction = kind, reduction
        self.weight, self.eps = weight, eps
        self.step = 0
        self.value = 0.0
        self.per_tap: dict[str, float] = {}
        self._model = model
        self._heard: dict[str, list[Tensor]] = {}
        self._hidden = ""
        self._wanted = False
        _at(weight, 0, "weight", 0.0)
        _at(eps, 0, "eps", math.ulp(0.0))
        self.listening = Listening(model, taps, self._hear, self._begin)
        self.groups = {tap.name: tap.group for tap in self.listening.taps}

    @property
    def current_weight(self) -> float:
        """The weight at this step."""
        return _at(self.weight, self.step, "weight", 0.0)

    @property
    def current_eps(self) -> float:
        """ε at this step."""
        return _at(self.eps, self.step, "eps", math.ulp(0.0))

    def advance(self, steps: int = 1) -> None:
        """Count steps of training."""
        self.step += steps

    def close(self) -> None:
        """Take the penalty off the model."""
        self.listening.close()
        self._heard.clear()

    def __enter__(self) -> ActivationPenalty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def loss(self) -> Tensor:
        """The penalty of the last forward pass times its weight, a scalar; asked once, it is forgotten.

        Raises
        ------
        ConfigurationError
            If no forward pass in training mode with gradients was made since it was asked last, or activation
            checkpointing hid it.
        NonFiniteError
            If activations are NaN or infinite.
        """
        heard, self._heard = self._heard, {}
        if self._hidden:
            raise ConfigurationError(
                f"activation checkpointing runs {self._hidden} without gradients, so that no penalty can reach it; "
                f"set use_reentrant=False"
            )
        if not heard:
            raise ConfigurationError(
                "no activation was heard: call the model that the penalty was given, in training mode and with "
                "gradients, before each loss()"
            )
        parts = {name: torch.stack(values) for name, values in heard.items()}
        per_tap = {name: part.mean() if self.reduction == "mean" else part.sum() for name, part in parts.items()}
        total = self._total(per_tap)
        self.per_tap = {name: float(part.detach()) for name, part in per_tap.items()}
        self.value = float(total.detach())
        if not math.isfinite(self.value):
            where = next(name for name, part in self.per_tap.items() if not math.isfinite(part))
            raise NonFiniteError(f"{where}: activations are NaN or infinite at step {self.step}; lower the rate")
        return self.current_weight * total

    def ratio(self, task_loss: float) -> float:
        """The weighted penalty as a share of the loss of the task, to be logged; infinite if that is zero."""
        weighted = self.current_weight * self.value
        return weighted / task_loss if task_loss else math.inf

    def _total(self, per_tap: dict[str, Tensor]) -> Tensor:
        device = next(iter(per_tap.values())).device
        groups: dict[str, list[Tensor]] = {}
        for name, part in per_tap.items():
            groups.setdefault(self.groups[name], []).append(part.to(device))
        reduced = [torch.stack(parts) for parts in groups.values()]
        return sum(
            (part.mean() if self.reduction == "mean" else part.sum() for part in reduced), reduced[0].new_zeros(())
        )

    def _begin(self) -> None:
        self._heard, self._hidden = {}, ""
        self._wanted = self._model.training and torch.is_grad_enabled()

    def _hear(self, tap: Tap, values: Tensor, mask: Tensor | None) -> None:
        if not self._wanted:
            return
        if not torch.is_grad_enabled():
            self._hidden = self._hidden or tap.name
            return
        # the repetition of a checkpointed pass must save the same tensors as the pass itself did
        found = self._reduced(values.float() if values.dtype in (torch.float16, torch.bfloat16) else values, mask)
        if self.listening.running:
            self._heard.setdefault(tap.name, []).append(found)

    def _reduced(self, values: Tensor, mask: Tensor | None) -> Tensor:
        tokens = PENALTIES[self.kind](values, self.current_eps)
        if self.reduction == "sum":
            return tokens.sum() if mask is None else (tokens * mask.to(tokens)).sum()
        mean = weighted_mean(tokens, mask)
        return mean / values.shape[-1] if self.reduction == "mean" else mean


def rescaled_weight(
    weight: float, widths: Sequence[int], source: Reduction, target: Reduction, tokens: int = 1
) -> float:
    """The weight under one reduction that has the effect of a weight under another, for taps in one group.

    Parameters
    ----------
    weight
        Under `source`.
    widths
        Features at each tap; all equal, since a mean weighs taps alike and a sum does not.
    source, target
        Reductions.
    tokens
        Real tokens of a batch, if one of the reductions is ``sum``.

    Raises
    ------
    ConfigurationError
        If widths differ or there are none, or `tokens` is below 1.

    Examples
    --------
    >>> rescaled_weight(0.05, [100, 100], "token", "mean")
    10.0
    """
    if len(set(widths)) != 1 or tokens < 1:
        raise ConfigurationError(f"widths are {list(widths)} and tokens {tokens}; equal widths and a token are needed")
    entries = {"mean": float(sum(widths)), "token": 1.0, "sum": 1.0 / tokens}
    return weight * entries[target] / entries[source]


def _at(factor: Factor, step: int, name: str, least: float) -> float:
    value = factor(step) if callable(factor) else factor
    if not (math.isfinite(value) and value >= least):
        bound = "at least 0" if least == 0 else "above 0"
        raise ConfigurationError(f"{name} is {value} at step {step}; it must be finite and {bound}")
    return float(value)
