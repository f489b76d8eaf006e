from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.papers import Interval, Result, Verdict, papers
from gossamer.report import tables

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


@pytest.mark.parametrize("name", ["methods.md", "reproductions.md"])
def test_committed_page_is_what_the_generator_writes(tmp_path, name):
    tables.write_pages(tmp_path)
    assert (DOCS / name).read_text() == (tmp_path / name).read_text(), f"{name} is out of date: run `make docs`"


def test_methods_page_has_one_row_for_each_paper():
    rows = [line for line in tables.methods_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [
        entry.slug for room in tables.ROOMS for entry in papers() if entry.room == room
    ]
    assert all(row.count(" | ") == 5 for row in rows)


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
    assert [path.name for path in written] == ["methods.md", "reproductions.md"]
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["methods.md", "reproductions.md"]
