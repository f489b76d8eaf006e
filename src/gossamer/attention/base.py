"""What sparse attention methods have in common: calls, selections, kernels, counting, installation.

A method says which blocks of keys a prompt's queries read, and which tokens a single query of decoding reads. The rest
is the same for all: the kernel runs on the selection, what was computed is counted, and the method is put into a model
and taken out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.block_mask import BlockMask
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.kernels.attention import block_sparse_attention, gather_attention
from gossamer.models.attention_sites import AttentionCall, AttentionSite, Phase


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """The keys that a single query reads.

    Attributes
    ----------
    indices
        ``(batch, heads or key heads, tokens)``, without repetition.
    counts
        ``(batch, heads or key heads)``: how many of the first are meant; None for all.
    """

    indices: Tensor
    counts: Tensor | None = None

    def density(self, keys: int) -> float:
        """Share of the keys that is read."""
        read = float(self.indices.shape[-1]) if self.counts is None else float(self.counts.double().mean())
        return read / keys


@dataclass
class Tally:
    """Query–key pairs computed and allowed, over the calls of a layer in one phase.

    Attributes
    ----------
    computed, allowed
        Pairs of a head, averaged over heads.
    calls
        Number of calls.
    dense_calls
        How many of them were left dense.
    """

    computed: float = 0.0
    allowed: float = 0.0
    calls: int = 0
    dense_calls: int = 0

    @property
    def density(self) -> float:
        """Share of the allowed pairs that was computed; NaN before the first call."""
        return self.computed / self.allowed if self.allowed else float("nan")

    def add(self, density: float, call: AttentionCall, dense: bool) -> None:
        """Count a call; padding does not count."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        batch = call.query.shape[0]
        pairs = batch * (queries * keys - (queries * (queries - 1) / 2 if call.causal else 0))
        allowed = pairs
        if call.key_mask is not None:
            seen = call.key_mask.long()
            each = (seen.cumsum(1) * seen)[:, -queries:] if call.causal else queries * seen
            allowed = float(each.sum())
        self.computed += min(density * pairs, allowed)
        self.allowed += allowed
        self.calls += 1
        self.dense_calls += dense


