"""AdamS: an Adam that makes the losing weights of every N:M group zero while it trains the others.

No mask is applied in the forward pass. The weights that are not among the N largest of their group feel an L1 decay,
inside the optimiser, that grows over the run; the others feel none. Since what loses is looked up again every few
steps, a weight that the loss wants back comes back, and by the end the losers are so small that cutting them off
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM, Pattern
from gossamer.errors import ConfigurationError

_HIGHEST = 1e4  # that λ may be raised to: where the step is normalised, more of it is not faster
Adapt = Literal["momentum", "ast", "rms", "none"]


class AdamS(torch.optim.Optimizer):
    """Adam with selective L1 decay towards N:M sparsity.

    Huang, Hu, Zhu & Chen, 2025, "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for
    Large Language Models", arXiv 2509.25996, algorithm 1. With ``m = 1`` for what is kept and ``α = min(1, t / T_w)``::

        u ← β₁ u + (1 − β₁) g                          never with the decay
        d = u where m = 1,  (1 − α) u where m = 0      r = α λ where m = 0, else 0
        v ← β₂ v + (1 − β₂) (d + r sign w)²
        w ← w − η d̂ / (√v̂ + ε),  then |w| shrinks by η r̂ / (√v̂ + ε), to zero exactly where it would cross zero

    The exact zero is a proximal step of ours: without it weights keep jumping across zero by the learning rate.

    Parameters
    ----------
    params
        Parameters or groups. A group becomes sparse by ``"pattern": "2:4"`` (with ``@d`` for another dimension of the
        stored tensor than 1); it must be float32 or float64, since η λ is below what bfloat16 can add to a weight.
    lr, betas, eps, weight_decay
        As of AdamW; the decoupled weight decay comes first.
    steps
        T, of the whole run.
    l1_max
        λ, of the size of the gradients.
    l1_warmup
        Share of the steps over which the decay grows from 0; the algorithm of the paper has 1.
    adapt
        How the decay is normalised: ``"momentum"`` as above; ``"ast"`` the same without fading the gradient, as in
        the authors' earlier optimiser; ``"rms"`` plain Adam and a decay of ``λ / (√v̂ + ε)``; ``"none"`` plain Adam and
        a decay of λ.
    cap
        With ``"rms"``: the decay moves no weight by more than so many learning rates a step, or weights whose
        gradients are nearly zero, as all are while a student is still its teacher, would be gone at once.
    mask_every
        Steps between two looks at which weights lose.
    hysteresis
        A challenger must be larger by this share, or equal weights would swap for ever.
    selective
        Whether what is kept is spared.
    target_residual
        The share of ``Σ|w|`` in the losing weights below which they are cut off for good and the masks fixed;
        0 waits for the end.
    deadline
        Share of the steps at which that is to be reached: between the end of the ramp and it λ is raised whenever the
        residual is above a geometric way to the target.
    raise_by
        Factor of λ in that case.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range, or a sparse weight is in half precision.
    PatternError
        If the pattern does not divide a weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        steps: int = 1000,
        l1_max: float = 1e-4,
        l1_warmup: float = 0.5,
        adapt: Adapt = "momentum",
        cap: float = 10.0,
        mask_every: int = 10,
        hysteresis: float = 0.01,
        selective: bool = True,
        target_residual: float = 1e-3,
        deadline: float = 0.8,
        raise_by: float = 1.5,
    ):
        _check(lr, betas, steps, l1_max, l1_warmup, adapt, cap, mask_every, hysteresis, deadline, raise_by)
        self.steps, self.l1_max, self.l1_warmup, self.adapt, self.cap = steps, l1_max, l1_warmup, adapt, cap
        self.mask_every, self.hysteresis, self.selective = mask_every, hysteresis, selective
        self.target_residual, self.deadline, self.raise_by = target_residual, deadline, raise_by
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "pattern": None}
        # in the groups, because that is what an optimiser saves
        defaults |= {"taken": 0, "frozen": False, "l1_scale": 1.0, "residual": 1.0, "ramp_residual": 0.0}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["pattern"] is None:
            return
        pattern = Pattern.parse(group["pattern"])
        if not isinstance(pattern, NM):
            raise ConfigurationError(f"pattern is {pattern}; AdamS makes N:M patterns such as 2:4")
        group["pattern"] = str(pattern)
        for number, parameter in enumerate(group["params"]):
            pattern.check_shape(tuple(parameter.shape), f"parameter {number}")
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigurationError(
                    f"parameter {number} is {parameter.dtype}; AdamS needs float32 or float64 weights, because smaller "
                    f"types lose its steps: keep them in float32 and use autocast"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for memory in self.state.values():
            if "kept" in memory:  # loading casts it to the dtype of the weight
                memory["kept"] = memory["kept"].bool()

    # ------------------------------------------------------------------------------------------ what is sparse

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        return all(group["frozen"] for group in self._sparse())

    @property
    def l1(self) -> float:
        """λ, as far as it has been raised."""
        return self.l1_max * max((group["l1_scale"] for group in self._sparse()), default=1.0)

    @property
    def residual(self) -> float:
        """``Σ |w| (1 − m) / Σ |w|``, of all sparse weights, when masks were last looked at."""
        return max((group["residual"] for group in self._sparse()), default=0.0)

    def kept(self, parameter: nn.Parameter) -> Tensor:
        """Which weights of a sparse parameter win: bool, its shape."""
        memory = self.state[parameter]
        if "kept" not in memory:
            group = next(g for g in self._sparse() if any(parameter is p for p in g["params"]))
            memory["kept"] = Pattern.parse(group["pattern"]).select(parameter.detach().abs())
        return memory["kept"]

    @torch.no_grad()
    def project(self) -> None:
        """Fix the masks and make what loses zero, whatever its size."""
        for group in self._sparse():
            for parameter in group["params"]:
                self.kept(parameter)
            group["frozen"] = True
            for parameter in group["params"]:
                memory, removed = self.state[parameter], ~self.kept(parameter)
                for value in (parameter, memory.get("exp_avg"), memory.get("exp_avg_sq")):
                    if value is not None:
                        value.masked_fill_(removed, 0)

    def _sparse(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["pattern"] is not None)

    # ------------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = list(self._sparse())
        if groups and not self.frozen and groups[0]["taken"] % self.mask_every == 0:
            self._look(groups)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
            group["taken"] += 1
        return loss

    def _look(self, groups: list[dict[str, Any]]) -> None:
        """Find what loses, and whether it is small enough to be cut off, or has to be pressed harder."""
        lost, total = 0.0, 0.0
        for group in groups:
            pattern = Pattern.parse(group["pattern"])
            for parameter in group["params"]:
                size, memory = parameter.detach().abs(), self.state[parameter]
                total += float(size.sum(dtype=torch.float64))
                # after the sum, since it writes to the same memory
                if "kept" in memory:
                    size.mul_(1 + self.hysteresis * memory["kept"])
                memory["kept"] = pattern.select(size)
                lost += float(parameter.detach().abs().masked_fill_(memory["kept"], 0).sum(dtype=torch.float64))
        residual, taken = lost / total if total else 0.0, groups[0]["taken"]
        scale = groups[0]["l1_scale"]
        if self._behind(groups[0], residual):
            scale = min(scale * self.raise_by, _HIGHEST)
        for group in groups:
            group["residual"], group["l1_scale"] = residual, scale
            if taken <= self.l1_warmup * self.steps:
                group["ramp_residual"] = residual
        if residual < self.target_residual:
            self.project()

    def _behind(self, group: dict[str, Any], residual: float) -> bool:
        """Whether the residual is above a geometric way from the end of the ramp to the deadline."""
        begin, end = self.l1_warmup * self.steps, self.deadline * self.steps
        if self.target_residual <= 0 or group["taken"] <= begin:
            return False
        progress = min(1.0, (group["taken"] - begin) / max(1.0, end - begin))
        return residual > group["ramp_residual"] ** (1 - progress) * self.target_residual**progress

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        memory, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "exp_avg" not in memory:
            memory["exp_avg"], memory["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        (first, second), taken = group["betas"], group["taken"] + 1
        sparse, frozen = group["pattern"] is not None, group["frozen"]
        if sparse and frozen:
            gradient = gradient * memory["kept"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        momentum, square = memory["exp_avg"].lerp_(gradient, 1 - first), memory["exp_avg_sq"]
        rate, correction = group["lr"] / (1 - first**taken), 1 - second**taken
        together = sparse and self.adapt in ("momentum", "ast")
        ramp = self.l1_warmup * self.steps
        progress = min(1.0, group["taken"] / ramp) if ramp else 1.0
        decay = progress * self.l1_max * group["l1_scale"]
        direction, averaged, losing = momentum, momentum if together else gradient, None
        if sparse and not frozen:
            losing = ~memory["kept"] if self.selective else torch.ones_like(memory["kept"])
            if together:
                direction = momentum if self.adapt == "ast" else momentum * (1 - progress * losing)
                averaged = parameter.sign().mul_(losing).mul_(decay).add_(direction)
        square.mul_(second).addcmul_(averaged, averaged, value=1 - second)
        slowness = (square / correction).sqrt_().add_(group["eps"])
        parameter.addcdiv_(direction, slowness, value=-rate)
        if losing is not None:
            shrink = slowness.reciprocal_().mul_(rate * decay) if together else self._plain_decay(slowness, decay)
            shrink.mul_(losing).mul_(1.0 if together else group["lr"])
            parameter.copy_(parameter.sign() * (parameter.abs() - shrink).clamp_(min=0))

    def _plain_decay(self, slowness: Tensor, decay: float) -> Tensor:
        """``λ a``, in learning rates, of the two forms in which gradients and decay do not share a second moment."""
        if self.adapt == "none":
            return torch.full_like(slowness, decay)
        return slowness.reciprocal_().mul_(decay).clamp_(max=self.cap)


def _check(
    lr: float,
    betas: tuple[float, float],
    steps: int,
    l1_max: float,
    l1_warmup: float,
    adapt: str,
    cap: float,
    mask_every: int,
    hysteresis: float,
    deadline: float,
    raise_by: float,
) -> None:
    if adapt not in get_args(Adapt):
        raise ConfigurationError(f"adapt is {adapt!r}; it must be one of {', '.join(get_args(Adapt))}")
    least = {"lr": lr, "l1_max": l1_max, "hysteresis": hysteresis}
    for name, value in least.items():
        if not value >= 0:
            raise ConfigurationError(f"{name} is {value}; it must be at least 0")
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"betas is {betas}; both must lie in [0, 1)")
    if steps < 1 or mask_every < 1:
        raise ConfigurationError(f"steps and mask_every are {steps} and {mask_every}; both must be at least 1")
    if not 0 <= l1_warmup <= 1 or not 0 < deadline <= 1:
        raise ConfigurationError(f"l1_warmup and deadline are {l1_warmup} and {deadline}; both are shares of the steps")
    if cap <= 0 or raise_by < 1:
        raise ConfigurationError(f"cap and raise_by are {cap} and {raise_by}; they must be above 0 and at least 1")
