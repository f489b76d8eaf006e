"""What sparse attention methods have in common: calls, selections, kernels, counting, installation.

A method says which blocks of keys a prompt's queries read, and which tokens a single query of decoding reads. The rest
is the same for all: the kernel runs on the selection, what was computed is counted, and the method is put into a model
and taken out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.attention.density import COUNTING, DensityReport, Tally
from gossamer.attention.token_selection import TokenSelection
from gossamer.core.block_mask import BlockMask
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.kernels.attention import block_sparse_attention, gather_attention
from gossamer.models.attention_sites import AttentionCall, AttentionSite, Phase, as_autocast, parse_mask


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
        self._warned = False
        method.reset()
        self._site = self._attach()

    def _attach(self) -> Any:
        return AttentionSite(self.model, self._attend, self._masked)

    def _attend(self, call: AttentionCall) -> Tensor | None:
        answer = _attended(self.method, call)
        with COUNTING:
            self._tally(call).add(call, answer)
        return None if answer is None else answer.output

    def _masked(self, call: AttentionCall, mask: Tensor) -> None:
        with COUNTING:
            self._tally(call).add_masked(call, mask)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {call.layer} has a mask {tuple(mask.shape)} of more than causality and padding, as packed "
                f"sequences have; {type(self.method).__name__} leaves such calls dense",
                stacklevel=2,
            )

    def _tally(self, call: AttentionCall) -> Tally:
        return self._tallies.setdefault((call.layer, call.phase), Tally())

    def report(self) -> DensityReport:
        """What was computed so far."""
        with COUNTING:
            return DensityReport({where: replace(tally) for where, tally in self._tallies.items()})

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
        Share of the pairs that causality, window and padding allow that was computed.
    pairs
        Pairs of a head that were computed and those that were allowed, over the batch, where a cache that holds less
        than was seen hides them from who only sees the call; None where its lengths tell them.
    """

    output: Tensor
    density: float
    pairs: tuple[float, float] | None = None


@dataclass(kw_only=True)
class SparseAttention:
    """Attention over a part of the context.

    A method overrides :meth:`prefill`, :meth:`decode` or both; what it leaves alone stays dense, as do layers whose
    sliding window is shorter than the context, unless :attr:`treats_windows` says otherwise.

    Parameters
    ----------
    dense_layers
        Layers that stay dense, counted from 0.

    Raises
    ------
    ConfigurationError
        If they are no such numbers.
    """

    dense_layers: tuple[int, ...] = field(default=(), kw_only=True)

    #: whether layers with a sliding window are treated as well
    treats_windows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layers = self.dense_layers
        if not isinstance(layers, Collection) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ConfigurationError(
                f"dense_layers is {layers!r}; give the numbers of layers, counted from 0, as (0, 1), or () for none"
            )

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
            return Answer(output, tokens.density(call.key.shape[2], call.key_mask))
        mask = self.prefill(call)
        if mask is None:
            return None
        output = block_sparse_attention(
            call.query, call.key, call.value, mask, scale=call.scale, window=call.window, key_mask=call.key_mask
        )
        return Answer(output, mask.real_density(call.key_mask, call.window))

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
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        key_mask: Tensor | None = None,
        window: int | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Attention in place of ``torch.nn.functional.scaled_dot_product_attention``, with its signature.

        Parameters
        ----------
        query, key, value
            ``(batch, heads, queries, size)`` and ``(batch, key heads, keys, size)``; heads must be a multiple of key
            heads. Under autocast they take its dtype. A single query of several keys is a step of decoding.
        attn_mask
            Of truths, or added to scores, broadcastable to ``(batch, 1, queries, keys)``: causality that is aligned at
            the ends of queries and keys, padding, or both.
        dropout_p
            0: sparse attention has no dropout.
        is_causal
            Whether a query reads no key behind it. Queries and keys are aligned at their ends, also where there are
            more keys; torch aligns them at their beginnings.
        scale
            By default one over the square root of the size.
        enable_gqa
            Taken for torch's sake: whether heads share keys is seen from the shapes.
        key_mask
            Bool ``(batch, keys)``, False at padding; another way to say it.
        window
            Keys up to its own that a query reads at most.
        layer
            Index of the layer, which methods that are calibrated layer by layer have to be told. By default none in
            particular, which is never dense.

        Returns
        -------
        Tensor
            ``(batch, heads, queries, value size)``.

        Raises
        ------
        ConfigurationError
            If shapes do not fit, a mask is more than causality and padding or given twice, there is dropout, or the
            method must be told which layer this is.
        NonFiniteError
            If a query or key is NaN or infinite.
        """
        if dropout_p:
            raise ConfigurationError(f"dropout_p is {dropout_p}; sparse attention has no dropout: pass 0.0")
        query, key, value = as_autocast(query, key, value)
        causal = is_causal or (query.dim() == key.dim() == 4 and query.shape[2] == 1 < key.shape[2])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(layer, query, key, value, scale, causal, window, key_mask)
        _check(call)
        if attn_mask is not None:
            if is_causal or key_mask is not None or window is not None:
                raise ConfigurationError(
                    "attn_mask says all that may be read; leave is_causal, key_mask and window out"
                )
            call = _masked(call, attn_mask)
        answer = _attended(self, call)
        return call.dense() if answer is None else answer.output


@torch.compiler.disable  # what is chosen depends on numbers, which a graph does not know
def _attended(method: SparseAttention, call: AttentionCall) -> Answer | None:
    """A method's answer; sums that it takes in float32 are not rounded by autocast."""
    with torch.autocast(call.query.device.type, enabled=False):
        return method.attend(call)


