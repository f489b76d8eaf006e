"""DEFT: let the few parameters of parameter-efficient fine-tuning also learn to switch neurons off.

Fine-tuning with adapters or low-rank updates leaves the base model as it is, and with it the share of its neurons
that a token needs. But the updates change what flows into every feed-forward layer. A smooth count of non-zero
activations in the loss therefore reaches them through the residual stream, and the frozen neurons fall silent.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from gossamer.activations.penalized_training import PenalizedTraining
from gossamer.core.penalties import PENALTIES, ActivationPenalty, Factor
from gossamer.core.registry import register
from gossamer.core.taps import Tap
from gossamer.errors import ConfigurationError, TargetError, UnknownNameError
from gossamer.models.feedforward_taps import block_activations, feed_forward_taps, has_packed_matrices

Sites = Literal["activation", "middle", "auto"]


class DensityLoss(ActivationPenalty):
    """``α · mean_l mean_(b,t,j) A² / (A² + ε)`` over the feed-forward layers l of a model, padding left out.

    Runwal et al., 2024, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
    Transformers", arXiv 2402.01911, eq. 3. In a model with encoder and decoder it is the mean over the layers of one
    plus the mean over those of the other.

    Parameters
    ----------
    model
        The one that is trained, wrapped by PEFT or not.
    sites
        ``activation``: outputs of the activation functions, as in the authors' code. ``middle``: what goes into the
        last matrix of each layer, which is what a kernel could skip; the same where there is no gate. ``auto``: the
        first, or the second where a model's activations are no modules; where matrices are packed, as in a base of
        4 bits, the activation functions of its blocks by their class. Or taps of one's own.
    weight
        α.
    eps
        ε, or a schedule of it; the authors take 1e-7, whose slope is next to nothing for all that is above 1e-3.
    kind
        Of the penalty; ``l0`` is the paper's.

    Raises
    ------
    TargetError
        If no place matches.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites | Iterable[Tap] = "auto",
        *,
        weight: Factor = 1.0,
        eps: Factor = 1e-7,
        kind: str = "l0",
    ) -> None:
        taps = density_taps(model, sites) if isinstance(sites, str) else list(sites)
        super().__init__(model, taps, kind, weight=weight, eps=eps, reduction="mean")


def density_taps(model: nn.Module, sites: Sites = "auto") -> list[Tap]:
    """Where the activations of a model are counted; see :class:`DensityLoss`.

    Raises
    ------
    UnknownNameError
        If there is no such place.
    TargetError
        If the model has no feed-forward layer, or no module at the place.
    """
    if sites not in get_args(Sites):
        raise UnknownNameError("place", str(sites), get_args(Sites))
    if sites != "auto":
        return feed_forward_taps(model, sites)
    if not has_packed_matrices(model):
        for look in (partial(feed_forward_taps, place="activation"), feed_forward_taps):
            with suppress(TargetError):
                return look(model)
    return block_activations(model)  # of a base in 4 bits no more can be told


@register(
    "deft",
    paper="deft",
    when="fine-tuning",
    granularity="activations",
    needs_data=False,
    timing="fine-tuning",
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("learned", "activation"),
    allocation="measured",
    patterns=("channels",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class DEFT:
    """Fine-tune with a smooth count of the non-zero activations in the loss.

    The count is :class:`DensityLoss` of Runwal et al., 2024, arXiv 2402.01911. What trains is up to the model:
    :func:`gossamer.activations.efficient_modules.efficient` makes adapters, LoRA, QLoRA, prefixes and prompts. For a
    loop of one's own see :class:`~gossamer.activations.penalized_training.PenalizedTraining`, for a Trainer
    :func:`~gossamer.activations.penalized_training.penalty_callback`.

    Parameters
    ----------
    weight
        α.
    eps
        ε, or a schedule of it, such as ``Exponential(final=1e-7, end=1000, initial=1e-2)``.
    sites
        See :class:`DensityLoss`.
    penalty
        ``l0``, or ``l1``, ``hoyer``, ``tanh`` to compare with.
    """

    weight: Factor = 1.0
    eps: Factor = 1e-7
    sites: Sites = "auto"
    penalty: str = "l0"

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UnknownNameError("penalty", self.penalty, PENALTIES)
        if self.sites not in get_args(Sites):
            raise UnknownNameError("place", str(self.sites), get_args(Sites))

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> PenalizedTraining:
        """Start to penalise.

        Raises
        ------
        TargetError
            If the model has no feed-forward layer.
        """
        loss = DensityLoss(model, self.sites, weight=self.weight, eps=self.eps, kind=self.penalty)
        return PenalizedTraining(model, loss, optimizer)


def density_change(without: float, with_loss: float) -> float:
    """``100 (D_PEFT − D_DEFT) / D_PEFT``: percent by which the density fell.

    Raises
    ------
    ConfigurationError
        If a density is outside [0, 1], or the first is zero.
    """
    if not (0 < without <= 1 and 0 <= with_loss <= 1):
        raise ConfigurationError(f"densities are {without} and {with_loss}; both lie in [0, 1], and the first is not 0")
    return 100 * (without - with_loss) / without


def training_defaults(folder: str, **changes: Any) -> Any:
    """The authors' settings for GLUE as arguments of ``transformers.Trainer``, with changes.

    AdamW at 3e-4, warmed up for 6 % of the steps and lowered along a line, 10 epochs of batches of 64; sequences are
    cut at 128 tokens by whoever makes them.
    """
    from transformers import TrainingArguments

    usual = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,  # below 1: a share of all steps
        "per_device_train_batch_size": 64,
        "num_train_epochs": 10,
        "report_to": [],
    }
    return TrainingArguments(folder, **{**usual, **changes})
