from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.errors import CheckpointError
from gossamer.methods import methods
from gossamer.papers import Interval, Result, Verdict, papers
from gossamer.report import performance, tables

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def result():
    return Result(
        slug="wanda",
        claim="It | holds up.",
        rule="holds if the interval lies above zero",
        budget="quick",
        settings={"gossamer": "0.1.0"},
        seeds=[0, 1, 2],
        observations=[{}, {}, {}],
        verdict=Verdict("holds", "The gain is clear.", {"gain_over_magnitude": Interval(2.0, 1.0, 3.0), "seeds": 3}),
        machine={"cpu": "some processor", "cores": 2, "gpu": []},
        seconds=150.0,
        date="2026-01-31",
    )


PAGES = ["methods.md", "reproductions.md", "performance.md"]


@pytest.mark.parametrize("name", PAGES)
def test_committed_page_is_what_the_generator_writes(tmp_path, name):
    tables.write_pages(tmp_path)
    assert (DOCS / name).read_text() == (tmp_path / name).read_text(), f"{name} is out of date: run `make docs`"


def test_methods_page_has_one_row_for_each_paper():
    page, stands, taxonomy = tables.methods_table().partition("## Where every method stands")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [
        entry.slug for room in tables.ROOMS for entry in papers() if entry.room == room
    ]
    assert all(row.count(" | ") == 5 for row in rows)
    assert stands
    assert [row.split("`")[1] for row in taxonomy.splitlines() if row.startswith("| `")] == list(methods())


def test_reproductions_page_tells_what_was_run_and_how_to_repeat_it(monkeypatch, result):
    monkeypatch.setattr(tables, "stored_result", lambda slug: result if slug == "wanda" else None)
    page = tables.reproductions_table()
    assert "It \\| holds up." in page
    assert "| gain over magnitude | 2 [1, 3] at 95% |" in page
    assert "`gossamer reproduce wanda --budget quick --seeds 3`" in page
    assert "cpu some processor, cores 2\n" in page
    assert "seeds 0, 1, 2, 2 min, 2026-01-31, gossamer 0.1.0" in page


def test_pages_are_written_whole_into_a_new_directory(tmp_path):
    written = tables.write_pages(tmp_path / "docs")
    assert [path.name for path in written] == PAGES
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == sorted(PAGES)


ROW = {
    "operation": "wanda",
    "case": "some model | 50%",
    "peer": "another",
    "ours": 0.25,
    "theirs": 0.5,
    "ratio": 2.0,
    "ratio_low": 1.75,
    "ratio_high": 2.25,
    "bar": 1.0,
    "met": True,
    "limit": 0.1,
    "fraction_of_limit": 0.4,
    "rounds": 3,
    "unit": "s",
    "note": "perplexity 9.00, theirs 9.01",
}
MEMORY = {**ROW, "operation": "peak memory", "ours": 312.5, "theirs": 250.0, "unit": "MB", "rounds": 1, "ratio": 0.8}


def test_performance_page_shows_ratio_spread_limit_and_bar(tmp_path):
    slow = {**MEMORY, "met": False, "limit": None, "fraction_of_limit": None, "note": ""}
    content = {"date": "2026-01-31", "machine": {"cpu": "some processor"}, "quick": False, "rows": [ROW, slow]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = performance.performance_table(tmp_path / "results.json")
    assert "Measured on 2026-01-31 on: cpu some processor." in page
    assert (
        "| wanda | some model \\| 50%; perplexity 9.00, theirs 9.01 | 250 ms | another | 500 ms "
        "| 2.00 (1.75 to 2.25) | 3 | 40% | 1, met |"
    ) in page
    assert "| peak memory | some model \\| 50% | 312.5 MB | another | 250 MB | 0.80 | 1 |  | 1, **missed** |" in page


def test_many_shapes_become_one_row(tmp_path):
    alike = [{**ROW, "group": "90% zero", "ratio": ratio, "met": ratio >= 1} for ratio in (0.5, 2.0, 3.0)]
    content = {"date": "2026-01-31", "machine": {"cpu": "x"}, "quick": False, "rows": [*alike, MEMORY]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = performance.performance_table(tmp_path / "results.json")
    assert "| wanda | 90% zero; 3 shapes |  | another |  | 2.00 (0.50 to 3.00) | 3 | 40% | 1, met by 2 |" in page
    assert page.count("| wanda |") == 1
    assert "| peak memory |" in page


def test_each_machine_has_a_table(tmp_path):
    for name, cpu in (("results.json", "first"), ("results-b.json", "third"), ("results-a.json", "second")):
        content = {"date": "2026-01-31", "machine": {"cpu": cpu}, "quick": False, "rows": [{**ROW, "operation": cpu}]}
        (tmp_path / name).write_text(json.dumps(content))
    page = performance.performance_table(tmp_path / "results.json")
    wanted = [f"{text} {cpu}" for cpu in ("first", "second", "third") for text in ("on: cpu", "|")]
    places = [page.index(text) for text in wanted]
    assert places == sorted(places)
    (tmp_path / "results-b.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"results-b\.json is damaged"):
        performance.performance_table(tmp_path / "results.json")


def test_performance_page_without_figures_says_how_to_get_them(tmp_path):
    assert "run `make bench`" in performance.performance_table(tmp_path / "absent.json")


@pytest.mark.parametrize("content", ["{", "{}", '{"rows": [{}], "date": "", "machine": {}}'])
def test_damaged_benchmark_results_are_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"results\.json is damaged"):
        performance.performance_table(tmp_path / "results.json")