def _masked(call: AttentionCall, mask: Tensor) -> AttentionCall:
    """The call with what a mask says, which is causality, padding or both.

    Raises
    ------
    ConfigurationError
        If it is more than that, or its shape does not fit.
    """
    (batch, _, queries, _), keys = call.query.shape, call.key.shape[2]
    four = mask[(None,) * (4 - mask.dim())] if mask.dim() <= 4 else mask
    fits = four.dim() == 4 and all(
        part in (1, whole) for part, whole in zip(four.shape, (batch, call.query.shape[1], queries, keys))
    )
    if not fits or four.shape[3] != keys:
        raise ConfigurationError(
            f"attn_mask is {tuple(mask.shape)}; it must be broadcastable to (batch, 1, queries, keys), "
            f"{(batch, 1, queries, keys)}"
        )
    for causal in (False, True) if queries > 1 else (call.causal,):
        parsed = parse_mask(four, queries, causal, None)
        if parsed is not None:
            real, length = parsed
            real = None if real is None else real.expand(batch, -1).contiguous()
            return replace(
                call, key=call.key[:, :, :length], value=call.value[:, :, :length], causal=causal, key_mask=real
            )
    raise ConfigurationError(
        f"attn_mask {tuple(mask.shape)} is more than causality and padding, the same for all heads; attention under it "
        "is dense: call torch.nn.functional.scaled_dot_product_attention"
    )


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
            raise NonFiniteError(f"{name} of {call.place} holds NaN or infinity; importance has no meaning then")


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


def named_layer(layer: int | None, known: Collection[int]) -> int:
    """Return a layer if it is told.

    Parameters
    ----------
    layer
        Of a call.
    known
        Layers that the method has seen.

    Raises
    ------
    ConfigurationError
        If it is not.
    """
    if layer is None:
        raise ConfigurationError(
            f"layer is None, but this method is calibrated layer by layer, for {sorted(known)}; say which one this is, "
            f"as method(query, key, value, layer={max(known, default=0)})"
        )
    return layer


def missing_calibration(method: SparseAttention) -> CalibrationError:
    """The error of a method that is used before it has seen data."""
    return CalibrationError(f"{type(method).__name__} has not seen data yet; call calibrate(model, data) first")
