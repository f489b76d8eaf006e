"""Whole decoding steps of a language model in compiled code.

What Python and torch need for the modules of one token is longer than a small model's weights take to be read. So a
model is read once (:mod:`gossamer.runtime.recognition`) and becomes a program: one call goes from a token to the logits
of the next. The program works on the weights as they are stored, in any storage that there are kernels for, and
computes in float32. When it is made it is compared with the model, and refused if they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.matrix import without_rounding
from gossamer.kernels.native import available, native, why_not
from gossamer.runtime.recognition import LayerParts, ModelParts, NormParts, recognise
from gossamer.runtime.session import Session
from gossamer.runtime.thresholds import Thresholds
from gossamer.runtime.weights import (
    CHANNELS,
    DENSE,
    NIBBLE_ROWS,
    Pack,
    StoredWeight,
    describe_channels,
    describe_module,
    layer_problem,
)

_PROBE, _PROBE_STEPS = 24, 2
#: largest norm of the difference of logits, relative to that of the logits around their mean, that rounding explains
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


class DecodeProgram:
    """A language model as compiled steps.

    Parameters
    ----------
    parts
        What :func:`~gossamer.runtime.recognition.recognise` has read.
    context
        Positions that it can be used for.
    pack
        ``(name, weight) -> matrix`` for plain layers, or None for those that stay as they are.
    thresholds
        Sizes below which activations count as zero, or None.

    Attributes
    ----------
    nbytes
        Of all weights.
    head_bytes
        Of the output head.
    key_sizes
        Heads of keys and values in each layer, and numbers in each head.
    dense_share
        Of the bytes of weights that a token reads where every activation is live, the head included, those that it
        reads in any case: 1 without thresholds.

    Raises
    ------
    ModelError
        If shapes do not fit together, or a weight is in no storage that there are kernels for.
    """

    def __init__(self, parts: ModelParts, context: int, pack: Pack | None = None, thresholds: Thresholds | None = None):
        self.context, self.thresholds = context, thresholds
        self._kept: list[Any] = [parts.rotations]
        shared: dict[int, StoredWeight] = {}

        def stored(module: nn.Module, name: str) -> StoredWeight:
            limits = None if thresholds is None else thresholds.inputs.get(name)
            block, _, projection = name.rpartition(".")
            behind = thresholds is not None and projection == "down_proj" and block in thresholds.gates
            if limits is not None or behind:
                return shared.setdefault(id(module), describe_channels(module, name, limits, pack))
            source = getattr(module, "weight", None) if isinstance(module, nn.Linear | nn.Embedding) else None
            key = id(module) if source is None else id(source)
            if key not in shared:
                shared[key] = describe_module(module, name, pack)
            return shared[key]

        head = stored(parts.head, parts.head_name)
        embedding = stored(parts.embedding, "embedding")
        if head.rows != embedding.rows or head.columns != embedding.columns:
            raise ModelError(
                f"the head is {head.rows} × {head.columns}, the embedding {embedding.rows} × {embedding.columns}"
            )
        self.vocabulary, self.hidden = head.rows, head.columns
        if embedding.kind in (CHANNELS, NIBBLE_ROWS):
            raise ModelError("the embedding is not stored row after row; keep it dense, for tokens are rows of it")
        read = [head.nbytes]
        partly = 0

        def layer_of(layer: LayerParts) -> dict[str, Any]:
            nonlocal partly
            weights, about = self._layer(layer, parts, stored, thresholds)
            read.extend(weight.nbytes for weight in weights.values())
            in_part = {role for role, weight in weights.items() if weight.limits is not None}
            in_part |= {"up", "down"} if about["gate_limits"] else set()
            partly += sum(weights[role].nbytes for role in in_part)
            return about

        layers = [layer_of(layer) for layer in parts.layers]
        self.key_sizes = [(about["key_heads"], about["dim"]) for about in layers]
        self._kept += [list(shared.values()), parts, thresholds]
        self._native = native().Decoder(
            embedding.arguments(),
            parts.embedding_scale,
            _norm_arguments(parts.norm),
            head.arguments(),
            parts.logit_cap,
            layers,
        )
        self.nbytes = sum(weight.nbytes for weight in shared.values())
        self.head_bytes = head.nbytes
        self.dense_share = 1 - partly / sum(read)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        context: int = 2048,
        pack: Pack | None = None,
        verify: bool = True,
        thresholds: Thresholds | None = None,
    ) -> DecodeProgram:
        """Read a model, and make sure that the program computes the same.

        Parameters
        ----------
        model
            A causal language model of Hugging Face on the CPU; its layers may be packed. Weights are used where they
            lie and must not be changed or freed afterwards.
        context
            Positions that the program can be used for.
        pack
            ``(name, weight) -> matrix`` for layers that are not packed; the comparison is made before.
        verify
            Whether to compare; it takes two passes over a short random text.
        thresholds
            Of inputs and gates; the comparison is made without them. A weight that
            :func:`~gossamer.runtime.thresholds.lay_out_` has not laid by channels before is copied.

        Raises
        ------
        ConfigurationError
            If `context` is below 1, or the thresholds are for another model.
        ModelError
            If there are no compiled kernels, the model is built of other parts, or the two differ by more than
            :data:`TOLERANCES`. The caller then runs the model itself.
        """
        if not available():
            raise ModelError(f"there are no compiled kernels ({why_not()}); run the model through Hugging Face")
        if not isinstance(context, int) or context < 1:
            raise ConfigurationError(f"context is {context!r}; it must be an integer of at least 1")
        if thresholds is not None:
            thresholds.check(model)
        parts = recognise(model, max(context, _PROBE + _PROBE_STEPS))
        program = cls(parts, max(context, _PROBE + _PROBE_STEPS))
        if verify:
            program.verify(model)
        if pack is not None or thresholds is not None:
            program = cls(parts, context, pack, thresholds)
        program.context = context
        return program

    def _layer(
        self,
        layer: LayerParts,
        parts: ModelParts,
        stored: Callable[[nn.Module, str], StoredWeight],
        thresholds: Thresholds | None,
    ) -> tuple[dict[str, StoredWeight], dict[str, Any]]:
        weights = {role: stored(module, layer.names[role]) for role, module in layer.modules.items()}
        problem = layer_problem(weights, layer.dim, self.hidden)
        if problem:
            raise ModelError(
                f"{layer.names['query']} and its neighbours: {problem}; run the model through Hugging Face"
            )
        cosines, sines = parts.rotations[layer.rotation]
        if cosines.shape[1] > layer.dim or cosines.shape[1] % 2:
            raise ModelError(
                f"rotations of {cosines.shape[1]} of {layer.dim} numbers; run the model through Hugging Face"
            )
        gates = None
        if thresholds is not None:
            gates = thresholds.gates.get(layer.names["gate"].rpartition(".")[0])
        if gates is not None and weights["up"].kind not in (DENSE, NIBBLE_ROWS):
            raise ModelError(
                f"{layer.names['up']} is in a storage whose single rows cannot be read, and its block has thresholds "
                f"for gates; keep it dense"
            )
        return weights, {
            **{role: weight.arguments() for role, weight in weights.items()},
            **{role: () if norm is None else _norm_arguments(norm) for role, norm in layer.norms.items()},
            "heads": weights["query"].rows // layer.dim,
            "key_heads": weights["key"].rows // layer.dim,
            "dim": layer.dim,
            "window": layer.window,
            "scale": layer.scale,
            "cap": layer.cap,
            "cosines": cosines.data_ptr(),
            "sines": sines.data_ptr(),
            "rotary": cosines.shape[1],
            "activation": layer.activation,
            "gate_limits": 0 if gates is None else gates.data_ptr(),
        }

    def session(self, capacity: int | None = None, dtype: torch.dtype = torch.float32) -> Session:
        """Begin a text.

        Parameters
        ----------
        capacity
            Tokens that it may have, at most `context`.
        dtype
            Of the keys and values that are kept: float32 or bfloat16.

        Raises
        ------
        ConfigurationError
            If `capacity` or `dtype` is none of these.
        """
        capacity = self.context if capacity is None else capacity
        if not isinstance(capacity, int) or not 1 <= capacity <= self.context:
            raise ConfigurationError(f"capacity is {capacity!r}; the program was made for 1 to {self.context} tokens")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigurationError(f"dtype of the cache is {dtype}; it must be float32 or bfloat16")
        return Session(self, capacity, dtype)

    @torch.no_grad()
    def verify(self, model: nn.Module) -> float:
        """Compare logits of a short random text: read at once, and token after token.

        Returns
        -------
        float
            The largest relative difference.

        Raises
        ------
        ModelError
            If it is larger than rounding explains.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (1, _PROBE + _PROBE_STEPS), generator=generator)
        training = model.training
        model.eval()
        try:
            with without_rounding():
                expected = model(tokens, use_cache=False).logits[0].float()
        finally:
            model.train(training)
        session = self.session(tokens.shape[1])
        found = [session._feed(tokens[0, :_PROBE], every=True, exact=True).clone()]
        found += [
            session._feed(tokens[0, at : at + 1], exact=True)[None].clone() for at in range(_PROBE, len(tokens[0]))
        ]
        error = relative_difference(torch.cat(found), expected)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        allowed = TOLERANCES.get(dtype, max(TOLERANCES.values()))
        if not error <= allowed:
            raise ModelError(
                f"the program of {type(model).__name__} differs from the model by {error:.2g} of its logits, more than "
                f"{allowed:.2g}, so some part of it works otherwise than was read; run it through Hugging Face"
            )
        return error

    def watch(self, wanted: bool = True) -> None:
        """Note from now on how long each kind of work takes."""
        self._native.watch(wanted)

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each kind of work since this was last asked for."""
        names = ("rest", "matrices", "attention", "head")
        return dict(zip(names, self._native.seconds() or [0.0] * len(names)))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest norm of a row's difference, relative to the norm of the expected row around its mean."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-30)
    return float(((found - expected).norm(dim=-1) / spread).max())


def _norm_arguments(norm: NormParts) -> tuple[int, float]:
    return norm.weight.data_ptr(), norm.epsilon
