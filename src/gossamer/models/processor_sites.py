"""Self-attention of models made with diffusers, taken over by a function of ours and given back.

A transformer of diffusers computes attention in modules with a replaceable ``processor``: dozens of classes that differ
in projections, norms and rotary positions and agree in one thing, the call of ``scaled_dot_product_attention``. So no
processor is replaced or copied: while such a module runs, that one call is answered by a function of ours. diffusers
itself is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.errors import ModelError
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.denoising import StepListener

_DENSE = torch.nn.functional.scaled_dot_product_attention


class ProcessorSite:
    """A model of diffusers whose self-attention is computed by a function, until :meth:`remove`.

    Attention between different lengths (cross-attention), with a mask or with dropout stays what it was. Steps are told
    apart by the ``timestep`` of the model's calls: a new value is a new step, so that solvers which ask several times
    at one time do not run ahead. Who installs a method says ``method.begin(num_inference_steps)`` before every sample.

    Parameters
    ----------
    model
        A module; those within that have a ``processor`` are taken over.
    attend
        Gets every call, and returns ``(batch, heads, tokens, head size)`` or None for dense attention.
    listener
        Who is told of steps.

    Raises
    ------
    ModelError
        If no module has a processor, or the model is taken over already.
    """

    def __init__(self, model: nn.Module, attend: Callable[[AttentionCall], Tensor | None], listener: StepListener):
        modules = [module for module in model.modules() if hasattr(module, "processor")]
        if not modules:
            raise ModelError(
                f"{type(model).__name__} has no attention processors; call the method itself in place of "
                "scaled_dot_product_attention, and its begin() and step()"
            )
        if getattr(model, "_gossamer_site", None) is not None:
            raise ModelError("another attention method is at work in this model; call its remove() first")
        self.model, self.attend, self.listener = model, attend, listener
        self._time: float | None = None
        self._index = -1
        self._open: list[_Answered] = []
        self._hooks = [model.register_forward_pre_hook(self._look, with_kwargs=True)]
        for layer, module in enumerate(modules):
            self._hooks.append(module.register_forward_pre_hook(self._enter(layer)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        model._gossamer_site = self  # type: ignore[assignment]

    def begin(self) -> None:
        """A new sample: the next time value is step 0."""
        self._time, self._index = None, -1

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        time = kwargs.get("timestep")
        if time is None:
            raise ModelError(
                f"{type(module).__name__} was called without timestep=…, by which steps are told apart; pass it by name"
            )
        value = float(torch.as_tensor(time).flatten()[0])
        if value != self._time:
            self._time, self._index = value, self._index + 1
            self.listener.step(self._index)

    def _enter(self, layer: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._open.append(_Answered(layer, self.attend))
            self._open[-1].__enter__()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if getattr(self.model, "_gossamer_site", None) is self:
            del self.model._gossamer_site


class _Answered(TorchFunctionMode):
    """While active, calls of torch's attention between equal lengths are answered by a function."""

    def __init__(self, layer: int, attend: Callable[[AttentionCall], Tensor | None]):
        super().__init__()
        self.layer, self.attend = layer, attend

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _DENSE:
            return func(*args, **kwargs)
        call = _read(self.layer, *args, **kwargs)
        found = None if call is None else self.attend(call)
        return func(*args, **kwargs) if found is None else found


def _read(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall | None:
    plain = query.dim() == 4 and query.shape[2] == key.shape[2] and attn_mask is None and dropout_p == 0
    if not plain or is_causal:
        return None
    return AttentionCall(layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, causal=False)
