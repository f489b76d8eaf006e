from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.harness import Options, Row, main, paired
from benchmarks.pruning_memory import SHAPES, Peak, row

from benchmarks import pruning_selection
from gossamer.errors import ConfigurationError
from gossamer.measure import Timing
from gossamer.report.performance import performance_table


def test_a_row_pairs_the_rounds_and_meets_its_bar_or_not():
    ours, theirs = Timing.of([1.0, 2.0, 4.0]), Timing.of([2.0, 2.0, 6.0])
    found = paired("work", "case", ours, "peer", theirs, bar=1.5, limit=0.5)
    assert (found.ours, found.theirs, found.rounds) == (2.0, 2.0, 3)
    assert (found.ratio_low, found.ratio, found.ratio_high) == (1.25, 1.5, 1.75)
    assert found.met
    assert found.fraction_of_limit == 0.25
    assert not paired("work", "case", ours, "peer", theirs, bar=1.51).met


def test_the_memory_bound_is_two_and_a_half_blocks_and_the_activations():
    shape = SHAPES["small"]
    inside = int(2.5 * shape.block_bytes) + shape.activation_bytes
    assert row(shape, "wanda", Peak(anonymous=inside)).met
    assert not row(shape, "wanda", Peak(anonymous=inside + 1)).met
    assert shape.limit < shape.model_bytes


def test_the_command_line_writes_what_the_documentation_reads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "--json", str(file), "--peer-python", "python-of-peer"])
    asked = []

    def measure(options: Options) -> list[Row]:
        asked.append(options)
        return [paired("work", "case", Timing.of([1.0]), "peer", Timing.of([2.0]), bar=1.0, note="a note")]

    main(measure)
    assert asked == [Options(quick=True, peer_python=Path("python-of-peer"))]
    assert "2.00" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"][0]["ratio"] == 2.0
    page = performance_table(file)
    assert "| work | case; a note | 1 s | peer | 2 s | 2.00 | 1 |  | 1, met |" in page
    assert "the figures mean nothing" in page


def test_one_benchmark_is_repeated_beside_the_others(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    command = ["benchmarks", "--json", str(file), "--merge"]
    monkeypatch.setattr("sys.argv", command)
    main(lambda _: [row_of("first", 2.0), row_of("second", 3.0)])
    stored = json.loads(file.read_text())
    for each in stored["rows"]:
        each["date"] = "2026-01-31"
    file.write_text(json.dumps(stored))
    main(lambda _: [row_of("second", 4.0)])
    rows = {row["operation"]: row for row in json.loads(file.read_text())["rows"]}
    assert {name: row["ratio"] for name, row in rows.items()} == {"first": 2.0, "second": 4.0}
    assert rows["first"]["date"] == "2026-01-31" < rows["second"]["date"]
    assert "Measured on days from 2026-01-31 to" in performance_table(file)


@pytest.mark.parametrize("command", [["--quick"], []])
def test_figures_of_another_machine_or_size_are_not_mixed(tmp_path, monkeypatch, command):
    file = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--json", str(file), "--merge"])
    main(lambda _: [row_of("first", 2.0)])
    if not command:
        stored = json.loads(file.read_text())
        stored["machine"]["cpu"] = "another"
        file.write_text(json.dumps(stored))
    before = file.read_bytes()
    monkeypatch.setattr("sys.argv", ["benchmarks", "--json", str(file), "--merge", *command])
    with pytest.raises(ConfigurationError, match="was measured with"):
        main(lambda _: [row_of("second", 4.0)])
    assert file.read_bytes() == before


def row_of(operation: str, times: float) -> Row:
    return paired(operation, "case", Timing.of([1.0]), "peer", Timing.of([times]), bar=1.0)


@pytest.mark.slow
def test_the_benchmarks_of_selection_run():
    rows = pruning_selection.measure(Options(quick=True))
    assert [found.operation for found in rows] == ["N:M mask", "N:M mask", "global threshold"]
