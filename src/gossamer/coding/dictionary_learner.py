"""Dictionary learning as a scikit-learn estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.coding.dictionary import Dictionary, DictionaryLearning, Learning, Update
from gossamer.coding.thresholding import fitted_penalty, iterative_thresholding
from gossamer.core.estimators import CodeTransformer, checked, drawn_seed


class DictionaryLearner(CodeTransformer):
    """A dictionary that is learnt, and codes on it: :class:`gossamer.coding.dictionary.DictionaryLearning`.

    Takes the place of scikit-learn's ``MiniBatchDictionaryLearning``, with any penalty.

    Parameters
    ----------
    n_components
        Atoms; by default as many as features.
    penalty
        One of :data:`gossamer.core.prox.PENALTIES` with a weight.
    alpha, target_l0
        Its weight; or how many codes of a row are to be other than zero, in the mean, from which the weight is found.
    batch_size, max_iter
        Rows at a time, and how often all are gone through.
    update
        ``"online"``, ``"gradient"`` or ``"mod"``.
    fit_iter, transform_iter
        Steps of thresholding while learning and for codes.
    dict_init
        First atoms; by default rows at random.
    sparse_output
        Whether codes are a SciPy matrix of compressed rows.
    random_state
        Of the first atoms and the order of rows.

    Attributes
    ----------
    components_
        ``(n_components_, n_features_in_)``, atoms of length one.
    alpha_
        Weight of the penalty in the end.
    error_
        Unexplained share of each batch, before atoms moved.
    n_iter_, n_steps_
        Passes over the data, and batches.
    n_components_, n_features_in_
        Atoms, and features.
    """

    def __init__(
        self,
        n_components: int | None = None,
        penalty: str = "cel0",
        alpha: float = 1.0,
        target_l0: float | None = None,
        batch_size: int = 256,
        max_iter: int = 10,
        update: Update = "online",
        fit_iter: int = 50,
        transform_iter: int = 200,
        dict_init: Any = None,
        sparse_output: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.penalty = penalty
        self.alpha = alpha
        self.target_l0 = target_l0
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.update = update
        self.fit_iter = fit_iter
        self.transform_iter = transform_iter
        self.dict_init = dict_init
        self.sparse_output = sparse_output
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> DictionaryLearner:
        """Learn atoms from rows.

        Parameters
        ----------
        X
            ``(n, features)``.
        y
            Ignored.

        Raises
        ------
        ConfigurationError, UnknownNameError
            If a parameter is out of range.
        ValueError
            If scikit-learn refuses the data.
        """
        rows = checked(self, X, fitting=True)
        self.__dict__.pop("_learning", None)
        return self._take(self._settings(rows).fit(rows, self._first(rows)), self.max_iter)

    def partial_fit(self, X: Any, y: Any = None) -> DictionaryLearner:
        """Go once through further rows, from the atoms and all that was in common with them so far.

        Parameters
        ----------
        X
            ``(n, features)``.
        y
            Ignored.

        Raises
        ------
        ConfigurationError, UnknownNameError, ValueError
            As :meth:`fit`.
        """
        known = hasattr(self, "components_")
        rows = checked(self, X, fitting=not known)
        if not hasattr(self, "_learning"):
            first = torch.from_numpy(self.components_).to(rows.dtype) if known else self._first(rows)
            self._learning = Learning(self._settings(rows), rows, first)
        passes = self.n_iter_ + 1 if known else 1
        return self._take(self._learning.more(rows.to(self._learning.atoms.dtype)), passes)

    def _settings(self, rows: Tensor) -> DictionaryLearning:
        return DictionaryLearning(
            rows.shape[1] if self.n_components is None else self.n_components,
            self.penalty,
            self.alpha if self.target_l0 is None else None,
            self.target_l0,
            epochs=self.max_iter,
            batch_size=self.batch_size,
            coding_iter=self.fit_iter,
            update=self.update,
            seed=drawn_seed(self.random_state),
        )

    def _first(self, rows: Tensor) -> Tensor | None:
        return None if self.dict_init is None else torch.as_tensor(np.array(self.dict_init), dtype=rows.dtype)

    def _take(self, found: Dictionary, passes: int) -> DictionaryLearner:
        self.components_ = found.atoms.numpy()
        self.n_components_, self.alpha_, self.error_ = len(found.atoms), found.lam, found.error
        self.n_iter_, self.n_steps_ = passes, len(found.error)
        return self

    def _codes(self, rows: Tensor) -> Tensor:
        atoms = torch.from_numpy(self.components_).to(rows.dtype)
        one = fitted_penalty(self.penalty, self.alpha_, atoms)
        return iterative_thresholding(rows, atoms, one, max_iter=self.transform_iter).codes

    def _rows(self, codes: Tensor) -> Tensor:
        return codes @ torch.from_numpy(self.components_).to(codes.dtype)
