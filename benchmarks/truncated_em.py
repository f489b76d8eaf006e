"""A step of expectation truncation: ours on all points at once, ProSper's own code point by point.

10⁴ points of 400 dimensions, 40 causes, 8 candidates of which up to 5 are active together: 210 combinations a point,
E-step and M-step, binary sparse coding in float64 on both sides. Both start from the same parameters, and the note says
how far apart the components are after the step. ProSper is run from a checkout that ``--prosper`` names; without one,
a loop over points stands in that does what it does for each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Options, Row, main, paired
from benchmarks.prosper_peer import prosper, schedule
from gossamer.coding.annealing import Annealing
from gossamer.coding.discrete_models import DiscreteModel
from gossamer.coding.inference import draw
from gossamer.coding.truncated_em import em_step
from gossamer.measure import interleave

BAR = 30.0
H_PRIME, GAMMA = 8, 5
SIZES = {"quick": (200, 36, 12), "full": (10_000, 400, 40)}
_CHECKOUT: Path | None = None


def problem(points: int, dimensions: int, causes: int) -> tuple[DiscreteModel, Tensor, dict[str, Tensor]]:
    """A model, points drawn from it, and parameters somewhat off the truth."""
    generator = torch.Generator().manual_seed(0)
    model = DiscreteModel(causes, H_PRIME, GAMMA, selection="cosine")
    components = 3 * torch.randn(causes, dimensions, generator=generator, dtype=torch.float64)
    truth = {
        "components": components,
        "prior": torch.tensor([2 / causes], dtype=torch.float64),
        "noise": torch.tensor(4.0, dtype=torch.float64),
    }
    x, _ = draw(model, truth, points)
    off = components + 0.5 * torch.randn(components.shape, generator=generator, dtype=torch.float64)
    return model, x, {**truth, "components": off}


def ours(model: DiscreteModel, x: Tensor, parameters: dict[str, Tensor]) -> np.ndarray:
    """Components after a step of ours."""
    with torch.no_grad():
        return em_step(model, x, parameters, Annealing.none(), 0.0)[0]["components"].numpy()


def of_prosper(checkout: Path) -> Callable[[np.ndarray, dict[str, Tensor]], np.ndarray]:
    """A step of ProSper's."""
    peer = prosper(checkout)
    cooled = schedule(peer)

    def step(x: np.ndarray, parameters: dict[str, Tensor]) -> np.ndarray:
        components = parameters["components"].numpy()
        model = peer["BSC"](x.shape[1], len(components), H_PRIME, GAMMA)
        start = {
            "W": components.T.copy(),
            "pi": float(parameters["prior"]),
            "sigma": float(parameters["noise"].sqrt()),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            return model.step(cooled, start, {"y": x})["W"].T

    return step


def point_by_point(x: np.ndarray, parameters: dict[str, Tensor]) -> np.ndarray:
    """The same step in a loop over points, in NumPy."""
    w, noise, p = (parameters[name].numpy() for name in ("components", "noise", "prior"))
    h = len(w)
    states = DiscreteModel(h, H_PRIME, GAMMA).table.states.numpy()
    odds = float(np.log(p / (1 - p))[0])
    log_prior = np.concatenate([[0.0], np.full(h, odds), odds * states.sum(1)])
    lengths = np.sqrt(np.diag(w @ w.T))
    with_data, second, left = np.zeros_like(w), np.zeros((h, h)), 0.0
    for y in x:
        candidates = np.argsort(w @ y / lengths)[-H_PRIME:]
        images = states @ w[candidates]
        distances = np.concatenate([[y @ y], np.square(w - y).sum(1), np.square(images - y).sum(1)])
        log_joint = log_prior - distances / (2 * noise)
        q = np.exp(log_joint - log_joint.max())
        q /= q.sum()
        means = q[1 : 1 + h].copy()
        moments = np.diag(means)
        together = q[1 + h :]
        means[candidates] += together @ states
        moments[np.ix_(candidates, candidates)] += (states.T * together) @ states
        with_data += np.outer(means, y)
        second += moments
        left += q @ distances
    return np.linalg.lstsq(second, with_data, rcond=None)[0]


def measure(options: Options) -> list[Row]:
    """One step of both, in turns; the loop of the peer takes long, so that few rounds must do."""
    points, dimensions, causes = SIZES["quick" if options.quick else "full"]
    model, x, parameters = problem(points, dimensions, causes)
    data = x.numpy()
    theirs: Callable[[np.ndarray, dict[str, Tensor]], np.ndarray] = point_by_point
    peer = "a loop over points"
    if _CHECKOUT is not None:
        theirs, peer = of_prosper(_CHECKOUT), "ProSper"
    results: dict[str, Any] = {}
    runs = {
        "ours": lambda: results.update(ours=ours(model, x, parameters)),
        "theirs": lambda: results.update(theirs=theirs(data, parameters)),
    }
    runs["ours"]()
    timings = interleave(runs, repeats=3, warmup=0)
    states = len(model.table.states)
    case = f"{points} points, {dimensions} dimensions, {causes} causes, {states} combinations, a step of BSC in float64"
    row = paired("truncated EM", case, timings["ours"], peer, timings["theirs"], BAR)
    apart = np.abs(results["ours"] - results["theirs"]).max() / np.abs(results["theirs"]).max()
    return [replace(row, note=f"components differ by {apart:.0e} at most")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--prosper", type=Path)
    found, others = parser.parse_known_args()
    _CHECKOUT = found.prosper
    sys.argv[1:] = others
    main(measure)
