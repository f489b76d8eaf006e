"""What every attention head of a model writes, and a model some of whose heads say only what they say on average.

Heads are counted through the layers: head 3 of the second layer of a model with eight a layer is number 11. Prompts may
have different lengths; those of equal length run together, so that nothing is ever padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.models.blocks import run_batch
from gossamer.models.heads import AttentionHeads, find_attention_heads

Position = Literal["mean", "last"] | int


@dataclass(frozen=True, eq=False)
class HeadGrid:
    """All the heads of a model.

    Attributes
    ----------
    layers
        Attention layers in the order of the model.
    """

    layers: tuple[AttentionHeads, ...]

    @classmethod
    def of(cls, model: nn.Module) -> HeadGrid:
        """Find them.

        Raises
        ------
        TargetError
            If the model has no attention.
        """
        return cls(tuple(find_attention_heads(model)))

    def __len__(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def names(self) -> list[tuple[int, int]]:
        """Layer and head within it of every head."""
        return [(number, head) for number, layer in enumerate(self.layers) for head in range(layer.count)]

    @property
    def layer_of(self) -> Tensor:
        """Layer of every head, ``(heads,)`` int64."""
        return torch.tensor([layer for layer, _ in self.names])

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values ``(…, heads)`` by layers."""
        if values.shape[-1] != len(self):
            raise ConfigurationError(f"values are {tuple(values.shape)}; the last dimension must be {len(self)} heads")
        return values.split([layer.count for layer in self.layers], dim=-1)


