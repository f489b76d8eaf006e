"""A perceptron that is wired by groups, as a scikit-learn classifier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, MissingDependencyError
from gossamer.training.g2gnet import G2G, Grouping, Growth, Prune, widen

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:  # the module must still be found by whoever lists all methods

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

    check_random_state = None


class G2GClassifier(ClassifierMixin, BaseEstimator):
    """Classes told apart by rectified units in groups that talk much within and little between.

    Konstantaropoulos, Smirnakis & Papadopouli, 2025, arXiv 2508.14140; the wiring is that of
    :class:`~gossamer.training.g2gnet.G2G`. The output layer is dense, and so is the first where the data have fewer
    features than there are groups.

    Parameters
    ----------
    hidden_layer_sizes
        Units of each hidden layer, at least as many as groups.
    groups, p_inter, grouping
        G, p′, and which units form a group; see :func:`~gossamer.training.g2gnet.g2g_mask`.
    exchanges, exchange, prune, growth
        How often edges move while training (0: they stay), which share of a layer's edges, and by which rules; see
        :class:`~gossamer.training.g2gnet.G2G`.
    max_iter, batch_size
        Steps of AdamW, and rows of each, which are drawn with replacement.
    learning_rate, weight_decay, dropout
        The highest rate, which falls to zero along a cosine; decay; share of hidden activity dropped while training.
    standardize
        Whether every feature is first brought to mean 0 and standard deviation 1.
    random_state
        Of wiring, first weights and batches: a seed, a ``numpy.random.RandomState``, or None.

    Attributes
    ----------
    classes_
        The labels.
    network_
        The trained network, in double precision, with zeros in its weights.
    masks_
        Which edges there are, a :class:`~gossamer.core.masks.MaskSet`.
    n_features_in_, n_iter_
        Number of features, and of steps.

    Examples
    --------
    >>> rows, labels = np.random.default_rng(0).normal(size=(40, 16)), np.arange(40) % 2
    >>> found = G2GClassifier((32, 32), max_iter=20, random_state=0).fit(rows + 3 * labels[:, None], labels)
    >>> round(found.masks_.density, 3)
    0.256
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (128, 128),
        groups: int = 8,
        p_inter: float = 0.15,
        grouping: Grouping = "index",
        exchanges: int = 0,
        exchange: float = 0.1,
        prune: Prune = "set",
        growth: Growth = "hebbian",
        max_iter: int = 200,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        dropout: float = 0.0,
        standardize: bool = True,
        random_state: Any = None,
    ) -> None:
        if check_random_state is None:
            raise MissingDependencyError("scikit-learn", "graphs", "G2GClassifier")
        self.hidden_layer_sizes = hidden_layer_sizes
        self.groups = groups
        self.p_inter = p_inter
        self.grouping = grouping
        self.exchanges = exchanges
        self.exchange = exchange
        self.prune = prune
        self.growth = growth
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.standardize = standardize
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> G2GClassifier:
        """Train on rows of features, ``(n, features)``, and their labels.

        Raises
        ------
        ConfigurationError
            If a setting is out of range, or a hidden layer has fewer units than there are groups.
        ValueError
            If there is only one class, or scikit-learn refuses the data.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("the labels have 1 class; at least two are needed")
        self._check()
        self._centre = X.mean(0) if self.standardize else np.zeros(X.shape[1])
        deviation = X.std(0) if self.standardize else np.ones(X.shape[1])
        self._unit = np.where(deviation > 0, deviation, 1.0)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows, labels = self._scaled(X), torch.from_numpy(numbers.astype(np.int64))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.network_ = self._network(X.shape[1])
            self._train(rows, labels, seed)
        self.n_iter_ = self.max_iter
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, ``(n, classes)``."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.inference_mode():
            return self.network_(self._scaled(X)).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels, ``(n,)``."""
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]

    def _check(self) -> None:
        for name, least in (("max_iter", 1), ("batch_size", 1), ("exchanges", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        sizes = list(self.hidden_layer_sizes)
        if not sizes or min(sizes) < max(1, self.groups):
            raise ConfigurationError(
                f"hidden_layer_sizes is {sizes}; at least one layer is needed, and {self.groups} units in each, as "
                f"many as groups"
            )
        if not 0 <= self.dropout < 1 or not self.learning_rate > 0:
            raise ConfigurationError(
                f"dropout is {self.dropout} and learning_rate {self.learning_rate}; a share in [0, 1) and a rate "
                f"above 0 are needed"
            )

    def _network(self, features: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, width in pairwise([features, *self.hidden_layer_sizes]):
            layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(self.hidden_layer_sizes[-1], len(self.classes_))).double()

    def _train(self, rows: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
        network = self.network_
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_iter)
        method = G2G(
            groups=self.groups,
            p_inter=self.p_inter,
            grouping=self.grouping,
            every=max(1, self.max_iter // (self.exchanges + 1)) if self.exchanges else None,
            exchange=self.exchange,
            prune=self.prune,
            growth=self.growth,
            seed=seed,
            # the first layer has the name 0
            exclude=("0",) if rows.shape[1] < self.groups and len(self.hidden_layer_sizes) > 1 else (),
        )
        training = method.attach(network, optimizer)
        widen(training)
        drawn = torch.randint(
            len(rows), (self.max_iter, self.batch_size), generator=generator_for("G2G classifier", seed)
        )
        network.train()
        for chosen in drawn:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(rows[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        self.masks_ = training.finalize()
        network.eval()

    def _scaled(self, X: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((X - self._centre) / self._unit)
