"""What fires together: correlation of the activity at both ends of an edge, also of edges that do not exist.

Forward hooks add up first and second moments of inputs and outputs of linear layers; the correlation follows from them
when edges are exchanged. As a score for :meth:`gossamer.core.topology.Topology.exchange` it decides which
edges go and which come, alone or with another score at the other end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.topology import Topology
from gossamer.errors import ConfigurationError, UnknownNameError

Variant = Literal["absolute", "signed", "residual"]
_EPSILON = 1e-12
_ROUNDING = 1e-8  # of a variance, in units of the squares that it is the difference of
_SILENT = -2.0  # below every correlation: a unit that never changes is the last to get an edge


class HebbianScore:
    """Correlation of the activity before an edge with that behind it.

    ``C_ji = E[(a_i − ā_i)(b_j − b̄_j)] / (σ_{a_i} σ_{b_j} + ε)``, Konstantaropoulos, Smirnakis & Papadopouli, 2025,
    arXiv 2508.14140, over all forward passes in training since the last :meth:`forget`.

    Parameters
    ----------
    variant
        ``"absolute"``: |C|; ``"signed"``: C; ``"residual"``: |C| with, instead of the activity behind the edge, the
        gradient of the loss there. The first tends to choose what repeats the edges that a unit has already, the last
        what explains the error that they leave.
    activation
        What follows the linear layer, through which its output counts as activity.
    when
        Number of steps made → whether forward passes now count. Default: always.

    Raises
    ------
    UnknownNameError
        If there is no such variant.
    """

    def __init__(
        self,
        variant: Variant = "absolute",
        activation: Callable[[Tensor], Tensor] = torch.relu,
        when: Callable[[int], bool] | None = None,
    ):
        if variant not in get_args(Variant):
            raise UnknownNameError("variant of the correlation", variant, get_args(Variant))
        self.variant, self.activation, self.when = variant, activation, when
        self._training: SparseTraining | None = None
        self._handles: list[Any] = []

    def attach(self, training: SparseTraining) -> None:
        """Listen to all layers of a run; moments are kept in its ``extra`` and saved with it.

        Raises
        ------
        ConfigurationError
            If a target is not the weight of a linear layer.
        """
        for name, target in training.targets.items():
            if not isinstance(target.module, nn.Linear | SparseWeight) or len(target.shape) != 2:
                raise ConfigurationError(
                    f"{name} belongs to a {type(target.module).__name__}; correlations are those of linear layers, "
                    f"exclude it or take another rule"
                )
        self._training = training
        for name, target in training.targets.items():
            self._handles.append(target.module.register_forward_hook(self._hook(name)))

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hear(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            training = self._training
            if training is None or not module.training or (self.when and not self.when(training.step)):
                return
            before = inputs[0].detach().flatten(0, -2)
            if self.variant != "residual":
                self._add(name, before, self.activation(output.detach()).flatten(0, -2))
            elif output.requires_grad:
                output.register_hook(lambda gradient: self._add(name, before, gradient.detach().flatten(0, -2)))

        return hear

    @torch.no_grad()
    def _add(self, name: str, before: Tensor, behind: Tensor) -> None:
        """Add a batch, ``(n, in)`` and ``(n, out)``, to the moments, which are taken about the first batch's mean."""
        assert self._training is not None
        extra, key = self._training.extra, f"activity of {name}"
        if f"{key}, count" not in extra:
            extra[f"{key}, count"] = 0
            for end, values in (("before", before), ("behind", behind)):
                extra[f"{key}, centre {end}"] = values.mean(0)
                extra[f"{key}, sum {end}"] = torch.zeros_like(values[0])
                extra[f"{key}, squares {end}"] = torch.zeros_like(values[0])
            extra[f"{key}, products"] = before.new_zeros(behind.shape[1], before.shape[1])
        ends = {"before": before, "behind": behind}
        centred = {end: values - extra[f"{key}, centre {end}"] for end, values in ends.items()}
        extra[f"{key}, count"] += len(before)
        for end, values in centred.items():
            # new tensors instead of changed ones: a state that has been handed out must not change
            extra[f"{key}, sum {end}"] = extra[f"{key}, sum {end}"] + values.sum(0)
            extra[f"{key}, squares {end}"] = extra[f"{key}, squares {end}"] + values.square().sum(0)
        extra[f"{key}, products"] = torch.addmm(extra[f"{key}, products"], centred["behind"].t(), centred["before"])

    def correlation(self, name: str) -> Tensor:
        """C of a layer, ``(out, in)``; 0 where a unit has not changed.

        Raises
        ------
        ConfigurationError
            If nothing has been heard of it.
        """
        covariance, deviation = self._moments(name)
        return _correlation(covariance, deviation)

    def _moments(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Covariance and standard deviations."""
        extra, key = self._training.extra if self._training else {}, f"activity of {name}"
        count = extra.get(f"{key}, count", 0)
        if not count:
            raise ConfigurationError(
                f"no forward pass of {name} in training mode has been heard; attach the score before training"
            )
        mean = {end: extra[f"{key}, sum {end}"] / count for end in ("before", "behind")}
        variance = {end: extra[f"{key}, squares {end}"] / count - mean[end].square() for end in mean}
        covariance = extra[f"{key}, products"] / count - mean["behind"].unsqueeze(1) * mean["before"]
        # what rounding leaves of a constant is no variance
        floor = {end: _ROUNDING * (extra[f"{key}, centre {end}"].square() + variance[end].clamp_min(0)) for end in mean}
        return covariance, {e: torch.where(variance[e] > floor[e], variance[e], 0).sqrt() for e in mean}

    def __call__(self, training: Topology, name: str) -> Tensor:
        """Score of every edge, existing or not, ``(out, in)``; lower than any correlation at a unit that is silent.

        Raises
        ------
        ConfigurationError
            If the score is not attached to this run, or nothing has been heard.
        """
        if self._training is not training:
            raise ConfigurationError("the correlations are of another run; attach the score to this one")
        covariance, deviation = self._moments(name)
        found = _correlation(covariance, deviation)
        found = found if self.variant == "signed" else found.abs()
        silent = (deviation["behind"] == 0).unsqueeze(1) | (deviation["before"] == 0)
        return found.masked_fill(silent, _SILENT)

    def forget(self) -> None:
        """Begin anew, as after an exchange: activity has changed."""
        if self._training is not None:
            for key in [key for key in self._training.extra if key.startswith("activity of ")]:
                del self._training.extra[key]


def _correlation(covariance: Tensor, deviation: dict[str, Tensor]) -> Tensor:
    return covariance / (deviation["behind"].unsqueeze(1) * deviation["before"] + _EPSILON)