@dataclass(frozen=True)
class DensityReport:
    """What a method has computed so far.

    Attributes
    ----------
    tallies
        (layer, phase) → counts.
    """

    tallies: dict[tuple[int, Phase], Tally]

    def density(self, phase: Phase) -> float:
        """Share of the allowed pairs that was computed in a phase, over all layers; NaN if it did not occur."""
        found = [tally for (_, when), tally in self.tallies.items() if when == phase]
        allowed = sum(tally.allowed for tally in found)
        return sum(tally.computed for tally in found) / allowed if allowed else float("nan")

    def layers(self, phase: Phase) -> dict[int, float]:
        """Layer → its density in a phase."""
        return {layer: tally.density for (layer, when), tally in sorted(self.tallies.items()) if when == phase}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain values, for JSON."""
        return {
            phase: {str(layer): density for layer, density in self.layers(phase).items()}
            for phase in ("prefill", "decode")
            if self.layers(phase)
        }

    def __str__(self) -> str:
        parts = [f"{phase} {self.density(phase):.1%}" for phase in ("prefill", "decode") if self.layers(phase)]
        return f"attention computed: {', '.join(parts) or 'none yet'}"


class Installed:
    """A method at work in a model, from the moment it is made until :meth:`remove`.

    Parameters
    ----------
    model
        A Hugging Face model.
    method
        The method.

    Raises
    ------
    ModelError
        If the model does not let its attention be replaced, or another method is at work there.
    """

    def __init__(self, model: nn.Module, method: SparseAttention):
        self.model, self.method = model, method
        self._tallies: dict[tuple[int, Phase], Tally] = {}
        method.reset()
        self._site = AttentionSite(model, self._attend)

    def _attend(self, call: AttentionCall) -> Tensor | None:
        answer = self.method.attend(call)
        tally = self._tallies.setdefault((call.layer, call.phase), Tally())
        tally.add(1.0 if answer is None else answer.density, call, answer is None)
        return None if answer is None else answer.output

    def report(self) -> DensityReport:
        """What was computed so far."""
        return DensityReport(dict(self._tallies))

    def reset(self) -> None:
        """Begin counting anew, and forget what the method has remembered."""
        self._tallies.clear()
        self.method.reset()

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        self._site.remove()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@dataclass(frozen=True, eq=False)
class Answer:
    """Attention of one call.

    Attributes
    ----------
    output
        ``(batch, heads, queries, value size)``.
    density
        Share of the allowed pairs that was computed.
    """

    output: Tensor
    density: float


@dataclass(kw_only=True)
class SparseAttention:
    """Attention over a part of the context.

    A method overrides :meth:`prefill`, :meth:`decode` or both; what it leaves alone stays dense, as do layers whose
    sliding window is shorter than the context, unless :attr:`treats_windows` says otherwise.

    Parameters
    ----------
    dense_layers
        Layers that stay dense.
    """

    dense_layers: tuple[int, ...] = field(default=(), kw_only=True)

    #: whether layers with a sliding window are treated as well
    treats_windows: ClassVar[bool] = False

    def prefill(self, call: AttentionCall) -> BlockMask | None:
        """The blocks that the queries of a prompt read; None for all."""
        return None

    def decode(self, call: AttentionCall) -> TokenSelection | None:
        """The tokens that a single query reads; None for all."""
        return None

    def reset(self) -> None:
        """Forget what is remembered from call to call; a new sample begins."""

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention of a call, or None if it is to stay dense."""
        if call.layer in self.dense_layers or (call.slides and not self.treats_windows):
            return None
        if call.phase == "decode":
            tokens = self.decode(call)
            if tokens is None:
                return None
            output = gather_attention(call.query, call.key, call.value, tokens.indices, tokens.counts, scale=call.scale)
            return Answer(output, tokens.density(call.key.shape[2]))
        mask = self.prefill(call)
        if mask is None:
            return None
        output = block_sparse_attention(
            call.query, call.key, call.value, mask, scale=call.scale, window=call.window, key_mask=call.key_mask
        )
        return Answer(output, mask.density)

    def install(self, model: nn.Module) -> Installed:
        """Put the method into a model, until ``remove()`` or the end of a ``with`` block.

        Parameters
        ----------
        model
            A Hugging Face model; it is not copied, and no weight is changed.

        Raises
        ------
        ModelError
            If the model does not let its attention be replaced, or another method is at work there.
        """
        return Installed(model, self)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[Installed]:
        """The method at work inside the context."""
        with self.install(model) as installed:
            yield installed

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = True,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        window: int | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attention in place of ``torch.nn.functional.scaled_dot_product_attention``.

        Parameters
        ----------
        query, key, value
            ``(batch, heads, queries, size)`` and ``(batch, key heads, keys, size)``; heads must be a multiple of key
            heads. Causal sequences are aligned at their ends.
        is_causal
            Whether a query reads no key behind it.
        scale
            By default one over the square root of the size.
        key_mask
            Bool ``(batch, keys)``, False at padding.
        window
            Keys up to its own that a query reads at most.
        layer
            Index of the layer, for methods that treat layers differently.

        Returns
        -------
        Tensor
            ``(batch, heads, queries, value size)``.

        Raises
        ------
        ConfigurationError
            If shapes do not fit.
        NonFiniteError
            If a query or key is NaN or infinite.
        """
        call = AttentionCall(
            layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, is_causal, window, key_mask
        )
        _check(call)
        answer = self.attend(call)
        return call.dense() if answer is None else answer.output


def _check(call: AttentionCall) -> None:
    query, key, value = call.query, call.key, call.value
    if any(part.dim() != 4 for part in (query, key, value)):
        shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise ConfigurationError(f"query, key and value are {shapes}; each must be (batch, heads, tokens, size)")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ConfigurationError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together"
        )
    if not query.shape[2] or not key.shape[2]:
        raise ConfigurationError(
            f"{query.shape[2]} queries and {key.shape[2]} keys; there must be at least one token of each"
        )
    if query.shape[1] % key.shape[1]:
        raise ConfigurationError(f"{query.shape[1]} heads and {key.shape[1]} key heads; the first must be a multiple")
    if call.causal and query.shape[2] > key.shape[2]:
        raise ConfigurationError(
            f"{query.shape[2]} queries and {key.shape[2]} keys; causal attention needs at least as many keys"
        )
    if call.key_mask is not None and call.key_mask.shape != (key.shape[0], key.shape[2]):
        raise ConfigurationError(
            f"key_mask is {tuple(call.key_mask.shape)}; it must be {(key.shape[0], key.shape[2])}, one for every key"
        )
    for name, part in (("query", query), ("key", key)):
        if not torch.isfinite(part.sum(dtype=torch.float32)) and not bool(torch.isfinite(part).all()):
            raise NonFiniteError(f"{name} of layer {call.layer} holds NaN or infinity; importance has no meaning then")


def check_share(value: float, name: str) -> float:
    """Return a threshold or share if it lies in (0, 1].

    Raises
    ------
    ConfigurationError
        If it is no number, or does not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigurationError(f"{name} is {value!r}; it must be in (0, 1], where 1 is dense")
    return value


def missing_calibration(method: SparseAttention) -> CalibrationError:
    """The error of a method that is used before it has seen data."""
    return CalibrationError(f"{type(method).__name__} has not seen data yet; call calibrate(model, data) first")
