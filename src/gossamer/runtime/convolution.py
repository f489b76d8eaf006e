"""Run a convolutional network with sparse kernels where they are faster, and with torch's own everywhere else.

Elsen, Dukhan, Gale and Simonyan, 2020, arXiv 1911.09723, section 3: only 1 × 1 convolutions are sparse, and whole
kernels for groups of channels (Xu et al., 2023, arXiv 2310.19509); the first convolution and depthwise ones stay dense,
but run in the same layout where that is faster, and a sparse classifier is packed too. Everything keeps the usual
layout of images, so that nothing is converted in between; normalisation is folded into the convolutions before it, and
a ReLU behind one becomes part of it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError, ModelError, TargetError
from gossamer.kernels.images import BLOCKS
from gossamer.kernels.native import available
from gossamer.measure import interleave
from gossamer.runtime.convolution_layers import (
    FORMATS,
    DepthwiseConv2d,
    SparseConv2d,
    is_depthwise,
    natural_block,
    packable,
)
from gossamer.storage.layers import SparseLinear

_FEW_CHANNELS = 4
_FEW_ROWS = 4  # the smallest block of a linear layer that has a kernel

_BOUNDS: dict[Any, tuple[float, float]] = {
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
    nn.functional.relu: (0.0, math.inf),
    nn.functional.relu6: (0.0, 6.0),
    torch.relu: (0.0, math.inf),
}


@dataclass(frozen=True)
class ConvolutionChoice:
    """What became of one convolution.

    Attributes
    ----------
    name
        Of the module.
    shape
        Of its weight.
    input
        Shape of what it read when it was measured.
    density
        Share of its weights that are not zero.
    kernel
        What runs it: ``"dense"`` is torch, ``"depthwise"`` our own, ``"blocks of n"`` a :class:`SparseConv2d`, if need
        be with the format of its weights. Linear layers run as the kind of a
        :class:`~gossamer.storage.layers.SparseLinear`: ``"bitmask"``, ``"csr"`` or ``"blocks16"``, for instance.
    seconds
        Kernel → seconds, as measured.
    """

    name: str
    shape: tuple[int, ...]
    input: tuple[int, ...]
    density: float
    kernel: str
    seconds: dict[str, float]


@dataclass
class ConvolutionReport:
    """What :func:`compress_convolutions` did.

    Attributes
    ----------
    model
        The network for inference.
    layers
        One entry for each convolution, and each sparse linear layer, that could have been replaced.
    """

    model: nn.Module
    layers: list[ConvolutionChoice] = field(default_factory=list)

    @property
    def sparse(self) -> int:
        """How many run with less than all weights."""
        return sum(layer.kernel != "dense" and layer.density < 1 for layer in self.layers)

    def __str__(self) -> str:
        kernels = Counter(layer.kernel for layer in self.layers)
        return ", ".join(f"{count} × {kernel}" for kernel, count in kernels.most_common())


def compress_convolutions(
    model: nn.Module,
    example: Tensor,
    *,
    formats: Sequence[str] = ("float32",),
    smallest_sparsity: float = 0.25,
    measured: bool = True,
    measure: Callable[[dict[str, Callable[[], object]]], dict[str, float]] | None = None,
    progress: bool = False,
) -> ConvolutionReport:
    """Make the network that runs fastest: folded normalisation, and sparse kernels where they measured faster.

    Parameters
    ----------
    model
        A convolutional network that torch.fx can trace; it is not changed.
    example
        Images as they will come, ``(batch, channels, height, width)``; every layer is measured on what it reads then.
    formats
        What packed weights may become: of ``float32``, ``float16`` and ``int8``. The last two are not exact, and with
        ``int8`` the inputs of a convolution are rounded as well. If nothing is measured, the first is taken.
    smallest_sparsity
        Layers with a smaller share of zeros are left alone, but for a first one that reads at most four
        channels: if measured, it may run dense in blocks of 16.
    measured
        Whether a convolution is replaced only where that is faster here; otherwise all depthwise ones and all that are
        sparse enough are.
    measure
        Replaces the measurement, ``{name: run} -> {name: seconds}``.
    progress
        Whether to show a bar.

    Raises
    ------
    ModelError
        If the model cannot be traced.
    TargetError
        If it has no convolution that could be replaced.
    ConfigurationError
        If a format is unknown.
    """
    if not formats or not set(formats) <= set(FORMATS):
        raise ConfigurationError(f"formats are {', '.join(formats) or 'none'}; choose from {', '.join(FORMATS)}")
    traced = fold_normalisation(model)
    clamps = _absorb_clamps(traced)
    inputs = _inputs(traced, example)
    candidates = {name: traced.get_submodule(name) for name in inputs}
    if not any(isinstance(module, nn.Conv2d) for module in candidates.values()):
        raise TargetError("the example reaches no convolution over all channels, or over one, padded with zeros")
    timer = _interleaved if measure is None else measure
    report = ConvolutionReport(traced)
    for name, layer in track(list(candidates.items()), "choosing kernels", enabled=progress):
        weight = cast("Tensor", layer.weight)
        density = float(torch.count_nonzero(weight)) / weight.numel()
        bounds, sparse = clamps.get(name), 1 - density >= smallest_sparsity
        if isinstance(layer, nn.Linear) and not sparse:
            continue
        options = _options(layer, sparse, bounds, measured, formats)
        seconds = _measure(layer, options, bounds, inputs[name], timer) if measured and options else {}
        kernel = min(seconds, key=seconds.__getitem__) if seconds else next(iter(options), "dense")
        traced.set_submodule(name, options.get(kernel) or _dense(layer, bounds))
        sizes = tuple(weight.shape), tuple(inputs[name].shape)
        report.layers.append(ConvolutionChoice(name, *sizes, density, kernel, seconds))
    return report


def fold_normalisation(model: nn.Module) -> fx.GraphModule:
    """Trace a copy of a network and fold every normalisation into the convolution before it.

    Raises
    ------
    ModelError
        If it cannot be traced.
    """
    copied = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(copied)
    except Exception as error:  # a trace runs the model's own code, which may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the model cannot be traced by torch.fx ({reason}); avoid branches on tensors") from error
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, nn.BatchNorm2d) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = modules[str(before.target)]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _absorb_clamps(traced: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Take ReLU and ReLU6 behind convolutions out of the graph; name of the convolution → its bounds."""
    modules = dict(traced.named_modules())
    used = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    found: dict[str, tuple[float, float]] = {}
    for node in list(traced.graph.nodes):
        what = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        bounds = _BOUNDS.get(what)
        before = node.args[0] if bounds is not None and node.args else None
        if bounds is None or not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        name = str(before.target)
        if _replaceable(modules[name]) and used.count(name) == 1 and name not in found:
            found[name] = bounds
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return found


