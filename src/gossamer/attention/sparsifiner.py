"""Sparsifiner: a vision transformer that guesses its attention cheaply and computes only the links that matter.

Most links of a trained vision transformer carry nothing, but which ones do changes with the image. A low-rank guess
of the map, too coarse to be attention itself, is good enough to rank the keys of every query; a quarter of the links
is kept, anywhere in the image. The guess first learns to reconstruct the map of the dense model, then the model
learns to work with the links that are left, with its dense self as the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.attention.connectivity_predictor import ConnectivityPredictor
from gossamer.attention.installed_sparsifiner import InstalledSparsifiner, Phase
from gossamer.attention.link_attention import link_count
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError


@register(
    "sparsifiner",
    paper="sparsifiner",
    when="fine-tuning",
    granularity="tokens",
    timing="fine-tuning",
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("learned",),
    allocation="uniform",
    patterns=("unstructured",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class Sparsifiner:
    """Learned links for the attention of a vision transformer [Wei et al., 2023, CVPR, arXiv 2303.13755].

    Parameters
    ----------
    keep_rate
        Share of the keys that every query reads: ``⌈keep_rate · N⌉``; 1 is dense attention.
    token_keep_rate
        Share of the patches that each of `token_layers` passes on, of those that it would get if all had.
    token_layers
        Blocks, counted from 0, behind which patches that the class token attends to least are dropped for good.
    link_threshold
        In place of `keep_rate`: links whose guess is above this are read, such as 1e-4, as many as that may be.
    reduce_n, reduce_c, coef_topk, coef_threshold, basis_threshold, scale
        Of the :class:`~gossamer.attention.connectivity_predictor.ConnectivityPredictor`.
    prefix
        Tokens before the patches, of which the first is the class token; they read everything.
    reconstruction_weight
        Of the squared distance between guess and map.
    label_weight, logit_weight, token_weight
        Of cross-entropy, of the teacher's logits, and of the teacher's last tokens.

    Raises
    ------
    ConfigurationError
        If a number is out of range, or a layer is named twice.
    """

    keep_rate: float = 0.25
    token_keep_rate: float = 1.0
    token_layers: tuple[int, ...] = ()
    link_threshold: float | None = None
    reduce_n: int = 6
    reduce_c: int = 2
    coef_topk: int = 8
    coef_threshold: float | None = None
    basis_threshold: float = 0.02
    scale: float | None = None
    prefix: int = 1
    reconstruction_weight: float = 0.01
    label_weight: float = 1.0
    logit_weight: float = 0.5
    token_weight: float = 0.5

    def __post_init__(self) -> None:
        self.token_layers = tuple(self.token_layers)
        link_count(self.keep_rate, 1)
        if not 0 < self.token_keep_rate <= 1:
            raise ConfigurationError(f"token_keep_rate is {self.token_keep_rate!r}; it must be a share in (0, 1]")
        if len(set(self.token_layers)) < len(self.token_layers):
            raise ConfigurationError(f"token_layers is {self.token_layers}; name every block once")
        if self.coef_topk < 1 or self.reduce_n < 1 or self.reduce_c < 1 or not self.basis_threshold >= 0:
            raise ConfigurationError(
                f"coef_topk is {self.coef_topk}, reduce_n {self.reduce_n}, reduce_c {self.reduce_c}, basis_threshold "
                f"{self.basis_threshold}; the first three must be at least 1, the last at least 0"
            )
        if self.prefix < 1:
            raise ConfigurationError(f"prefix is {self.prefix}; there must be a class token, so at least 1")

    def predictor(self, head_dim: int, num_tokens: int) -> ConnectivityPredictor:
        """A fresh predictor for one layer."""
        return ConnectivityPredictor(
            head_dim,
            num_tokens,
            self.reduce_n,
            self.reduce_c,
            self.coef_topk,
            self.basis_threshold,
            self.scale,
            self.prefix,
            coef_threshold=self.coef_threshold,
        )

    def install(self, vit: nn.Module, num_tokens: int | None = None) -> InstalledSparsifiner:
        """Put predictors into the attention layers of a vision transformer, in the phase ``reconstruct``.

        Parameters
        ----------
        vit
            A trained classifier of images: Hugging Face's, timm's, or any whose blocks call torch's
            ``scaled_dot_product_attention``. A frozen copy becomes the teacher.
        num_tokens
            Tokens of an image with the prefix; None reads it off the table of positions.

        Raises
        ------
        TargetError, ModelError
            If there are no blocks with attention, or the number of tokens cannot be told.
        ConfigurationError
            If a layer does not exist, or the model has a Sparsifiner already.

        Examples
        --------
        >>> installed = Sparsifiner(keep_rate=0.25).install(vit)  # doctest: +SKIP
        >>> train(installed, batches, RECONSTRUCT, steps_per_epoch=100)  # doctest: +SKIP
        >>> train(installed, batches, DISTILL, steps_per_epoch=100)  # doctest: +SKIP
        """
        return InstalledSparsifiner(vit, self, num_tokens)

    def reconstruction_loss(self, approx: list[Tensor], attention: list[Tensor]) -> Tensor:
        """``weight · mean over layers of Σ (guess − attention)²``, summed over images, heads and entries.

        Parameters
        ----------
        approx
            Of every layer, ``(batch, heads, rows, tokens)``.
        attention
            The teacher's, with the rows of the prefix: ``(batch, heads, tokens, tokens)``.
        """
        parts = [(a - t[:, :, self.prefix :]).square().sum() for a, t in zip(approx, attention, strict=True)]
        return self.reconstruction_weight * torch.stack(parts).mean()

    def distillation_loss(
        self, logits: Tensor, teacher_logits: Tensor, target: Tensor, tokens: Tensor, teacher_tokens: Tensor
    ) -> Tensor:
        """Cross-entropy, divergence from the teacher's logits, and distance to its last patch tokens.

        ``KL`` is Σ p_teacher (log p_teacher − log p_student), a mean over images; tokens are those that survive.
        """
        entropy = nn.functional.cross_entropy(logits, target)
        ours, theirs = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        divergence = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        distance = nn.functional.mse_loss(tokens, teacher_tokens)
        return self.label_weight * entropy + self.logit_weight * divergence + self.token_weight * distance


@dataclass(frozen=True)
class TrainingPhase:
    """One of the two parts of training: a linear warm-up, then half a cosine.

    Attributes
    ----------
    name
        Of the phase.
    epochs, warmup_epochs
        How long it takes, and how much of it the learning rate rises from 0.
    learning_rate, final_learning_rate
        At the end of the warm-up, and at the end.
    weight_decay
        Of AdamW.
    """

    name: Phase
    epochs: float
    warmup_epochs: float
    learning_rate: float
    final_learning_rate: float
    weight_decay: float = 0.05

    def rate(self, epoch: float) -> float:
        """Learning rate after so many epochs."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        share = min(1.0, (epoch - self.warmup_epochs) / max(1e-12, self.epochs - self.warmup_epochs))
        fall = (self.learning_rate - self.final_learning_rate) * (1 + math.cos(math.pi * share)) / 2
        return self.final_learning_rate + fall


