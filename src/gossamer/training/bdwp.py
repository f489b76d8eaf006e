"""BDWP: N:M weights in the backward pass too, by a second mask.

A linear layer multiplies with its weight twice in training: forwards along the inputs, ``Y = X Wᵀ``, and backwards
along the outputs, ``dX = dY W``. N:M hardware needs groups along whatever is summed over, so that a mask which serves
one product is of no use to the other. BDWP takes two from the same dense weight: W_F with groups along the inputs,
W_B with groups along the outputs. The weight gradient, the third product, stays dense. What comes back from W_B is not
the gradient of what went through W_F, and it turns out not to matter much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.grad as convolution_gradients
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.nm_sparsifier import NMSparsifier, as_nm
from gossamer.core.patterns import NM, Pattern
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.registry import register
from gossamer.core.sparse_sites import Site
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.targets import Target
from gossamer.core.transposable import TransposableNM
from gossamer.errors import ConfigurationError, PatternError
from gossamer.training.sr_ste import Mode, pull

Variant = Literal["bidirectional", "forward", "transposable", "gradients"]
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_BACKWARD: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → BidirectionalWeight; copies of a model have none


def backward_mask(weight: Tensor, n: int, m: int, groups: int = 1) -> Tensor:
    """Mask of W_B: the N largest of every M along the outputs.

    Parameters
    ----------
    weight
        ``(out, in / groups)`` or ``(out, in / groups, kernel…)``.
    n, m
        Of the pattern.
    groups
        Of a convolution; a group of weights lies within one of them. Outputs that are left over at the end of it form
        a smaller group that keeps N too, as if it were padded.

    Returns
    -------
    Tensor
        Bool, the shape of `weight`.

    Raises
    ------
    PatternError
        If each group of the convolution has a single output, so that nothing is summed over.
    """
    outputs = weight.shape[0] // groups
    if groups > 1 and outputs == 1:
        raise PatternError(
            f"a convolution of {groups} groups has one output in each: its backward product sums over nothing to prune"
        )
    if groups == 1 and outputs % m == 0:
        return NM(n, m, dim=0).select(weight.abs())
    scores = weight.abs().reshape(groups, outputs, -1).transpose(1, 2)
    padded = functional.pad(scores, (0, -outputs % m), value=-1.0)
    kept = NM(n, m, dim=2).select(padded)[..., :outputs]
    return kept.transpose(1, 2).reshape(weight.shape)


class _Backward(torch.autograd.Function):
    """The output as it is, whose gradient also goes to the input through a weight of its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Tensor, layer: Any, pruned: NM | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layer, ctx.pruned, ctx.shape, ctx.dtype = layer, pruned, inputs.shape, inputs.dtype
        ctx.mark_dirty(output)  # no view of it: what follows may write in place
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        flowing = gradient if ctx.pruned is None else prune_gradient(gradient, ctx.pruned, _channels(ctx.layer))
        return gradient, input_gradient(flowing, weight, ctx.shape, ctx.layer).to(ctx.dtype), None, None, None


def input_gradient(gradient: Tensor, weight: Tensor, shape: Sequence[int], layer: nn.Module | None = None) -> Tensor:
    """``dX`` of a linear layer or a convolution with this weight.

    Parameters
    ----------
    gradient
        dY, of the shape of the output.
    weight
        W_B, ``(out, in)`` or ``(out, in / groups, kernel…)``.
    shape
        Of the input.
    layer
        A convolution, for its geometry; otherwise linear.
    """
    weight = weight.to(gradient.dtype)
    dimensions = CONVOLUTIONS.get(type(layer)) if layer is not None else None  # type: ignore[arg-type]
    if dimensions is None:
        return gradient @ weight
    convolve = getattr(convolution_gradients, f"conv{dimensions}d_input")
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    unbatched = gradient.dim() == dimensions + 1
    sizes = torch.Size((1, *shape)) if unbatched else torch.Size(shape)
    flowing = gradient.unsqueeze(0) if unbatched else gradient
    found = convolve(sizes, weight, flowing, layer.stride, layer.padding, layer.dilation, layer.groups)
    return found[0] if unbatched else found


