"""A model in which one module's output passes through something else: an autoencoder, an edit, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ModelError
from gossamer.features.sae import SAE
from gossamer.features.store import find_site
from gossamer.measure.windows import evaluation_mode, logits_of
from gossamer.models.blocks import run_batch

Edit = Callable[[Tensor], Tensor]
"""Activations ``(batch, tokens, size)`` → what takes their place."""


@contextmanager
def edited(model: nn.Module, site: str | int, edit: Edit, skip_first: int = 0) -> Iterator[None]:
    """Inside, the output of a module is what `edit` makes of it.

    Parameters
    ----------
    model
        The model.
    site
        Name of the module, or number of the block.
    edit
        Gets and returns activations of the same shape.
    skip_first
        Tokens at the beginning that pass as they are.

    Raises
    ------
    UnknownNameError
        If there is no such module.
    ModelError
        If the edit changes the shape.
    """
    name, module = find_site(model, site)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = edit(x)
        if changed.shape != x.shape:
            raise ModelError(f"the edit of {name} makes {tuple(changed.shape)} of {tuple(x.shape)}; keep the shape")
        changed = torch.cat([x[:, :skip_first], changed[:, skip_first:].to(x.dtype)], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class SpliceReport:
    """What a model loses when a module's output is replaced by a reconstruction.

    Attributes
    ----------
    dense, spliced, ablated
        Mean loss of a predicted token, in nats: of the model as it is, with the reconstruction, and with the mean
        activation in its place.
    divergence
        Mean Kullback–Leibler divergence of the predictions from those of the model as it is, in nats.
    unexplained
        Fraction of the variance of the activations that is not reconstructed.
    active
        Mean number of active features of a token.
    tokens
        Predicted tokens.
    """

    dense: float
    spliced: float
    ablated: float
    divergence: float
    unexplained: float
    active: float
    tokens: int

    @property
    def recovered(self) -> float:
        """Share of the loss between ablation and the model as it is that the reconstruction recovers; 1 is all."""
        gap = self.ablated - self.dense
        return (self.ablated - self.spliced) / gap if gap else math.nan

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {**asdict(self), "recovered": self.recovered}


def evaluate_splice(
    model: nn.Module,
    site: str | int,
    sae: SAE,
    documents: Iterable[Tensor],
    skip_first: int = 1,
    progress: bool = True,
) -> SpliceReport:
    """Measure what a model loses through an autoencoder in the place of a module's output.

    The mean activation that stands for ablation is that of the same documents.

    Parameters
    ----------
    model
        A causal language model.
    site
        Name of the module, or number of the block.
    sae
        In evaluation mode, so that tokens do not depend on each other.
    documents
        Token ids, each ``(tokens,)`` or ``(1, tokens)``, unseen in training.
    skip_first
        Tokens at the beginning that pass as they are, as in the store that the autoencoder was trained on.

    Raises
    ------
    CalibrationError
        If no document has a token to predict.
    ModelError
        If activations are not of the autoencoder's size.
    """
    texts = [text.reshape(1, -1) for text in documents]
    texts = [text for text in texts if text.shape[1] > skip_first + 1]
    if not texts:
        raise CalibrationError(f"no document has more than {skip_first + 1} tokens; give longer ones")
    state = _Sums(sae)
    with evaluation_mode(model):
        for text in track(texts, "means of activations", enabled=progress):
            with edited(model, site, state.watch(skip_first)):
                run_batch(model, text)
        for text in track(texts, "splicing", enabled=progress):
            dense = _log_probabilities(model, text)
            with edited(model, site, state.explain(skip_first), skip_first):
                spliced = _log_probabilities(model, text)
            with edited(model, site, state.ablate, skip_first):
                ablated = _log_probabilities(model, text)
            state.add(text, dense, spliced, ablated)
    return state.report()


class _Sums:
    def __init__(self, sae: SAE):
        self.sae = sae
        self.total, self.rows, self.squares = torch.zeros(sae.d_in, dtype=torch.float64), 0, 0.0
        self.error, self.active, self.tokens = 0.0, 0, 0
        self.losses, self.divergence = [0.0, 0.0, 0.0], 0.0

    def watch(self, skip: int) -> Edit:
        def look(x: Tensor) -> Tensor:
            if x.shape[-1] != self.sae.d_in:
                raise ModelError(f"activations have {x.shape[-1]} numbers, the autoencoder is for {self.sae.d_in}")
            rows = x[:, skip:].reshape(-1, x.shape[-1]).double()
            self.total += rows.sum(0)
            self.rows += len(rows)
            self.squares += float(rows.square().sum())
            return x

        return look

    def explain(self, skip: int) -> Edit:
        def replace(x: Tensor) -> Tensor:
            explained = self.sae(x.to(self.sae.decoder.dtype))
            wrong = (explained.output - x)[:, skip:]
            self.error += float(wrong.double().square().sum())
            self.active += int((explained.codes.to_dense().view(*x.shape[:2], -1)[:, skip:] > 0).sum())
            return explained.output

        return replace

    def ablate(self, x: Tensor) -> Tensor:
        return (self.total / self.rows).to(x.dtype).expand_as(x)

    def add(self, text: Tensor, *logs: Tensor) -> None:
        wanted = text[0, 1:, None]
        for number, log in enumerate(logs):
            self.losses[number] -= float(log.gather(1, wanted).double().sum())
        dense, spliced = logs[0], logs[1]
        self.divergence += float((dense.exp() * (dense - spliced)).double().sum())
        self.tokens += len(wanted)

    def report(self) -> SpliceReport:
        dense, spliced, ablated = (loss / self.tokens for loss in self.losses)
        variance = self.squares - float(self.total.square().sum()) / self.rows
        return SpliceReport(
            dense,
            spliced,
            ablated,
            self.divergence / self.tokens,
            self.error / variance if variance else math.nan,
            self.active / self.rows,
            self.tokens,
        )


def _log_probabilities(model: nn.Module, text: Tensor) -> Tensor:
    """Of the next token, ``(tokens − 1, vocabulary)`` float32."""
    logits = logits_of(run_batch(model, text))[0, :-1].float()
    if not bool(torch.isfinite(logits.sum())):
        raise ModelError("the logits hold NaN or infinity; the edit or the model is damaged")
    return logits.log_softmax(-1)
