"""A model taken apart into its blocks, and run over data one block at a time.

Only the block in hand, and the activations between blocks, need to be in memory or on the fast device. What a block
is called with besides its hidden states (masks, rotary embeddings, encoder outputs) is recorded from a real call of
the whole model in which the blocks themselves do nothing, so that nothing about any architecture is assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ModelError, NonFiniteError
from gossamer.models.offload import onloaded

Batch = Tensor | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Stack:
    """A list of blocks that a model runs one after the other.

    Attributes
    ----------
    name
        Qualified name of the list, such as ``model.layers``.
    blocks
        Name → block, in order.
    """

    name: str
    blocks: dict[str, nn.Module]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model in the order in which it defines them: one for a decoder, two for an encoder-decoder.

    A stack is an outermost ``nn.ModuleList`` whose members are of one class and hold linear or convolutional layers.
    A model without any, such as a plain convolutional network, gives an empty list.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{s.name}.") for s in stacks):
            continue
        classes = {type(block) for block in module}
        if len(classes) == 1 and all(_has_weights(block) for block in module):
            stacks.append(Stack(name, {f"{name}.{index}": block for index, block in enumerate(module)}))
    return stacks


def _has_weights(block: nn.Module) -> bool:
    # a bare linear layer in a list is a branch or a head, not a block
    return bool(list(block.children())) and any(p.dim() >= 2 for p in block.parameters())


@dataclass
class Stage:
    """One block together with what it is called with, for every batch of the data.

    Attributes
    ----------
    name
        Qualified name of the block; empty for a model that is run as a whole.
    module
        The block, on the execution device while the stage is current.
    """

    name: str
    module: nn.Module
    calls: list[_Call]
    inputs: list[Tensor]
    outputs: list[Tensor] | None = field(default=None, repr=False)
    device: torch.device | str | None = None

    @torch.no_grad()
    def forward(self, visit: Callable[[Tensor, Tensor], None] | None = None, store: bool = False) -> None:
        """Run the block on all the data.

        Parameters
        ----------
        visit
            Called with the hidden states before and after the block, ``(batch, tokens, features)``, for each batch.
        store
            Whether the outputs become the inputs of the next block.
        """
        outputs = []
        for call, hidden in zip(self.calls, self.inputs):
            before = _to(hidden, self.device)
            after = call.run(self.module, before, self.device)
            if visit is not None:
                visit(before, after)
            if store:
                outputs.append(after.to(hidden.device))
        if store:
            for output in outputs:
                if not torch.isfinite(output.sum(dtype=torch.float32)) and not torch.isfinite(output).all():
                    raise NonFiniteError(f"the output of {self.name or 'the model'} holds NaN or infinity")
            self.outputs = outputs

    def owns(self, module_name: str) -> bool:
        """Whether a module of this qualified name is part of the block."""
        return not self.name or module_name == self.name or module_name.startswith(f"{self.name}.")


def stages(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    device: torch.device | str | None = None,
    workspace: Any = None,
) -> Generator[Stage, None, None]:
    """Yield the blocks of a model one by one, each with the inputs that the blocks before it, as they are now, produce.

    Change a block's weights while it is current and the blocks after it see the change. If the consumer has not stored
    outputs itself (``stage.forward(store=True)``), that is done when it asks for the next stage.

    Parameters
    ----------
    model
        Any module; one without stacks of blocks comes as a single stage.
    data
        Batches: tensors for the model's main input, mappings of keyword arguments, or sequences of positional ones.
        Padding (by ``attention_mask``) is taken out first.
    device
        Where to run the blocks; by default where they are.
    workspace
        Directory for changed weights of a model that accelerate keeps on disk.

    Raises
    ------
    CalibrationError
        If there is no data.
    """
    batches = [part for batch in data for part in without_padding(batch)]
    if not batches:
        raise CalibrationError("the calibration data is empty: at least one batch is needed")
    with _evaluating(model):
        stacks = find_stacks(model)
        if not stacks:
            yield _whole(model, batches, device)
            return
        for stack in stacks:
            recorded = _record(model, stack, batches, device)
            if recorded is None:  # blocks that run several times, or not at all, cannot be taken one by one
                yield _whole(model, batches, device)
                return
            inputs, calls = recorded
            del recorded  # it would keep the first block's inputs for the whole walk
            for name, block in stack.blocks.items():
                with onloaded(block, device, workspace):
                    stage = Stage(name, block, calls.pop(name), inputs, device=device)
                    yield stage
                    if stage.outputs is None and calls:
                        stage.forward(store=True)
                    inputs = stage.outputs or []
                    del stage


def whole_model(model: nn.Module, data: Iterable[Batch], device: torch.device | str | None = None) -> Stage:
    """The model as a single stage over the data, for what lies outside its blocks."""
    batches = [part for batch in data for part in without_padding(batch)]
    return _whole(model, batches, device)


def _whole(model: nn.Module, batches: list[Batch], device: torch.device | str | None) -> Stage:
    calls = [_WholeCall(model, batch) for batch in batches]
    return Stage("", model, calls, [torch.zeros(0) for _ in batches], device=device)  # type: ignore[arg-type]


@dataclass
class _Call:
    """Everything a block was called with; the hidden states are put in when it runs."""

    args: tuple
    kwargs: dict
    slot: int | str

    def run(self, module: nn.Module, hidden: Tensor, device: torch.device | str | None) -> Tensor:
        args, kwargs = list(_to(self.args, device)), _to(self.kwargs, device)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        output = module(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class _WholeCall:
    model: nn.Module
    batch: Batch

    def run(self, module: nn.Module, hidden: Tensor, device: torch.device | str | None) -> Tensor:
        output = run_batch(module, self.batch, device)
        return output if isinstance(output, Tensor) else torch.zeros(0)


def accepted(model: nn.Module, **options: object) -> dict[str, object]:
    """Return those keyword arguments that the model's forward declares by name."""
    parameters = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in parameters}


