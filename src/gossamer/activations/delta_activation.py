"""Delta activations: between two frames of a video little changes, so a layer sends only what did.

An activation is rounded to whole steps of a size θ that is learned, and the next layer is told the difference from
the last frame. What has not moved by a step is a zero, and its products can be left out. Two things make this more
than a threshold. Because the state is quantised, and not the difference, errors do not add up. And because θ gets
the *negated* gradient, a penalty on the size of the differences makes steps larger instead of shrinking them to
nothing, until the loss of the task objects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.gates import quantize_st
from gossamer.core.penalties import PENALTIES
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

Granularity = Literal["layer", "channel", "neuron"]
Activation = Literal["relu", "softmax", "identity"]
_LEAST = 1e-6  # of θ, by which values are divided
_SMOOTH = 1e-2  # ε of penalties that have one; a change is at least a step


class TemporalActivation(nn.Module, ABC):
    """An activation that knows which of its inputs are successive frames.

    Attributes
    ----------
    clip_length
        Frames of a clip, where batch and time are folded into one dimension; None where they are not.
    streaming
        Whether each call brings one frame ``(batch, …)``, and :attr:`previous` is what was sent so far.
    """

    clip_length: int | None = None
    streaming: bool = False
    previous: Tensor | None = None

    def reset(self) -> None:
        """Forget the frames so far; the next one is the first."""
        self.previous = None

    def forward(self, x: Tensor) -> Tensor:
        """What the receiver knows of the activation after each frame, in the shape of the input."""
        if self.streaming:
            self.previous = self.advance(x, self.previous)
            return self.previous
        if self.clip_length is not None:
            return self.clip(x.unflatten(0, (-1, self.clip_length))).flatten(0, 1)
        return self.clip(x)

    @abstractmethod
    def clip(self, x: Tensor) -> Tensor:
        """States of whole clips ``(batch, time, …)``."""

    @abstractmethod
    def advance(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """State after a frame ``(batch, …)`` from that before."""


@register(
    "delta-activation",
    paper="delta-activation",
    when="layer",
    granularity="activations",
    needs_data=False,
    timing="during training",
    path=("dense-to-dense",),
    topology="dynamic",
    criterion=("activation", "learned"),
    aims=("inference",),
)
class DeltaActivation(TemporalActivation):
    """Round an activation to steps of a learned size, and penalise how much it changes from frame to frame.

    Yousefzadeh & Sifalakis, 2021, "Training for temporal sparsity in deep neural networks, application in video
    processing", arXiv 2107.07305, and the authors' code (msifalakis/delta_activation_layer): ``a = relu(s)``,
    ``q = round(a / |θ|) · |θ|``, ``d_t = q_t − q_{t−1}``, and the loss ``rate · fan_out · mean_{t ≥ 2} |d_t|``.

    Parameters
    ----------
    granularity
        What has a θ of its own: the ``"layer"``, every ``"channel"`` (the first dimension after time) or every
        ``"neuron"``.
    theta_init
        θ at first.
    rate
        Weight of the loss.
    fan_out
        Products that a change of one neuron costs, which weighs the loss; None counts as 1.
    learn_theta
        Whether θ trains.
    activation
        ``"relu"``, ``"softmax"`` over the channels, or ``"identity"``.
    size
        Channels, or shape of a frame; needed for the granularity of the same name.
    delta_level
        What :meth:`forward` returns: 0 for the states q, 1 for the changes with the first frame as a whole, 2 for the
        changes with zeros in its place, as an event camera sends them. (The authors' code repeats the second frame's
        change there, and has all changes with the opposite sign.)
    theta_gradient
        Factor of the gradient to θ. The paper's −1; with 1 it is that of an ordinary product.
    kind
        Of the loss, a key of :data:`gossamer.core.penalties.PENALTIES`; the paper's is ``"l1"``.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If a name is unknown, a number out of range, or the size missing.
    """

    def __init__(
        self,
        granularity: Granularity = "layer",
        theta_init: float = 0.1,
        rate: float = 1.0,
        fan_out: float | None = None,
        learn_theta: bool = True,
        *,
        activation: Activation = "relu",
        size: int | tuple[int, ...] | None = None,
        delta_level: Literal[0, 1, 2] = 0,
        theta_gradient: float = -1.0,
        kind: str = "l1",
    ):
        super().__init__()
        named = (("granularity", granularity, Granularity), ("activation", activation, Activation))
        for word, name, known in named:
            if name not in get_args(known):
                raise UnknownNameError(word, name, get_args(known))
        if kind not in PENALTIES:
            raise UnknownNameError("penalty", kind, PENALTIES)
        if not (theta_init > 0 and math.isfinite(theta_init)) or rate < 0 or (fan_out is not None and fan_out < 0):
            raise ConfigurationError(
                f"theta_init is {theta_init}, rate {rate}, fan_out {fan_out}; "
                "the first must be positive, the others 0 or more"
            )
        if delta_level not in (0, 1, 2):
            raise ConfigurationError(f"delta_level is {delta_level}; use 0, 1 or 2")
        if granularity != "layer" and size is None:
            raise ConfigurationError(f"granularity {granularity!r} needs size: the channels, or the shape of a frame")
        self.granularity, self.rate, self.fan_out = granularity, rate, fan_out
        self.activation, self.delta_level, self.theta_gradient = activation, delta_level, theta_gradient
        self.kind = kind
        frame = (size,) if isinstance(size, int) else tuple(size or ())
        self.frame = frame if granularity == "neuron" else frame[:1] if granularity == "channel" else ()
        self.theta = nn.Parameter(torch.full(self.frame, float(theta_init)), requires_grad=learn_theta)
        self.changes: Tensor | None = None

    def step_size(self, frame_dimensions: int) -> Tensor:
        """|θ|, at least a millionth, in a shape that fits a frame of so many dimensions."""
        theta = self.theta.abs().clamp(min=_LEAST)
        return theta.view(-1, *[1] * (frame_dimensions - 1)) if self.granularity == "channel" else theta

    def quantized(self, x: Tensor, channels: int) -> Tensor:
        """``round(a / |θ|) · |θ|`` of pre-activations whose channels are in that dimension."""
        frame = tuple(x.shape[channels:])
        wanted = frame if self.granularity == "neuron" else frame[: len(self.frame)]
        if x.dim() <= channels or wanted != self.frame:
            raise CalibrationError(
                f"the input has shape {tuple(x.shape)}, its frames {frame}; {self.granularity} steps of shape "
                f"{self.frame} need (batch, time, …) or (batch, …) while streaming: check the axis of time"
            )
        if self.activation == "relu":
            x = torch.relu(x)
        elif self.activation == "softmax":
            x = torch.softmax(x, channels)
        return quantize_st(x, self.step_size(len(frame)).to(x.dtype), self.theta_gradient)

    def clip(self, x: Tensor) -> Tensor:
        """States or changes of clips ``(batch, time, …)``; see `delta_level`."""
        states = self.quantized(x, 2)
        self.changes = states[:, 1:] - states[:, :-1]
        if self.delta_level == 0:
            return states
        first = states[:, :1] if self.delta_level == 1 else torch.zeros_like(states[:, :1])
        return torch.cat([first, self.changes], 1)

    def advance(self, x: Tensor, previous: Tensor | None) -> Tensor:  # noqa: D102
        return self.quantized(x, 1)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Take the pre-activations of one frame ``(batch, …)``, and return the change to send."""
        before = self.previous
        self.previous = state = self.quantized(x, 1)
        if before is None:
            return state.clone() if self.delta_level < 2 else torch.zeros_like(state)
        return state - before

    def penalty(self) -> Tensor:
        """``rate · fan_out · mean |d_t|`` of the last clips, without their first frames.

        Raises
        ------
        CalibrationError
            If there were none, or they had a single frame.
        """
        if self.changes is None or not self.changes.shape[1]:
            raise CalibrationError(
                "no change to penalise: call the layer on clips (batch, time, …) of 2 frames at least"
            )
        changes = self.changes.flatten(2)
        size = PENALTIES[self.kind](changes, _SMOOTH).mean() / changes.shape[2]
        return self.rate * (1.0 if self.fan_out is None else self.fan_out) * size

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.granularity!r}, rate={self.rate}, fan_out={self.fan_out}, activation={self.activation!r}"


