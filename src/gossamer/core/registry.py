"""The register of methods: each puts itself here by a decorator, and everything else finds it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from gossamer.core.taxonomy import Aim, Allocation, Criterion, Family, Path, Taxonomy, Timing, Topology
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
    taxonomy
        Where it stands on the axes on which sparse methods differ.
    """

    name: str
    factory: Callable[..., Any]
    room: str
    paper: str
    when: When
    granularity: Granularity
    needs_data: bool
    taxonomy: Taxonomy

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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything but the class itself."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "factory"}
        return said | {"taxonomy": dataclasses.asdict(self.taxonomy), "summary": self.summary}


REGISTER: dict[str, MethodSpec] = {}

_T = TypeVar("_T", bound=Callable[..., Any])


class Axes(TypedDict, total=False):
    """What a method says of itself; see :class:`gossamer.core.taxonomy.Taxonomy`."""

    timing: Timing
    path: tuple[Path, ...]
    topology: Topology
    criterion: tuple[Criterion, ...]
    allocation: Allocation
    patterns: tuple[Family, ...]
    aims: tuple[Aim, ...]


_USUAL: dict[When, Axes] = {
    "after training": {
        "timing": "after training",
        "path": ("dense-to-sparse",),
        "topology": "static",
        "allocation": "uniform",
        "patterns": ("unstructured", "n:m", "blocks", "channels", "kernels"),
        "aims": ("inference",),
    },
    "during training": {
        "timing": "during training",
        "patterns": ("unstructured",),
        "aims": ("training", "inference"),
    },
    "at inference": {
        "timing": "at inference",
        "path": ("dense-to-sparse",),
        "topology": "dynamic",
        "allocation": "uniform",
        "patterns": ("channels",),
        "aims": ("inference",),
    },
    "layer": {
        "timing": "before training",
        "path": ("sparse-to-sparse",),
        "topology": "static",
        "allocation": "given",
        "patterns": ("unstructured",),
        "aims": ("training", "inference"),
    },
}
"""What methods of a protocol have in common, unless one says otherwise."""


def register(
    name: str,
    *,
    paper: str,
    when: When,
    granularity: Granularity = "weights",
    needs_data: bool = True,
    **axes: Unpack[Axes],
) -> Callable[[_T], _T]:
    """Class decorator that puts a method into the register.

    Parameters
    ----------
    name, paper, when, granularity, needs_data
        See :class:`MethodSpec`.
    **axes
        Where the method stands; what is usual for its protocol can be left out.

    Raises
    ------
    ConfigurationError
        If another method has taken the name, or an axis is missing.
    """
    said = {**_USUAL.get(when, {}), **axes}
    missing = [axis for axis in Axes.__annotations__ if axis not in said]
    if missing:
        raise ConfigurationError(f"method {name!r} does not say its {missing[0]}; every method states every axis")
    taxonomy = Taxonomy(**said)  # type: ignore[arg-type]

    def add(factory: _T) -> _T:
        taken = REGISTER.get(name)
        if taken is not None and taken.factory.__qualname__ != factory.__qualname__:
            raise ConfigurationError(f"two methods are called {name!r}: {taken.factory} and {factory}; rename one")
        room = factory.__module__.split(".")[1] if factory.__module__.startswith("gossamer.") else factory.__module__
        REGISTER[name] = MethodSpec(name, factory, room, paper, when, granularity, needs_data, taxonomy)
        return factory

    return add
