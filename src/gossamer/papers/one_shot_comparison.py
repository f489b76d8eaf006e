"""What the experiments have in common that set one-shot pruners side by side on a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import find_targets
from gossamer.measure import perplexity
from gossamer.models import calibration_batches, evaluation_tokens, load, read_text
from gossamer.papers.experiment import Observation
from gossamer.papers.statistics import Interval, paired_difference
from gossamer.pruning.base import LayerwisePruner


@dataclass(frozen=True)
class Contest:
    """A language model that every contender prunes anew, on the same data, and that the same held-out text judges.

    Attributes
    ----------
    model, tokenizer
        What is pruned; dense whenever no contender is at work.
    text
        What the calibration windows are drawn from.
    held_out
        ``(1, n)`` token ids.
    length, window
        Tokens of a calibration window, and of a window in which perplexity is measured.
    seed
        Draws the calibration windows.
    """

    model: nn.Module
    tokenizer: Any
    text: str
    held_out: Tensor
    length: int
    window: int
    seed: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], seed: int) -> Contest:
        """Load what a budget names: ``model``, ``calibration``, ``held_out``, ``tokens``, ``length``, ``window``."""
        loaded = load(settings["model"], dtype="float32")
        held_out = stretch(read_text(settings["held_out"]), loaded.tokenizer, settings["tokens"], seed)
        text = read_text(settings["calibration"])
        return cls(loaded.model, loaded.tokenizer, text, held_out, settings["length"], settings["window"], seed)

    def windows(self, count: int) -> list[Tensor]:
        """Calibration windows, each a batch of one."""
        return calibration_batches(self.text, self.tokenizer, count, self.length, self.seed)

    def nll(self, model: nn.Module | None = None) -> float:
        """Log perplexity of the held-out stretch, of the model or of a copy of it."""
        measured = self.model if model is None else model
        return perplexity(measured, self.held_out, self.window, self.window, progress=False).nll_per_token

    def enter(self, pruner: LayerwisePruner, windows: Sequence[Tensor]) -> dict[str, float]:
        """Prune, measure, and put the dense weights back.

        Returns
        -------
        dict
            ``nll``, ``sparsity``, ``selection seconds`` (statistics included), and ``total seconds``.
        """
        with dense_again(self.model):
            result = pruner.prune(self.model, windows if pruner.needs_data else None, progress=False)
            spent = result.seconds
            return {
                "nll": self.nll(),
                "sparsity": result.sparsity,
                "selection seconds": spent["selection"] + spent["statistics"],
                "total seconds": spent["total"],
            }


def stretch(text: str, tokenizer: Any, count: int, seed: int) -> Tensor:
    """Return `count` tokens of a text, ``(1, count)``: one of its consecutive stretches, drawn by the seed."""
    ids = evaluation_tokens(text, tokenizer)
    stretches = max(1, ids.shape[1] // count)
    start = count * int(torch.randint(stretches, (), generator=torch.Generator().manual_seed(seed)))
    # what the tokenizer puts first (some models are lost without it) belongs before every stretch
    return torch.cat([ids[:, :1], ids[:, start + 1 : start + count]], dim=1)


@contextmanager
def dense_again(model: nn.Module) -> Iterator[None]:
    """Give the layers of a model that pruners work on their weights back on leaving."""
    parameters = {id(target.parameter): target.parameter for target in find_targets(model)}
    dense = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(dense[key])


def case(method: str, sparsity: float | str, **options: Any) -> list[Any]:
    """A case in the form that a budget keeps: label, method, options. A sparsity may be an N:M pattern."""
    where = {"pattern": sparsity} if isinstance(sparsity, str) else {"sparsity": sparsity}
    extra = "".join(f" {name}={value}" for name, value in options.items())
    return [f"{method}{extra} at {sparsity}", method, {**where, **options}]


def perplexity_curves(
    points: Mapping[str, Mapping[str, float]], cases: Sequence[Sequence[Any]]
) -> dict[str, dict[str, list[float]]]:
    """Method → perplexity over the sparsity reached, from the dense model on, of the cases without other options."""
    curves: dict[str, dict[str, list[float]]] = {}
    plain = [(method, options["sparsity"], label) for label, method, options in cases if set(options) == {"sparsity"}]
    for method, _, label in sorted(plain):
        curve = curves.setdefault(method, {"x": [0.0], "y": [math.exp(points["dense"]["nll"])]})
        curve["x"].append(points[label]["sparsity"])
        curve["y"].append(math.exp(points[label]["nll"]))
    return curves


def gap(observations: Sequence[Observation], worse: str, better: str, measure: str = "nll") -> Interval:
    """How much the first case lies above the second, paired by seed, with its interval."""
    first, second = ([o["points"][label][measure] for o in observations] for label in (worse, better))
    return paired_difference(first, second)


def mean(observations: Sequence[Observation], label: str, measure: str = "nll") -> float:
    """Mean of a measure over the seeds."""
    return sum(o["points"][label][measure] for o in observations) / len(observations)
