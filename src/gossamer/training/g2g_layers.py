"""Layers with the wiring of groups: one dense product for all groups at once, and a sparse one for the rest.

The edges within groups are a block-diagonal matrix, which is a batch of small dense products; those between groups are
stored without zeros. Nothing of the size of the dense weight is formed, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.training.g2gnet import Grouping, mask_of_groups, unit_groups
from gossamer.training.sparse_layers import SparseLinear


@register("g2g-linear", paper="g2gnet", when="layer", granularity="edges", needs_data=False, criterion=("structure",))
class G2GLinear(nn.Module):
    """A linear layer whose units form groups: dense within a group, sparse between groups.

    Konstantaropoulos, Smirnakis & Papadopouli, 2025, arXiv 2508.14140.

    Parameters
    ----------
    in_features, out_features, bias
        As in :class:`torch.nn.Linear`.
    groups, p_inter, grouping, layer
        See :func:`gossamer.training.g2gnet.g2g_mask`.
    generator
        Of the wiring; on the CPU.
    in_groups, out_groups
        Group of each unit, ``(in_features,)`` and ``(out_features,)``, where they are fixed already.
    mask
        The whole wiring, ``(out_features, in_features)`` bool, where it is fixed already; it must hold every edge
        within a group.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.

    Examples
    --------
    >>> layer = G2GLinear(64, 32, groups=4, p_inter=0.0)
    >>> int(layer.mask().sum()), layer(torch.ones(5, 64)).shape
    (512, torch.Size([5, 32]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 8,
        p_inter: float = 0.15,
        grouping: Grouping = "index",
        generator: torch.Generator | None = None,
        *,
        bias: bool = True,
        layer: int = 0,
        in_groups: Tensor | None = None,
        out_groups: Tensor | None = None,
        mask: Tensor | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        ends = []
        for units, given in ((out_features, out_groups), (in_features, in_groups)):
            found = unit_groups(units, groups, grouping, layer, generator) if given is None else given
            if found.shape != (units,) or found.min() < 0 or found.max() >= groups or len(found.unique()) < groups:
                raise ConfigurationError(
                    f"groups of {units} units must be ({units},), and name each of {groups} groups"
                )
            ends.append(found)
        self.register_buffer("out_groups", ends[0])
        self.register_buffer("in_groups", ends[1])
        whole = mask_of_groups(*ends, p_inter, generator=generator) if mask is None else mask
        within = ends[0].unsqueeze(1) == ends[1]
        if whole.dtype != torch.bool or whole.shape != within.shape or not whole[within].all():
            raise ConfigurationError(
                f"the mask is {whole.dtype} {tuple(whole.shape)}; it must be bool {tuple(within.shape)} and hold every "
                f"edge within a group"
            )
        self._lay_out()
        self.register_load_state_dict_post_hook(_lay_out_again)
        self.blocks = nn.Parameter(torch.zeros(groups, self._in_places.shape[1], self._out_places.shape[1]))
        between = whole & ~within
        self.between = SparseLinear(in_features, out_features, bias=False, mask=between) if between.any() else None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.reset_parameters()

    def _lay_out(self) -> None:
        """Where each group's units stand, ``(groups, largest group)``; shorter groups end with a unit that is 0."""
        for name, groups, units in (
            ("in", self.in_groups, self.in_features),
            ("out", self.out_groups, self.out_features),
        ):
            members = [(groups == group).nonzero().flatten() for group in range(self.groups)]
            places = nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=units)
            self.register_buffer(f"_{name}_places", places, persistent=False)
        back = torch.empty(self.out_features, dtype=torch.int64)
        flat = self._out_places.flatten()
        real = flat < self.out_features
        back[flat[real]] = real.nonzero().flatten()
        self.register_buffer("_back", back, persistent=False)
        self._even_in = torch.equal(self._in_places.flatten(), torch.arange(self.in_features))
        self._even_out = torch.equal(self._out_places.flatten(), torch.arange(self.out_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/√(mean number of edges of a unit), as torch starts a linear layer of so many inputs."""
        edges = self._real().sum() + (self.between.values.numel() if self.between else 0)
        bound = 1 / math.sqrt(int(edges) / self.out_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.blocks *= self._real()

    def _real(self) -> Tensor:
        """Which places of the blocks stand for weights."""
        ends = (self._in_places < self.in_features).unsqueeze(2), (self._out_places < self.out_features).unsqueeze(1)
        return ends[0] & ends[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` for ``(…, in_features)``.

        Raises
        ------
        ConfigurationError
            If `x` has another number of features.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ConfigurationError(f"x is {tuple(x.shape)}; this layer takes (…, {self.in_features})")
        flat = x.reshape(-1, self.in_features)
        if self._even_in:
            grouped = flat.view(len(flat), self.groups, -1)
        else:
            grouped = torch.cat([flat, flat.new_zeros(len(flat), 1)], 1)[:, self._in_places]
        result = torch.bmm(grouped.transpose(0, 1), self.blocks).transpose(0, 1).reshape(len(flat), -1)
        if not self._even_out:
            result = result[:, self._back]
        if self.between is not None:
            result = result + self.between(flat)
        if self.bias is not None:
            result = result + self.bias
        return result.view(*x.shape[:-1], self.out_features)

    def mask(self) -> Tensor:
        """Which edges exist, ``(out_features, in_features)`` bool."""
        within = self.out_groups.unsqueeze(1) == self.in_groups
        return within if self.between is None else within | self.between.mask()

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same layer with its zeros stored, to which a :class:`~gossamer.core.sparsifier.Sparsifier` attaches."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear = linear.to(self.blocks.device, self.blocks.dtype)
        weight = self.blocks.new_zeros(self.out_features + 1, self.in_features + 1)
        for block, ins, outs in zip(self.blocks, self._in_places, self._out_places):
            weight[outs.unsqueeze(1), ins] = block.t()
        weight = weight[:-1, :-1]
        linear.weight.copy_(weight if self.between is None else weight + self.between.dense_weight())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, mask: Tensor, out_groups: Tensor, in_groups: Tensor) -> G2GLinear:
        """The same function as a linear layer under a mask that holds every edge within a group."""
        out, inputs = linear.weight.shape
        layer = cls(
            inputs,
            out,
            int(out_groups.max()) + 1,
            bias=linear.bias is not None,
            in_groups=in_groups,
            out_groups=out_groups,
            mask=mask,
        ).to(linear.weight.device, linear.weight.dtype)
        padded = nn.functional.pad(linear.weight, (0, 1, 0, 1))
        for block, ins, outs in zip(layer.blocks, layer._in_places, layer._out_places):
            block.copy_(padded[outs.unsqueeze(1), ins].t())
        if layer.between is not None:
            layer.between.values.copy_(linear.weight[layer.between.mask()])
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def extra_repr(self) -> str:  # noqa: D102
        density = float(self.mask().float().mean())
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, {density:.1%} of the edges"


def _lay_out_again(layer: G2GLinear, _: Any) -> None:
    layer._lay_out()


@register("g2g-net", paper="g2gnet", when="layer", granularity="edges", needs_data=False, criterion=("structure",))
class G2GNet(nn.Module):
    """A multilayer perceptron whose layers are wired by groups.

    Konstantaropoulos, Smirnakis & Papadopouli, 2025, arXiv 2508.14140. The wiring stays; for one that moves, attach
    :class:`~gossamer.training.g2gnet.G2G` to a perceptron of plain linear layers.

    Parameters
    ----------
    sizes
        Units of the input, of each hidden layer, and of the output.
    groups, p_inter, grouping
        See :func:`gossamer.training.g2gnet.g2g_mask`; random groups of a layer are the same at both of its sides.
    output
        ``"dense"`` or ``"grouped"``: the wiring of the last layer.
    batch_norm
        Whether hidden layers are normalised.
    dropout
        Share of hidden activity that is dropped while training.
    generator
        Of the wiring; on the CPU.

    Raises
    ------
    ConfigurationError
        If a size, or another parameter, is out of range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        groups: int = 8,
        p_inter: float = 0.15,
        grouping: Grouping = "index",
        output: str = "dense",
        batch_norm: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigurationError(f"sizes is {list(sizes)}; at least an input and an output of one unit are needed")
        if output not in ("dense", "grouped"):
            raise ConfigurationError(f"output is {output!r}; use 'dense' or 'grouped'")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is {dropout}; it must be a share in [0, 1)")
        modules: list[nn.Module] = [nn.Flatten()]
        before: Tensor | None = None
        last = len(sizes) - 2
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            if number == last and output == "dense":
                modules.append(nn.Linear(inputs, outputs))
                continue
            layer = G2GLinear(
                inputs,
                outputs,
                groups,
                p_inter,
                grouping,
                generator,
                layer=number,
                in_groups=before if grouping == "random" else None,
            )
            before = layer.out_groups
            modules.append(layer)
            if number < last:
                modules += [nn.BatchNorm1d(outputs)] if batch_norm else []
                modules += [nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, …)``, flattened to the input's units → ``(batch, outputs)``."""
        return self.layers(x)

    def masks(self) -> list[Tensor]:
        """Which edges each layer has, ``(out, in)``, in their order."""
        wired = [layer for layer in self.layers if isinstance(layer, G2GLinear | nn.Linear)]
        return [
            layer.mask() if isinstance(layer, G2GLinear) else torch.ones_like(layer.weight, dtype=torch.bool)
            for layer in wired
        ]
