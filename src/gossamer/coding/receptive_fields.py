"""What atoms of image patches look like, in the terms in which neurons of the visual cortex are described.

A Gabor function, a wave under a bell, is fitted to every atom. The width and length of its bell in cycles of its wave,
``(n_x, n_y)``, tell shapes apart whatever their size: blobs lie near the origin, elongated stripes far up
[Ringach, 2002]. Responses to gratings tell how sharply an atom is tuned to orientation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError

GOOD_FIT = 0.8  #: share of an atom's variance that a Gabor function must explain for its shape to be read
BLOB = 0.25  #: a bell narrower and shorter than this, in cycles, shows no stripes: no more than half a wave is seen
TUNED = 0.5  #: circular variance up to which a unit counts as tuned to orientation

_STEPS = 40
_CHUNK = 512
_ORIENTATIONS = 36
_FREQUENCIES = 16
# of the bell over the side of the patch, across and along the stripes, and the factor on the frequency
_STARTS = ((0.12, 0.12, 1.0), (0.2, 0.2, 1.0), (0.1, 0.25, 1.0), (0.15, 0.15, 0.5))


@dataclass(frozen=True, eq=False)
class GaborFits:
    """``A exp(−x'²/2σ_x² − y'²/2σ_y²) cos(2π f x' + φ)``, one for each atom; x' runs across the stripes.

    Attributes
    ----------
    centre
        ``(atoms, 2)``: column and row in pixels, (0, 0) the middle of the patch.
    sigma
        ``(atoms, 2)``: σ_x across the stripes and σ_y along them, pixels.
    frequency
        f in cycles a pixel, ``(atoms,)``, from 0 to 1/2.
    orientation
        Of the direction across the stripes, in [0, π).
    phase, amplitude
        φ in (−π, π], and A, not negative.
    r2
        Share of the atom's variance that is explained.
    """

    centre: Tensor
    sigma: Tensor
    frequency: Tensor
    orientation: Tensor
    phase: Tensor
    amplitude: Tensor
    r2: Tensor

    @property
    def cycles(self) -> Tensor:
        """``(n_x, n_y) = (σ_x f, σ_y f)``, ``(atoms, 2)``."""
        return self.sigma * self.frequency[:, None]

    @property
    def good(self) -> Tensor:
        """Whose shape may be read, bool ``(atoms,)``."""
        return self.r2 > GOOD_FIT

    @property
    def blobs(self) -> Tensor:
        """Good fits without stripes, bool ``(atoms,)``; see :data:`BLOB`."""
        return self.good & (self.cycles < BLOB).all(1)

    def drawn(self, side: int) -> Tensor:
        """The fitted functions as patches, ``(atoms, side²)``."""
        wave = torch.stack([self.amplitude * self.phase.cos(), -self.amplitude * self.phase.sin()], 1)
        parts = [self.centre, self.sigma.log(), self.frequency[:, None], self.orientation[:, None], wave]
        return _gabor(torch.cat(parts, 1), *_grid(side))[0]


@torch.no_grad()
def gabor_fit(atoms: Tensor) -> GaborFits:
    """Fit a Gabor function to every atom, by least squares from several starts.

    Parameters
    ----------
    atoms
        ``(atoms, side²)``, square patches row by row.

    Raises
    ------
    ConfigurationError
        If patches are not square or smaller than 4 pixels each way.
    NonFiniteError
        If an atom holds NaN or infinity.
    """
    side = _side(atoms)
    parts = [_fit(part.double().cpu(), side) for part in atoms.split(_CHUNK)]
    return GaborFits(**{one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(GaborFits)})


def _fit(atoms: Tensor, side: int) -> GaborFits:
    x, y = _grid(side)
    lengths = atoms.norm(dim=1, keepdim=True).clamp(min=1e-12)
    unit = atoms / lengths
    best, least = torch.zeros(len(atoms), 8, dtype=torch.float64), torch.full((len(atoms),), math.inf).double()
    for across, along, factor in _STARTS:
        found, cost = _descend(unit, _start(unit, side, across, along, factor), x, y, side)
        better = cost < least
        best, least = torch.where(better[:, None], found, best), torch.minimum(cost, least)
    spread = (unit - unit.mean(1, keepdim=True)).square().sum(1).clamp(min=1e-12)
    even, odd = best[:, 6], best[:, 7]
    return GaborFits(
        best[:, :2],
        best[:, 2:4].exp(),
        best[:, 4],
        best[:, 5] % math.pi,
        # half a turn of the direction mirrors the wave
        torch.atan2(torch.where((best[:, 5] % (2 * math.pi)) < math.pi, -odd, odd), even),
        torch.hypot(even, odd) * lengths[:, 0],
        1 - least / spread,
    )


def _start(atoms: Tensor, side: int, across: float, along: float, factor: float) -> Tensor:
    """Centre where the energy is, wave at the peak of the spectrum, its amplitudes by least squares."""
    x, y = _grid(side)
    energy = atoms.square() / atoms.square().sum(1, keepdim=True).clamp(min=1e-12)
    size = 4 * side
    spectrum = torch.fft.rfft2(atoms.view(-1, side, side), (size, size)).abs()
    spectrum[:, :2, :2] = 0  # slower than half a wave a patch is no wave
    peak = spectrum.flatten(1).argmax(1)
    v = torch.fft.fftfreq(size, dtype=torch.float64)[peak // spectrum.shape[2]]
    u = torch.fft.rfftfreq(size, dtype=torch.float64)[peak % spectrum.shape[2]]
    shape = torch.tensor([math.log(across * side), math.log(along * side)], dtype=torch.float64).expand(len(atoms), 2)
    frequency = torch.hypot(u, v).clamp(max=0.5) * factor
    start = torch.stack([energy @ x, energy @ y, shape[:, 0], shape[:, 1], frequency, torch.atan2(v, u)], 1)
    start = torch.cat([start, torch.zeros(len(atoms), 2, dtype=torch.float64)], 1)
    jacobian = _gabor(start, x, y)[1][:, :, 6:]
    gram = jacobian.transpose(1, 2) @ jacobian + 1e-9 * torch.eye(2, dtype=torch.float64)
    start[:, 6:] = torch.linalg.solve(gram, (jacobian.transpose(1, 2) @ atoms[:, :, None]))[:, :, 0]
    return start


def _descend(atoms: Tensor, start: Tensor, x: Tensor, y: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Levenberg and Marquardt's method on all atoms at a time: parameters and squared errors."""
    at = _bounded(start, side)
    model, jacobian = _gabor(at, x, y)
    cost = (atoms - model).square().sum(1)
    damping = torch.full((len(atoms), 1), 1e-2, dtype=torch.float64)
    for _ in range(_STEPS):
        transposed = jacobian.transpose(1, 2)
        gram = transposed @ jacobian
        gram.diagonal(dim1=1, dim2=2).mul_(1 + damping).add_(1e-9)
        step = torch.linalg.solve(gram, transposed @ (atoms - model)[:, :, None])[:, :, 0]
        tried = _bounded(at + step, side)
        new_model, new_jacobian = _gabor(tried, x, y)
        new_cost = (atoms - new_model).square().sum(1)
        better = (new_cost < cost)[:, None]
        at, model = torch.where(better, tried, at), torch.where(better, new_model, model)
        jacobian = torch.where(better[:, :, None], new_jacobian, jacobian)
        cost = torch.minimum(new_cost, cost)
        damping = (damping * torch.where(better, 0.3, 4.0)).clamp(1e-8, 1e8)
    return at, cost


def _bounded(at: Tensor, side: int) -> Tensor:
    """Centres within the patch, bells from a third of a pixel to twice the patch, waves that pixels can show."""
    least, most = math.log(0.33), math.log(2.0 * side)
    return torch.cat(
        [at[:, :2].clamp(-side / 2, side / 2), at[:, 2:4].clamp(least, most), at[:, 4:5].clamp(0, 0.5), at[:, 5:]], 1
    )


def _gabor(at: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Patches ``(n, pixels)`` and their derivatives ``(n, pixels, 8)`` after: centre, log σ, f, θ, cosine, sine."""
    x0, y0, log_across, log_along, frequency, angle, even, odd = (part[:, None] for part in at.t())
    cos, sin = angle.cos(), angle.sin()
    across = (x - x0) * cos + (y - y0) * sin
    along = (y - y0) * cos - (x - x0) * sin
    narrow, flat = across / log_across.exp().square(), along / log_along.exp().square()
    bell = torch.exp(-(across * narrow + along * flat) / 2)
    turn = 2 * math.pi * frequency
    c, s = (turn * across).cos(), (turn * across).sin()
    model = bell * (even * c + odd * s)
    rise = bell * (odd * c - even * s)
    by_across, by_along = turn * rise - narrow * model, -flat * model
    derivatives = [
        -cos * by_across + sin * by_along,
        -sin * by_across - cos * by_along,
        across * narrow * model,
        along * flat * model,
        2 * math.pi * across * rise,
        along * by_across - across * by_along,
        bell * c,
        bell * s,
    ]
    return model, torch.stack(derivatives, 2)


@dataclass(frozen=True, eq=False)
class Tuning:
    """How atoms respond to gratings of any orientation, at the frequency that each prefers.

    Attributes
    ----------
    response
        Largest over phases, ``(atoms, 36)`` for orientations of the direction across the stripes in [0, π).
    frequency
        Preferred, cycles a pixel.
    orientation
        Preferred, in [0, π).
    circular_variance
        ``1 − |Σ r(θ) e^{2iθ}| / Σ r(θ)``: 0 for a single orientation, 1 for none.
    bandwidth
        Half of the width of the peak at ``1/√2`` of its height, radians; π/2 for a response that never falls so far.
    """

    response: Tensor
    frequency: Tensor
    orientation: Tensor
    circular_variance: Tensor
    bandwidth: Tensor

    @property
    def selective(self) -> Tensor:
        """Tuned to orientation, bool ``(atoms,)``; see :data:`TUNED`."""
        return self.circular_variance <= TUNED


@torch.no_grad()
def orientation_selectivity(atoms: Tensor) -> Tuning:
    """Tuning of atoms as linear filters.

    Parameters
    ----------
    atoms
        ``(atoms, side²)``, square patches row by row.

    Raises
    ------
    ConfigurationError, NonFiniteError
        As :func:`gabor_fit`.
    """
    side = _side(atoms)
    x, y = _grid(side)
    angles = torch.arange(_ORIENTATIONS, dtype=torch.float64) * (math.pi / _ORIENTATIONS)
    frequencies = torch.linspace(1 / side, 0.5, _FREQUENCIES, dtype=torch.float64)
    place = torch.outer(angles.cos(), x) + torch.outer(angles.sin(), y)
    waves = torch.polar(torch.ones(()).double(), 2 * math.pi * frequencies[:, None, None] * place)
    responses = torch.einsum("fop,ap->afo", waves, atoms.cpu().to(waves.dtype)).abs()
    preferred = responses.amax(2).argmax(1)
    response = responses[torch.arange(len(atoms)), preferred]
    vector = (response * torch.polar(torch.ones(()).double(), 2 * angles)).sum(1)
    variance = 1 - vector.abs() / response.sum(1).clamp(min=1e-300)
    best = response.argmax(1)
    return Tuning(response, frequencies[preferred], angles[best], variance, _half_width(response))


def orientation_histogram(tuning: Tuning, bins: int = 8) -> Tensor:
    """Shares of the selective units by preferred orientation, ``(bins,)``; the first bin is around 0.

    Raises
    ------
    ConfigurationError
        If there is no bin.
    """
    if bins < 1:
        raise ConfigurationError(f"bins is {bins}; it must be 1 or more")
    preferred = tuning.orientation[tuning.selective]
    counts = torch.bincount((preferred * (bins / math.pi)).round().long() % bins, minlength=bins).double()
    return counts / counts.sum().clamp(min=1)


def _half_width(response: Tensor) -> Tensor:
    """Of the peak, where the response falls below ``1/√2`` of it on either side."""
    aligned = torch.stack([row.roll(-int(row.argmax())) for row in response])
    below = aligned < aligned[:, :1] / math.sqrt(2)
    right, left = below[:, 1:], below.flip(1)
    never = ~below.any(1)
    width = (right.int().argmax(1) + 1 + left.int().argmax(1) + 1).double() / 2 * (math.pi / _ORIENTATIONS)
    return torch.where(never, math.pi / 2, width)


def shape_variety(cycles: Tensor, units: int = 20, cell: float = 0.1, most: float = 1.5) -> float:
    """How many cells of the plane of (n_x, n_y) are met by so many of the units, drawn at random, in the mean.

    Rarefied like this, dictionaries with different numbers of good fits can be compared; with fewer units than are
    drawn, it is the number of cells that all of them meet.

    Parameters
    ----------
    cycles
        ``(units, 2)``, of units with a good fit.
    units
        How many are drawn, without putting any back.
    cell, most
        Width of a cell, and where the plane ends; what lies beyond counts to the last cells.
    """
    places = (cycles.clamp(0, most - 1e-9) / cell).long()
    counts = torch.bincount(places[:, 0] * math.ceil(most / cell) + places[:, 1]).double()
    counts = counts[counts > 0]
    total, drawn = float(len(cycles)), float(min(units, len(cycles)))
    # of all draws, the share that misses a cell
    rest = (total - counts).clamp(min=0)
    missed = torch.lgamma(rest + 1) + math.lgamma(total - drawn + 1)
    missed -= torch.lgamma((rest - drawn).clamp(min=0) + 1) + math.lgamma(total + 1)
    return float((1 - torch.where(rest >= drawn, missed.exp(), 0)).sum())


def sparseness(activities: Tensor, dim: int) -> Tensor:
    """Treves and Rolls' measure as of Vinje and Gallant: 0 where all are equally active, 1 where a single one is.

    ``(1 − (Σ|a|/n)² / (Σ a²/n)) / (1 − 1/n)`` along a dimension: over units for the sparseness of the population, over
    stimuli for that of a unit's life. Where nothing is active it is 1.
    """
    n = activities.shape[dim]
    sizes = activities.abs().double()
    ratio = sizes.mean(dim).square() / sizes.square().mean(dim).clamp(min=1e-300)
    return (1 - ratio) / (1 - 1 / max(n, 2))


def kurtosis(activities: Tensor, dim: int) -> Tensor:
    """``mean (a − ā)⁴ / (mean (a − ā)²)² − 3`` along a dimension; 0 for a normal distribution, or if all are equal."""
    values = activities.double()
    centred = values - values.mean(dim, keepdim=True)
    squares = centred.square().mean(dim)
    return torch.where(squares > 0, centred.pow(4).mean(dim) / squares.square().clamp(min=1e-300) - 3, 0)


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Column and row of every pixel, (0, 0) the middle, ``(side²,)`` each."""
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x.flatten(), y.flatten()


def _side(atoms: Tensor) -> int:
    side = math.isqrt(atoms.shape[-1])
    if atoms.dim() != 2 or side * side != atoms.shape[1] or side < 4:
        raise ConfigurationError(f"atoms are {tuple(atoms.shape)}; give (atoms, side²), square patches of 4 × 4 up")
    if not bool(torch.isfinite(atoms).all()):
        bad = int((~torch.isfinite(atoms)).any(1).nonzero()[0])
        raise NonFiniteError(f"atom {bad} holds NaN or infinity; learn it anew")
    return side
