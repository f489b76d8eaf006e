"""A ledger that sums up what a training run costs while it runs.

The final sparsity says little about the price of a run: a network that is pruned late was dense for most of it. So the
ledger integrates. At every forward pass in training mode it looks at how many weights are active, and adds up, over
steps and over tokens, the operations and bytes that an implementation which skips zeros would need beside those that
dense storage needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.core.masks import MaskSet
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.targets import Target
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.measure.flops import count_flops
from gossamer.measure.size import DENOMINATORS, Denominator, density
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.windows import evaluation_mode


class Training(Protocol):
    """What the ledger asks a sparse training run."""

    @property
    def targets(self) -> Mapping[str, Target]:
        """Name → matrix that may be sparse."""

    @property
    def method(self) -> Any:
        """What may say by ``wants_gradient(step)`` that a step needs the gradient of all weights."""

    @property
    def step(self) -> int:
        """Steps so far."""

    def active(self, name: str) -> int:
        """Weights of a target that are active at present."""


Sparse = Training | MaskSet | Callable[[], MaskSet] | None


@dataclass
class _Sums:
    """What a ledger has added up; all of it goes into a checkpoint."""

    steps: int = 0
    units: int = 0
    seconds: float = 0.0
    training_flops: float = 0.0
    dense_training_flops: float = 0.0
    bytes_moved: float = 0.0
    dense_bytes_moved: float = 0.0
    unit_parameters: float = 0.0
    step_parameters: float = 0.0


class TrainingLedger:
    """Sums up the cost of a run from hooks on the model and on its optimiser; the loop does not change.

    Operations: two for each active weight and position forwards, and as many each for the gradients of inputs and of
    weights; a step for which a method needs the dense gradient pays the last part in full (Evci et al., 2020, arXiv
    1911.11134, appendix H). Bytes: weights are read in both passes, gradients written and read, weights and the state
    of the optimiser read and written, inputs and outputs of every layer moved three times; a sparse weight adds a bit
    for each position to both reads.

    Parameters
    ----------
    model, optimizer
        What trains.
    example_inputs
        One batch as the model gets it: a tensor, positional arguments, or keyword arguments. Sequences should be as
        long as those of the run, because attention costs more for longer ones.
    sparse
        Which weights are active: a sparse training run, masks that stay, or a function that returns the masks of the
        moment. None counts a dense run.
    of
        Which parameters are counted: ``"all"``, ``"without embeddings"`` or ``"prunable"``.
    units
        Function of the arguments and keyword arguments of a forward pass that says how many units it is; by default
        every element of a tensor of whole numbers is a token, and every row of another tensor a sample.

    Raises
    ------
    ConfigurationError
        If `of` is unknown, the example holds no tensor, or masks are not of this model.

    Examples
    --------
    >>> model = nn.Linear(4, 2, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with TrainingLedger(model, optimizer, torch.zeros(3, 4)) as ledger:
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(3, 4)).sum().backward()
    ...         optimizer.step()
    >>> ledger.cost.training_flops == 5 * 3 * (3 * 2 * 8)  # steps × samples × three passes over eight weights
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
        sparse: Sparse = None,
        *,
        of: Denominator = "all",
        units: Callable[[tuple[Any, ...], Mapping[str, Any]], int] | None = None,
    ):
        if of not in DENOMINATORS:
            raise ConfigurationError(f"of is {of!r}; it must be one of {', '.join(map(repr, DENOMINATORS))}")
        self._optimizer, self._sparse, self._units = optimizer, sparse, units or count_units
        arguments, named = _as_call(example_inputs)
        self._example_units = self._units(arguments, named)
        self.unit = "samples" if _first_tensor(arguments, named).is_floating_point() else "tokens"
        self._parameters = list(model.parameters())
        names = _parameter_names(model)
        self._own_name = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._sizes = {names[id(p)]: p.numel() for p in model.parameters()}
        self._example = _example_pass(model, example_inputs, self._own_name)
        self._sizes |= {layer.weight: layer.size for layer in self._example.layers}
        self._element = max((parameter.element_size() for parameter in model.parameters()), default=4)
        self._counted = self._counted_names(model, of)
        self.counted = DENOMINATORS[of]
        self._sums = _Sums()
        self._pending = self._passes = 0
        self._started: float | None = None
        self._dense_gradient = False
        self._refresh()
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> TrainingLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> TrainingCost:
        """Let go of the model and the optimiser, and return the cost."""
        self._refresh()
        for handle in self._handles:
            handle.remove()
        return self.cost

    @property
    def cost(self) -> TrainingCost:
        """The sums over all finished steps."""
        sums, active = self._sums, self._counted_active(self._active)
        return TrainingCost(
            steps=sums.steps,
            units=sums.units,
            unit=self.unit,
            seconds=sums.seconds,
            training_flops=sums.training_flops,
            dense_training_flops=sums.dense_training_flops,
            inference_flops=self._forward_flops(self._active),
            dense_inference_flops=self._forward_flops({}),
            bytes_moved=sums.bytes_moved,
            dense_bytes_moved=sums.dense_bytes_moved,
            parameters=self._counted_active({}),
            active_parameters=active,
            average_parameters=sums.unit_parameters / sums.units if sums.units else float(active),
            average_over_steps=sums.step_parameters / sums.steps if sums.steps else float(active),
            counted=self.counted,
        )

    def state_dict(self) -> dict[str, float]:
        """The sums, from which a run goes on."""
        return asdict(self._sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where a run stopped.

        Raises
        ------
        CheckpointError
            If the state is not that of a ledger.
        """
        if set(state) != {field.name for field in fields(_Sums)}:
            raise CheckpointError(f"the state of a ledger holds {sorted(state)}; save what ledger.state_dict() returns")
        self._sums = _Sums(**state)  # type: ignore[arg-type]

    def _counted_names(self, model: nn.Module, of: Denominator) -> list[str]:
        targets = getattr(self._sparse, "targets", None)
        mine = {id(target.parameter) for target in targets.values()} if targets else set()
        rows = density(model, [n for n, p in model.named_parameters() if id(p) in mine] if targets else None).layers
        chosen = [r for r in rows if of == "all" or (r.prunable if of == "prunable" else not r.embedding)]
        return [self._own_name[row.name] for row in chosen]

    def _refresh(self) -> None:
        """Look at what is active now; the masks of the moment hold until the next step."""
        self._active = {self._own_name.get(name, name): count for name, count in self._counts().items()}
        for name, count in self._active.items():
            if not 0 <= count <= self._sizes.get(name, -1):
                raise ConfigurationError(f"{name!r} of the masks is no parameter of this model, or has another shape")

    def _counts(self) -> dict[str, int]:
        sparse = self._sparse
        if sparse is None:
            return {}
        if isinstance(sparse, MaskSet) or callable(sparse):
            masks = sparse if isinstance(sparse, MaskSet) else sparse()
            shares = masks.layer_sparsity()
            return {name: round((1 - shares[name]) * shape.numel()) for name, shape in masks.shapes.items()}
        counts: dict[str, int] = {}
        for name, target in sparse.targets.items():
            counts[target.parameter_name] = counts.get(target.parameter_name, 0) + sparse.active(name)
        return counts

    def _counted_active(self, active: Mapping[str, int]) -> int:
        return sum(active.get(name, self._sizes[name]) for name in self._counted)

    def _forward_flops(self, active: Mapping[str, int]) -> float:
        """Forward operations for one unit with so many weights active in each parameter."""
        total = float(self._example.other)
        for layer in self._example.layers:
            total += layer.flops * active.get(layer.weight, layer.size) / layer.size
        return total / self._example_units

    def _before_forward(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if self._started is None:
            self._started = time.perf_counter()
            self._refresh()
            wants = getattr(getattr(self._sparse, "method", None), "wants_gradient", None)
            self._dense_gradient = wants is not None and wants(getattr(self._sparse, "step", 0) + 1)
        self._pending += self._units(arguments, named)
        self._passes += 1

    def _after_step(self, *_: Any) -> None:
        if self._started is None:  # nothing went forward: no step of training
            return
        sums, units, active = self._sums, self._pending, self._active
        sums.seconds += time.perf_counter() - self._started
        sums.steps += 1
        sums.units += units
        forward, dense = self._forward_flops(active), self._forward_flops({})
        weight_gradient = dense if self._dense_gradient else forward
        sums.training_flops += units * (2 * forward + weight_gradient)
        sums.dense_training_flops += units * 3 * dense
        sums.bytes_moved += self._traffic(units, active)
        sums.dense_bytes_moved += self._traffic(units, {})
        sums.unit_parameters += units * self._counted_active(active)
        sums.step_parameters += self._counted_active(active)
        self._pending = self._passes = 0
        self._started = None

    def _traffic(self, units: int, active: Mapping[str, int]) -> float:
        """Bytes of one step: weights, gradients and state by the active weights, activations in full."""
        passes = self._passes
        weights = sum(active.get(name, size) for name, size in self._sizes.items())
        bits = sum(size for name, size in self._sizes.items() if active.get(name, size) < size)
        # both directions read the weights; a gradient is written once and, with further passes, read and written again;
        # the update reads the gradient, and reads and writes the weight
        moved: float = weights * self._element * (2 * passes + (2 * passes - 1) + 3)
        held = sum(parameter.numel() for parameter in self._parameters)  # of a list of non-zeros only these
        moved += 2 * self._state_bytes() * weights / max(1, held)
        return moved + 2 * passes * bits / 8 + 3 * self._example.activation_bytes * units / self._example_units

    def _state_bytes(self) -> int:
        """Bytes that the optimiser keeps for all parameters, without its counters."""
        values = (value for state in self._optimizer.state.values() for value in state.values())
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor) and v.dim())


def count_units(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """Tokens or samples of a forward pass: every element of a whole-number tensor, or every row of another one.

    Parameters
    ----------
    arguments, named
        Of the forward pass. ``input_ids`` counts before anything else, then the first tensor.

    Raises
    ------
    ConfigurationError
        If there is no tensor.
    """
    first = _first_tensor(arguments, named)
    return len(first) if first.is_floating_point() else first.numel()


def _first_tensor(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    for value in (named.get("input_ids"), *arguments, *named.values()):
        if isinstance(value, Tensor) and value.dim():
            return value
    raise ConfigurationError(
        "the model was called without a tensor, so that nothing can be counted; give the ledger units=function"
    )


def _as_call(inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


@dataclass(frozen=True)
class _Layer:
    """A weight matrix in the example: name and size of its parameter, and dense operations of its layer."""

    weight: str
    size: int
    flops: int


@dataclass(frozen=True)
class _Example:
    """What one forward pass of the example takes."""

    layers: tuple[_Layer, ...]
    other: int
    activation_bytes: int


def _example_pass(
    model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any], own_name: Mapping[str, str]
) -> _Example:
    """Count operations and bytes; layers that store no zeros count with the size and operations of dense ones."""
    names = {module: name for name, module in model.named_modules()}
    stored: dict[nn.Module, int] = {}
    moved = 0

    def add(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        outputs = output if isinstance(output, tuple | list) else (output,)
        moved += sum(t.numel() * t.element_size() for t in (*given, *outputs) if isinstance(t, Tensor))
        if isinstance(module, SparseWeight):
            size, rows = module.mask().numel(), len(module.mask())
            stored[module] = stored.get(module, 0) + 2 * output.numel() // rows * size

    counted = count_flops(model, inputs)
    handles = [module.register_forward_hook(add) for module in names if not any(module.children())]
    arguments, named = _as_call(inputs)
    inside = FlopCounterMode(display=False)
    try:
        with evaluation_mode(model), inside:
            model(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    layers = []
    for row in counted.layers:
        weight = f"{row.name}.weight" if row.name else "weight"
        layers.append(_Layer(own_name[weight], sizes[weight], row.dense))
    own = inside.get_flop_counts()
    other = counted.other
    for module, flops in stored.items():
        assert isinstance(module, SparseWeight)
        layers.append(_Layer(_stored_name(names[module]), module.mask().numel(), flops))
        # what its torch reference did, where the compiled kernel is missing
        other -= sum(own.get(f"{type(model).__name__}.{names[module]}".rstrip("."), {}).values())
    return _Example(tuple(layers), max(0, other), moved)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter; that of a list of non-zeros is the name of the weight it stands for."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stored = ((name, module) for name, module in model.named_modules() if isinstance(module, SparseWeight))
    return names | {id(module.values): _stored_name(name) for name, module in stored}


def _stored_name(module_name: str) -> str:
    return f"{module_name}.weight" if module_name else "weight"
