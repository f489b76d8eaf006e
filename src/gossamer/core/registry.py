"""The register of methods: each puts itself here by a decorator, and everything else finds it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from gossamer.errors import ConfigurationError

When = Literal["after training", "during training", "at inference", "fine-tuning", "layer", "estimator", "solver"]
Granularity = Literal["weights", "blocks", "channels", "heads", "layers", "activations", "tokens", "updates", "edges"]


@dataclass(frozen=True)
class MethodSpec:
    """What a registered method is, for tables, filters and the common test suite.

    Attributes
    ----------
    name
        Under which the command line and :func:`gossamer.prune` know it.
    factory
        The class (or function) to call with hyper-parameters.
    room
        Package it lives in.
    paper
        Slug of its row in the catalogue.
    when
        When it acts; this decides its protocol.
    granularity
        What becomes zero.
    needs_data
        Whether it must see calibration data.
    """

    name: str
    factory: Callable[..., Any]
    room: str
    paper: str
    when: When
    granularity: Granularity
    needs_data: bool

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return (self.factory.__doc__ or "").strip().split("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameter → default."""
        if not dataclasses.is_dataclass(self.factory):
            return {}
        return {
            field.name: field.default if field.default is not dataclasses.MISSING else None
            for field in dataclasses.fields(self.factory)
            if field.init
        }


REGISTER: dict[str, MethodSpec] = {}

_T = TypeVar("_T", bound=Callable[..., Any])


def register(
    name: str, *, paper: str, when: When, granularity: Granularity = "weights", needs_data: bool = True
) -> Callable[[_T], _T]:
    """Class decorator that puts a method into the register.

    Raises
    ------
    ConfigurationError
        If another method has taken the name.
    """

    def add(factory: _T) -> _T:
        taken = REGISTER.get(name)
        if taken is not None and taken.factory.__qualname__ != factory.__qualname__:
            raise ConfigurationError(f"two methods are called {name!r}: {taken.factory} and {factory}; rename one")
        room = factory.__module__.split(".")[1] if factory.__module__.startswith("gossamer.") else factory.__module__
        REGISTER[name] = MethodSpec(name, factory, room, paper, when, granularity, needs_data)
        return factory

    return add
