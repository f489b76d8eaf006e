"""ProSparse: replace the activation by ReLU, then press on it ever harder, in stages that leave time to settle.

A language model with a smooth gate has no zeros. With ReLU in the place of the gate it has some, after a little more
training many, and few more than that. A penalty on the sum of the activations makes more; but one that starts at full
strength tears at what the model has learned. So its weight rises along pieces of a sine, pausing between them, and at
the end the threshold of ReLU is moved up a little, since what is barely above zero hardly matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from gossamer.activations.penalized_training import PenalizedTraining
from gossamer.core.penalties import ActivationPenalty, Reduction
from gossamer.core.registry import register
from gossamer.core.schedules import SineStages
from gossamer.errors import ConfigurationError
from gossamer.models.activation_functions import FATReLU, ShiftedReLU, Swap, relufy, swap_activations
from gossamer.models.feedforward_taps import feed_forward_activations, feed_forward_taps

Start = Literal["relu", "shifted-relu", "keep"]
_RELUS = (nn.ReLU, FATReLU)


@dataclass(frozen=True)
class Recipe:
    """How the authors trained one model.

    Attributes
    ----------
    stages
        Weight of the penalty; before its beginning is the training that only gets used to ReLU.
    learning_rate
        Its peak; lowered along a cosine.
    context
        Tokens of a sequence; None where the paper does not say.
    threshold
        t of FATReLU, set in the end.
    decay_until
        Step up to which training went on at the last weight while the rate was lowered; None without that phase.
    fine_tuning_weight, fine_tuning_until
        Weight while instructions were learned, lower than the last one but not zero, for else the zeros go again; and
        its last step.
    """

    stages: SineStages
    learning_rate: float | None
    context: int | None
    threshold: float = 0.01
    decay_until: int | None = None
    fine_tuning_weight: float | None = None
    fine_tuning_until: int | None = None

    def weight(self, step: int) -> float:
        """The weight at a step, the last phases counted in."""
        if self.fine_tuning_weight is not None and self.decay_until is not None and step > self.decay_until:
            return self.fine_tuning_weight
        return self.stages(step)


RECIPES: dict[str, Recipe] = {
    "llama2-7b": Recipe(
        SineStages((5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (6_000, 10_000, 12_000, 16_000, 16_500), begin=5_000), 3e-5, 4096
    ),
    "llama2-13b": Recipe(
        SineStages((5e-3, 1e-2, 1e-2, 2e-2, 2e-2), (6_750, 10_750, 11_000, 15_000, 16_000), begin=5_500), 5e-5, 4096
    ),
    "minicpm-1b": Recipe(
        SineStages((1e-3, 5e-3, 5e-3, 5e-2), (15_000, 20_000, 25_000, 35_000), begin=10_000),
        None,
        None,
        decay_until=95_000,
        fine_tuning_weight=1e-2,
        fine_tuning_until=101_000,
    ),
}
"""The published runs: arXiv 2402.13516, table of stages in the appendix."""


class ProSparseTraining(PenalizedTraining):
    """A model in training under ProSparse; see :class:`PenalizedTraining` for the loop.

    Attributes
    ----------
    swap
        What took the place of the activations; None if they were kept.
    shifted
        The second exchange, once :meth:`finish` has raised the threshold.
    """

    swap: Swap | None = None
    shifted: Swap | None = None
    threshold: float = 0.0

    def finish(self) -> None:
        """End the penalty, and raise the threshold of ReLU."""
        super().finish()
        if self.threshold > 0 and self.shifted is None:
            self.shifted = shift_threshold(self.model, self.threshold)

    def undo(self) -> None:
        """Put back the activations that the model came with; its weights stay as they are trained."""
        super().finish()
        for swap in (self.shifted, self.swap):
            if swap is not None:
                swap.undo()
        self.swap = self.shifted = None


@register(
    "prosparse",
    paper="prosparse",
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
class ProSparse:
    """Train on with ReLU and an L1 penalty that rises in sine-shaped stages, then shift the threshold of ReLU.

    Song et al., 2024, "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language
    Models", arXiv 2402.13516: ``L = L_lm + λ(t) Σ_layers ‖x₁‖₁`` with x₁ what goes into the last matrix of a
    feed-forward layer.

    Parameters
    ----------
    stages
        λ by the step: :class:`~gossamer.core.schedules.SineStages`, or any function. By default that of LLaMA2-7B.
    activation
        ``relu`` or ``shifted-relu`` takes the place of every activation; ``keep`` leaves them, for a model that has
        been trained with ReLU before.
    threshold
        t of FATReLU, set when training ends; the authors tried 0.005 to 0.03. 0 leaves what is there, as it has to for
        activations other than ReLU.
    reduction
        What λ multiplies; see :class:`~gossamer.core.penalties.ActivationPenalty`. The paper prints the sum and does
        not say over how many tokens and neurons it is averaged; with ``mean`` the weight means the same for any
        width and depth. Watch the ratio that :meth:`PenalizedTraining.log` gives.
    penalty
        Kind; ``l1`` is the paper's.
    """

    stages: Callable[[int], float] = RECIPES["llama2-7b"].stages
    activation: Start = "relu"
    threshold: float = 0.01
    reduction: Reduction = "mean"
    penalty: str = "l1"

    def __post_init__(self) -> None:
        if self.activation not in get_args(Start):
            raise ConfigurationError(f"activation is {self.activation!r}; use one of {', '.join(get_args(Start))}")
        if not self.threshold >= 0:
            raise ConfigurationError(f"threshold is {self.threshold}; it must be at least 0, such as 0.01")

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ProSparseTraining:
        """Exchange the activations and start to penalise; see :class:`PenalizedTraining`.

        Raises
        ------
        TargetError
            If the model has no feed-forward layer whose activation is a module.
        ConfigurationError
            If there will be no ReLU whose threshold could be raised when training ends.
        """
        self._check_threshold(model)
        swap = None if self.activation == "keep" else relufy(model, self.activation)
        taps = feed_forward_taps(model)
        penalty = ActivationPenalty(model, taps, self.penalty, weight=self.stages, reduction=self.reduction)
        run = ProSparseTraining(model, penalty, optimizer)
        run.swap, run.threshold = swap, self.threshold
        return run

    def _check_threshold(self, model: nn.Module) -> None:
        if self.threshold == 0 or self.activation == "relu":
            return
        there = {ShiftedReLU} if self.activation == "shifted-relu" else _activation_kinds(model)
        if not any(issubclass(kind, _RELUS) for kind in there):
            names = ", ".join(sorted(kind.__name__ for kind in there))
            raise ConfigurationError(
                f"threshold is {self.threshold}, which makes ReLU to FATReLU when training ends, but with "
                f"activation={self.activation!r} there is only {names}; use threshold=0, or activation='relu'"
            )


def shift_threshold(model: nn.Module, threshold: float = 0.01) -> Swap:
    """Replace ReLU by FATReLU in the feed-forward layers of a trained model.

    Parameters
    ----------
    model
        Changed in place.
    threshold
        t.

    Raises
    ------
    TargetError
        If no feed-forward layer has a ReLU.
    """
    swap = swap_activations(model, _RELUS, lambda: FATReLU(threshold))
    swap.note_in_config("relu", exact=False)
    return swap


def _activation_kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(place.module) for place in feed_forward_activations(model)}
