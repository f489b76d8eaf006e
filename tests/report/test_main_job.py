from __future__ import annotations

import json
import random

import pytest
import torch
from tiny_models import tiny_model, word_tokenizer

import gossamer
from gossamer.cli import main
from gossamer.errors import OutputError
from gossamer.report.main_job import Calibration, Evaluation, MainJob


@pytest.fixture
def source(tmp_path):
    """A tiny saved model, and a text that it can read."""
    folder = tmp_path / "dense"
    tiny_model(
        "llama", hidden_size=64, intermediate_size=128, head_dim=32, max_position_embeddings=512
    ).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    words = random.Random(0).choices([*"abcdefghijklmnopqrstuvwxyz", "whale", "sea"], k=4000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return folder, tmp_path / "text.txt"


def job(source, output, **changes):
    folder, text = source
    return MainJob(
        str(folder),
        output,
        parameters={"sparsity": 0.5},
        calibration=Calibration(str(text), 3, 32),
        evaluation=Evaluation(str(text), 256, 64, 32),
        curve=(0.7,),
        new_tokens=4,
        say=lambda line: None,
        **changes,
    )


def test_the_main_job_ends_in_a_model_a_record_and_a_page(source, tmp_path):
    output = tmp_path / "out"
    record = job(source, output).run()
    assert json.loads((output / "record.json").read_text())["sparse"] == record["sparse"]
    assert "<html" in (output / "report.html").read_text()
    assert record["sparse"]["density"] == pytest.approx(0.5, abs=0.01)
    assert record["sparse"]["file_bytes"] < record["dense"]["file_bytes"]
    assert {point["method"] for point in record["curve"]} == {"wanda", "magnitude"}
    model = gossamer.load(str(output / "model")).model
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if "proj" in name)
    assert zeros == sum(round(row["sparsity"] * torch.Size(row["shape"]).numel()) for row in record["layers"])


def test_an_output_in_use_is_refused_before_any_work(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="out"):
        job(source, tmp_path / "out").run()
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["gossamer", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command_line_prunes_evaluates_and_writes(source, tmp_path, monkeypatch, capsys):
    folder, text = source
    output = tmp_path / "sparse"
    options = ["--calibration", text, "--sequences", 3, "--length", 32, "--pattern", "2:4"]
    assert run(monkeypatch, "prune", folder, "-o", output, *options) == 0
    assert not list(tmp_path.glob(".sparse*"))
    capsys.readouterr()
    short = ["--text", text, "--tokens", 256, "--window", 64, "--stride", 32, "--json"]
    assert run(monkeypatch, "eval", output, "--against", folder, *short) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["density of prunable"] == pytest.approx(0.5)
    assert found["KL from dense (nats)"] > 0
    assert run(monkeypatch, "generate", output, "--prompt", "a whale", "--tokens", 3) == 0


class Interrupted(Exception):
    """The machine goes down."""


@pytest.mark.parametrize(
    ("method", "options"), [("wanda", []), ("sparsegpt", ["--set", "block_size=32"]), ("magnitude", [])]
)
def test_an_interrupted_run_goes_on_where_it_stopped(source, tmp_path, monkeypatch, capsys, method, options):
    folder, text = source
    words = ["prune", folder, "--method", method, "--calibration", text, "--sequences", 3, "--length", 32, *options]
    assert run(monkeypatch, *words, "-o", tmp_path / "whole") == 0
    kind = gossamer.methods.method(method).factory
    layer, pruned = kind.prune_layer, []

    def stop_at(limit):
        def prune_layer(self, target, stats, sparsity):
            if len(pruned) == limit:
                raise Interrupted
            pruned.append(target.name)
            return layer(self, target, stats, sparsity)

        return prune_layer

    monkeypatch.setattr(kind, "prune_layer", stop_at(9))  # seven layers make a block
    with pytest.raises(Interrupted):
        run(monkeypatch, *words, "-o", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    monkeypatch.setattr(kind, "prune_layer", stop_at(None))
    assert run(monkeypatch, *words, "-o", tmp_path / "sparse") == 0
    assert len(pruned) == 9 + 14 - 7
    assert not list(tmp_path.glob(".sparse*"))
    whole, resumed = (gossamer.load(str(tmp_path / name)).model.state_dict() for name in ("whole", "sparse"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "{model}", "-o", "{out}", "--method", "wandaa"], "did you mean 'wanda'"),
        (["prune", "{model}", "-o", "{out}", "--sparsity", "1.5"], "must be a number in [0, 1)"),
        (["prune", "{model}", "-o", "{out}", "--pattern", "2:5x"], "unknown pattern"),
        (["prune", "{model}", "-o", "{model}"], "dense"),
        (["prune", "{model}", "-o", "{out}", "--calibration", "{missing}"], "missing"),
        (["prune", "{model}", "-o", "{out}", "--set", "block_size"], "not of the form name=value"),
        (["prune", "{model}", "-o", "{out}", "--set", "block_size=3"], "has no parameter 'block_size'"),
        (["eval", "{missing}"], "missing"),
        (["report", "{missing}"], "missing"),
        (["reproduce", "wandaa"], "did you mean 'wanda'"),
    ],
)
def test_every_mistake_ends_in_one_line(source, tmp_path, monkeypatch, capsys, words, message):
    places = {"model": source[0], "out": tmp_path / "out", "missing": tmp_path / "missing.txt"}
    assert run(monkeypatch, *[word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_lists_can_be_read_by_programs(monkeypatch, capsys):
    assert run(monkeypatch, "papers", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"slug", "title", "room", "status", "entry_points", "verdict"} <= rows[0].keys()
    assert run(monkeypatch, "methods", "--json") == 0
    assert "wanda" in {row["name"] for row in json.loads(capsys.readouterr().out)}


def test_methods_are_found_by_where_they_stand(monkeypatch, capsys):
    assert run(monkeypatch, "methods", "--where", "during", "--where", "gradient", "--json") == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"rigl", "granet"} <= found.keys()
    assert "set" not in found
    assert found["rigl"]["taxonomy"]["path"] == ["sparse-to-sparse"]
    assert run(monkeypatch, "methods", "--where", "after", "--pattern", "2:4", "--explain") == 0
    page = capsys.readouterr().out
    assert "wanda: pruning (dense-to-sparse), static, after training" in " ".join(page.split())
    assert "flap" not in page
    assert run(monkeypatch, "methods", "--where", "sometime") == 2
    assert "unknown value of an axis 'sometime'" in capsys.readouterr().err
