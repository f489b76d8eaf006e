"""Delta activations' claim: trained to send only quantised changes, a network of frames computes far less.

A small convolutional network learns which digit moves through a clip, frame by frame with its outputs averaged over
time. Then it is trained on for as long again in several ways: as it is, with a penalty on activations, with delta
activations whose steps are learned, given, or have an ordinary gradient, and not at all but with a threshold on
changes. What counts is the number of products with something else than zero.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.delta_activation import DeltaActivation
from gossamer.activations.delta_cost import StreamCost, delta_ops, frame_ops
from gossamer.activations.delta_layers import products_of_inputs
from gossamer.activations.delta_model import DeltaModel, to_delta, to_threshold
from gossamer.core.penalties import PENALTIES
from gossamer.core.randomness import generator_for
from gossamer.papers.digits import digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.moving_digits import SIDE, Clips, moving_clips
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.papers.textures import textures

SAVING = 2.5  # times fewer live products than frame by frame
LOSS = 1.0  # points of accuracy that may be lost
REMOVED = 0.5  # share of the gain from changes that may be left where nothing is redundant
EXACT = 1e-5

QUICK: dict[str, Any] = {
    "images": 350,
    "clips": 5000,
    "held_out": 500,
    "frames": 2,
    "long": 10,
    "noise": 0.04,
    "channels": [16, 32, 32],
    "hidden": 64,
    "steps": 450,
    "further": 180,
    "batch": 32,
    "learning_rate": 4e-3,
    "rate": 3e-3,
    "rates": [1e-2],
    "theta": 0.4,
    "theta_share": 0.3,
    "spatial": [1e-3, 1e-2],
    "thresholds": [0.3, 0.9],
}
FULL: dict[str, Any] = {**QUICK, "clips": 20_000, "steps": 4000, "further": 3000, "rates": [1e-4, 3e-3, 1e-2, 3e-2]}


def network(channels: list[int], hidden: int) -> nn.Sequential:
    """Strided convolutions with batch norm and two linear layers, from frames ``(n, 1, 24, 24)`` to logits."""
    layers: list[nn.Module] = []
    side = SIDE
    for before, after in zip([1, *channels], channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        side = (side + 1) // 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracy and live products of every way of training."""
    learning, judged = _clips(settings, seed)
    torch.manual_seed(seed)
    start = network(settings["channels"], settings["hidden"])
    _train(start, learning, settings, settings["steps"], seed, _frame_logits(start))
    methods: dict[str, DeltaModel | nn.Module] = {}
    for name, make in progress(list(_contestants(start, settings, learning).items()), "training on"):
        model, logits, penalty = make()
        _train(model, learning, settings, settings["further"], seed, logits, penalty)
        methods[name] = model
    generator = generator_for("controls", seed)
    controls = {"mixed": judged.mixed(generator), "shuffled": judged.shuffled(generator)}
    found = {name: _judge(model, judged, controls) for name, model in methods.items()}
    plain = methods["frame by frame"]
    for threshold in settings["thresholds"]:
        for remember in (True, False):
            name = f"threshold {threshold}" + ("" if remember else ", drifting")
            found[name] = _judge(to_threshold(plain, threshold, remember), judged, controls)
    return {
        "methods": found,
        "exactness": _exactness(methods["delta"], judged),
        "curves": _curves(found),
    }


def _clips(settings: dict[str, Any], seed: int) -> tuple[Clips, Clips]:
    training, held_out = digits().split(settings["images"], seed)
    crops = textures()
    parts = []
    for data, behind, count, frames in (
        (training, crops.training.images, settings["clips"], settings["frames"]),
        (held_out, crops.held_out.images, settings["held_out"], settings["long"]),
    ):
        generator = generator_for(f"clips of {frames}", seed)
        parts.append(moving_clips(data, behind, count, frames, generator, settings["noise"]))
    return parts[0], parts[1]


# ------------------------------------------------------------------------------------------------------- training

Logits = Callable[[Tensor], Tensor]
Made = tuple[nn.Module, Logits, Callable[[], Tensor] | None]


def _frame_logits(model: nn.Module) -> Logits:
    return lambda clips: model(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)


