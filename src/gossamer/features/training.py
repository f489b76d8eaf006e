"""Training sparse autoencoders: several at a time on the same activations, seeded and resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core.progress import track
from gossamer.core.ranks import average_, own_share, rank, ranks, summed, take_from_first_
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import JumpReLU
from gossamer.features.dictionary_adam import DictionaryAdam
from gossamer.features.losses import (
    attribution_penalty,
    auxiliary_loss,
    l1_penalty,
    nested_loss,
    reconstruction_loss,
    unexplained_variance,
)
from gossamer.features.resampling import resample_
from gossamer.features.sae import SAE, Explained
from gossamer.features.zipf import ZipfFit, fit_zipf, underuse
from gossamer.storage.atomic import atomic_file

Auxiliary = Literal["dead", "zipf", "none"]
_VERSION = 1
_FIT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How autoencoders are trained.

    Parameters
    ----------
    steps
        Batches.
    batch_size
        Activations of a batch.
    learning_rate
        Of Adam.
    warmup, cooldown
        Shares of the steps in which the rate rises from 0, and in the end falls.
    final_rate
        Share of the learning rate that it falls to.
    betas, clip
        Of Adam; and the norm that gradients are clipped at, if any.
    sparsity
        Weight of the penalty on values, of rules that need one: the ℓ1 norm for ReLU, the number of active features
        for JumpReLU. It rises during the first twentieth of the steps.
    attribution
        Whether the ℓ1 norm counts values times the change of the model's loss along their features, relative to the
        mean change, and not values alone; needs gradients.
    prefixes
        Numbers of features: the loss is then the mean over reconstructions from the first so many features alone,
        and from all; features come in order of importance.
    auxiliary
        What keeps features alive: a loss on those that are ``dead``, on those that fall below a law of ``zipf``, or
        ``none``.
    auxiliary_weight, auxiliary_k
        Its weight, and features of a token that take part; by default half of the size of an activation.
    dead_after
        Activations after which a feature that was active in none of them is dead.
    resample_every
        Steps after which dead features begin anew in the directions of badly explained activations; 0 for never. Not
        while the rate falls.
    memory
        Of the running densities.
    seed
        Of the order of the activations.
    """

    steps: int = 10_000
    batch_size: int = 4096
    learning_rate: float = 3e-4
    warmup: float = 0.01
    cooldown: float = 0.2
    final_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    sparsity: float = 0.0
    attribution: bool = False
    prefixes: tuple[int, ...] = ()
    auxiliary: Auxiliary = "dead"
    auxiliary_weight: float = 1 / 32
    auxiliary_k: int | None = None
    dead_after: int = 1_000_000
    resample_every: int = 0
    memory: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.dead_after < 1:
            raise ConfigurationError(
                f"steps is {self.steps}, batch_size {self.batch_size}, dead_after {self.dead_after}; all must be 1 or "
                "more"
            )
        if not self.learning_rate > 0 or self.sparsity < 0 or self.auxiliary_weight < 0:
            raise ConfigurationError(
                f"learning_rate is {self.learning_rate}, sparsity {self.sparsity}, auxiliary_weight "
                f"{self.auxiliary_weight}; the first must be above 0, the others at least 0"
            )
        if not 0 <= self.warmup + self.cooldown <= 1 or min(self.warmup, self.cooldown) < 0:
            raise ConfigurationError(f"warmup is {self.warmup} and cooldown {self.cooldown}; together at most 1")
        if not 0 <= self.final_rate <= 1 or (self.clip is not None and not self.clip > 0) or self.resample_every < 0:
            raise ConfigurationError(
                f"final_rate is {self.final_rate}, clip {self.clip}, resample_every {self.resample_every}; give a "
                "share, a norm above 0 or none, and at least 0"
            )
        if self.auxiliary not in ("dead", "zipf", "none"):
            raise ConfigurationError(f"auxiliary is {self.auxiliary!r}; it must be dead, zipf or none")

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        falling = min(1.0, (self.steps - step) / max(1.0, self.cooldown * self.steps))
        return min(rising, self.final_rate + (1 - self.final_rate) * falling)


