"""A gated feed-forward layer that computes only the channels whose gate is open.

The gate is computed in full; where it is exactly zero, the rows of the up projection and the columns of the down
projection need not be read. All three matrices are kept with one channel after the other in memory, so that what is
read is contiguous. A predictor can name the open channels before the gate is computed, which saves part of that too,
and errs now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.targets import Target
from gossamer.errors import ModelError, TargetError
from gossamer.kernels.channels import SLACK, ChannelMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import GatedFeedforward
from gossamer.kernels.native import available
from gossamer.models.activation_functions import FATReLU
from gossamer.models.feedforward import FeedForward
from gossamer.models.feedforward_search import _evaluating, _noise, call_container, find_feed_forwards
from gossamer.models.feedforward_taps import feed_forward_activations

Predict = Callable[[Tensor], Tensor]
_ROWS_SLACK = 64  # values behind the last that the kernels for rows may read
_COMPILED = (torch.float32, torch.bfloat16)


class SparseGatedFFN(nn.Module):
    """``down(act(gate x) ⊙ up x)`` for the open channels of a token, or of several tokens together.

    Song et al., 2024, arXiv 2402.13516, section 3.3. Without a predictor the result is that of the dense layer, up to
    the order of sums.

    Parameters
    ----------
    gate
        ``(m, d)``.
    up
        ``(m, d)``, or None for a layer without a gate, whose `gate` is then its only widening matrix.
    down
        ``(d, m)``.
    activation
        Of the gate; one that gives zeros.
    biases
        Of gate, up and down, each ``(m,)``, ``(m,)`` and ``(d,)`` or None.
    predictor
        Maps tokens ``(n, d)`` to ``(n, m)`` bool, True where a channel may be open. None computes the gate in full.

    Attributes
    ----------
    live
        Share of the channels that the last call computed; None if a compiled kernel did, which does not say.

    Raises
    ------
    ModelError
        If shapes do not fit.
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor | None,
        down: Tensor,
        activation: nn.Module,
        biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        predictor: Predict | None = None,
    ):
        super().__init__()
        if gate.shape != down.T.shape or (up is not None and up.shape != gate.shape):
            raise ModelError(
                f"gate {tuple(gate.shape)}, up {None if up is None else tuple(up.shape)} and down "
                f"{tuple(down.shape)} make no feed-forward layer; (m, d), (m, d) and (d, m) are needed"
            )
        self.gate, self.up = _kept(gate), None if up is None else _kept(up)
        self.down = _kept(down.T)
        self.activation = activation
        self.gate_bias, self.up_bias, self.down_bias = (None if b is None else _kept(b) for b in biases)
        self.predictor = predictor
        self.live: float | None = None
        self._kernel: tuple[int, GatedFeedforward] | None = None

    @classmethod
    def from_dense(cls, layer: nn.Module, predictor: Predict | None = None) -> SparseGatedFFN:
        """Take over the matrices of a feed-forward layer, which is found to be one by what it computes.

        Parameters
        ----------
        layer
            Such as the ``mlp`` of a Llama block; only a module that is nothing but the layer.
        predictor
            See above.

        Raises
        ------
        TargetError
            If the module is no feed-forward layer, or more than one.
        ModelError
            If it computes something else besides.
        """
        layers = find_feed_forwards(layer)
        if len(layers) != 1 or layers[0].module is not layer:
            raise TargetError(
                f"{type(layer).__name__} is not one feed-forward layer; give the module that is just that"
            )
        found = cls._taken_over(layers[0], predictor)
        noise = _noise(layers[0].down.parameter, layers[0].down.shape[0])
        with torch.no_grad(), _evaluating(layer):
            expected, exact = call_container(layer, noise), found.predictor
            found.predictor = None
            actual = found(noise)
            found.predictor = exact
        if expected is None or not torch.allclose(expected.float(), actual.float(), rtol=2e-2, atol=1e-2):
            raise ModelError(f"{type(layer).__name__} computes more than act(gate) · up and down; leave it dense")
        return found

    @classmethod
    def _taken_over(cls, layer: FeedForward, predictor: Predict | None) -> SparseGatedFFN:
        activation = feed_forward_activations(layer.module)[0].module
        parts = [(matrix, bias) for target in layer.inputs for matrix, bias in _halves(target, layer.width)]
        if len(parts) == 2 and not _feeds(layer, activation, *parts[0]):
            parts.reverse()
        (gate, gate_bias), (up, up_bias) = (parts[0], parts[1] if len(parts) == 2 else (None, None))
        down_bias = getattr(layer.down.module, "bias", None)
        biases = (gate_bias, up_bias, None if down_bias is None else down_bias.detach())
        return cls(gate, up, layer.down.matrix(), activation, biases, predictor)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, d)`` → ``(…, d)``; several tokens are computed on the channels that any of them needs."""
        tokens = x.reshape(-1, x.shape[-1])
        compiled = self._compiled(x)
        if compiled is not None:
            self.live = None
            wanted = None if self.predictor is None else self.predictor(tokens).view(*x.shape[:-1], -1)
            return compiled(x, wanted)
        if self.predictor is None:
            gate = self.activation(functional.linear(tokens, self.gate, self.gate_bias))
            live = (gate != 0).any(0).nonzero().flatten()
            gate = gate[:, live]
        else:
            predicted = self.predictor(tokens)
            live = predicted.any(0).nonzero().flatten()
            gate = self.activation(functional.linear(tokens, self.gate[live], _rows(self.gate_bias, live)))
            gate = gate * predicted[:, live]
        if self.up is not None:
            gate = gate * functional.linear(tokens, self.up[live], _rows(self.up_bias, live))
        self.live = len(live) / len(self.gate)
        out = gate @ self.down[live]
        return (out if self.down_bias is None else out + self.down_bias).view(x.shape)

    def _compiled(self, x: Tensor) -> GatedFeedforward | None:
        """The kernel on the same memory, where there is one for what is asked."""
        usual = self.up is not None and type(self.activation) in (nn.ReLU, FATReLU) and available()
        if not usual or x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype not in _COMPILED:
            return None
        if self._kernel is None or self._kernel[0] != self.gate.data_ptr():
            held = [_with_room(part) for part in (self.gate, self.up, self.down) if part is not None]
            rows = self.gate.numel() + _ROWS_SLACK
            if any(part is None for part in held) or self.gate.dtype not in _COMPILED:
                return None
            shape, kind = (self.gate.shape[0], self.gate.shape[1]), str(self.gate.dtype).removeprefix("torch.")
            cut = getattr(self.activation, "threshold", 0.0)
            self._kernel = (
                self.gate.data_ptr(),
                GatedFeedforward(
                    gate=DenseMatrix(shape, kind, held[0][:rows]),  # type: ignore[index]
                    up=DenseMatrix(shape, kind, held[1][:rows]),  # type: ignore[index]
                    down=ChannelMatrix((shape[1], shape[0]), kind, held[2]),  # type: ignore[arg-type]
                    activation="fatrelu" if cut else "relu",
                    # the kernel closes what is at most the cut, FATReLU what is below its threshold
                    cut=float(np.nextafter(np.float32(cut), np.float32(0))) if cut else 0.0,
                    gate_bias=self.gate_bias,
                    up_bias=self.up_bias,
                    down_bias=self.down_bias,
                ),
            )
        return self._kernel[1]

    def extra_repr(self) -> str:  # noqa: D102
        return f"d={self.gate.shape[1]}, m={self.gate.shape[0]}, predictor={self.predictor is not None}"


class InstalledFeedForwards:
    """Layers of a model that skip closed channels; :meth:`remove` puts the dense ones back.

    Attributes
    ----------
    layers
        By name.
    """

    def __init__(self, model: nn.Module, layers: dict[str, SparseGatedFFN]):
        self.layers = layers
        self._before: list[tuple[nn.Module, str, nn.Module]] = []
        modules = dict(model.named_modules())
        for name, layer in layers.items():
            owner, _, attribute = name.rpartition(".")
            self._before.append((modules[owner], attribute, modules[name]))
            modules[owner]._modules[attribute] = layer

    def remove(self) -> None:
        """Put the dense layers back."""
        for owner, attribute, module in self._before:
            owner._modules[attribute] = module
        self._before.clear()

    @property
    def live(self) -> dict[str, float | None]:
        """Share of the channels that each layer computed in its last call; see :class:`SparseGatedFFN`."""
        return {name: layer.live for name, layer in self.layers.items()}


def install_sparse_feed_forwards(
    model: nn.Module, predictors: dict[str, Predict] | None = None
) -> InstalledFeedForwards:
    """Let every feed-forward layer of a model skip the channels whose gate is closed.

    Parameters
    ----------
    model
        Changed in place; its activations should give zeros (:func:`gossamer.models.activation_functions.relufy`).
    predictors
        Name of a layer → what says which channels may be open; layers without one are exact.

    Raises
    ------
    TargetError
        If there is no feed-forward layer, or one is part of a module that does other things too.
    """
    found = {layer.name: layer.module for layer in find_feed_forwards(model)}
    return InstalledFeedForwards(
        model, {name: SparseGatedFFN.from_dense(m, (predictors or {}).get(name)) for name, m in found.items()}
    )


def _kept(values: Tensor) -> nn.Parameter:
    """A copy with room behind it, so that compiled kernels, which read a little further, can use it as it lies."""
    room = values.new_zeros(values.numel() + SLACK)
    room[: values.numel()] = values.detach().flatten()
    return nn.Parameter(room[: values.numel()].view(values.shape), requires_grad=False)


def _with_room(values: Tensor) -> Tensor | None:
    """All of the memory of what :func:`_kept` made, or None if it has been moved since."""
    needed = values.numel() + SLACK
    held = values.untyped_storage().nbytes() // values.element_size() - values.storage_offset()
    return values.detach().as_strided((needed,), (1,)) if held >= needed and values.is_contiguous() else None


def _rows(bias: Tensor | None, live: Tensor) -> Tensor | None:
    return None if bias is None else bias[live]


def _halves(target: Target, width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Matrix and bias of a widening layer, a fused one taken apart."""
    matrices = target.matrix().split(width)
    bias = getattr(target.module, "bias", None)
    return list(zip(matrices, [None] * len(matrices) if bias is None else bias.detach().split(width)))


@torch.no_grad()
def _feeds(layer: FeedForward, activation: nn.Module, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether what goes into the activation is what this matrix makes of the layer's input."""
    noise = _noise(layer.down.parameter, layer.down.shape[0])
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            seen.setdefault(key, args[0])

        return hook

    places = {"middle": activation, "input": layer.inputs[0].module}
    handles = [module.register_forward_pre_hook(note(key)) for key, module in places.items()]
    try:
        with _evaluating(layer.module):
            call_container(layer.module, noise)
    finally:
        for handle in handles:
            handle.remove()
    made = functional.linear(seen["input"], matrix, bias)
    return made.shape == seen["middle"].shape and bool(torch.allclose(made, seen["middle"], rtol=1e-2, atol=1e-3))
