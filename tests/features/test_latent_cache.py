"""The cache of latents against dense codes, byte for byte where it must be, and refused where it does not belong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    OutputError,
    UnknownNameError,
)
from gossamer.features import latent_capture as module
from gossamer.features.activation_rules import TopK
from gossamer.features.latent_cache import LatentCache
from gossamer.features.latent_capture import cache_latents, cache_of_store
from gossamer.features.latent_facts import encoder_fingerprint
from gossamer.features.sae import SAE
from gossamer.features.store import capture


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 97, (length,), generator=generator) for length in (20, 1, 33, 12)]


@pytest.fixture
def sae():
    return SAE(48, 64, TopK(5)).eval()


@pytest.fixture
def dense(tiny_llama, documents, sae):
    """Codes of all documents without their first tokens, dense."""
    with torch.no_grad():
        states = [tiny_llama(text[None], output_hidden_states=True).hidden_states[2][0, 1:] for text in documents]
        return torch.cat([sae.encode(state).to_dense() for state in states if len(state)])


def test_a_cache_is_the_dense_codes_in_both_directions(tiny_llama, documents, sae, dense, tmp_path):
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", "float32", shard=40, progress=False)
    assert [shard.documents for shard in cache.facts.shards] == [2, 1, 1]
    torch.testing.assert_close(cache.codes(0, len(cache)).to_dense(), dense)
    torch.testing.assert_close(cache.codes(15, 25).to_dense(), dense[15:25])
    assert cache.codes(7, 7).shape == (0, 64)
    for feature in range(64):
        found = cache.occurrences(feature)
        wanted = dense[:, feature].nonzero()[:, 0]
        np.testing.assert_array_equal(found.rows, wanted)
        np.testing.assert_allclose(found.values, dense[wanted, feature], rtol=1e-6)
    together = SparseCodes.cat([codes for _, codes in cache.shards()])
    torch.testing.assert_close(together.to_dense(), dense)


def test_rows_know_their_document_and_position(tiny_llama, documents, sae, tmp_path):
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", progress=False)
    found, positions = cache.places(np.arange(len(cache)))
    lengths = [19, 0, 32, 11]
    np.testing.assert_array_equal(found, np.repeat(range(4), lengths))
    np.testing.assert_array_equal(positions, np.concatenate([np.arange(1, 1 + n) for n in lengths]))
    for number, text in enumerate(documents):
        torch.testing.assert_close(cache.document(number), text)
    with pytest.raises(ConfigurationError, match="the cache has 62"):
        cache.places(np.array([62]))


def test_half_precision_loses_a_part_in_two_thousand_and_no_activity(tiny_llama, documents, sae, dense, tmp_path):
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", progress=False)
    found = cache.codes(0, len(cache)).to_dense()
    torch.testing.assert_close(found, dense, rtol=2**-11, atol=0)
    faint = _constant(1e-12)
    cache = cache_latents(tiny_llama, documents, 1, faint, tmp_path / "f", progress=False)
    assert cache.facts.entries == len(cache), "a value too small for float16 is still active"
    with pytest.raises(NonFiniteError, match="too large for float16; cache with dtype='float32'"):
        cache_latents(tiny_llama, documents, 1, _constant(1e6), tmp_path / "l", progress=False)
    with pytest.raises(NonFiniteError, match="document 0 is NaN"):
        cache_latents(tiny_llama, documents, 1, _constant(float("nan")), tmp_path / "n", progress=False)


def test_statistics_are_those_of_the_dense_codes(tiny_llama, documents, sae, dense, tmp_path):
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", "float32", shard=40, progress=False)
    found = cache.statistics(bins=6)
    codes = dense.numpy()
    np.testing.assert_array_equal(found.counts, (codes > 0).sum(0))
    np.testing.assert_allclose(found.maximum, codes.max(0))
    for feature in range(64):
        values = codes[codes[:, feature] > 0, feature]
        if len(values):
            wanted, _ = np.histogram(values, 6, (0, values.max()))
            assert abs(found.histogram[feature] - wanted).sum() <= 2, "but for a value on an edge"
            assert found.mean[feature] == pytest.approx(values.mean(), rel=1e-5)
        else:
            assert not found.histogram[feature].any()
            assert found.mean[feature] == 0


def test_top_contexts_are_the_strongest_and_keep_apart(tiny_llama, documents, sae, dense, tmp_path):
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", "float32", progress=False)
    feature = int((dense > 0).sum(0).argmax())
    contexts = cache.top(feature, 50, before=3, after=2, apart=4)
    heights = [context.values[context.centre] for context in contexts]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == pytest.approx(float(dense[:, feature].max()))
    places = [(context.document, context.begin + context.centre) for context in contexts]
    assert all(a[0] != b[0] or abs(a[1] - b[1]) >= 4 for n, a in enumerate(places) for b in places[:n])
    for context in contexts:
        text = documents[context.document]
        np.testing.assert_array_equal(context.tokens, text[context.begin : context.begin + len(context.tokens)])
        firsts = [0, 19, 19, 51]
        for at, value in enumerate(context.values):
            position = context.begin + at
            wanted = dense[firsts[context.document] + position - 1, feature] if position else 0.0
            assert value == pytest.approx(float(wanted))
    assert cache.top(feature, 0) == []


def test_an_interrupted_run_goes_on_and_is_the_same_to_the_byte(tiny_llama, documents, sae, tmp_path, monkeypatch):
    whole = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "whole", shard=32, progress=False)
    calls, run = [], module.run_batch

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 4:
            for name in ("starts", "rows", "values"):
                (tmp_path / "part" / f"{name}.bin").open("ab").write(b"torn")
            raise KeyboardInterrupt
        return run(model, batch)

    monkeypatch.setattr(module, "run_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(tiny_llama, documents, 1, sae, tmp_path / "part", shard=32, progress=False)
    assert LatentCache(tmp_path / "part").facts.done == 2, "an unfinished cache can be read as far as it came"
    assert len(LatentCache(tmp_path / "part")) == 19
    found = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "part", shard=32, progress=False)
    assert len(calls) == 4 + 2, "finished shards are not run again"
    assert found.facts == whole.facts
    for name in ("documents", "tokens", "starts", "rows", "values"):
        assert (tmp_path / "part" / f"{name}.bin").read_bytes() == (tmp_path / "whole" / f"{name}.bin").read_bytes()
    cache_latents(tiny_llama, documents, 1, sae, tmp_path / "part", progress=False)
    assert len(calls) == 6, "a finished cache is only opened"


def test_stored_activations_give_the_same_cache(tiny_llama, documents, sae, tmp_path):
    store = capture(tiny_llama, documents, 1, tmp_path / "s", "float32", progress=False)
    direct = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", progress=False)
    stored = cache_of_store(store, documents, sae, tmp_path / "d", progress=False)
    assert stored.facts == direct.facts
    torch.testing.assert_close(stored.codes(0, 62).to_dense(), direct.codes(0, 62).to_dense())
    with pytest.raises(ModelError, match="not the finished store of these 3 documents"):
        cache_of_store(store, documents[:3], sae, tmp_path / "e", progress=False)


def test_a_million_tokens_take_less_than_a_hundredth_of_dense_codes(tmp_path):
    """At k = 32 of 16,384 features; counted on 131,072 tokens, of which every further one costs the same."""
    documents = [torch.zeros(1, 4096, dtype=torch.int64)] * 32
    cache = module._fill(
        "m", "s", documents, lambda number: torch.zeros(4096, 1), _Random(16_384, 32), tmp_path / "c", "float16", 0,
        1 << 16, False,
    )  # fmt: skip
    assert cache.facts.entries == 131_072 * 32
    assert cache.nbytes * 200 < cache.dense_bytes


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_codes_come_back(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
    width = data.draw(st.integers(1, 9))
    cells = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, -2.0, 3.0]), min_size=sum(lengths) * width, max_size=sum(lengths) * width)
    )
    wanted = torch.tensor(cells).view(sum(lengths), width)
    pieces = wanted.split(lengths)
    encoder = _Given(pieces)
    documents = [torch.arange(length)[None] for length in lengths]
    cache = module._fill("m", "s", documents, lambda n: pieces[n], encoder, folder / "c", "float16", 0, 7, False)
    torch.testing.assert_close(cache.codes(0, len(cache)).to_dense(), wanted)
    assert int(cache.statistics(3).counts.sum()) == int((wanted != 0).sum())


def test_what_does_not_belong_together_is_refused(tiny_llama, documents, sae, tmp_path):
    cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", progress=False)
    other = SAE(48, 64, TopK(5), seed=1).eval()
    for refused in (
        lambda: cache_latents(tiny_llama, documents, 2, sae, tmp_path / "c", progress=False),
        lambda: cache_latents(tiny_llama, documents, 1, other, tmp_path / "c", progress=False),
        lambda: cache_latents(tiny_llama, documents[:2], 1, sae, tmp_path / "c", progress=False),
        lambda: cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", "float32", progress=False),
    ):
        with pytest.raises(ModelError, match=r"holds latents of another .*; choose another directory"):
            refused()
    LatentCache(tmp_path / "c", tiny_llama, 1, sae)
    with pytest.raises(ModelError, match="another autoencoder"):
        LatentCache(tmp_path / "c", encoder=other)
    with pytest.raises(ModelError, match=r"of 'model.layers.1', not of 'model.layers.0'"):
        LatentCache(tmp_path / "c", tiny_llama, 0)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[0] += 1
    with pytest.raises(ModelError, match="another model"):
        LatentCache(tmp_path / "c", tiny_llama)


def test_unusable_requests_say_what_to_do(tiny_llama, documents, sae, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown layer '7'; known: 0 to 2"):
        cache_latents(tiny_llama, documents, 7, sae, tmp_path / "c", progress=False)
    with pytest.raises(ConfigurationError, match="one of float32, float16"):
        cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", "int8", progress=False)
    with pytest.raises(ConfigurationError, match="from 1 to 65,536"):
        cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", shard=1 << 17, progress=False)
    with pytest.raises(CalibrationError, match="a shard holds 20; cut it into pieces"):
        cache_latents(tiny_llama, documents, 1, sae, tmp_path / "c", shard=20, progress=False)
    with pytest.raises(CalibrationError, match="give longer ones"):
        cache_latents(tiny_llama, documents[1:2], 1, sae, tmp_path / "c", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    for used in ("full", "file"):
        with pytest.raises(OutputError, match="choose another directory"):
            cache_latents(tiny_llama, documents, 1, sae, tmp_path / used, progress=False)


def test_damaged_files_and_newer_versions_are_refused(tiny_llama, documents, sae, tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(CheckpointError, match="make one first"):
        LatentCache(folder)
    cache = cache_latents(tiny_llama, documents, 1, sae, folder, progress=False)
    with pytest.raises(ConfigurationError, match="from 0 to 63"):
        cache.occurrences(64)
    manifest = folder / "latents.json"
    said = json.loads(manifest.read_text())
    for changed, message in (
        ({"version": 2}, "is of version 2, this gossamer reads 1; update gossamer"),
        ({"format": "other"}, "does not describe a cache"),
        ({"shards": [{"rows": 3}]}, "is damaged"),
        ({"dtype": "int4"}, "is damaged"),
    ):
        manifest.write_text(json.dumps({**said, **changed}))
        with pytest.raises(CheckpointError, match=message):
            LatentCache(folder)
    manifest.write_text(json.dumps(said))
    (folder / "values.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes of"):
        LatentCache(folder)


def test_a_fingerprint_sees_weights_scale_and_rule(sae):
    before = encoder_fingerprint(sae)
    assert encoder_fingerprint(SAE(48, 64, TopK(5))) == before
    assert encoder_fingerprint(SAE(48, 64, TopK(6))) != before
    with torch.no_grad():
        sae.scale.mul_(2)
    assert encoder_fingerprint(sae) != before


class _Given(nn.Module):
    """Hands back the codes that it is asked to encode."""

    def __init__(self, pieces):
        super().__init__()

    def encode(self, x):
        return SparseCodes.from_dense(x)


class _Random(nn.Module):
    def __init__(self, width, k):
        super().__init__()
        self.width, self.k = width, k

    def encode(self, x):
        generator = torch.Generator().manual_seed(len(x))
        first = torch.randint(0, self.width, (len(x), 1), generator=generator)
        indices = (first + torch.arange(self.k) * 511) % self.width
        return SparseCodes.from_rows(indices.int(), torch.rand(indices.shape, generator=generator) + 0.1, self.width)


def _constant(value):
    """One feature of two, of the same value for every token."""

    class Constant(nn.Module):
        def encode(self, x):
            return SparseCodes.from_rows(torch.zeros(len(x), 1, dtype=torch.int32), torch.full((len(x), 1), value), 2)

        def settings(self):
            return {"value": value}

    return Constant()
