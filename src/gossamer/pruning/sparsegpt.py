"""SparseGPT: remove a weight, and let its neighbours make up for it.

Pruning a layer is a least-squares problem: keep ``WX`` with fewer weights. The optimal brain surgeon solves it one
weight at a time with the inverse Hessian, but every row would need an inverse of its own. SparseGPT visits the
columns in one order for all rows. Then one Cholesky factor holds every inverse that is needed, and the error of each
column is spread over the columns not yet visited, which is where the information still can go.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.calibration import Gram, Statistic, Statistics
from gossamer.core.patterns import NM, Pattern, Unstructured
from gossamer.core.quantization import Grid, Quantizer
from gossamer.core.registry import register
from gossamer.core.scores import surgeon
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target
from gossamer.errors import CalibrationError, ConfigurationError, SingularError
from gossamer.pruning.base import LayerwisePruner


@register("sparsegpt", paper="sparsegpt", when="after training")
@dataclass
class SparseGPT(LayerwisePruner):
    """Prune column by column and update the columns that follow with the inverse Hessian.

    Frantar & Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774, algorithm 1.

    Parameters
    ----------
    block_size
        Columns whose mask is chosen together, from one slab of rows × block.
    damping
        Share of the mean diagonal added to the Hessian; grows tenfold while the factorisation fails.
    order
        ``"natural"``, or ``"hessian"``: columns (N:M: groups) with the largest diagonal first.
    preserve_mask
        Keep weights that are zero already at zero, and count them.
    quantizer
        Round the weights that remain in the same sweep (joint sparsification and quantisation, section 3.5).
    update
        False chooses the mask only and leaves the remaining weights as they were (an ablation).
    """

    block_size: int = 128
    damping: float = 0.01
    order: str = "natural"
    preserve_mask: bool = False
    quantizer: Quantizer | None = None
    update: bool = True

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or self.damping <= 0:
            raise ConfigurationError(
                f"block_size is {self.block_size} and damping {self.damping}; "
                f"both must be positive, such as 128 and 0.01"
            )
        if self.order not in ("natural", "hessian"):
            raise ConfigurationError(f"order is {self.order!r}; it must be 'natural' or 'hessian'")
        assert isinstance(self.pattern, Pattern)
        if isinstance(self.pattern, NM) and self.pattern.dim == 1:
            if self.block_size % self.pattern.m:
                raise ConfigurationError(
                    f"block_size {self.block_size} must be a multiple of {self.pattern.m} for {self.pattern}"
                )
        elif not (isinstance(self.pattern, Unstructured) and self.pattern.scope in ("layer", "row")):
            raise ConfigurationError(
                f"sparsegpt takes unstructured (row or layer) and N:M patterns, not {self.pattern}"
            )

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        if stats is None:
            raise CalibrationError(f"no calibration token reached {target.name}; use more data or exclude it")
        if getattr(target.module, "groups", 1) != 1:
            raise ConfigurationError(
                f"{target.name} is a grouped convolution, whose groups see different inputs; exclude it"
            )
        matrix = target.matrix()
        group = self.pattern.m if isinstance(self.pattern, NM) else 1
        key = f"sparsegpt:{self.order}:{group}:{self.damping}"
        if key not in stats.derived:  # once for all layers that share the input
            if stats.tokens < stats[Gram].features:
                warnings.warn(
                    f"{target.name}: {stats.tokens} calibration tokens for {stats[Gram].features} features leave the "
                    f"Hessian without full rank; use at least as many tokens as features",
                    stacklevel=2,
                )
            stats.derived[key] = factor(stats[Gram].matrix, self.damping, self.order, group, target.name, stats.tokens)
        pruned, mask, _ = prune_columns(
            matrix.flatten(1),
            stats.derived[key],
            self.pattern,
            sparsity,
            block_size=self.block_size,
            fixed_zeros=(matrix.flatten(1) == 0) if self.preserve_mask else None,
            quantizer=self.quantizer,
            name=target.name,
        )
        mask = mask.view(matrix.shape)
        if self.update:
            matrix.copy_(pruned.view(matrix.shape))
        matrix.masked_fill_(~mask, 0)
        return mask


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
        ``(in,)`` bool: features that are always zero, whose weights do nothing.
    damping
        What was finally added, as a share of the mean diagonal.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damping: float


def factor(
    gram: Tensor, damping: float = 0.01, order: str = "natural", group: int = 1, name: str = "layer", tokens: int = 0
) -> Factor:
    """Factor the inverse of a damped Hessian; any positive multiple of XᵀX will do.

    If the factorisation fails, the damping grows tenfold up to 1 (in units of the mean diagonal), then everything is
    tried again in float64.

    Raises
    ------
    SingularError
        If even that fails; names the layer, the tokens and the condition.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    size = len(dead)
    columns = torch.arange(size, device=gram.device)
    if order == "hessian":
        mass = diagonal.view(-1, group).sum(1)
        columns = columns.view(-1, group)[mass.argsort(descending=True, stable=True)].flatten()
        hessian = hessian[columns][:, columns]
    mean = hessian.diagonal().mean()
    for dtype in (torch.float32, torch.float64):
        share = damping
        while share <= max(1.0, damping):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(share * mean)
            upper = _inverse_factor(damped)
            if upper is not None:
                return Factor(upper.float(), columns, dead[columns], share)
            share *= 10
    raise SingularError(
        f"{name}: the Hessian of {size} features from {tokens} tokens cannot be factored even with damping 1 "
        f"(diagonal from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}); use more or other data"
    )


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


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
    """One sweep of the optimal brain surgeon over a weight matrix.

    Parameters
    ----------
    weight
        ``(out, in)``, any floating dtype; not changed.
    factor
        From :func:`factor`.
    pattern, sparsity
        What to select, unless a mask is given.
    block_size
        Columns per slab.
    mask
        ``(out, in)`` bool: take this mask and only update.
    fixed_zeros
        ``(out, in)`` bool: weights that are to be dropped before any other.
    quantizer
        Round what remains before its error is formed.
    name
        For error messages.

    Returns
    -------
    weight : Tensor
        ``(out, in)`` float32, zero where pruned.
    mask : Tensor
        ``(out, in)`` bool.
    loss : float
        Σ (w − q)² / U_jj² / 2, the error that the sweep itself accounts for.
    """
    # transposed, in the order of the sweep: a column of the weight is then a contiguous row
    columns = weight.detach().float().t()[factor.order].contiguous()
    columns[factor.dead] = 0
    kept = mask.t()[factor.order] if mask is not None else None
    dropped_first = fixed_zeros.t()[factor.order] if fixed_zeros is not None else None
    result = torch.empty_like(columns)
    chosen = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    loss = 0.0
    row_grid = quantizer.fit(columns, dim=0) if quantizer and quantizer.group_size is None else None
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        slab = _Slab(columns[start:stop], factor.upper[start:stop, start:stop], pattern, sparsity, name)
        slab.sweep(
            kept[start:stop] if kept is not None else None,
            dropped_first[start:stop] if dropped_first is not None else None,
            quantizer,
            row_grid,
        )
        result[start:stop], chosen[start:stop] = slab.result, slab.kept
        loss += slab.loss
        if stop < len(columns):
            columns[stop:].addmm_(factor.upper[start:stop, stop:].t(), slab.error, alpha=-1)
    inverse = torch.empty_like(factor.order)
    inverse[factor.order] = torch.arange(len(inverse), device=inverse.device)
    return result[inverse].t().contiguous(), chosen[inverse].t().contiguous(), loss


