"""Gated autoencoders: whether a feature is active is decided apart from how much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.features.activation_rules import ActivationRule
from gossamer.features.sae import SAE, Explained
from gossamer.features.training import Learner, TrainingSettings


class Gated(ActivationRule):
    """A feature is active where its affinity is above zero; its value is another affine function of what it sees.

    Both look along the same direction: the gate is ``π = (x − b) · e + c > 0``, the value ``ReLU(exp(r) · π + s)`` with
    r and s learned for each feature, so that a penalty on gates does not shrink values [Rajamanoharan et al., 2024,
    arXiv 2404.16014, section 3.2; their bias of values is ``s + exp(r) · c``]. Trained by :class:`GatedLearner`.
    """

    log_gain: nn.Parameter
    shift: nn.Parameter

    def build(self, features: int) -> None:  # noqa: D102
        self.log_gain = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        return affinity > 0

    def values(self, before: Tensor, features: Tensor) -> Tensor:  # noqa: D102
        chosen = features.long()
        return (self.log_gain[chosen].exp() * before + self.shift[chosen]).relu()


class GatedLearner(Learner):
    """Learns a gated autoencoder: ``sparsity`` weighs the ℓ1 norm of what the gates see, ``ReLU(π)``.

    Gates get no gradient from the reconstruction, so a second one is made of ``ReLU(π)`` by the decoder, which does not
    learn from it.
    """

    def _penalty(self, number: int, x: Tensor, explained: Explained, gradient: Tensor | None) -> Tensor | float:
        sae = self.sae
        gates = torch.zeros(len(x), sae.n_features).index_put(
            (explained.codes.row_of, explained.codes.indices.long()), explained.before.relu()
        )
        guess = gates @ sae.decoder.detach() + sae.bias.detach()
        auxiliary = (guess - x * sae.scale).square().sum(1).mean() / sae.d_in
        rising = min(1.0, (number + 1) / max(1.0, 0.05 * self.settings.steps))
        return auxiliary + self.settings.sparsity * rising * gates.sum(1).mean()


def train_on_rows(sae: SAE, x: Tensor, settings: TrainingSettings, gradient: Tensor | None = None) -> Learner:
    """Train an autoencoder on activations that fit into memory, such as those of a task.

    Parameters
    ----------
    sae
        Changed in place; a gated one is trained as such.
    x
        Activations ``(n, d)``.
    settings
        ``batch_size`` may be larger than n.
    gradient
        Of the model's loss with respect to them, for rules and penalties that look at it.
    """
    kind = GatedLearner if isinstance(sae.activation, Gated) else Learner
    learner = kind.of(sae, settings)
    sae.prepare(x)
    for number, rows in zip(range(settings.steps), _batches(len(x), settings)):
        noted = learner.step(number, x[rows], None if gradient is None else gradient[rows])
        if number % 50 == 0:
            learner.history.append(noted)
    sae.eval()
    return learner


def _batches(rows: int, settings: TrainingSettings) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(rows, generator=generator)
        for start in range(0, max(1, rows - settings.batch_size + 1), settings.batch_size):
            yield order[start : start + settings.batch_size]
