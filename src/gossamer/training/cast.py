"""CAST: a dense model becomes N:M sparse while it trains, without a mask ever being applied to it.

A hard mask makes the loss jump and cuts the gradient of what it removes. CAST lets the optimiser wear the losing
weights of every group away instead (:mod:`gossamer.training.adams`), gives every row a factor that makes up for what
it loses in size, and lets the dense model teach its sparse form. When the losers are gone, cutting them off changes
nothing, and the factors are multiplied into the weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Pattern
from gossamer.core.progress import track
from gossamer.core.quantization import Quantizer
from gossamer.core.registry import register
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, PatternError
from gossamer.training.adams import AdamS, Adapt
from gossamer.training.distillation import SelfDistillation
from gossamer.training.mask_distribution import group_axis
from gossamer.training.parametrized import ScaledWeight, parametrize_, unparametrize_

_INSTALLED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@register(
    "cast",
    paper="cast",
    when="during training",
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("magnitude", "learned"),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class CAST:
    """Train a dense model into N:M form with AdamS, weight scaling and self-distillation.

    Huang, Hu, Zhu & Chen, 2025, "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for
    Large Language Models", arXiv 2509.25996.

    Parameters
    ----------
    pattern
        Any N of M, along any dimension.
    steps
        T, of the optimiser.
    learning_rate, betas, eps, weight_decay
        Of :class:`~gossamer.training.adams.AdamS`; norms, embeddings and heads train with plain Adam.
    l1_max, l1_warmup, adapt, cap, mask_every, hysteresis, selective, target_residual, deadline, raise_by
        Of AdamS: the decay. `l1_max` is of the size of a gradient and depends on model and batch; AdamS raises it.
    scale_blocks
        Blocks of inputs of each row that have a factor (the paper takes 2), 0 for no factors. Layers whose inputs
        do not divide into so many blocks of whole groups have one factor for a row.
    scale_rate
        Learning rate of the factors' logarithms, as a multiple of the learning rate.
    temperature, alpha, hidden
        Of :class:`~gossamer.training.distillation.SelfDistillation`.
    include, exclude, heads
        Which layers become sparse; see :func:`gossamer.core.targets.find_targets`.
    seed
        Of the order of the batches in :meth:`CastTraining.fit`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> training = CAST(pattern="2:4", steps=30, mask_every=5, l1_max=0.1).install(model)
    >>> for _ in range(30):
    ...     training.optimizer.zero_grad()
    ...     model(torch.ones(4, 8)).square().sum().backward()
    ...     training.optimizer.step()
    >>> training.finalize()
    MaskSet(1 parameters, 128 weights, 50.0000% zero)
    """

    pattern: Pattern | str = "2:4"
    steps: int = 1000
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    l1_max: float = 1e-4
    l1_warmup: float = 0.5
    adapt: Adapt = "momentum"
    cap: float = 10.0
    mask_every: int = 10
    hysteresis: float = 0.01
    selective: bool = True
    target_residual: float = 1e-3
    deadline: float = 0.8
    raise_by: float = 1.5
    scale_blocks: int = 2
    scale_rate: float = 1.0
    temperature: float = 1.0
    alpha: float = 1 / 3
    hidden: float = 0.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        if not isinstance(pattern, NM):
            raise PatternError(f"pattern is {pattern}; CAST makes N:M patterns such as 2:4")
        self.pattern = pattern
        if self.scale_blocks < 0 or self.scale_rate < 0:
            raise ConfigurationError(
                f"scale_blocks and scale_rate are {self.scale_blocks} and {self.scale_rate}; both must be at least 0"
            )
        SelfDistillation(None, self.temperature, self.alpha, self.hidden)
        self._optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])  # refuses what is out of range

    def install(self, model: nn.Module) -> CastTraining:
        """Put the factors on every weight matrix and make the optimiser; see :class:`CastTraining`.

        Raises
        ------
        TargetError
            If no layer matches.
        PatternError
            If the pattern does not divide a layer.
        ConfigurationError
            If the model is being trained by CAST already, or a weight is frozen, tied, or in half precision.
        """
        return CastTraining(self, model)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> CastTraining:
        """The training that :meth:`install` has begun, if `optimizer` is its own; for callbacks of other loops.

        Raises
        ------
        ConfigurationError
            If it is another optimiser: CAST acts inside its own.
        """
        held = _INSTALLED.get(model)
        training = held() if held else None
        if training is None or training.optimizer is not optimizer:
            raise ConfigurationError(
                "CAST acts inside its own optimizer: call training = CAST(...).install(model) and train with "
                "training.optimizer"
            )
        if state is not None:
            training.load_state_dict(state)
        return training

    def _optimizer(self, groups: list[dict[str, Any]]) -> AdamS:
        return AdamS(
            groups,
            self.learning_rate,
            self.betas,
            self.eps,
            self.weight_decay,
            steps=self.steps,
            l1_max=self.l1_max,
            l1_warmup=self.l1_warmup,
            adapt=self.adapt,
            cap=self.cap,
            mask_every=self.mask_every,
            hysteresis=self.hysteresis,
            selective=self.selective,
            target_residual=self.target_residual,
            deadline=self.deadline,
            raise_by=self.raise_by,
        )


class CastTraining:
    """A model on its way to N:M; what :meth:`CAST.install` returns.

    Attributes
    ----------
    method, model
        What runs.
    optimizer
        To be stepped by any loop; nothing else has to be called until :meth:`finalize`.
    """

    def __init__(self, method: CAST, model: nn.Module):
        if model in _INSTALLED:
            raise ConfigurationError("this model is being trained by CAST already; finalize() that first")
        self.method, self.model = method, model
        self._targets = _targets(method, model)
        self._weights = {name: target.parameter for name, target in self._targets.items()}
        self._order = {name: tuple(target.module._parameters) for name, target in self._targets.items()}
        by_pattern: dict[str, list[nn.Parameter]] = {}
        for name, weight in self._weights.items():
            by_pattern.setdefault(str(self._stored_pattern(name)), []).append(weight)
        sparse = [{"params": weights, "pattern": pattern} for pattern, weights in by_pattern.items()]
        taken = {id(weight) for weight in self._weights.values()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        scales = self._add_scales() if method.scale_blocks else []
        groups: list[dict[str, Any]] = [*sparse]
        if others:
            groups.append({"params": others})
        if scales:
            groups.append({"params": scales, "lr": method.learning_rate * method.scale_rate, "weight_decay": 0.0})
        self.optimizer = method._optimizer(groups)
        _INSTALLED[model] = weakref.ref(self)

    def _stored_pattern(self, name: str) -> NM:
        """The pattern along the dimension of the parameter as it is stored."""
        assert isinstance(self.method.pattern, NM)
        pattern = self.method.pattern
        stored = NM(pattern.n, pattern.m, group_axis(self._targets[name], pattern))
        stored.check_shape(tuple(self._weights[name].shape), name)
        return stored

    def _add_scales(self) -> list[nn.Parameter]:
        assert isinstance(self.method.pattern, NM)
        found = []
        for name, target in self._targets.items():
            axis, stacked = self._stored_pattern(name).dim, int(target.index is not None)
            row = 2 * stacked + 1 - axis if axis - stacked < 2 else stacked
            length, blocks = target.parameter.shape[axis], self.method.scale_blocks
            blocks = blocks if length % (blocks * self.method.pattern.m) == 0 else 1
            scale = ScaledWeight(target.parameter.detach(), axis, row, blocks)
            parametrize_(target, scale)
            found.append(scale.log_scale)
        return found

    # ------------------------------------------------------------------------------------------ the run

    @property
    def residual(self) -> float:
        """Share of ``Σ|w|`` that is in losing weights."""
        return self.optimizer.residual

    def distillation(self, teacher: nn.Module | None) -> SelfDistillation:
        """The loss with the method's settings; without a teacher the cross-entropy."""
        return SelfDistillation(teacher, self.method.temperature, self.method.alpha, self.method.hidden)

    def fit(self, batches: Iterable[Any], teacher: nn.Module | None = None, progress: bool = True) -> list[float]:
        """Train for all the steps; the learning rate falls along a cosine, gradients are clipped at norm 1.

        Parameters
        ----------
        batches
            Token ids ``(batch, length)``, in an order that follows the seed, as often as needed.
        teacher
            The dense model, another object than the one that trains.
        progress
            Whether to show a bar.

        Returns
        -------
        list of float
            The loss of every step.

        Raises
        ------
        NonFiniteError
            If a loss is NaN or infinite.
        """
        loss, data = self.distillation(teacher), list(batches)
        generator = torch.Generator().manual_seed(self.method.seed)
        peaks = [group["lr"] for group in self.optimizer.param_groups]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found: list[float] = []
        order: list[int] = []
        self.model.train()
        for step in track(range(self.method.steps), "cast", enabled=progress):
            for group, peak in zip(self.optimizer.param_groups, peaks):
                group["lr"] = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * step / self.method.steps)) / 2)
            order = order or torch.randperm(len(data), generator=generator).tolist()
            self.optimizer.zero_grad()
            value = loss(self.model, data[order.pop()])
            if not torch.isfinite(value):
                raise NonFiniteError(f"the loss is {float(value.detach())} at step {step + 1}; lower the learning rate")
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            found.append(float(value.detach()))
        return found

    def masks(self) -> MaskSet:
        """What wins at present: exactly N of every M."""
        return MaskSet({name: self.optimizer.kept(weight).cpu() for name, weight in self._weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides model and optimiser, which hold everything: its name."""
        return {"method": "CAST"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another method.

        Raises
        ------
        CheckpointError
            If it is one.
        """
        if state.get("method") != "CAST":
            raise CheckpointError(f"the state is of {state.get('method')!r}, and CAST is installed")

    def finalize(self) -> MaskSet:
        """End: what loses is cut off, factors go into the weights, and the model is a plain one.

        Returns
        -------
        MaskSet
            What remains: exactly N of every M.
        """
        if self.model not in _INSTALLED:
            raise ConfigurationError("this run has been finalized already; install the method again to go on")
        self.optimizer.project()
        masks = self.masks()
        del _INSTALLED[self.model]
        if self.method.scale_blocks:
            for name, target in self._targets.items():
                unparametrize_(target, self._order[name], keep=True)
        return masks


@torch.no_grad()
def quantize_(model: nn.Module, masks: MaskSet, bits: int = 8, group_size: int | None = None) -> None:
    """Round what the masks keep to a symmetric grid, in place; zeros stay zero.

    Parameters
    ----------
    model
        A plain one.
    masks
        Which weights, as of :meth:`CastTraining.finalize`.
    bits, group_size
        Of :class:`gossamer.core.quantization.Quantizer`: inputs that share a grid, None for a row.
    """
    parameters = dict(model.named_parameters())
    for name in masks:
        weight = parameters[name]
        size = group_size or weight[0].numel()
        rows = weight.reshape(len(weight), -1)
        if rows.shape[1] % size:
            raise ConfigurationError(f"group_size is {size}; it must divide the {rows.shape[1]} inputs of {name}")
        groups = rows.reshape(-1, size)
        grid = Quantizer(bits, symmetric=True).fit(groups)
        rounded = grid.round(groups).view(weight.shape)
        weight.copy_(rounded.masked_fill_(~masks[name].to(weight.device), 0))


def _targets(method: CAST, model: nn.Module) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for target in find_targets(model, method.include, method.exclude, heads=method.heads):
        if target.aliases:
            raise ConfigurationError(f"{target.name} is tied to {target.aliases[0]}; exclude it to train with CAST")
        if not target.parameter.requires_grad:
            raise ConfigurationError(
                f"{target.name} has requires_grad=False and cannot train; exclude it or unfreeze it"
            )
        if target.parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"{target.name} is {target.parameter.dtype}, which loses the small steps of CAST; keep it in float32 "
                f"and use autocast"
            )
        found.setdefault(target.parameter_name, target)
    return found
