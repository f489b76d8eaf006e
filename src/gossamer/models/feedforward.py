"""A feed-forward layer as its matrices, and what it takes to silence or take out some of its channels.

A feed-forward layer widens a hidden state from d to m channels, lets every channel pass through something of its own
(an activation, a gate), and maps the m channels back to d. A channel is a row of each widening matrix and a column of
the one that maps back. :mod:`gossamer.models.feedforward_search` finds them in a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target

_WIDTH_NAMES = ("intermediate_size", "intermediate_dim", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward layer: ``down(elementwise(inputs(x)))``.

    Attributes
    ----------
    name
        Qualified name of the module that holds it, such as ``model.layers.0.mlp``.
    module
        That module.
    block
        Name of the block it belongs to; its own name where the model has no blocks.
    inputs
        The widening matrices, ``(m, d)`` each: one, or two where there is a gate; or a single one ``(2m, d)`` that
        holds gate and up one above the other.
    down
        The matrix ``(d, m)`` back.
    """

    name: str
    module: nn.Module
    block: str
    inputs: tuple[Target, ...]
    down: Target

    @property
    def width(self) -> int:
        """m, the number of channels in the middle."""
        return self.down.shape[1]

    @property
    def targets(self) -> tuple[Target, ...]:
        """All of its matrices, in the order in which they act."""
        return (*self.inputs, self.down)

    def widening(self) -> list[Tensor]:
        """The widening matrices, ``(m, d)`` each, a fused one taken apart; views of the parameters."""
        return [part for target in self.inputs for part in target.matrix().split(self.width)]

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Masks of the parameters, each in the shape of its parameter, when only the channels in `keep` remain.

        Parameters
        ----------
        keep
            ``(m,)`` bool, True where the channel remains.
        """
        masks = {}
        for target in self.targets:
            mask = _along(target, self.down, keep).expand(target.shape)
            masks[target.parameter_name] = (mask.transpose(0, 1) if target.transposed else mask).contiguous()
        return masks

    @torch.no_grad()
    def zero_(self, keep: Tensor) -> None:
        """Zero the channels that are not in `keep`: rows of the widening matrices, their biases, columns of down."""
        for target in self.targets:
            gone = ~_along(target, self.down, keep).to(target.parameter.device)
            target.matrix().masked_fill_(gone, 0)
            bias = getattr(target.module, "bias", None)
            if target is not self.down and bias is not None:
                bias.masked_fill_(gone.flatten(), 0)

    @torch.no_grad()
    def shrink_(self, keep: Tensor) -> None:
        """Take the channels that are not in `keep` out of the parameters, and tell the modules their new sizes."""
        before, after = self.width, int(keep.sum())
        for target in self.inputs:
            # a fused matrix holds gate and up one above the other: both lose the same channels
            rows = keep.repeat(target.shape[0] // before).nonzero().flatten()
            _select(target.module, "weight", 1 if target.transposed else 0, rows)
            _select(target.module, "bias", 0, rows)
            _resize(target.module, ("out_features", "nf"), len(rows))
        _select(self.down.module, "weight", 0 if self.down.transposed else 1, keep.nonzero().flatten())
        _resize(self.down.module, ("in_features", "nx"), after)
        for attribute in _WIDTH_NAMES:
            if vars(self.module).get(attribute) == before:
                setattr(self.module, attribute, after)

    @torch.no_grad()
    def add_bias_(self, values: Tensor) -> None:
        """Add ``(d,)`` to the bias of the matrix that maps back; where it has none, it gets one."""
        module: Any = self.down.module
        weight = module.weight
        values = values.to(weight.device, weight.dtype)
        if module.bias is None:
            module.bias = nn.Parameter(values, requires_grad=weight.requires_grad)
        else:
            module.bias += values


def _along(target: Target, down: Target, keep: Tensor) -> Tensor:
    """`keep` laid along the dimension of the matrix that the channels run through."""
    if target is down:
        return keep.unsqueeze(0)
    return keep.repeat(target.shape[0] // len(keep)).unsqueeze(1)


def _select(module: nn.Module, attribute: str, dim: int, index: Tensor) -> None:
    parameter = getattr(module, attribute, None)
    if parameter is not None:
        chosen = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
        setattr(module, attribute, nn.Parameter(chosen, requires_grad=parameter.requires_grad))


def _resize(module: nn.Module, attributes: Iterable[str], size: int) -> None:
    for attribute in attributes:
        if hasattr(module, attribute):
            setattr(module, attribute, size)


def record_widths(model: nn.Module, before: Mapping[str, int], layers: Sequence[FeedForward]) -> None:
    """Tell the configuration of a Hugging Face model, if there is one, how wide its feed-forward layers are now.

    Where all of them have one width, its own entry (``intermediate_size`` and the like) gets it, and any program can
    load the model. Otherwise ``feed_forward_widths`` lists them by name, for those that read it.

    Parameters
    ----------
    model
        The model.
    before
        Layer → width it had.
    layers
        All of them, as they are now.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    after = {layer.name: layer.width for layer in layers}
    old, new = set(before.values()), set(after.values())
    own = next((n for n in _WIDTH_NAMES if _says(text, n, old)), None) if len(old) == len(new) == 1 else None
    if own is not None:
        setattr(text, own, new.pop())
    else:
        config.feed_forward_widths = after


def _says(config: Any, attribute: str, widths: set[int]) -> bool:
    # GPT-2's n_inner is None for four times the hidden size
    return hasattr(config, attribute) and getattr(config, attribute) in {*widths, None}
