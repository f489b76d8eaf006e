"""What wrong labels and worse images do to networks that keep few activations, and to others that are like them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from gossamer.activations.lazy_neuron import TopKTransformer, activation_taps, noisy_labels
from gossamer.core.penalties import ActivationPenalty
from gossamer.core.randomness import generator_for
from gossamer.measure.activation_density import activation_density
from gossamer.measure.corruptions import corrupt
from gossamer.measure.robustness import calibration_error
from gossamer.models.activation_functions import TopKActivation
from gossamer.papers.digits import Digits
from gossamer.papers.experiment import Track
from gossamer.papers.lazy_conditions import CLASSES, drawn
from gossamer.papers.lazy_networks import PatchNetwork, impulse_noise, perceptron, shot_noise

METHODS = ("ReLU", "top-k", "dropout", "L1")
PATCHES: tuple[Literal["transformer", "mixer"], ...] = ("transformer", "mixer")
BINS = 15


def optimizer_of(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam where there is none; no weight decay, which would silence neurons by itself."""
    rate, momentum = settings["learning_rate"], settings["momentum"]
    if momentum is None:
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, fused=True)


def noise(
    settings: dict[str, Any], training: Digits, held_out: Digits, seed: int, progress: Track
) -> dict[str, dict[str, float]]:
    """Accuracy on clean and on worse images, and calibration, of perceptrons trained by each method.

    Parameters
    ----------
    settings
        Of the experiment.
    training, held_out
        Digits.
    seed
        Of weights, batches and wrong labels.
    progress
        Tells how far it is.

    Returns
    -------
    dict
        By method and share of wrong labels.
    """
    own = settings["noise"]
    found = {}
    cases = [(method, share) for share in own["shares"] for method in METHODS]
    for method, share in progress(cases, "noise"):
        labels = noisy_labels(training.labels, share, CLASSES, seed)
        model = _trained(method, Digits(training.images, labels), own, settings, seed)
        found[f"{method} at {share:g}"] = _quality(model, held_out, seed)
    return found


def noise_in_patches(
    settings: dict[str, Any], training: Digits, held_out: Digits, seed: int, progress: Track
) -> dict[str, dict[str, float]]:
    """The same of transformers and mixers of patches, with ReLU and with top-k in its place; see :func:`noise`."""
    own, ratio = {**settings, **settings["architectures"]}, settings["noise"]["ratio"]
    cases = [(kind, method, share) for kind in PATCHES for share in own["shares"] for method in METHODS[:2]]
    found = {}
    for kind, method, share in progress(cases, "noise: patches"):
        torch.manual_seed(seed)
        model = PatchNetwork(kind, own["layers"], own["width"])
        if method == "top-k":
            TopKTransformer(ratio=ratio).install(model)
        labels = noisy_labels(training.labels, share, CLASSES, seed)
        _learn(model, Digits(training.images, labels), own, seed)
        found[f"{kind} of patches, {method} at {share:g}"] = _quality(model, held_out, seed)
    return found


def _trained(method: str, data: Digits, own: dict[str, Any], settings: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = perceptron(own["width"], dropout=own["dropout"] if method == "dropout" else 0.0)
    if method == "top-k":
        model[[type(layer) for layer in model].index(nn.ReLU)] = TopKActivation(ratio=own["ratio"])
    penalty = ActivationPenalty(model, activation_taps(model), "l1", weight=own["l1"]) if method == "L1" else None
    _learn(model, data, {**settings, "steps": own["steps"]}, seed, penalty)
    if penalty is not None:
        penalty.close()
    return model


def _learn(
    model: nn.Module, data: Digits, settings: dict[str, Any], seed: int, penalty: ActivationPenalty | None = None
) -> None:
    """Train with a rate that falls along a line, and leave the model in evaluation mode."""
    optimizer = optimizer_of(model, settings)
    steps = settings["steps"]
    model.train()
    batches = drawn(data, steps, settings["batch"], generator_for("lazy batches", seed))
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = settings["learning_rate"] * (1 - step / steps)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty.loss()).backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def _quality(model: nn.Module, held_out: Digits, seed: int) -> dict[str, float]:
    generator = generator_for("worse images", seed)
    logits = model(held_out.images).double()
    worse = {
        "Gaussian noise": corrupt(held_out.images, "noise", 2, seed),
        "impulse noise": impulse_noise(held_out.images, 0.2, generator),
        "shot noise": shot_noise(held_out.images, 3.0, generator),
        "blur": corrupt(held_out.images, "blur", 2, seed),
        "contrast": corrupt(held_out.images, "contrast", 2, seed),
    }
    right = {name: 100 * float((model(x).argmax(1) == held_out.labels).double().mean()) for name, x in worse.items()}
    return {
        "accuracy": 100 * float((logits.argmax(1) == held_out.labels).double().mean()),
        **right,
        "corrupted": sum(right.values()) / len(right),
        "calibration error": calibration_error(logits, held_out.labels, bins=BINS),
        "nll": float(functional.cross_entropy(logits, held_out.labels)),
        "density": activation_density(model, held_out.images, activation_taps(model)).density,
    }
