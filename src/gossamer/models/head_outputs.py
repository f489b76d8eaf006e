"""The outputs of attention heads, side by side, as a place in a model that has a name.

What heads have read is put together, ``z``, and mapped back by one matrix. No module puts z out; it is what goes into
that matrix. Inside :func:`exposed_heads` there is one, an identity that z passes through on its way, so that whatever
reads or replaces the output of a module (capture, splicing, steering) works on z as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.errors import ModelError
from gossamer.models.heads import AttentionHeads, find_attention_heads

_NAME = "heads"


@dataclass(frozen=True, eq=False)
class HeadSite:
    """Where the heads of one layer put out what they have read.

    Attributes
    ----------
    name
        Of the module whose output is z, ``(batch, tokens, heads · size)``, while heads are exposed.
    layer
        Number of the attention layer.
    heads
        Its heads; ``heads.slices()`` are the parts of the matrix behind, ``(heads, d, size)``.
    """

    name: str
    layer: int
    heads: AttentionHeads

    @property
    def count(self) -> int:
        """H, how many heads."""
        return self.heads.count

    @property
    def size(self) -> int:
        """Numbers that each head puts out."""
        return self.heads.output.shape[1] // self.heads.count


@contextmanager
def exposed_heads(model: nn.Module) -> Iterator[list[HeadSite]]:
    """Inside, the outputs of all heads have names; parameters, and their names, stay as they are.

    Examples
    --------
    >>> with exposed_heads(model) as sites:  # doctest: +SKIP
    ...     store = capture(model, documents, sites[5].name, "layer-5-heads")

    Raises
    ------
    TargetError
        If the model has no attention.
    ModelError
        If the heads are exposed already.
    """
    layers = find_attention_heads(model)
    handles, sites = [], []
    try:
        for number, heads in enumerate(layers):
            matrix = heads.output.module
            if hasattr(matrix, _NAME):
                raise ModelError(
                    f"{heads.output.name} is exposed already; leave the earlier exposed_heads(model) first"
                )
            matrix.add_module(_NAME, nn.Identity())
            handles.append((matrix, matrix.register_forward_pre_hook(_through)))
            owner = next(name for name, module in model.named_modules() if module is matrix)
            sites.append(HeadSite(f"{owner}.{_NAME}", number, heads))
        yield sites
    finally:
        for matrix, handle in handles:
            handle.remove()
            delattr(matrix, _NAME)


def _through(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, _NAME)(args[0]), *args[1:])
