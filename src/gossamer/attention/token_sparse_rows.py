"""Kept tokens of a layer, read and written where they lie among the others.

A layer gets a stand-in for the rows of its kept tokens. The norm in front of its products reads the rows in their
places; the last product of a branch waits, and when it is added to the residual, it is added to these very rows as it
is stored. So nothing is gathered into a copy or put back from one. A model's code runs as it is: stand-ins behave like
tensors, and whoever asks for more than their shape gets a tensor.

What a layer adds to is a copy of the whole that it makes once; its input is left alone. The backward pass makes one
such copy too, into which the gradients of rows are added. For it a norm keeps its result, which adapters keep anyway,
and not its input. See :mod:`gossamer.kernels.row_products` for the products, and for where they are worth it.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.token_sparse_gradients import AddProduct, AddRows, Leave, RowNorm, RowProduct, matrix_of
from gossamer.core.segments import replaced_forward
from gossamer.errors import ModelError
from gossamer.kernels.row_products_native import compiled, norm_rows

_BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class _StandIn(ABC):
    """What becomes a tensor as soon as its numbers are needed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def tensor(self) -> Tensor:
        """The numbers."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, places: Any) -> Tensor:
        return self.tensor()[places]

    def __neg__(self) -> Tensor:
        return -self.tensor()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor; itself, where nothing would change."""
        same = not kwargs and all(part in (self.dtype, self.device) for part in args)
        return self if same else self.tensor().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is functional.linear
            and isinstance(args[0], KeptRows)
            and not kwargs
            and args[0].dtype == args[1].dtype
        ):
            return args[0].product(*args[1:])
        if func in _SUMS and len(args) == 2 and not kwargs:
            return args[0] + args[1] if isinstance(args[0], _StandIn) else args[1] + args[0]
        return func(*_numbers(args), **_numbers(kwargs or {}))


def _numbers(value: Any) -> Any:
    """Arguments in which stand-ins have become tensors."""
    if isinstance(value, _StandIn):
        return value.tensor()
    if isinstance(value, dict):
        return {name: _numbers(part) for name, part in value.items()}
    return type(value)(map(_numbers, value)) if type(value) in (list, tuple) else value


def _binary(name: str, swapped: bool) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, name)

    def run(self: _StandIn, other: Any) -> Any:
        mine, theirs = self.tensor(), _numbers(other)
        return apply(theirs, mine) if swapped else apply(mine, theirs)

    return run


for _name in _BINARY:
    setattr(_StandIn, f"__{_name}__", _binary(_name, False))
    setattr(_StandIn, f"__r{_name}__", _binary(_name, True))


