"""Find any method by name, whichever room it lives in."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import gossamer
from gossamer.core.registry import REGISTER, MethodSpec
from gossamer.errors import ConfigurationError, UnknownNameError

_NO_ROOMS = {"cli", "core", "kernels", "storage", "models", "measure", "papers", "report", "data"}


@cache
def _discover() -> None:
    """Import every module of every room, so that the methods register themselves."""
    for room in pkgutil.iter_modules(gossamer.__path__, "gossamer."):
        if room.ispkg and room.name.rpartition(".")[2] not in _NO_ROOMS:
            package = importlib.import_module(room.name)
            for module in pkgutil.iter_modules(package.__path__, f"{room.name}."):
                importlib.import_module(module.name)


def methods() -> dict[str, MethodSpec]:
    """All registered methods, name → specification, in alphabetical order."""
    _discover()
    return dict(sorted(REGISTER.items()))


def method(name: str) -> MethodSpec:
    """The method of this name.

    Raises
    ------
    UnknownNameError
        With the nearest name there is.
    """
    known = methods()
    if name not in known:
        raise UnknownNameError("method", name, known)
    return known[name]


def create(name: str, **parameters: Any) -> Any:
    """Build a method from its name and hyper-parameters.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    ConfigurationError
        If it has no such parameter, or a value is out of range.
    """
    spec = method(name)
    unknown = set(parameters) - set(spec.parameters)
    if unknown:
        known = ", ".join(spec.parameters)
        raise ConfigurationError(f"{name} has no parameter {sorted(unknown)[0]!r}; it has: {known}")
    return spec.factory(**parameters)
