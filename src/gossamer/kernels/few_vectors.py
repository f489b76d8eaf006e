"""Linear layers of a model's own code on a few tokens: our dense kernel in the place of torch's.

A product of a float32 matrix with sixteen vectors takes little longer than with one while the matrix comes from memory,
but the libraries behind torch pack it first, as if for hundreds of vectors. Inside of :class:`FewVectors` layers whose
weights lie in memory as the kernel wants them are multiplied where they are; all else goes to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gossamer.kernels.native import VALUE_CODES, available, native

LEAST, MOST = 4, 32  # vectors for which it pays
_STEP = 16  # columns that the kernel reads at a time; where they do not divide a row it would read behind the last


class FewVectors(TorchFunctionMode):
    """Linear layers of float32 on the CPU are multiplied with 4 to 32 vectors by the compiled kernel.

    For calls without gradients; without compiled kernels, and for all other layers, nothing changes. Results are those
    of torch up to the order in which products are added.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and _fits(*args):
            return _multiply(*args)
        return func(*args, **(kwargs or {}))


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    operands = (inputs, weight) if bias is None else (inputs, weight, bias)
    return (
        weight.ndim == 2
        and LEAST <= inputs.shape[:-1].numel() <= MOST
        and weight.shape[1] % _STEP == 0 < weight.shape[1] == inputs.shape[-1]
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in operands)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in operands)
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and available()
    )


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    outputs = torch.empty(len(rows), len(weight))
    code = VALUE_CODES[torch.float32]
    native().dense_linear(
        *weight.shape,
        weight.data_ptr(),
        code,
        0,
        0,
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        code,
        0 if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        code,
        torch.get_num_threads(),
    )
    return outputs.view(*inputs.shape[:-1], len(weight))
