"""Six probabilistic sparse coders with the interface of scikit-learn.

They differ in what a cause can be and in how active causes make a point: binary (:class:`BSC`), ternary (:class:`TSC`)
or discrete (:class:`DSC`) causes that add up; binary causes of which the largest value (:class:`MCA`) or magnitude
(:class:`MMCA`) shows; and causes that are on or off with a Gaussian strength (:class:`GSC`). Components, prior and
noise are all learnt from the data. [Exarchakis et al., 2019, ProSper, arXiv 1908.06843]
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.coding.annealing import Annealing
from gossamer.coding.discrete_models import DiscreteModel
from gossamer.coding.inference import Inference, infer
from gossamer.coding.latent_models import LatentModel, Parameters
from gossamer.coding.maximal_causes import MaximalModel
from gossamer.coding.spike_slab import SpikeSlabModel
from gossamer.coding.truncated_em import checked, posteriors, truncated_em
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError

Array = np.ndarray | Tensor


class ProbabilisticCoder(ABC):
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
    learn
        Names of the parameters that are learnt, such as ``("components", "noise")``; None for all.
    random_state
        Seed of the start and of everything drawn.
    checkpoint
        File from which an interrupted fit goes on.
    verbose
        Whether to show a progress bar.

    Attributes
    ----------
    components_
        ``(n_components, n_features)``.
    prior_
        Probability of a cause to be active; of each value for DSC; of each cause for GSC.
    noise_
        Variance of the noise, or its covariance.
    history_
        One dictionary a step; see :class:`~gossamer.coding.truncated_em.EMRun`.
    n_features_in_
        Dimensions of a point.

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
        learn: Sequence[str] | None = None,
        random_state: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        self.n_components, self.h_prime, self.gamma = n_components, h_prime, gamma
        self.n_steps, self.annealing, self.learn = n_steps, annealing, learn
        self.random_state, self.checkpoint, self.verbose = random_state, checkpoint, verbose

    @abstractmethod
    def _model(self) -> LatentModel:
        """The generative model."""

    def _sizes(self) -> tuple[int, int, int]:
        for name in ("n_components", "h_prime", "gamma"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        h_prime = min(self.h_prime, self.n_components)
        return self.n_components, h_prime, min(self.gamma, h_prime)

    # ------------------------------------------------------------------------------------------- learning

    def fit(self, X: Array, y: object = None, start: Parameters | None = None) -> ProbabilisticCoder:
        """Learn components, prior and noise.

        Parameters
        ----------
        X
            ``(n_samples, n_features)``.
        y
            Ignored.
        start
            Parameters to start from: ``components``, ``prior``, ``noise``, ….

        Raises
        ------
        ConfigurationError
            If a parameter is out of range.
        CalibrationError, NonFiniteError
            If X is no matrix, or not finite.
        CheckpointError
            If the checkpoint is of another run.
        """
        model = self._model()
        run = truncated_em(
            model,
            _tensor(X),
            self.n_steps,
            self.schedule if self.annealing is None else self.annealing,
            seed=self.random_state,
            start=start,
            checkpoint=self.checkpoint,
            progress=self.verbose,
        )
        self.parameters_, self.history_ = run.parameters, run.history
        self.n_features_in_ = run.parameters["components"].shape[1]
        return self

    @property
    def components_(self) -> np.ndarray:
        """``(n_components, n_features)``."""
        return self._learnt("components")

    @property
    def prior_(self) -> Any:
        """Probability that a cause is active."""
        prior = self._learnt("prior")
        return float(prior.sum())

    @property
    def noise_(self) -> Any:
        """Variance of the noise."""
        noise = self._learnt("noise")
        return float(noise) if noise.ndim == 0 else noise

    def _learnt(self, name: str) -> np.ndarray:
        return self._parameters()[name].cpu().numpy()

    def _parameters(self) -> Parameters:
        if not hasattr(self, "parameters_"):
            raise AttributeError(f"this {type(self).__name__} is not fitted yet; call fit first")
        return self.parameters_

    # ------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def transform(self, X: Array) -> Array:
        """Posterior means of the causes, ``(n_samples, n_components)``."""
        model, parameters = self._model(), self._parameters()
        prepared = model.prepare(parameters, 1.0)
        blocks = posteriors(model, prepared, self._points(X))
        return _like(X, torch.cat([model.means(prepared, block, q) for block, q, _ in blocks]))

    def fit_transform(self, X: Array, y: object = None) -> Array:
        """Learn, and code the same points."""
        return self.fit(X).transform(X)

    @torch.no_grad()
    def inverse_transform(self, codes: Array) -> Array:
        """What causes of these values make together, ``(n_samples, n_features)``."""
        components = self._parameters()["components"]
        values = checked(_tensor(codes), len(components)).to(components.device)
        return _like(codes, self._model().combine(values, components))

    @torch.no_grad()
    def score_samples(self, X: Array) -> Array:
        """Truncated log-likelihood of each point; values of different `h_prime` or `gamma` cannot be compared."""
        model, parameters = self._model(), self._parameters()
        blocks = posteriors(model, model.prepare(parameters, 1.0), self._points(X))
        return _like(X, torch.cat([evidence for _, _, evidence in blocks]))

    def score(self, X: Array, y: object = None) -> float:
        """Mean truncated log-likelihood of the points."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def sample(self, n_samples: int = 1, random_state: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw from the model: points ``(n_samples, n_features)``, and their causes ``(n_samples, n_components)``."""
        return sample(self._model(), self._parameters(), n_samples, random_state)

    def inference(
        self,
        X: Array,
        top_k: int = 10,
        adaptive: bool = True,
        h_prime_max: int | None = None,
        gamma_max: int | None = None,
    ) -> Inference:
        """The most probable states of each point; see :func:`~gossamer.coding.inference.infer`."""
        model = self._model()
        return infer(model, self._parameters(), self._points(X), top_k, adaptive, h_prime_max, gamma_max)

    def _points(self, X: Array) -> Tensor:
        components = self._parameters()["components"]
        return checked(_tensor(X), components.shape[1]).to(components.device)

    # ------------------------------------------------------------------------------------------- parameters

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> ProbabilisticCoder:
        """Change parameters."""
        for name, value in params.items():
            if name not in self._names():
                raise ConfigurationError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self._names())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        default = {name: each.default for name, each in inspect.signature(type(self).__init__).parameters.items()}
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != default[name]]
        return f"{type(self).__name__}({', '.join(changed)})"


