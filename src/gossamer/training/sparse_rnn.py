"""Zeros in trained recurrent weights: how far they go, and how soon the network is as good again.

A recurrent layer has two kinds of matrices: one reads the input, one the state of the step before. In a GRU or an LSTM
each is a stack of gates. The smallest weights of a matrix are set to zero, of the one kind, the other or both; then
training goes on under the mask until the accuracy is back. One threshold over all gates can empty a gate whose weights
are small, so that gates may be pruned on their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import Tensor, nn

from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.scores import magnitude
from gossamer.core.selection import dropped_count, keep_highest, keep_highest_jointly
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, SparsityError, TargetError, UnknownNameError

Kind = Literal["ih", "hh"]
Scope = Literal["matrix", "model"]
_MATRIX = re.compile(r"weight_(ih|hh)(_l\d+(_reverse)?)?")
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def recurrent_targets(module: nn.Module, which: Collection[Kind] = ("ih", "hh")) -> list[Target]:
    """The weight matrices of all recurrent layers and cells of torch in a module, gates stacked along the rows.

    Parameters
    ----------
    module
        A recurrent layer (:class:`torch.nn.RNN`, ``GRU``, ``LSTM``), a cell (``RNNCell``, ``GRUCell``, ``LSTMCell``),
        or any module that holds some. Projections of an LSTM (``weight_hr``) are no targets.
    which
        ``"ih"``: input to hidden, ``"hh"``: hidden to hidden.

    Raises
    ------
    UnknownNameError
        If `which` names another kind.
    ConfigurationError
        If `which` is empty.
    TargetError
        If there is no recurrent layer.
    """
    kinds = [which] if isinstance(which, str) else list(which)
    for kind in kinds:
        if kind not in get_args(Kind):
            raise UnknownNameError("kind of recurrent weight", str(kind), get_args(Kind))
    if not kinds:
        raise ConfigurationError("which is empty; name 'ih' (input to hidden), 'hh' (hidden to hidden) or both")
    found = [
        Target(f"{name}.{attribute}" if name else attribute, name, layer, attribute)
        for name, layer in module.named_modules()
        if isinstance(layer, _RECURRENT)
        for attribute, _ in layer.named_parameters(recurse=False)
        if (match := _MATRIX.fullmatch(attribute)) and match[1] in kinds
    ]
    if not found:
        kind = type(module).__name__
        raise TargetError(f"{kind} holds no recurrent layer of torch (RNN, GRU, LSTM or one of their cells) to prune")
    return found


def gates(module: nn.Module) -> int:
    """Number of gates that a recurrent layer or cell stacks in each of its matrices: LSTM 4, GRU 3, plain RNN 1."""
    return 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1


def prune_rnn(
    module: nn.Module,
    amount: float,
    which: Collection[Kind] = ("ih", "hh"),
    per_gate: bool = False,
    scope: Scope = "matrix",
    score: Callable[[Tensor], Tensor] = magnitude,
) -> MaskSet:
    """Set the smallest recurrent weights to zero, in place.

    Darji, 2021, "Investigating Sparsity in Recurrent Neural Networks", arXiv 2407.20601. The author's code ranks all
    chosen matrices together, which is the scope ``"model"``; counts here are exact and ties broken by position.

    Parameters
    ----------
    module
        Holds recurrent layers; see :func:`recurrent_targets`. Biases, embeddings and other layers stay.
    amount
        Share of zeros in [0, 1], each matrix (or gate, or all together) rounded down to whole weights. 1 leaves only
        biases.
    which
        Matrices that read the input, the state, or both.
    per_gate
        Whether every gate of a matrix loses the same share, so that none is emptied.
    scope
        What competes: the weights of one matrix, or of all chosen matrices of the module.
    score
        Weights ``(gates · hidden, in)`` → scores of the same shape, higher = kept longer.

    Returns
    -------
    MaskSet
        Parameter name → what remains.

    Raises
    ------
    SparsityError
        If `amount` is outside [0, 1].
    ConfigurationError
        If gates are asked for in a ranking of the whole module, `scope` is unknown, or `which` is empty.
    TargetError, UnknownNameError
        If there is nothing to prune.
    NonFiniteError
        If a weight is NaN.

    Examples
    --------
    >>> layer = torch.nn.GRU(4, 8)
    >>> prune_rnn(layer, 0.5, which=["hh"])
    MaskSet(1 parameters, 192 weights, 50.0000% zero)
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount <= 1:
        raise SparsityError(f"amount is {amount!r}; it must be a number in [0, 1], such as 0.6 for 60 % zeros")
    masks = _choose(recurrent_targets(module, which), float(amount), per_gate, scope, score)
    found = MaskSet({name: mask.cpu() for name, mask in masks.items()})
    found.apply_(module)
    return found


