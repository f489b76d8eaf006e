"""Adam for dictionaries, whose rows are directions: the whole step in one pass over the weights.

A step of Adam reads and writes every weight and both of its means. Straightening the gradient, so that it changes no
length, and giving rows the length one again afterwards would go over the weights four times more; compiled code does
all of it row by row, while the row is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gossamer.kernels.native import native, offers


class DictionaryAdam(torch.optim.Adam):
    """Adam [Kingma and Ba, 2015, arXiv 1412.6980] that keeps the rows of some matrices at the length one.

    Its state is that of :class:`torch.optim.Adam`.

    Parameters
    ----------
    parameters, lr, betas
        As there.
    directions
        Those of the parameters of which every row is a direction.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        directions: Iterable[nn.Parameter] = (),
    ):
        super().__init__(parameters, lr, betas=betas)
        self._directions = {id(parameter) for parameter in directions}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # noqa: D102
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], *group["betas"], group["eps"])
        return loss

    def _update(self, weight: Tensor, rate: float, first: float, second: float, epsilon: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        steps = float(state["step"])
        rate, square_share = rate / (1 - first**steps), (1 - second**steps) ** -0.5
        unit = id(weight) in self._directions
        assert weight.grad is not None
        parts = (weight, state["exp_avg"], state["exp_avg_sq"], weight.grad)
        if all(_readable(part) for part in parts) and offers("code_adam"):
            native().code_adam(
                *_rows(weight, unit),
                *(part.data_ptr() for part in parts),
                *(first, second, rate, square_share, epsilon, unit),
                torch.get_num_threads(),
            )
            return
        _update_reference(*parts, (first, second), rate, square_share, epsilon, unit)


def _update_reference(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    betas: tuple[float, float],
    rate: float,
    square_share: float,
    epsilon: float,
    unit: bool,
) -> None:
    if unit:
        gradient = gradient - (gradient * weight).sum(1, keepdim=True) * weight
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    weight.addcdiv_(mean, square.sqrt().mul_(square_share).add_(epsilon), value=-rate)
    if unit:
        weight.copy_(nn.functional.normalize(weight, dim=1))


def _readable(part: Tensor) -> bool:
    return part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous()


def _rows(weight: Tensor, unit: bool) -> tuple[int, int]:
    """Rows and their size; what are no directions may be divided anywhere."""
    if unit or weight.dim() > 1:
        return weight.shape[0], weight[0].numel()
    return weight.numel(), 1
