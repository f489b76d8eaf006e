"""Sliding windows over token sequences, and the logits that score them.

Perplexity and divergence look at a text in the same way: windows of at most `window` tokens that start every
`stride` tokens, in which only the tokens that no earlier window scored are scored. This module holds that
walk, so that both speak about exactly the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.models.blocks import accepted

# Rows of logits are turned into float32 a few at a time: 2**24 elements are 64 MiB, whatever the vocabulary.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Window:
    """A stretch of one sequence; its last `scored` tokens are scored, the others are context."""

    ids: Tensor
    scored: int
    sequence: int
    start: int


def as_sequences(tokens: Tensor | Iterable[Tensor], mask: Tensor | Iterable[Tensor] | None = None) -> list[Tensor]:
    """Return the sequences in `tokens` as 1-D int64 tensors without their padding.

    Parameters
    ----------
    tokens
        Token ids: one tensor of shape (sequences, length) or (length,), or several of them.
    mask
        Same structure as `tokens`, zero at padding. Padding is taken out before anything is computed.

    Raises
    ------
    CalibrationError
        If there is nothing to score: no sequences, a sequence of fewer than two tokens, a wrong type or shape.
    """
    batches = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    masks = [None] * len(batches) if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(batches):
        raise CalibrationError(f"mask has {len(masks)} tensors for {len(batches)} of tokens; give one for each")
    sequences: list[Tensor] = []
    for batch, keep in zip(batches, masks):
        if not isinstance(batch, Tensor) or batch.is_floating_point() or batch.dim() not in (1, 2):
            found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(f"tokens are {found}; expected integer tensors of shape (sequences, length)")
        if keep is not None and keep.shape != batch.shape:
            raise CalibrationError(
                f"mask has shape {tuple(keep.shape)}, its tokens {tuple(batch.shape)}; they must be equal"
            )
        rows = batch.reshape(-1, batch.shape[-1]).long()
        kept = None if keep is None else keep.reshape(rows.shape).bool()
        sequences += [row if kept is None else row[kept[i]] for i, row in enumerate(rows)]
    if not sequences:
        raise CalibrationError("no token sequences to score; give at least one of two or more tokens")
    for index, sequence in enumerate(sequences):
        if sequence.numel() < 2:
            raise CalibrationError(
                f"sequence {index} has {sequence.numel()} tokens; "
                "at least 2 are needed, because the first one is only context"
            )
    return sequences


def sliding_windows(
    sequences: Sequence[Tensor], window: int, stride: int, first_token: int | None = None
) -> list[Window]:
    """Cut every sequence into windows such that each token after the first is scored in one window only.

    Parameters
    ----------
    sequences
        1-D tensors of token ids.
    window
        Longest input of the model, in tokens, at least 2.
    stride
        Distance between the starts of two windows, in tokens, at most `window`. With ``stride == window``
        the first token of each window has no context and is not scored: the convention of the GPTQ and Wanda
        tables.
    first_token
        A token that begins every text the model was trained on. A sequence that begins with it has it in front
        of each of its windows, where it takes one of the `window` places and is never scored.

    Raises
    ------
    ConfigurationError
        If `window` or `stride` are outside these ranges.
    """
    if not isinstance(window, int) or window < 2:
        raise ConfigurationError(f"window is {window!r}; it must be an integer of at least 2 tokens")
    if not isinstance(stride, int) or not 1 <= stride <= window:
        raise ConfigurationError(
            f"stride is {stride!r}; it must be an integer from 1 to the window of {window}, or tokens are skipped"
        )
    pieces: list[Window] = []
    for index, ids in enumerate(sequences):
        led = first_token is not None and int(ids[0]) == first_token
        pieces += _cut_led(ids, index, window, stride) if led else _cut(ids, index, window, stride)
    return pieces


def _cut_led(ids: Tensor, sequence: int, window: int, stride: int) -> Iterator[Window]:
    # with the first token in front, each window's own first token has context, so none goes unscored
    places = window - 1
    for piece in _cut(ids[1:], sequence, places, min(stride, places), first_scored=0):
        yield replace(piece, ids=torch.cat([ids[:1], piece.ids]))


def _cut(ids: Tensor, sequence: int, window: int, stride: int, first_scored: int = 1) -> Iterator[Window]:
    length, previous_end = ids.numel(), first_scored
    for start in range(0, length, stride):
        end = min(start + window, length)
        scored = end - max(previous_end, start + first_scored)
        if scored > 0:
            yield Window(ids[start:end], scored, sequence, start)
        previous_end = end
        if end == length:
            return


def batches(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Group windows of equal length and equal number of scored tokens, so that no batch needs padding.

    Raises
    ------
    ConfigurationError
        If `batch_size` is not a positive integer.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size!r}; it must be an integer of at least 1")

    def shape(piece: Window) -> tuple[int, int]:
        return piece.ids.numel(), piece.scored

    grouped: list[list[Window]] = []
    for _, alike in groupby(sorted(windows, key=shape, reverse=True), key=shape):
        members = list(alike)
        grouped += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    return grouped


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Switch the models to evaluation without gradients; afterwards every module is as it was."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before:
            module.training = training


def first_token_of(model: nn.Module) -> int | None:
    """Return the token that begins every text of this model (``bos_token_id`` of its configuration), if any.

    Some models, Gemma among them, fall apart without it: their first position serves attention as a resting
    place. :func:`gossamer.models.evaluation_tokens` puts it in front where the tokenizer does.
    """
    token = getattr(_text_config(model), "bos_token_id", None)
    return token if isinstance(token, int) else None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_fits(model: nn.Module, windows: Sequence[Window]) -> None:
    """Refuse windows that the model cannot read, before it fails somewhere inside.

    Raises
    ------
    ConfigurationError
        If a window is longer than the model's positions.
    CalibrationError
        If a token id is outside the model's vocabulary.
    """
    longest = max(piece.ids.numel() for piece in windows)
    config = _text_config(model)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions > 0:
        raise ConfigurationError(f"window is {longest} tokens; this model reads at most {positions}: use a smaller one")
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int):
        low = min(int(piece.ids.min()) for piece in windows)
        high = max(int(piece.ids.max()) for piece in windows)
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise CalibrationError(
                f"token id {wrong} is outside the model's vocabulary of {vocabulary}; "
                "make the tokens with this model's own tokenizer"
            )


def scored_logits(model: nn.Module, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Run one batch of windows of equal shape.

    Returns
    -------
    tuple of Tensor
        The logits that predict the scored tokens, (windows * scored, vocabulary), in the model's dtype, and
        these tokens, (windows * scored,).
    """
    scored = batch[0].scored
    ids = torch.stack([piece.ids for piece in batch]).to(model_device(model))
    # One more than scored: the logits at the last position predict a token that lies outside the window.
    output = model(ids, **accepted(model, use_cache=False, logits_to_keep=scored + 1))
    logits = logits_of(output)[:, -scored - 1 : -1]
    return logits.reshape(-1, logits.shape[-1]), ids[:, -scored:].reshape(-1)


