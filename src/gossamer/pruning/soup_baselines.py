"""What a sparse soup has to beat at the same budget, and how other schedules of pruning are made into soups.

A soup of m models costs m retrainings in every phase. The same budget buys one model that is retrained m times longer
(IMP with m times the steps), m runs of which the best is kept, or one ordinary run whose last phase alone is done m
times over (IMP-AVG). Averaging models of different masks, the naive alternative, loses the sparsity. Zimmer, Spiegel &
Pokutta, 2024, arXiv 2306.16788, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core.averaging import average_models, recalibrate_batch_norm
from gossamer.core.masks import MaskSet
from gossamer.core.retraining_rates import RetrainingSchedule
from gossamer.errors import ConfigurationError
from gossamer.pruning.soup_branches import Retrain
from gossamer.pruning.soup_mixing import Evaluate, check_mix, with_state
from gossamer.pruning.sparse_model_soups import SoupPhase, SoupResult, SparseModelSoup


def longer(method: SparseModelSoup) -> SparseModelSoup:
    """IMP with m times the steps: one model, retrained for as long as all of the soup's together."""
    return replace(method, n_models=1, vary="seed", values=(), method="uniform", steps=method.n_models * method.steps)


def average_at_end(method: SparseModelSoup) -> SparseModelSoup:
    """IMP-AVG: every phase goes on from one unsouped model, and only the last ends in a soup."""
    return replace(method, souped="last")


def best_of(
    method: SparseModelSoup,
    model: nn.Module,
    retrain: Retrain,
    *,
    evaluate: Evaluate,
    directory: str | Path | None = None,
    **options: Any,
) -> SoupResult:
    """M whole runs of pruning with one model each, of different seeds, of which the best is kept.

    Parameters
    ----------
    method
        Whose `n_models` is m.
    model, retrain, directory, options
        As for :meth:`SparseModelSoup.fit`; `n_jobs` is of no use here.
    evaluate
        Validation score by which the best run is chosen.

    Returns
    -------
    SoupResult
        Of the run with the highest score, the first of them if several share it.
    """
    runs = []
    for number in range(method.n_models):
        seed = method.seed * 1_000_003 + number
        single = replace(method, n_models=1, vary="seed", values=(), method="uniform", seed=seed)
        place = None if directory is None else Path(directory) / f"run-{number}"
        runs.append(single.fit(model, retrain, evaluate=evaluate, directory=place, **options))
    return max(runs, key=lambda run: evaluate(run.model.eval()))


def average_regardless(models: Sequence[nn.Module], batches: Sequence[Any] | None = None) -> tuple[nn.Module, MaskSet]:
    """Average models whose zeros are at different places: the naive soup.

    Parameters
    ----------
    models
        Sparse, of one shape.
    batches
        Of training data, for batch norm.

    Returns
    -------
    nn.Module, MaskSet
        The mean, and what is left of its zeros: a weight is zero only if it is in all the models.

    Raises
    ------
    ConfigurationError
        If there is no model.
    """
    mean = average_models(list(models), require_same_mask=False)
    if batches:
        recalibrate_batch_norm(mean, batches)
    return mean, MaskSet.from_model(mean)


def budgeted(
    total: int,
    rates: Sequence[float],
    *,
    phases: int = 3,
    pretrained: int,
    schedule: RetrainingSchedule = "allr",
    **options: Any,
) -> SparseModelSoup:
    """Budgeted pruning (BIMP): all phases together take what is left of one training's steps.

    Zimmer, Spiegel & Pokutta, 2021, arXiv 2111.00843: a dense model is trained for a part of the budget, and the rest
    is shared out among the cycles of pruning and retraining, under ALLR.

    Parameters
    ----------
    total, pretrained
        Steps of the whole, and those that the dense model has had.
    rates
        Learning rates of its training.
    phases, schedule, options
        As for :class:`SparseModelSoup`.

    Raises
    ------
    ConfigurationError
        If there is less than one step for each phase.
    """
    steps = (total - pretrained) // phases
    if steps < 1:
        raise ConfigurationError(
            f"{total - pretrained} of {total} steps are left for {phases} phases; pretrain for less, or prune in fewer"
        )
    return SparseModelSoup(phases=phases, steps=steps, rates=tuple(rates), schedule=schedule, **options)


def soup_of_frozen(
    method: SparseModelSoup,
    model: nn.Module,
    masks: MaskSet,
    retrain: Retrain,
    *,
    restarts: int = 1,
    evaluate: Evaluate | None = None,
    batches: Sequence[Any] | None = None,
    **options: Any,
) -> SoupResult:
    """Make a soup of a run that has pruned while it trained, once its mask stands.

    Gradual pruning, pruning with feedback and the like end with a stretch of training under a fixed mask. That stretch
    is done m times from the same model, and averaged; with several restarts it is cut into pieces, each of which
    begins at the mean of the one before.

    Parameters
    ----------
    method
        Number of models, what varies, and the learning rates of one piece; its sparsity and phases are not used.
    model, masks
        As the pruning has left them; the model stays as it is.
    restarts
        Number of pieces; at least 1.
    retrain, evaluate, batches, options
        As for :meth:`SparseModelSoup.soup`.

    Raises
    ------
    ConfigurationError
        If there is no piece, or data is missing.
    """
    if restarts < 1:
        raise ConfigurationError(f"restarts is {restarts}; at least 1 is needed")
    every = replace(method, souped="every")
    check_mix(every.method, model, every.n_models, evaluate, batches)
    phases: list[SoupPhase] = []
    for number in range(restarts):
        phases.append(
            every.soup(model, masks, retrain, phase=number + 1, evaluate=evaluate, batches=batches, **options)
        )
        model = with_state(model, phases[-1].soup)
    return SoupResult(model, masks, phases)