def run_batch(model: nn.Module, batch: Batch, device: torch.device | str | None = None, logits: bool = True) -> Any:
    """Call a model with a batch of any of the accepted forms.

    Without `logits`, for those who only look inside, it forms those of the last token alone, if it can be told so and
    no labels wait for all of them.
    """
    batch = _to(batch, device)
    options: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "use_cache"):
        options["use_cache"] = False
    if not logits and not (isinstance(batch, Mapping) and "labels" in batch):
        options |= accepted(model, logits_to_keep=1)
    if isinstance(batch, Mapping):
        return model(**{**options, **batch})
    if isinstance(batch, Tensor):
        main = getattr(model, "main_input_name", None)
        return model(**{main: batch}, **options) if main else model(batch)
    return model(*batch, **options)


def without_padding(batch: Batch) -> list[Batch]:
    """Split a padded batch into its sequences and cut the padding off; other batches stay as they are."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask"), Tensor):
        return [batch]
    mask = batch["attention_mask"]
    rest = {name: value for name, value in batch.items() if name != "attention_mask"}
    if bool(mask.all()):
        return [rest]
    sequences = []
    for row, kept in enumerate(mask.bool()):
        if kept.any():
            sequences.append({name: _cut(value, row, kept, mask.shape) for name, value in rest.items()})
    return sequences


def _cut(value: Any, row: int, kept: Tensor, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != shape[:1]:
        return value
    part = value[row : row + 1]
    return part[:, kept] if part.shape[1:2] == shape[1:2] else part


class _Stop(Exception):
    """The last block has been called; what comes after it is of no interest."""


def _record(
    model: nn.Module, stack: Stack, batches: list[Batch], device: torch.device | str | None
) -> tuple[list[Tensor], dict[str, list[_Call]]] | None:
    """Call the model with blocks that only note their arguments and pass their hidden states on.

    Returns None if the blocks are not called exactly once each, in order.
    """
    calls: dict[str, list[_Call]] = {name: [] for name in stack.blocks}
    inputs: list[Tensor] = []
    names = list(stack.blocks)
    template: list[Any] = []
    with ExitStack() as patches:
        for name, block in stack.blocks.items():
            patches.enter_context(_patched(block, _recorder(name, block, names, calls, inputs, template, device)))
        for batch in batches:
            with suppress(_Stop), torch.no_grad():
                run_batch(model, batch)
            if any(len(made) != len(inputs) for made in calls.values()):
                return None
    return (inputs, calls) if len(inputs) == len(batches) else None


def _recorder(
    name: str,
    block: nn.Module,
    names: list[str],
    calls: dict[str, list[_Call]],
    inputs: list[Tensor],
    template: list[Any],
    device: torch.device | str | None,
) -> Callable[..., Any]:
    forward = block.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        slot, hidden = _hidden(name, args, kwargs)
        if name == names[0]:
            inputs.append(hidden.detach())
            if not template:  # one real call shows whether blocks return a tensor or a tuple
                with onloaded(block, device):
                    template.append(forward(*_to(args, device), **_to(kwargs, device)))
        kept_args, kept_kwargs = list(args), {**kwargs}
        if isinstance(slot, int):
            kept_args[slot] = None
        else:
            kept_kwargs[slot] = None
        for key in ("past_key_values", "past_key_value"):
            if key in kept_kwargs:
                kept_kwargs[key] = None
        calls[name].append(_Call(tuple(kept_args), kept_kwargs, slot))
        # the first batch runs to the end, to see whether any block is called again
        if name == names[-1] and len(inputs) > 1:
            raise _Stop
        return hidden if isinstance(template[0], Tensor) else (hidden, *template[0][1:])

    return record


def _hidden(name: str, args: tuple, kwargs: dict) -> tuple[int | str, Tensor]:
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return index, value
    for key in ("hidden_states", *kwargs):
        if isinstance(kwargs.get(key), Tensor):
            return key, kwargs[key]
    raise ModelError(f"block {name} is called without a tensor; it cannot be run on its own")


@contextmanager
def _patched(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = block.__dict__.get("forward")
    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before  # type: ignore[method-assign]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _to(value: Any, device: torch.device | str | None) -> Any:
    """Move all tensors in nested tuples, lists and dicts."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
