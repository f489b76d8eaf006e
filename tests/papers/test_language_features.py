"""The shared activations: made once, apart, and the same for all who ask."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gossamer.errors import CalibrationError
from gossamer.features.activation_rules import TopK
from gossamer.features.sae import SAE
from gossamer.models.load import LoadedModel
from gossamer.papers import language_features as module
from gossamer.papers.language_features import Source, documents_of, language_features


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, **options):
        return {"input_ids": [1 + ord(letter) % 90 for letter in text]}


@pytest.fixture
def source(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load", lambda *a, **k: LoadedModel(tiny_llama, Letters(), "tiny"))
    texts = []
    for name in ("one", "two"):
        letters = torch.randint(97, 120, (700,), generator=torch.Generator().manual_seed(len(texts)))
        (tmp_path / f"{name}.txt").write_text("".join(map(chr, letters.tolist())))
        texts.append(str(tmp_path / f"{name}.txt"))
    language_features.cache_clear()
    yield Source(model="tiny", texts=tuple(texts), documents=9, held_out=4, length=40)
    language_features.cache_clear()


def test_windows_come_in_turn_from_all_texts_and_do_not_overlap(source):
    training, held_out = documents_of(source, Letters())
    assert (len(training), len(held_out)) == (9, 4)
    whole = [Letters()(Path(text).read_text())["input_ids"] for text in source.texts]
    seen = []
    for number, text in enumerate(training + held_out):
        ids = text[0].tolist()
        places = [(t, i) for t, w in enumerate(whole) for i in range(len(w) - 39) if w[i : i + 40] == ids]
        assert len(places) == 1
        seen += places
        if number < 8:
            assert places[0][0] == number % 2
    for t in (0, 1):
        starts = sorted(i for number, i in seen if number == t)
        assert all(after - before >= 40 for before, after in pairwise(starts))


def test_activations_are_captured_once_and_read_ever_after(source, monkeypatch):
    features = language_features(source)
    assert features.site == "model.layers.1"
    assert features.d_in == 48
    assert len(features.training) == 9 * 36
    assert len(features.held_out) == 4 * 36
    assert features.training.gradients(slice(0, 3)).shape == (3, 48)
    language_features.cache_clear()
    monkeypatch.setattr("gossamer.features.store.run_batch", None)
    monkeypatch.setattr("gossamer.features.gradients.run_batch", None)
    assert language_features(source).training[:].equal(features.training[:])


def test_the_reference_autoencoder_is_trained_once_and_spliced(source, monkeypatch):
    features = language_features(source)
    sae = features.reference_sae(64, 4, steps=30, batch_size=64)
    assert isinstance(sae.activation, TopK)
    monkeypatch.setattr(module, "train", None)
    again = features.reference_sae(64, 4, steps=30, batch_size=64)
    x = features.held_out[:]
    assert again(x).output.equal(sae(x).output)
    untrained = SAE(48, 64, TopK(4)).eval()
    untrained.prepare(x)
    found = features.splice({"trained": sae, "untrained": untrained}, 2)
    assert found["trained"].unexplained < found["untrained"].unexplained
    assert found["trained"].tokens == 2 * 39


def test_texts_that_are_too_short_are_refused(source):
    with pytest.raises(CalibrationError, match="too short for 21 windows"):
        documents_of(Source(texts=source.texts, documents=40, held_out=1, length=40), Letters())
