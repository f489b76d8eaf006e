"""What models that denoise in steps have in common: one attention function for all layers, and a clock.

A denoising model runs the same network some dozens of times on almost the same input. A method that remembers
something from one step to the next has to know which step it is, and to take the place of the attention in every layer.
Both go through :class:`Denoiser`: its `attention` is a plain function that anybody may replace, and its samplers tell
the `listener`, if there is one, that a sample begins and which step comes next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.attention_sites import AttentionCall, as_autocast


class StepListener(Protocol):
    """Somebody who wants to know how far a sample is."""

    def begin(self, steps: int, context: slice) -> None:
        """A sample begins: so many steps, and which tokens are given (a prompt, a text)."""

    def step(self, index: int, branch: str = "") -> None:
        """The next calls belong to this step, and to this branch where guidance needs several calls."""


AttentionFunction = Callable[[AttentionCall], Tensor]


class Denoiser(nn.Module):
    """A network that is run once or twice for every step of a sample.

    Attributes
    ----------
    attention
        What mixes the values in all layers; dense attention unless replaced.
    listener
        Who is told about steps; None for nobody.
    """

    attention: AttentionFunction
    listener: StepListener | None

    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionCall.dense
        self.listener = None

    def begin(self, steps: int, context: slice = slice(0, 0)) -> None:
        """Say that a sample of so many steps begins; `context` is where its given tokens are."""
        if steps < 1:
            raise ConfigurationError(f"steps is {steps}; a sample needs at least 1")
        if self.listener is not None:
            self.listener.begin(steps, context)

    def step(self, index: int, branch: str = "") -> None:
        """Say which step the following calls belong to."""
        if self.listener is not None:
            self.listener.step(index, branch)


class DenoiserSite:
    """A denoiser whose attention is computed by a function, from the moment this is made until :meth:`remove`.

    Parameters
    ----------
    model
        The denoiser.
    attend
        Gets every call, and returns ``(batch, heads, tokens, head size)`` or None for dense attention.
    listener
        Who is told of steps.

    Raises
    ------
    ModelError
        If the model is taken over already.
    """

    def __init__(self, model: Denoiser, attend: Callable[[AttentionCall], Tensor | None], listener: StepListener):
        if model.listener is not None:
            raise ModelError("another attention method is at work in this model; call its remove() first")
        self.model, self.attend = model, attend
        self._earlier = model.attention
        model.attention, model.listener = self._mixed, listener

    def _mixed(self, call: AttentionCall) -> Tensor:
        query, key, value = as_autocast(call.query, call.key, call.value)
        call = replace(call, query=query, key=key, value=value)
        found = self.attend(call)
        return self._earlier(call) if found is None else found

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        if self.model.listener is not None and self.model.attention == self._mixed:
            self.model.attention, self.model.listener = self._earlier, None


class SelfAttention(nn.Module):
    """Projections around an attention function.

    Parameters
    ----------
    width, heads
        The first a multiple of the second.
    locality
        How strongly heads look around themselves at first, from none for the first head to this for the last: a
        constant in queries and keys, which rotations turn into a peak at distance 0.

    Raises
    ------
    ConfigurationError
        If it is not.
    """

    def __init__(self, width: int, heads: int, locality: float = 0.0):
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigurationError(f"width is {width}; it must be a multiple of the {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        constants = torch.linspace(0, locality, heads).repeat_interleave(width // heads)
        with torch.no_grad():
            self.qkv.bias.copy_(torch.cat([constants, constants, torch.zeros(width)]))
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        attention: AttentionFunction,
        layer: int,
        rotation: tuple[Tensor, Tensor] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """``(batch, tokens, width)`` → the same; `rotation` as from :func:`rotations` turns queries and keys."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = attention(AttentionCall(layer, q, k, v, q.shape[-1] ** -0.5, causal=False, key_mask=key_mask))
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotations(length: int, head_size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, ``(length, head size / 2)`` each [Su et al., 2021, arXiv 2104.09864]."""
    rates = base ** (-torch.arange(0, head_size, 2) / head_size)
    angles = torch.arange(length)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of features ``(…, tokens, head size)`` by the angle of its token."""
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def feed_forward(width: int) -> nn.Sequential:
    """Two linear layers with a GELU, four times as wide in between."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
