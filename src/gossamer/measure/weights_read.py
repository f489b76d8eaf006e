"""How many weights a model reads to compute one token, which is what bounds the speed of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.core.targets import Target, find_targets
from gossamer.errors import ModelError, TargetError


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

    Of stacked experts, those that a token is sent to are read in full, and the others are not.

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
    ModelError
        If the model has stacked experts and does not say how many of them a token is sent to.
    """
    targets = find_targets(model, heads=True)
    # a layer inside of a wrapper, such as PEFT's, goes by the wrapper's name
    sizes = {t.module_name.removesuffix(".base_layer"): t.shape.numel() for t in targets if t.index is None}
    unknown = next((name for name in live if name not in sizes), None)
    if unknown is not None:
        raise TargetError(f"there is no layer {unknown!r} in {type(model).__name__}; give names of its linear layers")
    total = sum(sizes.values()) + _tied_head(model) + _experts(model, targets)
    spared = sum(sizes[name] * (1 - share) for name, share in live.items())
    return WeightsRead(total - spared + extra, total, sum(sizes[name] for name in live))


_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


def _experts(model: nn.Module, targets: Sequence[Target]) -> int:
    """Weights of the stacked experts that one token is sent to."""
    stacked = [target for target in targets if target.index is not None]
    if not stacked:
        return 0
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    active = next((n for name in _ACTIVE if isinstance(n := getattr(config, name, None), int)), None)
    if active is None:
        raise ModelError(
            f"{type(model).__name__} has stacked experts ({stacked[0].parameter_name}), and its configuration does not "
            f"say to how many a token is sent ({', '.join(_ACTIVE)}); give config.num_experts_per_tok"
        )
    return round(sum(target.shape.numel() * active / len(target.parameter) for target in stacked))


def _tied_head(model: nn.Module) -> int:
    """Weights of an output head that is the input embedding too, and so is no layer of its own."""
    heads = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(module, "weight", None) for module in heads]
    return weights[1].numel() if weights[1] is not None and weights[0] is weights[1] else 0
