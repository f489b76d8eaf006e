from __future__ import annotations

import json
import re

import pytest

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.papers import ROOMS, find_experiment, paper, papers, rows, stored_result
from gossamer.papers.catalogue import parse
from gossamer.papers.results import shipped_directory

ROW = """
[[paper]]
slug = "some-paper"
title = "A Title"
authors = "Someone et al."
year = 2024
arxiv = "2401.00001"
room = "pruning"
zeros = "weights"
idea = "A sentence."
status = "none"
entry_points = []
"""


def test_there_is_a_row_for_each_of_the_159_papers_beside_the_baselines():
    assert len([entry for entry in papers() if not entry.baseline]) == 159
    assert {entry.slug for entry in papers() if entry.baseline} == {"magnitude", "sparsegpt", "teal", "wanda"}


def test_slugs_titles_and_identifiers_are_unique():
    for name in ("slug", "title", "arxiv", "idea"):
        values = [getattr(entry, name) for entry in papers()]
        assert len(set(values)) == len(values), name


def test_rows_in_the_file_are_sorted_by_room_and_slug():
    keys = [(entry.room, entry.slug) for entry in papers()]
    assert keys == sorted(keys)


@pytest.mark.parametrize("entry", papers(), ids=lambda entry: entry.slug)
def test_row_is_well_formed(entry):
    assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{4,5}", entry.arxiv)
    assert entry.room in ROOMS
    assert re.fullmatch(r".+( et al\.| & .+)|[A-Z][a-z]+", entry.authors)
    assert re.fullmatch(r"[A-Z].*[^.]\.", entry.idea)
    # journal papers are up to five years younger than their preprint, and a few reached arXiv a year late
    assert -1 <= entry.year - (2000 + int(entry.arxiv[:2])) <= 5
    assert len(entry.load_entry_points()) == len(entry.entry_points)


def test_every_paper_that_works_has_a_stored_result():
    working = [entry.slug for entry in papers() if entry.status == "works"]
    assert [slug for slug in working if stored_result(slug) is None] == []


_STORED = [entry.slug for entry in papers() if stored_result(entry.slug) is not None]


@pytest.mark.parametrize("slug", _STORED)
def test_stored_verdict_is_what_the_stored_observations_say(slug):
    result, experiment = stored_result(slug), find_experiment(slug)
    assert (result.claim, result.rule) == (experiment.claim, experiment.rule)
    verdict = experiment.decide(result.observations)
    assert (verdict.outcome, verdict.reason) == (result.verdict.outcome, result.verdict.reason)
    assert set(verdict.numbers) == set(result.verdict.numbers)


def test_unknown_slug_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown paper 'wnada'; did you mean 'wanda'") as caught:
        paper("wnada")
    assert caught.value.suggestion == "wanda"


def test_json_rows_have_exactly_the_promised_fields():
    table = json.loads(json.dumps(rows()))
    assert len(table) == len(papers())
    assert all(list(row) == ["slug", "title", "room", "status", "entry_points", "verdict"] for row in table)
    assert all(row["verdict"] in (None, "holds", "does not hold", "inconclusive") for row in table)


def test_a_sound_row_is_read():
    (entry,) = parse(ROW)
    assert entry.citation == "Someone et al., 2024, arXiv 2401.00001"
    assert entry.url == "https://arxiv.org/abs/2401.00001"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('room = "pruning"', 'room = "attic"', "room is 'attic'; it must be one of pruning"),
        ('status = "none"', 'status = "done"', "status is 'done'; it must be none, partial or works"),
        ('status = "none"', 'status = "works"', "status 'works' with 0 entry points"),
        ("entry_points = []", 'entry_points = ["a.b"]', "status 'none' with 1 entry points"),
        ('arxiv = "2401.00001"', 'arxiv = "24.1"', "arxiv is '24.1'; it must look like 2306.11695"),
        ('arxiv = "2401.00001"\n', "", "arxiv and reference are both missing"),
        ('idea = "A sentence."', 'idea = ""', "idea is ''; it must be some text"),
        ('title = "A Title"\n', "", "title is missing"),
        ("year = 2024", 'year = "2024"', "year is '2024'; it must be a whole number"),
        ("year = 2024", "yaer = 2024\nyear = 2024", "unknown field 'yaer'"),
        ('slug = "some-paper"', 'slug = "Some Paper"', "lower-case letters and digits"),
        ("year = 2024", "year =", "not valid TOML"),
    ],
)
def test_malformed_row_is_refused_by_name(old, new, message):
    assert old in ROW
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        parse(ROW.replace(old, new))


def test_repeated_slug_is_refused():
    with pytest.raises(ConfigurationError, match="'some-paper' occurs more than once"):
        parse(ROW + ROW)


def test_entry_point_that_cannot_be_imported_is_named():
    text = ROW.replace('status = "none"', 'status = "partial"').replace("[]", '["gossamer.errors.Nothing"]')
    (entry,) = parse(text)
    with pytest.raises(ConfigurationError, match=re.escape("'gossamer.errors.Nothing' cannot be imported")):
        entry.load_entry_points()


def test_every_stored_result_belongs_to_a_paper():
    stored = {path.stem for path in shipped_directory().glob("*.json")}
    assert stored <= {entry.slug for entry in papers()}
    for slug in stored:
        assert stored_result(slug).slug == slug