def logits_of(output: object) -> Tensor:
    """Return the logits in what a model returned: an output object, a tuple that starts with them, or a tensor."""
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ConfigurationError(f"the model returned {found}; expected logits (batch, length, vocabulary)")
    return logits


def model_device(model: nn.Module) -> torch.device:
    """Return the device on which the model's first parameter or buffer lives."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through rows of logits (and tensors aligned with them) in pieces of at most `CHUNK_ELEMENTS`."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    yield from zip(*(tensor.split(rows) for tensor in (logits, *others)))


def widen(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32; wider ones as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_finite(values: Tensor, model: nn.Module, batch: Sequence[Window], name: str = "model") -> None:
    """Refuse scores of a batch, (windows * scored,), that are NaN or infinite.

    Raises
    ------
    NonFiniteError
        Naming the first token concerned and, if a weight is to blame, that weight.
    """
    wrong = (~torch.isfinite(values)).nonzero()
    if not len(wrong):
        return
    which, offset = divmod(int(wrong[0]), batch[0].scored)
    piece = batch[which]
    token = piece.start + piece.ids.numel() - piece.scored + offset
    culprit = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    remedy = (
        f"weight {culprit!r} holds NaN or Inf"
        if culprit
        else "all weights are finite, so an activation overflows: evaluate in float32"
    )
    raise NonFiniteError(
        f"the {name}'s logits for token {token} of sequence {piece.sequence} are NaN or infinite; {remedy}"
    )
