"""Loading a checkpoint in gossamer's packed format, also one whose layers were made smaller."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.models.activation_functions import restore_activations
from gossamer.models.architecture import model_class, read_config, unfilled_model
from gossamer.storage.index import Index, read_index
from gossamer.storage.layers import restore_packed_layers, validate_packed_layers
from gossamer.storage.models import ACTIVATIONS, load_state
from gossamer.storage.packing import DTYPES


def load_packed(directory: Path, dtype: torch.dtype | None, device: torch.device, offload: str | None) -> nn.Module:
    """Build the model that config.json describes, give its layers the stored sizes, and fill them.

    Parameters
    ----------
    directory
        With config.json and gossamer.json.
    dtype
        Of all floating-point weights. Default: each as stored.
    device
        Where the model computes.
    offload
        ``"cpu"`` leaves the weights in main memory; ``"disk"`` is refused, since packed weights must be unpacked.

    Raises
    ------
    CheckpointError
        If a file is broken, or a tensor does not fit.
    ConfigurationError
        If `offload` is ``"disk"``.
    """
    if offload == "disk":
        raise ConfigurationError(
            f"{directory} is packed and cannot be read in place with offload='disk'; "
            "use gossamer.storage.export_dense first, or offload='cpu'"
        )
    config, index = read_config(directory), read_index(directory)
    model = unfilled_model(config, model_class(config, directory), dtype)
    restore_activations(model, index.settings.get(ACTIVATIONS, {}))
    fit_linear_layers(model, index)
    restore_packed_layers(model, directory)
    if dtype is None:
        _take_dtypes(model, index)
    load_state(model, directory)
    validate_packed_layers(model)
    if offload == "cpu" and device.type != "cpu":
        from accelerate import cpu_offload

        return cpu_offload(model, device)
    return model.to(device)


def fit_linear_layers(model: nn.Module, index: Index) -> None:
    """Resize each ``nn.Linear`` whose stored weight has another shape; weights then hold no values yet.

    This is all that structured pruning of feed-forward channels changes. Any other difference in shape stays and
    is found when the model is filled.
    """
    for name, layer in model.named_modules():
        key = f"{name}.weight"
        if not isinstance(layer, nn.Linear) or key not in index.names:
            continue
        shape = index.tensors[index.resolve(key)].shape
        if len(shape) != 2 or shape == tuple(layer.weight.shape):
            continue
        layer.out_features, layer.in_features = shape
        layer.weight = _resized(layer.weight, shape)
        if layer.bias is not None:
            layer.bias = _resized(layer.bias, shape[:1])


def _resized(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.data.new_empty(shape), requires_grad=parameter.requires_grad)


def _take_dtypes(model: nn.Module, index: Index) -> None:
    """Give every tensor the dtype in which it is stored; some models mix them on purpose."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        entry = index.tensors.get(index.resolve(name))
        if entry is not None and tensor.dtype != DTYPES[entry.dtype]:
            tensor.data = tensor.data.to(DTYPES[entry.dtype])
