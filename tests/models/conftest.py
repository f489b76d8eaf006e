"""Nothing in these tests is downloaded, except by those marked slow."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model, word_tokenizer


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch, request):
    """No test sees or fills the user's cache, except those that need the downloaded models."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a tiny model and gives (directory, model)."""

    def save(kind="llama", with_tokenizer=True, max_shard_size="5GB", **changes):
        model, directory = tiny_model(kind, **changes), tmp_path / f"{kind}-model"
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if with_tokenizer:
            word_tokenizer().save_pretrained(directory)
        return directory, model

    return save
