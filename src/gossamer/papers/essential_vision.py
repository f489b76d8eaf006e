"""Essential sparsity of small vision networks: does pretraining without labels leave more weights to remove?

A convolutional network is pretrained on the digits 0 to 4, once by their labels and once by telling how far an image
has been turned, on the same images for as many steps. The smallest weights go in one shot; then it is fine-tuned on
the digits 5 to 9, which it has not seen. An easier task, telling only two of them apart, and random pruning as the
control, start from the supervised network and get the same steps and seeds.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.papers.digits import Digits, DigitTask, digits, pretrain_body
from gossamer.papers.experiment import Track
from gossamer.pruning.essential_sparsity import EssentialSparsityResult, essential_sparsity

OBJECTIVES = ("self-supervised", "supervised")
_PRETRAINING, _FIVE, _TWO = range(5), (5, 6, 7, 8, 9), (5, 6)


def pretraining_objectives(settings: dict[str, Any], tolerance: float, seed: int, progress: Track) -> dict[str, Any]:
    """Essential sparsities and curves of both objectives, of the easier task and of the control.

    Returns
    -------
    dict
        ``es``: sweep → one number a network; ``dense``: sweep → mean accuracy without pruning; ``curves``: sweep →
        mean accuracy against sparsity.
    """
    sweeps: dict[str, list[EssentialSparsityResult]] = {}
    for number in progress(range(settings["networks"]), "vision"):
        own = seed * settings["networks"] + number
        five = _task(settings, digits().only(_FIVE), own)
        two = _task(settings, digits().only(_TWO), own)
        for objective in OBJECTIVES:
            torch.manual_seed(own)
            body = pretrain_body(
                digits().only(_PRETRAINING),
                objective,
                settings["pretraining_steps"],
                settings["pretraining_batch"],
                settings["learning_rate"],
            )
            sweeps.setdefault(objective, []).append(_sweep(settings, body, five, tolerance, own))
        # the body of the last objective, the supervised one
        sweeps.setdefault("two digits", []).append(_sweep(settings, body, two, tolerance, own))
        sweeps.setdefault("random", []).append(_sweep(settings, body, five, tolerance, own, score="random"))
    x = [0.0, *settings["sparsities"]]
    return {
        "es": {name: [sweep.es for sweep in found] for name, found in sweeps.items()},
        "dense": {name: float(np.mean([sweep.quality[0, 0] for sweep in found])) for name, found in sweeps.items()},
        "curves": {
            name: {"x": x, "y": np.mean([sweep.quality[0] for sweep in found], 0).tolist()}
            for name, found in sweeps.items()
        },
    }


def _task(settings: dict[str, Any], data: Digits, seed: int) -> DigitTask:
    training, held_out = data.split(settings["training_images"], seed)
    return DigitTask(
        training, held_out, settings["finetuning_steps"], settings["finetuning_batch"], settings["learning_rate"]
    )


def _sweep(
    settings: dict[str, Any], body: nn.Module, task: DigitTask, tolerance: float, seed: int, score: str = "magnitude"
) -> EssentialSparsityResult:
    torch.manual_seed(seed)
    # the new head is the last layer and therefore no target
    model = nn.Sequential(copy.deepcopy(body), nn.Linear(64, int(task.training.labels.max()) + 1))
    return essential_sparsity(
        model,
        task.accuracy,
        sparsities=settings["sparsities"],
        tolerance=tolerance,
        score=score,
        finetune=task.finetune,
        seeds=(seed,),
        monotone=True,
    )
