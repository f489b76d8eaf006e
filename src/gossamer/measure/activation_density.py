"""How many activations are not zero: of layers, of neurons, of single tokens and of chunks of tokens.

An activation counts as zero if its absolute value is at most a tolerance, 0 by default. A smooth function such as
GELU reaches zero only where a number format runs out of digits, so tolerance and dtype belong to every figure and are
kept with it. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.taps import Listening, Tap, real_tokens
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import run_batch

DEAD = 1e-3
"""A neuron that is active for a smaller share of the tokens counts as dead [arXiv 2411.02335, section 5]."""

BINS = 20
"""Of histograms, from a share of 0 to one of 1."""


@dataclass(frozen=True)
class LayerActivations:
    """What one layer did.

    Attributes
    ----------
    density
        Share of its activations that are not zero, in [0, 1].
    frequency
        Share of the tokens for which each neuron is active, ``(features,)`` float64.
    token_densities
        Least, median and largest density of a token.
    token_histogram
        Share of the tokens whose density lies in each of :data:`BINS` equal parts of [0, 1], ``(20,)`` float64; the
        lower end of a part belongs to it, and 1 to the last.
    chunk_density
        Share of the neurons that some token of a chunk needs, mean over chunks; None if no sequence was long enough.
    dtype
        Of the activations.
    """

    density: float
    frequency: Tensor
    token_densities: tuple[float, float, float]
    token_histogram: Tensor
    chunk_density: float | None
    dtype: str


@dataclass(frozen=True)
class ActivationDensity:
    """What the layers of a model did on some data.

    Attributes
    ----------
    layers
        By the name of the tap.
    groups
        Mean density of the layers of each group, such as encoder and decoder.
    tolerance
        Largest absolute value that counts as zero.
    dtype
        Of the activations.
    tokens
        How many real tokens were seen by the first layer.
    chunk
        Tokens of a chunk.
    """

    layers: Mapping[str, LayerActivations]
    groups: Mapping[str, float]
    tolerance: float
    dtype: str
    tokens: int
    chunk: int

    @property
    def density(self) -> float:
        """Share of activations that are not zero, mean over layers."""
        return sum(layer.density for layer in self.layers.values()) / len(self.layers)

    @property
    def sparsity(self) -> float:
        """Token-level sparsity: share of zeros, mean over layers."""
        return 1 - self.density

    @property
    def chunk_sparsity(self) -> float | None:
        """Share of the neurons that no token of a chunk needs, mean over layers and chunks."""
        found = [layer.chunk_density for layer in self.layers.values()]
        return None if None in found else 1 - sum(d for d in found if d is not None) / len(found)

    @property
    def dead(self) -> float:
        """Share of the neurons of all layers that are active for less than :data:`DEAD` of the tokens."""
        return float(torch.cat([layer.frequency for layer in self.layers.values()]).lt(DEAD).double().mean())

    @property
    def histogram(self) -> Tensor:
        """Share of the tokens by their density, mean over layers, ``(20,)``; see :class:`LayerActivations`."""
        return torch.stack([layer.token_histogram for layer in self.layers.values()]).mean(0)

    @property
    def neuron_histogram(self) -> Tensor:
        """Share of the neurons of all layers by how often they are active, in the same parts, ``(20,)``."""
        frequency = torch.cat([layer.frequency for layer in self.layers.values()])
        return histogram(frequency * self.tokens, self.tokens)

    def __str__(self) -> str:
        chunks = "" if self.chunk_sparsity is None else f", {self.chunk_sparsity:.1%} in chunks of {self.chunk}"
        return f"{self.sparsity:.1%} zeros{chunks} (|a| ≤ {self.tolerance:g}, {self.dtype}, {self.tokens:,} tokens)"


def activation_density(
    model: nn.Module, data: Iterable[Any] | Tensor, taps: Sequence[Tap], tolerance: float = 0.0, chunk: int = 8
) -> ActivationDensity:
    """Count the activations of a model that are not zero, in evaluation mode.

    Parameters
    ----------
    model
        Afterwards it is as it was.
    data
        Batches: tensors for the main input, mappings of keyword arguments (``attention_mask`` says what is padding),
        or sequences of positional ones. One tensor is one batch.
    taps
        Where; see :func:`gossamer.models.feedforward_taps.feed_forward_taps`.
    tolerance
        An activation is zero if its absolute value is at most this.
    chunk
        Neighbouring tokens that are computed together. What is left over at the end of a sequence, and chunks with
        padding, are not counted. Vectors ``(n, features)`` have no chunks.

    Raises
    ------
    ConfigurationError
        If the tolerance is negative or a chunk has no token.
    CalibrationError
        If there is no data, or nothing but padding.
    TargetError
        If there is no tap.
    """
    if not tolerance >= 0 or chunk < 1:
        raise ConfigurationError(f"tolerance is {tolerance} and chunk {chunk}; at least 0 and at least 1 are needed")
    counts = {tap.name: _Count() for tap in taps}

    def see(tap: Tap, values: Tensor, mask: Tensor | None) -> None:
        counts[tap.name].add(values, mask, tolerance, chunk)

    with evaluation_mode(model), torch.no_grad(), Listening(model, taps, see):
        for batch in [data] if isinstance(data, Tensor) else data:
            run_batch(model, batch, logits=False)
    silent = next((name for name, count in counts.items() if not count.tokens), None)
    if silent is not None:
        raise CalibrationError(f"{silent} saw no real token; give at least one batch that is more than padding")
    layers = {name: count.result() for name, count in counts.items()}
    members: dict[str, list[float]] = {}
    for tap in taps:
        members.setdefault(tap.group, []).append(layers[tap.name].density)
    first = next(iter(counts.values()))
    return ActivationDensity(
        layers=layers,
        groups={group: sum(found) / len(found) for group, found in members.items()},
        tolerance=tolerance,
        dtype=", ".join(sorted({layer.dtype for layer in layers.values()})),
        tokens=first.tokens,
        chunk=chunk,
    )


@dataclass
class _Count:
    tokens: int = 0
    active: Tensor | None = None
    per_token: list[Tensor] = field(default_factory=list)
    width: int = 0
    chunks: int = 0
    needed: float = 0.0
    dtype: str = ""

    def add(self, values: Tensor, mask: Tensor | None, tolerance: float, chunk: int) -> None:
        live = values.abs() > tolerance if tolerance else values != 0
        rows = real_tokens(live, mask)
        seen = rows.sum(0, dtype=torch.float64).cpu()
        self.active = seen if self.active is None else self.active + seen
        self.tokens += len(rows)
        self.per_token.append(rows.sum(1).cpu())
        self.width = rows.shape[1]
        self.dtype = str(values.dtype).removeprefix("torch.")
        whole = live.shape[1] // chunk if live.dim() == 3 else 0
        if whole:
            together = live[:, : whole * chunk].unflatten(1, (whole, chunk)).any(2)
            if mask is not None:
                together = together[mask[:, : whole * chunk].unflatten(1, (whole, chunk)).all(2).to(live.device)]
            together = together.flatten(0, -2)
            self.chunks += len(together)
            self.needed += float(together.sum(dtype=torch.float64)) / live.shape[-1]

    def result(self) -> LayerActivations:
        frequency = torch.zeros(0) if self.active is None else self.active / self.tokens
        tokens = torch.cat(self.per_token)
        least, middle, most = (float(count) / self.width for count in (tokens.min(), tokens.median(), tokens.max()))
        needed = self.needed / self.chunks if self.chunks else None
        shares = histogram(tokens, self.width)
        return LayerActivations(float(frequency.mean()), frequency, (least, middle, most), shares, needed, self.dtype)


def histogram(counts: Tensor, most: int) -> Tensor:
    """Share of the counts in each of :data:`BINS` equal parts from 0 to `most`, ``(20,)`` float64.

    Whole numbers are sorted in without rounding, so that a count on a border lands above it.

    Parameters
    ----------
    counts
        ``(n,)``, whole numbers from 0 to `most`.
    most
        The largest that a count can be.

    Raises
    ------
    CalibrationError
        If there is no count.
    ConfigurationError
        If one is out of range.

    Examples
    --------
    >>> histogram(torch.tensor([0, 1, 5, 10]), 10)[[0, 2, 10, 19]].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if not counts.numel():
        raise CalibrationError("there are no counts to sort into a histogram; give at least one")
    whole = counts.round().long()
    if int(whole.min()) < 0 or int(whole.max()) > most:
        raise ConfigurationError(
            f"counts go from {int(whole.min())} to {int(whole.max())}; they must lie in [0, {most}]"
        )
    parts = (whole * BINS // max(1, most)).clamp_max(BINS - 1)
    return torch.bincount(parts, minlength=BINS).double() / len(parts)


def frequency_curve(frequency: Tensor) -> Tensor:
    """Frequencies of neurons from the most to the least active one, ``(features,)``."""
    return frequency.sort(descending=True).values


def share_of_work(frequency: Tensor, share: float = 0.5) -> float:
    """The smallest share of the neurons that makes at least a given share of all activations.

    Parameters
    ----------
    frequency
        ``(features,)``, not all zero.
    share
        In (0, 1].

    Raises
    ------
    ConfigurationError
        If the share is out of range, or no neuron is ever active.
    """
    total = float(frequency.sum())
    if not 0 < share <= 1 or not total > 0:
        raise ConfigurationError(f"share is {share} of {total} activations; give one in (0, 1] of some")
    ordered = frequency_curve(frequency.double()).cumsum(0) / frequency.double().sum()
    return (int((ordered < share - 1e-12).sum()) + 1) / len(frequency)


def chunk_sparsity(live: Tensor, chunk: int = 8) -> float:
    """Share of the neurons that none of `chunk` neighbouring tokens needs.

    Parameters
    ----------
    live
        ``(tokens, features)`` bool; what is left over at the end is not counted.
    chunk
        Tokens computed together.

    Raises
    ------
    CalibrationError
        If there are fewer tokens than a chunk has.
    """
    whole = len(live) // chunk
    if not whole:
        raise CalibrationError(f"{len(live)} tokens make no chunk of {chunk}; give more")
    return 1 - float(live[: whole * chunk].unflatten(0, (whole, chunk)).any(1).double().mean())
