"""Small networks that say which channels of a feed-forward layer a token will open, before they are computed.

Two linear maps with a ReLU between them learn, for each layer, from what went into it whether each channel was active.
Missing an active channel changes the model, so that of all checkpoints the one with the best recall is kept; how many
channels it calls active beyond that decides about speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.core.taps import Listening, Tap, real_tokens
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import run_batch
from gossamer.models.feedforward_search import find_feed_forwards


class ActivationPredictor(nn.Module):
    """Tells from what goes into a layer which of its channels will be active.

    Parameters
    ----------
    d, m
        Width of the input, and number of channels.
    hidden
        Width between the two linear maps.
    threshold
        Probability above which a channel is called active; lower finds more and saves less.
    """

    def __init__(self, d: int, m: int, hidden: int, threshold: float = 0.5):
        super().__init__()
        if min(d, m, hidden) < 1 or not 0 < threshold < 1:
            raise ConfigurationError(
                f"d, m and hidden are {d}, {m} and {hidden}, threshold {threshold}; positive sizes and a threshold "
                f"in (0, 1) are needed"
            )
        self.network = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, m))
        self.threshold = threshold

    def logits(self, x: Tensor) -> Tensor:
        """``(n, d)`` → ``(n, m)``."""
        return self.network(x)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``(n, d)`` → ``(n, m)`` bool."""
        return self.logits(x).sigmoid() > self.threshold


@dataclass(frozen=True)
class PredictorQuality:
    """How a predictor does on tokens that it was not trained on.

    Attributes
    ----------
    recall
        Share of the active channels that it names.
    predicted_sparsity
        Share of all channels that it calls closed.
    true_sparsity
        Share of all channels that are.
    """

    recall: float
    predicted_sparsity: float
    true_sparsity: float


@torch.no_grad()
def predictor_quality(predictor: ActivationPredictor, inputs: Tensor, active: Tensor) -> PredictorQuality:
    """Measure a predictor.

    Parameters
    ----------
    inputs
        ``(n, d)``.
    active
        ``(n, m)`` bool.

    Raises
    ------
    CalibrationError
        If there is no token, or no channel is ever active.
    """
    if not len(inputs) or not bool(active.any()):
        raise CalibrationError(f"{len(inputs)} tokens with {int(active.sum())} active channels; give more of both")
    predicted = torch.cat([predictor(part) for part in inputs.split(4096)])
    found = float((predicted & active).sum(dtype=torch.float64)) / float(active.sum(dtype=torch.float64))
    return PredictorQuality(found, 1 - float(predicted.double().mean()), 1 - float(active.double().mean()))


def collect_activity(
    model: nn.Module, data: Iterable[Any] | Tensor, limit: int = 400_000
) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each feed-forward layer of a model, and which of its channels are active.

    Parameters
    ----------
    model
        Run in evaluation mode.
    data
        Batches; padding is left out.
    limit
        Tokens at most, the first ones; the authors took about 400,000.

    Returns
    -------
    dict
        Name of the layer → inputs ``(tokens, d)`` and activity ``(tokens, m)`` bool.

    Raises
    ------
    CalibrationError
        If there is no data.
    """
    layers = {layer.name: layer for layer in find_feed_forwards(model)}
    read: dict[str, dict[str, list[Tensor]]] = {name: {"inputs": [], "active": []} for name in layers}
    taps, kinds = [], {}
    for name, layer in layers.items():
        for kind, module in (("inputs", layer.inputs[0].module), ("active", layer.down.module)):
            taps.append(Tap(f"{name}: {kind}", module))
            kinds[taps[-1].name] = read[name][kind]

    def see(tap: Tap, values: Tensor, mask: Tensor | None) -> None:
        kept, room = kinds[tap.name], limit - sum(map(len, kinds[tap.name]))
        rows = real_tokens(values, mask)[: max(0, room)]
        kept.append((rows != 0) if tap.name.endswith(": active") else rows.clone())

    with evaluation_mode(model), torch.no_grad(), Listening(model, taps, see):
        for batch in [data] if isinstance(data, Tensor) else data:
            run_batch(model, batch, logits=False)
    if not all(parts["inputs"] for parts in read.values()):
        raise CalibrationError("no data to learn a predictor from; give at least one batch")
    return {name: (torch.cat(parts["inputs"]), torch.cat(parts["active"])) for name, parts in read.items()}


def train_predictor(
    inputs: Tensor,
    active: Tensor,
    hidden: int,
    *,
    epochs: int = 10,
    batch: int = 256,
    learning_rate: float = 1e-3,
    held_out: float = 0.05,
    threshold: float = 0.5,
    positive_weight: float | None = None,
    seed: int = 0,
) -> tuple[ActivationPredictor, PredictorQuality]:
    """Train the predictor of one layer; of the epochs, the one with the best recall on held-out tokens is kept.

    Song et al., 2024, arXiv 2402.13516, appendix on the approximate algorithm: binary cross-entropy on "channel i is
    active", 95 % of the tokens to learn from.

    Parameters
    ----------
    inputs, active
        ``(tokens, d)``, and ``(tokens, m)`` bool.
    hidden
        See :class:`ActivationPredictor`.
    epochs, batch, learning_rate
        Of Adam.
    held_out
        Share of the tokens to judge by, in (0, 1).
    threshold
        See :class:`ActivationPredictor`.
    positive_weight
        What an active channel weighs in the loss; None for 1, the paper's.
    seed
        Of the split, the weights and the order.

    Raises
    ------
    CalibrationError
        If there are too few tokens to split, or no channel is active.
    ConfigurationError
        If a number is out of range.
    """
    if not 0 < held_out < 1 or epochs < 1 or batch < 1:
        raise ConfigurationError(
            f"held_out is {held_out}, epochs {epochs} and batch {batch}; a share in (0, 1) and positive numbers needed"
        )
    generator = generator_for("activation predictor", seed)
    order = torch.randperm(len(inputs), generator=generator)
    cut = max(1, int(held_out * len(inputs)))
    if len(inputs) - cut < 1:
        raise CalibrationError(f"{len(inputs)} tokens are too few to learn from some and be judged by others")
    judged, learned = order[:cut], order[cut:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        predictor = ActivationPredictor(inputs.shape[1], active.shape[1], hidden, threshold).to(inputs.device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=learning_rate)
    weight = None if positive_weight is None else torch.tensor(positive_weight, device=inputs.device)
    best: tuple[PredictorQuality, dict[str, Tensor]] | None = None
    for _ in range(epochs):
        for rows in learned[torch.randperm(len(learned), generator=generator)].split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(
                predictor.logits(inputs[rows].float()), active[rows].float(), pos_weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quality = predictor_quality(predictor, inputs[judged].float(), active[judged])
        if best is None or quality.recall > best[0].recall:
            best = quality, {name: value.clone() for name, value in predictor.state_dict().items()}
    assert best is not None
    predictor.load_state_dict(best[1])
    return predictor.eval(), best[0]
