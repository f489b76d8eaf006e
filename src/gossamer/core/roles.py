"""What a layer is for, whatever it is called: rules such as "the first layer stays dense" must not depend on names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from gossamer.core.targets import Target, find_targets
from gossamer.errors import TargetError, UnknownNameError

Role = Literal["first", "last", "embedding", "linear", "convolution", "recurrent"]


def roles(model: nn.Module) -> dict[str, frozenset[Role]]:
    """What each weight matrix of a model is, by the name of its target.

    The first and the last layer are those that the model defines first and last, embeddings and heads counted; every
    matrix has one further role, its kind.

    Parameters
    ----------
    model
        Any module.

    Raises
    ------
    TargetError
        If the model has no weight matrix.
    """
    found = find_targets(model, heads=True, recurrent=True, embeddings=True)
    ends: dict[Role, nn.Module] = {"first": found[0].module, "last": found[-1].module}
    return {
        target.name: frozenset([_kind(target), *(role for role, module in ends.items() if module is target.module)])
        for target in found
    }


def without_roles(model: nn.Module, targets: Iterable[Target], kept: Iterable[Role]) -> list[Target]:
    """The targets that have none of some roles.

    Raises
    ------
    UnknownNameError
        If there is no such role.
    TargetError
        If nothing is left.
    """
    kept = set(kept)
    for role in kept - set(get_args(Role)):
        raise UnknownNameError("role", role, get_args(Role))
    known = roles(model)
    left = [target for target in targets if not kept & known[target.name]]
    if not left:
        raise TargetError(f"no layer to prune: every target is one of what stays dense, {', '.join(sorted(kept))}")
    return left


def _kind(target: Target) -> Role:
    if isinstance(target.module, nn.Embedding):
        return "embedding"
    if isinstance(target.module, nn.RNNBase):
        return "recurrent"
    return "convolution" if len(target.shape) > 2 else "linear"
