"""The sweep of the optimal brain surgeon over the columns of a layer, and the factor of the Hessian that it needs.

Everything is kept transposed, so that a column of a weight is contiguous, and layers that receive the same input are
swept side by side. Within a panel of eight columns each error goes on to the next ones at once; between panels and
between blocks the errors of many columns go on together, in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.patterns import NM, Pattern, Unstructured
from gossamer.core.quantization import Grid, Quantizer
from gossamer.core.scores import surgeon
from gossamer.core.selection import Sparsity, dropped_count, keep_highest
from gossamer.errors import ConfigurationError, NonFiniteError, SingularError

_SMALL = 96  # features: from here on halving a triangle costs more than it saves
_SWAPPED_AT_ONCE = 1 << 18  # numbers
_PANEL = 8  # columns: few enough that a step stays below what torch would share out among threads
ORDERS = ("natural", "hessian")


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of an inverse Hessian, UᵀU = H⁻¹, for columns in a given order.

    Attributes
    ----------
    upper
        ``(in, in)`` float32.
    order
        ``(in,)``: position → column.
    dead
        ``(in,)`` bool, by position: features that are always zero, whose weights do nothing.
    damping
        What was finally added, as a share of the mean diagonal.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damping: float


def factor(
    gram: Tensor | Callable[[], Tensor],
    damping: float = 0.01,
    order: str = "natural",
    group: int = 1,
    name: str = "layer",
    tokens: int = 0,
) -> Factor:
    """Factor the inverse of a damped Hessian; every positive multiple of XᵀX gives the same result, up to its scale.

    Read from the last row and column to the first, H = RRᵀ with R upper triangular, and U = R⁻¹: one factorisation and
    one triangular inverse, where the paper's code takes two factorisations and a full inverse, which can fail on the
    way. If the factorisation fails, the damping grows tenfold up to 1, then everything is tried again in float64.

    Parameters
    ----------
    gram
        ``(in, in)``, symmetric; not changed. Or a function that makes it, which is called for every attempt and whose
        result is worked on in place: then no second matrix of that size is held.
    damping
        Share of the mean diagonal (of the features that are not dead) that is added to the diagonal; above 0.
    order
        ``"natural"``, or ``"hessian"``: largest diagonal first.
    group
        Adjacent columns that stay together when they are ordered; must divide the features.
    name, tokens
        For error messages.

    Raises
    ------
    SingularError
        If even that fails; names the layer, the tokens, and the condition.
    NonFiniteError
        If the matrix holds NaN or infinity.
    ConfigurationError
        If the damping is not positive, or there is no such order.
    """
    if not damping > 0 or order not in ORDERS:
        raise ConfigurationError(
            f"damping is {damping} and order {order!r}; give a positive number, and one of {', '.join(ORDERS)}"
        )
    make = gram if callable(gram) else gram.clone
    work = make().float()
    if not torch.isfinite(work.sum()) and not torch.isfinite(work).all():
        raise NonFiniteError(f"{name}: the Hessian holds NaN or infinity; look for them in the calibration data")
    diagonal = work.diagonal().clone()
    dead = diagonal == 0
    # a dead feature meets no other one: what stands on its diagonal only has to be positive
    mean = float(diagonal.sum() / (~dead).sum()) if not dead.all() else 1.0
    columns = torch.arange(len(dead), device=work.device)
    if order == "hessian":
        mass = diagonal.view(-1, group).sum(1)
        columns = columns.view(-1, group)[mass.argsort(descending=True, stable=True)].flatten()
        dead = dead[columns]
    for attempt, (dtype, share) in enumerate(_attempts(damping)):
        if attempt:  # what has been factored in place is gone
            work = make().float()
        work = work.to(dtype)
        work = work[columns][:, columns] if order == "hessian" else work.contiguous()
        _reverse_(work)
        work.diagonal().add_(share * mean).masked_fill_(dead.flip(0), mean)
        if _inverse_factor_(work):
            return Factor(work.mT.float(), columns, dead, share)
    values = torch.linalg.eigvalsh(make().double())
    raise SingularError(
        f"{name}: the Hessian of {len(dead)} features from {tokens} tokens cannot be factored even with damping 1 "
        f"(eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}); use more or other data"
    )


def _attempts(damping: float) -> Iterator[tuple[torch.dtype, float]]:
    for dtype in (torch.float32, torch.float64):
        share = damping
        while share <= max(1.0, damping):
            yield dtype, share
            share *= 10


def _reverse_(matrix: Tensor) -> None:
    """Turn a contiguous square matrix around in place: the last row and column become the first."""
    flat, length = matrix.view(-1), matrix.numel()
    for start in range(0, length // 2, _SWAPPED_AT_ONCE):
        stop = min(start + _SWAPPED_AT_ONCE, length // 2)
        front, back = flat[start:stop], flat[length - stop : length - start]
        turned = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(turned)


def _inverse_factor_(backwards: Tensor) -> bool:
    """Replace a Hessian that is given last feature first by Uᵀ; False if it cannot be factored.

    Libraries of linear algebra go down columns: the transposed view, which is the same matrix, is theirs to overwrite.
    """
    lower = backwards.mT
    failed = torch.zeros((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if failed:
        return False
    _invert_lower_(lower)
    _reverse_(backwards)
    return bool(torch.isfinite(lower.sum()))


def _invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves."""
    half = len(lower) // 2
    if half < _SMALL:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(first)
    _invert_lower_(second)
    torch.mm(second, below @ first, out=below).neg_()


