"""A model in which one module's output passes through something else: an autoencoder, an edit, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.labels import IGNORED
from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.features.gradients import loss_gradient
from gossamer.features.sae import SAE
from gossamer.features.store import find_site
from gossamer.measure.windows import evaluation_mode, logits_of
from gossamer.models.blocks import run_batch

Ablation = Literal["mean", "zero"]
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
        Mean loss of a predicted token, in nats: of the model as it is, with the reconstruction, and with a constant
        in its place.
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
    with_gradients: bool = False,
    ablation: Ablation = "mean",
    labels: Iterable[Tensor] | None = None,
) -> SpliceReport:
    """Measure what a model loses through an autoencoder in the place of a module's output.

    As :func:`evaluate_splices`, for a single autoencoder.
    """
    saes = {"": sae}
    return evaluate_splices(model, site, saes, documents, skip_first, progress, with_gradients, ablation, labels)[""]


def evaluate_splices(
    model: nn.Module,
    site: str | int,
    saes: Mapping[str, SAE],
    documents: Iterable[Tensor],
    skip_first: int = 1,
    progress: bool = True,
    with_gradients: bool = False,
    ablation: Ablation = "mean",
    labels: Iterable[Tensor] | None = None,
) -> dict[str, SpliceReport]:
    """Measure what a model loses through each of several autoencoders in the place of a module's output.

    What does not depend on the autoencoders, the model as it is and ablated, is computed once.

    Parameters
    ----------
    model
        A causal language model.
    site
        Name of the module, or number of the block.
    saes
        Name → autoencoder in evaluation mode, so that tokens do not depend on each other.
    documents
        Token ids, each ``(tokens,)`` or ``(1, tokens)``, unseen in training.
    skip_first
        Tokens at the beginning that pass as they are, as in the store that the autoencoders were trained on.
    with_gradients
        Whether autoencoders are told the gradient of the model's loss on the same document, which rules such as
        :class:`GradientTopK` look at. It knows what comes next, so a model cannot generate text this way.
    ablation
        What a reconstruction is compared with: the ``mean`` activation of the same documents, or ``zero``, which leaves
        the model with less and flatters every autoencoder.
    labels
        For each document its tokens with −100 in the place of those whose prediction does not count; all count by
        default. Activations of all tokens are explained, and their error counted.

    Returns
    -------
    dict
        Name → report.

    Raises
    ------
    CalibrationError
        If no document has a token to predict.
    ModelError
        If activations are not of the autoencoders' size.
    """
    if ablation not in ("mean", "zero"):
        raise ConfigurationError(f"ablation is {ablation!r}; it must be mean or zero")
    texts, counted = judged_texts(documents, labels, skip_first)
    sums = {name: _Sums(sae) for name, sae in saes.items()}
    dense, ablated = _Loss(), _Loss()
    with evaluation_mode(model):
        moments = _moments(model, site, texts, skip_first, progress)
        constant = moments.mean if ablation == "mean" else torch.zeros_like(moments.mean)
        for text, here in track(list(zip(texts, counted, strict=True)), "splicing", enabled=progress):
            log_dense = _log_probabilities(model, text)
            dense.add(text, log_dense, here)
            with edited(model, site, lambda x: constant.to(x).expand_as(x), skip_first):
                ablated.add(text, _log_probabilities(model, text), here)
            gradient = loss_gradient(model, find_site(model, site)[1], text)[1] if with_gradients else None
            for one in sums.values():
                with edited(model, site, one.explaining(skip_first, gradient), skip_first):
                    one.add(text, _log_probabilities(model, text), log_dense, here)
    return {name: one.report(dense, ablated, moments) for name, one in sums.items()}


def judged_texts(
    documents: Iterable[Tensor], labels: Iterable[Tensor] | None, skip_first: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Documents ``(1, tokens)`` that are long enough, and which predictions count in each, bool ``(tokens − 1,)``.

    Raises
    ------
    CalibrationError
        If no prediction counts, or labels are not those of the documents.
    """
    texts = [text.reshape(1, -1) for text in documents]
    wanted = texts if labels is None else [label.reshape(1, -1) for label in labels]
    if [text.shape for text in texts] != [label.shape for label in wanted]:
        raise CalibrationError(f"{len(wanted)} labels for {len(texts)} documents; give one for each, equally long")
    counted = [label[0, 1:] != IGNORED for label in wanted]
    long = [number for number, text in enumerate(texts) if text.shape[1] > skip_first + 1]
    if not any(bool(counted[number].any()) for number in long):
        raise CalibrationError(
            f"no document has more than {skip_first + 1} tokens and one to predict; give longer ones"
        )
    return [texts[number] for number in long], [counted[number] for number in long]


@dataclass(frozen=True)
class _Moments:
    mean: Tensor
    variance: float  # sum over activations of the squared distance from the mean
    rows: int


def _moments(model: nn.Module, site: str | int, texts: list[Tensor], skip: int, progress: bool) -> _Moments:
    kept: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        rows = x[:, skip:].reshape(-1, x.shape[-1]).double()
        kept.append(torch.stack([rows.sum(0), rows.square().sum(0), torch.full_like(rows[0], len(rows))]))
        return x

    for text in track(texts, "means of activations", enabled=progress):
        with edited(model, site, look):
            run_batch(model, text)
    total, squares, count = torch.stack(kept).sum(0)
    return _Moments(total / count, float((squares - total.square() / count).sum()), int(count[0]))


class _Loss:
    """Mean loss of predicted tokens."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, text: Tensor, log: Tensor, counted: Tensor) -> None:
        self.total -= float(log.gather(1, text[0, 1:, None])[counted].double().sum())
        self.tokens += int(counted.sum())

    @property
    def mean(self) -> float:
        return self.total / self.tokens


class _Sums:
    """What is counted for one autoencoder."""

    def __init__(self, sae: SAE):
        self.sae, self.loss = sae, _Loss()
        self.error, self.active, self.divergence = 0.0, 0, 0.0

    def explaining(self, skip: int, gradient: Tensor | None) -> Edit:
        def replace(x: Tensor) -> Tensor:
            if x.shape[-1] != self.sae.d_in:
                raise ModelError(f"activations have {x.shape[-1]} numbers, the autoencoder is for {self.sae.d_in}")
            kind = self.sae.decoder.dtype
            explained = self.sae(x.to(kind), None if gradient is None else gradient.to(kind))
            wrong = (explained.output - x)[:, skip:]
            self.error += float(wrong.double().square().sum())
            counted = explained.codes.row_of % x.shape[1] >= skip
            self.active += int((explained.codes.values[counted] > 0).sum())
            return explained.output

        return replace

    def add(self, text: Tensor, spliced: Tensor, dense: Tensor, counted: Tensor) -> None:
        self.loss.add(text, spliced, counted)
        self.divergence += float((dense.exp() * (dense - spliced))[counted].double().sum())

    def report(self, dense: _Loss, ablated: _Loss, moments: _Moments) -> SpliceReport:
        return SpliceReport(
            dense.mean,
            self.loss.mean,
            ablated.mean,
            self.divergence / dense.tokens,
            self.error / moments.variance if moments.variance else math.nan,
            self.active / moments.rows,
            dense.tokens,
        )


def _log_probabilities(model: nn.Module, text: Tensor) -> Tensor:
    """Of the next token, ``(tokens − 1, vocabulary)`` float32."""
    logits = logits_of(run_batch(model, text))[0, :-1].float()
    if not bool(torch.isfinite(logits.sum())):
        raise ModelError("the logits hold NaN or infinity; the edit or the model is damaged")
    return logits.log_softmax(-1)
