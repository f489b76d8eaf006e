"""What may become zero: the weight matrices of a model, wherever and however it keeps them.

Linear layers, convolutions, the transposed ``Conv1D`` of GPT-2, and the stacked experts of mixtures all appear as a
:class:`Target`: a matrix ``(out, in)`` (with kernel dimensions for convolutions) that is a *view* of the parameter, so
that writing to it changes the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gossamer.core.sparse_weight import SparseWeight
from gossamer.errors import NonFiniteError, TargetError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable matrix.

    Attributes
    ----------
    name
        Name of the parameter; stacked experts add their index: ``…experts.down_proj[3]``.
    module_name, module
        Where it lives.
    attribute
        Name of the parameter within the module.
    index
        Expert within a stacked parameter, else None.
    transposed
        Whether the parameter is stored ``(in, out)``.
    aliases
        Other names of the same tied parameter.
    """

    name: str
    module_name: str
    module: nn.Module
    attribute: str = "weight"
    index: int | None = None
    transposed: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix."""
        return getattr(self.module, self.attribute)

    @property
    def parameter_name(self) -> str:
        """Name of the parameter, without an expert's index."""
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute

    def matrix(self) -> Tensor:
        """The weight as ``(out, in)`` or ``(out, in, kernel…)``, detached and writing through to the parameter."""
        weight = self.parameter.detach()
        if self.index is not None:
            weight = weight[self.index]
        return weight.transpose(0, 1) if self.transposed else weight

    @property
    def shape(self) -> torch.Size:
        """Shape of :meth:`matrix`."""
        shape = list(self.parameter.shape if self.index is None else self.parameter.shape[1:])
        if self.transposed:
            shape[0], shape[1] = shape[1], shape[0]
        return torch.Size(shape)

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` naming this weight if it holds NaN or infinity."""
        weight = self.matrix()
        if not torch.isfinite(weight.sum()):
            count = int((~torch.isfinite(weight)).sum())
            if count:
                raise NonFiniteError(
                    f"{self.name}: {count} of {weight.numel()} weights are NaN or infinite; the model is damaged"
                )


class StoredTarget(Target):
    """The weight of a layer that stores no zeros, under the name that it would have with them."""

    module: SparseWeight

    @property
    def parameter(self) -> nn.Parameter:
        """The list of non-zeros."""
        return self.module.values

    def matrix(self) -> Tensor:
        """The weight with its zeros: a copy, writing to which changes nothing."""
        return self.module.dense_weight()

    @property
    def shape(self) -> torch.Size:
        """Shape of :meth:`matrix`."""
        return self.module.mask().shape


def find_targets(
    model: nn.Module,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    *,
    heads: bool = False,
    recurrent: bool = False,
    embeddings: bool = False,
) -> list[Target]:
    """The prunable matrices of a model, in the order in which it defines them.

    Output heads (``lm_head``, the last classifier) are left out unless asked for: they hold few of the weights that
    can be spared and much of the quality. So are embeddings, and whatever is tied to one.

    Parameters
    ----------
    model
        Any module.
    include, exclude
        Shell-style globs on module names, such as ``"*.mlp.*"``; a target must match one of the first and none of the
        second.
    heads
        Whether output heads count.
    recurrent
        Whether the matrices of recurrent layers count, each with its gates stacked as torch stores them.
    embeddings
        Whether embeddings count, and what is tied to them.

    Raises
    ------
    TargetError
        If nothing matches.
    """
    include, exclude = tuple(include), tuple(exclude)
    tables = set() if embeddings else {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    skipped = set() if heads else {id(head) for head in _output_heads(model)}
    found: dict[tuple[int, int | None], Target] = {}
    candidates = 0
    for module_name, module in model.named_modules(remove_duplicate=False):
        for target in _targets_of(module_name, module):
            key = (id(target.parameter), target.index)
            if isinstance(module, nn.RNNBase) and not recurrent:
                continue
            if id(target.parameter) in tables or id(module) in skipped:
                continue
            candidates += 1
            if key in found:
                first = found[key]
                object.__setattr__(first, "aliases", (*first.aliases, target.name))
            elif _matches(module_name, include) and not _matches(module_name, exclude):
                found[key] = target
    if not found:
        raise TargetError(
            f"no layer to prune: {candidates} candidate layers, none matches include={list(include)} "
            f"exclude={list(exclude)}; names look like {_examples(model)}"
        )
    return list(found.values())


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _examples(model: nn.Module) -> str:
    modules = [each for each in model.named_modules() if not isinstance(each[1], (nn.Embedding, nn.RNNBase))]
    names = [name for name, module in modules if next(_targets_of(name, module), None)]
    return (
        ", ".join(repr(name) for name in (names[:1] + names[-1:]))
        or "nothing prunable (packed layers are not: compress last)"
    )


def _targets_of(module_name: str, module: nn.Module) -> Iterator[Target]:
    prefix = f"{module_name}." if module_name else ""
    if isinstance(module, SparseWeight):
        yield StoredTarget(f"{prefix}weight", module_name, module)
    elif isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)):
        yield Target(f"{prefix}weight", module_name, module)
    elif isinstance(module, nn.RNNBase):
        for attribute, _ in module.named_parameters(recurse=False):
            if attribute.startswith("weight"):
                yield Target(f"{prefix}{attribute}", module_name, module, attribute)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer
        yield Target(f"{prefix}weight", module_name, module, transposed=True)
    else:
        for attribute, parameter in module.named_parameters(recurse=False):
            # stacked experts: (experts, out, in), or (experts, in, out) where the module says so
            if parameter.dim() == 3 and "expert" in f"{type(module).__name__} {module_name}".lower():
                transposed = bool(getattr(module, "is_transposed", False))
                for index in range(len(parameter)):
                    name = f"{prefix}{attribute}[{index}]"
                    yield Target(name, module_name, module, attribute, index=index, transposed=transposed)


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The module that makes the logits: what the model itself calls its output embeddings, or its last layer."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None
    if getter is not None:
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            head = None
    if head is not None:
        return [head]
    kinds = (nn.Linear, SparseWeight, *_CONVOLUTIONS)
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, kinds)]
    return layers[-1:] if getter is None and len(layers) > 1 else []
