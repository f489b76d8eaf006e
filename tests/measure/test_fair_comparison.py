"""Twenty planted faults, each of which breaks exactly one rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.core.taxonomy import Taxonomy
from gossamer.errors import ConfigurationError, UnfairComparisonError
from gossamer.measure.fair_comparison import Contestant, check_comparison, compare, needed_overhead


def axes(**changes) -> Taxonomy:
    given = {
        "timing": "during training",
        "path": ("sparse-to-sparse",),
        "topology": "static",
        "criterion": ("random",),
        "allocation": "erdos-renyi",
        "patterns": ("unstructured",),
        "aims": ("training", "inference"),
    }
    return Taxonomy(**given | changes)


RIGL = axes(topology="dynamic", criterion=("magnitude", "gradient"))
PRUNED = axes(timing="after training", path=("dense-to-sparse",), criterion=("magnitude",), allocation="global")
CHANNELS = replace(PRUNED, patterns=("channels",))


def clean() -> dict[str, Contestant]:
    common = {"quality": (0.9, 0.91, 0.92), "parameters": 1e5, "epochs": 100, "training_flops": 1e12, "tried": 5}
    sparse = common | {"sparsity": 0.9, "overhead": ("masks", "dense copy", "dense gradients")}
    return {
        "small dense": Contestant(name="small dense", **common),
        "random": Contestant(name="random", taxonomy=axes(timing="before training"), **sparse),
        "RigL": Contestant(name="RigL", taxonomy=RIGL, **sparse),
        "pruned": Contestant(
            name="pruned",
            taxonomy=PRUNED,
            phases=("dense training", "retraining"),
            included=("dense training", "retraining"),
            **sparse,
        ),
    }


PLANTED = {
    "another sparsity": ("R1", "RigL", {"sparsity": 0.8}),
    "another denominator": ("R1", "RigL", {"counted": "all parameters"}),
    "twice the operations": ("R2", "RigL", {"training_flops": 2e12}),
    "half the operations": ("R2", "RigL", {"training_flops": 5e11}),
    "dense training left out": ("R2", "pruned", {"included": ("retraining",)}),
    "only the last of its cycles": (
        "R2",
        "pruned",
        {"phases": ("dense training", "earlier cycles", "last cycle"), "included": ("dense training", "last cycle")},
    ),
    "dense training passed over": ("R2", "pruned", {"phases": ("retraining",), "included": ("retraining",)}),
    "a pretrained start": ("R3", "RigL", {"pretrained": "resnet50"}),
    "no small dense network": ("R4", "", {"parameters": 1e6}),
    "random without a rule": ("R4", "", {"taxonomy": axes(allocation="uniform")}),
    "channels without latency": ("R5", "pruned", {"taxonomy": CHANNELS}),
    "channels at another latency": ("R5", "pruned", {"taxonomy": CHANNELS, "latency": 0.002, "device": "2 cores"}),
    "channels elsewhere": ("R5", "pruned", {"taxonomy": CHANNELS, "latency": 0.001, "device": "a GPU"}),
    "operations as time": ("R6", "RigL", {"speedup": 10.0, "speedup_of": "operations", "speedup_called": "time"}),
    "faster on nothing": ("R6", "RigL", {"speedup": 2.0}),
    "two seeds": ("R7", "RigL", {"quality": (0.9, 0.95)}),
    "tuned more than dense": ("R8", "RigL", {"tried": 30}),
    "no masks": ("R9", "random", {"overhead": ()}),
    "no dense gradients": ("R9", "RigL", {"overhead": ("masks", "dense copy")}),
    "robust, it is said": ("R10", "RigL", {"claimed": ("robustness",)}),
}
AT_FAULT = {"no small dense network": "small dense", "random without a rule": "random"}
NEEDS_LATENCY = {"channels at another latency", "channels elsewhere"}


def planted(case: str) -> list[Contestant]:
    contestants = clean()
    if case in NEEDS_LATENCY:
        contestants = {n: replace(one, latency=0.001, device="2 cores") for n, one in contestants.items()}
    _, name, changes = PLANTED[case]
    name = AT_FAULT.get(case, name)
    contestants[name] = replace(contestants[name], **changes)
    return list(contestants.values())


def test_a_clean_comparison_breaks_nothing():
    assert check_comparison(list(clean().values())) == []


@pytest.mark.parametrize("case", PLANTED)
def test_each_fault_breaks_exactly_its_rule(case):
    rule, name, _ = PLANTED[case]
    assert [(found.rule, found.name) for found in check_comparison(planted(case))] == [(rule, name)]


def test_equal_latency_lets_channels_beside_single_weights():
    contestants = [replace(one, latency=0.001, device="2 cores") for one in clean().values()]
    contestants[3] = replace(contestants[3], taxonomy=CHANNELS, sparsity=0.5)
    assert check_comparison(contestants, budget="latency") == []
    assert [found.rule for found in check_comparison(contestants)] == ["R1"]


def test_what_is_broken_is_refused_with_every_reason_unless_forced():
    contestants = planted("two seeds")
    contestants[1] = replace(contestants[1], overhead=())
    with pytest.raises(UnfairComparisonError, match=r"R7: RigL has 2 seeds.*R9: random does not count its masks"):
        compare(contestants)
    assert compare(contestants, force=True)[0].name == "RigL"


def test_the_best_are_all_that_nothing_beats_in_quality_and_cost():
    cheap, good, bad = (
        replace(clean()["RigL"], name=name, quality=(q,) * 3, training_flops=f)
        for name, q, f in [("cheap", 0.8, 1e11), ("good", 0.9, 1e12), ("bad", 0.7, 1e12)]
    )
    assert [one.name for one in compare([bad, cheap, good], force=True)] == ["good", "cheap"]


def test_layers_that_store_no_zeros_need_no_dense_copy():
    assert needed_overhead(PRUNED) == {"masks"}
    assert needed_overhead(RIGL) == {"masks", "dense gradients"}
    stored = replace(clean()["random"], overhead=("indices",))
    contestants = clean() | {"random": stored}
    assert check_comparison(list(contestants.values())) == []


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_a_comparison_needs_two_names(names):
    with pytest.raises(ConfigurationError, match="at least two"):
        check_comparison([replace(clean()["RigL"], name=name) for name in names])


def test_an_unknown_budget_is_refused():
    with pytest.raises(ConfigurationError, match="budget is 'luck'"):
        check_comparison(list(clean().values()), budget="luck")
