"""A feed-forward layer cut down to some of its channels for a while: small dense matrices, the model's own code.

The rows of the widening matrices and the columns of the one that maps back are copied once; taking them in and putting
the whole matrices back is then a swap of references, so that a model can change between both from call to call.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.feedforward import _WIDTH_NAMES, FeedForward
from gossamer.models.offload import _offloading_hooks, onloaded


class SlicedFeedForward:
    """A layer's matrices with the chosen channels only, to be swapped in and out; made by :func:`slice_gated_ffn`.

    Attributes
    ----------
    layer
        The layer as it is when nothing is swapped in.
    index
        The channels, ``(n,)`` int64, ascending.
    """

    def __init__(self, layer: FeedForward, index: Tensor, device: torch.device | None = None):
        self.layer, self.index, self._device = layer, index, device
        self._own: list[tuple[nn.Module, dict[str, nn.Parameter], dict[str, int]]] = []
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._silenced: list[Any] = []
        with onloaded(layer.module), torch.no_grad():
            for target in layer.inputs:
                self._cut(target, 0, torch.cat([index + i for i in range(0, target.shape[0], layer.width)]))
            self._cut(layer.down, 1, index)
        widths = {n: len(index) for n in _WIDTH_NAMES if vars(layer.module).get(n) == layer.width}
        self._own.append((layer.module, {}, widths))

    @property
    def active(self) -> bool:
        """Whether the cut matrices are in the model now."""
        return bool(self._before)

    def apply(self) -> None:
        """Let the model compute with the chosen channels.

        Raises
        ------
        ModelError
            If another cut of the same layer is in the model.
        """
        if self.active:
            return
        if getattr(self.layer.down.module, "_sliced", None) is not None:
            raise ModelError(f"{self.layer.name} is cut down already; call the restore() of the other cut first")
        # a matrix that accelerate streams in for each call stays where it is while the cut one is at work
        self._silenced = [hook for _, hook in _offloading_hooks(self.layer.module)]
        for hook in self._silenced:
            hook.offload = False
        for module, parameters, sizes in self._own:
            stored = module._parameters
            kept = {name: vars(module)[name] for name in sizes}
            self._before.append((module, {name: stored[name] for name in parameters}, kept))
            stored.update(parameters)
            vars(module).update(sizes)
        vars(self.layer.down.module)["_sliced"] = self

    def restore(self) -> None:
        """Put the whole matrices back; a second call does nothing."""
        if not self.active:
            return
        for module, parameters, sizes in self._before:
            module._parameters.update(parameters)
            vars(module).update(sizes)
        for hook in self._silenced:
            hook.offload = True
        self._before.clear()
        del vars(self.layer.down.module)["_sliced"]

    def __enter__(self) -> SlicedFeedForward:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _cut(self, target: Target, dim: int, index: Tensor) -> None:
        """Copy what `index` names along a dimension of the matrix, and of the bias if that runs along it."""
        module: Any = target.module
        stored = 1 - dim if target.transposed else dim
        own = {target.attribute: self._selected(target.parameter, stored, index)}
        if dim == 0 and getattr(module, "bias", None) is not None:
            own["bias"] = self._selected(module.bias, 0, index)
        names = ("out_features", "nf") if dim == 0 else ("in_features", "nx")
        self._own.append((module, own, {n: len(index) for n in names if n in vars(module)}))

    def _selected(self, parameter: Tensor, dim: int, index: Tensor) -> nn.Parameter:
        values = parameter.detach().index_select(dim, index.to(parameter.device))
        return nn.Parameter(values.to(self._device or values.device).contiguous(), requires_grad=False)


def slice_gated_ffn(layer: FeedForward, index: Tensor, device: torch.device | None = None) -> SlicedFeedForward:
    """Cut a feed-forward layer down to some of its channels; the model is not changed until ``apply()``.

    The result computes ``down[:, index] (act(gate[index] x) ⊙ up[index] x)``, with the biases that there are, in the
    model's own code; layers without a gate, with gate and up in one matrix, and with transposed weights work as well.

    Parameters
    ----------
    layer
        From :func:`gossamer.models.feedforward_search.find_feed_forwards`.
    index
        Channels to compute with, ``(n,)`` integers from 0 to the width of the layer, each once, in any order.
    device
        Where the cut matrices go; by default where the whole ones are.

    Returns
    -------
    SlicedFeedForward
        With ``apply()`` and ``restore()``; also a context manager.

    Raises
    ------
    ConfigurationError
        If there is no channel, one comes twice, or one is outside of the layer.
    """
    chosen = index.detach().long().flatten().sort().values
    if not len(chosen) or int(chosen[0]) < 0 or int(chosen[-1]) >= layer.width or len(chosen.unique()) < len(chosen):
        raise ConfigurationError(
            f"{layer.name}: {len(chosen)} channels were chosen, from {chosen[:1].tolist()} to {chosen[-1:].tolist()}; "
            f"give at least one, each once, from 0 to {layer.width - 1}"
        )
    return SlicedFeedForward(layer, chosen, device)