@dataclass(eq=False)
class Learner:
    """One autoencoder with its optimiser and what is known of its features.

    Attributes
    ----------
    sae
        The autoencoder.
    density
        Running share of the activations in which each feature is active.
    silent
        Activations since each feature was last active, int64.
    history
        Step, loss, fraction of variance unexplained, mean number of active features, and number of dead ones.
    law
        That densities follow, fitted anew every fifty steps where it is asked for.
    """

    sae: SAE
    settings: TrainingSettings
    optimizer: torch.optim.Optimizer
    density: Tensor
    silent: Tensor
    history: list[dict[str, float]] = field(default_factory=list)
    law: ZipfFit | None = None

    @classmethod
    def of(cls, sae: SAE, settings: TrainingSettings) -> Learner:
        """Ready for the first step."""
        optimizer = DictionaryAdam(sae.parameters(), settings.learning_rate, settings.betas, [sae.decoder])
        blank = torch.zeros(sae.n_features, device=sae.decoder.device)
        return cls(sae, settings, optimizer, blank, blank.to(torch.int64))

    @property
    def dead(self) -> Tensor:
        """Features that have been silent for too long, bool."""
        return self.silent >= self.settings.dead_after

    def step(self, number: int, x: Tensor, gradient: Tensor | None = None) -> dict[str, float]:
        """Learn from a batch of activations ``(tokens, d_in)``; returns what is put into the history.

        Raises
        ------
        NonFiniteError
            If the loss is NaN or infinite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.rate(number)
        self.sae.train()
        explained = self.sae(x, gradient)
        # in units of the scaled activations, so that rates and weights mean the same for every model
        loss = self._reconstruction(x, explained) * self.sae.scale**2 / self.sae.d_in
        loss = loss + self._penalty(number, x, explained, gradient) + self._auxiliary(number, x, explained)
        mean = float(average_(loss.detach().clone()))
        if not math.isfinite(mean):
            raise NonFiniteError(f"the loss is {mean} at step {number}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._agree()
        if self.settings.clip is not None:
            self.sae.straighten_gradient_()
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.settings.clip)
        self.optimizer.step()
        noted = self._note(number, x, explained, mean)
        self._resample(number, x, explained)
        return noted

    @torch.no_grad()
    def _agree(self) -> None:
        """Gradients, and what a rule has learned from a batch, averaged over the processes."""
        if ranks() > 1:
            for parameter in self.sae.parameters():
                if parameter.grad is not None:
                    average_(parameter.grad)
            learned = list(self.sae.activation.buffers())
            for buffer in learned:
                if buffer.is_floating_point():
                    count = summed((~buffer.isnan()).to(buffer.dtype))  # what no process knows yet stays unknown
                    buffer.copy_(summed(buffer.nan_to_num(0.0)) / count)
            take_from_first_(learned)

    def _reconstruction(self, x: Tensor, explained: Explained) -> Tensor:
        if not self.settings.prefixes:
            return reconstruction_loss(explained.output, x)
        return nested_loss(self.sae, x, explained, self.settings.prefixes)

    def _resample(self, number: int, x: Tensor, explained: Explained) -> None:
        every, settings = self.settings.resample_every, self.settings
        if every and (number + 1) % every == 0 and number < settings.steps * (1 - settings.cooldown):
            dead = self.dead
            resample_(self.sae, dead, x, explained.output, self.optimizer, seed=settings.seed * 1_000_003 + number)
            self.silent[dead] = 0
            # each has drawn from its own activations
            memory = (part for state in self.optimizer.state.values() for part in state.values())
            take_from_first_((*self.sae.state_dict().values(), *memory))

    def _penalty(self, number: int, x: Tensor, explained: Explained, gradient: Tensor | None) -> Tensor | float:
        if not self.settings.sparsity:
            return 0.0
        weight = self.settings.sparsity * min(1.0, (number + 1) / max(1.0, 0.05 * self.settings.steps))
        rule = self.sae.activation
        if isinstance(rule, JumpReLU):
            return weight * rule.active(explained.before, explained.codes.indices).sum() / len(explained.codes)
        if self.settings.attribution:
            if gradient is None:
                raise ConfigurationError("attribution needs gradients; train on store.batches_with_gradients")
            return weight * attribution_penalty(explained.codes, self.sae.decoder, gradient.to(x.dtype))
        return weight * l1_penalty(explained.codes, self.sae.decoder)

    def _auxiliary(self, number: int, x: Tensor, explained: Explained) -> Tensor | float:
        settings = self.settings
        if settings.auxiliary == "none" or not settings.auxiliary_weight:
            return 0.0
        weight = self.dead.to(x.dtype)
        if settings.auxiliary == "zipf":
            if number % _FIT_EVERY == 0 and int((self.density > 0).sum()) >= 3:
                self.law = fit_zipf(self.density)
            if self.law is not None:
                weight = underuse(self.density, self.law).to(x.dtype)
        k = settings.auxiliary_k or max(1, self.sae.d_in // 2)
        return settings.auxiliary_weight * auxiliary_loss(self.sae, x, explained, weight, k)

    @torch.no_grad()
    def _note(self, number: int, x: Tensor, explained: Explained, loss: float) -> dict[str, float]:
        codes = explained.codes
        active = summed(torch.bincount(codes.indices[codes.values > 0], minlength=codes.width))
        tokens = len(x) * ranks()
        memory = self.settings.memory
        known = memory if number else 0.0
        self.density.mul_(known).add_(active.float() / tokens, alpha=1 - known)
        self.silent = torch.where(active > 0, 0, self.silent + tokens)
        unexplained = average_(torch.as_tensor(unexplained_variance(explained.output, x)).clone())
        return {
            "step": float(number),
            "loss": loss,
            "unexplained": float(unexplained),
            "active": float(active.sum()) / tokens,
            "dead": float(self.dead.sum()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "density": self.density,
            "silent": self.silent,
            "history": self.history,
            "law": None if self.law is None else asdict(self.law),
            "settings": asdict(self.settings),
            "made of": self.sae.settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises
        ------
        CheckpointError
            If it is of another autoencoder or other settings.
        """
        if state.get("made of") != self.sae.settings() or state.get("settings") != asdict(self.settings):
            raise CheckpointError("the checkpoint is of another autoencoder or other settings; begin in another place")
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.density, self.silent, self.history = state["density"].clone(), state["silent"].clone(), state["history"]
        self.law = None if state["law"] is None else ZipfFit(**state["law"])


