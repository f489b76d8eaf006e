"""The attention heads of a model, as slices of the matrices that make and mix them.

Whatever happens inside attention, the heads leave it side by side, and one matrix maps them back to the hidden state:
its columns belong to the heads in order. Silencing those columns silences a head for good, in any architecture. Where
query, key and value have matrices of their own, the rows that only a silent head would use are known as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target, find_targets
from gossamer.errors import ModelError, TargetError

_QUERY = ("q_proj", "query", "q_lin", "q", "to_q", "wq")
_KEY = ("k_proj", "key", "k_lin", "k", "to_k", "wk")
_VALUE = ("v_proj", "value", "v_lin", "v", "to_v", "wv")
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj")
_OUTPUT = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "o", "wo", "Wo", "proj")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "encoder_attention_heads")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True, eq=False)
class AttentionHeads:
    """The heads of one attention layer.

    Attributes
    ----------
    name
        Qualified name of the module that holds all of its matrices.
    module
        That module.
    count
        h, the number of (query) heads.
    output
        The matrix ``(d, h · v)`` that maps them back.
    query
        The matrix ``(h · q, d)``, or None where it is fused with others.
    shared
        Matrices of keys and values, ``(g · q, d)`` each; ``h / g`` neighbouring heads share one of their g slices.
    groups
        g.
    """

    name: str
    module: nn.Module
    count: int
    output: Target
    query: Target | None
    shared: tuple[Target, ...]
    groups: int

    @property
    def targets(self) -> tuple[Target, ...]:
        """All the matrices of which slices belong to single heads."""
        return (*([self.query] if self.query else []), *self.shared, self.output)

    def slices(self) -> Tensor:
        """The output matrix by heads, ``(h, d, v)``; a view."""
        return self.output.matrix().unflatten(1, (self.count, -1)).transpose(0, 1)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Masks of the matrices, target name → bool of the shape of the matrix.

        Parameters
        ----------
        keep
            ``(h,)`` bool, True where the head remains. Keys and values remain for as long as one of their heads does.
        """
        keep = keep.cpu()
        columns = keep.repeat_interleave(self.output.shape[1] // self.count)
        masks = {self.output.name: columns.unsqueeze(0).expand(self.output.shape)}
        if self.query is not None:
            masks[self.query.name] = _rows(self.query, keep)
        needed = keep.view(self.groups, -1).any(1) if self.shared else keep
        masks |= {target.name: _rows(target, needed) for target in self.shared}
        return {name: mask.contiguous() for name, mask in masks.items()}


def _rows(target: Target, keep: Tensor) -> Tensor:
    return keep.repeat_interleave(target.shape[0] // len(keep)).unsqueeze(1).expand(target.shape)


def find_attention_heads(model: nn.Module) -> list[AttentionHeads]:
    """The attention layers of a model with their heads, in the order in which it defines them.

    An attention layer is a module that makes queries (alone, or fused with keys and values), with a matrix that maps
    back beside them or, as in BERT, in the module around. The number of heads is what the module says, or its
    configuration.

    Raises
    ------
    TargetError
        If there is none.
    ModelError
        If a layer does not say how many heads it has, or their number does not divide its matrices.
    """
    linear = {id(t.module): t for t in find_targets(model, heads=True) if t.index is None}
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        children = {child: linear[id(m)] for child, m in module.named_children() if id(m) in linear}
        query = _first(children, _QUERY)
        if query is None and _first(children, _FUSED) is None and not isinstance(module, nn.MultiheadAttention):
            continue
        around = name.rpartition(".")[0]
        output, owner = _first(children, _OUTPUT), name
        if output is None:
            output, owner = _beside(modules[around], linear), around
        if output is not None:
            shared = [target for target in (_first(children, _KEY), _first(children, _VALUE)) if target is not None]
            found.append(_heads(owner, modules[owner], module, output, query, shared if query else []))
    if not found:
        raise TargetError(
            f"no attention layer in {type(model).__name__}: no module makes queries with a matrix that maps heads "
            f"back beside it; prune channels or weights instead, for instance with 'magnitude'"
        )
    return found


def _first(children: Mapping[str, Target], names: tuple[str, ...]) -> Target | None:
    return next((children[name] for name in names if name in children), None)


def _beside(around: nn.Module, linear: Mapping[int, Target]) -> Target | None:
    """BERT's way: ``attention.self`` makes queries, ``attention.output.dense`` maps back."""
    output = getattr(around, "output", None)
    dense = getattr(output, "dense", None)
    return linear.get(id(dense))


def _heads(
    name: str, owner: nn.Module, attention: nn.Module, output: Target, query: Target | None, shared: list[Target]
) -> AttentionHeads:
    count = _count(attention, output)
    if count is None or output.shape[1] % count or (query is not None and query.shape[0] % count):
        raise ModelError(
            f"{name}: cannot divide {output.name} of shape {tuple(output.shape)} into "
            f"{'an unknown number of' if count is None else count} heads; exclude this layer"
        )
    size = query.shape[0] // count if query is not None else 1
    divisible = all(target.shape[0] % size == 0 for target in shared)
    groups = {target.shape[0] // size for target in shared} if divisible else set()
    # keys and values that are made in another way (of another width a head, say) are left alone
    usable = len(groups) == 1 and count % min(groups) == 0
    return AttentionHeads(
        name, owner, count, output, query, tuple(shared) if usable else (), groups.pop() if usable else count
    )


def _count(attention: nn.Module, output: Target) -> int | None:
    said = next((n for n in (vars(attention).get(attribute) for attribute in _COUNTS) if isinstance(n, int)), None)
    size = next((n for n in (vars(attention).get(attribute) for attribute in _SIZES) if isinstance(n, int)), None)
    if said is None and size and output.shape[1] % size == 0:
        return output.shape[1] // size
    config: Any = getattr(attention, "config", None)
    return said or next((getattr(config, a) for a in _COUNTS if isinstance(getattr(config, a, None), int)), None)


def parameter_shaped(target: Target, mask: Tensor) -> Tensor:
    """The mask of a matrix in the shape in which its parameter is stored."""
    return mask.transpose(0, 1).contiguous() if target.transposed else mask


@torch.no_grad()
def silence_(heads: AttentionHeads, keep: Tensor) -> dict[str, Tensor]:
    """Zero the heads that are not in `keep`, ``(h,)`` bool, and return parameter name → mask."""
    masks = heads.masks(keep)
    by_parameter = {}
    for target in heads.targets:
        target.matrix().masked_fill_(~masks[target.name].to(target.parameter.device), 0)
        by_parameter[target.parameter_name] = parameter_shaped(target, masks[target.name])
    return by_parameter
