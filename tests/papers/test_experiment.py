from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, OutputError, UnknownNameError
from gossamer.papers import Experiment, Result, Verdict, find_experiment, load_result, paired_difference, reproduce
from gossamer.papers import run_experiment as run
from gossamer.papers.draw import collect_curves
from gossamer.papers.experiment import _sole_writer
from gossamer.papers.results import results_directory


def observe(settings, seed, progress):
    generator = random.Random(seed)
    points = [n / 10 for n in progress(range(1, 4), "points")]
    noise = [generator.gauss(0, 0.01) for _ in points]
    good = [1 - x / 4 + settings["gain"] + e for x, e in zip(points, noise, strict=True)]
    poor = [1 - x + e for x, e in zip(points, noise, strict=True)]
    curves = {"good": {"x": points, "y": good}, "poor": {"x": points, "y": poor}}
    return {"good": good[-1], "poor": poor[-1], "sizes": (1, 2), "curves": curves}


def decide(observations):
    gain = paired_difference([o["good"] for o in observations], [o["poor"] for o in observations])
    outcome = "holds" if gain.above_zero else "does not hold" if gain.below_zero else "inconclusive"
    return Verdict(outcome, f"the gain is {gain}", {"gain": gain, "seeds": len(observations)})


def toy(run=observe, **changes):
    settings = {
        "slug": "wanda",
        "claim": "Good is better than poor.",
        "rule": "holds if the 95% interval of the paired difference lies above zero",
        "run": run,
        "decide": decide,
        "budgets": {"quick": {"gain": 0.0, "sizes": (1, 2)}, "full": {"gain": 1.0, "sizes": (1, 2)}},
    }
    return Experiment(**{**settings, **changes})


def stopping_at(stop, seen):
    def interrupted(settings, seed, progress):
        if seed == stop:
            raise KeyboardInterrupt
        seen.append(seed)
        return observe(settings, seed, progress)

    return interrupted


def without_time(result):
    return {key: value for key, value in result.to_dict().items() if key not in ("seconds", "date")}


def test_result_is_stored_with_all_that_is_needed_to_judge_and_repeat_it(tmp_path):
    result = run(toy(), output=tmp_path, progress=False)
    stored = json.loads((tmp_path / "wanda.json").read_text())
    assert stored["verdict"]["outcome"] == "holds"
    assert stored["verdict"]["numbers"]["gain"]["low"] > 0
    assert stored["seeds"] == [0, 1, 2]
    assert len(stored["observations"]) == 3
    assert stored["settings"]["values"] == {"gain": 0.0, "sizes": [1, 2]}
    assert stored["machine"]["python"]
    assert {"slug", "claim", "rule", "budget", "seconds", "date"} <= stored.keys()
    assert load_result(tmp_path / "wanda.json") == result
    assert (tmp_path / "wanda.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wanda.json", "wanda.png"]


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path, stop):
    seen = []
    (tmp_path / "whole").mkdir()
    whole = run(toy(), output=tmp_path / "whole", progress=False)
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run(toy(stopping_at(stop, seen)), output=part, progress=False)
    assert not (part / "wanda.json").exists()
    resumed = run(toy(stopping_at(None, seen)), output=part, progress=False)
    assert seen == [0, 1, 2]
    assert without_time(resumed) == without_time(whole)
    assert sorted(path.name for path in part.iterdir()) == ["wanda.json", "wanda.png"]


def test_observations_of_another_budget_are_not_reused(tmp_path):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(toy(stopping_at(2, seen)), output=tmp_path, progress=False)
    run(toy(stopping_at(None, seen)), budget="full", output=tmp_path, progress=False)
    assert seen == [0, 1, 0, 1, 2]


def test_more_seeds_extend_a_finished_result_and_fewer_leave_it(tmp_path):
    seen = []
    experiment = toy(stopping_at(None, seen))
    run(experiment, seeds=2, output=tmp_path, progress=False)
    more = run(experiment, seeds=4, output=tmp_path, progress=False)
    assert seen == [0, 1, 2, 3]
    before = (tmp_path / "wanda.json").read_bytes()
    assert run(experiment, seeds=3, output=tmp_path, progress=False) == more
    assert (tmp_path / "wanda.json").read_bytes() == before


