"""Growing regularisation as a criterion: press on all weights alike, more and more, and see which give way.

A penalty on the squares of all weights pulls each towards zero, and the loss holds it back, the harder the more the
loss curves in its direction. So magnitudes, which were much alike, move apart by curvature, without any second
derivative being formed, and the smallest are then those that matter least. This is the choice of weights in GReg-2,
which activate-while-pruning takes as one of its hosts, once in each of its cycles (iterative GReg).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.masking import parameter_masks, static_masks
from gossamer.core.rounds import Round, Scores
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, NonFiniteError


@dataclass(frozen=True)
class GrowingRegularization:
    """``|W|`` after some training of a copy under a penalty ``λ/2 ΣW²`` that grows from 0 to a limit.

    Wang, Qin, Zhang & Fu, 2021, "Neural Pruning via Growing Regularization", arXiv 2012.09243, algorithm 1 (GReg-2) and
    eq. 3. Defaults are those of the authors' program. What GReg-2 does next, to press the chosen weights down to zero
    before they go, changes nothing where the rest is trained anew from where it was; it is the pull of
    :class:`~gossamer.training.iss_p.IterativeSoftShrinkage` with ``pull="fixed penalty"``. They rank the weights of a
    layer; here all are ranked together, as by the other hosts.

    Parameters
    ----------
    loss
        Loss of a model on a fresh batch, which it may draw from torch's generator.
    penalty_step, penalty_every, penalty_limit
        What λ grows by every so many steps, and where the choice is made: after 5000 steps by default.
    learning_rate, momentum, weight_decay
        Of SGD meanwhile.

    Raises
    ------
    ConfigurationError
        If a number is out of range.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> host = GrowingRegularization(lambda m: m(torch.randn(8, 20)).square().mean(), penalty_step=2e-3)
    >>> from gossamer.training.ap import ActivateWhilePruning
    >>> ActivateWhilePruning(sparsity=0.2, host=host).tickets(model, lambda model, masks: None)[-1].masks.kept
    160
    """

    loss: Callable[[nn.Module], Tensor]
    penalty_step: float = 1e-5
    penalty_every: int = 5
    penalty_limit: float = 1e-2
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.penalty_step <= self.penalty_limit or self.penalty_every < 1:
            raise ConfigurationError(
                f"penalty_step, penalty_limit and penalty_every are {self.penalty_step}, {self.penalty_limit} and "
                f"{self.penalty_every}; 0 < penalty_step <= penalty_limit and penalty_every >= 1 are needed"
            )
        if not self.learning_rate > 0:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; it must be above 0, such as 1e-3")

    @property
    def steps(self) -> int:
        """For how many steps the copy is trained."""
        return self.penalty_every * round(self.penalty_limit / self.penalty_step)

    def __call__(self, ended: Round) -> Scores:
        """Scores of all matrices; the model stays as it is.

        Raises
        ------
        ConfigurationError
            If a layer stores no zeros.
        NonFiniteError
            If the copy diverges; a lower learning rate helps, or a lower limit.
        """
        pressed = copy.deepcopy(ended.model).train()
        parameters = dict(pressed.named_parameters())
        for target in ended.targets:
            if target.parameter_name not in parameters:
                raise ConfigurationError(f"{target.name} stores no zeros; growing regularisation takes dense layers")
        watched = [parameters[name] for name in dict.fromkeys(target.parameter_name for target in ended.targets)]
        seed = int(torch.randint(2**62, (), generator=ended.generator))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), static_masks(pressed, parameter_masks(ended.targets, ended.alive)):
            torch.manual_seed(seed)
            self._press(pressed, watched)
        return {target.name: self._of(target, parameters[target.parameter_name]) for target in ended.targets}

    def _press(self, model: nn.Module, watched: list[nn.Parameter]) -> None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        with torch.enable_grad():
            for step in range(1, self.steps + 1):
                optimizer.zero_grad()
                self.loss(model).backward()
                for weight in watched:
                    if weight.grad is not None:
                        weight.grad.add_(weight.detach(), alpha=self.penalty_step * (step // self.penalty_every))
                optimizer.step()

    @staticmethod
    def _of(target: Target, weight: Tensor) -> Tensor:
        part = weight.detach() if target.index is None else weight.detach()[target.index]
        if not torch.isfinite(part).all():
            raise NonFiniteError(f"{target.name} diverged under the growing penalty; lower learning_rate")
        return scores.magnitude(part.transpose(0, 1) if target.transposed else part).cpu()