def _inputs(traced: fx.GraphModule, example: Tensor) -> dict[str, Tensor]:
    """What each convolution and linear layer reads, in the order of the modules."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0]

        return hook

    layers = {name: m for name, m in traced.named_modules() if _replaceable(m) or type(m) is nn.Linear}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            traced(example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in layers if name in found}


def _replaceable(module: nn.Module) -> bool:
    return packable(module) or is_depthwise(module)


def _options(
    layer: nn.Module, sparse: bool, bounds: tuple[float, float] | None, measured: bool, formats: Sequence[str]
) -> dict[str, nn.Module]:
    """What could stand for a layer: blocks of its own size and, if they are measured, single channels."""
    if not available():
        return {}
    if isinstance(layer, nn.Linear):
        natural = natural_block(layer.weight)
        named = f"blocks{natural}" if natural >= _FEW_ROWS else "bitmask"
        storages = dict.fromkeys([named, "bitmask", "csr"] if measured else [named])
        return {name: SparseLinear.from_linear(layer, name) for name in storages}
    if is_depthwise(layer):
        return {"depthwise": DepthwiseConv2d.from_conv(layer, bounds)}
    conv = cast("nn.Conv2d", layer)
    blocks, kinds = [], list(formats) if measured else [formats[0]]
    if sparse and conv.in_channels > 3:
        natural = natural_block(conv.weight)
        blocks = sorted({1, natural}) if measured else [natural]
    elif measured and conv.in_channels <= _FEW_CHANNELS:
        blocks = [BLOCKS[-1]]
    return {
        f"blocks of {block}" + (f" in {kind}" if kind != "float32" else ""): SparseConv2d.from_conv(
            conv, block, bounds, kind
        )
        for block in blocks
        for kind in kinds
    }


def _measure(
    layer: nn.Module,
    options: Mapping[str, nn.Module],
    bounds: tuple[float, float] | None,
    x: Tensor,
    timer: Callable[[dict[str, Callable[[], object]]], dict[str, float]],
) -> dict[str, float]:
    runs: dict[str, Callable[[], object]] = {"dense": partial(_dense(layer, bounds), x)}
    runs |= {name: partial(option, x) for name, option in options.items()}
    with torch.no_grad():
        return timer(runs)


def _dense(layer: nn.Module, bounds: tuple[float, float] | None) -> nn.Module:
    """Torch's own layer, with its clamp behind it again."""
    if bounds is None:
        return layer
    clamp = nn.Hardtanh(*bounds, inplace=True) if math.isfinite(bounds[1]) else nn.ReLU(inplace=True)
    return nn.Sequential(layer, clamp)


def _interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    return {name: timing.median for name, timing in interleave(runs, repeats=7).items()}
