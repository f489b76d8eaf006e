"""A sparse autoencoder as a scikit-learn estimator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.core.estimators import CodeTransformer, checked, drawn_seed
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import ActivationRule, TopK
from gossamer.features.sae import SAE
from gossamer.features.training import TrainingSettings, train

_ROWS = 8192


class SAETransformer(CodeTransformer):
    """Codes of rows by a sparse autoencoder that is trained on them: :class:`gossamer.features.sae.SAE`.

    Parameters
    ----------
    n_components
        Features of the autoencoder; by default four times those of the rows.
    k
        Features of a code at most; by default a tenth of those of the rows, at least one.
    activation
        Another rule of selection, which then takes the place of ``TopK(k)``. It must not look at gradients.
    max_iter, batch_size, learning_rate
        Steps of training, rows of each, and the rate.
    sparse_output
        Whether codes are a SciPy matrix of compressed rows.
    random_state
        Of the first directions and the order of rows.

    Attributes
    ----------
    sae_
        The autoencoder, in single precision.
    components_
        Directions of its features, ``(n_components_, n_features_in_)``, in units of the rows.
    history_
        What was noted while it was trained.
    n_iter_, n_components_, n_features_in_
        Steps, features of the autoencoder, and of the rows.

    Examples
    --------
    >>> rows = torch.randn(200, 8).numpy()
    >>> SAETransformer(n_components=16, k=2, max_iter=20, random_state=0).fit_transform(rows).shape
    (200, 16)
    """

    def __init__(
        self,
        n_components: int | None = None,
        k: int | None = None,
        activation: ActivationRule | None = None,
        max_iter: int = 1000,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        sparse_output: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.k = k
        self.activation = activation
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.sparse_output = sparse_output
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> SAETransformer:
        """Train on rows.

        Parameters
        ----------
        X
            ``(n, features)``.
        y
            Ignored.

        Raises
        ------
        ConfigurationError
            If a parameter is out of range.
        ValueError
            If scikit-learn refuses the data.
        """
        rows = checked(self, X, fitting=True).float()
        size = rows.shape[1]
        width = 4 * size if self.n_components is None else self.n_components
        seed = drawn_seed(self.random_state)
        sae = SAE(size, width, self._rule(size, width), seed=seed)
        settings = TrainingSettings(
            steps=self.max_iter, batch_size=self.batch_size, learning_rate=self.learning_rate, seed=seed
        )
        learner = train({"sae": sae}, _batches(rows, self.batch_size, seed), settings, progress=False)["sae"]
        self.history_, self.n_iter_ = learner.history, self.max_iter
        return self._take(sae)

    @classmethod
    def of(cls, sae: SAE, **parameters: Any) -> SAETransformer:
        """An estimator that is already fitted, around an autoencoder that was trained elsewhere."""
        made = cls(n_components=sae.n_features, activation=sae.activation, **parameters)
        made.n_features_in_, made.history_, made.n_iter_ = sae.d_in, [], 0
        return made._take(sae)

    def _rule(self, size: int, width: int) -> ActivationRule:
        if self.activation is not None:
            return copy.deepcopy(self.activation)
        k = max(1, size // 10) if self.k is None else self.k
        if not 1 <= k <= width:
            raise ConfigurationError(f"k is {k}; give 1 to {width}, the features there are")
        return TopK(k)

    def _take(self, sae: SAE) -> SAETransformer:
        self.sae_ = copy.deepcopy(sae).eval()
        self.n_components_ = sae.n_features
        self.components_ = (sae.decoder / sae.scale).detach().numpy()
        return self

    def _of(self, dtype: torch.dtype) -> SAE:
        """In double precision, codes of a row do not depend on the rows it came with."""
        return self.sae_ if dtype == torch.float32 else copy.deepcopy(self.sae_).to(dtype)

    @torch.no_grad()
    def _codes(self, rows: Tensor) -> Tensor:
        sae = self._of(rows.dtype)
        return torch.cat([sae.encode(part).to_dense() for part in rows.split(_ROWS)])

    @torch.no_grad()
    def _rows(self, codes: Tensor) -> Tensor:
        sae = self._of(codes.dtype)
        return (codes @ sae.decoder + sae.bias) / sae.scale


def _batches(rows: Tensor, size: int, seed: int) -> Any:
    """Batches without end, every row once before any comes again."""

    def batches(begin: int) -> Iterator[Tensor]:
        generator = generator_for("rows", seed)
        size_now = min(size, len(rows))
        while True:
            for part in torch.randperm(len(rows), generator=generator).split(size_now):
                yield rows[part]

    return batches
