"""How many neurons are silent: the share of outputs of the activation functions that are zero.

Two rates are told apart [Liu et al., 2023, arXiv 2212.06145, section 3.1]: the *dynamic* one is the share of zeros
among all outputs over all inputs, which differ from input to input; the *static* one is the share of units that are
zero for every input, and could be removed. Only counts are kept, one bit of state for every unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.windows import evaluation_mode

Kind = Literal["dynamic", "static"]

#: reach zero exactly
_RECTIFIED = {
    *(functional.relu, functional.relu6, functional.hardswish, functional.hardsigmoid, functional.threshold),
    *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu_),
}
#: come near zero, so that a threshold is needed
_SMOOTH = {
    *(functional.gelu, functional.silu, functional.mish, functional.elu, functional.leaky_relu, functional.softplus),
}


@dataclass(frozen=True)
class DeadNeuronRate:
    """Shares of silent neurons.

    Attributes
    ----------
    kind
        ``"dynamic"`` or ``"static"``.
    total
        Over the outputs (or units) of all layers together, in [0, 1].
    layers
        The same of each activation, by the name of the module that calls it; functional calls add what they call, as
        in ``"block.relu"``, and a number from the second one on.
    outputs
        How many outputs (or units) each share is of.
    """

    kind: Kind
    total: float
    layers: Mapping[str, float]
    outputs: Mapping[str, int]


def dead_neuron_rate(
    model: nn.Module,
    data: Iterable[Any] | Tensor,
    kind: Kind = "dynamic",
    *,
    threshold: float = 0.0,
    modules: Sequence[str] | None = None,
) -> DeadNeuronRate:
    """Measure how many outputs of the activation functions are zero, in evaluation mode.

    Activation functions are noticed when they run, whether they are modules or functions, so that the model need not
    be traceable.

    Parameters
    ----------
    model
        Any module; afterwards it is as it was, buffers included.
    data
        Batches: tensors, mappings that are passed as keywords, or sequences of which the first is the input. One
        tensor is one batch. Compare models on the same data.
    kind
        ``"dynamic"``: zeros among all outputs. ``"static"``: units that are zero for every input. A unit is a feature
        of vectors and of sequences ``(n, tokens, features)``, and a channel at a position for images.
    threshold
        An output counts as zero if its absolute value is at most this. Above 0, smooth functions (GELU, SiLU, …)
        count too; at 0 only those that reach zero (ReLU and its kin).
    modules
        Globs on module names whose outputs are counted instead of those of activation functions.

    Raises
    ------
    CalibrationError
        If there is no data, or images change their size while the static rate is measured.
    TargetError
        If nothing is found to count.
    ConfigurationError
        If the kind is unknown or the threshold negative.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    >>> _ = network[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> _ = network[0].bias.data.zero_()
    >>> dead_neuron_rate(network, torch.tensor([[1.0], [2.0], [-1.0]])).total
    0.5
    """
    if kind not in get_args(Kind):
        raise ConfigurationError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    if not threshold >= 0:
        raise ConfigurationError(f"threshold is {threshold}; it must be at least 0, such as 0.01 for GELU")
    counts: dict[str, _Count] = {}
    count = _Counting(counts, kind == "static", threshold)
    seen = 0
    with evaluation_mode(model), _following(model, count, modules):
        for batch in [data] if isinstance(data, Tensor) else data:
            _run(model, batch)
            seen += 1
    if not seen:
        raise CalibrationError("no data to measure dead neurons on; give at least one batch")
    if not counts:
        what = f"module matches {list(modules)}" if modules else "activation function that reaches zero has run"
        raise TargetError(f"no {what}; name modules, or set a threshold if the model uses GELU, SiLU or the like")
    silent = {name: each.silent for name, each in counts.items()}
    outputs = {name: each.outputs for name, each in counts.items()}
    rates = {name: silent[name] / max(1, outputs[name]) for name in counts}
    return DeadNeuronRate(kind, sum(silent.values()) / max(1, sum(outputs.values())), rates, outputs)


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch if isinstance(batch, Tensor) else batch[0])


@dataclass
class _Count:
    """Zeros so far; `awake` says which units have not always been zero."""

    zeros: int = 0
    seen: int = 0
    awake: Tensor | None = None

    @property
    def silent(self) -> int:
        return self.zeros if self.awake is None else int((~self.awake).sum())

    @property
    def outputs(self) -> int:
        return self.seen if self.awake is None else self.awake.numel()


@dataclass
class _Counting:
    counts: dict[str, _Count]
    static: bool
    threshold: float
    names: list[str] = field(default_factory=list)

    def add(self, name: str, output: Tensor) -> None:
        zero = output.abs() <= self.threshold if self.threshold else output == 0
        count = self.counts.setdefault(name, _Count())
        if not self.static:
            count.zeros += int(zero.sum())
            count.seen += zero.numel()
            return
        awake = (~zero).flatten(0, 1).any(0) if zero.dim() == 3 else (~zero).any(0)
        if count.awake is not None and count.awake.shape != awake.shape:
            raise CalibrationError(
                f"outputs of {name} change their shape from {tuple(count.awake.shape)} to {tuple(awake.shape)}; "
                f"the static rate needs inputs of one size"
            )
        count.awake = awake if count.awake is None else count.awake | awake


@contextmanager
def _following(model: nn.Module, count: _Counting, globs: Sequence[str] | None) -> Iterator[None]:
    handles: list[Any] = []
    try:
        if globs is not None:
            for name, module in model.named_modules():
                if any(fnmatchcase(name, glob) for glob in globs):
                    handles.append(module.register_forward_hook(_adder(name, count)))
            yield
            return
        calling = _Calls(count)
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(calling.entering(name), prepend=True))
            handles.append(module.register_forward_hook(calling.leaving, always_call=True))
        with calling:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(name: str, count: _Counting) -> Any:
    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TargetError(f"{name} returns {type(output).__name__} and no tensor; choose another module")
        count.add(name, output)

    return add


class _Calls(TorchFunctionMode):
    """Notices activation functions as they are called, and by which module."""

    def __init__(self, count: _Counting):
        super().__init__()
        self.count = count
        self.known = _RECTIFIED | (_SMOOTH if count.threshold else set())
        self.inside: list[tuple[nn.Module | None, str, Counter[str]]] = [(None, "", Counter())]

    def entering(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.inside.append((module, name, Counter()))

        return enter

    def leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.known:
            self.count.add(self._name(func), output)
        return output

    def _name(self, func: Any) -> str:
        module, name, calls = self.inside[-1]
        if module is not None and type(module).__module__ == "torch.nn.modules.activation":
            return name
        label = func.__name__.strip("_")
        calls[label] += 1
        number = "" if calls[label] == 1 else f"_{calls[label]}"
        return f"{name}.{label}{number}" if name else f"{label}{number}"
