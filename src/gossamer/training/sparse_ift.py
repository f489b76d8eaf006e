"""Sparse iso-FLOP transformations: spend what zeros save on a larger layer.

A layer with a share s of zeros costs 1 − s of a dense one. Instead of keeping the saving, the layer is made larger
until the cost is what it was: wider, or several beside each other, or two behind each other, or with a low-rank part.
It can represent more, and there are astronomically many masks to search; a method that moves its zeros while it trains
does the searching. s is the only hyper-parameter, and everything else of training stays as it was.

The saving is in operations. Hardware without sparse kernels computes the zeros too, and is then 1 / (1 − s) times
slower: :func:`isoflop_report` prints both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import ChannelGroup, find_channel_groups
from gossamer.core.randomness import generator_for
from gossamer.core.registry import register
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, ModelError, SparsityError, TargetError, check_sparsity
from gossamer.measure.flops import count_flops
from gossamer.models.blocks import find_stacks
from gossamer.training.isoflop_layers import (
    IsoFlopLayer,
    Norm,
    Phi,
    SparseDopedConv2d,
    SparseDopedLinear,
    SparseFactorizedConv2d,
    SparseFactorizedLinear,
    SparseParallelConv2d,
    SparseParallelLinear,
)
from gossamer.training.rigl import RigL
from gossamer.training.width import feed_forward_channels, record_feed_forwards, widen, widened

Kind = Literal["wide", "parallel", "factorized", "doped"]
_Method = TypeVar("_Method", bound=Sparsifier)
_LAYERS: dict[str, tuple[type[IsoFlopLayer], type[IsoFlopLayer]]] = {
    "parallel": (SparseParallelLinear, SparseParallelConv2d),
    "factorized": (SparseFactorizedLinear, SparseFactorizedConv2d),
    "doped": (SparseDopedLinear, SparseDopedConv2d),
}
KINDS = ("wide", *_LAYERS)


class IsoFlop(NamedTuple):
    """A larger model, and how sparse it has to be to cost what the model cost that it was made from.

    Attributes
    ----------
    model
        The larger model; nothing in it is zero yet.
    sparsities
        Name of each weight that has to become sparse → share of it that must be zero, an exact count over its size.
    """

    model: nn.Module
    sparsities: dict[str, Fraction]

    def method(self, kind: type[_Method] = RigL, **options: Any) -> _Method:  # type: ignore[assignment]
        """A method that makes exactly these weights exactly so sparse while they train.

        Parameters
        ----------
        kind
            :class:`~gossamer.training.rigl.RigL` as in the paper (a share of 0.3, every 100 steps, along a cosine to
            three quarters of training, which `end` has to say), or another with an allocation.
        options
            Its other hyper-parameters.
        """
        shapes = {target.name: tuple(target.shape) for target in self._targets()}
        zeros = sum(self.sparsities[name] * math.prod(shape) for name, shape in shapes.items())
        total = Fraction(zeros) / sum(map(math.prod, shapes.values()))
        return kind(
            sparsity=total,  # type: ignore[arg-type]
            include=tuple(name.rpartition(".")[0] for name in self.sparsities),
            heads=True,
            allocation=self.sparsities,  # type: ignore[call-arg]
            **options,
        )

    def _targets(self) -> list[Target]:
        return [target for target in find_targets(self.model, heads=True) if target.name in self.sparsities]


@register(
    "sparse-ift",
    paper="sparse-ift",
    when="layer",
    needs_data=False,
    criterion=("random",),
    allocation="uniform",
    aims=("quality",),
)
def sparse_ift(
    model: nn.Module,
    kind: Kind = "wide",
    sparsity: float = 0.75,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    stem: bool = False,
    heads: bool = False,
    phi: Phi = "norm_relu",
    norm: Norm | None = None,
    sparse_input_only: bool = False,
    groups: Iterable[ChannelGroup] | None = None,
    multiple: int = 1,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> IsoFlop:
    """Make a model larger so that, with a share of zeros, it costs what it costs now.

    Thangarasa, Saxena, Gupta & Lie, 2024, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
    Efficiency", arXiv 2303.11525. Where rounding makes a size larger or smaller than the formula says, the share of
    zeros follows, so that as many weights remain as there were. New weights are drawn at the scale of those that they
    replace.

    Parameters
    ----------
    model
        To be trained from nothing; stays as it is.
    kind
        ``wide``: every hidden width times ``√(1 / (1 − s))``, or the middle of a transformer's feed-forward layers
        times ``1 / (1 − s)``; ``parallel``, ``factorized``, ``doped``: see
        :mod:`gossamer.training.isoflop_layers`.
    sparsity
        s in [0, 1); at 0 the model stays what it is. The paper takes 0.5, 0.75 and 0.9.
    include, exclude
        Globs on the names of layers.
    stem, heads
        Whether the first layer, if it reads the input itself, and the last are sparse too. In the wide form they
        grow; where they stay dense the model costs more, unless `example` is given.
    phi
        Of the factorized form: what lies between its matrices, ``norm_relu``, ``norm`` or ``linear``.
    norm
        Of the parallel and factorized form: ``batch``, ``layer`` or ``none``. By default ``layer`` in a model that
        has layer norms, ``batch`` in others.
    sparse_input_only
        Of the factorized form: keep the second matrix dense.
    groups
        Of the wide form: channels that grow together. By default the middles of a transformer's feed-forward layers,
        or all hidden channels of a network that torch.fx can trace.
    multiple
        Of the wide form: widths are rounded to it.
    example
        Of the wide form: an input. Sparse layers then pay for what the dense ones have grown.
    seed
        Of the new weights.

    Returns
    -------
    IsoFlop
        The new model and the sparsities of its weights.

    Raises
    ------
    SparsityError
        If the sparsity is outside [0, 1), or cannot pay for what stays dense.
    TargetError
        If no layer is left to transform.
    ConfigurationError
        If a layer is too small for the form, or an option is unknown.
    ModelError
        If the channels of the model cannot be followed; build it with :func:`scale_width` then.

    Examples
    --------
    >>> transformed = sparse_ift(network, "wide", 0.75)  # doctest: +SKIP
    >>> training = transformed.method(end=750).attach(transformed.model, optimizer)  # doctest: +SKIP
    """
    check_sparsity(sparsity)
    if kind not in KINDS:
        raise ConfigurationError(f"kind is {kind!r}; use {', '.join(KINDS)}")
    if sparsity == 0:
        return IsoFlop(copy.deepcopy(model), {})
    if kind == "wide":
        return _wide(model, sparsity, include, exclude, stem, heads, groups, multiple, example, seed)
    options: dict[str, Any] = {"generator": generator_for("iso-FLOP weights", seed)}
    if kind != "doped":
        options["norm"] = norm or _usual_norm(model)
    if kind == "factorized":
        options |= {"phi": phi, "sparse_input_only": sparse_input_only}
    new = copy.deepcopy(model)
    sparsities = {}
    for target in _chosen(new, include, exclude, stem, heads):
        layer = _replace(new, target, kind, sparsity, options)
        sparsities |= {f"{target.module_name}.{part}": share for part, share in layer.sparsities.items()}
    return IsoFlop(new, sparsities)


def _chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str], stem: bool, heads: bool) -> list[Target]:
    first = next((m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))), None)
    found = [
        target
        for target in find_targets(model, include, exclude, heads=heads)
        if target.index is None and (stem or target.module is not first)
    ]
    if not found:
        raise TargetError("no layer to transform is left: stem and head stay dense; ask for them with stem and heads")
    return found


def _replace(model: nn.Module, target: Target, kind: str, sparsity: float, options: dict[str, Any]) -> IsoFlopLayer:
    dense = target.module
    if target.transposed:  # transformers' Conv1D
        dense = nn.Linear(target.shape[1], target.shape[0], target.module.bias is not None).to(target.parameter)
        dense.weight.data = target.matrix()
    if not isinstance(dense, nn.Linear | nn.Conv2d):
        raise ConfigurationError(f"{target.name} is of a {type(dense).__name__}; only linear layers and Conv2d have it")
    try:
        layer = _LAYERS[kind][isinstance(dense, nn.Conv2d)].replacing(dense, sparsity, **options)
    except ConfigurationError as error:
        raise type(error)(f"{target.module_name}: {error}") from None
    for name in (target.name, *target.aliases):
        parent, _, last = name.rpartition(".")[0].rpartition(".")
        if getattr(model.get_submodule(parent), last) is not target.module:
            raise ModelError(f"{target.name} and {name} are one tied weight of two layers; exclude them")
        setattr(model.get_submodule(parent), last, layer)
    return layer


def _usual_norm(model: nn.Module) -> Norm:
    names = {type(module).__name__ for module in model.modules()}
    return "layer" if any(name.endswith(("LayerNorm", "RMSNorm")) for name in names) else "batch"


def _wide(
    model: nn.Module,
    sparsity: float,
    include: Sequence[str],
    exclude: Sequence[str],
    stem: bool,
    heads: bool,
    groups: Iterable[ChannelGroup] | None,
    multiple: int,
    example: Any,
    seed: int,
) -> IsoFlop:
    growth = 1 / (1 - sparsity)
    middles = _middles(model, include, exclude) if groups is None and find_stacks(model) else []
    if middles:  # only one side of each matrix grows
        wide = widen(model, middles, growth, multiple, seed)
        record_feed_forwards(model, wide)
    else:
        wide = widen(model, find_channel_groups(model) if groups is None else groups, math.sqrt(growth), multiple, seed)
    sparse = {target.name for target in _chosen(wide, include, exclude, stem, heads)}
    return IsoFlop(wide, _balance(model, wide, sparse, example, seed))


def _middles(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[ChannelGroup]:
    """Of the feed-forward layers that hold a layer of that name; none in a model of another kind."""
    names = {target.name for target in find_targets(model, include, exclude)}
    try:
        return [each for each in feed_forward_channels(model) if any(axis.name in names for axis in each.axes)]
    except TargetError:
        return []


def scale_width(
    build: Callable[[int], nn.Module],
    width: int,
    sparsity: float = 0.75,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    stem: bool = False,
    heads: bool = False,
    multiple: int = 1,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> IsoFlop:
    """The wide form of a model that a function builds for any width.

    Parameters
    ----------
    build
        Width → model, with layers of the same names for every width.
    width
        Of the dense model.
    sparsity, include, exclude, stem, heads, multiple, example, seed
        As of :func:`sparse_ift`.

    Raises
    ------
    SparsityError
        If the sparsity is outside [0, 1), or cannot pay for what stays dense.
    TargetError
        If no layer is left to transform.
    ConfigurationError
        If a rounded width or sparsity is impossible.
    """
    check_sparsity(sparsity)
    dense, wide = build(width), build(widened(width, math.sqrt(1 / (1 - sparsity)), multiple))
    if sparsity == 0:
        return IsoFlop(dense, {})
    sparse = {target.name for target in _chosen(wide, include, exclude, stem, heads)}
    return IsoFlop(wide, _balance(dense, wide, sparse, example, seed))


def _balance(model: nn.Module, wide: nn.Module, sparse: set[str], example: Any, seed: int) -> dict[str, Fraction]:
    """Shares of zeros that leave as many weights as there were, less what layers that grew and stay dense cost."""
    old = {target.name: target for target in find_targets(model, heads=True)}
    grown = [each for each in find_targets(wide, heads=True) if each.shape != old[each.name].shape]
    if not any(each.name in sparse for each in grown):
        raise TargetError("no layer that grows is left to be sparse: stem and head stay dense; ask for stem and heads")
    uses = _uses(model, example)
    paid, budget = 0, 0
    for each in grown:
        before = old[each.name].shape.numel()
        if each.name in sparse:
            budget += before * uses.get(each.module_name, 0)
        else:
            paid += (each.shape.numel() - before) * uses.get(each.module_name, 0)
    if paid and paid >= budget:
        raise SparsityError(
            f"the layers that stay dense grow by {paid} operations, and the sparse ones have {budget}; "
            f"let stem or heads be sparse too, or take a lower sparsity"
        )
    share = 1 - Fraction(paid, budget) if paid else Fraction(1)
    generator = generator_for("iso-FLOP weights", seed)
    sparsities = {}
    for each in grown:
        before, size = old[each.name], each.shape.numel()
        kept = round(share * before.shape.numel()) if each.name in sparse else size
        _rescale(each, before, kept / size, generator)
        if each.name in sparse:
            sparsities[each.name] = Fraction(size - kept, size)
    return sparsities


def _uses(model: nn.Module, example: Any) -> dict[str, int]:
    """Layer → how often each of its weights is used on an input; nothing without one."""
    if example is None:
        return {}
    sizes = {target.module_name: target.shape.numel() for target in find_targets(model, heads=True)}
    return {row.name: row.dense // sizes[row.name] for row in count_flops(model, example).layers if row.name in sizes}


@torch.no_grad()
def _rescale(new: Target, old: Target, density: float, generator: torch.Generator) -> None:
    """Draw a weight so that each output has the variance it had, from as many inputs as it is going to have."""
    inputs = old.shape[1:].numel() / (density * new.shape[1:].numel())
    scale = float(old.matrix().float().std(correction=0)) * math.sqrt(inputs)
    new.matrix().copy_(torch.empty(new.shape).normal_(0, scale, generator=generator))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser that decays matrices, but not vectors, and not what :func:`folded_decay` decays.

    Parameters
    ----------
    model
        With layers of :mod:`gossamer.training.isoflop_layers`.
    weight_decay
        Of the first group; 0 of the second.
    """
    folded = {id(factor) for layer in _folding(model) for factor in layer.factors()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in folded]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def folded_decay(model: nn.Module) -> Tensor:
    """``½ Σ ‖effective weight‖²`` over the layers that have one: times the weight decay, to be added to the loss.

    A factorized layer with something nonlinear between its matrices has none; there the matrices decay as usual.
    """
    norms = [layer.effective_weight().square().sum() for layer in _folding(model)]
    return 0.5 * torch.stack(norms).sum() if norms else torch.zeros(())


def _folding(model: nn.Module) -> list[IsoFlopLayer]:
    return [module for module in model.modules() if isinstance(module, IsoFlopLayer) and module.folds]
