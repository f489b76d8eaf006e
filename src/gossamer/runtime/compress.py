"""Give every layer of a model the storage that is fastest for it on this machine, and leave it alone where none is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError, ModelError, TargetError
from gossamer.kernels.blocks import block_height
from gossamer.kernels.groups import GroupMatrix
from gossamer.kernels.kinds import group_density, pack
from gossamer.kernels.matrix import PackedMatrix
from gossamer.kernels.native import available
from gossamer.kernels.nm import find_pattern
from gossamer.models.activation_sites import rules_at_work
from gossamer.runtime.choice import GROUPS_PAY, Case, Choices, Storage, candidates, fastest
from gossamer.storage.layers import PackedEmbedding, SparseLinear

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
HEADS = ("int8", "int4", "bfloat16", "keep")
ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class LayerChoice:
    """What became of one layer.

    Attributes
    ----------
    name
        Of the module.
    shape
        ``(out, in)``.
    density
        Share of the weights that are not zero.
    storage
        What was chosen.
    before, after
        Bytes of the weight.
    seconds
        Storage → seconds of one product, as measured.
    """

    name: str
    shape: tuple[int, int]
    density: float
    storage: str
    before: int
    after: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What holds for all layers: see :func:`compress`."""

    group: int | None
    activations: str
    batch: int


