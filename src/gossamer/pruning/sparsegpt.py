"""SparseGPT: remove a weight, and let its neighbours make up for it.

Pruning a layer is a least-squares problem: keep ``WX`` with fewer weights. The optimal brain surgeon solves it one
weight at a time with the inverse Hessian, but every row would need an inverse of its own. SparseGPT visits the
columns in one order for all rows. Then one Cholesky factor holds every inverse that is needed, and the error of each
column is spread over the columns not yet visited, which is where the information still can go.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core.calibration import Gram, Statistic, Statistics
from gossamer.core.patterns import NM, Pattern
from gossamer.core.quantization import Quantizer
from gossamer.core.registry import register
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.pruning.base import LayerwisePruner
from gossamer.pruning.column_sweep import ORDERS, Factor, Layer, Swept, check_blocks, factor, sweep


@register(
    "sparsegpt", paper="sparsegpt", when="after training", criterion=("second order",), patterns=("unstructured", "n:m")
)
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
        Keep weights that are zero already at zero, and count them. Where there are more of them than the sparsity asks
        for, nothing else is pruned.
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
        if self.order not in ORDERS:
            raise ConfigurationError(f"order is {self.order!r}; it must be 'natural' or 'hessian'")
        assert isinstance(self.pattern, Pattern)
        check_blocks(self.pattern, self.block_size, self.quantizer)

    def prepare_layers(  # noqa: D102
        self, targets: Sequence[Target], stats: Statistics | None, sparsities: Sequence[Sparsity]
    ) -> None:
        if stats is not None:
            for target, swept in zip(targets, self._sweep(targets, stats, sparsities)):
                stats.derived[f"swept:{target.name}"] = swept

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        if stats is None:
            raise CalibrationError(f"no calibration token reached {target.name}; use more data or exclude it")
        swept = stats.derived.pop(f"swept:{target.name}", None)
        if swept is None:
            (swept,) = self._sweep([target], stats, [sparsity])
        matrix = target.matrix()
        mask = swept.mask.view(matrix.shape)
        if self.update:
            matrix.copy_(swept.weight.view(matrix.shape))
        matrix.masked_fill_(~mask, 0)
        return mask

    def _sweep(self, targets: Sequence[Target], stats: Statistics, sparsities: Sequence[Sparsity]) -> list[Swept]:
        for target in targets:
            if getattr(target.module, "groups", 1) != 1:
                raise ConfigurationError(
                    f"{target.name} is a grouped convolution, whose groups see different inputs; exclude it"
                )
        layers = []
        for target, sparsity in zip(targets, sparsities):
            weight = target.matrix().flatten(1)
            zeros = weight == 0 if self.preserve_mask else None
            layers.append(Layer(weight, sparsity, fixed_zeros=zeros, name=target.name))
        factored = self._factor(targets[0].name, stats)
        return sweep(layers, factored, self.pattern, block_size=self.block_size, quantizer=self.quantizer)

    def _factor(self, name: str, stats: Statistics) -> Factor:
        """The factor for an input, computed once for all layers that share it."""
        group = self.pattern.m if isinstance(self.pattern, NM) else 1
        key = f"sparsegpt:{self.order}:{group}:{self.damping}"
        if key not in stats.derived:
            gram = stats[Gram]
            if gram.tokens < gram.features:
                warnings.warn(
                    f"{name}: {gram.tokens} calibration tokens for {gram.features} features leave the "
                    f"Hessian without full rank; use at least as many tokens as features",
                    stacklevel=2,
                )
            stats.derived[key] = factor(lambda: gram.matrix, self.damping, self.order, group, name, gram.tokens)
        return stats.derived[key]
