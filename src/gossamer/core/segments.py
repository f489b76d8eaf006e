"""Long sequences in segments, so that what is as wide as a vocabulary or a feed-forward layer never exists in full.

The logits of a sequence are often larger than everything else that training holds. Their loss is a sum over tokens, so
that a few tokens at a time can be taken through the head, forward and backward, before the next ones are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gossamer.core.labels import IGNORED
from gossamer.errors import CalibrationError, ConfigurationError, ModelError


class SegmentedLMLoss(nn.Module):
    """Next-token cross-entropy that never holds more logits than those of one segment.

    Gradients of hidden states and head are taken segment by segment while the loss is computed, and only scaled when
    the backward pass arrives; tokens without a label never reach the head. The result is that of the whole sequence
    at once, up to the order of sums. Compare the segments of Wang et al., 2025, "LeMo", arXiv 2501.09767, and Hsu et
    al., 2024, "Liger Kernel", arXiv 2410.10989.

    Parameters
    ----------
    segment
        Tokens at a time, at least 1.
    ignore_index
        Label of tokens that have none.
    shift
        Whether ``labels[t]`` is the token at t, so that position t − 1 predicts it, as in Hugging Face's models.

    Examples
    --------
    >>> hidden = model.model(tokens).last_hidden_state  # doctest: +SKIP
    >>> loss = SegmentedLMLoss()(hidden, model.lm_head, tokens)  # doctest: +SKIP
    """

    def __init__(self, segment: int = 1024, ignore_index: int = IGNORED, shift: bool = True):
        super().__init__()
        check_segment(segment)
        self.segment, self.ignore_index, self.shift = segment, ignore_index, shift

    def forward(
        self, hidden: Tensor, head: nn.Module | Tensor, labels: Tensor, total: Tensor | int | None = None
    ) -> Tensor:
        """Loss of hidden states ``(batch, length, width)``, a scalar in float32.

        Parameters
        ----------
        hidden
            What the head reads.
        head
            Maps ``(n, width)`` to logits ``(n, vocabulary)``; or its matrix, ``(vocabulary, width)``.
        labels
            ``(batch, length)`` int64.
        total
            What the sum is divided by; by default the number of labels.

        Raises
        ------
        CalibrationError
            If there are no labels, or their shape does not fit.
        """
        if labels.shape != hidden.shape[:-1]:
            raise CalibrationError(
                f"labels are {tuple(labels.shape)}, hidden states {tuple(hidden.shape)}; one label a position is needed"
            )
        if self.shift:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        found = labels != self.ignore_index
        count = int(found.sum())
        if not count:
            raise CalibrationError(f"all labels are {self.ignore_index}; a loss needs at least one token with a label")
        rows = hidden[found]
        matrix = (head,) if isinstance(head, Tensor) else tuple(p for p in head.parameters() if p.requires_grad)
        # the sum is divided where it arises, as 16-bit gradients of a large sum would overflow
        divisor = count if total is None else float(total)
        return _SegmentedLoss.apply(head, labels[found], self.segment, divisor, rows, *matrix)

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Have a Hugging Face model compute its loss by segments whenever it trains on labels.

        The output then holds no logits. Nothing else changes, so that a Trainer needs not know.

        Raises
        ------
        ModelError
            If the model has no output embeddings, or changes its logits behind them.
        """
        owner = _with_loss(model)
        if owner is None:
            raise ModelError(f"{type(model).__name__} has no head whose loss could be computed in segments")
        if getattr(owner.config, "final_logit_softcapping", None):
            raise ModelError(f"{type(model).__name__} caps its logits behind the head; call SegmentedLMLoss yourself")
        with _Rerouted(self, owner, owner.get_output_embeddings()).active():
            yield


