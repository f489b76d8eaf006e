"""Training under a penalty on activations: in a loop of one's own, or in the Trainer of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.penalties import ActivationPenalty
from gossamer.errors import ConfigurationError


class PenalizedTraining:
    """A model whose training is penalised.

    In a loop of one's own::

        run = method.attach(model, optimizer)
        for batch in data:
            loss = model(**batch).loss + run.loss()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
        run.finish()

    Parameters
    ----------
    model
        The one that is called.
    penalty
        On its activations.
    optimizer
        Its steps are counted; without one, :meth:`advance` has to be called after every step.

    Attributes
    ----------
    history
        A row for every step at which one was asked for, with :meth:`log`.
    """

    def __init__(self, model: nn.Module, penalty: ActivationPenalty, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.penalty = model, penalty
        self.history: list[dict[str, float]] = []
        self._handle: Any = None
        if optimizer is not None:
            self._handle = optimizer.register_step_post_hook(lambda *_: self.advance())

    def loss(self) -> Tensor:
        """What is to be added to the loss of the last forward pass; see :meth:`ActivationPenalty.loss`."""
        return self.penalty.loss()

    def advance(self) -> None:
        """Count a step of the optimiser."""
        self.penalty.advance()

    def log(self, task_loss: float) -> dict[str, float]:
        """Note where training stands: step, weight, penalty, and the weighted penalty as a share of the task's loss."""
        row = {
            "step": float(self.penalty.step),
            "weight": self.penalty.current_weight,
            "penalty": self.penalty.value,
            "ratio": self.penalty.ratio(task_loss),
        }
        self.history.append(row)
        return row

    def finish(self) -> None:
        """End: nothing is penalised any more."""
        self.penalty.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class PenalizedMethod(Protocol):
    """A method that penalises activations while a model trains."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> PenalizedTraining:
        """Start."""


def penalty_callback(method: PenalizedMethod) -> Any:
    """A callback for ``transformers.Trainer`` that adds the penalty of a method to the loss that the model returns.

    The Trainer must take its loss from the model, as it does unless it is given ``compute_loss_func`` or label
    smoothing. Gradients may be accumulated.

    Parameters
    ----------
    method
        Such as :class:`~gossamer.activations.prosparse.ProSparse` or :class:`~gossamer.activations.deft.DEFT`.

    Returns
    -------
    transformers.TrainerCallback
        With the attribute ``training``, a :class:`PenalizedTraining`, which stays when training has ended.

    Examples
    --------
    >>> Trainer(model, arguments, callbacks=[penalty_callback(DEFT())])  # doctest: +SKIP
    """
    return _callback_class()(method)


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class PenaltyCallback(TrainerCallback):
        training: PenalizedTraining | None = None

        def __init__(self, method: PenalizedMethod):
            self.method = method
            self._handle: Any = None
            self._task_loss = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            if args.label_smoothing_factor:
                raise ConfigurationError(
                    "label smoothing makes the Trainer compute a loss of its own, which the penalty does not reach; "
                    "set label_smoothing_factor=0"
                )
            model = found["model"]
            self.training = self.method.attach(model)
            self.training.penalty.step = state.global_step
            self._handle = model.register_forward_hook(self._add(args.gradient_accumulation_steps), with_kwargs=True)

        def _add(self, accumulated: int) -> Any:
            def add(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
                if not module.training or not torch.is_grad_enabled() or self.training is None:
                    return None
                loss = getattr(output, "loss", None)
                if loss is None:
                    raise ConfigurationError("the model returns no loss to add the penalty to; give it labels")
                # a loss divided by the tokens of all accumulated batches is not divided by their number again
                share = accumulated if kwargs.get("num_items_in_batch") is not None else 1
                self._task_loss = float(loss.detach())
                output.loss = loss + self.training.loss() / share
                return output

            return add

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.training is not None:
                self.training.advance()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self.training is not None and self._task_loss:
                row = self.training.log(self._task_loss)
                if logs is not None:
                    logs |= {f"activation_{name}": value for name, value in row.items() if name != "step"}

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self._handle is not None:
                self._handle.remove()
                self._handle = None
            if self.training is not None:
                self.training.finish()

    return PenaltyCallback


class PenaltyMixin:
    """Adds a penalty where a Trainer computes its loss: ``class Mine(PenaltyMixin, Seq2SeqTrainer): ...``.

    For Trainers with a loss of their own, where :func:`penalty_callback` would not be heard. Set ``penalized`` to what
    ``attach`` of a method returns before training.
    """

    penalized: PenalizedTraining | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """The loss of the Trainer and, in training, the penalty."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)  # type: ignore[misc]
        if self.penalized is not None and model.training and torch.is_grad_enabled():
            whole = options.get("num_items_in_batch") is not None
            share = self.args.gradient_accumulation_steps if whole else 1  # type: ignore[attr-defined]
            loss = loss + self.penalized.loss() / share
        return (loss, outputs) if return_outputs else loss
