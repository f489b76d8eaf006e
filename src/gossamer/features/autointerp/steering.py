"""Changing one latent at the end of a text, just enough to change what comes next by a given amount."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.features.autointerp.generation import left_padded, sample
from gossamer.features.sae import SAE
from gossamer.features.splicing import Edit, edited
from gossamer.measure.windows import evaluation_mode, logits_of, model_device

Texts = Sequence[Sequence[int]]
_WEAKEST, _STRONGEST, _FIRST = -3.0, 4.0, 2.0  # log10 of a strength
_TOLERANCE = 0.1  # of the divergence that is aimed at


@dataclass(frozen=True)
class Tuned:
    """A strength and what it does.

    Attributes
    ----------
    strength
        What is added to the latent; None for an ablation.
    divergence
        Mean Kullback–Leibler divergence of the steered from the clean prediction that it achieves, in nats.
    tries
        Strengths that were tried.
    """

    strength: float | None
    divergence: float
    tries: int


class Steering:
    """One latent of an autoencoder in a model, to be made stronger or to be silenced at the end of texts.

    What the autoencoder does not explain stays as it is: to add c to a latent moves the activation by c times its
    direction, and to silence it takes away as much of the direction as there is.

    Parameters
    ----------
    model
        A causal language model of Hugging Face.
    site
        Name of the module, or number of the block, that the autoencoder is for.
    sae
        The autoencoder.
    latent
        Number of the latent.

    Raises
    ------
    UnknownNameError
        If there is no such latent.
    """

    def __init__(self, model: nn.Module, site: str | int, sae: SAE, latent: int):
        if not 0 <= latent < sae.n_features:
            raise UnknownNameError("latent", str(latent), [f"0 to {sae.n_features - 1}"])
        self.model, self.site, self.sae, self.latent = model, site, sae, latent
        self.direction = (sae.decoder[latent] / sae.scale).detach()

    def edit(self, strength: float | None) -> Edit:
        """Adds `strength` to the latent at the last token, and at each that is generated; None silences it."""

        def change(x: Tensor) -> Tensor:
            moved = x.clone()
            last = x[:, -1].to(self.direction)
            amount = torch.full((len(x), 1), strength) if strength is not None else -self._value(last)
            moved[:, -1] = (last + amount.to(last) * self.direction).to(x.dtype)
            return moved

        return change

    def _value(self, x: Tensor) -> Tensor:
        """The latent at activations ``(n, d)``, ``(n, 1)``."""
        codes = self.sae.encode(x)
        own = codes.indices == self.latent
        found = torch.zeros(len(x), 1, dtype=codes.values.dtype, device=codes.values.device)
        found[codes.row_of[own], 0] = codes.values[own].detach()
        return found

    def log_probabilities(self, texts: Texts, strength: float | None = 0.0) -> Tensor:
        """Of the token after each text, ``(texts, vocabulary)``."""
        ids, mask = left_padded(texts, model_device(self.model))
        places = (mask.cumsum(1) - 1).clamp_min(0)
        with evaluation_mode(self.model), edited(self.model, self.site, self.edit(strength)):
            read = self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
            return logits_of(read)[:, -1].float().log_softmax(-1)

    def continued(self, texts: Texts, strength: float | None, tokens: int, seed: int) -> list[list[int]]:
        """Each text continued; the same seed draws the same numbers whatever the strength."""
        generator = torch.Generator().manual_seed(seed)
        with edited(self.model, self.site, self.edit(strength)):
            return sample(self.model, texts, tokens, 1.0, generator)

    def promoted(self, texts: Texts, strength: float | None, count: int = 5) -> list[list[tuple[int, float]]]:
        """The tokens whose probability behind each text rises most, and by how much."""
        gain = self.log_probabilities(texts, strength).exp() - self.log_probabilities(texts).exp()
        found = gain.topk(count, 1)
        return [list(zip(t, g)) for t, g in zip(found.indices.tolist(), found.values.tolist())]

    def divergence(self, clean: Tensor, texts: Texts, strength: float | None) -> float:
        """Mean divergence of the steered from clean log-probabilities ``(texts, vocabulary)``, in nats."""
        steered = self.log_probabilities(texts, strength)
        return max(float((clean.exp() * (clean - steered)).sum(1).mean()), 0.0)

    def tuned(self, texts: Texts, target: float = 0.5, tries: int = 10) -> Tuned:
        """Look for the strength whose divergence is `target`, between 1/1000 and 10,000.

        The divergence grows with the square of small strengths, which makes every other guess; in between the interval
        is halved. It need not grow everywhere, so the search ends after some tries with the closest.

        Raises
        ------
        ConfigurationError
            If the target or the number of tries is not positive.
        """
        if not target > 0 or tries < 1:
            raise ConfigurationError(f"target is {target} and tries {tries}; both must be positive")
        clean = self.log_probabilities(texts)

        def far(tuned: Tuned) -> float:
            return math.log10(target / max(tuned.divergence, 1e-12))

        low, high, at = _WEAKEST, _STRONGEST, _FIRST
        best: Tuned | None = None
        for number in range(1, tries + 1):
            found = Tuned(10**at, self.divergence(clean, texts, 10**at), number)
            best = found if best is None or abs(far(found)) < abs(far(best)) else best
            if abs(found.divergence - target) <= _TOLERANCE * target:
                break
            low, high = (low, at) if found.divergence > target else (at, high)
            guess = math.log10(best.strength) + far(best) / 2
            at = guess if number % 2 and low < guess < high else (low + high) / 2
        return Tuned(best.strength, best.divergence, number)

    def silenced(self, texts: Texts) -> Tuned:
        """What it does to silence the latent."""
        return Tuned(None, self.divergence(self.log_probabilities(texts), texts, None), 1)
