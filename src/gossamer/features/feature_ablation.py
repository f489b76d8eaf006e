"""What single features do: each is taken out of an activation, and the rest of it, error included, stays.

In the task of indirect objects the features of the layers whose heads inhibit the subject tell which name came twice
and on which side of "and" it stood; without them the model no longer prefers the right name [Kissane et al., 2024,
arXiv 2406.17759, section 4.3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.heads import evaluating, last_logits
from gossamer.features.sae import SAE
from gossamer.features.splicing import Edit, edited


@dataclass(frozen=True, eq=False)
class FeatureEffects:
    """What ablating each feature at one position does to the difference of two logits.

    Attributes
    ----------
    features
        Those that are active at the position in some prompt, ``(features,)`` int64.
    values
        Their values, ``(prompts, features)``; 0 where one is not active.
    effects
        Change of the difference when a feature is taken out, ``(prompts, features)``.
    error
        Change when what the autoencoder leaves unexplained is taken out, ``(prompts,)``.
    random
        Change when as much as the feature holds is taken out along a random direction, ``(prompts, features)``.
    clean
        The difference itself, ``(prompts,)``.
    """

    features: Tensor
    values: Tensor
    effects: Tensor
    error: Tensor
    random: Tensor
    clean: Tensor

    def largest(self, count: int = 10) -> list[tuple[int, float]]:
        """Features of the largest mean effect by size, with that effect."""
        mean = self.effects.mean(0)
        order = mean.abs().argsort(descending=True)[:count]
        return [(int(self.features[place]), float(mean[place])) for place in order]

    def told_by(self, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How well each feature tells the values of variables apart: the share of its variance between them, η².

        Parameters
        ----------
        labels
            Variable → value for each prompt, ``(prompts,)`` int64.

        Returns
        -------
        dict
            Variable → ``(features,)``, from 0 to 1.
        """
        values = self.values.double()
        total = (values - values.mean(0)).square().sum(0)
        found = {}
        for name, label in labels.items():
            within = torch.zeros_like(total)
            for kind in label.unique():
                some = values[label == kind]
                within += (some - some.mean(0)).square().sum(0)
            found[name] = torch.where(total > 0, 1 - within / total.clamp(min=1e-300), 0)
        return found


@torch.no_grad()
def feature_effects(
    model: nn.Module,
    site: str,
    sae: SAE,
    prompts: Tensor,
    position: int,
    right: Tensor,
    wrong: Tensor,
    most: int | None = None,
    seed: int = 0,
) -> FeatureEffects:
    """Ablate every feature that is active at one position of prompts, one at a time.

    Parameters
    ----------
    model
        A causal language model.
    site
        Name of the module whose output is explained; for heads see :mod:`gossamer.models.head_outputs`.
    sae
        In evaluation mode.
    prompts
        Token ids of equal length, ``(prompts, length)``.
    position
        At which features are ablated, such as that of the repeated name.
    right, wrong
        Tokens whose logits are compared after the last token, ``(prompts,)`` or ``(prompts, 1)``.
    most
        Features that are ablated at most, those of the largest sums of values; None for all.
    seed
        Of random directions.

    Raises
    ------
    ConfigurationError
        If the position lies outside the prompts.
    CalibrationError
        If there is no prompt, or no feature is active there.
    """
    if prompts.dim() != 2 or not len(prompts):
        raise CalibrationError(f"prompts are {tuple(prompts.shape)}; give one or more of equal length")
    if not -prompts.shape[1] <= position < prompts.shape[1]:
        raise ConfigurationError(f"position is {position}; prompts have {prompts.shape[1]} tokens")
    kept: list[Tensor] = []

    def difference(delta: Tensor | None) -> Tensor:
        def edit(x: Tensor) -> Tensor:
            kept.append(x[:, position])
            if delta is None:
                return x
            x = x.clone()
            x[:, position] -= delta.to(x.dtype)
            return x

        with edited(model, site, edit):
            logits = last_logits(model, prompts)
        found: Tensor = logits.gather(1, right.reshape(-1, 1)) - logits.gather(1, wrong.reshape(-1, 1))
        return found[:, 0]

    with evaluating(model):
        clean = difference(None)
        x = kept[0]
        codes = sae.encode(x)
        dense = codes.to_dense()
        order = dense.sum(0).argsort(descending=True)
        features = order[: int((dense.sum(0) > 0).sum())][:most]
        if not len(features):
            raise CalibrationError(f"no feature is active at position {position} of these prompts")
        generator = generator_for("random directions", seed)
        effects, noise = [], []
        for feature in features.tolist():
            direction = sae.decoder[feature] / sae.scale
            effects.append(difference(dense[:, feature, None] * direction) - clean)
            other = torch.randn(len(direction), generator=generator)
            noise.append(difference(dense[:, feature, None] * other * (direction.norm() / other.norm())) - clean)
        error = difference(x - sae.decode(codes)) - clean
    return FeatureEffects(features, dense[:, features], torch.stack(effects, 1), error, torch.stack(noise, 1), clean)


@torch.no_grad()
def patched_effect(
    model: nn.Module,
    sites: Sequence[str],
    prompts: Tensor,
    corrupted: Tensor,
    position: int,
    right: Tensor,
    wrong: Tensor,
) -> Tensor:
    """Change of the difference of two logits when some modules say at one position what they say on other prompts.

    With " and" replaced by " alongside" in the other prompts, the heads that inhibit the subject no longer know on
    which side of it a name stood, and the difference falls as if they were ablated.

    Parameters
    ----------
    model, position, right, wrong
        As in :func:`feature_effects`.
    sites
        Names of modules, such as those of all layers whose heads inhibit the subject.
    prompts, corrupted
        Token ids of equal length, ``(prompts, length)`` both.

    Returns
    -------
    Tensor
        ``(prompts,)``.

    Raises
    ------
    ConfigurationError
        If the two sets of prompts are not alike, or the position lies outside them.
    """
    if prompts.shape != corrupted.shape or not -prompts.shape[1] <= position < prompts.shape[1]:
        raise ConfigurationError(
            f"prompts are {tuple(prompts.shape)}, the others {tuple(corrupted.shape)}, position {position}; give two "
            "sets alike and a position within"
        )
    said: dict[str, Tensor] = {}

    def difference(tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        with ExitStack() as stack:
            for site, edit in edits.items():
                stack.enter_context(edited(model, site, edit))
            logits = last_logits(model, tokens)
        found: Tensor = logits.gather(1, right.reshape(-1, 1)) - logits.gather(1, wrong.reshape(-1, 1))
        return found[:, 0]

    def keep(site: str) -> Edit:
        def look(x: Tensor) -> Tensor:
            said[site] = x[:, position].clone()
            return x

        return look

    def put(site: str) -> Edit:
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, position] = said[site]
            return x

        return change

    with evaluating(model):
        difference(corrupted, {site: keep(site) for site in sites})
        return difference(prompts, {site: put(site) for site in sites}) - difference(prompts, {})
