"""Abrupt sparsification: during pretraining, weights may turn small not gradually but at one point.

A language model, pretrained long enough, suddenly has many more weights that one-shot pruning could remove, with no
change in its loss to announce it [Jaiswal et al., 2023, arXiv 2306.03805, on BERT]. This monitor reads the
checkpoints of a run one at a time, counts the weights below a fixed threshold (and, if asked, measures the fraction
that can really be removed), and says whether the curve jumps by more than its noise and its surroundings explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.core.changepoint import Jump, largest_jump
from gossamer.core.targets import find_targets
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, TargetError

Checkpoint = nn.Module | Mapping[str, Tensor] | str | Path

NOT_PRUNED = ("*embed*", "*wte*", "*wpe*", "*lm_head*", "*norm*")
"""Tensors of a stored checkpoint that are no targets, by name: there are no modules to ask."""

_CHUNK = 1 << 20
_SHORTEST = 4  # checkpoints below which a jump cannot be told from a step


@dataclass
class SparsificationTrack:
    """How many weights were small at each checkpoint.

    Attributes
    ----------
    steps
        Training step of each checkpoint (or its position).
    below
        Fraction of the weights with ``|w| < tau``.
    layers
        Parameter name → that fraction at each checkpoint.
    removable
        What the function of that name said of each checkpoint; None without one.
    tau
        The threshold.
    jump
        Largest jump of `below`; None for fewer than 4 checkpoints.
    removable_jump
        Largest jump of `removable`, likewise.
    """

    steps: list[float]
    below: list[float]
    layers: dict[str, list[float]]
    removable: list[float] | None
    tau: float
    jump: Jump | None
    removable_jump: Jump | None

    @property
    def abrupt(self) -> bool:
        """Whether the fraction of small (or removable) weights jumps upwards beyond noise and local pace."""
        return any(jump is not None and jump.abrupt and jump.size > 0 for jump in (self.jump, self.removable_jump))

    @property
    def abrupt_steps(self) -> tuple[float, float] | None:
        """The two steps between which it happens, or None."""
        for jump in (self.jump, self.removable_jump):
            if jump is not None and jump.abrupt and jump.size > 0:
                return self.steps[jump.index], self.steps[jump.index + 1]
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; infinite ratios become None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("jump", "removable_jump"):
            if values[name] is not None:
                numbers = {k: v if math.isfinite(v) else None for k, v in asdict(values[name]).items()}
                values[name] = {**numbers, "abrupt": values[name].abrupt}
        return {**values, "abrupt": self.abrupt, "abrupt_steps": self.abrupt_steps}


def track_checkpoints(
    checkpoints: Iterable[Checkpoint] | Mapping[float, Checkpoint],
    *,
    tau: float = 1e-3,
    steps: Sequence[float] | None = None,
    removable: Callable[[Any], float] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> SparsificationTrack:
    """Follow the small weights of a model through the checkpoints of its training.

    Parameters
    ----------
    checkpoints
        In order of training: modules, state dicts, or paths of safetensors files or of directories of them; or step
        → one of these. A generator is consumed one by one, and files are read tensor by tensor. Of a module the
        targets count; of the others all tensors with two or more dimensions but those named by :data:`NOT_PRUNED`.
    tau
        Threshold, positive; the same for all checkpoints.
    steps
        Training step of each, increasing; by default the keys, or 0, 1, 2, ….
    removable
        Checkpoint → fraction that can be removed within a tolerance, such as
        ``lambda model: essential_sparsity(model, evaluate).es``.
    include, exclude
        Globs on module names (of modules) or tensor names (of the others).

    Raises
    ------
    ConfigurationError
        If `tau` is not positive, there is no checkpoint, or steps do not fit.
    TargetError
        If a checkpoint has nothing to count, or other weights than the first one.
    NonFiniteError
        If a weight is NaN or infinite; names it and the step.
    CheckpointError
        If a file is missing or damaged.
    """
    if not 0 < tau < math.inf:
        raise ConfigurationError(f"tau is {tau}; it must be a positive number, such as 1e-3")
    if isinstance(checkpoints, Mapping):
        steps, checkpoints = list(checkpoints), checkpoints.values()
    below: list[float] = []
    layers: dict[str, list[float]] = {}
    found: list[float] | None = None if removable is None else []
    for position, checkpoint in enumerate(checkpoints):
        counts = {
            name: _count_below(f"{name} of checkpoint {position}", weight, tau)
            for name, weight in _weights(checkpoint, tuple(include), tuple(exclude))
        }
        _append(layers, counts, position)
        below.append(sum(small for small, _ in counts.values()) / sum(size for _, size in counts.values()))
        if found is not None and removable is not None:
            found.append(_finite(removable(checkpoint), position))
    times = _check_steps(steps, len(below))
    long_enough = len(below) >= _SHORTEST
    return SparsificationTrack(
        steps=times,
        below=below,
        layers=layers,
        removable=found,
        tau=tau,
        jump=largest_jump(below) if long_enough else None,
        removable_jump=largest_jump(found) if found and long_enough else None,
    )


def _append(layers: dict[str, list[float]], counts: Mapping[str, tuple[int, int]], position: int) -> None:
    if not counts:
        raise TargetError(f"checkpoint {position} has no weight matrix to count; check include and exclude")
    if position and set(counts) != set(layers):
        different = sorted(set(counts) ^ set(layers))[0]
        raise TargetError(f"checkpoint {position} has other weights than the first, such as {different!r}")
    for name, (small, size) in counts.items():
        layers.setdefault(name, []).append(small / size)


def _count_below(name: str, weight: Tensor, tau: float) -> tuple[int, int]:
    small = 0
    for part in weight.detach().flatten().split(_CHUNK):
        magnitude = part.abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; the run diverged or the file is damaged")
        small += int((magnitude < tau).sum())
    return small, max(1, weight.numel())


def _weights(
    checkpoint: Checkpoint, include: tuple[str, ...], exclude: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(checkpoint, nn.Module):
        yield from ((target.name, target.matrix()) for target in find_targets(checkpoint, include, exclude))
        return
    tensors = checkpoint.items() if isinstance(checkpoint, Mapping) else _stored(Path(checkpoint))
    for name, tensor in tensors:
        wanted = any(fnmatchcase(name, glob) for glob in include)
        unwanted = any(fnmatchcase(name, glob) for glob in (*exclude, *NOT_PRUNED))
        if tensor.dim() > 1 and tensor.is_floating_point() and wanted and not unwanted:
            yield name, tensor


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise CheckpointError(f"{path} holds no safetensors file; give such a file or a directory with some")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); save it again") from error


def _finite(value: float, position: int) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(f"removable returned {value} for checkpoint {position}; return a fraction in [0, 1]")
    return float(value)


def _check_steps(steps: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ConfigurationError("there is no checkpoint to track; give at least one")
    times = list(range(count)) if steps is None else [float(step) for step in steps]
    if len(times) != count or not all(before < after for before, after in pairwise(times)):
        raise ConfigurationError(f"steps is {times}; {count} increasing numbers are needed, one for each checkpoint")
    return [float(step) for step in times]
