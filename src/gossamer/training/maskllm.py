"""MaskLLM: which N of M weights stay is learned on the model's own loss, and the weights are not touched.

One-shot pruning guesses from a little calibration text which weights matter. MaskLLM makes the choice a parameter: a
categorical distribution over the C(M, N) masks of every group, from which Gumbel's trick samples masks that are soft
enough to have gradients. Temperature falls and logits are scaled up until the samples are almost binary; then the
likeliest mask is taken. Since the weights stay frozen, one model can serve many tasks, each with its own mask.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Pattern
from gossamer.core.registry import register
from gossamer.core.schedules import Cosine, Linear
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CheckpointError, ConfigurationError, PatternError, TargetError
from gossamer.training.mask_distribution import Clock, MaskGate, group_axis
from gossamer.training.parametrized import parametrize_, unparametrize_

_MANY = 8  # logits for each weight
_INSTALLED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@register(
    "maskllm",
    paper="maskllm",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("learned",),
    allocation="fixed",
    patterns=("n:m",),
    aims=("inference",),
)
@dataclass(kw_only=True)
class MaskLLM:
    """Learn N:M masks of a frozen model through Gumbel-softmax over all candidates.

    Fang et al., 2024, "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", arXiv 2409.17481:
    ``W ⊙ p S`` with ``p = softmax((κ π + g) / τ)``, and the loss less ``λ Σ ‖W ⊙ p S‖²``.

    Parameters
    ----------
    pattern
        Any N of M, along any dimension.
    steps
        T, of the optimiser; τ, κ and λ move over them.
    prior
        Masks to start from: those of any pruner at the same pattern, those learned on another domain, ``"magnitude"``,
        or None. Only logits are changed by it.
    prior_strength
        α, in standard deviations of the logits.
    tau, kappa
        Temperature, and factor of the logits, at the beginning and at the end; straight lines between.
    norm_reg
        λ at the beginning; it falls to zero. It is added to the gradients of the logits once a step; with a gradient
        scaler set it to 0, or take ``add_regularization=False``.
    add_regularization
        False leaves it to the loop to add :meth:`MaskLearning.loss_term` to its loss.
    hard
        Whether the forward pass sees binary masks and only the backward pass soft ones.
    init_std
        Of the logits at first.
    dtype
        Of the logits, and so of the optimiser's memory: ``"float32"`` or ``"bfloat16"``.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`.
    seed
        Of the logits and of the noise.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> learning = MaskLLM(pattern="2:4", steps=20, prior="magnitude").install(model)
    >>> optimizer, _ = learning.optimizer()
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(4, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> learning.finalize()
    MaskSet(1 parameters, 128 weights, 50.0000% zero)
    """

    pattern: Pattern | str = "2:4"
    steps: int = 2000
    prior: MaskSet | Literal["magnitude"] | None = None
    prior_strength: float = 3.0
    tau: tuple[float, float] = (4.0, 0.05)
    kappa: tuple[float, float] = (1e2, 5e2)
    norm_reg: float = 1e-5
    add_regularization: bool = True
    hard: bool = False
    init_std: float = 0.01
    dtype: Literal["float32", "bfloat16"] = "float32"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        if not isinstance(pattern, NM):
            raise PatternError(f"pattern is {pattern}; masks are learned for N:M patterns such as 2:4")
        self.pattern = pattern
        if self.steps < 1:
            raise ConfigurationError(f"steps is {self.steps}; it must be at least 1")
        for name in ("tau", "kappa"):
            if min(getattr(self, name)) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; both ends must be above 0")
        for name in ("norm_reg", "prior_strength"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")
        if isinstance(self.prior, str) and self.prior != "magnitude":
            raise ConfigurationError(f"prior is {self.prior!r}; it must be a MaskSet, 'magnitude' or None")

    def install(self, model: nn.Module) -> MaskLearning:
        """Put a gate on every weight matrix and freeze everything else; see :class:`MaskLearning`.

        Raises
        ------
        TargetError
            If no layer matches, or the prior lacks one.
        PatternError
            If the pattern does not divide a layer.
        ConfigurationError
            If the model has gates already, a weight is tied to another layer, or a group of the prior does not keep
            exactly N.
        """
        return MaskLearning(self, model)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> MaskLearning:
        """Install if that has not been done, give the logits to the optimiser if it lacks them, and follow its steps.

        For ``transformers.Trainer`` call :meth:`install` first, and then
        :func:`gossamer.training.callbacks.transformers_callback` with this method: its optimiser then holds the logits.
        """
        held_by = _INSTALLED.get(model)
        learning = held_by() if held_by else self.install(model)
        if learning is None:
            raise ConfigurationError("keep what install() returned: the gates of this model have lost it")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fresh = [p for p in learning.parameters() if id(p) not in held]
        if fresh:
            optimizer.add_param_group({"params": fresh})
        learning.follow(optimizer)
        if state is not None:
            learning.load_state_dict(state)
        return learning


@dataclass(frozen=True)
class MaskDiagnostics:
    """How far the choice is made.

    Attributes
    ----------
    max_probability
        Mean over groups of the largest probability.
    changed
        Share of the groups whose likeliest mask is another than when this was last asked.
    from_prior
        Share of the groups whose likeliest mask is not that of the prior (without one: of the first logits).
    """

    max_probability: float
    changed: float
    from_prior: float


class MaskLearning:
    """A model whose masks are being learned; what :meth:`MaskLLM.install` returns.

    The model is trained as any other: with the loop, the Trainer, the accumulation of the user. In ``eval()`` it uses
    the likeliest masks. Logits are parameters of the model and saved with it.

    Attributes
    ----------
    method, model
        What runs.
    gates
        Parameter name → :class:`~gossamer.training.mask_distribution.MaskGate`.
    """

    def __init__(self, method: MaskLLM, model: nn.Module):
        if model in _INSTALLED:
            raise ConfigurationError("masks of this model are being learned already; finalize() that first")
        self.method, self.model = method, model
        self.clock = Clock(method.kappa[0], method.tau[0], hard=method.hard, seed=method.seed)
        self._handle: Any = None
        self._targets = _targets(method, model)
        self._wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        self.gates = {name: self._gate(target) for name, target in self._targets.items()}
        for name, gate in self.gates.items():
            self._add_prior(name, gate)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._order = {name: tuple(target.module._parameters) for name, target in self._targets.items()}
        for name, target in self._targets.items():
            parametrize_(target, self.gates[name])
        self._first = self._last = {name: gate.choice() for name, gate in self.gates.items()}
        _INSTALLED[model] = weakref.ref(self)
        self._move(0)

    def _gate(self, target: Target) -> MaskGate:
        assert isinstance(self.method.pattern, NM)
        parameter, dtype = target.parameter, getattr(torch, self.method.dtype)
        axis = group_axis(target, self.method.pattern)
        name, std = target.parameter_name, self.method.init_std
        gate = MaskGate(name, parameter.shape, self.method.pattern, axis, self.clock, dtype, parameter.device, std=std)
        return gate

    def _add_prior(self, name: str, gate: MaskGate) -> None:
        prior = self.method.prior
        if prior is None:
            return
        if isinstance(prior, str):
            magnitude = self._targets[name].parameter.detach().abs()
            mask = NM(gate.n, gate.m, gate.axis).select(magnitude, name=name)
        elif name in prior and prior.shapes[name] == self._targets[name].parameter.shape:
            mask = prior[name]
        else:
            raise TargetError(f"the prior has no mask of the shape of {name}; prune the same layers, or exclude it")
        gate.add_prior(mask, self.method.prior_strength)

    # ------------------------------------------------------------------------------------------ the run

    @property
    def step(self) -> int:
        """Steps of the optimiser so far."""
        return self.clock.step

    def parameters(self) -> Iterator[nn.Parameter]:
        """The logits, which are all that trains."""
        for gate in self.gates.values():
            yield gate.logits

    def optimizer(
        self, learning_rate: float = 5e-4, final: float = 5e-5, weight_decay: float = 0.1
    ) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser of the paper, followed, and its cosine; gradients are to be clipped at norm 1.

        Parameters
        ----------
        learning_rate, final
            At the beginning and the end: those of the paper, 5e-5 and 5e-6, times its factor of 10 for gates.
        weight_decay
            Which pulls all masks towards the same probability.
        """
        optimizer = torch.optim.AdamW(
            list(self.parameters()), learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=weight_decay, fused=True
        )
        self.follow(optimizer)
        rate = Cosine(final / learning_rate, self.method.steps, 1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the schedules after every step of an optimiser.

        Raises
        ------
        ConfigurationError
            If it does not hold the logits.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, gate in self.gates.items() if id(gate.logits) not in held]
        if missing:
            raise ConfigurationError(f"the optimizer lacks the logits of {missing[0]}; give it learning.parameters()")
        if self._handle is not None:
            self._handle.remove()
        self._handle = optimizer.register_step_post_hook(lambda *_: self._move(self.step + 1))

    def _move(self, step: int) -> None:
        method, end = self.method, self.method.steps
        self.clock.step = step
        self.clock.tau = Linear(method.tau[1], end, method.tau[0])(step)
        self.clock.kappa = Linear(method.kappa[1], end, method.kappa[0])(step)
        self.clock.norm_reg = Linear(0.0, end, method.norm_reg)(step) if method.add_regularization else 0.0

    def loss_term(self) -> Tensor:
        """``−λ Σ ‖W ⊙ M̃‖²`` of the present step, to be added to a loss if ``add_regularization`` is False."""
        weight = Linear(0.0, self.method.steps, self.method.norm_reg)(self.step)
        terms = [getattr(t.module, t.attribute).float().square().sum() for t in self._targets.values()]
        return -weight * torch.stack(terms).sum()

    # ------------------------------------------------------------------------------------------ what is learned

    def masks(self) -> MaskSet:
        """The likeliest masks: exactly N of every M."""
        return MaskSet({name: gate.mask().bool().cpu() for name, gate in self.gates.items()})

    def diagnostics(self) -> MaskDiagnostics:
        """How far the choice is made; what :attr:`MaskDiagnostics.changed` counts from is set anew."""
        now = {name: gate.choice() for name, gate in self.gates.items()}
        total = sum(len(each) for each in now.values())
        changed = sum(int((now[name] != self._last[name]).sum()) for name in now)
        differs = sum(int((now[name] != self._first[name]).sum()) for name in now)
        likely = sum(gate.max_probability() * len(now[name]) for name, gate in self.gates.items())
        self._last = now
        return MaskDiagnostics(likely / total, changed / total, differs / total)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on besides the model, which holds the logits, and the optimiser."""
        return {"method": "MaskLLM", "step": self.step, "first": self._first, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run stopped; load model and optimiser as well, in any order.

        Raises
        ------
        CheckpointError
            If the state is of something else.
        """
        if state.get("method") != "MaskLLM" or set(state.get("first", ())) != set(self.gates):
            raise CheckpointError("the state is of no MaskLLM run over these layers; install the same method first")
        self._first, self._last = dict(state["first"]), dict(state["last"])
        self._move(int(state["step"]))

    def finalize(self, apply: bool = True) -> MaskSet:
        """End: the gates go, and the model is a plain one whose weights require gradients as before.

        Parameters
        ----------
        apply
            Whether the weights that the masks remove become zero; False leaves the dense model, as for a
            :class:`gossamer.training.mask_bank.MaskBank`.

        Returns
        -------
        MaskSet
            The likeliest masks.
        """
        if self.model not in _INSTALLED:
            raise ConfigurationError("this run has been finalized already; install the method again to go on")
        masks = self.masks()
        del _INSTALLED[self.model]
        if self._handle is not None:
            self._handle.remove()
        for name, target in self._targets.items():
            unparametrize_(target, self._order[name], keep=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._wanted[name])
        if apply:
            masks.apply_(self.model)
        return masks


def _targets(method: MaskLLM, model: nn.Module) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for target in find_targets(model, method.include, method.exclude, heads=method.heads):
        if target.aliases:
            raise ConfigurationError(f"{target.name} is tied to {target.aliases[0]}; exclude it to learn masks")
        found.setdefault(target.parameter_name, target)
    assert isinstance(method.pattern, NM)
    n, m = method.pattern.n, method.pattern.m
    gate = MaskGate("", torch.Size([1, m]), method.pattern, 1, Clock(1, 1))
    share = len(gate.logits) / m
    if share > _MANY:
        warnings.warn(
            f"{n}:{m} has {len(gate.logits)} masks, {share:.3g} logits for every weight; "
            f"take dtype='bfloat16', or include fewer layers at a time, if memory is short",
            stacklevel=5,
        )
    return found
