"""Matching pursuit as the encoder of an autoencoder: look, take the best feature away, look again.

A linear encoder reads all features at once, and so can tell apart only features that point in different directions.
The features of real activations are nested: what is common to animals, and then which animal. Matching pursuit on the
decoder itself finds the first, subtracts it, and sees the second in what is left, however alike animals are. Features
need to be orthogonal only to those that come before them [Costa et al., 2025, arXiv 2506.03093].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import CountedRule
from gossamer.features.sae import SAE, Explained
from gossamer.kernels.codes import decode
from gossamer.kernels.pursuit import Pursuit, matching_pursuit, orthogonal_matching_pursuit

Kind = Literal["mp", "omp"]
_GRAM_BYTES = 1 << 30


class MatchingPursuit(CountedRule):
    """The rule of a :class:`MatchingPursuitSAE`: at most k steps, until the residual is short enough.

    Affinities alone do not tell which features are chosen: it takes the decoder, which only that autoencoder has.
    """

    def __init__(self, k: int, tolerance: float = 0.0, pursuit: Kind = "mp", stop_on_repeat: bool = False):
        super().__init__(k)
        if not tolerance >= 0:
            raise ConfigurationError(f"tolerance is {tolerance}; it must be 0 or more")
        if pursuit not in ("mp", "omp"):
            raise ConfigurationError(f"pursuit is {pursuit!r}; it must be mp or omp")
        self.tolerance, self.pursuit, self.stop_on_repeat = tolerance, pursuit, stop_on_repeat

    def build(self, features: int) -> None:  # noqa: D102
        if self.pursuit == "omp":  # which never chooses a feature twice
            super().build(features)

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        raise ConfigurationError("MatchingPursuit is the rule of MatchingPursuitSAE(d_in, n_features, k); use that")

    def settings(self) -> dict[str, Any]:  # noqa: D102
        own = {"tolerance": self.tolerance, "pursuit": self.pursuit, "stop_on_repeat": self.stop_on_repeat}
        return {**super().settings(), **own}


class MatchingPursuitSAE(SAE):
    """A sparse autoencoder whose encoder is matching pursuit on its own decoder.

    It has no weights but the decoder, rows of length one, and a bias. Every step lowers the error, so at inference
    there may be more steps or fewer than in training. Gradients are those of the whole pursuit with its choices fixed;
    they need what was chosen and the last residual only, for any number of steps.

    Parameters
    ----------
    d_in, n_features
        As of :class:`SAE`.
    k
        Steps, at most; with ``mp`` a feature may be chosen twice.
    tolerance
        Length of a residual that is good enough, in units of the activations; 0 always takes k steps.
    bias
        Whether what is explained is the difference from a learned bias.
    pursuit
        ``mp``, or ``omp``, which fits all chosen values anew after every step.
    stop_on_repeat
        Whether the pursuit of a token ends with the first feature that is chosen twice, as in the authors' code.
    dropout
        Share of the features, drawn for every batch of training, that cannot be chosen.
    seed
        Of the directions at the beginning, and of the dropout.

    Examples
    --------
    >>> sae = MatchingPursuitSAE(16, 64, k=4).eval()
    >>> error = [(x - step).norm() for x in [torch.randn(5, 16)] for step in sae.path(x, range(9))]
    >>> all(after < before for before, after in zip(error, error[1:]))
    True
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int = 32,
        tolerance: float = 0.0,
        bias: bool = True,
        pursuit: Kind = "mp",
        stop_on_repeat: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is {dropout}; it must be in [0, 1)")
        if dropout and pursuit == "omp":
            raise ConfigurationError("dropout is for mp; an orthogonal pursuit has none")
        super().__init__(d_in, n_features, MatchingPursuit(k, tolerance, pursuit, stop_on_repeat), seed)
        self.bias.requires_grad_(bias)
        self.dropout = dropout
        self._generator = torch.Generator().manual_seed(seed)
        self._gram: tuple[Any, Tensor] | None = None

    def _add_encoder(self) -> None:
        self.register_buffer("encoder_bias", torch.zeros(self.n_features), persistent=False)

    @property
    def encoder(self) -> Tensor:  # type: ignore[override]
        """The decoder: weights are tied."""
        return self.decoder

    @property
    def rule(self) -> MatchingPursuit:
        """Steps, tolerance and kind of the pursuit."""
        assert isinstance(self.activation, MatchingPursuit)
        return self.activation

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:  # noqa: D102
        super().prepare(x)
        if not self.bias.requires_grad:
            self.bias.zero_()

    def encode(
        self, x: Tensor, gradient: Tensor | None = None, *, k: int | None = None, tolerance: float | None = None
    ) -> SparseCodes:
        """Features of activations ``(…, d_in)``, a row for each token.

        Parameters
        ----------
        x
            Activations.
        gradient
            Is not looked at.
        k, tolerance
            Instead of those it was trained with.
        """
        return self.pursue(x, k, tolerance).codes

    def forward(self, x: Tensor, gradient: Tensor | None = None) -> Explained:
        """Explain activations ``(…, d_in)``: see :meth:`encode`."""
        found = self.pursue(x)
        codes = found.codes
        if self.rule.pursuit == "mp":
            output = (self._centred(x) - found.residual + self.bias) / self.scale
        else:
            # values are a least squares fit: to first order, the error does not change with them
            output = decode(codes, self.decoder, self.bias) / self.scale
        return Explained(output.view(x.shape), codes, codes.values)

    def pursue(self, x: Tensor, k: int | None = None, tolerance: float | None = None) -> Pursuit:
        """What is chosen of every token step by step; values and residual are in scaled units."""
        k = self.rule.k if k is None else k
        limit = (self.rule.tolerance if tolerance is None else tolerance) * float(self.scale)
        centred = self._centred(x)
        if self.rule.pursuit == "omp":
            return orthogonal_matching_pursuit(
                centred.detach(), self.decoder.detach(), k, tolerance=limit, nonnegative=True
            )
        kept = self._kept()
        if kept is None:
            found = matching_pursuit(centred, self.decoder, k, tolerance=limit, gram=self._products())
        else:
            part = matching_pursuit(centred, self.decoder[kept], k, tolerance=limit)
            found = Pursuit(kept[part.atoms], part.values, part.residual, self.n_features)
        return _until_repeat(found, centred, self.decoder) if self.rule.stop_on_repeat else found

    def path(self, x: Tensor, steps: Sequence[int] | range) -> list[Tensor]:
        """Reconstructions ``(…, d_in)`` after the given numbers of steps; each contains those before it."""
        wanted = list(steps)
        if not wanted or min(wanted) < 0:
            raise ConfigurationError(f"steps are {wanted}; give numbers of steps from 0 up")
        if self.rule.pursuit == "omp":
            return [self.decode(self.encode(x, k=k)).view(x.shape) if k else self._nothing(x) for k in wanted]
        found = self.pursue(x, max(1, *wanted))
        explained = []
        for k in wanted:
            codes = SparseCodes.from_rows(found.atoms[:, :k], found.values[:, :k], self.n_features)
            explained.append(self.decode(codes).view(x.shape) if k else self._nothing(x))
        return explained

    def _nothing(self, x: Tensor) -> Tensor:
        return (self.bias / self.scale).expand_as(x)

    def _centred(self, x: Tensor) -> Tensor:
        return self._flat(x) * self.scale - self.bias

    def _kept(self) -> Tensor | None:
        if not self.training or not self.dropout:
            return None
        kept = torch.rand(self.n_features, generator=self._generator) >= self.dropout
        kept[int(torch.randint(self.n_features, (), generator=self._generator))] = True
        return kept.nonzero()[:, 0].to(self.decoder.device)

    def _products(self) -> Tensor | None:
        """Products of all features, kept while the decoder does not change; None lets the kernel decide."""
        if self.training or self.n_features**2 * self.decoder.element_size() > _GRAM_BYTES:
            return None
        version = (self.decoder._version, self.decoder.data_ptr(), self.decoder.dtype)
        if self._gram is None or self._gram[0] != version:
            atoms = self.decoder.detach()
            self._gram = (version, atoms @ atoms.t())
        return self._gram[1]

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {**super().settings(), "bias": self.bias.requires_grad, "dropout": self.dropout}


def _until_repeat(found: Pursuit, x: Tensor, dictionary: Tensor) -> Pursuit:
    """The same path without what comes after the first feature that is chosen a second time."""
    steps = found.atoms.shape[1]
    earlier = torch.ones(steps, steps, dtype=torch.bool, device=found.atoms.device).tril(-1)
    taken = found.values.detach() != 0
    same = (found.atoms[:, :, None] == found.atoms[:, None, :]) & taken[:, None, :] & earlier
    repeats = same.any(2) & taken
    after = repeats.cumsum(1) - repeats.long() > 0
    values = found.values.masked_fill(after, 0)
    codes = SparseCodes.from_rows(found.atoms, values, found.width)
    return Pursuit(found.atoms, values, x - decode(codes, dictionary), found.width)