class _Slab:
    """A block of columns, transposed: ``(block, out)``."""

    def __init__(self, columns: Tensor, upper: Tensor, pattern: Pattern, sparsity: Sparsity | None, name: str):
        self.columns, self.pattern, self.sparsity, self.name = columns, pattern, sparsity, name
        self.influence = upper.t().contiguous()  # row j: how the columns before j reach column j
        self.pivots = upper.diagonal()
        self.error = torch.zeros_like(columns)
        self.result = torch.empty_like(columns)
        self.kept = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
        self.loss = 0.0

    def sweep(
        self, kept: Tensor | None, dropped_first: Tensor | None, quantizer: Quantizer | None, grid: Grid | None
    ) -> None:
        if kept is not None:
            self.kept.copy_(kept)
        elif not isinstance(self.pattern, NM):
            self._choose(0, len(self.columns), dropped_first)
        pivots = self.pivots.tolist()
        for j in range(len(self.columns)):
            if kept is None and isinstance(self.pattern, NM) and j % self.pattern.m == 0:
                self._choose(j, j + self.pattern.m, dropped_first)
            if quantizer and quantizer.group_size and j % quantizer.group_size == 0:
                grid = quantizer.fit(self._current(j, min(j + quantizer.group_size, len(self.columns))), dim=0)
            # only now is the column needed: what the columns before it owe it is paid in one product
            column = torch.addmv(self.columns[j], self.error[:j].t(), self.influence[j, :j], alpha=-1)
            rounded = grid.round(column).squeeze(0) if grid else column
            torch.mul(rounded, self.kept[j], out=self.result[j])
            torch.sub(column, self.result[j], out=self.error[j])
            self.error[j] /= pivots[j]
        self.loss = float(self.error.square().sum(dtype=torch.float64)) / 2

    def _current(self, start: int, stop: int) -> Tensor:
        """Columns start … stop with all updates so far."""
        return self.columns[start:stop] - self.influence[start:stop, :start] @ self.error[:start]

    def _choose(self, start: int, stop: int, dropped_first: Tensor | None) -> None:
        score = surgeon(self._current(start, stop), self.pivots[start:stop].square().unsqueeze(1))
        if dropped_first is not None:
            score = score.masked_fill(dropped_first[start:stop], -1.0)
        chosen = self.pattern.select(score.t().contiguous(), self.sparsity, self.name)
        self.kept[start:stop] = chosen.t()