@dataclass(frozen=True)
class Layer:
    """One of the weight matrices that are swept together.

    Attributes
    ----------
    weight
        ``(out, in)``, any floating dtype; not changed.
    sparsity
        How much of it goes, where the pattern leaves that open.
    mask
        ``(out, in)`` bool: take this mask and only update. All layers of a sweep have one, or none has.
    fixed_zeros
        ``(out, in)`` bool: weights that are zero and stay so. They are dropped before any other, and count.
    name
        For error messages.
    """

    weight: Tensor
    sparsity: Sparsity | None = None
    mask: Tensor | None = None
    fixed_zeros: Tensor | None = None
    name: str = "weight"


@dataclass(frozen=True)
class Swept:
    """What a sweep made of one layer.

    Attributes
    ----------
    weight
        ``(out, in)`` float32, zero where pruned.
    mask
        ``(out, in)`` bool, True where kept.
    loss
        Σ (w − q)² / U_jj² / 2, the error that the sweep itself accounts for.
    """

    weight: Tensor
    mask: Tensor
    loss: float


def prune_columns(
    weight: Tensor,
    factor: Factor,
    pattern: Pattern,
    sparsity: Sparsity | None = None,
    *,
    block_size: int = 128,
    mask: Tensor | None = None,
    fixed_zeros: Tensor | None = None,
    quantizer: Quantizer | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor, float]:
    """Sweep one weight matrix; see :class:`Layer` for the parameters and :class:`Swept` for what comes back."""
    layer = Layer(weight, sparsity, mask, fixed_zeros, name)
    (swept,) = sweep([layer], factor, pattern, block_size=block_size, quantizer=quantizer)
    return swept.weight, swept.mask, swept.loss


def sweep(
    layers: Sequence[Layer],
    factor: Factor,
    pattern: Pattern,
    *,
    block_size: int = 128,
    quantizer: Quantizer | None = None,
) -> list[Swept]:
    """Prune layers that receive the same input, column by column, and update the columns that follow.

    Frantar & Alistarh, 2023, arXiv 2301.00774, algorithm 1. Layers do not influence each other.

    Parameters
    ----------
    layers
        With as many columns as the factor.
    factor
        From :func:`factor`.
    pattern
        Unstructured by row or layer, or N:M along the input.
    block_size
        Columns whose mask is chosen together, from a slab of rows × block.
    quantizer
        Round what remains before its error is formed.

    Raises
    ------
    ConfigurationError
        If block, pattern and quantizer do not fit together, or only some layers have a mask.
    SparsityError
        If a sparsity is missing, or contradicts the pattern.
    """
    check_blocks(pattern, block_size, quantizer)
    for layer in layers:
        if layer.mask is None:
            pattern.resolve(layer.sparsity)
    running = _Sweep(layers, factor, pattern, quantizer)
    for start in range(0, len(factor.order), block_size):
        running.block(start, min(start + block_size, len(factor.order)))
    return running.results()


def check_blocks(pattern: Pattern, block_size: int, quantizer: Quantizer | None) -> None:
    """Raise :class:`ConfigurationError` unless the blocks hold whole N:M and quantisation groups."""
    if isinstance(pattern, NM) and pattern.dim == 1:
        if block_size % pattern.m:
            raise ConfigurationError(f"block_size {block_size} must be a multiple of {pattern.m} for {pattern}")
    elif not (isinstance(pattern, Unstructured) and pattern.scope in ("layer", "row")):
        raise ConfigurationError(f"sparsegpt takes unstructured (row or layer) and N:M patterns, not {pattern}")
    group = quantizer.group_size if quantizer else None
    if group and (block_size % group or (isinstance(pattern, NM) and group % pattern.m)):
        raise ConfigurationError(
            f"group_size is {group}; it must divide block_size {block_size}, and hold whole groups of {pattern}"
        )


