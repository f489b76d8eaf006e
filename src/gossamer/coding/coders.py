"""Sparse coders as scikit-learn estimators: greedy pursuits, the LASSO and thresholds.

They code whole tables at a time, where scikit-learn's ``SparseCoder`` goes through them row by row.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.coding.dictionary import unit_rows
from gossamer.coding.lasso import Method, lasso
from gossamer.coding.thresholding import sparse_encode
from gossamer.core.estimators import CodeTransformer, ConvergenceWarning, checked, drawn_seed
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.kernels.pursuit import matching_pursuit, orthogonal_matching_pursuit

_ROWS = 8192  # coded at a time: what has to be kept for each is as large as the dictionary


class _DictionaryCoder(CodeTransformer):
    """Codes on a given dictionary; without one, atoms are rows of the data.

    Attributes
    ----------
    components_
        ``(n_components_, n_features_in_)``, the atoms.
    n_components_
        How many there are.
    n_features_in_
        Number of features.
    """

    dictionary: Any
    n_components: int | None
    random_state: Any

    def fit(self, X: Any, y: Any = None) -> Any:
        """Take the dictionary, or draw its atoms among the rows of ``X``.

        Parameters
        ----------
        X
            ``(n, features)``.
        y
            Ignored.

        Raises
        ------
        ConfigurationError
            If the dictionary does not fit the features, or a parameter is out of range.
        ValueError
            If scikit-learn refuses the data.
        """
        rows = checked(self, X, fitting=True)
        self.components_ = self._drawn(rows) if self.dictionary is None else self._given(rows)
        self.n_components_ = len(self.components_)
        return self

    def _given(self, rows: Tensor) -> np.ndarray:
        atoms = np.array(self.dictionary, dtype=np.result_type(self.dictionary, np.float32))
        if atoms.ndim != 2 or atoms.shape[1] != rows.shape[1] or not len(atoms):
            raise ConfigurationError(f"dictionary is {atoms.shape}; give (atoms, {rows.shape[1]}), as X has features")
        lengths = np.linalg.norm(atoms, axis=1)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            bad = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
            raise ConfigurationError(f"atom {bad} of the dictionary is zero or not finite; leave it out")
        return atoms

    def _drawn(self, rows: Tensor) -> np.ndarray:
        wanted = self.n_components if self.n_components is not None else 2 * rows.shape[1]
        if wanted < 1:
            raise ConfigurationError(f"n_components is {wanted}; it must be 1 or more")
        able = rows[(rows != 0).any(1)]
        if not len(able):
            able = torch.eye(rows.shape[1], dtype=rows.dtype)
        generator = generator_for("atoms among rows", drawn_seed(self.random_state))
        chosen = torch.randperm(len(able), generator=generator)[:wanted]
        return unit_rows(able[chosen]).numpy()

    def _codes(self, rows: Tensor) -> Tensor:
        atoms = torch.from_numpy(self.components_).to(rows.dtype)
        return torch.cat([self._coded(part, atoms) for part in rows.split(_ROWS)])

    def _rows(self, codes: Tensor) -> Tensor:
        return codes @ torch.from_numpy(self.components_).to(codes.dtype)

    @abstractmethod
    def _coded(self, rows: Tensor, atoms: Tensor) -> Tensor:
        """Codes ``(n, atoms)``."""


class _PursuitCoder(_DictionaryCoder):
    def __init__(
        self,
        dictionary: Any = None,
        n_nonzero_coefs: int | None = None,
        tol: float = 0.0,
        nonnegative: bool = False,
        n_components: int | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
    ) -> None:
        self.dictionary = dictionary
        self.n_nonzero_coefs = n_nonzero_coefs
        self.tol = tol
        self.nonnegative = nonnegative
        self.n_components = n_components
        self.sparse_output = sparse_output
        self.random_state = random_state

    def _coded(self, rows: Tensor, atoms: Tensor) -> Tensor:
        lengths = atoms.norm(dim=1)
        found = self._pursued(rows, atoms / lengths[:, None], self._steps(rows, atoms))
        return found.codes.to_dense() / lengths

    def _steps(self, rows: Tensor, atoms: Tensor) -> int:
        if self.n_nonzero_coefs is None:
            return max(1, rows.shape[1] // 10)
        if not 1 <= self.n_nonzero_coefs <= len(atoms):
            raise ConfigurationError(
                f"n_nonzero_coefs is {self.n_nonzero_coefs}; give 1 to {len(atoms)}, the atoms there are"
            )
        return self.n_nonzero_coefs

    @abstractmethod
    def _pursued(self, rows: Tensor, atoms: Tensor, steps: int) -> Any:
        """The pursuit of unit atoms."""


class OMPCoder(_PursuitCoder):
    """Codes by orthogonal matching pursuit: :func:`gossamer.kernels.pursuit.orthogonal_matching_pursuit`.

    Parameters
    ----------
    dictionary
        Atoms, ``(atoms, features)``, of any length above 0; None draws them among the rows that are fitted.
    n_nonzero_coefs
        Atoms of a code at most; by default a tenth of the features, at least one.
    tol
        Length of a residual with which a row is done.
    nonnegative
        Whether only atoms with a positive correlation are chosen.
    n_components
        How many atoms are drawn if no dictionary is given; by default twice the features.
    sparse_output
        Whether codes are a SciPy matrix of compressed rows.
    random_state
        Of the atoms that are drawn.

    Examples
    --------
    >>> coder = OMPCoder(np.eye(3), n_nonzero_coefs=1)
    >>> coder.fit_transform([[3.0, 1.0, 0.0], [0.0, -1.0, 0.5]]).tolist()
    [[3.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    """

    def _pursued(self, rows: Tensor, atoms: Tensor, steps: int) -> Any:
        return orthogonal_matching_pursuit(rows, atoms, steps, tolerance=self.tol, nonnegative=self.nonnegative)


class MatchingPursuitCoder(_PursuitCoder):
    """Codes by matching pursuit: :func:`gossamer.kernels.pursuit.matching_pursuit`.

    Parameters
    ----------
    dictionary, tol, nonnegative, n_components, sparse_output, random_state
        As :class:`OMPCoder`.
    n_nonzero_coefs
        Steps; an atom may be taken twice, so that a code has at most so many.
    """

    @torch.no_grad()
    def _pursued(self, rows: Tensor, atoms: Tensor, steps: int) -> Any:
        return matching_pursuit(rows, atoms, steps, tolerance=self.tol, nonnegative=self.nonnegative)


class LassoCoder(_DictionaryCoder):
    """Codes that minimise ``½ ‖y − aΦ‖² + alpha ‖a‖₁``: :func:`gossamer.coding.lasso.lasso`.

    Parameters
    ----------
    dictionary, n_components, sparse_output, random_state
        As :class:`OMPCoder`.
    alpha
        Weight of the l1 norm, as ``transform_alpha`` of scikit-learn's ``SparseCoder``; its ``Lasso`` divides it by
        the number of features.
    method
        ``"fista"`` or ``"cd"``.
    tol
        A row is done when its duality gap is at most this share of ``½ ‖y‖²``.
    transform_max_iter
        Steps at most; rows that need more cause a ``ConvergenceWarning``.
    positive
        Whether codes may not be below 0.
    """

    def __init__(
        self,
        dictionary: Any = None,
        alpha: float = 1.0,
        method: Method = "fista",
        tol: float = 1e-4,
        transform_max_iter: int = 1000,
        positive: bool = False,
        n_components: int | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
    ) -> None:
        self.dictionary = dictionary
        self.alpha = alpha
        self.method = method
        self.tol = tol
        self.transform_max_iter = transform_max_iter
        self.positive = positive
        self.n_components = n_components
        self.sparse_output = sparse_output
        self.random_state = random_state

    def _coded(self, rows: Tensor, atoms: Tensor) -> Tensor:
        found = lasso(
            rows,
            atoms,
            self.alpha,
            method=self.method,
            tolerance=self.tol,
            max_iter=self.transform_max_iter,
            nonnegative=self.positive,
        )
        if not bool(found.converged.all()):
            warnings.warn(
                f"{int((~found.converged).sum())} of {len(rows)} rows have a duality gap above tol={self.tol} after "
                f"{found.n_iter} steps; raise transform_max_iter or alpha",
                ConvergenceWarning,
                stacklevel=4,
            )
        return found.codes


class ThresholdingCoder(_DictionaryCoder):
    """Codes by iterative thresholding: :func:`gossamer.coding.thresholding.iterative_thresholding`.

    Parameters
    ----------
    dictionary, n_components, sparse_output, random_state
        As :class:`OMPCoder`.
    penalty
        One of :data:`gossamer.core.prox.PENALTIES`.
    alpha
        Its weight.
    transform_max_iter, tol
        Steps at most, and by how much codes still move when a row is done.
    """

    def __init__(
        self,
        dictionary: Any = None,
        penalty: str = "cel0",
        alpha: float = 1.0,
        transform_max_iter: int = 200,
        tol: float = 1e-4,
        n_components: int | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
    ) -> None:
        self.dictionary = dictionary
        self.penalty = penalty
        self.alpha = alpha
        self.transform_max_iter = transform_max_iter
        self.tol = tol
        self.n_components = n_components
        self.sparse_output = sparse_output
        self.random_state = random_state

    def _coded(self, rows: Tensor, atoms: Tensor) -> Tensor:
        return sparse_encode(
            rows, atoms, self.penalty, self.alpha, max_iter=self.transform_max_iter, tolerance=self.tol
        )
