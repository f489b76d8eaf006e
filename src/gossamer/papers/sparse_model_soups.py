"""Sparse model soups: is the mean of copies retrained from one pruned network better than any of them, at no density?

Two trained networks, one with batch norm, are pruned in three phases to several sparsities: as soups of one to five
copies; and at the price of the soup of five: retrained five times longer, five times of which the best is kept, and
with a soup at the end only. All are judged by digits that nothing has been chosen by, as they are and corrupted by
noise, blur and loss of contrast. Controls: means of networks with different masks, means whose batch norm was not
measured anew, copies driven apart by too high a learning rate, copies that differ in weight decay, weight averaging
along one run, the ensemble of all answers; and gradual pruning, pruning with feedback and budgeted pruning as soups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from gossamer.core.averaging import average_models
from gossamer.core.masks import MaskSet
from gossamer.core.retraining_rates import retraining_rates
from gossamer.measure.mode_connectivity import barrier, error_rate
from gossamer.measure.soups import corrupted_accuracy, quality, soup_geometry
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.image_soups import Retraining, SoupTask, prune_while_training
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.pruning.soup_baselines import average_at_end, average_regardless, budgeted, longer, soup_of_frozen
from gossamer.pruning.soup_branches import Branch, branch_seed
from gossamer.pruning.soup_mixing import mix, with_state
from gossamer.pruning.sparse_model_soups import SoupResult, SparseModelSoup
from gossamer.training.dpf import DynamicPruningWithFeedback
from gossamer.training.gmp import GradualMagnitudePruning

QUICK: dict[str, Any] = {
    "networks": {"perceptron": [0.95, 0.98], "convolutional": [0.9]},
    # few images, seen five times in each phase: where copies of a model have something to learn from one another is
    # where training is long for its data, as in the paper
    "training_images": 100,
    "validation_images": 50,
    "batch": 32,
    "pretraining_steps": 400,
    "learning_rate": 0.1,
    "phases": 3,
    "steps": 150,
    "models": [1, 5],
    "compared": ["perceptron"],
    "controls": ["perceptron, 0.98"],
    "too_high": 4.0,
}
FULL: dict[str, Any] = {
    **QUICK,
    "networks": {"perceptron": [0.9, 0.95, 0.98], "convolutional": [0.9, 0.95, 0.98]},
    "controls": ["perceptron, 0.98", "convolutional, 0.98"],
    "compared": ["perceptron", "convolutional"],
    "pretraining_steps": 2000,
    "steps": 300,
    "models": [1, 3, 5, 10],
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracies of everything, on clean and on corrupted digits, by network and sparsity."""
    task = SoupTask.drawn(settings["training_images"], settings["validation_images"], settings["batch"], seed)
    observed: Observation = {"clean": {}, "corrupted": {}, "other": {}}
    for network, sparsities in settings["networks"].items():
        model, rates = task.pretrain(network, settings["pretraining_steps"], settings["learning_rate"], seed)
        _mark(observed, task, f"dense, {network}, 0", model)
        for sparsity in progress(sparsities, network):
            place = f"{network}, {sparsity}"
            bench = _Bench(settings, task, model, rates, sparsity, seed)
            five = _soups(observed, bench, place)
            _rivals(observed, bench, place)
            _look_inside(observed, bench, place, five)
            if place in settings["controls"]:
                _controls(observed, bench, place)
                _while_training(observed, bench, place)
    return {**observed, "curves": _curves(observed, settings)}


class _Bench:
    """One network and sparsity, and how soups are made of it."""

    def __init__(
        self, settings: dict[str, Any], task: SoupTask, model: nn.Module, rates: list[float], sparsity: float, seed: int
    ):
        self.settings, self.task, self.model, self.sparsity, self.seed = settings, task, model, sparsity, seed
        self.retraining = Retraining(task.training, task.batch)
        self.options = {"evaluate": task.score, "batches": task.batches()}
        self.most = max(count for count in settings["models"] if count <= 5)
        self.method = SparseModelSoup(
            sparsity=sparsity,
            phases=settings["phases"],
            n_models=self.most,
            steps=settings["steps"],
            rates=rates,
            seed=seed,
        )

    def fit(self, method: SparseModelSoup, retraining: Retraining | None = None) -> SoupResult:
        """Run a method on the trained network."""
        return method.fit(self.model, retraining or self.retraining, **self.options)