def prune_gradient(gradient: Tensor, pattern: NM, channels: int) -> Tensor:
    """DY with the N largest of every M along its channels; what is left over at the end is a smaller group.

    Parameters
    ----------
    gradient
        Of any shape.
    pattern
        N:M.
    channels
        Its dimension of output channels; may be negative.
    """
    moved = gradient.movedim(channels, -1)
    width = moved.shape[-1]
    scores = functional.pad(moved.abs().reshape(-1, width), (0, -width % pattern.m), value=-1.0)
    kept = NM(pattern.n, pattern.m).select(scores)[:, :width].reshape(moved.shape)
    return (moved * kept).movedim(-1, channels)


def bidirectional_linear(
    inputs: Tensor, weight: Tensor, forward_mask: Tensor, backward_mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer that goes forwards through one mask of its weight and backwards through another.

    ``Y = X (m_F ⊙ W)ᵀ + b``, ``dX = dY (m_B ⊙ W)``, ``dW = dYᵀ X``. Can be differentiated once.

    Parameters
    ----------
    inputs
        ``(…, in)``.
    weight
        ``(out, in)``, dense; its gradient is dense.
    forward_mask, backward_mask
        Bool, of the shape of the weight.
    bias
        ``(out,)``.
    """
    through = weight + (weight.masked_fill(~forward_mask, 0) - weight).detach()
    output = functional.linear(inputs.detach(), through, bias)
    return _Backward.apply(output, inputs, weight.detach().masked_fill(~backward_mask, 0), None, None)


class BidirectionalWeight(ProjectedWeight):
    """A weight whose layer goes forwards through what the pattern chooses, and backwards through something else.

    Parameters
    ----------
    name, parameter, targets
        See :class:`~gossamer.core.projected_weight.ProjectedWeight`.
    pattern
        N:M of W_B along the outputs, or of dY.
    gradients
        Whether dY is pruned, and multiplied with W_F, instead of the weight.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, targets: Sequence[Target], pattern: NM, gradients: bool = False
    ):
        super().__init__(name, parameter, targets)
        self.layer, self.pattern, self.gradients = targets[0].module, pattern, gradients
        self._flowing: Tensor | None = None
        _BACKWARD[parameter] = self
        self._routes = [
            self.layer.register_forward_pre_hook(_cut, with_kwargs=True),
            self.layer.register_forward_hook(_reconnect, with_kwargs=True),
        ]

    def backward_weight(self) -> Tensor:
        """What dY is multiplied with, made once for a step: W_B, or W_F where dY is pruned."""
        if self.gradients or self.aside is None:
            return self.weight()
        if self._flowing is None:
            dense = self.dense()
            mask = backward_mask(dense, self.pattern.n, self.pattern.m, getattr(self.layer, "groups", 1))
            self._flowing = dense.masked_fill_(~mask, 0)
        return self._flowing

    def restore(self) -> None:  # noqa: D102
        self._flowing = None
        super().restore()

    def load_state(self, state: Any) -> None:  # noqa: D102
        self._flowing = None
        super().load_state(state)

    def release(self) -> None:  # noqa: D102
        super().release()
        _BACKWARD.pop(self.parameter, None)
        self._flowing = None
        for route in self._routes:
            route.remove()


def _channels(layer: nn.Module | None) -> int:
    """The dimension of output channels, counted from the end."""
    return -1 - CONVOLUTIONS.get(type(layer), 0)  # type: ignore[arg-type]


