"""What our estimators share with scikit-learn, which is optional: this module can be imported without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import MissingDependencyError

try:
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data

    AVAILABLE = True
except ImportError:  # modules with estimators must still be found by whoever lists all methods
    AVAILABLE = False

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            """Let a subclass be defined, and say what is missing when it is made."""
            super().__init_subclass__(**kwargs)
            cls.__init__ = _refuse  # type: ignore[method-assign]

    class ClassNamePrefixFeaturesOutMixin:  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

    class TransformerMixin:  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

    class ConvergenceWarning(UserWarning):  # type: ignore[no-redef]
        """Stands in where scikit-learn is missing."""

    csr_matrix = check_random_state = check_is_fitted = validate_data = None


def _refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise MissingDependencyError("scikit-learn", "coding", type(self).__name__)


FLOATS = [np.float64, np.float32]  #: types that estimators keep as they are


def checked(estimator: Any, X: Any, *, fitting: bool) -> Tensor:
    """Rows that an estimator was given, as a tensor ``(n, features)`` of single or double precision.

    Raises
    ------
    ValueError
        As scikit-learn does: if X is no table of finite numbers, or not of the features that were fitted.
    """
    X = validate_data(estimator, X, reset=fitting, dtype=FLOATS)
    return torch.from_numpy(np.array(X))


def drawn_seed(random_state: Any) -> int:
    """A seed from what scikit-learn calls a random state: a seed, a ``RandomState`` or None."""
    return int(check_random_state(random_state).randint(2**31 - 1))


class CodeTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ABC):
    """What turns rows into sparse codes.

    A subclass sets ``n_components_`` in ``fit`` and defines :meth:`_codes` and :meth:`_rows`; its parameter
    ``sparse_output`` says whether codes are given as a SciPy matrix of compressed rows or as an array.
    """

    sparse_output: bool

    def __sklearn_tags__(self) -> Any:
        """Single and double precision are kept."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def transform(self, X: Any) -> Any:
        """Codes of rows.

        Parameters
        ----------
        X
            ``(n, features)``.

        Returns
        -------
        ndarray or csr_matrix
            ``(n, n_components_)``.
        """
        check_is_fitted(self)
        codes = self._codes(checked(self, X, fitting=False)).numpy()
        return csr_matrix(codes) if self.sparse_output else codes

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Rows ``(n, features)`` that codes ``(n, n_components_)`` stand for."""
        check_is_fitted(self)
        dense = np.asarray(X.todense() if hasattr(X, "todense") else X)
        if dense.dtype not in FLOATS:
            dense = dense.astype(np.float64)
        if dense.ndim != 2 or dense.shape[1] != self.n_components_:
            raise ValueError(f"codes are {dense.shape}; give (n, {self.n_components_})")
        return self._rows(torch.from_numpy(dense)).numpy()

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    @abstractmethod
    def _codes(self, rows: Tensor) -> Tensor:
        """Codes ``(n, n_components_)`` of rows."""

    @abstractmethod
    def _rows(self, codes: Tensor) -> Tensor:
        """Rows that codes stand for."""
