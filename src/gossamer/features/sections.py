"""Cross-sections of a model's computation: activations at some modules and tokens, read and replaced together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.features.heads import HeadGrid, evaluating, last_logits
from gossamer.models.heads import AttentionHeads

HeadPart = Literal["query", "key", "value", "read"]


@dataclass(frozen=True)
class Node:
    """Where an activation is.

    Attributes
    ----------
    module
        Qualified name.
    side
        What goes into the module, or comes out of it.
    token
        Number of the token.
    first, size
        Which of the numbers: a head's are some of those that go into the matrix that maps heads back. All if size is
        None.
    """

    module: str
    side: Literal["input", "output"]
    token: int
    first: int = 0
    size: int | None = None

    @property
    def part(self) -> slice:
        """Which of the numbers."""
        return slice(self.first, None if self.size is None else self.first + self.size)


def head_node(model: nn.Module, head: int, part: HeadPart, token: int) -> Node:
    """What a head asks for, is found by, passes on, or has read, at a token.

    Parameters
    ----------
    model
        The model.
    head
        Number of the head, counted through the layers.
    part
        ``query``, ``key`` or ``value`` (those that it shares, if it does), before any rotation by positions; or what it
        has ``read``, before it is mapped back.
    token
        Number of the token.

    Raises
    ------
    ConfigurationError
        If there is no such head or part.
    ModelError
        If queries, keys and values are made by one matrix.
    """
    grid = HeadGrid.of(model)
    if not 0 <= head < len(grid) or part not in ("query", "key", "value", "read"):
        raise ConfigurationError(
            f"head is {head} and part {part!r}; there are {len(grid)} heads, and query, key, value, read"
        )
    number, within = grid.names[head]
    layer = grid.layers[number]
    if part == "read":
        size = layer.output.shape[1] // layer.count
        return Node(layer.output.module_name, "input", token, within * size, size)
    target, slices = _made(layer, part)
    size = target.shape[0] // slices
    return Node(target.module_name, "output", token, within * slices // layer.count * size, size)


def _made(layer: AttentionHeads, part: HeadPart) -> tuple[Any, int]:
    if layer.query is None or len(layer.shared) != 2:
        raise ModelError(f"{layer.name}: queries, keys and values must have matrices of their own to be read apart")
    if part == "query":
        return layer.query, layer.count
    return layer.shared[0 if part == "key" else 1], layer.groups


@contextmanager
def _visited(model: nn.Module, nodes: Sequence[Node], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, ``visit(number of the node, its activations)`` may return others to take their place."""
    modules = dict(model.named_modules())
    handles = []
    for number, node in enumerate(nodes):
        if node.module not in modules:
            raise ConfigurationError(f"there is no module {node.module!r} in {type(model).__name__}")

        def changed(x: Tensor, number: int = number, node: Node = node) -> Tensor | None:
            instead = visit(number, x[:, node.token, node.part])
            if instead is None:
                return None
            x = x.clone()
            x[:, node.token, node.part] = instead.to(x.dtype)
            return x

        module = modules[node.module]
        if node.side == "input":
            handles.append(module.register_forward_pre_hook(_before(changed)))
        else:
            handles.append(module.register_forward_hook(_after(changed)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(changed: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        found = changed(args[0])
        return None if found is None else (found, *args[1:])

    return hook


def _after(changed: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        found = changed(output[0] if isinstance(output, tuple) else output)
        return None if found is None else (found, *output[1:]) if isinstance(output, tuple) else found

    return hook


@torch.no_grad()
def read_nodes(model: nn.Module, tokens: Tensor, nodes: Sequence[Node], batch: int = 128) -> list[Tensor]:
    """Activations at nodes, ``(prompts, size)`` float32 for each.

    Parameters
    ----------
    model
        The model.
    tokens
        ``(prompts, length)``.
    nodes
        Where.
    batch
        Prompts that run together.
    """
    found: list[list[Tensor]] = [[] for _ in nodes]

    def keep(number: int, x: Tensor) -> None:
        found[number].append(x.float())

    with evaluating(model), _visited(model, nodes, keep):
        for rows in tokens.split(batch):
            last_logits(model, rows)
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def replaced_logits(
    model: nn.Module, tokens: Tensor, nodes: Sequence[Node], values: Sequence[Tensor], batch: int = 128
) -> Tensor:
    """Logits after the last token with other activations at nodes, ``(prompts, vocabulary)``.

    Parameters
    ----------
    model, tokens, nodes, batch
        See :func:`read_nodes`.
    values
        For each node ``(prompts, size)``; none for the model as it is.

    Raises
    ------
    ConfigurationError
        If there are not as many values as nodes or prompts.
    """
    if values and (len(values) != len(nodes) or any(len(value) != len(tokens) for value in values)):
        raise ConfigurationError(
            f"{len(values)} values of {[len(value) for value in values]} prompts; there are {len(nodes)} nodes and "
            f"{len(tokens)} prompts"
        )
    logits = []
    with evaluating(model):
        for start in range(0, len(tokens), batch):
            rows = slice(start, start + batch)
            if not values:
                logits.append(last_logits(model, tokens[rows]))
                continue
            with _visited(model, nodes, lambda number, x, rows=rows: values[number][rows]):
                logits.append(last_logits(model, tokens[rows]))
    return torch.cat(logits)


def node_gradients(
    model: nn.Module,
    tokens: Tensor,
    nodes: Sequence[Node],
    metric: Callable[[Tensor, Tensor], Tensor],
    batch: int = 128,
) -> list[Tensor]:
    """Gradients of a metric with respect to activations at nodes, ``(prompts, size)`` for each.

    Parameters
    ----------
    model, tokens, nodes, batch
        See :func:`read_nodes`.
    metric
        Logits ``(rows, vocabulary)`` and numbers of the prompts → ``(rows,)``.
    """
    found: list[list[Tensor]] = [[] for _ in nodes]
    with evaluating(model), torch.enable_grad():
        for numbers in torch.arange(len(tokens)).split(batch):
            leaves: dict[int, Tensor] = {}

            def add(number: int, x: Tensor, leaves: dict[int, Tensor] = leaves) -> Tensor:
                leaves[number] = torch.zeros_like(x, requires_grad=True)
                return x + leaves[number]

            with _visited(model, nodes, add):
                value = metric(last_logits(model, tokens[numbers]), numbers).sum()
            for parts, slope in zip(found, torch.autograd.grad(value, [leaves[n] for n in range(len(nodes))])):
                parts.append(slope.float())
    return [torch.cat(parts) for parts in found]
