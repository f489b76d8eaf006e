"""Gradients through what has none: rounding, coin flips, and units that are mostly zero.

A hard decision has a derivative of zero almost everywhere, so a network that makes one cannot be trained by the
chain rule alone. There are four ways out [Bengio, Léonard & Courville, 2013, arXiv 1308.3432]: pretend that the
decision was the identity (straight-through), let the gradient flow through a smooth factor beside it
(stochastic-times-smooth), put the noise before a function that has a derivative (noise injection), or score whole
decisions by the loss that followed (the likelihood ratio, known as REINFORCE). Whoever needs a hard gate, a
quantised state or a learned mask finds the primitive here.

Every function that draws takes a generator and otherwise uses torch's own. Logits are clamped to ±15, where a
probability is still told from 0 and 1 in single precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

LOGIT_LIMIT = 15.0
Noise = Literal["logistic", "normal"]
Baseline = Literal["optimal", "mean", "none"]


def gate_probability(logits: Tensor) -> Tensor:
    """``sigm(a)`` of the clamped logits, in (0, 1)."""
    return torch.sigmoid(logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))


def uniform_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Numbers drawn from [0, 1) in the shape, type and place of a tensor; single precision at least."""
    dtype = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    device = tensor.device if generator is None else generator.device
    return torch.rand(tensor.shape, generator=generator, dtype=dtype, device=device).to(tensor.device)


# ---------------------------------------------------------------------------------------------- straight through


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_st(x: Tensor) -> Tensor:
    """The nearest whole number, with the gradient of the identity. Halves go to the even neighbour."""
    return _Rounded.apply(x)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied: by −1 it is reversed, by 0 it ends."""
    return _Scaled.apply(x, factor)


def quantize_st(x: Tensor, step: Tensor, step_gradient: float = -1.0) -> Tensor:
    """``round(x / θ) · θ`` with the gradient of the identity to `x`, and a chosen one to the step.

    The division passes nothing to θ, the multiplication passes ``step_gradient · Σ g · round(x / θ)``. With the
    ordinary factor 1, a penalty on the size of the result shrinks θ towards zero, where nothing is quantised any
    more; the negated one lets the same penalty coarsen the levels [Yousefzadeh & Sifalakis, 2021, arXiv 2107.07305].

    Parameters
    ----------
    x
        Any shape.
    step
        θ > 0, of a shape that broadcasts to that of `x`.
    step_gradient
        Factor of the gradient to θ; 0 for a step that is given.
    """
    return round_st(x / step.detach()) * scale_gradient(step, step_gradient)


class _Bernoulli(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, drawn: Tensor, temper: bool) -> Tensor:
        probability = gate_probability(logits)
        ctx.temper = temper
        ctx.save_for_backward(probability)
        return (drawn < probability).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (probability,) = ctx.saved_tensors
        gradient = gradients[0]
        return (gradient * probability * (1 - probability) if ctx.temper else gradient), None, None


def bernoulli_st(logits: Tensor, temper: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Zeros and ones, ``h = 1[z < sigm(a)]``, with the gradient of h handed to a as it is.

    The estimator is biased; for one layer it has the right sign [Bengio et al., 2013, arXiv 1308.3432].

    Parameters
    ----------
    logits
        a, any shape.
    temper
        Whether to multiply the gradient by ``sigm′(a)``, as if the probability had been passed on.
    generator
        For z.
    """
    return _Bernoulli.apply(logits, uniform_like(logits, generator), temper)


def threshold_st(logits: Tensor, temper: bool = False) -> Tensor:
    """``1[sigm(a) > 1/2]``, the gate without chance, with the gradient of :func:`bernoulli_st`."""
    return _Bernoulli.apply(logits, torch.full_like(logits, 0.5), temper)


# --------------------------------------------------------------------------------- smooth factors and injected noise


def stochastic_times_smooth(logits: Tensor, generator: torch.Generator | None = None, doubled: bool = True) -> Tensor:
    """``h = b √p`` with ``b ~ Bernoulli(√p)``, so that the mean is p and zeros are exact.

    Back-propagation goes through √p and takes b as given. That sees half of how the expected loss depends on p: the
    other half is how often b is one. To first order in √p both halves are equal, so the gradient is doubled, after
    which it is exact for a linear loss [Bengio et al., 2013, arXiv 1308.3432].

    Parameters
    ----------
    logits
        a, any shape; ``p = sigm(a)``.
    generator
        For b.
    doubled
        Whether to double; without, this is plain back-propagation.
    """
    # the root as an exponential: its derivative stays finite where that of a square root would not
    smooth = (0.5 * nn.functional.logsigmoid(logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))).exp()
    passed = scale_gradient(smooth, 2.0) if doubled else smooth
    return passed * (uniform_like(logits, generator) < smooth).to(logits.dtype)


def draw_noise(like: Tensor, noise: Noise = "logistic", generator: torch.Generator | None = None) -> Tensor:
    """Standard logistic or normal numbers in the shape of a tensor.

    Raises
    ------
    UnknownNameError
        If there is no such noise.
    """
    if noise not in get_args(Noise):
        raise UnknownNameError("noise", noise, get_args(Noise))
    # a uniform number of zero would become minus infinity
    drawn = uniform_like(like, generator).clamp(1e-7, 1 - 1e-7)
    values = torch.logit(drawn) if noise == "logistic" else torch.special.ndtri(drawn)
    return values.to(like.dtype)


