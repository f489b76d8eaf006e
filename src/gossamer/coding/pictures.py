"""Atoms of image patches as a picture, side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from gossamer.coding.receptive_fields import GaborFits
from gossamer.errors import ConfigurationError
from gossamer.storage.atomic import atomic_file


def mosaic(atoms: Tensor, columns: int | None = None) -> np.ndarray:
    """Atoms as grey tiles, each scaled by itself so that 0 is the middle: ``(height, width)`` in [0, 1].

    Parameters
    ----------
    atoms
        ``(atoms, side²)``, square patches row by row.
    columns
        Tiles in a row; by default about as many as rows.

    Raises
    ------
    ConfigurationError
        If patches are not square or there is none.
    """
    side = math.isqrt(atoms.shape[-1])
    if atoms.dim() != 2 or side * side != atoms.shape[1] or not len(atoms):
        raise ConfigurationError(f"atoms are {tuple(atoms.shape)}; give (atoms, side²), square patches")
    columns = columns or math.ceil(math.sqrt(len(atoms)))
    rows = -(-len(atoms) // columns)
    tiles = torch.ones(rows * columns, side + 1, side + 1)
    scaled = atoms / atoms.abs().amax(1, keepdim=True).clamp(min=1e-12)
    tiles[: len(atoms), :side, :side] = (scaled.view(-1, side, side).float() + 1) / 2
    whole = tiles.view(rows, columns, side + 1, side + 1).permute(0, 2, 1, 3).reshape(rows * (side + 1), -1)
    return whole[:-1, :-1].numpy()


def draw_fields(dictionaries: Mapping[str, Tensor], path: str | os.PathLike[str], most: int = 144) -> None:
    """Draw dictionaries next to each other into a PNG file, which appears whole or not at all.

    Parameters
    ----------
    dictionaries
        Title → atoms ``(atoms, side²)``.
    path
        The file.
    most
        Atoms of each that are shown.

    Raises
    ------
    ConfigurationError
        If there is no dictionary, or patches are not square.
    OutputError
        If the file cannot be written.
    """
    if not dictionaries:
        raise ConfigurationError("there is no dictionary to draw; give at least one")
    figure = Figure(figsize=(4 * len(dictionaries), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, atoms) in enumerate(dictionaries.items(), 1):
        axes = figure.add_subplot(1, len(dictionaries), number)
        axes.imshow(mosaic(atoms[:most]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=150)


def draw_shapes(fits: Mapping[str, GaborFits], path: str | os.PathLike[str], most: float = 1.2) -> None:
    """Draw ``(n_x, n_y)`` of the good fits of dictionaries into a PNG file, each in a plane of its own.

    Parameters
    ----------
    fits
        Title → what :func:`gossamer.coding.receptive_fields.gabor_fit` found.
    path
        The file.
    most
        Where the axes end; what lies beyond is drawn at the edge.

    Raises
    ------
    ConfigurationError
        If there is nothing to draw.
    OutputError
        If the file cannot be written.
    """
    if not fits:
        raise ConfigurationError("there are no fits to draw; give at least one")
    figure = Figure(figsize=(3.2 * len(fits), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, fit) in enumerate(fits.items(), 1):
        axes = figure.add_subplot(1, len(fits), number)
        cycles = fit.cycles[fit.good].clamp(max=most).numpy()
        axes.scatter(cycles[:, 0], cycles[:, 1], s=7, color="#0072b2", alpha=0.6, linewidth=0)
        axes.set(xlim=(0, most * 1.03), ylim=(0, most * 1.03), aspect="equal", xlabel="$n_x$ (across stripes)")
        axes.set_title(f"{title}: {int(fit.good.sum())} of {len(fit.good)}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1:
            axes.set_ylabel("$n_y$ (along stripes)")
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
