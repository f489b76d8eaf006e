"""SPDF: pretrain under a fixed random mask, then let every weight learn for the task.

Pretraining is where the operations go, and it forgives a lot: with three quarters of the weights of a large model
missing, chosen by nothing but chance, it still learns what later tasks build on. What it lacks is capacity, and that
comes back when the mask is dropped: the missing weights start from zero, and fine-tuning, which is short, is dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.allocation import ALLOCATIONS, allocate
from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.selection import keep_highest
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError

_FUSED = ("*qkv*", "*.c_attn", "*.query_key_value")  # queries, keys and values in one matrix
_INTERLEAVED = "*.query_key_value"  # … head by head
_SMALL = 0.1  # of the spread of the weights that were trained


@register(
    "spdf",
    paper="spdf",
    when="during training",
    needs_data=False,
    path=("sparse-to-dense",),
    topology="static",
    criterion=("random",),
    allocation="uniform",
    aims=("training",),
)
@dataclass(kw_only=True)
class SparsePretraining(Sparsifier):
    """Draw a mask once, train under it, then :meth:`densify` and fine-tune every weight.

    Thangarasa et al., 2023, "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models", arXiv
    2303.10464. All matrices of the blocks get the same sparsity; embeddings, norms, biases and the head stay dense.
    Queries, keys and values that share one matrix are drawn one after the other, so that none of them is poorer.

    Parameters
    ----------
    sparsity
        Of every matrix: exactly ``round((1 − sparsity) · n)`` of its n weights are there. The paper takes 0.5 and 0.75.
    allocation
        ``uniform``, as in the paper, or another rule that knows nothing but shapes.

    Examples
    --------
    >>> method = SparsePretraining(sparsity=0.75)
    >>> training = method.attach(model, optimizer)  # doctest: +SKIP
    >>> ...  # pretrain as ever                     # doctest: +SKIP
    >>> masks = method.densify(training)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(model.parameters())  # and fine-tune  # doctest: +SKIP
    """

    sparsity: float = 0.75
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ALLOCATIONS:
            raise UnknownNameError("allocation", self.allocation, ALLOCATIONS)

    def start(self, training: SparseTraining) -> None:
        """Draw the mask."""
        parts = {
            (name, place): rows
            for name, target in training.targets.items()
            for place, rows in enumerate(projections(training, target))
        }
        shapes = {f"{name}, part {place}": self._shape(training, name, rows) for (name, place), rows in parts.items()}
        shares = allocate(self.allocation, shapes, self.sparsity)
        masks = {name: torch.zeros(target.shape, dtype=torch.bool) for name, target in training.targets.items()}
        for ((name, _), rows), (label, shape) in zip(parts.items(), shapes.items()):
            size = int(torch.Size(shape).numel())
            kept = round((1 - shares[label]) * size)
            if not kept:
                raise SparsityError(
                    f"sparsity {self.sparsity} leaves nothing of {label}; ask for less, or exclude that layer"
                )
            drawn = torch.rand(1, size, generator=training.generator)
            masks[name][rows] = keep_highest(drawn, size - kept).view(shape)
        training.assign(masks)
        training.extra["sparsity"] = self.sparsity

    def change(self, training: SparseTraining) -> None:
        """Nothing changes; a sparsity that was altered since the start is refused.

        Raises
        ------
        ConfigurationError
            If it was.
        """
        if self.sparsity != training.extra["sparsity"]:
            raise ConfigurationError(
                f"sparsity was changed from {training.extra['sparsity']} to {self.sparsity} during the run, but this "
                f"mask is drawn once; use gmp, rigl or granet for one that changes"
            )

    @torch.no_grad()
    def densify(
        self, training: SparseTraining, init: Literal["zero", "normal"] = "zero", std: float | None = None
    ) -> MaskSet:
        """Drop the mask: the weights that were missing come back, and all of them train from now on.

        The optimiser forgets what it knew, since a second moment of zero would make the first steps of Adam explode.
        A new one for fine-tuning is as good.

        Parameters
        ----------
        training
            The run, which ends.
        init
            What the missing weights start from: ``"zero"``, as in the paper, or ``"normal"``.
        std
            Standard deviation of the latter; by default a tenth of that of the trained weights of the same matrix.

        Returns
        -------
        MaskSet
            True where a weight was pretrained.

        Raises
        ------
        ConfigurationError
            If there is no mask to drop: the run was never started, ended already, or is that of another method.
        """
        if init not in ("zero", "normal") or (std is not None and not std > 0):
            raise ConfigurationError(f"init and std are {init!r} and {std}; use 'zero', or 'normal' with std > 0")
        if not isinstance(training, SparseTraining) or not isinstance(training.method, SparsePretraining):
            raise ConfigurationError("there is no mask to drop: give the run that attach() of this method returned")
        if training.extra.get("densified"):
            raise ConfigurationError("this run has been densified already; attach the method again to pretrain more")
        masks = training.finalize()
        training.extra["densified"] = True
        training.optimizer.state.clear()
        if init == "normal":
            randomize_(training.model, masks, std, training.generator)
        return masks

    @staticmethod
    def _shape(training: SparseTraining, name: str, rows: Tensor) -> tuple[int, ...]:
        return (len(rows), *training.targets[name].shape[1:])


def projections(training: SparseTraining, target: Target) -> Iterator[Tensor]:
    """Rows of the matrices that one weight holds: queries, keys and values where they are fused, or all.

    Shared keys and values (grouped queries) are recognised by the shape: the queries have as many rows as the input
    has features, and keys and values share the rest.
    """
    rows, width = torch.arange(target.shape[0]), target.shape[1]
    if not any(fnmatchcase(f".{target.module_name}", glob) for glob in _FUSED):
        yield rows
        return
    config = getattr(training.model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if fnmatchcase(f".{target.module_name}", _INTERLEAVED) and heads and len(rows) % (3 * heads) == 0:
        yield from rows.view(heads, 3, -1).transpose(0, 1).flatten(1)
    elif len(rows) != 3 * width and len(rows) > width and (len(rows) - width) % 2 == 0:
        yield from rows.split([width, (len(rows) - width) // 2, (len(rows) - width) // 2])
    elif len(rows) % 3 == 0:
        yield from rows.view(3, -1)
    else:
        yield rows


@torch.no_grad()
def randomize_(
    model: nn.Module, masks: MaskSet, std: float | None = None, generator: torch.Generator | None = None
) -> None:
    """Start the weights that were masked from a normal distribution, in place.

    Parameters
    ----------
    model, masks
        True where a weight was trained; those stay as they are.
    std
        Of the distribution; by default a tenth of the standard deviation of the trained weights of the same matrix.
    generator
        On the CPU.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter, mask = parameters[name], mask.to(parameters[name].device)
        spread = std if std is not None else _SMALL * float(parameter[mask].float().std(correction=0))
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter) * spread
        parameter.copy_(torch.where(mask, parameter, drawn))
