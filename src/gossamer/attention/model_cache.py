"""What methods of decoding need to know of a model's cache: which one is at work, and its layers."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from gossamer.attention.base import Installed, SparseAttention


class PerThread(threading.local):
    """What a method knows of the call that a thread is in; in a copy it knows nothing.

    Attributes
    ----------
    cache
        A weak reference to the cache at work, or None.
    """

    def __init__(self) -> None:
        self.cache: Any = None

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return type(self), ()


@dataclass(kw_only=True)
class CachedAttention(SparseAttention):
    """A method that sees the cache of the model it works in; several threads may use the model at once.

    Attributes
    ----------
    cache
        A weak reference to the cache of this thread's call, or None.
    """

    _thread: PerThread = field(init=False, repr=False, compare=False, default_factory=PerThread)

    @property
    def cache(self) -> Any:  # noqa: D102
        return self._thread.cache

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._thread.cache = cache

    def reset(self) -> None:
        """Forget the cache."""
        self.cache = None

    def install(self, model: nn.Module) -> Installed:
        """As :meth:`SparseAttention.install`; the cache is seen, too."""
        return CacheInstalled(model, self)


class CacheInstalled(Installed):
    """A method at work that is shown the cache of the model before each of its layers runs.

    Parameters
    ----------
    model, method
        As of :class:`Installed`.
    """

    method: CachedAttention

    def __init__(self, model: nn.Module, method: CachedAttention):
        super().__init__(model, method)
        modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
        self._handles = [module.register_forward_pre_hook(self._look, with_kwargs=True) for module in modules]

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_of(args, kwargs)
        self.method.cache = None if cache is None else weakref.ref(cache)

    def remove(self) -> None:
        """Give the model its own attention back; caches stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.method.cache = None
        super().remove()


def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a layer, which models call by several names."""
    return next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)


def layer_of(cache: weakref.ref[Any] | None, index: int | None) -> Any:
    """A layer of a cache of transformers, or None."""
    layers = getattr(cache() if cache is not None else None, "layers", None)
    if index is None or not isinstance(layers, list) or index >= len(layers):
        return None
    return layers[index]
