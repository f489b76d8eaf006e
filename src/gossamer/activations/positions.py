"""Which tokens a rule leaves alone: padding, and the beginning of a prompt, whose errors every later token inherits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.core.backward_passes import backward_pass, recomputing
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.blocks import find_stacks


class DenseTokens:
    """Follows the calls of a stack of blocks and says which of their tokens stay dense.

    A call that finds nothing in its cache is a prompt, and one of several tokens that continues a cache is a piece of
    one (prompts are read in chunks, and conversations go on): of every sequence the first share of these tokens stays
    dense, padding not counted. A call of one token that continues a cache is decoding: everything is sparse.

    Gradient checkpointing computes parts of a block again when the call is long over. Which call that was is told by
    the memory of their inputs, which checkpointing keeps.

    Parameters
    ----------
    prompt
        Share of each prompt that stays dense, from 0 to 1; with 1 only decoding is sparse.
    strict
        Whether activations of another length than the call are refused. Where they are not (encoders beside decoders,
        whose output is read by cross-attention), none of their tokens is dense.

    Attributes
    ----------
    dense
        Of the present call, ``(batch, tokens)`` bool, or None if no token is dense.
    sparse
        Number of the other tokens of the call.
    """

    def __init__(self, prompt: float, strict: bool = True):
        if not 0 <= prompt <= 1:
            raise ConfigurationError(f"dense_prefill is {prompt}; it must be from 0 to 1, the dense share of a prompt")
        self.prompt, self.strict = prompt, strict
        self.dense: Tensor | None = None
        self.sparse = 0
        self._in_call = False
        self._calls: WeakKeyDictionary[torch.UntypedStorage, Tensor | None] = WeakKeyDictionary()
        self._again: tuple[int, Tensor | None] = (-1, None)

    def __reduce__(self) -> tuple:
        # calls are not copied with a model
        return DenseTokens, (self.prompt, self.strict)

    def attach(self, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> list[Any]:
        """Follow the calls of a model and of its blocks; returns the handles to ``remove()`` in the end."""
        parts = (part for block in blocks for part in _parts(block))
        return [
            model.register_forward_pre_hook(self._look, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
            *(part.register_forward_pre_hook(self._follow, with_kwargs=True) for part in parts),
        ]

    def _forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        # a layer that is called by itself has no prompt
        self.dense, self._in_call = None, False

    def _follow(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = next((v for v in (*args, kwargs.get("hidden_states")) if isinstance(v, Tensor)), None)
        if hidden is not None:
            self._note(hidden)

    def _note(self, values: Tensor) -> None:
        """Remember which call an activation belongs to; in a backward pass, call it to mind."""
        if not self.prompt or torch.compiler.is_compiling():
            return
        if self._in_call:
            if torch.is_grad_enabled() or values.requires_grad:
                self._calls[values.untyped_storage()] = self.dense
        elif recomputing() and values.untyped_storage() in self._calls:
            self._again = backward_pass(), self._calls[values.untyped_storage()]

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        tokens = _tokens(args, given)
        self.dense, self._in_call = None, True
        if tokens is None:
            return
        shape = (tokens.shape[0], tokens.shape[1])
        past = given.get("past_key_values")
        seen = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
        if seen == 0 or shape[1] > 1:
            dense = self.of_prompt(shape, _real(given.get("attention_mask"), shape, seen))
            if dense is not None:
                self.sparse = dense.numel() - int(dense.sum())
                self.dense = dense.to(tokens.device)

    def among(self, values: Tensor) -> Tensor | None:
        """Which tokens of an activation ``(…, n)`` are dense, bool ``(…, 1)``; None if none is.

        Raises
        ------
        ModelError
            If the activation is of another number of tokens than the call, or is computed again for an unknown one.
        """
        self._note(values)
        dense = self._recalled() if recomputing() and not self._in_call else self.dense
        if dense is None:
            return None
        if values.shape[:-1].numel() == dense.numel():
            return dense.to(values.device).reshape(values.shape[:-1]).unsqueeze(-1)
        if not self.strict:
            return None
        raise ModelError(
            f"an activation of shape {tuple(values.shape)} does not belong to the {dense.shape[0]} × {dense.shape[1]} "
            f"tokens of the call, so the dense ones cannot be told; set dense_prefill=0"
        )

    def _recalled(self) -> Tensor | None:
        known, dense = self._again
        if self.prompt and known != backward_pass():
            raise ModelError(
                "gradient checkpointing computes something again whose dense tokens cannot be told, since its inputs "
                "were copied or are not those of a block; checkpoint whole blocks, or set dense_prefill=0"
            )
        return dense

    def of_prompt(self, shape: tuple[int, int], real: Tensor | None = None) -> Tensor | None:
        """Dense tokens of prompts.

        Parameters
        ----------
        shape
            Sequences, and tokens in each.
        real
            ``(batch, tokens)`` bool, False at padding; None if there is none.
        """
        if real is None:
            count = int(self._first(torch.tensor(shape[1])))
            return (torch.arange(shape[1]) < count).expand(shape) if count else None
        order = real.cumsum(1)  # 1 at the first real token, wherever the padding is
        return (order <= self._first(order[:, -1:])) | ~real

    def _first(self, tokens: Tensor) -> Tensor:
        # 0.07 · 100 is a little more than 7 in binary
        return (self.prompt * tokens.double() - 1e-9).ceil()


def _parts(block: nn.Module) -> list[nn.Module]:
    """A block and what it calls itself: some libraries checkpoint what is in a block, and its hooks run only once."""
    children = list(block.children())
    return [block, *children, *(part for child in children if isinstance(child, nn.ModuleList) for part in child)]


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, the positional ones too."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args)) | kwargs


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    found = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if found is None:
        found = next((value for value in args if isinstance(value, Tensor)), None)
    return None if found is None or found.dim() < 2 else found


def _real(mask: Any, shape: tuple[int, int], seen: int) -> Tensor | None:
    if isinstance(mask, dict):  # one for each kind of attention
        mask = next(iter(mask.values()), None)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == shape[1]:
        # of caches of a fixed size: a token is real if another, or itself, looks at it
        looked = mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask.bool()
        mask = looked.any(1).any(1)[:, : seen + shape[1]].expand(shape[0], -1)
    if isinstance(mask, Tensor) and mask.shape == (shape[0], seen + shape[1]):
        mask = mask[:, seen:]  # what is in the cache has been dealt with
    if not isinstance(mask, Tensor) or mask.shape != shape or bool(mask.all()):
        return None
    return mask.bool()


def token_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that run stacks of blocks over tokens: name of a stack → its owner.

    Their calls, unlike those of the model around them, always say which tokens the blocks see: behind the generation
    of a wrapped model, between image and text, in encoders as in decoders. What takes neither token ids nor a cache,
    such as the encoder of an image, runs over something else.
    """
    modules = dict(model.named_modules())
    found = {}
    for stack in find_stacks(model):
        owner = stack.name
        while owner and isinstance(modules[owner], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            owner = owner.rpartition(".")[0]
        if {"input_ids", "past_key_values"} & set(inspect.signature(modules[owner].forward).parameters):
            found[stack.name] = modules[owner]
    return found
