"""How many weights a model reads to compute one token, which is what bounds the speed of decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gossamer.core.targets import find_targets
from gossamer.errors import TargetError


@dataclass(frozen=True)
class WeightsRead:
    """Weights read for one token.

    Attributes
    ----------
    read
        Weights of matrices read, the output head included; not the one row of the input embedding, norms and biases.
    total
        Weights that a dense token reads.
    treated
        Those of the total that belong to layers that read less.
    """

    read: float
    total: int
    treated: int

    @property
    def share(self) -> float:
        """Read over total."""
        return self.read / self.total

    @property
    def dense_share(self) -> float:
        """φ, the share of the total in layers that read everything."""
        return 1 - self.treated / self.total

    def limit(self, sparsity: float) -> float:
        """How many times faster decoding can become at this sparsity of the treated layers: 1 / (φ + (1−φ)(1−s))."""
        return 1 / (self.dense_share + (1 - self.dense_share) * (1 - sparsity))

    def __str__(self) -> str:
        return f"{self.share:.1%} of {self.total:,} weights a token; {self.dense_share:.1%} in dense layers"


def weights_read(model: nn.Module, live: Mapping[str, float], extra: int = 0) -> WeightsRead:
    """Weights read for one token when some layers read a share of theirs.

    Parameters
    ----------
    model
        The model.
    live
        Name of a layer → share of its weights that is read; the others read all of theirs.
    extra
        Weights that are read besides, such as those of rotated skip connections.

    Raises
    ------
    TargetError
        If the model has no layer of a name.
    """
    sizes = {t.module_name: t.shape.numel() for t in find_targets(model, heads=True) if t.index is None}
    unknown = next((name for name in live if name not in sizes), None)
    if unknown is not None:
        raise TargetError(f"there is no layer {unknown!r} in {type(model).__name__}; give names of its linear layers")
    total = sum(sizes.values()) + _tied_head(model)
    spared = sum(sizes[name] * (1 - share) for name, share in live.items())
    return WeightsRead(total - spared + extra, total, sum(sizes[name] for name in live))


def _tied_head(model: nn.Module) -> int:
    """Weights of an output head that is the input embedding too, and so is no layer of its own."""
    heads = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(module, "weight", None) for module in heads]
    return weights[1].numel() if weights[1] is not None and weights[0] is weights[1] else 0