Batches = Callable[[int], Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]]
"""``batches(begin)`` yields batches of activations from number `begin` on, or pairs of activations and gradients of the
model's loss, such as those of a store."""


def train(
    saes: Mapping[str, SAE],
    batches: Batches,
    settings: TrainingSettings | Mapping[str, TrainingSettings],
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
    log_every: int = 50,
    progress: bool = True,
) -> dict[str, Learner]:
    """Train autoencoders on the same batches.

    Under ``torchrun``, with ``torch.distributed`` initialised, every process reads the same batches and learns from its
    share of each; rules that look at a whole batch then look at this share.

    Parameters
    ----------
    saes
        Name → autoencoder, on the same size of activations; changed in place. :meth:`SAE.prepare` is called with the
        first batch.
    batches
        Where activations come from: ``lambda begin: store.batches(4096, seed, begin)``; for rules that look at
        gradients, ``store.batches_with_gradients``.
    settings
        For all, or for each by name; all with the same number of steps.
    checkpoint
        File in which the state is kept; a run that finds one goes on from there, and ends as it would have without
        the interruption.
    every, log_every
        Steps between checkpoints, and between entries of the history.
    progress
        Whether to show a progress bar.

    Returns
    -------
    dict
        Name → learner, with what is known of the features.

    Raises
    ------
    ConfigurationError
        If settings are missing or their steps differ.
    CheckpointError
        If the checkpoint is of other autoencoders, or damaged.
    NonFiniteError
        If an activation or a loss is NaN or infinite.
    """
    named = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(saes, settings)
    missing = next((name for name in saes if name not in named), None)
    if missing is not None or not saes:
        raise ConfigurationError(
            f"there are no settings for {missing!r}" if saes else "there is no autoencoder to train"
        )
    steps = {named[name].steps for name in saes}
    if len(steps) != 1:
        raise ConfigurationError(f"autoencoders on the same batches are trained for {sorted(steps)} steps; choose one")
    learners = {name: Learner.of(sae, named[name]) for name, sae in saes.items()}
    file = None if checkpoint is None else Path(checkpoint)
    begin = _resumed(file, learners) if file is not None and file.exists() else 0
    stream = batches(begin)
    for number in track(range(begin, steps.pop()), "training features", enabled=progress and rank() == 0):
        batch = next(stream)
        x, gradient = batch if isinstance(batch, tuple) else (batch, None)
        own, own_gradient = own_share(x), None if gradient is None else own_share(gradient)
        for learner in learners.values():
            if number == 0:
                learner.sae.prepare(x)
                take_from_first_(learner.sae.state_dict().values())
            noted = learner.step(number, own, own_gradient)
            if number % log_every == 0:
                learner.history.append(noted)
        if file is not None and (number + 1) % every == 0:
            _keep(file, number + 1, learners)
    for learner in learners.values():
        learner.sae.eval()
    return learners


def _keep(file: Path, done: int, learners: Mapping[str, Learner]) -> None:
    if rank() == 0:
        states = {name: learner.state_dict() for name, learner in learners.items()}
        with atomic_file(file) as part:
            torch.save({"version": _VERSION, "done": done, "learners": states}, part)
    if ranks() > 1:
        torch.distributed.barrier()


def _resumed(file: Path, learners: Mapping[str, Learner]) -> int:
    try:
        found = torch.load(file, weights_only=True)
        version, done, states = found["version"], int(found["done"]), found["learners"]
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{file} is no checkpoint of this training ({error}); delete it") from error
    if version != _VERSION:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads {_VERSION}; update gossamer")
    if set(states) != set(learners):
        raise CheckpointError(f"{file} holds {sorted(states)} instead of {sorted(learners)}; choose another file")
    for name, learner in learners.items():
        learner.load_state_dict(states[name])
    return done
