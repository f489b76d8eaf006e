from __future__ import annotations

import pytest

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.measure.report_card import BUDGETS, Run, observed_card, report_card
from gossamer.measure.training_cost import TrainingCost


def cost(**changes):
    values = dict.fromkeys(TrainingCost.__dataclass_fields__, 1000) | {"unit": "tokens", "counted": "all parameters"}
    return TrainingCost(**values | changes)


def test_equal_budgets_pass_and_the_table_has_quality_beside_price():
    card = report_card(
        [Run("dense", [2.0, 2.2], cost()), Run("sparse", [1.9, 2.0], cost(active_parameters=250))], "loss"
    )
    page = str(card)
    assert card.differences == {}
    assert "loss" in page
    assert "2.1 ± 0.14" in page
    assert "250" in page
    assert "≠" not in page
    assert all(len(line) <= 200 for line in page.splitlines())


def test_unequal_budgets_are_refused_by_name():
    runs = [Run("dense", 2.0, cost()), Run("longer", 1.5, cost(units=1200))]
    with pytest.raises(ConfigurationError, match=r"'longer' has 1.2 times the tokens or samples of 'dense', beyond 5%"):
        report_card(runs)
    assert report_card(runs, tolerance=0.2).differences == {}
    assert report_card(runs, equal=("training_flops",)).differences == {}


def test_unequal_budgets_are_marked_where_that_is_wanted():
    runs = [Run("dense", 2.0, cost()), Run("cheap", 2.1, cost(training_flops=400))]
    card = report_card(runs, unequal="mark")
    assert card.differences == {"cheap": {"training_flops": 0.4}}
    assert "≠ 400" in str(card)
    assert "not the same budget" in str(card)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_can_be_held_equal_and_is_marked_in_the_table(budget):
    card = report_card(
        [Run("one", 1.0, cost()), Run("two", 1.0, cost(**{budget: 3000}))], equal=(budget,), unequal="mark"
    )
    assert list(card.differences["two"]) == [budget]
    assert str(card).count("≠") == 2  # beside the number, and in the caption


def test_budgets_are_means_over_seeds():
    run = Run("noisy", [1.0, 2.0], [cost(seconds=10), cost(seconds=30)])
    assert run.cost("seconds") == 20


def test_a_budget_of_nothing_differs_from_any():
    card = report_card([Run("one", 1.0, cost(steps=0)), Run("two", 1.0, cost())], equal=("steps",), unequal="mark")
    assert card.differences["two"]["steps"] == float("inf")


def test_a_card_comes_from_observations():
    observations = [
        {"runs": {n: {"quality": q + seed, "cost": cost().to_dict()} for n, q in (("a", 1.0), ("b", 2.0))}}
        for seed in range(2)
    ]
    observations[1]["runs"]["only once"] = observations[0]["runs"]["a"]
    card = observed_card(observations, "loss")
    assert [run.name for run in card.runs] == ["a", "b"]
    assert card.runs[1].quality == (2.0, 3.0)
    assert card.equal == ("training_flops", "units")
    observations[0]["equal"] = ["steps"]
    assert observed_card(observations).equal == ("steps",)
    assert observed_card([]) is None
    assert observed_card([{"points": 3}]) is None


def test_comparisons_without_sense_are_refused():
    one = Run("one", 1.0, cost())
    with pytest.raises(ConfigurationError, match="at least two runs"):
        report_card([one])
    with pytest.raises(ConfigurationError, match="at least two runs of different names"):
        report_card([one, one])
    with pytest.raises(ConfigurationError, match="budget 'money' is unknown"):
        report_card([one, Run("two", 1.0, cost())], equal=("money",))
    with pytest.raises(ConfigurationError, match="count different things"):
        report_card([one, Run("two", 1.0, cost(counted="the weights that pruning may touch"))])
    with pytest.raises(ConfigurationError, match="tolerance is -1"):
        report_card([one, Run("two", 1.0, cost())], tolerance=-1)
    with pytest.raises(ConfigurationError, match="'refuse' or 'mark'"):
        report_card([one, Run("two", 1.0, cost())], unequal="ignore")
    with pytest.raises(ConfigurationError, match="at least one of each"):
        Run("empty", [], cost())
    with pytest.raises(NonFiniteError, match="diverged"):
        Run("lost", [float("nan")], cost())