@dataclass
class CompressionReport:
    """What :func:`compress` did.

    Attributes
    ----------
    layers
        One entry for each linear layer, the head last.
    settings
        What was asked for.
    """

    layers: list[LayerChoice] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> int:
        """Bytes of all these weights as the model had them."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Bytes of all these weights now."""
        return sum(layer.after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = sorted({layer.storage for layer in self.layers})
        counts = ", ".join(f"{sum(one.storage == kind for one in self.layers)} × {kind}" for kind in kinds)
        return f"{len(self.layers)} layers, {self.before / 1e6:.1f} → {self.after / 1e6:.1f} MB: {counts}"


def compress(
    model: nn.Module,
    format: str | None = None,
    *,
    head: str = "int8",
    group: int | None = None,
    activations: str = "float",
    batch: int = 1,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    choices: Choices | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Replace linear layers by packed ones where that is measured to be faster, in place.

    Parameters
    ----------
    model
        Any module, on the CPU; its linear layers are float32 or bfloat16.
    format
        What weights become: ``bfloat16``, ``int8``, ``int4`` and so on. None keeps every weight bit for bit.
    head
        The same for the output head, which decoding reads as a whole for every token: ``int8``, ``int4``,
        ``bfloat16`` or ``keep``. Where the head is tied to the embedding, both then share one packed matrix.
    group
        For whole numbers: columns that share a scale, a multiple of 64; by default a whole row.
    activations
        ``int8`` lets layers in int8 round the vectors that they multiply to int8 as well, where that is measured to be
        faster; ``float`` multiplies them as they are. Weights in four bits round them in either case.
    batch
        Vectors that layers see at a time, in the case that shall be fast.
    include, exclude
        Globs on module names.
    choices
        Times measured before; by default those kept for this machine.
    progress
        Whether to show a bar.

    Returns
    -------
    CompressionReport
        What was chosen for each layer, and all that was measured.

    Raises
    ------
    TargetError
        If the model has no linear layer that matches.
    ConfigurationError
        If a format is unknown or does not fit `activations`, or a layer is not on the CPU or of another dtype.
    ModelError
        If activation rules are at work in the model.

    Examples
    --------
    >>> loaded = gossamer.load("demo", dtype="bfloat16")  # doctest: +SKIP
    >>> gossamer.prune(loaded.model, "wanda", sparsity=0.7, calibration=batches)  # doctest: +SKIP
    >>> print(gossamer.compress(loaded.model))  # doctest: +SKIP
    """
    check_formats(format, head, activations)
    if rules_at_work(model):
        raise ModelError("activation rules are at work in this model and would not survive; call their remove() first")
    chosen = Choices() if choices is None else choices
    layers = _linear_layers(model, tuple(include), tuple(exclude))
    output = _output_head(model)
    settings = {"format": format or "as they are", "head": head, "group": group, "batch": batch}
    settings["activations"] = activations
    asked = Asked(group, activations, batch)
    report = CompressionReport(settings=settings)
    for name, layer in track(list(layers.items()), "choosing kernels", enabled=progress):
        if layer is output:
            continue
        report.layers.append(_replace(model, name, layer, format, asked, chosen))
    name = next((name for name, layer in layers.items() if layer is output), None)
    if name is not None and output is not None:
        wanted = None if head == "keep" else head
        report.layers.append(_replace(model, name, output, wanted, asked, chosen))
    return report


def check_formats(format: str | None, head: str, activations: str = "float") -> None:
    """Check what weights, the head and the vectors between them shall become.

    Raises
    ------
    ConfigurationError
        If one of them is unknown, or activations in int8 would meet no weights in whole numbers.
    """
    if format is not None and format not in FORMATS:
        raise ConfigurationError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if head not in HEADS:
        raise ConfigurationError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
    if activations not in ACTIVATIONS:
        raise ConfigurationError(f"activations is {activations!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if activations == "int8" and not {format, head} & {"int8", "int4"}:
        raise ConfigurationError(
            f"activations is 'int8', and weights are {format or 'as they are'}, the head {head!r}; ask for int8 in one"
        )


def _linear_layers(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """Name → layer, of those that can be replaced."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        wanted = any(fnmatchcase(name, glob) for glob in include) and not any(fnmatchcase(name, g) for g in exclude)
        if type(module) is nn.Linear and wanted:
            found[name] = module
    if not found:
        raise TargetError("no linear layer matches; look at the names of the model's modules, or compress it only once")
    for name, layer in found.items():
        if layer.weight.device.type != "cpu" or layer.weight.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigurationError(
                f"{name} is {layer.weight.dtype} on {layer.weight.device}; bring the model to the CPU in float32 or "
                f"bfloat16 first"
            )
    return found


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _case(weight: Tensor, batch: int) -> Case:
    """What is measured for a weight."""
    rows, columns = weight.shape
    density = float(torch.count_nonzero(weight)) / max(1, weight.numel())
    block = block_height(weight) if density < 1 else 1
    pattern = find_pattern(weight, str(weight.dtype).removeprefix("torch.")) if density < 1 else None
    return Case(rows, columns, density, weight.dtype, batch, group_density(weight), block, pattern)


def _storages(weight: Tensor, case: Case, format: str | None, asked: Asked) -> list[Storage]:
    """What a weight may be kept as, given what its values may become."""
    zeros = (case.groups, case.density, case.block, case.pattern)
    if format is not None:
        return candidates([format], case.dtype, asked.group, *zeros, asked.activations)
    own = str(case.dtype).removeprefix("torch.")
    # a weight that bfloat16 can hold loses nothing there
    exact = case.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())
    found = candidates([own, "bfloat16"] if exact else [own], case.dtype, None, *zeros)
    return [*found, Storage("groups", "int4")] if _lies_on_groups(weight) else found


def _lies_on_groups(weight: Tensor) -> bool:
    """Whether 1×16 groups in four bits, as GQSA makes them, hold a weight bit for bit."""
    if not available() or group_density(weight) > GROUPS_PAY or not torch.isfinite(weight).all():
        return False
    return torch.equal(GroupMatrix.from_dense(weight).expand().to(weight.dtype), weight)


def _replace(
    model: nn.Module,
    name: str,
    layer: nn.Linear,
    format: str | None,
    asked: Asked,
    choices: Choices,
) -> LayerChoice:
    weight = layer.weight.detach()
    case = _case(weight, asked.batch)
    storages = _storages(weight, case, format, asked)
    seconds = choices.seconds(case, storages)
    best = fastest(seconds)
    before = after = weight.numel() * weight.element_size()
    if best.kind != "plain":
        packed = pack(weight, best.kind, best.format, best.group)
        after = packed.nbytes
        _tie(model, layer, packed)
        model.set_submodule(name, SparseLinear(packed, layer.bias, weight.dtype))
    times = {str(storage): seconds[storage] for storage in storages}
    return LayerChoice(name, (case.rows, case.columns), case.density, str(best), before, after, times)


def _tie(model: nn.Module, layer: nn.Linear, packed: PackedMatrix) -> None:
    """Let the embedding that shares the weight of a layer share the packed one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.weight is layer.weight:
            scale = float(getattr(module, "embed_scale", 1.0))
            model.set_submodule(name, PackedEmbedding(packed, layer.weight.dtype, scale))
