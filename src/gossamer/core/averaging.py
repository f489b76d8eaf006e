"""One model out of several: the mean of their weights, and the statistics of batch norm that fit it.

Sparse models can be averaged at no loss of sparsity if their zeros are at the same places, as those of copies that
were retrained under one mask are. That is verified bit by bit and not assumed: a single weight that grew back in one
copy would stay in the mean.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.masks import MaskSet
from gossamer.errors import CalibrationError, ConfigurationError, TargetError

State = Mapping[str, Tensor]
_M = TypeVar("_M", bound=nn.Module)


@overload
def average_models(
    models: Sequence[_M],
    weights: Sequence[float] | None = None,
    require_same_mask: bool = True,
    masks: MaskSet | None = None,
) -> _M: ...
@overload
def average_models(
    models: Sequence[State],
    weights: Sequence[float] | None = None,
    require_same_mask: bool = True,
    masks: MaskSet | None = None,
) -> dict[str, Tensor]: ...
def average_models(
    models: Sequence[Any],
    weights: Sequence[float] | None = None,
    require_same_mask: bool = True,
    masks: MaskSet | None = None,
) -> Any:
    """Average models of one shape, weight by weight: ``θ̄ = Σ λ_j θ_j``.

    Zimmer, Spiegel & Pokutta, 2024, arXiv 2306.16788. Every floating tensor is summed in float64 and rounded once, so
    that neither half precision nor the number of models costs digits. Integer and bool buffers, such as counters of
    batches, are those of the first model. The statistics of batch norm are averaged like everything else, which is no
    substitute for :func:`recalibrate_batch_norm`: the mean of variances is not the variance under the mean weights.

    Parameters
    ----------
    models
        Modules, or state dictionaries, at least one; none is changed.
    weights
        λ: one finite number for each model, normalised to sum 1; all alike by default.
    require_same_mask
        Whether tensors of two or more dimensions must have their zeros at the same places in all models. Without it
        the mean keeps every weight that any model keeps.
    masks
        Zeros that every model must have, by parameter; by default those of the first model.

    Returns
    -------
    nn.Module or dict of str to Tensor
        Of the kind that was given: a copy of the first model with the mean weights, or the mean state.

    Raises
    ------
    ConfigurationError
        If there is no model, weights do not fit, the zeros differ (the first such tensor is named), or the models are
        still reparametrised by ``torch.nn.utils.prune``.
    TargetError
        If the models differ in names, shapes or dtypes of their tensors.
    """
    if not models:
        raise ConfigurationError("models is empty; give at least one to average")
    states: list[State] = [m.state_dict() if isinstance(m, nn.Module) else m for m in models]
    _check_alike(states)
    if require_same_mask:
        check_same_mask(states, masks)
    shares = _shares(weights, len(states))
    mean = {name: _mean([state[name] for state in states], shares) for name in states[0]}
    if not isinstance(models[0], nn.Module):
        return mean
    averaged = copy.deepcopy(models[0])
    averaged.load_state_dict(mean)
    return averaged


def check_same_mask(states: Sequence[State], masks: MaskSet | None = None) -> None:
    """Refuse states whose zeros are not at the same places.

    Parameters
    ----------
    states
        Of models of one shape.
    masks
        What must be zero, by parameter; by default the zeros of the first state's tensors of two or more dimensions,
        which must then be zero, and nothing else be zero, in all the others.

    Raises
    ------
    ConfigurationError
        Names the model, the first tensor that differs and the number of weights.
    TargetError
        If a mask belongs to no tensor.
    """
    first = states[0]
    names = list(masks) if masks is not None else [n for n, t in first.items() if t.is_floating_point() and t.dim() > 1]
    for name in names:
        if name not in first:
            raise TargetError(f"the models have no tensor {name!r}: these masks belong to another model")
        kept = masks[name] if masks is not None else first[name] != 0
        for number, state in enumerate(states):
            found = state[name] != 0
            wrong = int((found & ~kept).sum() if masks is not None else (found ^ kept.to(found.device)).sum())
            if wrong:
                other = "the mask" if masks is not None else "models[0]"
                raise ConfigurationError(
                    f"models[{number}] differs from {other} in which weights of {name!r} are zero, at {wrong} places; "
                    f"hold removed weights at zero while retraining, or allow it with require_same_mask=False"
                )


def _check_alike(states: Sequence[State]) -> None:
    first = states[0]
    for name in first:
        if name.endswith("_orig") and f"{name.removesuffix('orig')}mask" in first:
            raise ConfigurationError(
                f"{name!r} is half of a reparametrised weight; call torch.nn.utils.prune.remove on every model first"
            )
    for number, state in enumerate(states[1:], 1):
        if state.keys() != first.keys():
            name = sorted(state.keys() ^ first.keys())[0]
            raise TargetError(f"models[{number}] and models[0] do not both have {name!r}; average models of one shape")
        for name, tensor in first.items():
            if (state[name].shape, state[name].dtype) != (tensor.shape, tensor.dtype):
                raise TargetError(
                    f"{name!r} is {tuple(state[name].shape)} {state[name].dtype} in models[{number}] and "
                    f"{tuple(tensor.shape)} {tensor.dtype} in models[0]; average models of one shape"
                )
            if tensor.dtype == torch.bool and not torch.equal(state[name], tensor):
                raise ConfigurationError(
                    f"the mask {name!r} of models[{number}] is not that of models[0]; only models with one mask "
                    f"have a mean with that mask"
                )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    total = float(sum(weights))
    if len(weights) != count or not all(map(_is_finite, weights)) or not total > 0:
        raise ConfigurationError(
            f"weights is {list(weights)!r} for {count} models; give one finite number each, with a sum above 0"
        )
    return [float(weight) / total for weight in weights]


def _is_finite(value: float) -> bool:
    return float("-inf") < value < float("inf")


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0].detach()
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for tensor, share in zip(tensors, shares):
        total.add_(tensor.detach().to(first.device, wide), alpha=share)
    return total.to(first.dtype)


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Sequence[Any] | Iterable[Any], fraction: float = 1.0) -> int:
    """Measure the statistics of batch norm anew, under the weights that a model has now.

    The running means and variances become plain means over the batches; only the normalisations are in training mode
    meanwhile, so that dropout stays out of it. Weights, modes and gradients stay as they were.

    Parameters
    ----------
    model
        Changed in place; one without batch norm stays as it is.
    batches
        Unshuffled training data: tensors, mappings of arguments, or pairs of which the first entry is the input.
    fraction
        Share of the batches that is used, from the first on, in (0, 1]; at least one batch. Below 1 their number must
        be known.

    Returns
    -------
    int
        Number of batches that were used; 0 if there was nothing to measure.

    Raises
    ------
    ConfigurationError
        If `fraction` is outside (0, 1], or needs a length that the batches do not have.
    CalibrationError
        If there is no batch.
    """
    if not 0 < fraction <= 1:
        raise ConfigurationError(f"fraction is {fraction}; it must lie in (0, 1], such as 0.2")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    if fraction < 1:
        if not isinstance(batches, Sequence):
            raise ConfigurationError(f"fraction is {fraction}, but the batches have no length; give a list of them")
        batches = batches[: max(1, round(fraction * len(batches)))]
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise CalibrationError("there is no batch to measure the statistics of batch norm on; give at least one")
    count = 0
    with _only_training(model, layers):
        for batch in itertools.chain([first], rest):
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
            count += 1
    return count


@contextmanager
def _only_training(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all batches
            layer.train()
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
