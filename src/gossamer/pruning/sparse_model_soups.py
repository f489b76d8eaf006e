"""Sparse model soups: copies retrained from one pruned model share its mask, so their mean is as sparse as they are.

Averaging models usually costs their sparsity, because each has its zeros elsewhere, or their quality, because a ridge
lies between them. Copies of one pruned model that are retrained side by side, with another order of the data, another
weight decay, length or learning rate, have neither problem: the mask is common, and they hardly leave the basin in
which they start. The paper prunes a trained model a little, retrains several copies at once, averages them, measures
the statistics of batch norm anew, and prunes that mean further, until the sparsity is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, get_args

from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.retraining_rates import RetrainingSchedule, pruning_distortion, retraining_rates
from gossamer.core.rounds import Round, Scores, drop_lowest, prune_in_rounds
from gossamer.core.schedules import Geometric
from gossamer.core.selection import dropped_count
from gossamer.core.targets import Target
from gossamer.core.workers import Backend, Workers, workers
from gossamer.errors import ConfigurationError, SparsityError, check_sparsity
from gossamer.pruning.soup_branches import Branch, Retrain, State, branch_seed, retrain_branches
from gossamer.pruning.soup_mixing import Evaluate, Mix, check_mix, mix, with_state

Scope = Literal["global", "uniform", "random"]
Vary = Literal["seed", "weight_decay", "length", "schedule"]


@dataclass(frozen=True)
class SoupPhase:
    """One cycle of pruning, retraining and averaging.

    Attributes
    ----------
    sparsity
        Of the masks.
    masks
        What all candidates of the phase have in common.
    distortion
        How much the pruning moved the weights; see :func:`gossamer.core.retraining_rates.pruning_distortion`.
    branches
        What each candidate was told.
    chosen
        Numbers of the candidates that are in the mean.
    scores
        Validation score of each candidate, where they were needed.
    candidates
        State of each candidate.
    soup
        State with which the next phase begins.
    """

    sparsity: float
    masks: MaskSet
    distortion: float
    branches: tuple[Branch, ...]
    chosen: tuple[int, ...]
    scores: tuple[float, ...]
    candidates: list[State] = field(repr=False)
    soup: State = field(repr=False)


@dataclass(frozen=True)
class SoupResult:
    """What :meth:`SparseModelSoup.fit` returns.

    Attributes
    ----------
    model
        The last soup.
    masks
        Its zeros.
    phases
        How it came about.
    """

    model: nn.Module = field(repr=False)
    masks: MaskSet
    phases: list[SoupPhase]

    def candidates(self) -> list[nn.Module]:
        """Models of the last phase before they were averaged, in the mode of the model."""
        return [with_state(self.model, state) for state in self.phases[-1].candidates]


@register(
    "sparse-model-soups",
    paper="sparse-model-soups",
    when="during training",
    timing="after training",
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude", "random"),
    allocation="global",
    patterns=("unstructured",),
    aims=("inference", "quality"),
)
@dataclass(kw_only=True)
class SparseModelSoup:
    """Prune in phases, retrain several copies in each, and go on from their mean.

    Zimmer, Spiegel & Pokutta, 2024, "Sparse Model Soups", arXiv 2306.16788. After phase k the sparsity is
    ``1 − (1 − s)^{k/P}``: each phase removes the same share of what is left. With one model it is iterative magnitude
    pruning with a new learning-rate cycle after each pruning.

    Parameters
    ----------
    sparsity, phases
        s, of all targets together in the end, and P.
    scope
        ``"global"``: the smallest weights of all layers in one ranking; ``"uniform"``: of each layer; ``"random"``.
    n_models
        m: copies that are retrained in each phase; the paper takes 3 to 10.
    vary
        What differs between the copies, and nothing else: ``"seed"``, ``"weight_decay"``, ``"length"`` (in steps) or
        ``"schedule"`` (names of schedules, or highest learning rates).
    values
        The m values that take turns, where it is not the seed.
    method
        ``"uniform"``: the mean of all; ``"greedy"``: from the best candidate down, each stays in the mean if the
        validation score does not fall by it; ``"best"``: the best candidate alone.
    souped
        In which phases there are several copies and a mean: ``"every"`` one, or only the ``"last"``, where all phases
        before are plain pruning and retraining (the paper's IMP-AVG).
    steps
        Of a retraining.
    rates, rates_warm_up
        Learning rates of the original training, one for each step, of which the schedule is made, and how many of
        them were its warm-up. A single number will do for LLR.
    schedule, warm_up
        Of the learning rate while retraining; see :func:`gossamer.core.retraining_rates.retraining_rates`.
    weight_decay
        While retraining.
    recalibration
        Share of the batches on which batch norm is measured anew.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`. All but the normalisations by default.
    seed
        Of all branches.

    Raises
    ------
    ConfigurationError
        If a name is unknown, a number out of range, or the values do not fit.
    SparsityError
        If the sparsity is not in (0, 1).
    """

    sparsity: float = 0.9
    phases: int = 3
    scope: Scope = "global"
    n_models: int = 3
    vary: Vary = "seed"
    values: Sequence[Any] = ()
    method: Mix = "uniform"
    souped: Literal["every", "last"] = "every"
    steps: int = 1000
    rates: Sequence[float] = (0.1,)
    rates_warm_up: int = 0
    schedule: RetrainingSchedule = "llr"
    warm_up: float = 0.1
    weight_decay: float = 1e-4
    recalibration: float = 1.0
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    heads: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not check_sparsity(self.sparsity) > 0:
            raise SparsityError("sparsity is 0; there is nothing to prune in phases, use one in (0, 1) such as 0.9")
        for name, known in (("scope", Scope), ("vary", Vary), ("method", Mix)):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {', '.join(get_args(known))}")
        if self.souped not in ("every", "last"):
            raise ConfigurationError(f"souped is {self.souped!r}; use every or last")
        for name in ("phases", "n_models", "steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.weight_decay >= 0:
            raise ConfigurationError(f"weight_decay is {self.weight_decay}; it must be at least 0, such as 1e-4")
        if self.vary != "seed" and self.n_models > 1 and len(set(self.values)) != self.n_models:
            raise ConfigurationError(
                f"values is {tuple(self.values)!r}; varying the {self.vary} of {self.n_models} models needs as many "
                f"different values"
            )
        if self.vary == "seed" and self.values:
            raise ConfigurationError("values belong to a varied weight_decay, length or schedule; seeds are drawn")

    def fit(
        self,
        model: nn.Module,
        retrain: Retrain,
        *,
        evaluate: Evaluate | None = None,
        batches: Sequence[Any] | None = None,
        n_jobs: int = 1,
        backend: Backend = "processes",
        threads: int = 1,
        directory: str | PathLike[str] | None = None,
    ) -> SoupResult:
        """Prune a trained model in phases.

        Parameters
        ----------
        model
            A trained model; it stays as it is.
        retrain
            ``retrain(model, masks, branch)`` trains a pruned model in place, with an optimiser of its own, as the
            :class:`~gossamer.pruning.soup_branches.Branch` says. Removed weights are held at zero. It is seeded, and
            for several processes it must be picklable.
        evaluate
            Model → validation score, higher is better; needed by ``"greedy"`` and ``"best"``. It must not see the
            data by which the result is judged.
        batches
            Unshuffled training data for batch norm; needed where the model has any.
        n_jobs, backend, threads
            How many copies are retrained at a time, and where; see :func:`gossamer.core.workers.workers`. The result
            does not depend on them, except for the number of threads.
        directory
            Where finished branches are kept, so that an interrupted run goes on with the others.

        Raises
        ------
        ConfigurationError
            If data or a score is missing, or a branch moved a removed weight.
        TargetError
            If there is nothing to prune.
        NonFiniteError
            If a weight is NaN, because a retraining diverged.
        """
        check_mix(self.method, model, self.n_models, evaluate, batches)
        with workers(n_jobs, backend, threads) as pool:
            tools = {"evaluate": evaluate, "batches": batches, "pool": pool, "directory": directory}
            run = _Run(self, retrain, tools)
            prune_in_rounds(
                model,
                run.cook,
                run.choose,
                self.phases,
                restart=False,
                pretrained=True,
                seed=self.seed,
                include=self.include,
                exclude=self.exclude,
                heads=self.heads,
            )
        last = run.phases[-1]
        return SoupResult(with_state(model, last.soup), last.masks, run.phases)

    def soup(
        self,
        model: nn.Module,
        masks: MaskSet,
        retrain: Retrain,
        *,
        phase: int = 1,
        distortion: float = 0.0,
        evaluate: Evaluate | None = None,
        batches: Sequence[Any] | None = None,
        pool: Workers | None = None,
        directory: str | PathLike[str] | None = None,
    ) -> SoupPhase:
        """Retrain copies of a model whose mask is frozen, and average them: the second half of a phase.

        This is also how a run that prunes while it trains is made into a soup: once its masks stand, the rest of the
        training is done several times over, and if that is repeated, each time from the mean.

        Parameters
        ----------
        model
            Sparse already; it stays as it is.
        masks
            Its zeros.
        phase, distortion
            Of which the seeds and, for ALLR, the learning rates are made.
        retrain, evaluate, batches, directory
            As for :meth:`fit`.
        pool
            Of :func:`gossamer.core.workers.workers`; by default the copies are retrained here, one after the other.
        """
        check_mix(self.method, model, self.n_models, evaluate, batches)
        branches = self.branches(phase, distortion)
        with nullcontext(pool) if pool is not None else workers() as place:
            states = retrain_branches(model, masks, retrain, branches, place, directory)
        mixed = mix(self.method, model, masks, states, evaluate, batches, self.recalibration)
        return SoupPhase(masks.sparsity, masks, distortion, branches, mixed.chosen, mixed.scores, states, mixed.state)

    def branches(self, phase: int, distortion: float = 0.0) -> tuple[Branch, ...]:
        """What every copy of a phase is told; they differ in one thing only."""
        count = self.n_models if self.souped == "every" or phase == self.phases else 1
        return tuple(self._branch(phase, number, distortion) for number in range(count))

    def _branch(self, phase: int, number: int, distortion: float) -> Branch:
        value = self.values[number] if self.values else None
        varied = self.vary if value is not None else "seed"
        name = varied == "schedule" and isinstance(value, str)
        rates = retraining_rates(
            value if name else self.schedule,  # type: ignore[arg-type]
            self.rates,
            value if varied == "length" else self.steps,  # type: ignore[arg-type]
            distortion=distortion,
            peak=float(value) if varied == "schedule" and not name else None,  # type: ignore[arg-type]
            warm_up=self.warm_up,
            original_warm_up=self.rates_warm_up,
        )
        seed = branch_seed(self.seed, phase, number if self.vary == "seed" else 0)
        decay = float(value) if varied == "weight_decay" else self.weight_decay  # type: ignore[arg-type]
        return Branch(phase, number, seed, decay, tuple(rates))


class _Run:
    """The two halves of a phase, as :func:`prune_in_rounds` asks for them in turn."""

    def __init__(self, method: SparseModelSoup, retrain: Retrain, tools: Mapping[str, Any]):
        self.method, self.retrain, self.tools = method, retrain, tools
        self.schedule = Geometric(method.sparsity, method.phases)
        self.phases: list[SoupPhase] = []
        self.before: State = {}
        self.share = 0.0

    def choose(self, ended: Round) -> Mapping[str, Tensor]:
        """Remove this phase's share of what is left."""
        self.before = {t.parameter_name: t.parameter.detach().clone() for t in ended.targets}
        sparsity = self.schedule(ended.number + 1)
        counts = {target.name: target.shape.numel() for target in ended.targets}
        together = [list(counts)] if self.method.scope != "uniform" else [[name] for name in counts]
        values: Scores = ended.scores(_magnitude)
        if self.method.scope == "random":
            values = {target.name: scores.random(target.matrix(), ended.generator).cpu() for target in ended.targets}
        chosen: dict[str, Tensor] = {}
        for names in together:
            alive = {name: ended.alive[name] for name in names}
            gone = sum(int((~mask).sum()) for mask in alive.values())
            goal = dropped_count(sum(counts[name] for name in names), sparsity)
            chosen |= drop_lowest(alive, values, goal - gone)
        self.share = 1 - sum(int(mask.sum()) for mask in chosen.values()) / ended.remaining
        return chosen

    def cook(self, ticket: nn.Module, masks: MaskSet) -> None:
        """Retrain copies, and leave their mean."""
        phase = self.method.soup(
            ticket,
            masks,
            self.retrain,
            phase=len(self.phases) + 1,
            distortion=pruning_distortion(self.before, masks, self.share) if self.share > 0 else 0.0,
            **self.tools,
        )
        self.phases.append(phase)
        ticket.load_state_dict(phase.soup)


def _magnitude(target: Target) -> Tensor:
    target.check_finite()
    return scores.magnitude(target.matrix())