class BSC(ProbabilisticCoder):
    """Binary sparse coding: active components add up.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 5.

    Examples
    --------
    >>> points = np.random.default_rng(0).normal(size=(50, 4))
    >>> BSC(n_components=3, n_steps=5).fit(points).transform(points).shape
    (50, 3)
    """

    def _model(self) -> LatentModel:
        return DiscreteModel(*self._sizes(), selection="cosine", learn=self.learn)


class TSC(ProbabilisticCoder):
    """Ternary sparse coding: active components are added or subtracted, with the same probability.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 2.
    """

    schedule = Annealing(temperature=((0.0, 2.0), (0.7, 1.0)))

    def _model(self) -> LatentModel:
        return DiscreteModel(*self._sizes(), values=(-1.0, 1.0), tied=True, learn=self.learn)


class DSC(ProbabilisticCoder):
    """Discrete sparse coding: causes have values of an alphabet, each with a probability of its own.

    Parameters
    ----------
    n_components, h_prime, gamma, n_steps, annealing, learn, random_state, checkpoint, verbose
        As of :class:`ProbabilisticCoder`; cooled from temperature 2.
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
        learn: Sequence[str] | None = None,
        random_state: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        super().__init__(
            n_components,
            h_prime=h_prime,
            gamma=gamma,
            n_steps=n_steps,
            annealing=annealing,
            learn=learn,
            random_state=random_state,
            checkpoint=checkpoint,
            verbose=verbose,
        )
        self.values = values

    def _model(self) -> LatentModel:
        return DiscreteModel(*self._sizes(), values=tuple(v for v in self.values if v != 0), learn=self.learn)

    @property
    def values_(self) -> np.ndarray:
        """The alphabet, zero first."""
        return np.array([0.0, *(value for value in self.values if value != 0)])

    @property
    def prior_(self) -> np.ndarray:
        """Probability of each of ``values_``."""
        prior = self._learnt("prior")
        return np.concatenate([[1 - prior.sum()], prior])


class MCA(ProbabilisticCoder):
    """Maximal causes analysis: in every dimension the largest of the active components shows; none is negative.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 4.
    """

    schedule = Annealing(temperature=((0.0, 4.0), (0.8, 1.0)))

    def _model(self) -> LatentModel:
        return MaximalModel(*self._sizes(), learn=self.learn)


class MMCA(ProbabilisticCoder):
    """Maximal magnitude causes analysis: in every dimension the active component of largest magnitude shows.

    Parameters and attributes as of :class:`ProbabilisticCoder`; cooled from temperature 4.
    """

    schedule = Annealing(temperature=((0.0, 4.0), (0.8, 1.0)))

    def _model(self) -> LatentModel:
        return MaximalModel(*self._sizes(), signed=True, learn=self.learn)


class GSC(ProbabilisticCoder):
    """Gaussian (spike-and-slab) sparse coding: active components add up, each with a Gaussian strength.

    Parameters
    ----------
    n_components, h_prime, gamma, n_steps, annealing, learn, random_state, checkpoint, verbose
        As of :class:`ProbabilisticCoder`; cooled from temperature 4.
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
        learn: Sequence[str] | None = None,
        random_state: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ):
        super().__init__(
            n_components,
            h_prime=h_prime,
            gamma=gamma,
            n_steps=n_steps,
            annealing=annealing,
            learn=learn,
            random_state=random_state,
            checkpoint=checkpoint,
            verbose=verbose,
        )
        self.noise, self.slab = noise, slab

    def _model(self) -> LatentModel:
        return SpikeSlabModel(*self._sizes(), noise=self.noise, slab=self.slab, learn=self.learn)

    @property
    def prior_(self) -> np.ndarray:
        """Probability of each cause."""
        return self._learnt("prior")

    @property
    def slab_mean_(self) -> np.ndarray:
        """Mean strengths, ``(n_components,)``."""
        return self._learnt("slab_mean")

    @property
    def slab_covariance_(self) -> np.ndarray:
        """Covariance of the strengths, ``(n_components, n_components)``."""
        return self._learnt("slab_covariance")


@torch.no_grad()
def sample(model: LatentModel, parameters: Parameters, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw points ``(count, D)`` and their causes ``(count, H)`` from a model, without any limit on active causes."""
    if count < 1:
        raise ConfigurationError(f"n_samples is {count}; draw at least one point")
    generator = generator_for("samples of a latent model", seed)
    codes = model.draw(parameters, count, generator)
    components, noise = parameters["components"].cpu(), parameters["noise"].cpu()
    drawn = torch.randn(count, components.shape[1], generator=generator, dtype=torch.float64)
    drawn = drawn @ torch.linalg.cholesky(noise).T if noise.dim() == 2 else drawn * noise.sqrt()
    return (model.combine(codes, components) + drawn).numpy(), codes.numpy()


def _tensor(X: Array) -> Tensor:
    return X if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(X, dtype=np.float64))


def _like(given: Array, found: Tensor) -> Array:
    return found if isinstance(given, Tensor) else found.cpu().numpy()