class _SegmentedLoss(torch.autograd.Function):
    """Loss and gradients in one go."""

    @staticmethod
    def forward(
        ctx: Any, head: Any, labels: Tensor, segment: int, divisor: float, rows: Tensor, *parameters: Tensor
    ) -> Tensor:
        wanted = [rows.requires_grad, *(p.requires_grad for p in parameters)]
        total = rows.new_zeros((), dtype=torch.float32)
        by_row = torch.empty_like(rows) if wanted[0] else None
        sums = [torch.zeros_like(p) for p, needed in zip(parameters, wanted[1:]) if needed]
        for start in range(0, len(rows), segment):
            part = rows[start : start + segment].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                logits = functional.linear(part, head) if isinstance(head, Tensor) else head(part)
                targets = labels[start : start + segment].to(logits.device)
                loss = functional.cross_entropy(logits.float(), targets, reduction="sum") / divisor
            del logits
            total += loss.detach()
            if not any(wanted):
                continue
            inputs = [part] * wanted[0] + [p for p, needed in zip(parameters, wanted[1:]) if needed]
            gradients = list(torch.autograd.grad(loss, inputs))
            if by_row is not None:
                by_row[start : start + segment] = gradients.pop(0)
            for sum_, gradient in zip(sums, gradients):
                sum_ += gradient
        ctx.wanted = wanted
        ctx.save_for_backward(*([] if by_row is None else [by_row]), *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [_scaled(next(saved), gradients[0]) if needed else None for needed in ctx.wanted]
        return (None, None, None, None, *found)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient * factor.to(gradient.dtype)


class _Rerouted:
    """A model whose head hands hidden states on, and whose loss function takes them through the head in segments."""

    def __init__(self, loss: SegmentedLMLoss, model: Any, head: nn.Module):
        self.loss, self.model, self.head = loss, model, head
        self.whole, self.forward = model.forward, head.forward
        self.function = model.loss_function

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.reading = reading = self.model.training and kwargs.get("labels") is not None
        try:
            output = self.whole(*args, **kwargs)
        finally:
            self.reading = False
        if reading and hasattr(output, "logits"):
            output.logits = None
        return output

    def _pass(self, hidden: Tensor) -> Tensor:
        return hidden if self.reading else self.forward(hidden)

    def _sum(self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        if not self.reading:
            return self.function(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **_)
        self.reading = False  # the head is itself again for those segments
        loss = self.loss(logits, self.head, labels, num_items_in_batch)
        self.reading = True
        return loss

    @contextmanager
    def active(self) -> Iterator[None]:
        self.reading = False
        had = "_loss_function" in self.model.__dict__
        self.model.loss_function = self._sum
        try:
            # not by hooks, which wrappers such as PEFT's may pass by; and a Trainer reads the signature
            call = wraps(self.whole)(lambda *args, **kwargs: self._call(*args, **kwargs))
            with replaced_forward(self.model, call), replaced_forward(self.head, self._pass):
                yield
        finally:
            if had:
                self.model.loss_function = self.function
            else:
                self.model.__dict__.pop("_loss_function", None)


def _with_loss(model: Any) -> Any:
    """The part of a (wrapped) model that calls its ``loss_function``."""
    parts = (part for part in model.modules() if hasattr(type(part), "loss_function"))
    return next((part for part in parts if part.get_output_embeddings() is not None), None)


@contextmanager
def in_segments(modules: Iterable[nn.Module], segment: int = 1024, recompute: bool = False) -> Iterator[None]:
    """Let modules that treat tokens apart, such as feed-forward layers, take a segment of the sequence at a time.

    Values and gradients stay as they are up to the order of sums. In the backward pass the gradients of what is inside
    exist for one segment only; with recomputation so do the activations.

    Parameters
    ----------
    modules
        Map ``(batch, length, width)`` to the same length.
    segment
        Tokens at a time, at least 1.
    recompute
        Whether nothing inside is stored, but computed again in the backward pass.
    """
    check_segment(segment)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, _by_segments(module.forward, segment, recompute)))
        yield


def _by_segments(forward: Callable[..., Tensor], segment: int, recompute: bool) -> Callable[..., Tensor]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.shape[-2] <= segment and not recompute:
            return forward(hidden, *args, **kwargs)
        parts = hidden.split(segment, dim=-2)
        if recompute and torch.is_grad_enabled():
            done = [checkpoint(forward, part, *args, use_reentrant=False, **kwargs) for part in parts]
        else:
            done = [forward(part, *args, **kwargs) for part in parts]
        return torch.cat(done, dim=-2)

    return run


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a module run another function, as long as the context lasts."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def check_segment(segment: int) -> None:
    """Refuse a segment without tokens.

    Raises
    ------
    ConfigurationError
        If it has less than one.
    """
    if segment < 1:
        raise ConfigurationError(f"segment is {segment}; it must be at least 1 token, such as 1024")