def inject_noise(
    logits: Tensor,
    function: Callable[[Tensor], Tensor] = torch.relu,
    noise: Noise = "logistic",
    scale: float = 1.0,
    multiply: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``f(a + s n)`` or ``f(a (1 + s n))``, differentiated as it stands [Bengio et al., 2013].

    Parameters
    ----------
    logits
        a, any shape.
    function
        f.
    noise, scale
        Law of n, and s ≥ 0.
    multiply
        Whether the noise multiplies.
    generator
        For n.
    """
    drawn = scale * draw_noise(logits, noise, generator)
    return function(logits * (1 + drawn) if multiply else logits + drawn)


def noisy_rectifier(
    logits: Tensor, noise: Noise = "logistic", scale: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``max(0, a + s n)``: a sparse stochastic gate with real values and an unbiased gradient.

    With logistic noise of scale 1 it is active with probability ``sigm(a)``, with normal noise with ``Φ(a)``.
    """
    return inject_noise(logits, torch.relu, noise, scale, generator=generator)


def gumbel_sigmoid(
    logits: Tensor, temperature: float = 1.0, hard: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """``sigm((a + n) / τ)`` with logistic n: a relaxed coin [Maddison et al., 2017, arXiv 1611.00712].

    Parameters
    ----------
    logits
        a, any shape.
    temperature
        τ > 0.
    hard
        Whether to return the coin itself, with the gradient of the relaxed one.
    generator
        For n.

    Raises
    ------
    ConfigurationError
        If τ is not positive.
    """
    if not temperature > 0:
        raise ConfigurationError(f"temperature is {temperature}; it must be positive, such as 1.0")
    soft = torch.sigmoid((logits + draw_noise(logits, generator=generator)) / temperature)
    if not hard:
        return soft
    # soft − soft is exactly zero, so that the values are exact zeros and ones
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


# ----------------------------------------------------------------------------------------------- likelihood ratio


class Reinforce(nn.Module):
    """Coins whose logits learn from the loss alone: ``g = (h − p)(L − L̄)``, unbiased for ``∂E[L] / ∂a``.

    Bengio et al., 2013, arXiv 1308.3432, after Williams, 1992. Of all constants,
    ``L̄ = E[(h − p)² L] / E[(h − p)²]`` leaves a unit's estimate the least variance. The averages are updated after
    they are used, so that the baseline never depends on the sample that it is subtracted from.

    Parameters
    ----------
    baseline
        ``"optimal"`` as above, ``"mean"`` for the average loss, ``"none"`` for zero.
    decay
        Of the moving averages, in [0, 1).

    Raises
    ------
    UnknownNameError, ConfigurationError
        If there is no such baseline, or the decay is out of range.

    Examples
    --------
    >>> gate = Reinforce()
    >>> logits = torch.zeros(4, 3, requires_grad=True)
    >>> h = gate(logits)
    >>> gate.surrogate(h.sum(1)).backward()
    >>> logits.grad.shape
    torch.Size([4, 3])
    """

    weighted_loss: Tensor
    weight: Tensor

    def __init__(self, baseline: Baseline = "optimal", decay: float = 0.99):
        super().__init__()
        if baseline not in get_args(Baseline):
            raise UnknownNameError("baseline", baseline, get_args(Baseline))
        if not 0 <= decay < 1:
            raise ConfigurationError(f"decay is {decay}; it must lie in [0, 1), such as 0.99")
        self.baseline_kind, self.decay = baseline, decay
        self.register_buffer("weighted_loss", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))
        self._drawn: tuple[Tensor, Tensor] | None = None

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw zeros and ones, through which no gradient flows, ``(batch, …)`` as the logits."""
        sample = (uniform_like(logits, generator) < gate_probability(logits)).to(logits.dtype)
        self._drawn = (logits, sample)
        return sample

    def surrogate(self, losses: Tensor) -> Tensor:
        """A number whose gradient to the logits is the batch's mean of the estimate; its value means nothing.

        Parameters
        ----------
        losses
            ``(batch,)``, one for each sample; no gradient flows through them.

        Raises
        ------
        ConfigurationError
            If nothing was drawn since the last call.
        CalibrationError
            If there is not one loss for each sample.
        """
        if self._drawn is None:
            raise ConfigurationError("no sample to score: call the gate once before each call of surrogate")
        logits, sample = self._drawn
        if losses.shape != logits.shape[:1]:
            raise CalibrationError(
                f"losses have shape {tuple(losses.shape)} for {logits.shape[0]} samples; "
                "give one for each, such as cross_entropy(..., reduction='none')"
            )
        self._drawn = None
        with torch.no_grad():
            score = sample - gate_probability(logits)
            loss = losses.detach().to(score.dtype).view(-1, *[1] * (score.dim() - 1))
            estimate = score * (loss - self.baseline())
            self._update(score, loss)
        return (logits * estimate).sum() / len(losses)

    def baseline(self) -> Tensor:
        """L̄ of every unit, or zero before the first update."""
        return torch.where(self.weight > 0, self.weighted_loss / self.weight.clamp(min=1e-30), 0.0)

    def _update(self, score: Tensor, loss: Tensor) -> None:
        if self.baseline_kind == "none":
            return
        square = score.square() if self.baseline_kind == "optimal" else torch.ones_like(score)
        for name, value in (("weighted_loss", (square * loss).mean(0)), ("weight", square.mean(0))):
            before = getattr(self, name)
            setattr(self, name, self.decay * before + (1 - self.decay) * value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any) -> None:
        # the averages take the shape of the units with the first batch, which a fresh gate has not seen
        for name in ("weighted_loss", "weight"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.zeros_like(stored, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def extra_repr(self) -> str:  # noqa: D102
        return f"baseline={self.baseline_kind!r}, decay={self.decay}"