def _array(tensor: Tensor) -> Any:
    """The same memory seen by numpy, whose calls cost a third of torch's: with little to do in each, that is most."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class _Sweep:
    """Layers side by side: ``(in, out of all layers)``, columns in the order of the sweep."""

    def __init__(self, layers: Sequence[Layer], factor: Factor, pattern: Pattern, quantizer: Quantizer | None):
        self.layers, self.factor, self.pattern, self.quantizer = layers, factor, pattern, quantizer
        self.natural = bool((factor.order.diff() == 1).all())
        self.sizes = [len(layer.weight) for layer in layers]
        self.columns = self._beside([layer.weight for layer in layers], torch.float32)
        self.columns[factor.dead] = 0
        masks = [layer.mask for layer in layers if layer.mask is not None]
        self.chosen = len(masks) == len(layers)
        if masks and not self.chosen:
            raise ConfigurationError("only some of the layers have a mask; give one to all of them, or to none")
        self.kept = self._beside(masks, torch.bool) if masks else torch.ones_like(self.columns, dtype=torch.bool)
        self.zeros: Tensor | None = None
        if any(layer.fixed_zeros is not None for layer in layers):
            zeros = [torch.zeros_like(r.weight) if r.fixed_zeros is None else r.fixed_zeros for r in layers]
            self.zeros = self._beside(zeros, torch.bool)
        self.losses = [0.0] * len(layers)
        group = pattern.m if isinstance(pattern, NM) else 1
        self.panel = max(1, _PANEL // group) * group
        self.grid: Grid | None = None
        if quantizer and quantizer.group_size:
            self.panel = quantizer.group_size
        elif quantizer:
            self.grid = quantizer.fit(self.columns, dim=0)

    def _beside(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        order = self.factor.order
        whole = torch.empty(len(order), sum(self.sizes), dtype=dtype, device=order.device)
        for part, matrix in zip(whole.split(self.sizes, dim=1), matrices):
            part.copy_(matrix.detach().t())
        return whole if self.natural else whole[order]

    def block(self, start: int, stop: int) -> None:
        """Choose and sweep the columns start … stop, and let all the later ones make up for it."""
        upper = self.factor.upper[start:stop]
        self.influence = -upper[:, start:stop].contiguous()
        self.pivots = upper.diagonal(start).unsqueeze(1)
        self.slab, self.slab_kept = self.columns[start:stop], self.kept[start:stop]
        self.error, self.share = torch.empty_like(self.slab), torch.empty_like(self.slab)
        if self.chosen or not isinstance(self.pattern, NM):
            self._choose(start, start, stop)
        for first in range(0, stop - start, self.panel):
            self._sweep_panel(start, first, min(first + self.panel, stop - start))
        if stop < len(self.columns):
            self.columns[stop:].addmm_(upper[:, stop:].t(), self.error, alpha=-1)
        self.slab.mul_(self.slab_kept)
        for index, error in enumerate(self.error.split(self.sizes, dim=1)):
            self.losses[index] += float(error.square().sum(dtype=torch.float64)) / 2

    def _sweep_panel(self, start: int, first: int, last: int) -> None:
        slab, error, influence = self.slab, self.error, self.influence
        if first:  # what the panels before it owe this one is paid in one product
            slab[first:last].addmm_(influence[:first, first:last].t(), error[:first])
        if self.quantizer and self.quantizer.group_size:
            self.grid = self.quantizer.fit(slab[first:last], dim=0)
        columns, errors, share, onward = map(_array, (slab, error, self.share, influence))
        for j in range(first, last):
            if isinstance(self.pattern, NM) and not self.chosen and (j - first) % self.pattern.m == 0:
                self._choose(start, start + j, start + j + self.pattern.m)
            if self.grid:
                rounded = self.grid.round(slab[j]).squeeze(0) * self.slab_kept[j]
                error[j] = (slab[j] - rounded) / self.pivots[j]
                slab[j] = rounded
            else:
                errors[j] = columns[j] * share[j]
            if j + 1 < last:
                columns[j + 1 : last] += onward[j, j + 1 : last, None] * errors[j]

    def _choose(self, start: int, first: int, last: int) -> None:
        """Choose among the columns first … last, which have all their updates by now."""
        kept, pivots = self.kept[first:last], self.pivots[first - start : last - start]
        if not self.chosen:
            score = surgeon(self.columns[first:last], pivots.square())
            if self.zeros is not None:
                score.masked_fill_(self.zeros[first:last], -1.0)
            kept.copy_(self._select(score.t().contiguous(), first, last).t())
        if self.zeros is not None:
            kept &= ~self.zeros[first:last]
        torch.div(~kept, pivots, out=self.share[first - start : last - start])

    def _select(self, scores: Tensor, first: int, last: int) -> Tensor:
        """Mask ``(out of all layers, columns)`` from scores of the same shape."""
        if isinstance(self.pattern, NM):
            return self.pattern.select(scores, name=", ".join(layer.name for layer in self.layers))
        masks = []
        for layer, part in zip(self.layers, scores.split(self.sizes)):
            sparsity = self.pattern.resolve(layer.sparsity)
            competing = part if self._by_row else part.reshape(1, -1)
            width = competing.shape[1] // (last - first)
            # counted from the first column on, so that what is rounded off in one slab goes in a later one
            dropped = dropped_count(last * width, sparsity) - dropped_count(first * width, sparsity)
            masks.append(keep_highest(competing, dropped, layer.name).view(part.shape))
        return torch.cat(masks)

    @property
    def _by_row(self) -> bool:
        return isinstance(self.pattern, Unstructured) and self.pattern.scope == "row"

    def results(self) -> list[Swept]:
        """What became of each layer, its columns in their own order again."""
        if not self.natural:
            place = torch.argsort(self.factor.order)
            self.columns, self.kept = self.columns[place], self.kept[place]
        parts = zip(self.columns.split(self.sizes, dim=1), self.kept.split(self.sizes, dim=1), self.losses)
        return [Swept(weight.t().contiguous(), kept.t().contiguous(), loss) for weight, kept, loss in parts]
