"""The dense model as the teacher of its own sparse form.

What a language model says about a token is a distribution over the whole vocabulary, and tells a student far more than
the one token that came next. Logits of a large vocabulary are most of what a small model's step holds in memory, so
the loss goes through them a few rows at a time and keeps only their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.labels import IGNORED
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.models.blocks import run_batch

_CHUNK = 1 << 22  # logits at a time


class _Distilled(torch.autograd.Function):
    """``(1 − α) CE + α T² KL(teacher ‖ student)`` of logits, a mean over tokens; holds the gradient and no softmax."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
        gradient = torch.zeros_like(student)
        count = max(1, int((labels != IGNORED).sum()))
        rows = max(1, _CHUNK // student.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            known = labels[part] != IGNORED
            wanted = labels[part].clamp_min(0).unsqueeze(1)
            plain = torch.log_softmax(student[part].float(), 1)
            total -= (1 - alpha) * plain.gather(1, wanted).squeeze(1)[known].sum(dtype=torch.float64)
            here = plain.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=plain.dtype)).mul_(1 - alpha)
            if alpha:
                soft = torch.log_softmax(student[part].float() / temperature, 1)
                target = torch.log_softmax(teacher[part].float() / temperature, 1)
                probability = target.exp()
                divergence = (probability * target.sub_(soft)).sum(1)
                total += alpha * temperature**2 * divergence[known].sum(dtype=torch.float64)
                here.add_(soft.exp_().sub_(probability), alpha=alpha * temperature)
            gradient[part] = here.mul_(known.unsqueeze(1)).div_(count)
        ctx.save_for_backward(gradient)
        return (total / count).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0].to(gradient.dtype)), None, None, None, None


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, alpha: float = 1 / 3
) -> Tensor:
    """``(1 − α) CE + α T² KL(softmax(teacher / T) ‖ softmax(student / T))``, a mean over tokens that have a label.

    Parameters
    ----------
    student, teacher
        Logits ``(tokens, vocabulary)``; gradients flow to the first only, and once.
    labels
        ``(tokens,)`` int64; −100 where there is none.
    temperature, alpha
        T and α.
    """
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"student and teacher have logits {tuple(student.shape)} and {tuple(teacher.shape)}; the teacher must be "
            f"the same model before it became sparse"
        )
    return _Distilled.apply(student, teacher, labels, temperature, alpha)


@dataclass
class SelfDistillation:
    """The loss of a model that is to do what it did when it was dense.

    Huang et al., 2025, arXiv 2509.25996, eq. 13: ``η KL + (1 − η) CE``. The authors' earlier trainer (arXiv
    2407.20584) has T = 2 and a distance of hidden states besides, which the later paper found to do harm.

    Parameters
    ----------
    teacher
        The dense model; put in evaluation mode and frozen. None leaves the cross-entropy alone.
    temperature
        T.
    alpha
        η, the share of the teacher.
    hidden
        Weight of ``mean over layers ‖h_s − h_t‖² / ‖h_t‖²``, for models of transformers.
    """

    teacher: nn.Module | None
    temperature: float = 1.0
    alpha: float = 1 / 3
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1 or self.hidden < 0:
            raise ConfigurationError(
                f"temperature, alpha and hidden are {self.temperature}, {self.alpha} and {self.hidden}; they must be "
                f"above 0, in [0, 1] and at least 0"
            )
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of token ids ``(batch, length)``, or of what else the model takes.

        Raises
        ------
        CalibrationError
            If there is no next token to predict.
        """
        return self.compute_loss(model, batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The same, in the form in which ``transformers.Trainer`` asks for it."""
        batch = _with_hidden(inputs) if self.hidden else _without_labels(inputs)
        output = run_batch(model, batch, next(model.parameters()).device)
        logits = _logits(output)
        labels = _labels(inputs).to(logits.device)
        if self.teacher is None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED)
            return (loss, output) if return_outputs else loss
        with torch.no_grad():
            said = run_batch(self.teacher, batch, next(self.teacher.parameters()).device)
        theirs = _logits(said)[:, :-1].flatten(0, 1)
        loss = distillation_loss(logits[:, :-1].flatten(0, 1), theirs, labels, self.temperature, self.alpha)
        if self.hidden:
            loss = loss + self.hidden * _distance(output.hidden_states, said.hidden_states)
        return (loss, output) if return_outputs else loss


def _distance(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    parts = [(s - t).square().mean() / t.square().mean().clamp_min(1e-12) for s, t in zip(student, teacher)]
    return torch.stack(parts).mean()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _labels(inputs: Any) -> Tensor:
    tokens = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    if not isinstance(tokens, Tensor) or tokens.shape[-1] < 2:
        raise CalibrationError("a batch holds no next token to predict: pass token ids (batch, length ≥ 2)")
    labels = inputs["labels"] if isinstance(inputs, Mapping) and "labels" in inputs else tokens
    labels = labels[:, 1:]
    if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        labels = labels.masked_fill(inputs["attention_mask"][:, 1:] == 0, IGNORED)
    return labels.flatten()


def _without_labels(inputs: Any) -> Any:
    return {k: v for k, v in inputs.items() if k != "labels"} if isinstance(inputs, Mapping) else inputs


def _with_hidden(inputs: Any) -> dict[str, Any]:
    plain = _without_labels(inputs)
    return {**(plain if isinstance(plain, Mapping) else {"input_ids": plain}), "output_hidden_states": True}
