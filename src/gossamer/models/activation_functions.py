"""Activation functions that give zeros, and their exchange in any model whose activations are modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2CLS

from gossamer.errors import CheckpointError, ConfigurationError, TargetError, UnknownNameError
from gossamer.models.feedforward_taps import Activation, feed_forward_activations

_CONFIG_NAMES = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "feed_forward_proj")


class FATReLU(nn.Module):
    """ReLU with a shifted threshold: x where x ≥ t, else 0.

    Kurtz et al., 2020, "Inducing and Exploiting Activation Sparsity for Fast Inference on Deep Neural Networks";
    as a last step of ProSparse, Song et al., 2024, arXiv 2402.13516, section 3.2. The function jumps at t; its gradient
    is that of x above, and 0 below.

    Parameters
    ----------
    threshold
        t, at least 0; at 0 it is ReLU.

    Raises
    ------
    ConfigurationError
        If the threshold is negative.
    """

    def __init__(self, threshold: float = 0.01):
        super().__init__()
        if not threshold >= 0:
            raise ConfigurationError(f"threshold is {threshold}; it must be at least 0, such as 0.01")
        self.threshold = float(threshold)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.masked_fill(x < self.threshold, 0)

    def stand_in(self) -> nn.Module:
        """What takes its place while feed-forward layers are searched for."""
        return nn.ReLU()

    def stored_as(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"kind": "fatrelu", "threshold": self.threshold}

    def extra_repr(self) -> str:  # noqa: D102
        return f"threshold={self.threshold:g}"


class ShiftedReLU(nn.Module):
    """``max(x − b, 0)`` [Mirzadeh et al., 2023, "ReLU Strikes Back", arXiv 2310.04564].

    Parameters
    ----------
    shift
        b.
    """

    def __init__(self, shift: float = 1.0):
        super().__init__()
        self.shift = float(shift)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return functional.relu(x - self.shift)

    def stand_in(self) -> nn.Module:
        """What takes its place while feed-forward layers are searched for."""
        return nn.ReLU()

    def stored_as(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"kind": "shifted-relu", "shift": self.shift}

    def extra_repr(self) -> str:  # noqa: D102
        return f"shift={self.shift:g}"


class TopKActivation(nn.Module):
    """An activation of which only the k largest of every token are kept; gradients flow through those.

    Li et al., 2022, "The Lazy Neuron Phenomenon", arXiv 2210.06313, section 4. What the activation makes negative is
    never kept, so that a token with fewer than k positive entries has fewer than k.

    Parameters
    ----------
    k
        How many are kept; at or above the width it changes nothing but negatives.
    ratio
        Share of the width that is kept instead, in (0, 1], rounded up.
    activation
        What is applied first.

    Raises
    ------
    ConfigurationError
        If neither or both of k and ratio are given, or one is out of range.
    """

    def __init__(self, k: int | None = None, ratio: float | None = None, activation: nn.Module | None = None):
        super().__init__()
        if (k is None) == (ratio is None):
            raise ConfigurationError(f"k is {k} and ratio {ratio}; give one of them, such as k=128")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ConfigurationError(f"k is {k!r}; it must be a whole number of at least 1, such as 128")
        if ratio is not None and not 0 < ratio <= 1:
            raise ConfigurationError(f"ratio is {ratio}; it must lie in (0, 1], such as 0.05")
        self.k, self.ratio = k, ratio
        self.activation = nn.ReLU() if activation is None else activation

    def kept(self, width: int) -> int:
        """How many entries of a token of that width can remain."""
        return min(width, self.k if self.k is not None else -int(-width * float(self.ratio or 1) // 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        values = self.activation(x)
        k = self.kept(x.shape[-1])
        if k < x.shape[-1]:
            # ties beyond the k-th go by index, so that never more than k remain
            places = values.detach().topk(k, dim=-1).indices
            values = values * torch.zeros_like(values).scatter_(-1, places, 1)
        return values.clamp_min(0)

    def stand_in(self) -> nn.Module:
        """What takes its place while feed-forward layers are searched for."""
        return self.activation

    def stored_as(self) -> dict[str, Any]:
        """What a checkpoint says of it; what it wraps is ReLU, or what the model comes with."""
        return {"kind": "top-k", "k": self.k, "ratio": self.ratio, "relu": type(self.activation) is nn.ReLU}

    def extra_repr(self) -> str:  # noqa: D102
        return f"k={self.k}" if self.k is not None else f"ratio={self.ratio:g}"


class Swap:
    """What :func:`swap_activations` has exchanged; :meth:`undo` puts it back.

    Attributes
    ----------
    names
        Of the activations that were replaced.
    """

    def __init__(self, model: nn.Module, places: list[Activation], modules: list[nn.Module]):
        self._places, self._before = places, [place.module for place in places]
        self._config: list[tuple[Any, str, Any]] = []
        self._model = model
        for place, module in zip(places, modules, strict=True):
            module.train(place.module.training)
            place.owner._modules[place.attribute] = module

    @classmethod
    def wrapping(cls, model: nn.Module, around: Callable[[nn.Module], nn.Module]) -> Swap:
        """Replace every activation by something made of it.

        Raises
        ------
        TargetError
            If an activation is no module.
        """
        places = feed_forward_activations(model)
        return cls(model, places, [around(place.module) for place in places])

    @property
    def names(self) -> list[str]:  # noqa: D102
        return [place.name for place in self._places]

    def note_in_config(self, name: str, exact: bool = True) -> None:
        """Let the configuration of a Hugging Face model say so, that it may be saved and loaded again.

        Where it knows only something near (not `exact`), a warning says what is lost with ``save_pretrained``.
        :func:`gossamer.storage.save` stores the activations themselves.
        """
        config = getattr(self._model, "config", None)
        if config is not None and not exact:
            kinds = ", ".join(sorted({repr(place.module) for place in self._places}))
            warnings.warn(
                f"configurations of Hugging Face do not know {kinds}: save_pretrained writes {name!r}, the nearest; "
                f"save with gossamer.storage.save, which keeps it",
                stacklevel=3,
            )
        for attribute in _CONFIG_NAMES:
            if config is not None and isinstance(getattr(config, attribute, None), str):
                self._config.append((config, attribute, getattr(config, attribute)))
                setattr(config, attribute, name)

    def undo(self) -> None:
        """Put the activations back that were there before."""
        for place, module in zip(self._places, self._before, strict=True):
            module.train(place.module.training)
            place.owner._modules[place.attribute] = module
        for config, attribute, value in self._config:
            setattr(config, attribute, value)
        self._config.clear()


def swap_activations(
    model: nn.Module, old: str | type[nn.Module] | tuple[type[nn.Module], ...] | None, new: Callable[[], nn.Module]
) -> Swap:
    """Replace the activation functions of the feed-forward layers of a model.

    Parameters
    ----------
    model
        Changed in place.
    old
        Which: a class, or a name as configurations of Hugging Face have it, such as ``"silu"``; None for any.
    new
        Makes a new one; called once for each layer.

    Raises
    ------
    TargetError
        If there is none of that kind, or an activation is no module.
    UnknownNameError
        If a name is unknown.

    Examples
    --------
    >>> network = nn.ModuleDict({"layer": nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))})
    >>> swap = swap_activations(network["layer"], nn.SiLU, nn.ReLU)
    >>> network["layer"][1]
    ReLU()
    >>> swap.undo()
    >>> network["layer"][1]
    SiLU()
    """
    found = feed_forward_activations(model)
    chosen = [place for place in found if old is None or isinstance(place.module, _classes(old))]
    if not chosen:
        there = ", ".join(sorted({type(place.module).__name__ for place in found}))
        raise TargetError(f"no feed-forward layer has the activation {old!r}; there are: {there}")
    return Swap(model, chosen, [new() for _ in chosen])


def relufy(model: nn.Module, activation: str = "relu", threshold: float = 0.01, shift: float = 1.0) -> Swap:
    """Give the feed-forward layers of a model an activation that makes zeros; it has to be trained on afterwards.

    Parameters
    ----------
    model
        Changed in place.
    activation
        ``relu``, ``fatrelu`` or ``shifted-relu``.
    threshold
        t of :class:`FATReLU`.
    shift
        b of :class:`ShiftedReLU`.

    Raises
    ------
    UnknownNameError
        If there is no such activation.
    TargetError
        As in :func:`swap_activations`.
    """
    known: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "fatrelu": lambda: FATReLU(threshold),
        "shifted-relu": lambda: ShiftedReLU(shift),
    }
    if activation not in known:
        raise UnknownNameError("activation", activation, known)
    swap = swap_activations(model, None, known[activation])
    swap.note_in_config("relu", exact=activation == "relu")
    return swap


def restore_activations(model: nn.Module, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Put activations where a checkpoint has them.

    Parameters
    ----------
    model
        As its configuration describes it; changed in place.
    stored
        Name of a module → what its ``stored_as`` has said.

    Raises
    ------
    CheckpointError
        If the model has no such place, or there is no such activation.
    """
    for name, said in stored.items():
        try:
            before = model.get_submodule(name)
            match said:
                case {"kind": "fatrelu", "threshold": threshold}:
                    module: nn.Module = FATReLU(threshold)
                case {"kind": "shifted-relu", "shift": shift}:
                    module = ShiftedReLU(shift)
                case {"kind": "top-k", "k": k, "ratio": ratio, "relu": relu}:
                    module = TopKActivation(k, ratio, None if relu else before)
                case _:
                    raise ConfigurationError(f"{dict(said)!r} is no known activation")
        except (AttributeError, ConfigurationError) as error:
            raise CheckpointError(
                f"{name}: its activation cannot be put back ({error}); save the model again"
            ) from error
        model.set_submodule(name, module.train(before.training))


def _classes(old: Any) -> Any:
    if not isinstance(old, str):
        return old
    if old not in ACT2CLS:
        raise UnknownNameError("activation", old, ACT2CLS)
    entry = ACT2CLS[old]
    return entry[0] if isinstance(entry, tuple) else entry
