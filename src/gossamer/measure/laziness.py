"""How lazily a network learns: how little its weights, its representation and its tangent kernel change.

A network that fits its task while all of these stay as they were has learnt *lazily*, as a linear model with random
features would; one that changes them has learnt *richly*. [Chizat et al., 2019, arXiv 1812.07956; the measures are
those of Liu et al., 2024, arXiv 2310.08513, section 3]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gossamer.errors import ConfigurationError, NonFiniteError, TargetError

Outputs = Literal["all", "sum"]


def kernel_alignment(first: Tensor, second: Tensor, center: bool = False) -> float:
    """``⟨K₀, K₁⟩ / (‖K₀‖ ‖K₁‖)``: 1 if two kernels differ by a factor only.

    Parameters
    ----------
    first, second
        Kernel matrices on the same samples, ``(m, m)``.
    center
        Whether the mean over samples is taken out of both first (centred kernel alignment, CKA). Without it, a mean
        that all samples share keeps the alignment high whatever else changes.

    Raises
    ------
    ConfigurationError
        If they are not square and of one shape.
    NonFiniteError
        If one is not finite or vanishes (after centring), so that there is no angle between them.
    """
    if first.dim() != 2 or first.shape != second.shape or first.shape[0] != first.shape[1]:
        raise ConfigurationError(
            f"kernels have shapes {tuple(first.shape)} and {tuple(second.shape)}; two square ones alike are needed"
        )
    kernels = [each.double() for each in (first, second)]
    sizes = [float(each.norm()) for each in kernels]
    if center:
        kernels = [each - each.mean(0) - each.mean(1, keepdim=True) + each.mean() for each in kernels]
    norms = [each.norm() for each in kernels]
    if not all(norm > 1e-12 * size and torch.isfinite(norm) for norm, size in zip(norms, sizes)):
        what = "constant over samples, zero" if center else "zero"
        raise NonFiniteError(f"a kernel is {what} or not finite; probe with samples on which the activity differs")
    cosine = float((kernels[0] * kernels[1]).sum() / (norms[0] * norms[1]))
    return max(-1.0, min(1.0, cosine))  # rounding may leave a little more than 1


def representation_kernel(activity: Tensor) -> Tensor:
    """``K = H Hᵀ`` of hidden activity ``(m, h)``."""
    return activity @ activity.t()


def sign_similarity(first: Tensor, second: Tensor) -> float:
    """Share of activations whose sign (−1, 0 or 1) is the same; of rectified ones, which are on or off alike.

    Parameters
    ----------
    first, second
        The same units on the same samples.

    Raises
    ------
    ConfigurationError
        If the shapes differ.
    """
    if first.shape != second.shape:
        raise ConfigurationError(f"shapes are {tuple(first.shape)} and {tuple(second.shape)}; they must be equal")
    return float((first.sign() == second.sign()).double().mean())


def empirical_ntk(
    model: nn.Module,
    params: Iterable[str] | None,
    inputs: Tensor,
    outputs: Outputs = "all",
    chunk: int = 32,
    select: Callable[[Tensor], Tensor] | None = None,
    batch_dim: int = 0,
) -> Tensor:
    """Empirical tangent kernel ``K_ab = ⟨∂f_a/∂θ, ∂f_b/∂θ⟩`` over pairs of samples and outputs.

    Never more than two chunks of samples have their Jacobians in memory at once, so that a kernel costs
    ``(m / chunk)² / 2`` chunk Jacobians where it does not fit.

    Parameters
    ----------
    model
        Called with one sample at a time as a batch of one; it must not mix samples.
    params
        Names of the parameters that count, such as ``["recurrent"]``. Default: all that require a gradient.
    inputs
        Samples along `batch_dim`.
    outputs
        ``"all"``: each output number of a sample is a row of the kernel, ``(m·o, m·o)``, samples first; ``"sum"``:
        the outputs of a sample are added up, ``(m, m)``.
    chunk
        Samples whose Jacobian is computed at once.
    select
        Applied to what the model returns for a sample, such as ``lambda result: result[0]``. Default: as it is.
    batch_dim
        Where the samples are; 1 for sequences with the time first.

    Raises
    ------
    TargetError
        If a parameter does not exist, or none requires a gradient.
    ConfigurationError
        If there is no sample, or `chunk` is below 1.
    """
    named = dict(model.named_parameters())
    names = [name for name, value in named.items() if value.requires_grad] if params is None else list(params)
    missing = [name for name in names if name not in named]
    if missing or not names:
        raise TargetError(f"the model has no parameter {(missing or ['that trains'])[0]!r}; it has {', '.join(named)}")
    count = inputs.shape[batch_dim]
    if not count or chunk < 1:
        raise ConfigurationError(f"there are {count} samples in chunks of {chunk}; both must be positive")
    fixed = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items() if name not in names}

    def outputs_of(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        result = functional_call(model, {**fixed, **chosen}, (sample.unsqueeze(batch_dim),))
        flat = (result if select is None else select(result)).reshape(-1)
        return flat if outputs == "all" else flat.sum(0, keepdim=True)

    chosen = {name: named[name].detach() for name in names}
    jacobian = vmap(jacrev(outputs_of), (None, batch_dim))

    def rows(start: int) -> Tensor:
        part = inputs.narrow(batch_dim, start, min(chunk, count - start))
        found = jacobian(chosen, part)
        return torch.cat([found[name].flatten(0, 1).flatten(1) for name in names], 1)

    starts = range(0, count, chunk)
    blocks: dict[tuple[int, int], Tensor] = {}
    for i in starts:
        here = rows(i)
        blocks[i, i] = here @ here.t()
        for j in range(0, i, chunk):
            blocks[i, j] = here @ rows(j).t()
            blocks[j, i] = blocks[i, j].t()
    return torch.cat([torch.cat([blocks[i, j] for j in starts], 1) for i in starts])


class LazinessProbe:
    """Measure a network before and after training, on the same samples and outputs.

    Parameters
    ----------
    model
        The network; :meth:`start` and :meth:`stop` look at its weights of that moment.
    inputs
        The probe batch; some two hundred rows of the kernel are enough.
    params
        Names of the parameters whose change, and whose tangent kernel, is measured. Default: all that train.
    activity
        ``activity(model, inputs)`` gives the hidden activity ``(m, h)``, such as that at the time of the decision.
        Default: no representation is measured.
    outputs, chunk, select, batch_dim
        See :func:`empirical_ntk`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> probe = LazinessProbe(model, torch.randn(5, 3), activity=lambda model, x: model[:2](x))
    >>> probe.start()
    >>> round(probe.stop()["kernel_alignment"], 6)
    1.0
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        params: Iterable[str] | None = None,
        activity: Callable[[nn.Module, Tensor], Tensor] | None = None,
        outputs: Outputs = "all",
        chunk: int = 32,
        select: Callable[[Tensor], Tensor] | None = None,
        batch_dim: int = 0,
    ) -> None:
        self.model, self.inputs, self.activity = model, inputs, activity
        self.params = None if params is None else list(params)
        self._options = {"outputs": outputs, "chunk": chunk, "select": select, "batch_dim": batch_dim}
        self._before: tuple[dict[str, Tensor], Tensor, Tensor | None] | None = None

    def start(self) -> None:
        """Remember the network as it is."""
        self._before = self._look()

    def stop(self) -> dict[str, float]:
        """Compare the network with what it was; may be called several times.

        Returns
        -------
        dict
            ``weight_change`` (‖W − W₀‖_F), ``relative_change`` (over ‖W₀‖_F), ``plasticity_cost`` (Σ|W − W₀|),
            ``kernel_alignment`` and ``centred_kernel_alignment``; with `activity` also ``representation_alignment``,
            ``centred_representation_alignment`` and ``sign_similarity``.

        Raises
        ------
        ConfigurationError
            If :meth:`start` has not been called.
        NonFiniteError
            If the network has diverged, or a kernel vanishes.
        """
        if self._before is None:
            raise ConfigurationError("the probe has nothing to compare with; call start() before training")
        weights, kernel, activity = self._before
        weights_now, kernel_now, activity_now = self._look()
        change = torch.cat([(weights_now[name] - weights[name]).flatten() for name in weights])
        size = torch.cat([value.flatten() for value in weights.values()]).norm()
        found = {
            "weight_change": float(change.norm()),
            "relative_change": float(change.norm() / size),
            "plasticity_cost": float(change.abs().sum()),
            "kernel_alignment": kernel_alignment(kernel, kernel_now),
            "centred_kernel_alignment": kernel_alignment(kernel, kernel_now, center=True),
        }
        if activity is not None and activity_now is not None:
            kernels = representation_kernel(activity), representation_kernel(activity_now)
            found["representation_alignment"] = kernel_alignment(*kernels)
            found["centred_representation_alignment"] = kernel_alignment(*kernels, center=True)
            found["sign_similarity"] = sign_similarity(activity, activity_now)
        return found

    def _look(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        kernel = empirical_ntk(self.model, self.params, self.inputs, **self._options)  # type: ignore[arg-type]
        named = dict(self.model.named_parameters())
        names = self.params or [name for name, value in named.items() if value.requires_grad]
        weights = {name: named[name].detach().double().clone() for name in names}
        with torch.no_grad():
            activity = None if self.activity is None else self.activity(self.model, self.inputs).double()
        return weights, kernel, activity
