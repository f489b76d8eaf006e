"""What a stream costs: products that are left when those with zeros are skipped, frame by frame and layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.activations.delta_layers import products_of_inputs
from gossamer.activations.delta_model import DeltaModel
from gossamer.errors import CalibrationError, TargetError


@dataclass(frozen=True)
class LayerCost:
    """Products of one layer for one frame, on average over clips.

    Attributes
    ----------
    name
        Of the layer.
    dense
        With nothing skipped.
    first
        Left in the first frame of a clip.
    later
        Left in one of the others; None if there are none.
    zeros
        Share of zeros among what enters it in those.
    state_values
        Numbers to remember for a stream: its last input and its last output.
    """

    name: str
    dense: float
    first: float
    later: float | None
    zeros: float | None
    state_values: int


@dataclass(frozen=True)
class StreamCost:
    """Of a whole model.

    Attributes
    ----------
    layers
        In the order in which they run.
    frames
        Of each clip.
    """

    layers: tuple[LayerCost, ...]
    frames: int

    @property
    def dense(self) -> float:
        """Products of a frame with nothing skipped."""
        return sum(layer.dense for layer in self.layers)

    @property
    def first(self) -> float:
        """Products left in the first frame."""
        return sum(layer.first for layer in self.layers)

    @property
    def later(self) -> float:
        """Products left in a later frame; 0 if there are none."""
        return sum(layer.later or 0.0 for layer in self.layers)

    @property
    def live_share(self) -> float:
        """Products left over all frames, the first among them, as a share of dense."""
        return (self.first + (self.frames - 1) * self.later) / (self.frames * self.dense)

    @property
    def later_share(self) -> float:
        """Products left in later frames, as a share of dense."""
        return self.later / self.dense

    @property
    def state_values(self) -> int:
        """Numbers to remember for a stream."""
        return sum(layer.state_values for layer in self.layers)


def delta_ops(model: nn.Module, clip: Tensor) -> StreamCost:
    """Products with changes that are not zero: the cost of delta inference [arXiv 2107.07305].

    Parameters
    ----------
    model
        A :class:`~gossamer.activations.delta_model.DeltaModel`, or any network of frames. It is put in
        evaluation mode for the while.
    clip
        ``(batch, time, …)``.

    Raises
    ------
    CalibrationError
        If that is not its shape.
    TargetError
        If the model has no linear layer and no convolution.
    """
    return _count(model, clip, changes=True)


def frame_ops(model: nn.Module, clip: Tensor) -> StreamCost:
    """As :func:`delta_ops` for a network that computes every frame anew, and skips the zeros in it."""
    return _count(model, clip, changes=False)


@torch.no_grad()
def _count(model: nn.Module, clip: Tensor, changes: bool) -> StreamCost:
    if clip.dim() < 3:
        raise CalibrationError(f"the clip has shape {tuple(clip.shape)}; (batch, time, …) is needed")
    layers: list[LayerCost] = []

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers.append(_layer_cost(name, module, inputs[0], output, clip.shape[1], changes))

        return count

    kinds = (nn.Linear, nn.Conv2d)
    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    if not handles:
        raise TargetError("the model has no nn.Linear and no nn.Conv2d, whose products could be counted")
    training = model.training
    model.eval()
    try:
        model(clip if isinstance(model, DeltaModel) else clip.flatten(0, 1))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return StreamCost(tuple(layers), clip.shape[1])


def _layer_cost(
    name: str, module: nn.Module, entering: Tensor, output: Tensor, frames: int, changes: bool
) -> LayerCost:
    fan_out = products_of_inputs(module, entering)
    states = entering.unflatten(0, (-1, frames))
    sent = states
    if changes:
        sent = torch.cat([states[:, :1], states[:, 1:] - states[:, :-1]], 1)
    live = sent != 0
    products = (live * fan_out).flatten(2).sum(2).double()
    later = frames > 1
    return LayerCost(
        name=name,
        dense=float(fan_out.expand_as(entering[0]).double().sum()),
        first=float(products[:, 0].mean()),
        later=float(products[:, 1:].mean()) if later else None,
        zeros=float(1 - live[:, 1:].double().mean()) if later else None,
        state_values=entering[0].numel() + output[0].numel(),
    )