def test_an_error_in_a_run_is_not_swallowed_and_keeps_what_was_finished(tmp_path):
    def failing(settings, seed, progress):
        if seed == 1:
            raise ZeroDivisionError("in seed 1")
        return observe(settings, seed, progress)

    with pytest.raises(ZeroDivisionError, match="in seed 1"):
        run(toy(failing), output=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["wanda.partial.json"]


@pytest.mark.parametrize(("gain", "outcome"), [(0.0, "holds"), (-1.0, "does not hold"), (-0.225, "inconclusive")])
def test_verdict_follows_the_rule(tmp_path, gain, outcome):
    def noisy(settings, seed, progress):
        observation = observe(settings, seed, progress)
        observation["good"] += random.Random(seed + 100).gauss(0, 0.02)
        return observation

    result = run(toy(noisy, budgets={"quick": {"gain": gain}}), seeds=5, output=tmp_path, progress=False)
    assert result.verdict.outcome == outcome


def test_unknown_outcome_is_refused():
    with pytest.raises(ConfigurationError, match="verdict is 'maybe'; it must be one of holds"):
        Verdict("maybe", "who knows")


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'wanda'"):
        reproduce("wnada", output=tmp_path)
    with pytest.raises(UnknownNameError, match="unknown budget of wanda 'quik'; did you mean 'quick'"):
        run(toy(), budget="quik", output=tmp_path)
    with pytest.raises(UnknownNameError, match="unknown experiment 'usf-s3'"):
        find_experiment("usf-s3")


@pytest.mark.parametrize("seeds", [0, -1, [], [1, 1], [0.5], [-1], [True]])
def test_impossible_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(ConfigurationError, match="seeds is"):
        run(toy(), seeds=seeds, output=tmp_path)


def test_chosen_seeds_are_the_ones_that_run(tmp_path):
    assert run(toy(), seeds=[7, 3], output=tmp_path, progress=False).seeds == [3, 7]


def test_observation_that_cannot_be_stored_names_the_seed(tmp_path):
    def infinite(settings, seed, progress):
        return {"perplexity": {"dense": [1.0, math.inf]}}

    def opaque(settings, seed, progress):
        return {"model": object()}

    with pytest.raises(NonFiniteError, match=r"wanda, seed 0: perplexity.dense\[1\] is inf"):
        run(toy(infinite), output=tmp_path, progress=False)
    with pytest.raises(ConfigurationError, match="wanda, seed 0, is not plain JSON"):
        run(toy(opaque), output=tmp_path, progress=False)


def test_finished_result_of_other_settings_is_not_overwritten_unasked(tmp_path):
    run(toy(), output=tmp_path, progress=False)
    before = (tmp_path / "wanda.json").read_bytes()
    with pytest.raises(OutputError, match="finished run with other settings"):
        run(toy(), budget="full", output=tmp_path, progress=False)
    assert (tmp_path / "wanda.json").read_bytes() == before
    assert run(toy(), budget="full", output=tmp_path, progress=False, overwrite=True).budget == "full"


def test_output_that_another_run_is_writing_is_refused(tmp_path):
    with (
        _sole_writer(tmp_path / ".wanda.lock", tmp_path / "wanda.json"),
        pytest.raises(OutputError, match="is in use: another run"),
    ):
        run(toy(), output=tmp_path, progress=False)
    run(toy(), output=tmp_path, progress=False)


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot be created"):
        run(toy(), output=tmp_path / "taken", progress=False)


def test_any_truncation_of_a_stored_result_is_noticed(tmp_path):
    run(toy(), output=tmp_path, progress=False)
    path = tmp_path / "wanda.json"
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 97):
        path.write_text(whole[:length])
        with pytest.raises(CheckpointError, match=r"wanda\.json"):
            load_result(path)
        with pytest.raises(CheckpointError, match=r"wanda\.json"):
            run(toy(), output=tmp_path, progress=False)


@pytest.mark.parametrize("part", list(Result.__dataclass_fields__))
def test_stored_result_without_a_part_is_refused(tmp_path, part):
    run(toy(), output=tmp_path, progress=False)
    path = tmp_path / "wanda.json"
    stored = json.loads(path.read_text())
    del stored[part]
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=part):
        load_result(path)


@pytest.mark.parametrize("stored", ["[]", "{}", '{"se'])
def test_broken_partial_file_says_what_to_delete(tmp_path, stored):
    (tmp_path / "wanda.partial.json").write_text(stored)
    with pytest.raises(CheckpointError, match=r"wanda\.partial\.json .*delete it"):
        run(toy(), output=tmp_path, progress=False)


def test_partial_file_whose_seeds_are_altered_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy(stopping_at(1, [])), output=tmp_path, progress=False)
    path = tmp_path / "wanda.partial.json"
    path.write_text(path.read_text().replace('"seconds"', '"minutes"'))
    with pytest.raises(CheckpointError, match="lacks a part or is altered"):
        run(toy(stopping_at(1, [])), output=tmp_path, progress=False)


def test_result_of_a_later_format_is_refused(tmp_path):
    (tmp_path / "wanda.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        load_result(tmp_path / "wanda.json")


def test_output_directory_comes_from_the_call_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("GOSSAMER_RESULTS", raising=False)
    assert str(results_directory()) == "gossamer-results"
    monkeypatch.setenv("GOSSAMER_RESULTS", str(tmp_path))
    assert results_directory() == tmp_path
    assert results_directory(tmp_path / "here") == tmp_path / "here"


def test_curves_of_all_seeds_are_gathered_and_gaps_left_out():
    observations = [
        {"curves": {"a": {"x": [0.5, 0.1], "y": [None, 1.0]}}},
        {"curves": {"a": {"x": [0.1, 0.9], "y": [3.0, 4.0]}, "b": {"x": [0.1], "y": [None]}}},
        {"number": 1},
    ]
    assert collect_curves(observations) == {"a": {0.1: [1.0, 3.0], 0.9: [4.0]}}


def test_result_without_curves_is_drawn_by_its_intervals_and_without_both_not_at_all(tmp_path):
    def plain(settings, seed, progress):
        return {"good": 1.0 + seed, "poor": 0.0}

    def unmeasured(observations):
        return Verdict("inconclusive", "nothing was measured")

    run(toy(plain), output=tmp_path / "a", progress=False)
    assert (tmp_path / "a" / "wanda.png").exists()
    run(toy(plain, decide=unmeasured), output=tmp_path / "b", progress=False)
    assert not (tmp_path / "b" / "wanda.png").exists()


def test_drawing_leaves_pyplot_alone():
    code = "import sys, gossamer.papers.draw; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