class DeltaThreshold(TemporalActivation):
    """Send a change only where it exceeds a threshold: the delta network that needs no training. A baseline.

    Neil et al., 2017, "Delta Networks for Optimized Recurrent Network Computation", arXiv 1612.05571.

    Parameters
    ----------
    threshold
        Of the change, 0 or more.
    remember
        Whether a change is counted from what was sent last. Without, it is counted from the last frame, and what is
        never sent adds up: the receiver drifts.
    rectify
        Whether ReLU comes before.

    Raises
    ------
    ConfigurationError
        If the threshold is negative.
    """

    def __init__(self, threshold: float, remember: bool = True, rectify: bool = True):
        super().__init__()
        if not threshold >= 0:
            raise ConfigurationError(f"threshold is {threshold}; it must be 0 or more")
        self.threshold, self.remember, self.rectify = threshold, remember, rectify
        self.last: Tensor | None = None

    def reset(self) -> None:  # noqa: D102
        super().reset()
        self.last = None

    def clip(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.dim() < 3:
            raise CalibrationError(f"the input has shape {tuple(x.shape)}; (batch, time, …) is needed")
        self.reset()
        states: list[Tensor] = []
        for frame in x.unbind(1):
            states.append(self.advance(frame, states[-1] if states else None))
        return torch.stack(states, 1)

    def advance(self, x: Tensor, previous: Tensor | None) -> Tensor:  # noqa: D102
        active = torch.relu(x) if self.rectify else x
        before, self.last = self.last, active
        if previous is None or before is None:
            return active
        change = active - (previous if self.remember else before)
        return previous + change * (change.abs() > self.threshold)
