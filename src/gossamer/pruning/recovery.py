"""Recovery: a little training after pruning, in which the zeros stay zero.

Either all weights are trained and the masks are put back after every step, or low-rank updates that have the zeros of
the masks are trained and merged at the end (:mod:`gossamer.pruning.low_rank`, through the library ``peft``). CFSP
gives the blocks that matter more a larger rank at the same total: :func:`gossamer.pruning.low_rank.rank_plan`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.progress import track
from gossamer.errors import (
    CalibrationError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    TargetError,
)
from gossamer.models.blocks import Batch, run_batch
from gossamer.models.offload import is_offloaded
from gossamer.pruning.low_rank import low_rank_updates, rank_plan, ranks_of

__all__ = ["RecoveryResult", "next_token_loss", "rank_plan", "recover"]

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class RecoveryResult:
    """What a recovery did; the model itself was changed in place.

    Attributes
    ----------
    losses
        Mean loss of every step.
    trained
        Number of weights that were trained (of the low-rank factors, where those were).
    ranks
        Module name → rank of its update; empty if all weights were trained.
    seconds
        It took.
    settings
        Everything needed to repeat it.
    """

    losses: list[float]
    trained: int
    ranks: dict[str, int]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


def recover(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    masks: MaskSet | None = None,
    lora_rank: int | Mapping[str, int] | None = None,
    lora_scale: float = 2.0,
    steps: int = 200,
    learning_rate: float | None = None,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    max_gradient_norm: float = 1.0,
    include: Sequence[str] = ("*",),
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RecoveryResult:
    """Train a pruned model a little, in place, without bringing back what was pruned.

    AdamW; the learning rate rises linearly and then falls linearly to zero. Training all weights is done in float32,
    whatever the model's dtype, and rounded back at the end; the low-rank factors are float32 as well.

    Parameters
    ----------
    model
        A Hugging Face or plain module, wholly in memory.
    batches
        Token ids ``(batch, length)``, or whatever else the model and the loss take. They are gone through in a random
        order, as often as needed.
    masks
        What must stay zero. It is zeroed before the first step. Masks of a channel pruning that changed the shapes
        are not needed: what is gone cannot come back.
    lora_rank
        None trains all weights that require a gradient. Otherwise the rank of a low-rank update of each linear layer:
        one number, or module name or block name → rank (the longest name counts; layers without any are left alone).
    lora_scale
        Factor s of the low-rank update (alpha / rank), the same for every rank.
    steps
        Optimizer steps.
    learning_rate
        At its peak; by default 2e-4 for low-rank updates and 2e-5 for all weights.
    warmup
        Share of the steps in which the learning rate rises.
    weight_decay, max_gradient_norm
        Of AdamW, and of clipping.
    accumulate
        Batches for each step.
    include
        Globs on the names of the modules that get a low-rank update.
    loss
        ``loss(model, batch)`` → scalar; by default the model's own loss if the batch has labels, else that of
        predicting each next token.
    seed
        Of the order, the factors and dropout. The global generators are left as they were.
    progress
        Whether to show a bar.

    Raises
    ------
    NonFiniteError
        If the loss or its gradient becomes NaN or infinite. Low-rank updates are then taken off again; if all weights
        were trained, those of the last finite step stay.
    MissingDependencyError
        If low-rank updates are asked for and ``peft`` is not installed.
    """
    started = time.perf_counter()
    settings = {
        "lora_rank": lora_rank if lora_rank is None or isinstance(lora_rank, int) else dict(lora_rank),
        "lora_scale": lora_scale,
        "steps": steps,
        "learning_rate": learning_rate or (2e-5 if lora_rank is None else 2e-4),
        "warmup": warmup,
        "weight_decay": weight_decay,
        "accumulate": accumulate,
        "max_gradient_norm": max_gradient_norm,
        "include": list(include),
        "seed": seed,
    }
    _check(model, settings)
    batches = list(batches)
    if not batches:
        raise CalibrationError("there is nothing to train on: at least one batch is needed")
    if masks is not None:
        masks.apply_(model)
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    ranks = {} if lora_rank is None else ranks_of(model, lora_rank, include)
    with torch.random.fork_rng(devices), _as_before(model):
        torch.manual_seed(seed)
        adapted = _all_weights(model, masks) if lora_rank is None else _factors(model, ranks, masks, lora_scale)
        model.train()
        with adapted as (parameters, after_step):
            trained = sum(parameter.numel() for parameter in parameters)
            walk = _Training(model, loss or next_token_loss, parameters, after_step, settings)
            losses = walk.run(batches, progress)
    return RecoveryResult(losses, trained, ranks, time.perf_counter() - started, settings)


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss if the batch has labels; else the mean cross-entropy of each next token, padding left out.

    Raises
    ------
    CalibrationError
        If there is no next token to predict.
    """
    output = run_batch(model, batch, next(model.parameters()).device)
    if isinstance(batch, Mapping) and "labels" in batch:
        return output.loss
    logits = output if isinstance(output, Tensor) else output.logits
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch
    if not isinstance(tokens, Tensor) or tokens.shape[-1] < 2:
        raise CalibrationError("a batch holds no next token to predict: pass token ids (batch, length ≥ 2) or a loss")
    labels = tokens.to(logits.device)[:, 1:]
    if isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
        labels = labels.masked_fill(batch["attention_mask"].to(logits.device)[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


def _check(model: nn.Module, settings: Mapping[str, Any]) -> None:
    for name, low in (("steps", 1), ("accumulate", 1)):
        if not isinstance(settings[name], int) or settings[name] < low:
            raise ConfigurationError(f"{name} is {settings[name]!r}; it must be an integer of at least {low}")
    for name in ("learning_rate", "max_gradient_norm", "lora_scale"):
        if not (math.isfinite(settings[name]) and settings[name] > 0):
            raise ConfigurationError(f"{name} is {settings[name]}; it must be finite and positive")
    if not 0 <= settings["warmup"] <= 1:
        raise ConfigurationError(f"warmup is {settings['warmup']}; it must be a share of the steps in [0, 1]")
    if is_offloaded(model):
        raise ModelError("recovery trains models that are wholly in memory; load this one without offloading")


@dataclass
class _Training:
    """The loop itself."""

    model: nn.Module
    loss: Loss
    parameters: list[nn.Parameter]
    after_step: Callable[[], None]
    settings: Mapping[str, Any]

    def run(self, batches: list[Any], progress: bool) -> list[float]:
        """Take all the steps, and return the mean loss of each."""
        steps, accumulate = self.settings["steps"], self.settings["accumulate"]
        optimizer = torch.optim.AdamW(
            self.parameters, self.settings["learning_rate"], weight_decay=self.settings["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        order = _shuffled(batches, self.settings["seed"])
        losses = []
        for step in track(range(steps), "recovering", enabled=progress):
            total = 0.0
            for _ in range(accumulate):
                loss = self.loss(self.model, next(order)) / accumulate
                self.check(float(loss.detach()), "loss", step)
                loss.backward()
                total += float(loss.detach())
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings["max_gradient_norm"])
            self.check(float(norm), "norm of the gradient", step)
            optimizer.step()
            self.after_step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return losses

    def rate(self, step: int) -> float:
        """Share of the peak learning rate."""
        steps = self.settings["steps"]
        rising = max(1, round(self.settings["warmup"] * steps))
        return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))

    def check(self, value: float, what: str, step: int) -> None:
        """Raise :class:`NonFiniteError` for NaN and infinity."""
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} is {value} at step {step + 1} of recovery; "
                f"lower the learning rate ({self.settings['learning_rate']:g}) or check the data"
            )


