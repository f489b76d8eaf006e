"""The whole job on a tiny model, twice, and everything that it must refuse."""

from __future__ import annotations

import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, word_tokenizer

from gossamer.cli import main
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    OutputError,
    UnknownNameError,
)
from gossamer.features import prepared as prepared_module
from gossamer.features.autointerp.pipeline import read_interpretations
from gossamer.features.exploration import ExplorationSettings
from gossamer.features.prepared import DictionarySettings, prepare
from gossamer.features.saelens_format import load_saelens, save_saelens
from gossamer.report.features_job import FeaturesJob, spread_features


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A tiny saved model, a text that it can read, and a cache of its own."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dense"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    words = random.Random(0).choices([*"abcdefghijklmnopqrstuvwxyz", "whale", "sea"], k=3000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return folder, tmp_path / "text.txt"


def settings(source, **changes):
    folder, text = source
    usual = {"site": 1, "width": 40, "k": 4, "tokens": 1500, "length": 32, "steps": 12, "batch_size": 64}
    return DictionarySettings(model=str(folder), texts=(str(text),), **{**usual, **changes})


def job(source, output, dictionary=None, **changes):
    usual = {"explain": 6, "prompts": ("a whale",), "say": lambda line: None, "progress": False}
    return FeaturesJob(dictionary=settings(source, **(dictionary or {})), output=output, **{**usual, **changes})


def test_the_job_ends_in_a_page_an_autoencoder_and_a_record(source, tmp_path):
    record = job(source, tmp_path / "out", steer=(3, 5), strengths=(1.0,)).run()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "features.html", "sae", "explanations.jsonl", "record.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "record.json").read_text())["quality"] == record["quality"]
    page = (tmp_path / "out" / "features.html").read_text()
    assert "40 features of dense" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    sae, metadata = load_saelens(tmp_path / "out" / "sae")
    assert (sae.n_features, sae.activation.k, metadata["hook_name"]) == (40, 4, "model.layers.1")
    assert record["steered"] == [3, 5]
    assert record["quality"]["active"] == pytest.approx(4, abs=0.5)
    found = read_interpretations(tmp_path / "out" / "explanations.jsonl")
    assert sum(bool(said.explanation) for said in found) == record["explained"]


def test_a_second_run_takes_everything_from_the_cache(source, tmp_path, monkeypatch):
    job(source, tmp_path / "first").run()

    def refuse(*args, **keywords):
        raise AssertionError("trained again")

    monkeypatch.setattr(prepared_module, "train", refuse)
    monkeypatch.setattr("gossamer.features.store.run_batch", refuse)
    job(source, tmp_path / "second", steer=(1,)).run()
    with pytest.raises(AssertionError, match="trained again"):
        job(source, tmp_path / "third", {"k": 5}).run()
    assert not (tmp_path / "third").exists()


def test_an_interrupted_training_goes_on_and_ends_the_same(source, tmp_path, monkeypatch):
    whole = prepare(settings(source, steps=110), progress=False).sae
    shutil.rmtree(tmp_path / "cache" / "dictionaries")
    step, calls = prepared_module.train, []

    def interrupted(saes, batches, how, **keywords):
        def torn(begin):
            for number, batch in enumerate(batches(begin)):
                if number == 105 and not calls:
                    calls.append(begin)
                    raise KeyboardInterrupt
                yield batch

        return step(saes, torn, how, **keywords)

    monkeypatch.setattr(prepared_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(source, steps=110), progress=False)
    again = prepare(settings(source, steps=110), progress=False).sae
    torch.testing.assert_close(again.decoder, whole.decoder)


def test_an_autoencoder_in_a_file_is_explored_instead(source, tmp_path):
    job(source, tmp_path / "out").run()
    ready = prepare(settings(source, sae=str(tmp_path / "out" / "sae"), k=99), progress=False)
    assert ready.sae.activation.k == 4
    assert ready.metadata["hook_name"] == "model.layers.1"
    with pytest.raises(ModelError, match=r"of model.layers.1, not of model.layers.0; give --site"):
        prepare(settings(source, sae=str(tmp_path / "out" / "sae"), site=0), progress=False)
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        prepare(settings(source, sae=str(tmp_path / "nothing")), progress=False)
    config = tmp_path / "out" / "sae" / "cfg.json"
    said = json.loads(config.read_text())
    said["metadata"]["gossamer"]["version"] = 99
    config.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="version 99, this gossamer reads 1; update gossamer"):
        prepare(settings(source, sae=str(tmp_path / "out" / "sae")), progress=False)


def test_an_autoencoder_of_another_size_is_refused(source, tmp_path):
    from gossamer.features.activation_rules import TopK
    from gossamer.features.sae import SAE

    save_saelens(SAE(7, 20, TopK(2)), tmp_path / "sae")
    with pytest.raises(ModelError, match="activations of 7 numbers"):
        prepare(settings(source, sae=str(tmp_path / "sae")), progress=False)


