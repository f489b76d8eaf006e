"""Store only the non-zeros of a layer while it trains, but only where that was measured to be faster.

A layer is worth it from a density on that depends on its shape, on the number of positions of a step, and on the
machine. So a training step of the layer, forward and both gradients, is timed in both forms and the faster one stays.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import ConfigurationError, TargetError
from gossamer.measure import interleave
from gossamer.runtime.choice import Case, Choices, Storage
from gossamer.training.sparse_layers import SparseLayer, SparseLinear, SparsePointwise, is_pointwise

DENSE = Storage("trained dense", "float32")
NONZEROS = Storage("trained as non-zeros", "float32")
_REPEATS = 5


@dataclass(frozen=True)
class TrainedLayer:
    """What became of one layer.

    Attributes
    ----------
    name
        Of the module.
    shape
        ``(out, in)``.
    density
        Share of the weights that the mask keeps.
    positions
        For which it was measured.
    sparse
        Whether only its non-zeros are stored now.
    dense_seconds, sparse_seconds
        Of forward and both gradients, as measured; None where nothing was, see `reason`.
    reason
        Why a layer was not measured, or empty.
    """

    name: str
    shape: tuple[int, int]
    density: float
    positions: int
    sparse: bool
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    reason: str = ""


def sparsify_layers(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    positions: int | Mapping[str, int],
    choices: Choices | None = None,
) -> list[TrainedLayer]:
    """Swap linear layers and pointwise convolutions for layers that store no zeros, where those train faster.

    Make the optimiser afterwards: a layer that is swapped has new parameters. Weights that a mask removes become zero
    in every layer, swapped or not, so that the function of the model does not depend on what was faster. If a method
    will be attached, take the masks with which it starts (:func:`first_masks`): what grows starts at zero.

    Parameters
    ----------
    model
        Changed in place.
    masks
        Name of a weight → bool of its shape, such as a :class:`gossamer.core.masks.MaskSet`.
    positions
        How many vectors a layer sees in a step: tokens, or pixels of all images; for all layers, or by module name.
    choices
        Where measured times are kept; by default a file for each machine.

    Returns
    -------
    list of TrainedLayer
        One for each mask.

    Raises
    ------
    TargetError
        If a name is not in the model; nothing is changed then.
    ConfigurationError
        If a mask does not fit its weight or `positions` is not positive; nothing is changed then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise TargetError(f"the model has no parameter {name!r}: these masks belong to another model")
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            raise ConfigurationError(
                f"the mask of {name!r} is {tuple(mask.shape)} {mask.dtype}; its weight {tuple(parameters[name].shape)} "
                f"takes a bool of that shape"
            )
    known = Choices(measure=measure_training) if choices is None else choices
    counts = {name: _positions_of(name.rpartition(".")[0], positions) for name in masks}
    return [_choose(model, name, mask, counts[name], known) for name, mask in masks.items()]


def first_masks(method: Sparsifier, model: nn.Module) -> MaskSet:
    """Masks with which a method will start on a model, which is not changed; a copy of it is made for a moment."""
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method says it again when it is attached
        return method.attach(twin, torch.optim.SGD(twin.parameters(), lr=0.0)).masks


def _positions_of(module_name: str, positions: int | Mapping[str, int]) -> int:
    found = positions if isinstance(positions, int) else positions.get(module_name, 0)
    if found < 1:
        raise ConfigurationError(f"positions of {module_name!r} are {found}; give how many vectors it sees in a step")
    return found


def _choose(model: nn.Module, name: str, mask: Tensor, positions: int, choices: Choices) -> TrainedLayer:
    module_name, _, attribute = name.rpartition(".")
    module, weight = model.get_submodule(module_name), model.get_parameter(name)
    with torch.no_grad():
        weight.masked_fill_(~mask.to(weight.device), 0)
    shape, density = (weight.shape[0], weight[0].numel() if len(weight) else 0), float(mask.float().mean())
    reason = _why_not(model, module_name, attribute)
    if reason:
        return TrainedLayer(module_name, shape, density, positions, False, reason=reason)
    seconds = choices.seconds(Case(*shape, density, torch.float32, positions), (DENSE, NONZEROS))
    faster = seconds[NONZEROS] < seconds[DENSE]
    if faster:
        parent, _, last = module_name.rpartition(".")
        setattr(model.get_submodule(parent), last, _stored(module, mask))
    return TrainedLayer(module_name, shape, density, positions, faster, seconds[DENSE], seconds[NONZEROS])


def _stored(module: nn.Module, mask: Tensor) -> SparseLayer:
    if isinstance(module, nn.Linear):
        return SparseLinear.from_dense(module, mask)
    assert isinstance(module, nn.Conv2d)
    return SparsePointwise.from_dense(module, mask)


def _why_not(model: nn.Module, module_name: str, attribute: str) -> str:
    """Why a layer has to stay dense whatever is faster, or an empty text."""
    module = model.get_submodule(module_name)
    if not module_name or attribute != "weight":
        return "it is not the weight of a layer within the model"
    if type(module) is not nn.Linear and not (type(module) is nn.Conv2d and is_pointwise(module)):
        return f"{type(module).__name__} has no form without zeros, only Linear and pointwise Conv2d have"
    weight = module.weight
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is weight]
    if len(names) > 1:
        return f"its weight is also {next(name for name in names if name != f'{module_name}.weight')}"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"it is {weight.dtype} on {weight.device}; kernels are for float32 on the CPU"
    return ""


def measure_training(case: Case, storages: Sequence[Storage], repeats: int = _REPEATS) -> dict[Storage, float]:
    """Time forward and both gradients of a linear layer with random weights.

    Parameters
    ----------
    case
        Shape, density and number of positions.
    storages
        :data:`DENSE` and :data:`NONZEROS`; they take turns.
    repeats
        Rounds.

    Returns
    -------
    dict
        Storage → median seconds of a step.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.columns, generator=generator)
    gradient = torch.randn(case.batch, case.rows, generator=generator)
    mask = torch.rand(case.rows, case.columns, generator=generator) < case.density
    dense = nn.utils.skip_init(nn.Linear, case.columns, case.rows)  # without a draw from the generator of the user
    nn.init.normal_(dense.weight, std=0.02, generator=generator)
    nn.init.zeros_(dense.bias)
    layers: dict[Storage, nn.Module] = {DENSE: dense, NONZEROS: SparseLinear.from_dense(dense, mask)}
    steps = {str(storage): _step(layers[storage], x, gradient) for storage in storages}
    timings = interleave(steps, repeats=repeats)
    return {storage: timings[str(storage)].median for storage in storages}


def _step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    inputs = x.clone().requires_grad_(True)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        inputs.grad = None
        layer(inputs).backward(gradient)

    return step


def stored_sparsely(model: nn.Module) -> dict[str, SparseLayer]:
    """Name → layer, of the layers that store no zeros."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
