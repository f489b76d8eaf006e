"""Scores of weights before training, from one batch; and whether what is left of a network still connects its ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.core import scores
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, NonFiniteError

SALIENCIES = ("snip", "grasp")
_TEMPERATURE = 200.0
_Tensors = dict[str, Tensor]


def saliency(
    model: nn.Module,
    targets: Iterable[Target],
    inputs: Tensor,
    labels: Tensor,
    *,
    kind: str = "snip",
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> dict[str, Tensor]:
    """Score every weight of an untrained network by what its removal would do.

    Parameters
    ----------
    model
        Run in the mode it is in, on copies of its weights and buffers: nothing of it changes.
    targets
        What is scored.
    inputs, labels
        One batch.
    kind
        ``snip``: ``|w · ∂L/∂w|``, the change of the loss [Lee et al., 2019, arXiv 1810.02340, eq. 6]; ``grasp``:
        ``w · (H g)`` of the loss of logits divided by 200, what the gradient's norm loses [Wang et al., 2020, arXiv
        2002.07376, eq. 8].
    loss
        Of outputs and labels.

    Returns
    -------
    dict of str to Tensor
        Name → scores ``(out, in, kernel…)`` on the CPU, higher is more worth keeping.

    Raises
    ------
    ConfigurationError
        If the kind is unknown, or a weight takes no part in the loss.
    NonFiniteError
        If a score is NaN or infinite.
    """
    if kind not in SALIENCIES:
        raise ConfigurationError(f"kind is {kind!r}; use {' or '.join(SALIENCIES)}")
    found = list(targets)
    for target in found:
        if isinstance(target.module, SparseWeight):
            raise ConfigurationError(f"{target.name} stores no zeros, so that they cannot be scored; start from dense")
    weights = {target.parameter_name: target.parameter.detach().clone().requires_grad_() for target in found}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), torch.random.fork_rng():
        outputs = functional_call(model, (weights, buffers), (inputs,))
        if kind == "snip":
            gradients = _gradients(loss(outputs, labels), weights)
            scored = {name: scores.taylor(weights[name].detach(), gradients[name].detach()) for name in weights}
        else:
            first = _gradients(loss(outputs / _TEMPERATURE, labels), weights, create_graph=True)
            flow = torch.stack([(value * value.detach()).sum() for value in first.values()]).sum()
            products = _gradients(flow, weights)
            scored = {name: (weights[name].detach() * products[name]).float() for name in weights}
    return {target.name: _of(target, scored[target.parameter_name]) for target in found}


def _gradients(value: Tensor, weights: _Tensors, create_graph: bool = False) -> _Tensors:
    found = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    for name, gradient in zip(weights, found):
        if gradient is None:
            raise ConfigurationError(f"{name} takes no part in the loss, so that it cannot be scored; exclude it")
    return dict(zip(weights, found))


def _of(target: Target, stored: Tensor) -> Tensor:
    if not torch.isfinite(stored).all():
        raise NonFiniteError(f"{target.name}: its scores are not finite; look for NaN in the batch and the weights")
    part = stored if target.index is None else stored[target.index]
    return (part.transpose(0, 1) if target.transposed else part).cpu()


def count_paths(model: nn.Module, inputs: Tensor) -> Tensor:
    """How many paths of non-zero weights lead to each output, from all inputs together.

    The network runs in evaluation mode and double precision, with a 1 for every non-zero weight, no biases, no
    normalisation, and an input of ones: sums of products then count paths. That holds for networks of linear layers,
    convolutions, ReLU, concatenations, sums and average pooling (up to its factor); maxima count the richest path.

    Parameters
    ----------
    model
        Stays as it is.
    inputs
        Of the shape that the network takes; their values do not matter.

    Returns
    -------
    Tensor
        float64, the shape of the outputs; 0 where no path leads.
    """
    parameters = {name: _indicator(name, value.detach()) for name, value in model.named_parameters()}
    buffers = {name: _neutral(name, value) for name, value in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return functional_call(model, (parameters, buffers), (torch.ones_like(inputs, dtype=torch.float64),))
    finally:
        for module, training in modes:
            module.training = training


def _indicator(name: str, parameter: Tensor) -> Tensor:
    """1 for every non-zero weight, and for the gain of a normalisation; 0 for what is added."""
    counts = parameter != 0 if name.endswith("weight") or parameter.dim() >= 2 else torch.zeros_like(parameter)
    return counts.double()


def _neutral(name: str, buffer: Tensor) -> Tensor:
    if name.endswith("running_var"):
        return torch.ones_like(buffer, dtype=torch.float64)
    if name.endswith("running_mean"):
        return torch.zeros_like(buffer, dtype=torch.float64)
    return buffer.double() if buffer.is_floating_point() else buffer
