"""Self-attention of models made with diffusers, taken over by a function of ours and given back.

A transformer of diffusers computes attention in modules with a replaceable ``processor``: dozens of classes that differ
in projections, norms and rotary positions and agree in one thing, the call of ``scaled_dot_product_attention``. So no
processor is replaced or copied: while such a module runs, that one call is answered by a function of ours. diffusers
itself is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.errors import ModelError
from gossamer.models.attention_sites import AttentionCall, as_autocast, parse_mask
from gossamer.models.denoising import StepListener

_DENSE = torch.nn.functional.scaled_dot_product_attention


class ProcessorSite:
    """A model of diffusers whose self-attention is computed by a function, until :meth:`remove`.

    Attention between different lengths (cross-attention), with dropout, or with a mask that is more than padding stays
    what it was. Steps are told apart by the ``timestep`` of the model's calls: a new value is a new step, so that
    solvers which ask several times at one time do not run ahead. Who installs a method says
    ``method.begin(num_inference_steps)`` before every sample.

    Branches of the guidance that are calls of their own are told apart by the name that the pipeline gives
    ``model.cache_context``. Where it gives none, there are as many as calls at the first step, in the same order at all
    others.

    Parameters
    ----------
    model
        A module; those within that have a ``processor`` are taken over.
    attend
        Gets every call, and returns ``(batch, heads, tokens, head size)`` or None for dense attention.
    listener
        Who is told of steps.
    masked
        Is told of self-attention with a mask that is more than padding: the call without its mask, and the mask.

    Raises
    ------
    ModelError
        If no module has a processor, or the model is taken over already.
    """

    def __init__(
        self,
        model: nn.Module,
        attend: Callable[[AttentionCall], Tensor | None],
        listener: StepListener,
        masked: Callable[[AttentionCall, Tensor], None] | None = None,
    ):
        modules = [module for module in model.modules() if hasattr(module, "processor")]
        if not modules:
            raise ModelError(
                f"{type(model).__name__} has no attention processors; call the method itself in place of "
                "scaled_dot_product_attention, and its begin() and step()"
            )
        if getattr(model, "_gossamer_site", None) is not None:
            raise ModelError("another attention method is at work in this model; call its remove() first")
        self.model, self.attend, self.listener, self.masked = model, attend, listener, masked
        self._context: str | None = None
        self.begin()
        self._open: list[_Answered] = []
        self._hooks = [model.register_forward_pre_hook(self._look, with_kwargs=True)]
        for layer, module in enumerate(modules):
            self._hooks.append(module.register_forward_pre_hook(self._enter(layer)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._earlier = vars(model).get("cache_context")
        if hasattr(model, "cache_context"):
            model.cache_context = self._named(model.cache_context)
        model._gossamer_site = self  # type: ignore[assignment]

    def begin(self) -> None:
        """A new sample: the next time value is step 0."""
        self._time: float | None = None
        self._index, self._ordinal, self._branches = -1, 0, 1

    def _named(self, cache_context: Callable[[str], Any]) -> Callable[[str], Any]:
        """The context in which a pipeline calls one branch of its guidance, whose name is noted."""

        @contextmanager
        def named(name: str) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with cache_context(name):
                    yield
            finally:
                self._context = before

        return named

    @property
    def _branch(self) -> str:
        if self._context is not None:
            return self._context
        # more calls than at the first step are a solver's, which asks again
        ordinal = self._ordinal % self._branches
        return f"call {ordinal + 1}" if ordinal else ""

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        time = kwargs.get("timestep")
        if time is None:
            raise ModelError(
                f"{type(module).__name__} was called without timestep=…, by which steps are told apart; pass it by name"
            )
        # of tokens with times of their own those that are given stand at 0
        value = float(torch.as_tensor(time).max())
        if value != self._time:
            self._time, self._index, self._ordinal = value, self._index + 1, 0
        else:
            self._ordinal += 1
        if self._index == 0:
            self._branches = self._ordinal + 1
        self.listener.step(self._index, self._branch)

    def _enter(self, layer: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._open.append(_Answered(layer, self.attend, self.masked))
            self._open[-1].__enter__()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if getattr(self.model, "_gossamer_site", None) is not self:
            return
        del self.model._gossamer_site
        if self._earlier is not None:
            self.model.cache_context = self._earlier
        elif "cache_context" in vars(self.model):
            del self.model.cache_context


class _Answered(TorchFunctionMode):
    """While active, calls of torch's attention between equal lengths are answered by a function."""

    def __init__(
        self,
        layer: int,
        attend: Callable[[AttentionCall], Tensor | None],
        masked: Callable[[AttentionCall, Tensor], None] | None,
    ):
        super().__init__()
        self.layer, self.attend, self.masked = layer, attend, masked

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _DENSE:
            return func(*args, **kwargs)
        call = self._read(*args, **kwargs)
        found = None if call is None else self.attend(call)
        return func(*args, **kwargs) if found is None else found

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall | None:
        """Self-attention that a method can compute; None for anything else."""
        if query.dim() != 4 or query.shape[2] != key.shape[2] or is_causal or dropout_p:
            return None
        query, key, value = as_autocast(query, key, value)
        call = AttentionCall(
            self.layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, causal=False
        )
        if attn_mask is None:
            return call
        parsed = parse_mask(attn_mask, query.shape[2], causal=False, window=None)
        if parsed is None:
            if self.masked is not None:
                self.masked(call, attn_mask)
            return None
        real = parsed[0]
        return call if real is None else replace(call, key_mask=real.expand(len(query), -1).contiguous())