def _cut(layer: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hide from the layer where its input came from: the gradient goes there by another way."""
    inputs = arguments[0] if arguments else named.get("input")
    if layer.weight not in _BACKWARD or not isinstance(inputs, Tensor) or not inputs.requires_grad:
        return None
    hidden = inputs.detach()
    hidden.origin = inputs  # type: ignore[attr-defined]
    return ((hidden, *arguments[1:]), named) if arguments else ((), {**named, "input": hidden})


def _reconnect(layer: nn.Module, arguments: tuple, named: dict[str, Any], output: Tensor) -> Tensor | None:
    hidden: Any = arguments[0] if arguments else named.get("input")
    inputs = getattr(hidden, "origin", None)
    if inputs is None:
        return None
    del hidden.origin
    site = _BACKWARD[layer.weight]
    pruned = site.pattern if site.gradients else None
    return _Backward.apply(output, inputs, site.backward_weight(), layer, pruned)


@register(
    "bdwp",
    paper="bdwp",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude",),
    allocation="fixed",
    patterns=("n:m",),
)
@dataclass(kw_only=True)
class BDWP(NMSparsifier):
    """Prune the dense weights to N:M along the inputs for the forward pass, and along the outputs for the backward one.

    Fang, Sun, Zhou & Wang, 2023, "Efficient N:M sparse DNN training using algorithm, architecture, and dataflow
    co-design", arXiv 2309.13015. Both masks are of the magnitude of the same dense weight, which gets a dense gradient;
    both are made anew once after every step. The model that remains is that of the forward pass.

    Linear layers and convolutions have a second mask. Others that may be sparse (recurrent ones, stacked experts,
    GPT-2's transposed layers) have the first alone, and convolutions whose groups leave nothing to sum over stay
    dense; a note says so. A first layer, whose input needs no gradient, has no backward product at all.

    Parameters
    ----------
    decay, mode
        Pull at weights that the forward pass does not use, as in SR-STE; 0 is none.
    variant
        ``bidirectional``, or what it is compared with: ``forward``: one mask, for the forward pass only;
        ``transposable``: one mask that is N:M in both directions; ``gradients``: dY is pruned to N:M along its
        channels instead of the weight, at the same number of operations.

    Notes
    -----
    What flows backwards is no gradient of the forward pass, so that a numerical check of gradients fails by design.
    """

    pattern: str | Pattern = "2:8"
    decay: float = 0.0
    mode: Mode = "in-gradient"
    variant: Variant = "bidirectional"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("variant", Variant), ("mode", Mode)):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {', '.join(get_args(known))}")
        if as_nm(self.pattern).dim != 1:
            raise PatternError(f"pattern is {self.pattern}; the forward pass needs groups along the inputs, as in 2:8")

    def patterns(self, final: NM) -> list[Pattern]:
        """The pattern, and for transposable masks that of both directions."""
        return [TransposableNM(final.n, final.m) if self.variant == "transposable" else final]

    def pattern_at(self, step: int, final: NM) -> Pattern:  # noqa: D102
        return self.patterns(final)[0]

    def _candidates(self, model: nn.Module) -> list[Target]:
        return [target for target in super()._candidates(model) if not _sums_over_nothing(target)]

    def site(self, name: str, targets: Sequence[Target]) -> Site | None:
        """A dense weight with one mask or two."""
        plain = super().site(name, targets)
        if self.variant in ("forward", "transposable") or not is_routed(targets[0]):
            return plain
        pattern = self.pattern_of(targets[0])
        return BidirectionalWeight(name, targets[0].parameter, targets, pattern, self.variant == "gradients")

    def start(self, training: SparseTraining) -> None:
        """Note what has fewer masks than two, and choose."""
        for target in super()._candidates(training.model):
            if _sums_over_nothing(target):
                training.notes.append(f"{target.name} stays dense: each of its groups has a single input or output")
            elif self.variant in ("bidirectional", "gradients") and not is_routed(target):
                training.notes.append(f"{target.name} is sparse forwards only: {type(target.module).__name__}")
        super().start(training)

    def prepare(self, training: SparseTraining) -> None:
        """Pull at what the forward pass does not use, if asked to."""
        pull(training, self.decay, self.mode)

    def finish(self, training: SparseTraining) -> None:
        """Nothing is left to be reached: every step ends with the pattern."""


def is_routed(target: Target) -> bool:
    """Whether what flows back through the layer can take a way of its own."""
    return type(target.module) is nn.Linear or type(target.module) in CONVOLUTIONS


def _sums_over_nothing(target: Target) -> bool:
    groups = int(getattr(target.module, "groups", 1))
    return groups > 1 and (target.shape[1] == 1 or target.shape[0] == groups)