def by_length(prompts: Sequence[Tensor], at_most: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Prompts of equal length together: their numbers ``(n,)``, and their tokens ``(n, length)``.

    Parameters
    ----------
    prompts
        Token ids, each ``(length,)`` or ``(1, length)``.
    at_most
        Prompts in a batch.

    Raises
    ------
    CalibrationError
        If there is no prompt, or one is empty.
    """
    rows = [prompt.reshape(-1) for prompt in prompts]
    if not rows or min(map(len, rows)) < 1:
        raise CalibrationError(f"{len(rows)} prompts, of which some may be empty; give at least one token each")
    batches = []
    for length in sorted({len(row) for row in rows}):
        numbers = [number for number, row in enumerate(rows) if len(row) == length]
        for start in range(0, len(numbers), at_most):
            chosen = numbers[start : start + at_most]
            batches.append((torch.tensor(chosen), torch.stack([rows[number] for number in chosen])))
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which gradients may be asked for; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watched(grid: HeadGrid, visit: Any) -> Iterator[None]:
    """Inside, ``visit(layer number, z)`` gets what each head has read, ``(batch, tokens, heads, size)``.

    Whatever it returns takes the place of that; None leaves it.
    """
    handles = []
    for number, layer in enumerate(grid.layers):

        def hook(module: nn.Module, args: tuple[Any, ...], number: int = number, count: int = layer.count) -> Any:
            z = args[0].unflatten(-1, (count, -1))
            changed = visit(number, z)
            return None if changed is None else (changed.flatten(-2), *args[1:])

        handles.append(layer.output.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def head_outputs(
    model: nn.Module, prompts: Sequence[Tensor], position: Position = "mean", progress: bool = False
) -> Tensor:
    """What every head adds to the residual stream, ``z W_O``, ``(prompts, heads, d)`` float32.

    Parameters
    ----------
    model
        Any transformer whose heads :func:`~gossamer.models.heads.find_attention_heads` finds.
    prompts
        Token ids, each ``(length,)``.
    position
        ``mean`` over the tokens of a prompt, ``last`` token, or the number of a token.
    progress
        Whether to show a bar.

    Raises
    ------
    ConfigurationError
        If the position is none of these.
    CalibrationError
        If there is no prompt, or one has no token at that position.
    """
    if not (position in ("mean", "last") or (isinstance(position, int) and not isinstance(position, bool))):
        raise ConfigurationError(f"position is {position!r}; it must be 'mean', 'last' or the number of a token")
    grid = HeadGrid.of(model)
    found: dict[int, Tensor] = {}
    matrices = [layer.slices().float() for layer in grid.layers]
    with evaluating(model):
        for numbers, tokens in track(by_length(prompts), "outputs of heads", enabled=progress):
            _check_position(position, tokens.shape[1])
            parts: list[Tensor] = []

            def keep(number: int, z: Tensor, parts: list[Tensor] = parts) -> None:
                chosen = (
                    z.float().mean(1) if position == "mean" else z[:, -1 if position == "last" else position].float()
                )
                parts.append(torch.einsum("bhv,hdv->bhd", chosen, matrices[number]))

            with watched(grid, keep):
                run_batch(model, tokens)
            found |= dict(zip(numbers.tolist(), torch.cat(parts, 1)))
    return torch.stack([found[number] for number in range(len(found))])


def _check_position(position: Position, length: int) -> None:
    if isinstance(position, int) and not -length <= position < length:
        raise CalibrationError(f"a prompt has {length} tokens; there is none at position {position}")


@torch.no_grad()
def mean_heads(model: nn.Module, prompts: Sequence[Tensor]) -> list[Tensor]:
    """What every head reads on average over all tokens of prompts, ``(heads, size)`` for each layer.

    This takes the place of a head that is ablated.
    """
    grid = HeadGrid.of(model)
    sums: dict[int, Tensor] = {}
    count = 0

    def add(number: int, z: Tensor) -> None:
        sums[number] = sums.get(number, 0) + z.double().sum((0, 1))

    with evaluating(model), watched(grid, add):
        for _, tokens in by_length(prompts):
            run_batch(model, tokens)
            count += tokens.numel()
    return [(sums[number] / count).float() for number in range(len(grid.layers))]


@contextmanager
def gated_heads(model: nn.Module, gates: Tensor, means: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Inside, every head says ``g z + (1 − g) m``; gradients reach the gates.

    Parameters
    ----------
    model
        The model.
    gates
        g, ``(heads,)`` for all rows of a batch alike, or ``(batch, heads)``; 1 leaves a head as it is.
    means
        m, as :func:`mean_heads` gives them; None for zeros.

    Raises
    ------
    ConfigurationError
        If there are not as many gates as heads, or means of other sizes.
    """
    grid = HeadGrid.of(model)
    parts = grid.split(gates)
    counts = [layer.count for layer in grid.layers]
    if means is not None and [len(mean) for mean in means] != counts:
        raise ConfigurationError(f"means are of {[len(mean) for mean in means]} heads, the model has {counts}")

    def gate(number: int, z: Tensor) -> Tensor | None:
        g = parts[number].to(z.dtype)
        if not g.requires_grad and bool((g == 1).all()):
            return None
        g = g[..., None] if g.dim() == 1 else g[:, None, :, None]
        instead = torch.zeros_like(z[:1, :1]) if means is None else means[number].to(z.dtype)
        return instead + g * (z - instead)

    with watched(grid, gate):
        yield


def last_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits after the last token, ``(batch, vocabulary)`` float32; gradients pass if they are enabled."""
    named = inspect.signature(model.forward).parameters
    # most of a small model's time goes into logits that nobody asks for
    few = {"input_ids": tokens, "logits_to_keep": 1} if "logits_to_keep" in named else tokens
    output = run_batch(model, few)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{type(model).__name__} gives no logits of shape (batch, tokens, vocabulary)")
    return logits[:, -1].float()


def heads_of(names: Iterable[tuple[int, int]], grid: HeadGrid) -> Tensor:
    """Named heads, layer and number, as bool ``(heads,)``.

    Raises
    ------
    ConfigurationError
        If there is no such head.
    """
    known = {name: number for number, name in enumerate(grid.names)}
    chosen = torch.zeros(len(grid), dtype=torch.bool)
    for layer, head in names:
        if (layer, head) not in known:
            raise ConfigurationError(f"there is no head {(layer, head)}; the last one is {grid.names[-1]}")
        chosen[known[layer, head]] = True
    return chosen