def _soups(observed: Observation, bench: _Bench, place: str) -> SoupResult:
    """Soups of several sizes; the one that decides is returned."""
    found = {}
    for count in bench.settings["models"]:
        found[count] = bench.fit(replace(bench.method, n_models=count))
        _mark(observed, bench.task, f"soup of {count}, {place}", found[count].model)
    return found[bench.most]


def _rivals(observed: Observation, bench: _Bench, place: str) -> None:
    """What else the steps of the soup buy."""
    task = bench.task
    _mark(observed, task, f"longer, {place}", bench.fit(longer(bench.method)).model)
    if place.split(", ")[0] not in bench.settings["compared"]:
        return
    _mark(observed, task, f"soup at the end, {place}", bench.fit(average_at_end(bench.method)).model)
    single = [
        replace(bench.method, n_models=1, seed=branch_seed(bench.seed, 99, number)) for number in range(bench.most)
    ]
    runs = [bench.fit(each) for each in single]
    best = max(runs, key=lambda result: task.score(result.model))
    _mark(observed, task, f"best of several, {place}", best.model)


def _look_inside(observed: Observation, bench: _Bench, place: str, soup: SoupResult) -> None:
    """The candidates of the last phase, their ensemble, what they are as a mean without batch norm, and their shape."""
    task, candidates = bench.task, soup.candidates()
    for number, candidate in enumerate(candidates):
        _mark(observed, task, f"candidate {number}, {place}", candidate)
    _mark(observed, task, f"ensemble, {place}", candidates)
    stale = average_models(candidates, masks=soup.masks)
    _mark(observed, task, f"without recalibration, {place}", stale)
    last = soup.phases[-1]
    greedy = mix("greedy", bench.model, soup.masks, last.candidates, task.score, task.batches())
    _mark(observed, task, f"greedy, {place}", with_state(bench.model, greedy.state))
    other = observed["other"]
    geometry = soup_geometry(candidates)
    other[f"distance, {place}"], other[f"angle, {place}"] = geometry.distance.mean, geometry.angle.mean
    other[f"barrier, {place}"] = _barrier(bench, candidates)
    same = all(MaskSet.from_model(each, soup.masks) == soup.masks for each in [soup.model, *candidates])
    other[f"zeros kept, {place}"] = float(same)


def _barrier(bench: _Bench, candidates: list[nn.Module]) -> float:
    """Barrier of the training error between the first two candidates, in per cent."""
    data = bench.task.training
    batches = list(zip(data.images[::4].split(400), data.labels[::4].split(400)))
    found = barrier(bench.model, candidates[0], candidates[1], error_rate, batches, n=5, refine=0)
    return 100 * found.height


def _controls(observed: Observation, bench: _Bench, place: str) -> None:
    """Other things to vary, weights averaged along one run, and copies that leave their basin."""
    task, count = bench.task, bench.most
    decays = [1e-5 * 10 ** (2 * number / max(1, count - 1)) for number in range(count)]
    varied = replace(bench.method, vary="weight_decay", values=decays)
    _mark(observed, task, f"weight decay varied, {place}", bench.fit(varied).model)
    averaged = Retraining(task.training, task.batch, averaged=True)
    _mark(observed, task, f"averaged along one run, {place}", bench.fit(longer(bench.method), averaged).model)
    blind = [replace(bench.method, phases=1, scope="random", n_models=1, seed=number) for number in range(count)]
    runs = [bench.fit(each) for each in blind]
    naive, _ = average_regardless([result.model for result in runs], task.batches())
    _mark(observed, task, f"different masks, {place}", naive)
    for number, result in enumerate(runs):
        _mark(observed, task, f"one of the different masks {number}, {place}", result.model)
    observed["other"][f"density of different masks, {place}"] = MaskSet.from_model(naive, runs[0].masks).density
    observed["other"][f"density of one of them, {place}"] = runs[0].masks.density
    rates = [rate * bench.settings["too_high"] for rate in bench.method.rates]
    wild = bench.fit(replace(bench.method, phases=1, rates=rates, n_models=min(3, count)))
    _mark(observed, task, f"too high a rate, {place}", wild.model)
    each = [quality(one, task.held_out.images, task.held_out.labels).accuracy for one in wild.candidates()]
    observed["other"][f"candidates at too high a rate, {place}"] = sum(each) / len(each)
    observed["other"][f"barrier at too high a rate, {place}"] = _barrier(bench, wild.candidates())


