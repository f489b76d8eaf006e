"""What can go wrong, by name.

Every error that gossamer raises on purpose is a :class:`GossamerError`. Its message is one line that names
the thing, the offending value, what is allowed, and the next step; the command line prints exactly that line.
Most classes also inherit the built-in exception that Python programmers would expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fractions import Fraction


class GossamerError(Exception):
    """Base class of all deliberate errors."""


class ConfigurationError(GossamerError, ValueError):
    """A parameter has a value outside its allowed range, or two parameters contradict each other."""


class SparsityError(ConfigurationError):
    """A sparsity outside [0, 1), or one that a pattern or an allocation cannot reach."""


class PatternError(ConfigurationError):
    """A pattern that cannot be read, or that does not divide the layer it is asked to prune."""


class UnfairComparisonError(ConfigurationError):
    """Results that cannot stand side by side: other budgets, densities or denominators, or a rival left out."""


class UnknownNameError(GossamerError, LookupError):
    """A method, pattern, model, paper or layer that does not exist; suggests the nearest one that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}{hint}")
        self.name = name
        self.suggestion = near[0] if near else None


class TargetError(GossamerError, LookupError):
    """No layer of the model matches what was asked for."""


class ModelError(GossamerError, ValueError):
    """A model that cannot be found, loaded, or taken apart into blocks."""


class CalibrationError(GossamerError, ValueError):
    """Calibration or evaluation data that is missing, empty, too short or of the wrong shape."""


class NonFiniteError(GossamerError, ArithmeticError):
    """NaN or infinity in weights, activations or scores; the message names the layer."""


class SingularError(GossamerError, ArithmeticError):
    """A matrix that cannot be factored even after repeated damping."""


class CheckpointError(GossamerError, ValueError):
    """A stored model, mask or result that is truncated, altered, or of an unknown version."""


class OutputError(GossamerError, OSError):
    """An output path that is in use or cannot be written; nothing was left half-written."""


class MissingDependencyError(GossamerError, ImportError):
    """An optional library is not installed; the message gives the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {library}, which is not installed: pip install 'gossamer[{extra}]'")


def check_sparsity(sparsity: float | Fraction, name: str = "sparsity") -> float | Fraction:
    """Return `sparsity` if it lies in [0, 1).

    Raises
    ------
    SparsityError
        If it is not a number in [0, 1).
    """
    try:
        valid = 0 <= sparsity < 1
    except TypeError:
        valid = False
    if not valid:
        raise SparsityError(f"{name} is {sparsity!r}; it must be a number in [0, 1), such as 0.5 for half the weights")
    return sparsity
