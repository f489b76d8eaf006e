"""What a little data says about the inputs of each layer, gathered in one streaming pass.

A :class:`~gossamer.core.statistics.Statistic` summarises the rows of a layer's input, ``(tokens, in_features)``;
convolutions are unfolded so that they look the same. :func:`observe` attaches the statistics to layers and gathers
them while the model runs. Layers that receive the very same tensor (query, key and value; gate and up) share one
accumulator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core.statistics import AbsoluteHistogram, Gram, InputMoments, InputNorm, InputSample, Statistic
from gossamer.core.targets import Target
from gossamer.errors import ModelError, NonFiniteError

__all__ = [
    "AbsoluteHistogram",
    "Gram",
    "InputMoments",
    "InputNorm",
    "InputSample",
    "Observation",
    "Statistic",
    "Statistics",
    "observe",
    "per_weight",
    "unfold_input",
]


class Statistics(Mapping[type[Statistic], Any]):
    """The statistics of one layer: ``stats[InputNorm].norm``."""

    def __init__(self, kinds: Sequence[type[Statistic]], features: int, device: torch.device | str):
        # a kind that extends another one gathers for both
        own = [kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)]
        made = {kind: kind(features, device) for kind in own}
        self._gathering = list(made.values())
        self._by_kind = {kind: next(made[other] for other in own if issubclass(other, kind)) for kind in kinds}
        self.derived: dict[str, Any] = {}
        """Results worth computing once for all layers that share the input, such as a factorisation."""

    def __getitem__(self, kind: type[Statistic]) -> Any:
        return self._by_kind[kind]

    def __iter__(self) -> Iterator[type[Statistic]]:
        return iter(self._by_kind)

    def __len__(self) -> int:
        return len(self._by_kind)

    @property
    def tokens(self) -> int:
        """Number of input rows seen."""
        return max((statistic.tokens for statistic in self._by_kind.values()), default=0)

    def update(self, inputs: Tensor) -> None:
        """Feed all statistics."""
        for statistic in self._gathering:
            statistic.update(inputs)

    def check_finite(self, name: str) -> None:
        """Raise :class:`NonFiniteError` naming the layer if NaN or infinity came by."""
        for statistic in self._gathering:
            if not torch.isfinite(statistic.check()).all():
                raise NonFiniteError(
                    f"the input of {name} holds NaN or infinity; check the model's weights and the calibration data, "
                    f"or load the model in float32"
                )


def unfold_input(target: Target, inputs: Tensor) -> Tensor:
    """The rows that a layer multiplies, ``(tokens, in_features · kernel)``; with groups, of all groups side by side."""
    module: Any = target.module
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(-2)
        module = _Conv2dShape(module)
    if isinstance(module, (nn.Conv2d, _Conv2dShape)):
        if isinstance(module.padding, str):
            raise ModelError(f"{target.name}: padding={module.padding!r} is not supported for calibration; use numbers")
        columns = torch.nn.functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    if isinstance(module, nn.Conv3d):
        raise ModelError(f"{target.name}: three-dimensional convolutions cannot be calibrated; exclude them")
    return inputs.reshape(-1, inputs.shape[-1])


def _reading(target: Target) -> tuple[Any, ...]:
    """How a layer goes over its input: what makes the same tensor other rows for another layer."""
    return tuple(getattr(target.module, name, None) for name in ("kernel_size", "dilation", "padding", "stride"))


class _Conv2dShape:
    """A one-dimensional convolution seen as a two-dimensional one of height 1."""

    def __init__(self, module: nn.Conv1d):
        self.kernel_size = (1, *module.kernel_size)
        self.dilation = (1, *module.dilation)
        self.padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
        self.stride = (1, *module.stride)


def per_weight(target: Target, values: Tensor) -> Tensor:
    """Spread a value for each input feature over the weight: broadcastable to ``target.matrix()``, float32.

    Parameters
    ----------
    target
        The layer.
    values
        ``(features,)`` as :func:`unfold_input` orders them.
    """
    shape = target.shape
    groups = getattr(target.module, "groups", 1)
    rows = values.float().view(groups, *shape[1:])
    return rows if groups == 1 else rows.repeat_interleave(shape[0] // groups, dim=0)


def _features(target: Target) -> int:
    return target.shape[1:].numel() * getattr(target.module, "groups", 1)


def _version(tensor: Tensor) -> int:
    """Count of in-place changes; tensors of inference mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


