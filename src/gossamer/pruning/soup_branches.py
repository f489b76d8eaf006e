"""Branches of a prune–retrain cycle: copies of one pruned model that are retrained with one thing changed.

Each branch is a piece of work of its own: it starts from the same weights, under the same mask, with a fresh
optimiser, its own seed, weight decay and learning rates, and gives a state. Where a directory is named, a finished
branch is stored there, and is not run again.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.core.randomness import generator_for
from gossamer.core.workers import Workers, seeded
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.storage.atomic import atomic_file

State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Branch:
    """What a retraining is told.

    Attributes
    ----------
    phase
        1 for the first cycle.
    number
        0 for the first branch of a phase.
    seed
        Of everything that is drawn; torch's, numpy's and Python's generators start from it.
    weight_decay
        For the optimiser.
    rates
        Learning rate of every step; as many steps as there are rates.
    """

    phase: int
    number: int
    seed: int
    weight_decay: float
    rates: tuple[float, ...]


Retrain: TypeAlias = Callable[[nn.Module, MaskSet, Branch], Any]
"""``retrain(model, masks, branch)`` trains in place, or returns another model; the optimiser is made inside."""


def retrain_branches(
    model: nn.Module,
    masks: MaskSet,
    retrain: Retrain,
    branches: Sequence[Branch],
    pool: Workers,
    directory: str | PathLike[str] | None = None,
) -> list[State]:
    """Retrain every branch from the same pruned model.

    Parameters
    ----------
    model
        The pruned parent; it stays as it is.
    masks
        Its zeros, which every branch is held to.
    retrain
        How; for several processes it must be picklable.
    branches
        What differs.
    pool
        Where they run.
    directory
        Where states of finished branches are kept and looked for, as ``phase-1-branch-0.safetensors``.

    Returns
    -------
    list of dict
        State of each branch, in order.

    Raises
    ------
    ConfigurationError
        If a branch moved a removed weight, or gave another model; which one is named.
    """
    states: list[State | None] = [None] * len(branches)
    parent = copy.deepcopy(model)
    keys = [_key(parent, masks, retrain, branch) if directory is not None else "" for branch in branches]
    if directory is not None:
        states = [_stored(_path(directory, branch), key) for branch, key in zip(branches, keys)]
    missing = [number for number, state in enumerate(states) if state is None]
    pieces = [(parent, masks, retrain, branches[number]) for number in missing]
    for position, state in pool.run(_retrain, pieces):
        number = missing[position]
        states[number] = state
        if directory is not None:
            _store(_path(directory, branches[number]), state, keys[number])
    return [state for state in states if state is not None]


def _retrain(piece: tuple[nn.Module, MaskSet, Retrain, Branch]) -> State:
    parent, masks, retrain, branch = piece
    model = copy.deepcopy(parent)
    try:
        with seeded(branch.seed), static_masks(model, masks):
            trained = retrain(model, masks, branch)
        trained = trained if isinstance(trained, nn.Module) else model
        state = {name: tensor.detach().cpu().clone() for name, tensor in trained.state_dict().items()}
        violations = masks.violations(trained)
    except GossamerError as error:
        raise ConfigurationError(f"branch {branch.number} of phase {branch.phase}: {error}") from error
    if violations or state.keys() != parent.state_dict().keys():
        raise ConfigurationError(
            f"branch {branch.number} of phase {branch.phase} gave a model "
            f"{'whose removed weights came back' if violations else 'with other weights than it got'}; "
            f"retrain the model that is handed over, in place"
        )
    return state


def _path(directory: str | PathLike[str], branch: Branch) -> Path:
    return Path(directory) / f"phase-{branch.phase}-branch-{branch.number}.safetensors"


def _key(model: nn.Module, masks: MaskSet, retrain: Retrain, branch: Branch) -> str:
    """Digest of all that decides what a branch becomes."""
    digest = hashlib.sha256(repr(branch).encode())
    for state in (model.state_dict(), masks.state_dict()):
        for name, tensor in state.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    try:
        digest.update(pickle.dumps(retrain))
    except (pickle.PicklingError, AttributeError, TypeError):  # a function within a function: known by its name only
        digest.update(getattr(retrain, "__qualname__", type(retrain).__qualname__).encode())
    return digest.hexdigest()


def _stored(path: Path, key: str) -> State | None:
    """The state of a branch that has run before with the same settings, if it is whole."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("branch") != key:
                return None
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None


def _store(path: Path, state: Mapping[str, Tensor], key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, part, metadata={"branch": key})


def branch_seed(seed: int, phase: int, number: int) -> int:
    """A seed of its own for every branch, which no other seed, phase or branch shares."""
    digest = hashlib.sha256(f"soup:{seed}:{phase}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def batches_of(branch: Branch, examples: int, batch: int) -> Iterator[Tensor]:
    """Rows of the examples for every step of a branch: epoch after epoch, each in an order of its own.

    Parameters
    ----------
    branch
        Whose seed decides the order and whose rates the number of steps.
    examples
        How many there are.
    batch
        Rows of a step; those that do not fill one are left out of the epoch.

    Raises
    ------
    ConfigurationError
        If there are fewer examples than a batch has.
    """
    if not 1 <= batch <= examples:
        raise ConfigurationError(f"batch is {batch}; it must lie between 1 and the {examples} examples")
    generator = generator_for("batches of a branch", branch.seed)
    rows: list[Tensor] = []
    for _ in branch.rates:
        if not rows:
            order = torch.randperm(examples, generator=generator)
            rows = list(order[: examples // batch * batch].split(batch))[::-1]
        yield rows.pop()
