"""Floating-point operations of one forward pass: those a dense model makes, and those its non-zeros need.

One multiplication with its addition counts as two operations; biases, norms and activation functions are
left out, as everywhere in the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.errors import ConfigurationError, TargetError
from gossamer.measure.windows import evaluation_mode

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one layer in one forward pass.

    Attributes
    ----------
    name
        Module name.
    dense
        Operations with every weight.
    effective
        Operations with the non-zero weights only: what an ideal sparse kernel would do.
    calls
        How often the layer ran.
    """

    name: str
    dense: int
    effective: int
    calls: int


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model in one forward pass.

    Attributes
    ----------
    layers
        Linear and convolutional layers, in the order of the model; layers that did not run are absent.
    other
        Matrix products outside of them: attention, batched experts. They count as dense, and attention
        counts the full square, masked or not.
    """

    layers: tuple[LayerFlops, ...]
    other: int

    @property
    def dense(self) -> int:
        """All operations of the dense model."""
        return sum(layer.dense for layer in self.layers) + self.other

    @property
    def effective(self) -> int:
        """All operations that remain when zero weights cost nothing."""
        return sum(layer.effective for layer in self.layers) + self.other


def count_flops(model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> ModelFlops:
    """Count the floating-point operations of one forward pass, dense and effective.

    Parameters
    ----------
    model
        Any module. It runs once, in evaluation mode and without gradients.
    example_inputs
        What it is called with: a tensor, positional arguments, or keyword arguments. Its shape decides: for
        the cost of one decoded token give one token.

    Returns
    -------
    ModelFlops

    Raises
    ------
    TargetError
        If no layer and no matrix product ran.
    ConfigurationError
        If `example_inputs` is none of the above.
    """
    layers = {module: name for name, module in model.named_modules() if _is_counted(module)}
    dense: dict[nn.Module, int] = dict.fromkeys(layers, 0)
    uses: dict[nn.Module, int] = dict.fromkeys(layers, 0)
    calls: dict[nn.Module, int] = dict.fromkeys(layers, 0)

    def count(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        positions = _positions(module, inputs[0], output)
        uses[module] += positions
        dense[module] += 2 * positions * module.weight.numel()
        calls[module] += 1

    hooks = [module.register_forward_hook(count) for module in layers]
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        with evaluation_mode(model), counter:
            _call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = tuple(
        LayerFlops(name, dense[module], 2 * uses[module] * int(torch.count_nonzero(module.weight)), calls[module])
        for module, name in layers.items()
        if calls[module]
    )
    total = counter.get_total_flops()
    if not total and not rows:
        raise TargetError("no linear or convolutional layer and no matrix product ran; nothing to count")
    return ModelFlops(rows, other=max(0, total - sum(row.dense for row in rows)))


def _call(model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> None:
    if isinstance(inputs, Tensor):
        model(inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, list | tuple):
        model(*inputs)
    else:
        raise ConfigurationError(
            f"example_inputs is a {type(inputs).__name__}; give a tensor, a tuple of arguments or a dict of them"
        )


def _is_counted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Convolution | TransposedConvolution) or _is_transformers_conv1d(module)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name, so that measuring a plain torch model does not import transformers.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _positions(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Return how often each weight element is used: the rows of a matrix product, the places of a kernel."""
    if isinstance(module, Convolution):
        return output.numel() // module.out_channels
    if isinstance(module, TransposedConvolution):
        return inputs.numel() // module.in_channels
    return math.prod(output.shape[:-1])


def _formulas() -> dict[Any, Any]:
    """Operations that torch's counter does not know, or refuses for grouped queries."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    formulas: dict[Any, Any] = {getattr(aten, name): _attention for name in names if hasattr(aten, name)}
    if hasattr(aten, "_grouped_mm"):
        formulas[aten._grouped_mm] = _grouped_product
    return formulas


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Count Q @ K^T and P @ V for (batch, heads, length, width), with the heads of the queries."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _grouped_product(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a product in which every row of `left` (rows, k) meets one matrix of `right` (experts, k, n)."""
    return 2 * math.prod(left) * right[-1]
