"""What BDWP costs beside dense training, and how far what flows back through its second mask is still a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.nm_sparsifier import as_nm
from gossamer.core.patterns import Pattern
from gossamer.measure.flops import count_flops
from gossamer.training.bdwp import BDWP, Variant, backward_mask, is_routed


def relative_operations(n: int, m: int, variant: Variant = "bidirectional") -> float:
    """Multiplications of a training step beside a dense one, in a layer with all three products.

    ``(2 N/M + 1) / 3`` where both products with the weight are sparse, ``(N/M + 2) / 3`` where only the forward one is.

    Parameters
    ----------
    n, m
        Of the pattern.
    variant
        See :class:`BDWP`.
    """
    sparse = 1 if variant == "forward" else 2
    return (sparse * n / m + 3 - sparse) / 3


@dataclass(frozen=True)
class LayerOperations:
    """Multiplications of a layer in a training step.

    Attributes
    ----------
    name
        Of the module.
    forward, backward, update
        Of ``Y``, ``dX`` and ``dW``.
    dense
        Of each of them, were nothing zero.
    """

    name: str
    forward: float
    backward: float
    update: float
    dense: float

    @property
    def total(self) -> float:
        """Of all three products."""
        return self.forward + self.backward + self.update


def training_operations(model: nn.Module, example_inputs: Tensor, method: BDWP) -> list[LayerOperations]:
    """What a training step costs, layer by layer; layers that stay dense are counted dense.

    Parameters
    ----------
    model
        Not attached.
    example_inputs
        A batch. The layer that gets it needs no gradient of its input.
    method
        Which layers become sparse, and how.
    """
    sparse = {target.module_name: target for target in method.targets(model)}
    rows = []
    for place, layer in enumerate(count_flops(model, example_inputs).layers):
        dense = layer.dense / 2
        target = sparse.get(layer.name)
        share = 1.0 if target is None else 1 - float(method.pattern_of(target).resolve(None))
        both = method.variant != "forward" and (
            method.variant == "transposable" or (target is not None and is_routed(target))
        )
        backward = 0.0 if place == 0 else dense * (share if both else 1.0)
        rows.append(LayerOperations(layer.name, dense * share, backward, dense, dense))
    return rows


def backward_agreement(weight: Tensor, gradient: Tensor, pattern: str | Pattern) -> dict[str, float]:
    """How far dX through W_B points where it would with other weights: cosines.

    Parameters
    ----------
    weight
        Dense, ``(out, in)``.
    gradient
        dY, ``(rows, out)``.
    pattern
        N:M.

    Returns
    -------
    dict
        ``"dense"``: with dX of the whole weight; ``"forward"``: with that of W_F, which is the true gradient.
    """
    chosen = as_nm(pattern)
    weight, gradient = weight.double(), gradient.double()
    ours = gradient @ weight.masked_fill(~backward_mask(weight, chosen.n, chosen.m), 0)
    others = {"dense": weight, "forward": weight.masked_fill(~chosen.select(weight.abs()), 0)}
    return {
        name: float(functional.cosine_similarity(ours.flatten(), (gradient @ other).flatten(), dim=0))
        for name, other in others.items()
    }