def _choose(
    targets: list[Target], amount: float, per_gate: bool, scope: Scope, score: Callable[[Tensor], Tensor] = magnitude
) -> dict[str, Tensor]:
    if scope not in get_args(Scope):
        raise ConfigurationError(f"scope is {scope!r}; use 'matrix', or 'model' to rank all matrices together")
    if per_gate and scope == "model":
        raise ConfigurationError("per_gate needs the scope 'matrix': a ranking of all matrices knows no gates")
    values = {target.name: score(target.matrix()) for target in targets}
    if scope == "model":
        return keep_highest_jointly(values, _count(sum(map(Tensor.numel, values.values())), amount))
    return {each.name: _select(each, values[each.name], amount, per_gate) for each in targets}


def _select(target: Target, values: Tensor, amount: float, per_gate: bool) -> Tensor:
    rows = values.reshape(gates(target.module) if per_gate else 1, -1)
    return keep_highest(rows, _count(rows.shape[1], amount), target.name).view(values.shape)


def _count(size: int, amount: float) -> int:
    return size if amount == 1 else dropped_count(size, amount)


@dataclass(frozen=True)
class Regained:
    """How a pruned network got its accuracy back.

    Attributes
    ----------
    accuracies
        Right after pruning, then after each epoch.
    wanted
        What had to be reached.
    """

    accuracies: tuple[float, ...]
    wanted: float

    @property
    def epochs(self) -> int | None:
        """Epochs of training until the accuracy was there; 0 if it never left, None if it did not come back."""
        return next((epoch for epoch, value in enumerate(self.accuracies) if value >= self.wanted), None)


def regain(
    model: nn.Module,
    masks: MaskSet,
    train_epoch: Callable[[], object],
    accuracy: Callable[[], float],
    wanted: float,
    epochs: int = 10,
) -> Regained:
    """Train under masks until an accuracy is back, and count the epochs.

    Parameters
    ----------
    model
        Pruned; trained in place.
    masks
        What remains; every other weight is held at zero.
    train_epoch
        Trains for one epoch, with an optimiser that has not made a step before this call.
    accuracy
        Measures it.
    wanted
        Accuracy at which to stop.
    epochs
        The most that are tried.

    Raises
    ------
    ConfigurationError
        If `epochs` is below 1, or training moved a pruned weight.
    """
    if epochs < 1:
        raise ConfigurationError(f"epochs is {epochs}; at least 1 is needed to see whether accuracy comes back")
    with static_masks(model, masks):
        seen = [accuracy()]
        while seen[-1] < wanted and len(seen) <= epochs:
            train_epoch()
            seen.append(accuracy())
    return Regained(tuple(seen), wanted)


@register(
    "sparse-rnn",
    paper="sparse-rnn",
    when="during training",
    needs_data=False,
    timing="after training",
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="uniform",
    aims=("inference",),
)
@dataclass(kw_only=True)
class SparseRNN(Sparsifier):
    """Prune the recurrent weights of a trained model when attached, and train on under the mask.

    Darji, 2021, arXiv 2407.20601: the retraining of the pruning study, as a method for any training loop.

    Parameters
    ----------
    which, per_gate, scope
        See :func:`prune_rnn`.
    """

    sparsity: float = 0.6
    which: tuple[Kind, ...] = ("ih", "hh")
    per_gate: bool = False
    scope: Scope = "matrix"

    def targets(self, model: nn.Module) -> list[Target]:
        """The recurrent matrices of the chosen kinds, in layers that `include` names and `exclude` does not.

        Raises
        ------
        TargetError
            If there is none.
        """
        found = [
            target
            for target in recurrent_targets(model, self.which)
            if any(fnmatchcase(target.module_name, glob) for glob in self.include)
            and not any(fnmatchcase(target.module_name, glob) for glob in self.exclude)
        ]
        if not found:
            raise TargetError(f"no recurrent layer matches include={list(self.include)} exclude={list(self.exclude)}")
        return found

    def start(self, training: SparseTraining) -> None:
        """Prune."""
        targets = list(training.targets.values())
        training.assign(_choose(targets, self.sparsity, self.per_gate, self.scope))