RECONSTRUCT = TrainingPhase("reconstruct", 5, 3, 3e-4, 2e-4)
"""The paper's first phase, at its batch of 168 images."""
DISTILL = TrainingPhase("distill", 45, 3, 8e-5, 2e-6)
"""The paper's second phase."""


def train(
    installed: InstalledSparsifiner,
    batches: Iterable[tuple[Tensor, Tensor]],
    phase: TrainingPhase,
    steps_per_epoch: int,
) -> list[float]:
    """Train an installed Sparsifiner through one phase; the model is left in evaluation mode.

    Parameters
    ----------
    installed
        What :meth:`Sparsifiner.install` returned.
    batches
        Images and classes; as many are used as the phase has steps.
    phase
        :data:`RECONSTRUCT`, :data:`DISTILL`, or one of your own.
    steps_per_epoch
        Batches of an epoch.

    Returns
    -------
    list of float
        The loss of every step.

    Raises
    ------
    CalibrationError
        If there are too few batches.
    """
    installed.phase(phase.name)
    optimizer = torch.optim.AdamW(installed.parameter_groups(phase.weight_decay), lr=0.0)
    steps, losses = math.ceil(phase.epochs * steps_per_epoch), []
    installed.model.train()
    for step, (images, target) in zip(range(steps), batches):
        for group in optimizer.param_groups:
            group["lr"] = phase.rate((step + 1) / steps_per_epoch)
        optimizer.zero_grad()
        loss = installed.loss(installed.model(images), installed.teacher(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    installed.model.eval()
    if len(losses) < steps:
        raise CalibrationError(f"{phase.name} takes {steps} batches, but only {len(losses)} came; give more")
    return losses
