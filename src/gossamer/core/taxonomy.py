"""The axes on which sparse methods differ, so that two of them can be told apart, found, and compared like with like.

Most disputes about sparse networks are about words: a method that prunes a trained network and one that never had a
dense network are both called "pruning", and their costs differ by a whole training. So every registered method says
where it stands on each axis [Liu and Wang, 2023, arXiv 2302.02596].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.core.kernel_groups import KernelGroup, KernelRows
from gossamer.core.patterns import NM, Block, Channels, Pattern, Unstructured
from gossamer.errors import ConfigurationError, UnknownNameError

Timing = Literal["before training", "during training", "after training", "at inference", "fine-tuning"]
Path = Literal["dense-to-sparse", "sparse-to-sparse", "sparse-to-dense", "dense-to-dense"]
Topology = Literal["static", "dynamic"]
Criterion = Literal["random", "magnitude", "gradient", "activation", "second order", "learned", "structure", "search"]
Allocation = Literal["fixed", "uniform", "global", "erdos-renyi", "measured", "given"]
Family = Literal["unstructured", "n:m", "blocks", "channels", "kernels"]
Aim = Literal["training", "inference", "quality", "insight"]

_FAMILIES: dict[Family, tuple[type[Pattern], ...]] = {
    "unstructured": (Unstructured,),
    "n:m": (NM,),
    "blocks": (Block,),
    "channels": (Channels,),
    "kernels": (KernelGroup, KernelRows),
}
_AXES: dict[str, tuple[str, ...]] = {
    "timing": get_args(Timing),
    "path": get_args(Path),
    "topology": get_args(Topology),
    "criterion": get_args(Criterion),
    "allocation": get_args(Allocation),
    "patterns": get_args(Family),
    "aims": get_args(Aim),
}


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Where a method stands.

    Attributes
    ----------
    timing
        When it decides what becomes zero.
    path
        What it starts from and ends with; several if its settings decide.
    topology
        ``static`` if what is zero stays zero until the end, ``dynamic`` if weights come back.
    criterion
        What tells it which zeros: several where it removes by one and grows by another.
    allocation
        How layers come by their numbers: ``fixed`` by the pattern, ``uniform``, by one ``global`` ranking, by shape
        (``erdos-renyi``), by something ``measured``, or ``given`` by the user.
    patterns
        Families of shapes that its zeros can take.
    aims
        What it is for: cheaper ``training``, cheaper ``inference``, more ``quality`` at the same cost, or ``insight``.
    """

    timing: Timing
    path: tuple[Path, ...]
    topology: Topology
    criterion: tuple[Criterion, ...]
    allocation: Allocation
    patterns: tuple[Family, ...]
    aims: tuple[Aim, ...]

    def __post_init__(self) -> None:
        for axis, allowed in _AXES.items():
            found = getattr(self, axis)
            values = (found,) if isinstance(found, str) else found
            if not values:
                raise ConfigurationError(f"{axis} is empty; give at least one of {', '.join(allowed)}")
            for value in values:
                if value not in allowed:
                    raise ConfigurationError(f"{axis} is {value!r}; it must be of {', '.join(allowed)}")

    @property
    def paradigm(self) -> str:
        """``pruning`` if a dense network is needed at some time, ``sparse training`` if never, or ``either``."""
        starts = {path.startswith("dense") for path in self.path}
        return "either" if len(starts) == 2 else "pruning" if starts.pop() else "sparse training"

    @property
    def values(self) -> frozenset[str]:
        """All it says, as words to filter by."""
        found = {self.timing, self.topology, self.allocation, self.paradigm}
        return frozenset(found.union(self.path, self.criterion, self.patterns, self.aims))

    def matches(self, word: str) -> bool:
        """Whether the method stands at this value of an axis, by its full name or the beginning of it.

        Raises
        ------
        UnknownNameError
            If no axis has such a value.
        """
        known = {value for allowed in _AXES.values() for value in allowed} | {"pruning", "sparse training", "either"}
        wanted = {value for value in known if value == word or value.startswith(f"{word} ")}
        if not wanted:
            raise UnknownNameError("value of an axis", word, sorted(known))
        return bool(wanted & self.values)

    def takes(self, pattern: str) -> bool:
        """Whether its zeros can take a pattern, given as text such as ``2:4``.

        Raises
        ------
        PatternError
            If there is no such pattern.
        """
        return family(Pattern.parse(pattern)) in self.patterns

    def explain(self) -> str:
        """Say it in a sentence.

        Examples
        --------
        >>> Taxonomy(
        ...     timing="during training", path=("sparse-to-sparse",), topology="dynamic",
        ...     criterion=("magnitude", "gradient"), allocation="erdos-renyi", patterns=("unstructured",),
        ...     aims=("training", "inference"),
        ... ).explain()
        'sparse training (sparse-to-sparse), dynamic, during training; unstructured zeros by magnitude and gradient, \
erdos-renyi allocation; aims at training and inference'
        """
        paths, shapes = " or ".join(self.path), " or ".join(self.patterns)
        return (
            f"{self.paradigm} ({paths}), {self.topology}, {self.timing}; {shapes} zeros by "
            f"{' and '.join(self.criterion)}, {self.allocation} allocation; aims at {' and '.join(self.aims)}"
        )


def family(pattern: Pattern) -> Family:
    """Which family a pattern belongs to."""
    return next(name for name, kinds in _FAMILIES.items() if isinstance(pattern, kinds))