class Observation(Mapping[str, Statistics]):
    """Statistics by target name."""

    def __init__(self) -> None:
        self._statistics: dict[str, Statistics] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[Tensor, int, tuple[Any, ...], str] | None = None
        self.seconds = 0.0
        """Spent on the statistics themselves, apart from running the model."""

    def __getitem__(self, name: str) -> Statistics:
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def receive(self, target: Target, inputs: Tensor, create: Callable[[], Statistics]) -> None:
        """Take the input of one call of one layer, unless one that reads it alike has just received the very tensor."""
        reading = _reading(target)
        leader = target.name
        if self._last is not None and self._last[0] is inputs and self._last[1:3] == (_version(inputs), reading):
            leader = self._last[3]
        if self._leader.setdefault(target.name, leader) != leader:
            raise ModelError(f"{target.name} shares its input with other layers in some calls and not in others")
        if leader != target.name:
            self._statistics[target.name] = self._statistics[leader]
            return
        # holding the tensor keeps its identity from being reused by another one
        self._last = (inputs, _version(inputs), reading, target.name)
        if target.name not in self._statistics:
            self._statistics[target.name] = create()
        started = time.perf_counter()
        self._statistics[target.name].update(unfold_input(target, inputs.detach()))
        self.seconds += time.perf_counter() - started

    def forget(self, names: Iterable[str]) -> None:
        """Let go of the statistics of layers that are done with, which may be as large as the layers."""
        for name in names:
            self._statistics.pop(name, None)

    def forget_last(self) -> None:
        """Let go of the last input."""
        self._last = None


@contextmanager
def observe(
    targets: Sequence[Target], kinds: Sequence[type[Statistic]], device: torch.device | str | None = None
) -> Iterator[Observation]:
    """Gather statistics of the inputs of `targets` while the model runs inside the context.

    Parameters
    ----------
    targets
        The layers.
    kinds
        Which statistics.
    device
        Where to accumulate; by default where each layer is.

    Yields
    ------
    Observation
        Target name → :class:`Statistics`. A layer that never ran (an expert that no token reached) is missing.
    """
    observation = Observation()

    def creator(target: Target) -> Callable[[], Statistics]:
        return lambda: Statistics(kinds, _features(target), device or target.parameter.device)

    handles = []
    stacked: dict[int, list[Target]] = {}
    for target in targets:
        if target.index is not None:
            stacked.setdefault(id(target.parameter), []).append(target)
            continue

        def hook(module: nn.Module, args: tuple, kwargs: dict, target: Target = target) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            observation.receive(target, inputs, creator(target))

        handles.append(target.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        if stacked:
            with _plain_experts(targets), _ProductObserver(stacked, observation, creator):
                yield observation
        else:
            yield observation
    finally:
        observation.forget_last()
        for handle in handles:
            handle.remove()


class _ProductObserver(TorchFunctionMode):
    """Sees the products of stacked expert weights, which happen inside one module and so are out of reach of hooks."""

    def __init__(
        self,
        stacked: dict[int, list[Target]],
        observation: Observation,
        creator: Callable[[Target], Callable[[], Statistics]],
    ):
        super().__init__()
        self._by_address = {
            target.parameter.detach()[target.index].data_ptr(): target for group in stacked.values() for target in group
        }
        self._observation, self._creator = observation, creator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            target = self._by_address.get(args[1].data_ptr())
            if target is not None and len(args[0]):
                self._observation.receive(target, args[0], self._creator(target))
        return func(*args, **(kwargs or {}))


_PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}


@contextmanager
def _plain_experts(targets: Sequence[Target]) -> Iterator[None]:
    """Have transformers run experts one by one, as their own code says, instead of in one grouped product."""
    configs = {id(c): c for t in targets if (c := getattr(t.module, "config", None)) is not None}
    before = {key: getattr(config, "_experts_implementation", None) for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
