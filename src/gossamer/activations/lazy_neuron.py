"""Lazy neurons: under ReLU most neurons of a transformer fall silent in training, and to force more does no harm.

Nobody asks for it, and it happens: with real labels and with random ones, on real and on random inputs, with data that
never repeat, in every architecture, and the more the wider the layer. A first step explains why: at the start, the
expected gradient of an active neuron is positive, so that descent pushes down whatever is up. Keeping the k largest
activations of every token makes the number certain, and takes the network's attention off what is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.core.registry import register
from gossamer.core.taps import Tap
from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.activation_density import ActivationDensity, activation_density
from gossamer.models.activation_functions import Swap, TopKActivation, swap_activations

Loss = Literal["cross-entropy", "squared error"]


@register(
    "lazy-neuron",
    paper="lazy-neuron",
    when="layer",
    granularity="activations",
    needs_data=False,
    timing="during training",
    path=("dense-to-dense",),
    topology="dynamic",
    criterion=("activation",),
    allocation="uniform",
    patterns=("channels",),
    aims=("inference", "quality"),
)
@dataclass(kw_only=True)
class TopKTransformer:
    """Keep the k largest activations of every token in each feed-forward layer, and train as before.

    Li et al., 2022, "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers", arXiv
    2210.06313, section 4. Quality hardly changes as long as k exceeds the number that fire by themselves; the authors
    take 64 to 256 of 3072.

    Parameters
    ----------
    k
        How many are kept in every layer.
    ratio
        Share of each layer's width that is kept instead of k.
    activation
        ``relu``, or ``keep`` for the activation that the model has; of its outputs only positive ones are kept.
    """

    k: int | None = 128
    ratio: float | None = None
    activation: Literal["relu", "keep"] = "relu"

    def __post_init__(self) -> None:
        if self.ratio is not None and self.k == 128:
            self.k = None
        if self.activation not in ("relu", "keep"):
            raise ConfigurationError(f"activation is {self.activation!r}; use 'relu' or 'keep'")
        TopKActivation(self.k, self.ratio)

    def install(self, model: nn.Module) -> Swap:
        """Exchange the activations of a model in place; the result takes them out again.

        Raises
        ------
        TargetError
            If the model has no feed-forward layer whose activation is a module.
        """
        if self.activation == "relu":
            swap = swap_activations(model, None, lambda: TopKActivation(self.k, self.ratio))
            swap.note_in_config("relu", exact=False)
            return swap
        return Swap.wrapping(model, lambda before: TopKActivation(self.k, self.ratio, before))


def topk_transformer(model: nn.Module, k: int) -> Swap:
    """ReLU and top-k in the place of all activations of a model; see :class:`TopKTransformer`."""
    return TopKTransformer(k=k).install(model)


def activation_taps(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.ReLU, TopKActivation)) -> list[Tap]:
    """Taps at the outputs of all activations of some classes, wherever they are; of nested ones the outermost.

    For networks that are no transformers, such as mixers and perceptrons.

    Raises
    ------
    TargetError
        If there is none.
    """
    found: list[Tap] = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{tap.name}.") for tap in found):
            found.append(Tap(name, module, "output"))
    if not found:
        raise TargetError(f"{type(model).__name__} has no {' or '.join(k.__name__ for k in kinds)}; name its classes")
    return found


# ------------------------------------------------------------------------------------------------- emergence


@dataclass
class Emergence:
    """How many neurons were active as training went on.

    Attributes
    ----------
    steps
        At which was looked, from 0.
    density
        Mean over layers at each, on data to be judged by.
    layers
        The same of each layer.
    trained, held_out
        Everything about the end, on data of training and on others.
    """

    steps: list[int] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    trained: ActivationDensity | None = None
    held_out: ActivationDensity | None = None

    @property
    def fell(self) -> float:
        """By how much the share of active neurons fell from the first look to the last."""
        return self.density[0] - self.density[-1]


def emergence_study(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    probe: Sequence[Any],
    *,
    seen: Sequence[Any] | None = None,
    taps: Sequence[Tap] | None = None,
    looks: int = 10,
    steps: int | None = None,
    each: Callable[[int], None] = lambda step: None,
) -> Emergence:
    """Train a model, and watch how many of its neurons are active.

    Initial weights and weight decay have a say in the result: keep them when data are compared.

    Parameters
    ----------
    model
        Trained in place.
    batches
        One for each step.
    loss
        Of the model on a batch.
    optimizer
        For its parameters.
    probe
        Inputs to look with, which training does not see, as :func:`activation_density` takes them.
    seen
        Inputs of training to look with at the end; by default the probe is all.
    taps
        Where; by default all ReLUs.
    looks
        How often, the start not counted.
    steps
        Number of batches where they do not say.
    each
        Called before every step, from 0; to change the learning rate, for instance.

    Raises
    ------
    CalibrationError
        If there is no batch.
    ConfigurationError
        If `looks` is below 1, or batches have no length and `steps` is not given.
    """
    total = len(batches) if steps is None and hasattr(batches, "__len__") else steps
    if total is None or looks < 1:
        raise ConfigurationError(
            f"looks is {looks} and steps {steps}; at least 1, and the number of batches, are needed"
        )
    taps = activation_taps(model) if taps is None else taps
    found = Emergence(layers={tap.name: [] for tap in taps})

    def look(step: int) -> ActivationDensity:
        seen_now = activation_density(model, probe, taps)
        found.steps.append(step)
        found.density.append(seen_now.density)
        for name, layer in seen_now.layers.items():
            found.layers[name].append(layer.density)
        return seen_now

    look(0)
    at = {round(total * (place + 1) / looks) for place in range(looks)} - {0}
    made = 0
    model.train()
    for made, batch in enumerate(batches, 1):
        each(made - 1)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if made in at:
            found.held_out = look(made)
    if not made or found.held_out is None:
        raise CalibrationError(f"{made} batches of {total} to train on; give them all")
    found.trained = activation_density(model, probe if seen is None else seen, taps)
    return found


# --------------------------------------------------------------------------------------- why at initialisation


@dataclass(frozen=True)
class ExpectedGradient:
    """The gradient of active neurons, averaged over random output layers.

    Attributes
    ----------
    mean, error
        And its standard error.
    p_value
        Of a test against "not positive", one-sided, by the normal distribution.
    networks
        How many were drawn.
    """

    mean: float
    error: float
    p_value: float
    networks: int


def expected_gradient(
    hidden: Tensor,
    classes: int,
    *,
    loss: Loss = "cross-entropy",
    scale: float = 1.0,
    networks: int = 2000,
    seed: int = 0,
) -> ExpectedGradient:
    """Average ∂L/∂p_i over the active neurons i of a hidden state p and over random zero-mean output layers V.

    Li et al., 2022, arXiv 2210.06313, theorem 3.1: with logits ``V p`` the softmax of class j grows with V_ji where
    p_i is active, so that ``Σ_j V_ji (softmax_j − y_j)`` has a positive mean, whatever the label; for squared error
    ``Σ_j V_ji (Σ_l V_jl p_l − y_j)`` has the mean ``p_i Σ_j Var V_ji``.

    Parameters
    ----------
    hidden
        p, ``(tokens, features)``, not negative.
    classes
        Rows of V.
    loss
        ``cross-entropy`` or ``squared error``, with random labels.
    scale
        Standard deviation of V times the square root of its columns.
    networks
        How many V are drawn, at least 2; each is one observation of the test.
    seed
        Of V and the labels.

    Raises
    ------
    ConfigurationError
        If a number is out of range, or p is negative somewhere.
    CalibrationError
        If nothing is active.
    """
    if loss not in get_args(Loss) or classes < 2 or networks < 2 or not scale > 0:
        raise ConfigurationError(
            f"loss is {loss!r}, classes {classes}, networks {networks} and scale {scale}; use one of "
            f"{', '.join(get_args(Loss))}, at least 2 classes and networks, and a scale above 0"
        )
    if bool((hidden < 0).any()):
        raise ConfigurationError("hidden is negative somewhere; give activations of ReLU")
    p = hidden.double()
    active = p > 0
    if not bool(active.any()):
        raise CalibrationError("no neuron is active; give a hidden state with some")
    generator = generator_for("random output layers", seed)
    means = []
    for _ in range(networks):
        v = torch.randn(classes, p.shape[1], generator=generator, dtype=torch.float64) * scale / math.sqrt(p.shape[1])
        labels = torch.randint(classes, (len(p),), generator=generator)
        logits = p @ v.T
        outputs = logits.softmax(1) if loss == "cross-entropy" else logits
        gradient = (outputs - nn.functional.one_hot(labels, classes)) @ v
        means.append(gradient[active].mean())
    found = torch.stack(means)
    mean, error = float(found.mean()), float(found.std()) / math.sqrt(networks)
    return ExpectedGradient(mean, error, 0.5 * math.erfc(mean / error / math.sqrt(2)), networks)


# -------------------------------------------------------------------------------------------- consequences


def noisy_labels(labels: Tensor, share: float, classes: int, seed: int = 0) -> Tensor:
    """Labels of which an exact share, rounded, has been replaced by random classes (which may be the right ones).

    Parameters
    ----------
    labels
        ``(n,)``.
    share
        In [0, 1].
    classes
        From which is drawn.
    seed
        Of both draws.

    Raises
    ------
    ConfigurationError
        If the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ConfigurationError(f"share is {share}; it must lie in [0, 1], such as 0.4")
    generator = generator_for("noisy labels", seed)
    places = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    changed = labels.clone()
    changed[places] = torch.randint(classes, (len(places),), generator=generator)
    return changed


@dataclass(frozen=True)
class FeedForwardFlops:
    """Operations of a feed-forward layer for one token, two for each multiplication and addition.

    Attributes
    ----------
    dense
        With all neurons.
    second
        If the matrix back skips those that are silent.
    both
        If the first skips them too, as an approximate top-k allows that names them beforehand.
    """

    dense: float
    second: float
    both: float


def feed_forward_flops(d: int, m: int, density: float, gated: bool = False) -> FeedForwardFlops:
    """Count operations of a layer d → m → d at a density.

    Raises
    ------
    ConfigurationError
        If the density is outside [0, 1].

    Examples
    --------
    >>> feed_forward_flops(8, 32, 0.25)
    FeedForwardFlops(dense=1024, second=640.0, both=256.0)
    """
    if not 0 <= density <= 1:
        raise ConfigurationError(f"density is {density}; it must lie in [0, 1]")
    one = 2 * d * m
    first = one * (2 if gated else 1)
    # a gate is computed in full; the matrix beside it is not
    exact = one * (1 + density) if gated else one
    return FeedForwardFlops(first + one, exact + one * density, (first + one) * density)
