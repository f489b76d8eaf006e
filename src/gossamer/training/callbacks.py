"""Sparse training inside the training loops of others: the Trainer of transformers, and Lightning.

Both attach a method when training begins, keep its state in the checkpoints of the loop, go on from there, and
finalize when training ends. Each class is made when it is asked for, so that neither library has to be installed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import CheckpointError, MissingDependencyError

STATE_FILE = "gossamer_training.pt"
"""Name of the file with the state of the method, beside the other files of a checkpoint of transformers."""


def transformers_callback(method: Sparsifier) -> Any:
    """A callback for ``transformers.Trainer`` under which training is sparse.

    Parameters
    ----------
    method
        What decides about zeros; its steps are those of the optimiser.

    Returns
    -------
    transformers.TrainerCallback
        With the attributes ``training``, the :class:`SparseTraining` in progress, and ``masks`` once it has ended.

    Examples
    --------
    >>> Trainer(model, arguments, callbacks=[transformers_callback(RigL(end=1000))])  # doctest: +SKIP
    """
    return _transformers_class()(method)


def lightning_callback(method: Sparsifier) -> Any:
    """A callback for ``lightning.Trainer`` under which training is sparse.

    Parameters
    ----------
    method
        What decides about zeros; the module has one optimiser.

    Returns
    -------
    lightning.pytorch.Callback
        With the attributes ``training`` and ``masks`` as of :func:`transformers_callback`.

    Raises
    ------
    MissingDependencyError
        If Lightning is not installed.
    """
    return _lightning_class()(method)


class _Following:
    """What both callbacks do."""

    training: SparseTraining | None = None
    masks: MaskSet | None = None

    def __init__(self, method: Sparsifier):
        self.method = method

    def begin(self, model: nn.Module, optimizer: Any, state: dict[str, Any] | None) -> None:
        # both libraries wrap the optimiser, and only the one inside has hooks that are called
        inner = getattr(optimizer, "optimizer", optimizer)
        self.training, self.masks = self.method.attach(model, inner, state), None

    def end(self) -> None:
        if self.training is not None:
            self.training, self.masks = None, self.training.finalize()


@cache
def _transformers_class() -> type:
    from transformers import TrainerCallback

    class SparsityCallback(_Following, TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            stored = None
            if state.global_step:
                file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
                if not file.exists():
                    raise CheckpointError(f"{file} is missing: the checkpoint was made without sparse training")
                stored = torch.load(file, weights_only=True)
            self.begin(found["model"], found["optimizer"], stored)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.training is not None and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                torch.save(self.training.state_dict(), folder / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.end()

    return SparsityCallback


@cache
def _lightning_class() -> type:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingDependencyError("lightning", "lightning", "the callback for Lightning") from None

    class SparsityCallback(_Following, Callback):  # type: ignore[misc]
        _stored: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self.begin(pl_module, trainer.optimizers[0], self._stored)
            self._stored = None

        def state_dict(self) -> dict[str, Any]:
            return {} if self.training is None else self.training.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._stored = state_dict or None

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self.end()

    return SparsityCallback