def cycle(step: int, steps: int) -> float:
    """Share of the learning rate: up for a tenth of the steps, then down to zero along a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _train(
    model: nn.Module,
    data: Clips,
    settings: dict[str, Any],
    steps: int,
    seed: int,
    logits: Logits,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    order = torch.randint(len(data.labels), (steps, settings["batch"]), generator=generator_for("batches", seed))

    def loss(rows: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(logits(data.frames[rows]), data.labels[rows])
        return found if penalty is None else found + penalty()

    model.train()
    # Adam would move a step of quantisation as far as its rate allows, however weak the gradient
    steps_of_size = [p for name, p in model.named_parameters() if name.endswith("theta")]
    others = [p for name, p in model.named_parameters() if not name.endswith("theta")]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": steps_of_size, "weight_decay": 0.0}]
    rates = (settings["learning_rate"], settings["learning_rate"] * settings["theta_share"])
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    for step, rows in enumerate(order):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * cycle(step, steps)
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
    model.eval()


def _contestants(start: nn.Module, settings: dict[str, Any], data: Clips) -> dict[str, Callable[[], Made]]:
    example = data.frames[:1, 0]

    def plain(weight: float = 0.0) -> Made:
        model = copy.deepcopy(start)
        return model, _frame_logits(model), _spatial_penalty(model, weight) if weight else None

    def delta(rate: float, **options: Any) -> Made:
        spatial = options.pop("spatial", 0.0)
        model = to_delta(start, example, theta_init=settings["theta"], rate=rate, **options)
        if not spatial:
            return model, lambda clips: model(clips).mean(1), model.penalty
        beside = _spatial_penalty(model, spatial)
        return model, lambda clips: model(clips).mean(1), lambda: model.penalty() + beside()

    rate = settings["rate"]
    found: dict[str, Callable[[], Made]] = {"frame by frame": plain, "delta": lambda: delta(rate)}
    for weight in settings["spatial"]:
        found[f"penalised activations {weight}"] = lambda weight=weight: plain(weight)  # type: ignore[misc]
    for other in settings["rates"]:
        found[f"delta, rate {other}"] = lambda other=other: delta(other)  # type: ignore[misc]
    found["delta, given step"] = lambda: delta(rate, learn_theta=False)
    found["delta, ordinary gradient"] = lambda: delta(rate, theta_gradient=1.0)
    found["delta, penalised activations"] = lambda: delta(rate, spatial=settings["spatial"][0])
    return found


def _spatial_penalty(model: nn.Module, weight: float) -> Callable[[], Tensor]:
    """``weight · Σ fan-out · mean |a|`` of what enters the layers: the loss of delta activations without time."""
    heard: list[Tensor] = []
    fan_outs: dict[nn.Module, float] = {}

    def hear(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering = inputs[0].flatten(1)
        if module not in fan_outs:
            fan_outs[module] = float(products_of_inputs(module, inputs[0]).mean())
        heard.append(fan_outs[module] * PENALTIES["l1"](entering, 0.0).mean() / entering.shape[1])

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[1:]:  # what enters the first is the clip itself
        layer.register_forward_pre_hook(hear)

    def penalty() -> Tensor:
        total = weight * torch.stack(heard).sum()
        heard.clear()
        return total

    return penalty


# ------------------------------------------------------------------------------------------------------ measuring


def _judge(model: nn.Module, judged: Clips, controls: dict[str, Clips]) -> dict[str, Any]:
    """Accuracy, and live products of changes and of states, ordered and not."""
    model.eval()
    _unhook(model)
    logits = model if isinstance(model, DeltaModel) else _per_frame(model)
    with torch.inference_mode():
        hits = torch.cat([logits(part).mean(1).argmax(1) for part in judged.frames.split(100)]) == judged.labels
    found: dict[str, Any] = {"accuracy": float(hits.double().mean())}
    for name, clips in {"ordered": judged, **controls}.items():
        few = clips.frames[:100]
        changes, states = delta_ops(model, few), frame_ops(model, few)
        found[name] = {
            "changes": changes.live_share,
            "states": states.live_share,
            "changes, later frames": changes.later_share,
            "changes after the first layer": _without_first(changes),
            "states after the first layer": _without_first(states),
            "zeros among changes": _mean([layer.zeros or 0.0 for layer in changes.layers]),
        }
    if isinstance(model, DeltaModel):
        steps = [layer for layer in model.activations() if isinstance(layer, DeltaActivation)]
        found["steps"] = [float(layer.theta.detach().abs().mean()) for layer in steps]
        found["numbers to remember"] = changes.state_values
    return found


def _unhook(model: nn.Module) -> None:
    for module in model.modules():
        module._forward_pre_hooks.clear()


def _per_frame(model: nn.Module) -> Logits:
    return lambda clips: model(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


def _without_first(cost: StreamCost) -> float:
    return StreamCost(cost.layers[1:], cost.frames).live_share


@torch.no_grad()
def _exactness(model: nn.Module, judged: Clips) -> dict[str, float]:
    """Largest difference of streamed from dense outputs, relative to the largest output."""
    clip = judged.frames[:20]
    found = {}
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        copied = copy.deepcopy(model).to(dtype)
        assert isinstance(copied, DeltaModel)
        dense = copied(clip.to(dtype))
        copied.reset()
        streamed = torch.stack([copied.step(frame) for frame in clip.to(dtype).unbind(1)], 1)
        found[name] = float((streamed - dense).abs().max() / dense.abs().max())
    return found


def _curves(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Accuracy against live products: of states for networks of frames, of changes for the others."""
    curves: dict[str, dict[str, list[float]]] = {}
    for name, values in found.items():
        label = re.sub(r"(, rate)? [0-9.e-]+", "", name)
        spatial = label in ("frame by frame", "penalised activations")
        curve = curves.setdefault(label, {"x": [], "y": []})
        curve["x"].append(values["ordered"]["states" if spatial else "changes"])
        curve["y"].append(100 * values["accuracy"])
    for curve in curves.values():
        order = sorted(range(len(curve["x"])), key=curve["x"].__getitem__)
        curve.update({axis: [curve[axis][place] for place in order] for axis in ("x", "y")})
    return curves