class KeptRows(_StandIn):
    """Rows of a larger matrix.

    Parameters
    ----------
    whole
        ``(batch, tokens, width)``.
    flat
        Which rows of ``(batch · tokens, width)``, ascending, as many for every item of the batch.
    private
        Whether the whole is a copy of the layer's own, to which it may add.
    """

    def __init__(self, whole: Tensor, flat: Tensor, private: bool = False):
        self._whole: Tensor | None = whole
        self.flat, self.private = flat, private
        self.shape = torch.Size((len(whole), len(flat) // len(whole), whole.shape[-1]))
        self.dtype, self.device = whole.dtype, whole.device

    @property
    def whole(self) -> Tensor:
        """All rows.

        Raises
        ------
        ModelError
            If something has been added to them since, so that these rows are gone.
        """
        if self._whole is None:
            raise ModelError(
                "the layer reads hidden states to which it has added before; apply token sparsity with "
                "permutation_free=False"
            )
        return self._whole

    def tensor(self) -> Tensor:  # noqa: D102
        return self.whole.reshape(-1, self.shape[-1]).index_select(0, self.flat).view(self.shape)

    def norm(self, gain: Tensor, eps: float) -> Tensor:
        """Their root-mean-square norm."""
        rows, self._whole = RowNorm.apply(self.whole, self.flat, gain, eps)
        return rows.view(self.shape)

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Their product with weights, ``(batch, kept, outputs)``."""
        rows, self._whole = RowProduct.apply(self.whole, self.flat, weight, bias)
        return rows.view(*self.shape[:2], len(weight))

    def plus(self, other: Any) -> KeptRows:
        """With something added, which may be a product that waits."""
        whole, private = self.whole, self.private
        if private:
            self._whole = None
        if isinstance(other, WaitingProduct) and other.waits:
            product = AddProduct.apply(whole, self.flat, other.x, other.weight, other.bias, private)
            found = KeptRows(product, self.flat, True)
            return found if other.rest is None else found.plus(other.rest)
        other = _numbers(other)
        return KeptRows(AddRows.apply(whole, self.flat, other, private), self.flat, True)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, WaitingProduct | Tensor) and other.dtype == self.dtype and other.shape == self.shape:
            return self.plus(other)
        return self.tensor() + _numbers(other)

    __radd__ = __add__


class WaitingProduct(_StandIn):
    """A product ``x @ weight.T + bias + rest`` that is formed when it is known what it is added to."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Tensor | None = None):
        self.x, self.weight, self.bias, self.rest = x, weight, bias, rest
        self.shape = torch.Size((*x.shape[:-1], len(weight)))
        self.dtype, self.device = x.dtype, x.device
        self._found: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether nobody has needed it as a tensor yet."""
        return self._found is None

    def tensor(self) -> Tensor:  # noqa: D102
        if self._found is None:
            found = functional.linear(self.x, self.weight, self.bias)
            self._found = found if self.rest is None else found + self.rest
        return self._found

    def __add__(self, other: Any) -> Any:
        if isinstance(other, KeptRows):
            return other + self
        # what an adapter adds waits with it
        if isinstance(other, Tensor) and self.waits and other.dtype == self.dtype and other.shape == self.shape:
            return WaitingProduct(self.x, self.weight, self.bias, other if self.rest is None else self.rest + other)
        return self.tensor() + _numbers(other)

    __radd__ = __add__


def put_back(output: Tensor | KeptRows, hidden: Tensor, flat: Tensor) -> Tensor:
    """All tokens behind a layer: what it returned for some of them, and the others as they were.

    Parameters
    ----------
    output
        Of the layer, for rows that it was given as :class:`KeptRows`.
    hidden
        What it was given them of, ``(batch, tokens, width)``.
    flat
        Which rows.
    """
    if isinstance(output, KeptRows):
        return Leave.apply(output.whole)
    rows = matrix_of(_numbers(output)).to(hidden.dtype)
    return Leave.apply(matrix_of(hidden).index_copy(0, flat, rows).view(hidden.shape))


# ---------------------------------------------------------------------------------------------------- layers


class PermutationFree:
    """Layers that take stand-ins for rows, until :meth:`remove`.

    Parameters
    ----------
    layers
        Of a decoder. Those that have no root-mean-square norm of their width are left alone.
    """

    def __init__(self, layers: list[nn.Module]):
        self._active: set[int] = set()
        self._stack = ExitStack()
        self._ready: set[int] = set()
        for number, layer in enumerate(layers):
            norms = {module: eps for module in layer.children() if (eps := norm_epsilon(module)) is not None}
            if not norms:
                continue
            self._ready.add(number)
            width = len(next(iter(norms)).weight)  # type: ignore[arg-type]
            for norm, eps in norms.items():
                self._stack.enter_context(replaced_forward(norm, _normalised(norm, eps)))
            for module in layer.modules():
                if type(module) is nn.Linear and module.out_features == width:
                    self._stack.enter_context(replaced_forward(module, self._waiting(number, module)))

    def takes(self, number: int, layer: nn.Module, hidden: Tensor) -> bool:
        """Whether a layer can be given a stand-in now."""
        recomputed = getattr(layer, "gradient_checkpointing", False) and layer.training
        return number in self._ready and not recomputed and not torch.is_autocast_enabled(hidden.device.type)

    def begin(self, number: int) -> None:
        """Let products of a layer wait."""
        self._active.add(number)

    def end(self, number: int) -> bool:
        """Let them be formed at once again; whether they waited."""
        waited = number in self._active
        self._active.discard(number)
        return waited

    def remove(self) -> None:
        """Give the modules their own forward back; a second call does nothing."""
        self._stack.close()

    def _waiting(self, number: int, module: nn.Linear) -> Callable[..., Any]:
        forward = module.forward

        def run(x: Any) -> Any:
            x = _numbers(x)
            hooked = module._forward_hooks or module._backward_hooks
            if number in self._active and not hooked and x.dtype == module.weight.dtype:
                return WaitingProduct(x, module.weight, module.bias)
            return forward(x)

        return run


def _normalised(norm: nn.Module, eps: float) -> Callable[..., Any]:
    forward = norm.forward

    def run(x: Any) -> Any:
        if isinstance(x, KeptRows) and x.dtype == norm.weight.dtype:
            return x.norm(norm.weight, eps)  # type: ignore[arg-type]
        return forward(_numbers(x))

    return run


@torch.no_grad()
def norm_epsilon(module: nn.Module) -> float | None:
    """The ε of a module that computes ``weight · x / √(mean x² + ε)``, or None if it computes anything else.

    It is told by what it does with a few numbers, not by its name: some norms of that name add 1 to their weights.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if (
        not isinstance(eps, float)
        or not isinstance(weight, Tensor)
        or weight.ndim != 1
        or not weight.is_floating_point()
    ):
        return None
    if sum(1 for _ in module.parameters()) != 1 or weight.device.type == "meta":
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    found, wanted = module(x), norm_rows(x[0], None, weight, eps, False)[0]
    tolerance = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return eps if torch.allclose(found[0].float(), wanted.float(), rtol=tolerance, atol=tolerance) else None


def worth_it(hidden: Tensor) -> bool:
    """Whether rows are better read and written where they lie than copied.

    In float32 on a CPU a step of LoRA stores 6% less, and copies take 0.99 to 1.1 times its time (two cores with
    AVX-512, 1,024 of 2,048 tokens, 576 channels): a norm that is one kernel takes less than half of the time, products
    that scatter about what torch's take with their copies, and those that gather a tenth more. In bfloat16 torch
    multiplies by matrix registers, and copies are faster; on GPUs nothing has been measured.
    """
    return hidden.dtype == torch.float32 and compiled(hidden)
