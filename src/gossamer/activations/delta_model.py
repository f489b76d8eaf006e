"""Networks of frames that take clips while they train and streams when they run, and compute what has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.activations.delta_activation import (
    Activation,
    DeltaActivation,
    DeltaThreshold,
    Granularity,
    TemporalActivation,
)
from gossamer.activations.delta_layers import DeltaConv2d, DeltaLayer, DeltaLinear, products_of_inputs
from gossamer.errors import CalibrationError, ConfigurationError, TargetError


class DeltaModel(nn.Module):
    """A network of frames that takes clips, or one frame after the other; see :func:`to_delta`.

    Attributes
    ----------
    model
        The network, with temporal activations and layers that can be told changes.
    entry
        What quantises the frames themselves; None to leave them as they are.
    """

    def __init__(self, model: nn.Module, entry: TemporalActivation | None, frame: tuple[int, ...] | None):
        super().__init__()
        self.model, self.entry, self.frame = model, entry, frame
        self._checked = False

    def forward(self, clip: Tensor) -> Tensor:
        """Outputs of all frames, ``(batch, time, …)``, for clips ``(batch, time, …)``.

        Raises
        ------
        CalibrationError
            If frames have another shape than the example that the model was made with.
        ConfigurationError
            If an activation is called more than once for a frame.
        """
        if clip.dim() < 3 or (self.frame is not None and tuple(clip.shape[2:]) != self.frame):
            wanted = "(batch, time, …)" if self.frame is None else f"(batch, time, {', '.join(map(str, self.frame))})"
            raise CalibrationError(f"clips have shape {tuple(clip.shape)}; {wanted} is needed: check the axis of time")
        for layer in self.activations():
            layer.clip_length, layer.streaming = clip.shape[1], False
        for module in self.modules():
            if isinstance(module, DeltaLayer):
                module.streaming = False
        frames = clip.flatten(0, 1)
        if self.entry is not None:
            frames = self.entry(frames)
        return self._run(frames).unflatten(0, clip.shape[:2])

    @torch.no_grad()
    def step(self, frame: Tensor) -> Tensor:
        """Outputs of the next frame of each stream, ``(batch, …)``, from the changes alone.

        Raises
        ------
        ConfigurationError
            If batch norm is in training mode, which would mix streams, or an activation is called more than once.
        """
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ConfigurationError("batch norm is in training mode; call eval() before frames are streamed")
            if isinstance(module, TemporalActivation):
                module.clip_length, module.streaming = None, True
            elif isinstance(module, DeltaLayer):
                module.streaming = True
        return self._run(frame if self.entry is None else self.entry(frame))

    def _run(self, frames: Tensor) -> Tensor:
        if self._checked:
            return self.model(frames)
        with _called_once(self.model):
            outputs = self.model(frames)
        self._checked = True
        return outputs

    def reset(self) -> None:
        """Forget the streams; the next frames are their first."""
        for module in self.modules():
            if isinstance(module, (TemporalActivation, DeltaLayer)):
                module.reset()

    def activations(self) -> list[TemporalActivation]:
        """All temporal activations, that of the frames first."""
        found = [module for module in self.model.modules() if isinstance(module, TemporalActivation)]
        return found if self.entry is None else [self.entry, *found]

    def penalty(self) -> Tensor:
        """Sum of the losses of all delta activations for the last clips; see :meth:`DeltaActivation.penalty`."""
        return torch.stack(
            [layer.penalty() for layer in self.activations() if isinstance(layer, DeltaActivation)]
        ).sum()


def to_delta(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    granularity: Granularity = "layer",
    theta_init: float = 0.1,
    rate: float = 1.0,
    learn_theta: bool = True,
    theta_gradient: float = -1.0,
    quantize_input: bool = True,
    refresh_every: int | None = None,
) -> DeltaModel:
    """A copy of a network of frames whose ReLUs are delta activations, and whose layers can be told changes.

    Everything between them may be anything that acts on frames, for layers see states and find the changes
    themselves; only a ReLU that is called twice for a frame cannot be told from two.

    Parameters
    ----------
    model
        Takes ``(batch, …)``; its activations are ``nn.ReLU`` modules. It stays as it is.
    example
        A batch of frames. It is needed for channels and neurons, tells the fan-out of every activation (products per
        neuron of the layers that run before the next one, on average over a frame), and fixes the shape of frames.
    granularity, theta_init, rate, learn_theta, theta_gradient
        See :class:`DeltaActivation`.
    quantize_input
        Whether the frames themselves are quantised too, with a θ of their own.
    refresh_every
        See :class:`gossamer.activations.delta_layers.DeltaLayer`.

    Raises
    ------
    TargetError
        If the model has no ``nn.ReLU`` module.
    ConfigurationError
        If an example is missing, or a ReLU is called more than once; without an example the first clip shows that.
    """
    if granularity != "layer" and example is None:
        raise ConfigurationError(
            f"granularity {granularity!r} needs an example, from which channels and shapes are read"
        )
    calls = None if example is None else _trace(model, example)
    rates = {"theta_init": theta_init, "rate": rate, "theta_gradient": theta_gradient}

    def make(name: str, activation: Activation) -> DeltaActivation:
        size, fan_out = (None, None) if calls is None else calls[name]
        made = DeltaActivation(
            granularity, fan_out=fan_out, learn_theta=learn_theta, activation=activation, size=size, **rates
        )
        return made if example is None else made.to(example.device)

    entry = make("", "identity") if quantize_input else None
    frame = None if example is None else tuple(example.shape[1:])
    return DeltaModel(_converted(model, lambda name: make(name, "relu"), refresh_every), entry, frame)


def to_threshold(model: nn.Module, threshold: float, remember: bool = True, at_input: bool = True) -> DeltaModel:
    """As :func:`to_delta` with :class:`DeltaThreshold`, which needs no training."""
    entry = DeltaThreshold(threshold, remember, rectify=False) if at_input else None
    return DeltaModel(_converted(model, lambda name: DeltaThreshold(threshold, remember), None), entry, None)


def _converted(model: nn.Module, make: Callable[[str], nn.Module], refresh_every: int | None) -> nn.Module:
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise TargetError("the model has no nn.ReLU module; exchange its activations for nn.ReLU first")
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ReLU) and seen.setdefault(id(module), name) != name:
            raise _called_again(seen[id(module)])
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, nn.ReLU):
            new = make(name)
        elif type(module) is nn.Linear:
            new = DeltaLinear(module, refresh_every)
        elif type(module) is nn.Conv2d:
            new = DeltaConv2d(module, refresh_every)
        else:
            continue
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def _trace(model: nn.Module, example: Tensor) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape of a frame and fan-out of every ReLU by name, and of the input under ``""``."""
    found: dict[str, tuple[tuple[int, ...], float]] = {"": (tuple(example.shape[1:]), 0.0)}
    current = ""

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal current
            if isinstance(module, nn.ReLU):
                found[name], current = (tuple(output.shape[1:]), 0.0), name
            else:
                shape, fan_out = found[current]
                found[current] = (shape, fan_out + float(products_of_inputs(module, inputs[0]).mean()))

        return hook

    with _called_once(model), _hooked(model, seen), torch.no_grad():
        model(example)
    return found


@contextmanager
def _hooked(model: nn.Module, make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    kinds = (nn.ReLU, nn.Linear, nn.Conv2d)
    handles = [m.register_forward_hook(make(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


@contextmanager
def _called_once(model: nn.Module) -> Iterator[None]:
    """Raise at the second call of an activation inside of the context: what two uses remember would be mixed."""
    called: set[str] = set()

    def once(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in called:
                raise _called_again(name)
            called.add(name)

        return hook

    kinds = (nn.ReLU, TemporalActivation)
    handles = [m.register_forward_pre_hook(once(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called_again(name: str) -> ConfigurationError:
    return ConfigurationError(f"{name} is called more than once for a frame; give each use an nn.ReLU of its own")