def _while_training(observed: Observation, bench: _Bench, place: str) -> None:
    """Methods that prune while they train: the stretch after their mask stands, done once and several times over."""
    steps, phases, rate = bench.settings["steps"], bench.settings["phases"], bench.settings["learning_rate"]
    ramp = steps * (phases - 1)
    way = Branch(1, 0, branch_seed(bench.seed, 98, 0), 1e-4, tuple(retraining_rates("ft", [rate / 2], ramp)))
    common = {"sparsity": bench.sparsity, "heads": True, "end": ramp, "seed": bench.seed}
    methods = {
        "gmp": GradualMagnitudePruning(every=5, scope="model", **common),  # type: ignore[arg-type]
        "dpf": DynamicPruningWithFeedback(every=5, **common),  # type: ignore[arg-type]
    }
    rest = replace(bench.method, rates=[rate / 2], warm_up=0.0)
    for name, method in methods.items():
        model, masks = prune_while_training(bench.retraining, bench.model, method, way)
        for count in (1, bench.most):
            result = soup_of_frozen(replace(rest, n_models=count), model, masks, bench.retraining, **bench.options)
            _mark(observed, bench.task, f"{name} as a soup of {count}, {place}", result.model)
    pretrained = bench.settings["pretraining_steps"]
    for count in (1, bench.most):
        total = pretrained + steps * phases
        method = budgeted(
            total,
            bench.method.rates,
            phases=phases,
            pretrained=pretrained,
            sparsity=bench.sparsity,
            n_models=count,
            seed=bench.seed,
        )
        _mark(observed, bench.task, f"bimp as a soup of {count}, {place}", bench.fit(method).model)


def _mark(observed: Observation, task: SoupTask, label: str, model: nn.Module | list[nn.Module]) -> None:
    found = quality(model, task.held_out.images, task.held_out.labels)
    observed["clean"][label] = found.accuracy
    observed["other"][f"ece, {label}"], observed["other"][f"mce, {label}"] = found.ece, found.mce
    observed["other"][f"worst class, {label}"] = found.worst_class
    few = slice(None, None, 5)  # nine sets of every fifth image
    observed["corrupted"][label] = corrupted_accuracy(model, task.held_out.images[few], task.held_out.labels[few])


def _curves(observed: Observation, settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Accuracy over sparsity of the first network."""
    (network, sparsities), curves = next(iter(settings["networks"].items())), {}
    most = max(count for count in settings["models"] if count <= 5)
    for name in ("soup of 1", f"soup of {most}", "longer", "best of several", "ensemble"):
        values = [observed["clean"][f"{name}, {network}, {sparsity}"] for sparsity in sparsities]
        curves[name] = {"x": sparsities, "y": values}
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """Differences in accuracy, in points, averaged over networks and sparsities, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    soup = _deciding(observations[0])
    gains: dict[str, Interval] = {
        "clean, soup − mean candidate": _gap(observations, "clean", soup, "candidate "),
        "corrupted, soup − mean candidate": _gap(observations, "corrupted", soup, "candidate "),
        "clean, soup − one model": _gap(observations, "clean", soup, "soup of 1, "),
        "corrupted, soup − one model": _gap(observations, "corrupted", soup, "soup of 1, "),
    }
    spared = {"clean, soup − longer": _gap(observations, "clean", soup, "longer, ")}
    numbers: dict[str, Interval | float] = {**gains, **spared, **_told(observations, soup)}
    kept = all(value == 1 for o in observations for name, value in o["other"].items() if name.startswith("zeros kept"))
    numbers["share of soups with exactly their candidates' zeros"] = float(kept)
    wrong = [name for name, value in (gains | spared).items() if value.below_zero]
    if wrong or not kept:
        return Verdict("does not hold", f"reversed: {', '.join(wrong) or 'a soup lost zeros'}", numbers)
    unclear = [name for name, value in gains.items() if not value.above_zero]
    if unclear:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(unclear)}", numbers)
    return Verdict("holds", "soups are better than their candidates and than one model, and keep every zero", numbers)


