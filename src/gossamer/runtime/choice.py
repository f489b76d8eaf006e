"""Which storage is fastest for a layer: measured on this machine, and remembered.

A layer is measured as decoding uses it: with vectors that change and weights that are no longer in the cache, because
all other layers have run in between. So each contender multiplies by several copies in turn, together larger than the
last-level cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError
from gossamer.kernels.blocks import FORMATS as BLOCK_FORMATS
from gossamer.kernels.groups import GROUP
from gossamer.kernels.kinds import pack
from gossamer.kernels.native import available, instruction_set, offers
from gossamer.kernels.nm import FORMATS as NM_FORMATS
from gossamer.measure import Timing, describe_machine, interleave
from gossamer.models.packages import cache_directory
from gossamer.storage.atomic import write_json

_BEYOND_CACHE = 96 << 20  # bytes of weights that a contender goes through before it meets the same ones again
_COPIES = 24
_STEP = 0.05  # layers whose densities differ by less are alike
_DECIMALS = 2
_DOUBT = 0.97  # medians of the same work differ by this much
_FOUR_BIT_GROUP = 64  # a row is too long for fifteen steps
CSR_PAYS = 0.3  # share of the weights; a bit for every weight is read faster from some 0.1 on, but not by many vectors
GROUPS_PAY = 0.9  # a stored group takes a quarter more than one of a dense matrix in four bits


@dataclass(frozen=True)
class Storage:
    """A way to keep a weight: ``plain`` leaves the layer to torch, the others are ours.

    Attributes
    ----------
    kind
        ``plain``, or a kind of :mod:`gossamer.kernels.kinds`.
    format
        What a value is, such as ``bfloat16`` or ``int8``.
    group
        Columns that share a scale, for whole numbers.
    """

    kind: str
    format: str
    group: int | None = None

    def __str__(self) -> str:
        group = f", groups of {self.group}" if self.group else ""
        return f"{self.kind} {self.format}{group}"


@dataclass(frozen=True)
class Case:
    """What a choice is made for.

    Attributes
    ----------
    rows, columns
        Of the weight.
    density
        Share of its weights that are not zero.
    dtype
        Of vectors, and of the weights that torch would multiply.
    batch
        Vectors at a time.
    groups
        Share of the 1×16 groups in which a weight is not zero.
    block
        Height of the blocks of one column that the weight is made of: see
        :func:`gossamer.kernels.blocks.block_height`.
    pattern
        N:M that the weight follows along its columns: see :func:`gossamer.kernels.nm.find_pattern`.
    """

    rows: int
    columns: int
    density: float
    dtype: torch.dtype
    batch: int = 1
    groups: float = 1.0
    block: int = 1
    pattern: NM | None = None

    @property
    def key(self) -> str:
        """Text that is equal for cases that are alike."""
        name = str(self.dtype).removeprefix("torch.")
        density, groups = f"{_coarse(self.density):.{_DECIMALS}f}", f"{_coarse(self.groups):.{_DECIMALS}f}"
        blocks = f" blocks of {self.block}" if self.block > 1 else ""
        pattern = f" {self.pattern}" if self.pattern else ""
        return f"{self.rows}x{self.columns} {density} {groups} {name} {self.batch}{blocks}{pattern}"


def _coarse(share: float) -> float:
    return min(1.0, math.ceil(share / _STEP - 1e-9) * _STEP)


class Choices:
    """Measured times of storages, kept in a file for each machine.

    Parameters
    ----------
    path
        JSON file; by default in the cache folder, under a name that depends on processor, threads, instruction set and
        version.
    measure
        Replaces the measurement, ``(case, storages) -> seconds of each``.
    """

    def __init__(
        self,
        path: Path | None = None,
        measure: Callable[[Case, Sequence[Storage]], dict[Storage, float]] | None = None,
    ):
        self.path = _path() if path is None else path
        self._measure = measure_storages if measure is None else measure
        self._known = _read(self.path)

    def seconds(self, case: Case, storages: Sequence[Storage]) -> dict[Storage, float]:
        """Time of one product with each storage, measured if it is not known yet."""
        known = self._known.setdefault(case.key, {})
        if any(str(storage) not in known for storage in storages):
            known |= {str(storage): seconds for storage, seconds in self._measure(case, storages).items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._known)
        return {storage: known[str(storage)] for storage in storages}


def candidates(
    formats: Sequence[str],
    dtype: torch.dtype,
    group: int | None = None,
    groups: float = 1.0,
    density: float = 1.0,
    block: int = 1,
    pattern: NM | None = None,
    activations: str = "float",
) -> list[Storage]:
    """Return every way to keep a weight in one of the formats; what torch does itself comes first.

    Parameters
    ----------
    formats
        What values may become.
    dtype
        Of the layer.
    group
        For whole numbers: columns that share a scale.
    groups
        Share of the 1×16 groups in which a weight is not zero; where some are empty, storing groups is a way as well.
    density
        Share of the weights that are not zero; where they are few, storing each with its column is a way as well.
    block
        Height of the blocks of one column that the weight is made of; from four on, storing these is a way as well.
    pattern
        N:M that the weight follows; where there is one, storing N of every M is a way as well.
    activations
        ``int8`` allows weights in int8 to round their inputs to int8: see :mod:`gossamer.kernels.integer`.

    Raises
    ------
    ConfigurationError
        If a format is unknown.
    """
    found = []
    plain = str(dtype).removeprefix("torch.")
    for format in formats:
        grouped = group if format == "int8" else (group or _FOUR_BIT_GROUP) if format == "int4" else None
        if format == plain:
            found.append(Storage("plain", format))
        if not available():
            continue
        if format == "int4":
            found.append(Storage("nibbles", format, group))
            found += [Storage("groups", format)] if groups < GROUPS_PAY else []
        else:
            found.append(Storage("dense", format, grouped))
        found.append(Storage("bitmask", format, grouped))
        if format == activations == "int8" and offers("integer_dense_linear"):
            found += [Storage(kind, format, grouped) for kind in ("integer_dense", "integer_bitmask")]
        if pattern is not None and format in NM_FORMATS and offers("nm_linear"):
            found.append(Storage("nm", format, grouped))
        if format in BLOCK_FORMATS and grouped is None:
            found += [Storage("csr", format)] if density <= CSR_PAYS else []
            found += [Storage(f"blocks{block}", format)] if block > 1 else []
    if not found:
        raise ConfigurationError(f"nothing keeps {plain} weights as {', '.join(formats)} without compiled kernels")
    return found


def fastest(seconds: Mapping[Storage, float]) -> Storage:
    """Return the storage that takes least time; what torch does itself, unless another is faster beyond doubt.

    Parameters
    ----------
    seconds
        Storage → seconds of one product.
    """
    best = min(seconds, key=seconds.__getitem__)
    plain = next((storage for storage in seconds if storage.kind == "plain"), best)
    return best if seconds[best] <= _DOUBT * seconds[plain] else plain


def measure_storages(case: Case, storages: Sequence[Storage], repeats: int = 5) -> dict[Storage, float]:
    """Time products with random weights of the same shape and density.

    Parameters
    ----------
    case
        Shape, density, dtype and batch.
    storages
        Contenders; they take turns.
    repeats
        Rounds.

    Returns
    -------
    dict
        Storage → median seconds of one product.
    """
    generator = torch.Generator().manual_seed(0)
    weight = _random_weight(case, generator)
    x = torch.randn(case.batch, case.columns, generator=generator).to(case.dtype)
    rounds = {storage: _round(storage, weight.to(case.dtype), x) for storage in storages}
    timings: dict[str, Timing] = interleave({str(s): run for s, (run, _) in rounds.items()}, repeats=repeats)
    return {storage: timings[str(storage)].median / copies for storage, (_, copies) in rounds.items()}


def _random_weight(case: Case, generator: torch.Generator) -> Tensor:
    weight = torch.randn(case.rows, case.columns, generator=generator)
    if case.pattern is not None:
        padded = -(-case.columns // case.pattern.m) * case.pattern.m
        kept = case.pattern.select(torch.rand(-(-case.rows // case.block), padded, generator=generator))
        return weight * kept.repeat_interleave(case.block, 0)[: case.rows, : case.columns]
    if case.block > 1:
        blocks = torch.rand(-(-case.rows // case.block), case.columns, generator=generator) < case.density
        return weight * blocks.repeat_interleave(case.block, 0)[: case.rows]
    groups = torch.rand(case.rows, -(-case.columns // GROUP), generator=generator) < case.groups
    kept = groups.repeat_interleave(GROUP, 1)[:, : case.columns]
    within = case.density / case.groups if case.groups else 0.0
    return weight * (kept & (torch.rand(case.rows, case.columns, generator=generator) < within))


def _round(storage: Storage, weight: Tensor, x: Tensor) -> tuple[Callable[[], object], int]:
    """Products with every copy of a weight, and how many copies there are."""
    if storage.kind == "plain":
        copies = _copies(weight.numel() * weight.element_size())
        weights = [weight.clone() for _ in range(copies)]
        return (lambda: [nn.functional.linear(x, each) for each in weights]), copies
    first = pack(weight, storage.kind, storage.format, storage.group)
    copies = _copies(first.nbytes)
    matrices = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    return (lambda: [each.linear(x) for each in matrices]), copies


def _copies(nbytes: int) -> int:
    return max(1, min(_COPIES, -(-_BEYOND_CACHE // max(1, nbytes))))


def _path() -> Path:
    machine = describe_machine()
    parts = {key: machine[key] for key in ("cpu", "cores", "torch", "gossamer", "torch_threads")}
    digest = hashlib.sha256(json.dumps([parts, instruction_set()]).encode()).hexdigest()[:16]
    return cache_directory() / "choices" / f"{digest}.json"


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return what was measured before; a file that cannot be read only has to be measured again."""
    try:
        stored = json.loads(path.read_text())
        return {key: {name: float(seconds) for name, seconds in times.items()} for key, times in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
