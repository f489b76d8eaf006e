"""Six probabilistic sparse coders with the interface of scikit-learn.

They differ in what a cause can be and in how active causes make a point: binary (:class:`BSC`), ternary (:class:`TSC`)
or discrete (:class:`DSC`) causes that add up; binary causes of which the largest value (:class:`MCA`) or magnitude
(:class:`MMCA`) shows; and causes that are on or off with a Gaussian strength (:class:`GSC`). Components, prior and
noise are all learnt from the data. [Exarchakis et al., 2019, ProSper, arXiv 1908.06843]
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.coding.annealing import Annealing
from gossamer.coding.discrete_models import DiscreteModel
from gossamer.coding.inference import Inference, draw, infer
from gossamer.coding.latent_models import LatentModel, Parameters
from gossamer.coding.maximal_causes import MaximalModel
from gossamer.coding.spike_slab import SpikeSlabModel
from gossamer.coding.truncated_em import posteriors, truncated_em
from gossamer.core.estimators import CodeTransformer, check_is_fitted, checked, drawn_seed
from gossamer.errors import ConfigurationError


class ProbabilisticCoder(CodeTransformer):
    """What the six have in common.

    Parameters
    ----------
    n_components
        Causes H.
    h_prime
        Candidates H' of a point whose combinations are considered; all where there are fewer causes.
    gamma
        γ: the most causes that are active together; at most H'.
    n_steps
        Steps of expectation maximization.
    annealing
        How they are cooled; None for the schedule of the model.
    anneal_prior
        Whether the temperature divides the log-prior too; None as published: not for causes that add up with fixed
        values, but for all others.
    learn
        Names of the parameters that are learnt, such as ``("components", "noise")``; None for all.
    sparse_output
        Whether codes are a SciPy matrix of compressed rows; posterior means are small and seldom zero, so that this
        pays for causes that are not among the candidates only.
    random_state
        Of the start and of everything drawn; under ``torchrun`` that of the first process counts.
    checkpoint
        File from which an interrupted fit goes on.
    verbose
        Whether to show a progress bar.

    Attributes
    ----------
    components_
        ``(n_components_, n_features_in_)``.
    prior_
        Probability of a cause to be active; of each value for DSC; of each cause for GSC.
    noise_
        Variance of the noise, or its covariance.
    history_
        One dictionary a step; see :class:`~gossamer.coding.truncated_em.EMRun`.
    n_components_, n_features_in_
        Causes, and dimensions of a point.

    Notes
    -----
    Under ``torchrun`` every process fits its own share of the points, and all arrive at the same parameters.
    """

    schedule = Annealing()

    def __init__(
        self,
        n_components: int = 10,
        *,
        h_prime: int = 8,
        gamma: int = 5,
        n_steps: int = 150,
        annealing: Annealing | None = None,
        anneal_prior: bool | None = None,
        learn: Sequence[str] | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        self.n_components = n_components
        self.h_prime = h_prime
        self.gamma = gamma
        self.n_steps = n_steps
        self.annealing = annealing
        self.anneal_prior = anneal_prior
        self.learn = learn
        self.sparse_output = sparse_output
        self.random_state = random_state
        self.checkpoint = checkpoint
        self.verbose = verbose

    @abstractmethod
    def model(self) -> LatentModel:
        """The generative model, as the functions on tensors take it."""

    def _sizes(self) -> tuple[int, int, int]:
        for name in ("n_components", "h_prime", "gamma"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        h_prime = min(self.h_prime, self.n_components)
        return self.n_components, h_prime, min(self.gamma, h_prime)

    def _options(self, anneal_prior: bool) -> dict[str, Any]:
        return {
            "learn": self.learn,
            "anneal_prior": anneal_prior if self.anneal_prior is None else self.anneal_prior,
        }

    # ------------------------------------------------------------------------------------------- learning

    def fit(self, X: Any, y: Any = None, start: Parameters | None = None) -> Any:
        """Learn components, prior and noise.

        Parameters
        ----------
        X
            ``(n, features)``.
        y
            Ignored.
        start
            Parameters to start from: ``components``, ``prior``, ``noise``, …; those that are missing are drawn.

        Raises
        ------
        ConfigurationError
            If a parameter is out of range.
        CheckpointError
            If the checkpoint is of another run.
        ValueError
            If scikit-learn refuses the data.
        """
        run = truncated_em(
            self.model(),
            checked(self, X, fitting=True),
            self.n_steps,
            self.schedule if self.annealing is None else self.annealing,
            seed=drawn_seed(self.random_state),
            start=start,
            checkpoint=self.checkpoint,
            progress=self.verbose,
        )
        self.parameters_, self.history_ = run.parameters, run.history
        self.components_ = run.parameters["components"].cpu().numpy()
        self.prior_ = self._prior(run.parameters["prior"].cpu().numpy())
        noise = run.parameters["noise"].cpu().numpy()
        self.noise_ = float(noise) if noise.ndim == 0 else noise
        self.n_components_ = len(self.components_)
        return self

    def _prior(self, prior: np.ndarray) -> Any:
        return float(prior.sum())

    # ------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def _codes(self, rows: Tensor) -> Tensor:
        model = self.model()
        prepared = model.prepare(self.parameters_, 1.0)
        found = posteriors(model, prepared, rows.to(torch.float64))
        return torch.cat([model.means(prepared, block, q) for block, q, _ in found]).to(rows.dtype)

    def _rows(self, codes: Tensor) -> Tensor:
        return self.model().combine(codes, self.parameters_["components"].to(codes))

    @torch.no_grad()
    def score_samples(self, X: Any) -> np.ndarray:
        """Truncated log-likelihood of each point ``(n,)``; with other `h_prime` or `gamma` it cannot be compared."""
        model, rows = self.model(), self._points(X)
        found = posteriors(model, model.prepare(self.parameters_, 1.0), rows)
        return torch.cat([evidence for _, _, evidence in found]).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean truncated log-likelihood of the points."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw from what was learnt: points ``(n_samples, features)``, and their causes ``(n_samples, components)``."""
        check_is_fitted(self)
        x, codes = draw(self.model(), self.parameters_, n_samples, drawn_seed(random_state))
        return x.numpy(), codes.numpy()

    def inference(
        self,
        X: Any,
        top_k: int = 10,
        adaptive: bool = True,
        h_prime_max: int | None = None,
        gamma_max: int | None = None,
    ) -> Inference:
        """The most probable states of each point; see :func:`~gossamer.coding.inference.infer`."""
        rows = self._points(X)
        return infer(self.model(), self.parameters_, rows, top_k, adaptive, h_prime_max, gamma_max)

    def _points(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return checked(self, X, fitting=False).to(torch.float64)


class BSC(ProbabilisticCoder):
    """Binary sparse coding: active components add up.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 5.

    Examples
    --------
    >>> points = np.random.default_rng(0).normal(size=(50, 4))
    >>> BSC(n_components=3, n_steps=5).fit(points).transform(points).shape
    (50, 3)
    """

    def model(self) -> LatentModel:
        """The generative model."""
        return DiscreteModel(*self._sizes(), selection="cosine", **self._options(False))


class TSC(ProbabilisticCoder):
    """Ternary sparse coding: active components are added or subtracted, with the same probability.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 2.
    """

    schedule = Annealing(temperature=((0.0, 2.0), (0.7, 1.0)))

    def model(self) -> LatentModel:
        """The generative model."""
        return DiscreteModel(*self._sizes(), values=(-1.0, 1.0), tied=True, **self._options(False))


class DSC(ProbabilisticCoder):
    """Discrete sparse coding: causes have values of an alphabet, each with a probability of its own.

    Parameters
    ----------
    n_components, h_prime, gamma, n_steps, annealing, anneal_prior
        As of :class:`ProbabilisticCoder`; cooled from temperature 2.
    learn, sparse_output, random_state, checkpoint, verbose
        As there.
    values
        The alphabet; zero may be named or not.

    Attributes
    ----------
    values_
        The alphabet, with zero first.
    prior_
        The probability of each of them.
    """

    schedule = Annealing(temperature=((0.0, 2.0), (0.7, 1.0)))

    def __init__(
        self,
        n_components: int = 10,
        *,
        values: Sequence[float] = (-1.0, 0.0, 1.0),
        h_prime: int = 8,
        gamma: int = 5,
        n_steps: int = 150,
        annealing: Annealing | None = None,
        anneal_prior: bool | None = None,
        learn: Sequence[str] | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        super().__init__(
            n_components,
            h_prime=h_prime,
            gamma=gamma,
            n_steps=n_steps,
            annealing=annealing,
            anneal_prior=anneal_prior,
            learn=learn,
            sparse_output=sparse_output,
            random_state=random_state,
            checkpoint=checkpoint,
            verbose=verbose,
        )
        self.values = values

    def model(self) -> LatentModel:
        """The generative model."""
        return DiscreteModel(*self._sizes(), values=tuple(v for v in self.values if v != 0), **self._options(False))

    def _prior(self, prior: np.ndarray) -> np.ndarray:
        self.values_ = np.array([0.0, *(value for value in self.values if value != 0)])
        return np.concatenate([[1 - prior.sum()], prior])


class MCA(ProbabilisticCoder):
    """Maximal causes analysis: in every dimension the largest of the active components shows; none is negative.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 4.
    """

    schedule = Annealing(temperature=((0.0, 4.0), (0.8, 1.0)))

    def model(self) -> LatentModel:
        """The generative model."""
        return MaximalModel(*self._sizes(), **self._options(True))


class MMCA(ProbabilisticCoder):
    """Maximal magnitude causes analysis: in every dimension the active component of largest magnitude shows.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 4.
    """

    schedule = Annealing(temperature=((0.0, 4.0), (0.8, 1.0)))

    def model(self) -> LatentModel:
        """The generative model."""
        return MaximalModel(*self._sizes(), signed=True, **self._options(True))


class GSC(ProbabilisticCoder):
    """Gaussian (spike-and-slab) sparse coding: active components add up, each with a Gaussian strength.

    Parameters
    ----------
    n_components, h_prime, gamma, n_steps, annealing, anneal_prior
        As of :class:`ProbabilisticCoder`; cooled from temperature 4.
    learn, sparse_output, random_state, checkpoint, verbose
        As there.
    noise
        Covariance of the noise: ``"scalar"``, ``"diagonal"`` or ``"full"``.
    slab
        Covariance of the strengths: ``"full"`` or ``"diagonal"``; see
        :class:`~gossamer.coding.spike_slab.SpikeSlabModel`.

    Attributes
    ----------
    prior_
        ``(n_components,)``: probability of each cause.
    slab_mean_, slab_covariance_
        Of the strengths.
    """

    schedule = Annealing(temperature=((0.0, 4.0), (0.8, 1.0)))

    def __init__(
        self,
        n_components: int = 10,
        *,
        noise: str = "scalar",
        slab: str = "full",
        h_prime: int = 7,
        gamma: int = 4,
        n_steps: int = 150,
        annealing: Annealing | None = None,
        anneal_prior: bool | None = None,
        learn: Sequence[str] | None = None,
        sparse_output: bool = False,
        random_state: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        super().__init__(
            n_components,
            h_prime=h_prime,
            gamma=gamma,
            n_steps=n_steps,
            annealing=annealing,
            anneal_prior=anneal_prior,
            learn=learn,
            sparse_output=sparse_output,
            random_state=random_state,
            checkpoint=checkpoint,
            verbose=verbose,
        )
        self.noise, self.slab = noise, slab

    def model(self) -> LatentModel:
        """The generative model."""
        return SpikeSlabModel(*self._sizes(), noise=self.noise, slab=self.slab, **self._options(True))

    def _prior(self, prior: np.ndarray) -> np.ndarray:
        self.slab_mean_ = self.parameters_["slab_mean"].cpu().numpy()
        self.slab_covariance_ = self.parameters_["slab_covariance"].cpu().numpy()
        return prior
