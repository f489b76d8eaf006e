"""Four retrained copies of a pruned network on two cores, beside the same copies one after the other.

A pruned convolutional network is retrained four times on random images, once in two worker processes and once here.
The whole of :meth:`SparseModelSoup.fit` is timed, with the start of the processes and the averaging; each worker has
one thread. Two peers: the same run with one job, whose result is the same bit for bit, and with one job and as many
threads as there are workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Options, Row, main, paired
from gossamer.core.masks import MaskSet
from gossamer.measure import interleave
from gossamer.pruning.soup_branches import Branch
from gossamer.pruning.sparse_model_soups import SoupResult, SparseModelSoup

BRANCHES, WORKERS = 4, 2


def retrain(model: nn.Module, masks: MaskSet, branch: Branch) -> None:
    """Steps of SGD on images that the branch draws itself, so that none have to be sent."""
    generator = torch.Generator().manual_seed(branch.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=branch.weight_decay)
    model.train()
    for rate in branch.rates:
        images = torch.randn(64, 1, 28, 28, generator=generator)
        labels = torch.randint(0, 10, (64,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def network() -> nn.Sequential:
    """Three convolutions with batch norm, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def measure(options: Options) -> list[Row]:
    """Times of the whole."""
    # as long as the shortest retraining worth the name, so that the start of the workers is what it is in use
    steps, repeats = (3, 1) if options.quick else (600, 1)
    model, batches = network(), [torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))]

    def fit(steps: int = steps, **where: Any) -> Callable[[], SoupResult]:
        method = SparseModelSoup(sparsity=0.9, phases=1, n_models=BRANCHES, steps=steps)
        return lambda: method.fit(model, retrain, batches=batches, **where)

    _check_equal(fit(3, n_jobs=WORKERS)(), fit(3)())
    contenders = {"ours": fit(n_jobs=WORKERS), "one": fit(), "threads": fit(threads=WORKERS)}
    timings = interleave(contenders, repeats=repeats, warmup=0)
    case = f"{BRANCHES} branches of {steps} steps, start of {WORKERS} processes included"
    peers = {"one": "one after the other, one thread", "threads": f"one after the other, {WORKERS} threads"}
    note = "equal results bit for bit"
    return [
        paired("sparse model soup", case, timings["ours"], peers["one"], timings["one"], 1.7, note=note),
        paired("sparse model soup", case, timings["ours"], peers["threads"], timings["threads"], 1.0),
    ]


def _check_equal(one: SoupResult, other: SoupResult) -> None:
    states = one.model.state_dict(), other.model.state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


if __name__ == "__main__":
    main(measure)
