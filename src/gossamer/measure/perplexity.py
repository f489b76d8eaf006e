"""Perplexity: how surprised a language model is by a text.

It is the exponential of the mean negative log-likelihood of a token given what came before it. What came
before is limited by the model's window, so the text is read through overlapping windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.measure.windows import (
    Window,
    as_sequences,
    batches,
    check_finite,
    check_fits,
    chunks,
    evaluation_mode,
    first_token_of,
    scored_logits,
    sliding_windows,
    widen,
)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes
    ----------
    value
        exp(`nll_per_token`).
    nll_per_token
        Mean negative log-likelihood, in nats.
    tokens
        Number of tokens scored.
    standard_error
        Standard error of `value` with the windows as the sampling unit, since neighbouring tokens are not
        independent; None if there was only one window.
    """

    value: float
    nll_per_token: float
    tokens: int
    standard_error: float | None

    def __str__(self) -> str:
        spread = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return f"{self.value:.4g}{spread} ({self.tokens:,} tokens)"

    @classmethod
    def from_windows(cls, sums: Sequence[float], counts: Sequence[int]) -> Perplexity:
        """Combine the summed negative log-likelihoods (nats) and the numbers of scored tokens of all windows."""
        tokens, windows = sum(counts), len(counts)
        mean = math.fsum(sums) / tokens
        value = math.exp(mean) if mean < 709 else math.inf
        error = None
        if windows > 1:
            # Linearised variance of a ratio of two sums; the exponential carries it over by its derivative.
            squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts))
            error = value * math.sqrt(squares * windows / (windows - 1)) / tokens
        return cls(value, mean, tokens, error)


def perplexity(
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    window: int = 1024,
    stride: int = 512,
    *,
    mask: Tensor | Iterable[Tensor] | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Return the sliding-window perplexity of a causal language model.

    Every token after the first of its sequence is scored once, with at least ``window - stride`` tokens of
    context as soon as there are that many. A sequence that begins with the model's ``bos_token_id`` has it in front
    of every window, not of the first alone. Logits are asked for only where tokens are scored, and are widened
    to float32 a few rows at a time.

    Parameters
    ----------
    model
        Maps token ids (batch, length) to logits (batch, length, vocabulary), as a tensor or in `.logits`.
    tokens
        Token ids, (1, length) or (sequences, length), or several such tensors. Sequences never see each other.
    window
        Longest input, in tokens.
    stride
        Tokens between two windows, from 1 to `window`. With ``stride == window`` there is no overlap, and the
        first token of each window is not scored.
    mask
        Same structure as `tokens`; padding (zeros) is removed and not scored.
    batch_size
        Windows that are computed together; changes speed and memory, not the result.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Perplexity

    Raises
    ------
    CalibrationError
        If a sequence has fewer than two tokens, or a token id is outside the vocabulary.
    ConfigurationError
        If `window`, `stride` or `batch_size` are out of range, or the window exceeds the model's positions.
    NonFiniteError
        If the logits hold NaN or Inf.
    """
    windows = sliding_windows(as_sequences(tokens, mask), window, stride, first_token_of(model))
    check_fits(model, windows)
    sums: list[float] = []
    counts: list[int] = []
    with evaluation_mode(model):
        for batch in track(batches(windows, batch_size), "perplexity", enabled=progress):
            sums += window_sums(_token_nll(*scored_logits(model, batch)), model, batch)
            counts += [piece.scored for piece in batch]
    return Perplexity.from_windows(sums, counts)


def window_sums(nll: Tensor, model: nn.Module, batch: Sequence[Window], name: str = "model") -> list[float]:
    """Sum the negative log-likelihoods (windows * scored,) of a batch window by window, in float64."""
    check_finite(nll, model, batch, name)
    return nll.double().reshape(len(batch), -1).sum(1).tolist()


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] for every row: (rows, vocabulary), (rows,) -> (rows,)."""
    pieces = []
    for piece, target in chunks(logits, targets):
        wide = widen(piece)
        pieces.append(wide.logsumexp(-1) - wide.gather(-1, target[:, None])[:, 0])
    return torch.cat(pieces)
