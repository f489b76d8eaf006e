"""Expectation maximization on few states of the latent causes, the engine of all six models.

The exact posterior of H causes has exponentially many states. Expectation truncation keeps those that matter for a
point: no cause, every single cause, and combinations of the few candidates that a cheap score selects [Lücke and
Eggert, 2010; ProSper, 2019, arXiv 1908.06843]. Posteriors of all points of a block are one matrix, and the parameters
of the prior and of the noise are learnt along with the components.

Processes that run this together, under ``torchrun``, hold a share of the points each: the sums that the M-step needs
are added up over all of them, so that every process arrives at the same parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.coding.annealing import Annealing
from gossamer.coding.latent_models import Block, LatentModel, Moments, Parameters
from gossamer.core.progress import track
from gossamer.core.randomness import generator_for
from gossamer.core.ranks import rank, ranks, summed
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, NonFiniteError
from gossamer.storage.atomic import atomic_file

_VERSION = 1
_JITTER = {"components": "component_jitter", "prior": "prior_jitter", "noise": "noise_jitter"}
_BLOCK = 1 << 22  # numbers of a block: what fits into the cache of a processor is gone through faster
_KEPT = 1 << 26  # numbers of posteriors that are kept between the choice of points and the sums over them


@dataclass
class EMRun:
    """Where a run of expectation maximization stands.

    Attributes
    ----------
    parameters
        Of the model.
    history
        For every step: ``temperature``, ``points`` used, ``free_energy`` (mean over these of the log of the sum over
        states, at that temperature, before the step; at temperature one the truncated log-likelihood), ``activity``
        (expected number of active causes by the prior) and ``noise`` (standard deviation).
    done
        Steps.
    """

    parameters: Parameters
    history: list[dict[str, float]] = field(default_factory=list)
    done: int = 0


@torch.no_grad()
def truncated_em(
    model: LatentModel,
    x: Tensor,
    steps: int = 150,
    annealing: Annealing | None = None,
    *,
    seed: int = 0,
    start: Parameters | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 10,
    progress: bool = False,
) -> EMRun:
    """Learn a model.

    Parameters
    ----------
    model
        What to learn.
    x
        ``(points, D)``, of any floating type; computed in float64. Among several processes of ``torch.distributed``,
        the share of this one.
    steps
        EM steps.
    annealing
        How they are cooled; the published schedule by default.
    seed
        Of the initial parameters, jitter and batches; among several processes that of the first counts.
    start
        Parameters to start from instead of the model's own; those that are missing are the model's.
    checkpoint
        File in which the state is kept; a run that finds one goes on from there, and ends as it would have without
        the interruption.
    every
        Steps between checkpoints.
    progress
        Whether to show a bar.

    Returns
    -------
    EMRun

    Raises
    ------
    ConfigurationError
        If a number is out of range, or parameters to start from do not fit.
    CalibrationError
        If x is not a matrix, or has no points.
    NonFiniteError
        If x or a parameter becomes NaN or infinite.
    CheckpointError
        If the checkpoint is damaged, of a newer version, or of another model, data or schedule.

    Examples
    --------
    >>> from gossamer.coding.discrete_models import DiscreteModel
    >>> x = torch.randn(200, 3) + 4.0 * (torch.rand(200, 1) < 0.3)
    >>> run = truncated_em(DiscreteModel(2, h_prime=2, gamma=2), x, steps=5)
    >>> run.parameters["components"].shape
    torch.Size([2, 3])
    """
    annealing = Annealing() if annealing is None else annealing
    if steps < 1 or every < 1:
        raise ConfigurationError(f"steps is {steps} and every {every}; both must be at least 1")
    x, seed = checked(x), _seed_of_all(seed, x.device)
    facts = _facts(model, x, steps, annealing, seed)
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None and file.exists():
        run = _resumed(file, facts, x.device)
    else:
        run = EMRun(_start(model, x, seed, start))
    for step in track(range(run.done, steps), "expectation maximization", enabled=progress and rank() == 0):
        run.parameters, noted = em_step(model, x, run.parameters, annealing, step / steps, seed=seed, step=step)
        run.history.append(noted)
        run.done = step + 1
        if file is not None and (run.done % every == 0 or run.done == steps):
            _keep(file, facts, run)
    return run


def checked(x: Tensor, dimensions: int | None = None) -> Tensor:
    """Points in float64.

    Raises
    ------
    CalibrationError
        If x is not a matrix with rows, or not as wide as the components.
    NonFiniteError
        If a value is NaN or infinite.
    """
    if x.dim() != 2 or not x.shape[0] or not x.shape[1]:
        raise CalibrationError(f"x has shape {tuple(x.shape)}; give points as (points, dimensions), at least one")
    if dimensions is not None and x.shape[1] != dimensions:
        raise CalibrationError(f"x has {x.shape[1]} dimensions, the components have {dimensions}")
    x = x.detach().to(torch.float64)
    bad = ~torch.isfinite(x).all(1)
    if bool(bad.any()):
        raise NonFiniteError(f"point {int(bad.nonzero()[0])} of x is NaN or infinite; leave such points out")
    return x


def em_step(
    model: LatentModel,
    x: Tensor,
    parameters: Parameters,
    annealing: Annealing,
    position: float,
    *,
    seed: int = 0,
    step: int = 0,
) -> tuple[Parameters, dict[str, float]]:
    """One step at a position of the schedule; new parameters, and what :class:`EMRun` notes of it."""
    at = {name: annealing.at(name, position) for name in ("temperature", "cut", "batch")}
    jitter = {name: annealing.at(its, position) for name, its in _JITTER.items()}
    parameters = model.jitter(parameters, jitter, generator_for(f"jitter of step {step}", seed))
    x = _batch(x, at["batch"], generator_for(f"batch of step {step} on {rank()}", seed))
    totals, energy = _totals(model, x, parameters, at["temperature"], at["cut"])
    totals = _over_processes({**totals, "free energy": energy})
    points = float(totals["points"])
    fresh = model.maximise(parameters, totals, at["temperature"])
    fresh = model.bounded({name: fresh[name] if name in model.learn else parameters[name] for name in parameters})
    for name, value in fresh.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name} became NaN or infinite in step {step}; look for outliers in the data")
    noise = fresh["noise"]
    variance = noise.diagonal().mean() if noise.dim() == 2 else noise.mean()
    return fresh, {
        "temperature": at["temperature"],
        "points": points,
        "free_energy": float(totals["free energy"]) / points,
        "activity": float(model.activity(fresh).sum()),
        "noise": float(variance.sqrt()),
    }


def posteriors(model: LatentModel, prepared: Any, x: Tensor) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Blocks of points, posterior probabilities of their states, and the log of the sum over states."""
    rows = max(64, _BLOCK // model.floats_a_point)
    for part in x.split(rows):
        block = model.observe(prepared, part)
        log_joint = model.log_joint(prepared, block)
        evidence = torch.logsumexp(log_joint, 1)
        yield block, log_joint.sub_(evidence[:, None]).exp_(), evidence


def _totals(
    model: LatentModel, x: Tensor, parameters: Parameters, temperature: float, cut: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums of this process over the points that are used, and of their evidence."""
    prepared = model.prepare(parameters, temperature)
    used = None if cut <= 0 else _count_used(x, model.coverage(parameters), cut)
    passes: Any = posteriors(model, prepared, x)
    threshold = -torch.inf
    if used is not None:
        if len(x) * model.floats_a_point <= _KEPT:
            passes = list(passes)
            evidence = torch.cat([each for _, _, each in passes])
        else:
            evidence = torch.cat([each for _, _, each in passes])
            passes = posteriors(model, prepared, x)
        threshold = _largest(evidence, used)
    totals: dict[str, Tensor] = {}
    energy = x.new_zeros(())
    for block, q, evidence in passes:
        weight = (evidence >= threshold).to(q)
        if used is not None:
            q = q * weight[:, None]
        part = {"points": weight.sum(), **model.statistics(prepared, block, q, weight)}
        totals = {name: value + totals[name] if totals else value for name, value in part.items()}
        energy = energy + (evidence * weight).sum()
    return totals, energy


def _count_used(x: Tensor, coverage: float, cut: float) -> int:
    """How many points of all processes are used."""
    total = int(_over_processes({"points": x.new_tensor(float(len(x)))})["points"])
    return max(1, int(total * (1 - (1 - coverage) * cut)))


def _largest(evidence: Tensor, count: int) -> float:
    """The evidence that so many points of all processes reach."""
    if ranks() > 1:
        own = torch.tensor(len(evidence), device=evidence.device)
        lengths = [torch.empty_like(own) for _ in range(ranks())]
        torch.distributed.all_gather(lengths, own)
        longest = int(torch.stack(lengths).max())
        padded = evidence.new_full((longest,), -torch.inf)
        padded[: len(evidence)] = evidence
        parts = [torch.empty_like(padded) for _ in range(ranks())]
        torch.distributed.all_gather(parts, padded)
        evidence = torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
    return float(torch.topk(evidence, min(count, len(evidence)), sorted=True).values[-1])


def _batch(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share >= 1:
        return x
    chosen = torch.randperm(len(x), generator=generator)[: math.ceil(len(x) * share)]
    return x[chosen.sort().values.to(x.device)]


def _over_processes(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes, in one message."""
    if ranks() == 1:
        return totals
    message = summed(torch.cat([value.reshape(-1) for value in totals.values()]))
    parts = message.split([value.numel() for value in totals.values()])
    return {name: part.view_as(value) for (name, value), part in zip(totals.items(), parts, strict=True)}


def _seed_of_all(seed: int, device: torch.device) -> int:
    """The seed of the first process."""
    if ranks() == 1:
        return seed
    shared = torch.tensor(seed, device=device)
    torch.distributed.broadcast(shared, 0)
    return int(shared)


# ------------------------------------------------------------------------------------------- beginning and going on


def _start(model: LatentModel, x: Tensor, seed: int, start: Parameters | None) -> Parameters:
    sums = _over_processes({"count": x.new_tensor(float(len(x))), "sum": x.sum(0)})
    mean = sums["sum"] / sums["count"]
    spread = _over_processes({"spread": (x - mean).square().sum(0)})["spread"]
    own = model.initial(Moments(mean, spread / sums["count"]), generator_for("initial parameters", seed))
    for name, value in (start or {}).items():
        if name not in own:
            raise ConfigurationError(f"start names {name!r}; this model has {', '.join(own)}")
        if value.shape != own[name].shape:
            raise ConfigurationError(
                f"{name} to start from is {tuple(value.shape)}; it must be {tuple(own[name].shape)}"
            )
        own[name] = value.detach().to(own[name])
    return model.bounded(own)


def _facts(model: LatentModel, x: Tensor, steps: int, annealing: Annealing, seed: int) -> dict[str, str]:
    """What has to be equal for a run to go on."""
    sizes = (model.n_components, model.h_prime, model.gamma, model.values)
    sums = _over_processes({"points": x.new_tensor(float(len(x))), "sum": x.sum(), "square": x.square().sum()})
    return {
        "model": f"{type(model).__name__}{sizes}, learning {', '.join(model.learn)}, {model.anneal_prior=}",
        "data": f"{int(sums['points'])} points of {x.shape[1]} dimensions: {sums['sum']:.6e}, {sums['square']:.6e}",
        "schedule": f"{steps} steps of {annealing}, seed {seed}",
    }


def _keep(file: Path, facts: dict[str, str], run: EMRun) -> None:
    if rank() == 0:
        state = {"version": _VERSION, "facts": facts, "parameters": run.parameters, "history": run.history}
        with atomic_file(file) as part:
            torch.save({**state, "done": run.done}, part)
    if ranks() > 1:
        torch.distributed.barrier()


def _resumed(file: Path, facts: dict[str, str], device: torch.device) -> EMRun:
    try:
        found = torch.load(file, weights_only=True, map_location=device)
        version, run = found["version"], EMRun(found["parameters"], found["history"], int(found["done"]))
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{file} is no checkpoint of expectation maximization ({error}); delete it") from error
    if version != _VERSION:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads {_VERSION}; update gossamer")
    for name, here in facts.items():
        if found["facts"].get(name) != here:
            raise CheckpointError(
                f"{file} is of another {name}: {found['facts'].get(name)} instead of {here}; choose another file"
            )
    return run
