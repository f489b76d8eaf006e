"""The three networks of the dynamic signal distribution as one scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, MissingDependencyError
from gossamer.training.dynamic_signal_distribution import Kind, PatchNet, PatchTraining

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


class PatchNetClassifier(ClassifierMixin, BaseEstimator):
    """Two classes told apart by fully, locally or convolutionally connected units.

    Lahoti et al., 2024, arXiv 2403.15707; the network is
    :class:`gossamer.training.dynamic_signal_distribution.PatchNet`.

    Parameters
    ----------
    n_patches
        Into how many patches, one behind the other, a row of features is cut; it must divide their number.
    kind
        ``"fcn"``, ``"lcn"`` or ``"cnn"``.
    threshold
        Of the units.
    max_iter, warm, learning_rate
        Steps of gradient descent, the share of them without threshold, and the rate.
    standardize
        Whether features are first brought to mean 0 and the overall standard deviation to 1, as the networks have
        neither bias nor scale.
    init_scale
        Standard deviation of the first weights.
    random_state
        Of the first weights: a seed, a ``numpy.random.RandomState``, or None.

    Attributes
    ----------
    classes_
        The two labels.
    coef_
        Weights as a fully connected layer has them, ``(n_patches, n_features_in_)``.
    n_features_in_
        Number of features.
    """

    def __init__(
        self,
        n_patches: int = 1,
        kind: Kind = "cnn",
        threshold: float = 0.0,
        max_iter: int = 300,
        warm: float = 1 / 3,
        learning_rate: float = 0.3,
        standardize: bool = True,
        init_scale: float = 1e-3,
        random_state: Any = None,
    ) -> None:
        if check_random_state is None:
            raise MissingDependencyError("scikit-learn", "graphs", "PatchNetClassifier")
        self.n_patches = n_patches
        self.kind = kind
        self.threshold = threshold
        self.max_iter = max_iter
        self.warm = warm
        self.learning_rate = learning_rate
        self.standardize = standardize
        self.init_scale = init_scale
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any) -> PatchNetClassifier:
        """Train on rows of features, ``(n, features)``, and their labels.

        Raises
        ------
        ConfigurationError
            If the patches do not divide the features.
        ValueError
            If there are not two classes, or scikit-learn refuses the data.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            known = f"{len(self.classes_)} class" + ("es" if len(self.classes_) != 1 else "")
            raise ValueError(f"Only binary classification is supported; the labels have {known}, two are needed")
        features = X.shape[1]
        if self.n_patches < 1 or features % self.n_patches:
            raise ConfigurationError(f"n_patches is {self.n_patches}; it must divide the {features} features")
        self._centre = X.mean(0) if self.standardize else np.zeros(features)
        deviation = float((X - self._centre).std()) if self.standardize else 1.0
        self._unit = deviation if deviation > 0 else 1.0
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        model = PatchNet(self.n_patches, features // self.n_patches, self.kind, self.threshold).double()
        model.reset_parameters(self.init_scale, generator_for("patch network", seed))
        training = PatchTraining(self.max_iter, self.warm, self.learning_rate)
        self._model = training.fit(model, self._patches(X), torch.from_numpy(2.0 * numbers - 1))
        self.n_iter_ = self.max_iter
        self.coef_ = self._model.dense_weight().numpy()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores, ``(n,)``; positive for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.inference_mode():
            return self._model(self._patches(X)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels, ``(n,)``."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int)]

    def _patches(self, X: np.ndarray) -> torch.Tensor:
        scaled = (X - self._centre) / self._unit
        return torch.from_numpy(scaled).view(len(X), self.n_patches, -1)
