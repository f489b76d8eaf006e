from __future__ import annotations

import json
import random

import pytest
import torch
from tiny_models import tiny_model, word_tokenizer

import gossamer
from gossamer.activations.base import install
from gossamer.activations.rules import ActivationRules
from gossamer.cli import main
from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure import perplexity
from gossamer.report.activation_job import ActivationJob
from gossamer.report.main_job import Calibration, Evaluation


@pytest.fixture
def source(tmp_path):
    """A tiny saved model, and a text that it can read."""
    folder = tmp_path / "dense"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    words = random.Random(0).choices([*"abcdefghijklmnopqrstuvwxyz", "whale", "sea"], k=2000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return folder, tmp_path / "text.txt"


def job(source, output, **changes):
    folder, text = source
    settings = {"parameters": {"sparsity": 0.5}, "curve": (0.25,), "new_tokens": 3, "say": lambda line: None}
    evaluation = Evaluation(str(text), 128, 64, 64)
    return ActivationJob(
        str(folder), output, calibration=Calibration(str(text), 3, 32), evaluation=evaluation, **settings | changes
    )


def test_the_job_ends_in_rules_a_record_and_a_page_that_agree(source, tmp_path):
    record = job(source, tmp_path / "out").run()
    assert json.loads((tmp_path / "out" / "record.json").read_text())["activations"] == record["activations"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "sparse activations by teal" in page
    assert "of its weights for a token" in page
    assert "weights removed" not in page
    assert "Channels that a token skips" in page
    model = gossamer.load(str(source[0]), dtype="float32")
    ids = Evaluation(str(source[1]), 128, 64, 64).ids(model.tokenizer)
    rules = ActivationRules.load(tmp_path / "out" / "rules.safetensors")
    with install(model.model, rules):
        found = perplexity(model.model, ids, 64, 64, progress=False).value
    assert found == pytest.approx(record["sparse"]["perplexity"], rel=1e-6)
    assert {point["sparsity"] for point in record["curve"]} == {0.0, 0.25, 0.5}
    assert record["activations"]["realised"] == pytest.approx(0.5, abs=0.1)


def test_rules_of_a_rotated_model_say_so_and_refuse_another(source, tmp_path):
    job(source, tmp_path / "out", method="wina", rotate=True, curve=()).run()
    rules = ActivationRules.load(tmp_path / "out" / "rules.safetensors")
    with pytest.raises(ModelError, match="rotated model"):
        install(gossamer.load(str(source[0]), dtype="float32").model, rules)


def test_rules_can_be_written_with(source, tmp_path, monkeypatch, capsys):
    job(source, tmp_path / "out", curve=()).run()
    words = ["generate", source[0], "--activations", tmp_path / "out", "--prompt", "the whale", "--tokens", "3"]
    monkeypatch.setattr("sys.argv", ["gossamer", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "settings", "setting"),
    [("wina", {"gate": "threshold"}, "gate=threshold"), ("r-sparse", {"alpha": 1.0}, "alpha=1")],
)
def test_the_page_says_whether_generate_can_run_the_rules(source, tmp_path, method, settings, setting):
    given = {"method": method, "curve": ()}
    *_, note = job(source, tmp_path / "a", **given).run()["notes"]
    assert "`gossamer generate` cannot run them" in note
    assert f"--set {setting}" in note
    *_, note = job(source, tmp_path / "b", **given, parameters={"sparsity": 0.5, **settings}).run()["notes"]
    assert "`gossamer generate MODEL --activations` runs them" in note


def test_methods_that_do_something_else_are_refused_before_any_work(source, tmp_path):
    with pytest.raises(ConfigurationError, match="wanda acts after training"):
        job(source, tmp_path / "out", method="wanda").run()
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_what_was_realised(source, tmp_path, monkeypatch, capsys):
    words = ["sparsify", source[0], "-o", tmp_path / "out", "--activations", "chess", "--sparsity", "0.4"]
    words += ["--calibration", source[1], "--sequences", "2", "--length", "32", "--tokens", "64"]
    monkeypatch.setattr("sys.argv", ["gossamer", *map(str, words)])
    monkeypatch.setattr("gossamer.report.activation_job.PROMPTS", ("the whale",))
    torch.manual_seed(0)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "sparsity realised" in capsys.readouterr().out
