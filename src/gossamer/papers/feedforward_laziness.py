"""Rich and lazy learning in a feed-forward network: digits through a middle layer of one norm and different ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gossamer.core.effective_rank import effective_rank, truncate_rank
from gossamer.core.randomness import generator_for
from gossamer.measure.laziness import LazinessProbe
from gossamer.papers.digits import Digits, digits
from gossamer.papers.sparse_runs import cross_entropy
from gossamer.training.rich_lazy import gaussian

BATCH = 32
MIDDLE = "4.weight"


def network(width: int, rank: int, seed: int) -> nn.Sequential:
    """Pixels at half resolution, two hidden layers of equal width; the weights between them have the rank."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        ends = [nn.Linear(14 * 14, width), nn.Linear(width, width, bias=False), nn.Linear(width, 10)]
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), ends[0], nn.ReLU(), ends[1], nn.ReLU(), ends[2])
    full = gaussian(width, 2**0.5, generator_for("middle weights", seed))
    with torch.no_grad():
        model[4].weight.copy_(truncate_rank(full, rank))
    return model


def feedforward_laziness(own: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Rows of networks that have reached one loss on held-out digits, as of the recurrent ones.

    Parameters
    ----------
    own
        ``width``, ``ranks``, ``target`` (loss), ``steps``, ``rate`` and ``probe`` (images).
    seed
        Of everything.
    """
    training, held_out = digits().split(400, seed)
    rows = []
    for rank in own["ranks"]:
        model = network(own["width"], rank, seed)
        before = model[4].weight.detach().clone()
        probe = LazinessProbe(
            model, held_out.images[:: len(held_out) // own["probe"]], [MIDDLE], lambda net, x: net[:6](x)
        )
        probe.start()
        steps = _train_until(model, training, held_out, own, seed)
        rows.append(
            {
                "task": "digits, feed-forward",
                "first weights": f"rank {rank}",
                "effective rank": effective_rank(before),
                "norm": float(before.norm()),
                "masked": False,
                "steps": steps,
                "rate": own["rate"],
                **(probe.stop() if steps >= 0 else {}),
            }
        )
    return rows


def _train_until(model: nn.Sequential, training: Digits, held_out: Digits, own: dict[str, Any], seed: int) -> int:
    """SGD with momentum until the loss is low enough; how many steps that took, or −1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=own["rate"], momentum=0.9)
    generator = generator_for("batches of digits", seed)
    for step in range(own["steps"] + 1):
        if step % 20 == 0 and cross_entropy(model, held_out) <= own["target"]:
            return step
        rows = torch.randint(len(training), (BATCH,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(training.images[rows]), training.labels[rows]).backward()
        optimizer.step()
    return -1