def test_explanations_are_taken_from_a_file_and_refused_for_another_autoencoder(source, tmp_path):
    own = tmp_path / "own.jsonl"

    def write(latent, **header):
        about = {"format": "gossamer interpretations", "version": 1, **header}
        said = {"latent": latent, "explanation": "the letter q", "scores": {}, "skipped": ""}
        own.write_text(f"{json.dumps(about)}\n{json.dumps(said)}\n")

    write(3)
    record = job(source, tmp_path / "out", explanations=own).run()
    assert record["explained"] == 1
    assert [said.explanation for said in read_interpretations(tmp_path / "out" / "explanations.jsonl")] == [
        "the letter q"
    ]
    for latent, header, kind, message in (
        (3, {"study": {"encoder": "another"}}, ModelError, "of another autoencoder"),
        (40, {}, ConfigurationError, "feature 40 does not exist; there are features from 0 to 39"),
        (3, {"version": 9}, CheckpointError, "version 9, this gossamer reads 1; update gossamer"),
        (3, {"format": "notes"}, CheckpointError, "holds no interpretations"),
    ):
        write(latent, **header)
        with pytest.raises(kind, match=message):
            job(source, tmp_path / "refused", explanations=own).run()
    with pytest.raises(CheckpointError, match="does not exist; give a file"):
        job(source, tmp_path / "refused", explanations=tmp_path / "nothing").run()
    assert not (tmp_path / "refused").exists()


def test_features_are_explained_from_the_most_to_the_least_active():
    counts = np.array([5, 300, 100, 0, 900, 200, 99])
    assert spread_features(counts, 3) == [4, 5, 2]  # the second of the two in the middle
    assert spread_features(counts, 10) == [4, 1, 5, 2]
    assert spread_features(counts, 0) == []
    assert spread_features(np.zeros(4, int), 3) == []


def test_what_cannot_be_asked_for_is_refused(source, tmp_path):
    for changes, kind, message in (
        ({"k": 41}, ConfigurationError, "k is 41 and width 40; a token cannot have more"),
        ({"k": 0}, ConfigurationError, "k is 0"),
        ({"rule": "topp"}, UnknownNameError, "did you mean 'topk'"),
        ({"site": 2}, UnknownNameError, "unknown layer '2'; known: 0 to 1"),
        ({"site": "model.layer.1"}, UnknownNameError, r"did you mean 'model.layers.1'"),
        ({"tokens": 10}, ConfigurationError, "tokens is 10"),
        ({"width": 1}, ConfigurationError, "width is 1"),
        ({"sparsity": 0.0}, ConfigurationError, "sparsity is 0"),
    ):
        with pytest.raises(kind, match=message):
            prepare(settings(source, **changes), progress=False)
    with pytest.raises(ConfigurationError, match="feature 40 does not exist"):
        job(source, tmp_path / "out", steer=(40,)).run()
    with pytest.raises(ConfigurationError, match=r"strengths are \[nan\]; give finite numbers"):
        job(source, tmp_path / "out", strengths=(float("nan"),)).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        job(source, tmp_path / "file").run()
    with pytest.raises(ConfigurationError, match="bins is 0"):
        ExplorationSettings(bins=0)


def test_a_damaged_model_is_refused(source, tmp_path):
    model = tiny_model("llama", max_position_embeddings=512)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    word_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"model.layers.1: an activation is NaN"):
        prepare(settings((tmp_path / "broken", source[1])), progress=False)


def test_every_rule_is_trained_and_kept(source):
    for rule in prepared_module.RULES:
        ready = prepare(settings(source, rule=rule), progress=False)
        assert ready.sae.n_features == 40


def test_the_command_says_what_it_found_and_how_to_steer_more(source, tmp_path, monkeypatch, capsys):
    folder, text = source
    words = ["features", str(folder), "--layer", "1", "--output", str(tmp_path / "out"), "--width", "40", "--k", "4"]
    words += ["--tokens", "1500", "--length", "32", "--steps", "3", "--text", str(text), "--explain", "0"]
    monkeypatch.setattr(sys, "argv", ["gossamer", *words, "--steer", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "variance explained" in said
    assert "features.html" in said
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["more"].endswith("--explain 0 --overwrite --steer {feature}")
    for wrong, message in (
        (["features", str(folder)], "give either --layer"),
        (["features", str(folder), "--layer", "1", "--site", "x"], "give either --layer"),
        ([*words, "--overwrite", "--steer", "whales"], "steer is 'whales'"),
        (words, "in use"),
    ):
        monkeypatch.setattr(sys, "argv", ["gossamer", *wrong])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
