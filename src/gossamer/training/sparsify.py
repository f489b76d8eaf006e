"""Any method that acts while a model trains, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import ConfigurationError


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str | Sparsifier = "gmp",
    *,
    state: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> SparseTraining:
    """Let a method make the model sparse while it trains; the training loop stays what it is.

    Parameters
    ----------
    model
        Changed in place.
    optimizer
        That trains it.
    method
        Name of a registered method, or one with its parameters.
    state
        Of a run that goes on, when model and optimiser have been loaded; see :meth:`SparseTraining.state_dict`.
    **parameters
        Of a method that is given by name, such as ``sparsity=0.9``.

    Returns
    -------
    SparseTraining
        Whose ``finalize()`` ends it and returns the masks.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    ConfigurationError
        If the method does not act during training, or parameters do not fit.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> training = sparsify(model, optimizer, "rigl", sparsity=0.75, end=100, every=10)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(4, 8)).sum().backward()
    ...     optimizer.step()
    >>> training.finalize()
    MaskSet(1 parameters, 128 weights, 75.0000% zero)
    """
    from gossamer.methods import create

    chosen = create(method, **parameters) if isinstance(method, str) else method
    if not isinstance(method, str) and parameters:
        raise ConfigurationError(f"{sorted(parameters)[0]!r} belongs to a method given by name; this one has its own")
    if not hasattr(chosen, "attach"):
        verbs = [verb for verb in ("prune", "fit", "install") if hasattr(chosen, verb)]
        remedy = f"call its {verbs[0]}()" if verbs else "use it as a layer"
        raise ConfigurationError(f"{method!r} is not attached to a training loop of yours; {remedy}")
    return chosen.attach(model, optimizer, state)
