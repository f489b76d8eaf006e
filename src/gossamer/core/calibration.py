"""What a little data says about the inputs of each layer, gathered in one streaming pass.

A :class:`Statistic` summarises the rows of a layer's input, ``(tokens, in_features)``; convolutions are unfolded so
that they look the same. :func:`observe` attaches the statistics to layers and gathers them while the model runs.
Layers that receive the very same tensor (query, key and value; gate and up) share one accumulator.

Accumulation is in float32 or float64 whatever the dtype of the model: squares of outlier features overflow float16,
and long sums stop growing in bfloat16.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core.targets import Target
from gossamer.errors import CalibrationError, ModelError, NonFiniteError


class Statistic(ABC):
    """A streaming summary of the rows of a layer's input.

    Parameters
    ----------
    features
        Width of the input.
    device
        Where to accumulate.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.features = features
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Take in ``(tokens, features)`` rows of any floating dtype."""
        self.tokens += len(inputs)
        self.accumulate(inputs)

    @abstractmethod
    def accumulate(self, inputs: Tensor) -> None:
        """Add the rows to the summary."""

    @abstractmethod
    def check(self) -> Tensor:
        """A tensor that is finite exactly if all the inputs were."""


class InputNorm(Statistic):
    """Sum of squares of every input feature. ``norm`` is ‖X_j‖₂ over all tokens, ``(in_features,)`` float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.square_sum = torch.zeros(features, dtype=torch.float64, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        self.square_sum += inputs.float().square().sum(0, dtype=torch.float64)

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens."""
        return self.square_sum.sqrt()

    def check(self) -> Tensor:  # noqa: D102
        return self.square_sum


class InputMoments(Statistic):
    """Mean and variance of every input feature, ``(in_features,)`` float64, by Chan's parallel update."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._deviation = torch.zeros(features, dtype=torch.float64, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        count = len(inputs)
        mean = inputs.float().mean(0, dtype=torch.float64)
        deviation = (inputs.float() - mean.float()).square().sum(0, dtype=torch.float64)
        shift = mean - self.mean
        self.mean += shift * (count / self.tokens)
        self._deviation += deviation + shift.square() * (count * (self.tokens - count) / self.tokens)

    @property
    def variance(self) -> Tensor:
        """Population variance of every feature."""
        return self._deviation / max(1, self.tokens)

    def check(self) -> Tensor:  # noqa: D102
        return self.mean


class Gram(Statistic):
    """XᵀX over all tokens, ``(in_features, in_features)`` float32.

    Only panels on and above the diagonal are multiplied, which saves three eighths of the work of the full product.
    """

    _PANELS = 4

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._upper = torch.zeros(features, features, dtype=torch.float32, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        inputs = inputs.float()
        width = -(-self.features // self._PANELS)
        for start in range(0, self.features, width):
            panel = inputs[:, start : start + width]
            self._upper[start : start + width, start:].addmm_(panel.t(), inputs[:, start:])

    @property
    def matrix(self) -> Tensor:
        """The whole symmetric matrix, a new tensor."""
        return self._upper.triu() + self._upper.triu(1).t()

    @property
    def diagonal(self) -> Tensor:
        """Sums of squares, ``(in_features,)``."""
        return self._upper.diagonal()

    def check(self) -> Tensor:  # noqa: D102
        return self._upper.diagonal()


class AbsoluteHistogram(Statistic):
    """Histogram of |x| over all features, on a logarithmic grid that needs no range in advance.

    A bin is the exponent and the first five mantissa bits of the float32 value, so that every quantile is known to a
    relative error of 1/32 at most; zeros have a bin of their own.
    """

    _KEPT_BITS = 5

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._shift = 23 - self._KEPT_BITS
        self.counts = torch.zeros(1 << (8 + self._KEPT_BITS), dtype=torch.int64, device=device)

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        bins = inputs.float().abs().flatten().view(torch.int32) >> self._shift
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def quantile(self, q: float) -> float:
        """Largest bin edge below which at most a fraction `q` of the values lies (0 ≤ q ≤ 1)."""
        total = int(self.counts.sum())
        if not total:
            raise CalibrationError("no values were observed: run the model on data first")
        cumulative = self.counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.tensor(q * total, dtype=torch.float64), right=True))
        edge = torch.tensor(min(index, len(self.counts) - 1) << self._shift, dtype=torch.int32)
        return float(edge.view(torch.float32))

    def check(self) -> Tensor:  # noqa: D102
        not_finite = self.counts[255 << self._KEPT_BITS :].sum()
        return torch.where(not_finite > 0, torch.nan, 0.0).unsqueeze(0)


class InputSample(Statistic):
    """The first rows seen, at most `SIZE` of them: enough to measure a relative output error."""

    SIZE = 256

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self._rows: list[Tensor] = []

    def accumulate(self, inputs: Tensor) -> None:  # noqa: D102
        room = self.SIZE - sum(map(len, self._rows))
        if room > 0:
            # spread over the batch: neighbouring tokens are alike
            chosen = torch.linspace(0, len(inputs) - 1, min(room, len(inputs), self.SIZE // 4)).long()
            self._rows.append(inputs[chosen.to(inputs.device)].float().clone())

    @property
    def rows(self) -> Tensor:
        """``(at most SIZE, in_features)`` float32."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.features)

    def check(self) -> Tensor:  # noqa: D102
        return self.rows.sum(0)


class Statistics(Mapping[type[Statistic], Any]):
    """The statistics of one layer: ``stats[InputNorm].norm``."""

    def __init__(self, kinds: Sequence[type[Statistic]], features: int, device: torch.device | str):
        self._by_kind = {kind: kind(features, device) for kind in kinds}
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
        for statistic in self._by_kind.values():
            statistic.update(inputs)

    def check_finite(self, name: str) -> None:
        """Raise :class:`NonFiniteError` naming the layer if NaN or infinity came by."""
        for statistic in self._by_kind.values():
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
        self._last: tuple[Tensor, int, str] | None = None
        self.seconds = 0.0
        """Spent on the statistics themselves, apart from running the model."""

    def __getitem__(self, name: str) -> Statistics:
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def receive(self, target: Target, inputs: Tensor, create: Callable[[], Statistics]) -> None:
        """Take the input of one call of one layer, unless a layer before it has just received the very same tensor."""
        same = self._last is not None and self._last[0] is inputs and self._last[1] == _version(inputs)
        leader = self._last[2] if same and self._last is not None else target.name
        if self._leader.setdefault(target.name, leader) != leader:
            raise ModelError(f"{target.name} shares its input with other layers in some calls and not in others")
        if leader != target.name:
            self._statistics[target.name] = self._statistics[leader]
            return
        # holding the tensor keeps its identity from being reused by another one
        self._last = (inputs, _version(inputs), target.name)
        if target.name not in self._statistics:
            self._statistics[target.name] = create()
        started = time.perf_counter()
        self._statistics[target.name].update(unfold_input(target, inputs.detach()))
        self.seconds += time.perf_counter() - started

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