def _shuffled(batches: list[Any], seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Give every module its mode, and every parameter its need of a gradient, back."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in needs:
            parameter.requires_grad = needed
            parameter.grad = None


_Adapted = tuple[list[nn.Parameter], Callable[[], None]]


@contextmanager
def _factors(model: nn.Module, ranks: Mapping[str, int], masks: MaskSet | None, scale: float) -> Iterator[_Adapted]:
    """Train low-rank factors, whose layers keep the zeros themselves."""
    with low_rank_updates(model, ranks, masks, scale) as factors:
        yield factors, lambda: None


@contextmanager
def _all_weights(model: nn.Module, masks: MaskSet | None) -> Iterator[_Adapted]:
    """Train everything in float32, because small steps vanish in half precision; zeros are put back after each."""
    held = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [tensor.dtype for tensor in held]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TargetError("no weight of the model requires a gradient: set requires_grad, or give lora_rank")
    for tensor in held:
        tensor.data = tensor.data.float()
    named = dict(model.named_parameters(remove_duplicate=False))
    gone = [(named[name], ~mask.to(named[name].device)) for name, mask in (masks or {}).items()]

    def put_zeros_back() -> None:
        for parameter, zeros in gone:
            parameter.data.masked_fill_(zeros, 0)

    try:
        yield trained, put_zeros_back
    finally:
        for tensor, dtype in zip(held, dtypes):
            tensor.data = tensor.data.to(dtype)