def _deciding(observation: Observation) -> str:
    counts = {int(label.split()[2].rstrip(",")) for label in observation["clean"] if label.startswith("soup of ")}
    return f"soup of {max(count for count in counts if count <= 5)}, "


def _told(observations: list[Observation], soup: str) -> dict[str, Interval | float]:
    """What does not decide."""
    found: dict[str, Interval | float] = {
        "clean, soup − best candidate": _gap(observations, "clean", soup, "candidate ", max),
    }
    names = sorted({label.split(", ")[0] for label in observations[0]["clean"]})
    for name in names:
        if name.startswith(("candidate", "one of the")) or name in ("dense", "soup of 1", "longer", soup.rstrip(", ")):
            continue
        if " as a soup of " in name:
            if not name.endswith(" of 1"):
                single = f"{name.split(' as ')[0]} as a soup of 1, "
                found[f"clean, {name} − of 1"] = _gap(observations, "clean", f"{name}, ", single)
            continue
        found[f"clean, soup − {name}"] = _gap(observations, "clean", soup, f"{name}, ")
    if "different masks" in names:
        difference = _gap(observations, "clean", "different masks, ", "one of the different masks ")
        found["clean, mean of different masks − one of them"] = difference
    for start in ("barrier", "candidates at", "density of", "distance", "angle"):
        for name in sorted(name for name in observations[0]["other"] if name.startswith(start)):
            found[name] = sum(o["other"][name] for o in observations) / len(observations)
    return found


def _gap(
    observations: list[Observation],
    kind: str,
    better: str,
    worse: str,
    merge: Callable[[list[float]], float] = lambda values: sum(values) / len(values),
) -> Interval:
    """Mean over networks and sparsities of a difference in points; several rivals at one place are merged."""
    per_seed = []
    for observed in (observation[kind] for observation in observations):
        found = []
        for label, value in observed.items():
            if not label.startswith(worse) or not label.endswith(tuple("0123456789")):
                continue
            place = ", ".join(label.split(", ")[1:])
            rivals = [v for other, v in observed.items() if other.startswith(worse) and other.endswith(f", {place}")]
            if worse.endswith(" ") and not worse.endswith(", ") and not label.startswith(f"{worse}0,"):
                continue
            found.append(100 * (observed[better + place] - (merge(rivals) if len(rivals) > 1 else value)))
        per_seed.append(sum(found) / len(found))
    return mean_interval(per_seed)


experiment = Experiment(
    slug="sparse-model-soups",
    claim=(
        "The average of copies retrained from one pruned network generalises better, also out of distribution, than "
        "the copies, and pruning on from it improves iterative magnitude pruning, at exactly the same zeros."
    ),
    rule=(
        "holds if, at 95 % over seeds, averaged over two networks and sparsities from 0.9 to 0.98, the soup of five "
        "after three phases has a higher accuracy on held-out digits, clean and corrupted, than the mean of its "
        "candidates and than plain iterative pruning with one model, and every soup has exactly its candidates' zeros; "
        "does not hold if one of these is wholly reversed, or one model retrained five times longer is wholly better"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=4,
    x_label="sparsity",
    y_label="accuracy on held-out digits",
)
