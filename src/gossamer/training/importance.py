"""Criteria by which weights are judged at the end of a round of training: what others can build on.

Each is a function of a :class:`~gossamer.core.rounds.Round` that returns scores of all matrices, to be ranked together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call

from gossamer.core import scores
from gossamer.core.rounds import Round, Scores
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, NonFiniteError

Host: TypeAlias = Callable[[Round], Scores]
"""Target name → scores, higher is more worth keeping."""


def magnitude(ended: Round) -> Scores:
    """``|W|``."""
    return ended.scores(lambda target: scores.magnitude(target.matrix()))


def lamp(ended: Round) -> Scores:
    """``W²`` over the sum of all squares in the layer that are not smaller [Lee et al., 2021, arXiv 2010.07611]."""
    return {target.name: scores.lamp(target.matrix()).cpu() for target in ended.targets}


def random(ended: Round) -> Scores:
    """Uniform random numbers."""
    return {target.name: scores.random(target.matrix(), ended.generator).cpu() for target in ended.targets}


@dataclass(frozen=True)
class SynFlow:
    """Flow through each weight that data-free paths carry: ``|θ ∂R/∂θ|``, ``R = 1ᵀ Π|θ| 1``.

    Of all layers' scores the sums are equal, so that none is emptied before the others [Tanaka et al., 2020, arXiv
    2006.05467, eq. 2]. The network runs once, in evaluation mode and double precision, on an input of ones and with
    all parameters and buffers made positive.

    Parameters
    ----------
    shape
        Of one input, without the batch.
    """

    shape: tuple[int, ...]

    def __call__(self, ended: Round) -> Scores:
        """Scores of all matrices.

        Raises
        ------
        ConfigurationError
            If a layer stores no zeros, and has no gradient for them.
        NonFiniteError
            If the flow is more than double precision can hold.
        """
        model = ended.model
        parameters = {name: p.detach().double().abs().requires_grad_() for name, p in model.named_parameters()}
        buffers = {n: b.detach().double().abs() if b.is_floating_point() else b for n, b in model.named_buffers()}
        for target in ended.targets:
            if target.parameter_name not in parameters:
                raise ConfigurationError(f"{target.name} stores no zeros, so that SynFlow cannot score it")
        device = next(iter(parameters.values())).device
        ones = torch.ones(1, *self.shape, dtype=torch.float64, device=device)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.enable_grad():
                flow = functional_call(model, parameters | buffers, (ones,)).sum()
                gradients = torch.autograd.grad(flow, list(parameters.values()), allow_unused=True)
        finally:
            for module, training in modes:
                module.training = training
        found = {
            name: torch.zeros_like(parameter) if gradient is None else (parameter * gradient).abs().detach()
            for (name, parameter), gradient in zip(parameters.items(), gradients)
        }
        return {target.name: self._of(target, found[target.parameter_name]) for target in ended.targets}

    @staticmethod
    def _of(target: Target, flow: Tensor) -> Tensor:
        if not torch.isfinite(flow).all():
            raise NonFiniteError(
                f"{target.name}: the flow through it is not finite; the network is too deep for SynFlow"
            )
        part = flow if target.index is None else flow[target.index]
        return (part.transpose(0, 1) if target.transposed else part).cpu()


HOSTS: dict[str, Host] = {"magnitude": magnitude, "lamp": lamp, "random": random}
"""Criteria that need no setting, by name."""
