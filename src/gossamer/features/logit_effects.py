"""Which tokens a feature speaks for: its direction seen through the last norm and the output head.

This is the direct path alone. What later blocks make of a feature is not in it, so it says much about features near
the end of a model and less about those at its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure.windows import evaluation_mode, model_device
from gossamer.models.blocks import run_batch

_STEP = 1e-3  # of a state's length; small enough for the norm to be straight, large enough for float32


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """Tokens whose logits every direction raises and lowers most.

    Attributes
    ----------
    promoted, suppressed
        Token ids ``(directions, count)`` int64, the strongest first.
    rise, fall
        Change of their logits relative to the mean over the vocabulary, of the same shape.
    """

    promoted: Tensor
    rise: Tensor
    suppressed: Tensor
    fall: Tensor


@torch.no_grad()
def logit_effects(
    model: nn.Module, directions: Tensor, text: Tensor, count: int = 10, chunk: int = 256, progress: bool = True
) -> LogitEffects:
    """What directions in the residual stream do to the logits on the direct path.

    The last norm is taken as straight around the states that it gets on a piece of text, so that its gains, its
    division by the length and, in a layer norm, its centring are accounted for.

    Parameters
    ----------
    model
        A causal language model.
    directions
        ``(directions, size)``, in the stream's own units: for features of an autoencoder, ``sae.decoder / sae.scale``
        times an activation.
    text
        Token ids ``(1, tokens)`` whose states stand for all.
    count
        Tokens in each list.
    chunk
        Directions that are multiplied with the head at a time.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ModelError
        If the model names no output head, or directions are not of the stream's size.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} names no output head; logit effects need a causal language model")
    matrix = head.weight.detach()
    if directions.shape[1] != matrix.shape[1]:
        raise ModelError(
            f"directions have {directions.shape[1]} numbers and the residual stream {matrix.shape[1]}; "
            "choose a module that writes to the stream"
        )
    if not 1 <= count <= len(matrix):
        raise ConfigurationError(f"count is {count}; it must be from 1 to the {len(matrix)} tokens there are")
    with evaluation_mode(model):
        straight = _last_norm(model, head, text)
        parts = []
        for part in track(directions.split(chunk), "logit effects", enabled=progress):
            rows = straight(part.to(matrix.device, torch.float32)).to(matrix.dtype)
            logits = (rows @ matrix.t()).float()
            logits -= logits.mean(1, keepdim=True)
            up, down = logits.topk(count), logits.topk(count, largest=False)
            parts.append([up.indices.cpu(), up.values.cpu(), down.indices.cpu(), down.values.cpu()])
    return LogitEffects(*(torch.cat(column) for column in zip(*parts)))


def _last_norm(model: nn.Module, head: nn.Module, text: Tensor) -> Callable[[Tensor], Tensor]:
    """The norm in front of the head, straightened around the states that it gets on a text."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    asked: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape:
            calls.append((module, args[0], output))

    handles = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    handles.append(head.register_forward_pre_hook(lambda module, args: asked.append(args[0])))
    try:
        run_batch(model, text.to(model_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    found = next((call for call in reversed(calls) if _is(call[2], asked[-1])), None)
    if found is None:  # the head reads the stream as it is
        return lambda directions: directions
    norm, states, _ = found
    # the first state is where attention rests, and like no other
    around = states.reshape(-1, states.shape[-1]).float()[1:][-8:]

    def straightened(directions: Tensor) -> Tensor:
        lengths = directions.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total = torch.zeros_like(directions)
        for state in around:
            step = _STEP * state.norm() * directions / lengths
            total += (norm((state + step).to(states.dtype)) - norm((state - step).to(states.dtype))).float() / (
                2 * _STEP * state.norm()
            )
        return total * lengths / len(around)

    return straightened


def _is(output: Tensor, asked: Tensor) -> bool:
    return output.shape == asked.shape and bool(torch.equal(output, asked))