# -------------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Logarithms of savings, and points of accuracy, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        "log saving against frame by frame, over 2.5": mean_interval(
            [_saving(o, "frame by frame") - math.log(SAVING) for o in observations]
        ),
        "delta − frame by frame + 1 point": mean_interval(
            [100 * (_accuracy(o, "delta") - _accuracy(o, "frame by frame")) + LOSS for o in observations]
        ),
        "log saving against penalised activations": mean_interval([_against_spatial(o) for o in observations]),
        "log gain from changes, ordered": mean_interval([_gain(o, "ordered") for o in observations]),
        "log gain ordered − mixed, over 2": mean_interval(
            [_gain(o, "ordered") - _gain(o, "mixed") + math.log(REMOVED) for o in observations]
        ),
        "exactness allowed − found": mean_interval([EXACT - o["exactness"]["double"] for o in observations]),
    }
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "changes cost far less than frames at hardly any loss, where frames repeat", numbers)


def _accuracy(observation: Observation, name: str) -> float:
    return observation["methods"][name]["accuracy"]


def _saving(observation: Observation, name: str) -> float:
    """Log of live products of another network, frame by frame, over those of delta activations."""
    methods = observation["methods"]
    return math.log(methods[name]["ordered"]["states"] / methods["delta"]["ordered"]["changes"])


def _against_spatial(observation: Observation) -> float:
    """The same against the sparsest network with penalised activations that loses no more than a point."""
    least = _accuracy(observation, "frame by frame") - LOSS / 100
    names = [name for name in observation["methods"] if name.startswith("penalised activations")]
    fit = [name for name in names if _accuracy(observation, name) >= least]
    return min(_saving(observation, name) for name in [*fit, "frame by frame"])


def _gain(observation: Observation, order: str) -> float:
    """Log of how many times as many products the states of the same network take as its changes."""
    row = observation["methods"]["delta"][order]
    return math.log(row["states"] / row["changes"])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for name in observations[0]["methods"]:
        rows = [o["methods"][name] for o in observations]
        numbers[f"{name}, accuracy, %"] = _mean([100 * row["accuracy"] for row in rows])
        for order in ("ordered", "shuffled", "mixed"):
            for kind in rows[0][order]:
                if order == "ordered" or kind in ("changes", "states"):
                    numbers[f"{name}, {order}, {kind}"] = _mean([row[order][kind] for row in rows])
        for place in range(len(rows[0].get("steps", []))):
            numbers[f"{name}, step {place}"] = _mean([row["steps"][place] for row in rows])
    later = [
        math.log(
            o["methods"]["frame by frame"]["ordered"]["states after the first layer"]
            / o["methods"]["delta"]["ordered"]["changes after the first layer"]
        )
        for o in observations
    ]
    numbers["log saving after the first layer"] = mean_interval(later)
    numbers["numbers to remember for a stream"] = observations[0]["methods"]["delta"]["numbers to remember"]
    for name in observations[0]["exactness"]:
        numbers[f"streamed − dense, {name} precision"] = max(o["exactness"][name] for o in observations)
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="delta-activation",
    claim=(
        "Layers that are trained to send only quantised changes of their activations, with steps that are learned, "
        "leave almost three times fewer products to compute on video than a network that skips the zeros of each frame."
    ),
    rule=(
        "holds if, at 95 % over seeds and counting the first frame, delta activations leave at least 2.5 times fewer "
        "live products than the same network frame by frame, at a loss of at most a point of accuracy, fewer than the "
        "sparsest network with penalised activations within that point, and fewer than its own states do; the last "
        "gain at least halves where each frame is from another clip, and streaming equals the dense network to 1e-5 "
        "in double precision; does not hold if one of these is wholly reversed. Given steps, ordinary gradients, "
        "thresholds without training, and shuffled frames are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of products left",
    y_label="accuracy on moving digits, %",
)
