"""Dictionaries of which every direction has a known meaning: the best that features of a task can be.

If the variables of a task are known, an activation can be explained by its mean and one vector for the value of each
variable. What such a dictionary does for approximation, control and interpretation is what one may ask of a dictionary
that was found without labels [Makelov et al., 2024, arXiv 2405.08366].
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError

Attribute = str | tuple[str, ...] | frozenset[str]
"""A variable; several together, with a vector for every combination; or several that share vectors, as a name has the
same wherever it stands."""
Labels = Mapping[str, Tensor]
Method = Literal["mean", "mse"]
EditMode = Literal["arithmetic", "zero", "mean"]
_FEW = 20  # prompts of a value below which its mean is a guess


class SupervisedDictionary(BaseEstimator):
    """``x̂ = x̄ + Σ uₐ(vₐ)``: a vector for every value of every attribute.

    Parameters
    ----------
    attributes
        What is explained; see :data:`Attribute`. ``("io", "order")`` couples two variables, ``frozenset({"io", "s"})``
        lets them share vectors.
    method
        ``mean``: what activations with a value have in common, less the mean of all. ``mse``: least squares on all
        values at once, the solution of least norm where values determine each other.

    Attributes
    ----------
    mean_
        x̄, ``(d,)``.
    vectors_
        Attribute → ``(values, d)``.
    sizes_
        Variable → number of its values.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]])
    >>> labels = {"a": torch.tensor([0, 1, 0, 1]), "b": torch.tensor([0, 0, 1, 1])}
    >>> SupervisedDictionary(["a", "b"]).fit(x, labels).reconstruct(labels).round(decimals=3)[2]
    tensor([1., 4.])
    """

    def __init__(self, attributes: Sequence[Attribute], method: Method = "mse"):
        self.attributes, self.method = attributes, method

    def fit(self, x: Tensor, labels: Labels) -> SupervisedDictionary:
        """Learn the vectors.

        Parameters
        ----------
        x
            Activations, ``(prompts, d)``.
        labels
            Variable → its value on every prompt, ``(prompts,)`` int64 from 0 on.

        Raises
        ------
        ConfigurationError
            If there is no attribute, a method of that name, or a variable.
        CalibrationError
            If shapes do not fit.
        NonFiniteError
            If an activation is NaN or infinite.
        """
        x = torch.as_tensor(x).float()
        self._check(x, labels)
        self.sizes_ = {name: int(labels[name].max()) + 1 for name in self._variables()}
        self.mean_ = x.mean(0)
        designs = [self._design(attribute, labels) for attribute in self.attributes]
        rare = min(int(design.sum(0)[design.sum(0) > 0].min()) for design in designs)
        if rare < _FEW:
            warnings.warn(
                f"a value appears on {rare} prompts; with fewer than {_FEW} its vector is a guess", stacklevel=2
            )
        centred = (x - self.mean_).double()
        if self.method == "mean":
            found = [design.t() @ centred / design.sum(0).clamp(min=1)[:, None] for design in designs]
        else:
            whole = torch.cat(designs, 1)
            solution = torch.linalg.lstsq(whole, centred, driver="gelsd").solution
            found = list(solution.split([design.shape[1] for design in designs]))
        self.vectors_ = {attribute: part.float() for attribute, part in zip(self.attributes, found)}
        return self

    def _check(self, x: Tensor, labels: Labels) -> None:
        if not self.attributes or self.method not in ("mean", "mse"):
            raise ConfigurationError(
                f"attributes are {self.attributes}, method {self.method!r}; give one, 'mean' or 'mse'"
            )
        for name in self._variables():
            if name not in labels:
                raise ConfigurationError(f"there are no labels of {name!r}; there are {sorted(labels)}")
            if x.dim() != 2 or labels[name].shape != x.shape[:1]:
                raise CalibrationError(
                    f"activations are {tuple(x.shape)}, labels of {name!r} {tuple(labels[name].shape)}; they must be "
                    "(prompts, d) and (prompts,)"
                )
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("activations hold NaN or infinity; the model or the capture is damaged")

    def _variables(self) -> list[str]:
        return sorted({name for attribute in self.attributes for name in variables(attribute)})

    def _design(self, attribute: Attribute, labels: Labels) -> Tensor:
        """Ones where a prompt has a value, ``(prompts, values)`` float64."""
        if isinstance(attribute, frozenset):
            size = max(self.sizes_[name] for name in attribute)
            return sum(one_hot(labels[name], size) for name in sorted(attribute))  # type: ignore[return-value]
        size = 1
        for name in variables(attribute):
            size *= self.sizes_[name]
        return one_hot(self.values(attribute, labels), size)

    def values(self, attribute: Attribute, labels: Labels) -> Tensor:
        """Which vector of an attribute each prompt has, ``(prompts,)``.

        Raises
        ------
        ConfigurationError
            If variables share vectors, so that a prompt has several, or a value is unknown.
        """
        if isinstance(attribute, frozenset):
            raise ConfigurationError(f"{sorted(attribute)} share vectors; a prompt has one for each of them")
        number = torch.zeros_like(labels[variables(attribute)[0]])
        for name in variables(attribute):
            size, highest = self.sizes_[name], int(labels[name].max())
            if highest >= size or int(labels[name].min()) < 0:
                raise ConfigurationError(f"{name!r} has a value of {highest}; there are vectors for 0 to {size - 1}")
            number = number * size + labels[name]
        return number

    def contribution(self, attribute: Attribute, labels: Labels) -> Tensor:
        """What one attribute adds, ``(prompts, d)``."""
        if isinstance(attribute, frozenset):
            return torch.stack([self.vectors_[attribute][labels[name]] for name in sorted(attribute)]).sum(0)
        return self.vectors_[attribute][self.values(attribute, labels)]

    def reconstruct(self, labels: Labels) -> Tensor:
        """Activations as their labels explain them, ``(prompts, d)``."""
        return self.mean_ + torch.stack([self.contribution(one, labels) for one in self.attributes]).sum(0)

    def edit(self, x: Tensor, old: Labels, new: Labels, mode: EditMode = "arithmetic") -> Tensor:
        """Change the values of attributes in activations.

        Parameters
        ----------
        x
            Activations, ``(prompts, d)``.
        old, new
            All labels, before and after; attributes whose values are the same are left alone.
        mode
            ``arithmetic`` takes out the old vector and puts in the new one. ``zero`` and ``mean`` first take out
            whatever lies in the span of the attribute's vectors, all or what differs from the mean.

        Raises
        ------
        ConfigurationError
            If the mode is none of these.
        """
        if mode not in ("arithmetic", "zero", "mean"):
            raise ConfigurationError(f"mode is {mode!r}; it must be 'arithmetic', 'zero' or 'mean'")
        edited = x.clone()
        for attribute in self.attributes:
            before, after = self.contribution(attribute, old), self.contribution(attribute, new)
            differs = torch.stack([old[name] != new[name] for name in variables(attribute)]).any(0)
            if mode == "arithmetic":
                moved = edited - before + after
            else:
                basis = self.subspace(attribute)
                out = edited - self.mean_ if mode == "mean" else edited
                moved = edited - (out @ basis.t()) @ basis + after
            edited = torch.where(differs[:, None], moved, edited)
        return edited

    def subspace(self, attribute: Attribute) -> Tensor:
        """An orthonormal basis of the span of an attribute's vectors, ``(rank, d)``."""
        _, sizes, basis = torch.linalg.svd(self.vectors_[attribute].double(), full_matrices=False)
        tolerance = sizes[0] * 1e-6
        return basis[sizes > tolerance].float()


def variables(attribute: Attribute) -> tuple[str, ...]:
    """The variables of an attribute."""
    return (
        (attribute,)
        if isinstance(attribute, str)
        else tuple(sorted(attribute))
        if isinstance(attribute, frozenset)
        else attribute
    )


def one_hot(values: Tensor, size: int) -> Tensor:
    """``(prompts, size)`` float64."""
    return torch.nn.functional.one_hot(values, size).double()
