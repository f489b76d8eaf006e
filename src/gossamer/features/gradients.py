"""How much a model's loss changes with the activations at one of its modules: one pass forwards, one backwards.

A gradient points to what later layers make of an activation, which its size does not tell [Olmo et al., 2024, arXiv
2411.10397]. It belongs to the model as it is, and to all predictions after the token, not to its own alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.errors import CalibrationError, ModelError, NonFiniteError
from gossamer.measure.windows import logits_of, widen
from gossamer.models.blocks import run_batch


def loss_gradient(model: nn.Module, module: nn.Module, text: Tensor, name: str = "the module") -> tuple[Tensor, Tensor]:
    """Output of a module and the gradient there of the summed loss of all predicted tokens.

    The loss is a sum: a mean would make gradients depend on the length of the text. That of the last token is zero,
    for nothing is predicted from it.

    Parameters
    ----------
    model
        A causal language model; its weights get no gradients.
    module
        The part of it that puts out one activation for each token.
    text
        Token ids ``(1, tokens)``, at least two.
    name
        Of the module, for errors.

    Returns
    -------
    activations, gradients
        ``(1, tokens, size)`` each.

    Raises
    ------
    CalibrationError
        If the text has no token to predict.
    ModelError
        If the module is not called exactly once, or the loss does not depend on it.
    NonFiniteError
        If a gradient is NaN or infinite.
    """
    if text.shape[1] < 2:
        raise CalibrationError(f"the text has {text.shape[1]} tokens; a loss needs at least 2")
    leaves: list[Tensor] = []

    def become_leaf(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # a copy that later blocks may change in place without touching what is differentiated
        leaf = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        leaves.append(leaf)
        passed = leaf.clone()
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    handle = module.register_forward_hook(become_leaf)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
            logits = widen(logits_of(run_batch(model, text))[0, :-1])
            loss = cross_entropy(logits, text[0, 1:].to(logits.device), reduction="sum")
            if len(leaves) != 1 or not loss.requires_grad:
                raise ModelError(
                    f"{name} is called {len(leaves)} times and the loss depends on it: {loss.requires_grad}; choose a "
                    "module of the model's main path"
                )
            (gradient,) = torch.autograd.grad(loss, leaves)
    finally:
        handle.remove()
    if not bool(torch.isfinite(gradient.sum())):
        raise NonFiniteError(f"{name}: a gradient is NaN or infinite; the model is damaged or overflows")
    return leaves[0].detach(), gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
