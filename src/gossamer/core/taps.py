"""Reading activations while a model runs, together with which tokens are real.

A :class:`Tap` says where: what goes into a module, or what comes out of it. :class:`Listening` hands every value that
passes a tap to whoever listens, with a mask of the tokens that are no padding; the mask is taken from the
``attention_mask`` of the innermost part of the model that was called with one, so that encoder and decoder, and
sequences that have been lengthened by a learned prompt, each have their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, TargetError

Side = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Tap:
    """Where activations are read.

    Attributes
    ----------
    name
        Under which they are reported.
    module
        What they go into or come out of.
    side
        ``input`` or ``output``.
    group
        What is averaged on its own, such as the encoder and the decoder of a model with both.
    """

    name: str
    module: nn.Module
    side: Side = "input"
    group: str = ""


Visit = Callable[[Tap, Tensor, Tensor | None], None]


class Listening:
    """Hands activations to a listener until it is closed; a context manager.

    Parameters
    ----------
    model
        The model that is called; what runs outside a call of it (such as the repetition of a forward pass under
        activation checkpointing) is told apart by :attr:`running`.
    taps
        Where to listen.
    visit
        Called with the tap, its values ``(…, features)``, and which tokens are real, ``(…)`` bool, or None if all are.
    begin
        Called when a call of the model begins.

    Raises
    ------
    TargetError
        If there is no tap.
    """

    def __init__(
        self, model: nn.Module, taps: Iterable[Tap], visit: Visit, begin: Callable[[], None] = lambda: None
    ) -> None:
        self.taps = tuple(taps)
        if not self.taps:
            raise TargetError(f"no place in {type(model).__name__} to read activations from; name one")
        self.token_mask: Tensor | None = None
        self.running = False
        self._begin = begin
        self._visit = visit
        self._masks: dict[str, Tensor | None] = {}
        names = {id(module): name for name, module in model.named_modules()}
        self._handles = [
            model.register_forward_pre_hook(self._started, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._ended, always_call=True),
        ]
        above = {parent for tap in self.taps for parent in _parents(names.get(id(tap.module), ""))}
        for name, module in model.named_modules():
            if name in above:
                hook = self._mask_noter(name, module)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for tap in self.taps:
            self._handles.append(self._listen(tap, names.get(id(tap.module), "")))

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def _started(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.running = True
        self._masks = {}
        self._note_mask("", module, args, kwargs)
        self._begin()

    def _ended(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.running = False

    def _mask_noter(self, name: str, module: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._note_mask(name, module, args, kwargs)

        return note

    def _note_mask(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given, mask = _argument(module, args, kwargs, "attention_mask")
        # blocks get the mask of their attention, with a row for every query, which says nothing new about tokens
        if given and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            self._masks[name] = mask

    def _listen(self, tap: Tap, name: str) -> Any:
        owners = [*reversed(_parents(name)), ""]

        def read(values: Any) -> None:
            if not isinstance(values, Tensor):
                raise TargetError(f"{tap.name} passes {type(values).__name__} on and no tensor; choose another module")
            mask = next((self._masks[owner] for owner in owners if owner in self._masks), None)
            mask = self.token_mask if self.token_mask is not None else mask
            self._visit(tap, values, None if mask is None else _fit(mask, values, tap.name))

        if tap.side == "input":
            return tap.module.register_forward_pre_hook(lambda module, args: read(args[0]))
        return tap.module.register_forward_hook(lambda module, args, output: read(output))


def _parents(name: str) -> list[str]:
    """Names of the modules around one, outermost first, without the model itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _argument(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a call gives an argument, by name or by place, and which."""
    if name in kwargs:
        return True, kwargs[name]
    if len(args) > 1:
        for place, parameter in enumerate(inspect.signature(module.forward).parameters):
            if parameter == name and place < len(args):
                return True, args[place]
    return False, None


def _fit(mask: Tensor, values: Tensor, name: str) -> Tensor:
    """The mask in the shape of the tokens; columns for what has been cached before are cut off."""
    tokens = values.shape[:-1]
    if len(tokens) == 2 and mask.shape[0] == tokens[0] and mask.shape[1] >= tokens[1]:
        return mask[:, -tokens[1] :].bool()
    if len(tokens) == 1 and mask.numel() == tokens[0]:
        return mask.flatten().bool()
    raise ConfigurationError(
        f"the mask of padding has shape {tuple(mask.shape)}, but {name} sees tokens {tuple(tokens)}; "
        f"set token_mask to one of that shape"
    )


def real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows ``(tokens, features)`` of the tokens that are no padding.

    Parameters
    ----------
    values
        ``(…, features)``.
    mask
        ``(…)`` bool, or None.
    """
    return values.flatten(0, -2) if mask is None else values[mask.to(values.device)]


def weighted_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are no padding, ``(…)`` → scalar; 0 if there is none."""
    if mask is None:
        return values.mean()
    kept = mask.to(values.device, values.dtype)
    return (values * kept).sum() / kept.sum().clamp_min(torch.finfo(values.dtype).tiny)
