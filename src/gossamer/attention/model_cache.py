"""What methods of decoding need to know of a model's cache: which one is at work, and its layers."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from gossamer.attention.base import Installed, SparseAttention


class CacheInstalled(Installed):
    """A method at work that is shown the cache of the model before each of its layers runs.

    Parameters
    ----------
    model, method
        As of :class:`Installed`; the method has a `cache`, a weak reference that is set before every call, or None.
    """

    def __init__(self, model: nn.Module, method: SparseAttention):
        super().__init__(model, method)
        modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
        self._handles = [module.register_forward_pre_hook(self._look, with_kwargs=True) for module in modules]

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        self.method.cache = None if cache is None else weakref.ref(cache)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Give the model its own attention back; caches stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.method.cache = None  # type: ignore[attr-defined]
        super().remove()


def layer_of(cache: weakref.ref[Any] | None, index: int) -> Any:
    """A layer of a cache of transformers, or None."""
    layers = getattr(cache() if cache is not None else None, "layers", None)
    return layers[index] if isinstance(layers, list) and index < len(layers) else None
