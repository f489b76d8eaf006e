"""Low-rank updates of linear layers that respect masks: put on, trained, merged, gone.

A plain low-rank update (LoRA) is dense: merged into a sparse matrix it fills every zero. Here, where there is a mask
M, the layer computes ``(W + s·BA ⊙ M) x`` already while it trains, so the merged matrix is sparse and the merged
model is the very function that was trained.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.allocation import STEEPNESS, logistic_shares
from gossamer.core.masks import MaskSet
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, MissingDependencyError, TargetError, UnknownNameError

_ADAPTER = "recovery"


def rank_plan(
    importance: Mapping[str, float], mean_rank: int, min_rank: int = 1, *, steepness: float = STEEPNESS
) -> dict[str, int]:
    """Ranks that follow the importance of blocks, with exactly ``len(importance) · mean_rank`` in total (IG-LoRA).

    ``r_l = max(min_rank, round(mean_rank · s_l / mean s))`` with CFSP's ``s_l = σ(steepness · (I_l − mean I))``; then
    the blocks closest to being rounded the other way move by one until the total is right.

    Parameters
    ----------
    importance
        Block → coarse importance, such as ``ChannelPruningResult.importance``.
    mean_rank
        Average over the blocks.
    min_rank
        Lowest that a block gets.
    steepness
        Factor on the importance.

    Raises
    ------
    ConfigurationError
        Unless 1 ≤ min_rank ≤ mean_rank.
    """
    if not 1 <= min_rank <= mean_rank:
        raise ConfigurationError(
            f"min_rank is {min_rank} and mean_rank is {mean_rank}; 1 ≤ min_rank ≤ mean_rank is needed"
        )
    shares = logistic_shares(importance, steepness=steepness)
    ideal = {name: mean_rank * share for name, share in shares.items()}
    ranks = {name: max(min_rank, math.floor(value + 0.5)) for name, value in ideal.items()}
    missing = len(ranks) * mean_rank - sum(ranks.values())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        movable = [name for name in ranks if ranks[name] + step >= min_rank]
        chosen = max(movable, key=lambda name: step * (ideal[name] - ranks[name]))
        ranks[chosen] += step
    return ranks


def ranks_of(model: nn.Module, wanted: int | Mapping[str, int], include: Sequence[str] = ("*",)) -> dict[str, int]:
    """Rank of every linear layer that gets an update, by module name.

    Parameters
    ----------
    model
        Any module.
    wanted
        One rank for all, or module or block name → rank, of which the longest name counts.
    include
        Globs on module names.

    Raises
    ------
    ConfigurationError
        If a rank is not a positive integer (0 leaves a part out).
    UnknownNameError
        If a name is that of no linear layer and of nothing that holds one.
    TargetError
        If no layer gets an update.
    """
    names = [t.module_name for t in find_targets(model, include) if _is_linear(t)]
    by_name = {"": wanted} if isinstance(wanted, int) else wanted
    for name, rank in by_name.items():
        if not isinstance(rank, int) or rank < 0 or (name == "" and rank == 0):
            raise ConfigurationError(f"the rank of {name or 'all layers'} is {rank!r}; it must be a positive integer")
        if name and not any(f"{other}.".startswith(f"{name}.") for other in names):
            raise UnknownNameError("module with a rank", name, names)
    ranks = {}
    for name in names:
        owners = [owner for owner in by_name if not owner or f"{name}.".startswith(f"{owner}.")]
        rank = by_name[max(owners, key=len)] if owners else 0
        if rank:
            ranks[name] = rank
    if not ranks:
        raise TargetError(f"no layer gets a low-rank update: {len(names)} linear layers, all of rank 0")
    return ranks


def _is_linear(target: Target) -> bool:
    return target.index is None and (isinstance(target.module, nn.Linear) or target.transposed)


@contextmanager
def low_rank_updates(
    model: nn.Module, ranks: Mapping[str, int], masks: MaskSet | None = None, scale: float = 2.0
) -> Iterator[list[nn.Parameter]]:
    """Give layers low-rank updates for the time of the context; merge them when it ends, drop them if it fails.

    In any case the model is a plain one again afterwards.

    Parameters
    ----------
    model
        Any module.
    ranks
        Module name → rank.
    masks
        Where they have a mask, the update has its zeros.
    scale
        s, the factor of the update (alpha / rank).

    Yields
    ------
    list of Parameter
        The factors, float32.

    Raises
    ------
    MissingDependencyError
        If ``peft`` is not installed.
    """
    tuner = _lora(model, ranks, scale)
    layers = {name: model.get_submodule(name) for name in ranks}
    masked = {
        name: masks[f"{name}.weight"].to(layer.weight.device)
        for name, layer in layers.items()
        if masks is not None and f"{name}.weight" in masks
    }
    for name, mask in masked.items():
        _train_masked(layers[name], mask)
    factors = [p for layer in layers.values() for n, p in layer.named_parameters() if "lora_" in n]
    for factor in factors:
        factor.data = factor.data.float()
        factor.requires_grad = True
    try:
        yield factors
        with torch.no_grad():
            for name, layer in layers.items():
                change = layer.get_delta_weight(_ADAPTER)
                _add_(layer.get_base_layer().weight, change * masked[name] if name in masked else change)
    finally:
        tuner.unload()


def _lora(model: nn.Module, ranks: Mapping[str, int], scale: float) -> Any:
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MissingDependencyError("peft", "recovery", "low-rank recovery") from error
    exact = {name: f"^{re.escape(name)}" for name in ranks}
    config = LoraConfig(
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern={exact[name]: rank for name, rank in ranks.items()},
        alpha_pattern={exact[name]: scale * rank for name, rank in ranks.items()},
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():
        # which of the layers are stored transposed is found out by peft layer by layer; it need not say so
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return LoraModel(model, {_ADAPTER: config}, _ADAPTER)


def _train_masked(layer: Any, mask: Tensor) -> None:
    """Have the layer compute ``(W + s·BA ⊙ M) x``, which is what it will be once merged."""
    base = layer.get_base_layer()

    def forward(x: Tensor) -> Tensor:
        weight = base.weight + (layer.get_delta_weight(_ADAPTER) * mask).to(base.weight.dtype)
        return nn.functional.linear(x, weight if isinstance(base, nn.Linear) else weight.t(), base.bias)

    layer.forward = forward


def _add_(weight: Tensor, change: Tensor) -> None:
    weight.copy_(weight.float() + change.float())
