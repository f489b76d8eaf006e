from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from autointerp_corpus import AFTER_THE, NUMBER, RARE, SAME_AS_THE, THE, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.features.autointerp.activity import CachedActivity, CodedActivity
from gossamer.features.autointerp.examples import ExampleBuilder, ExampleSettings, _chosen, _quantiles, _spans
from gossamer.features.autointerp.neighbours import neighbours_by_coactivation, neighbours_by_direction
from gossamer.features.autointerp.windows import Window, token_pieces
from gossamer.features.latent_capture import cache_latents


def test_windows_to_explain_and_to_test_come_from_different_documents(builder):
    record = builder.build(THE)
    explained = {w.document for w in (*record.train, *record.contrast)}
    tested = {w.document for w in (*record.test, *record.negatives)}
    assert not explained & tested
    assert len(record.train) == len(record.test) == len(record.negatives) == 20


def test_record_refuses_shared_documents(builder):
    record = builder.build(THE)
    with pytest.raises(ConfigurationError, match="used to explain and to test"):
        replace(record, test=record.train)


@pytest.mark.parametrize("latent", [THE, NUMBER, AFTER_THE])
def test_windows_show_every_activation_in_them(builder, activity, latent):
    firings = activity.firings(latent)
    where = set(zip(firings.documents.tolist(), firings.positions.tolist()))
    record = builder.build(latent)
    for window in (*record.train, *record.test, *record.negatives, *record.contrast):
        found = [(window.document, window.start + i) in where for i in range(len(window))]
        assert (window.values > 0).tolist() == found
        assert window.active == (window.kind == "active")
        assert window.text == "".join(" " + WORDS[t] for t in window.tokens)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 16))
def test_windows_around_activations_never_overlap_and_are_strongest_first(seed, length):
    draw = np.random.default_rng(seed)
    dense = torch.tensor(draw.exponential(size=(200, 1)) * (draw.random((200, 1)) < 0.3), dtype=torch.float32)
    activity = CodedActivity([np.arange(50)] * 4, SparseCodes.from_dense(dense))
    firings = activity.firings(0)
    spans = _spans(firings, activity.lengths, length, 1000)
    for place, (document, start) in enumerate(spans):
        assert 0 <= start <= 50 - length
        assert all(d != document or abs(s - start) >= length for d, s in spans[:place])
    peaks = [firings.window(*span, length).max() for span in spans]
    assert len(firings) == 0 or peaks[0] == firings.values.max()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 60), st.integers(1, 10), st.sampled_from(["quantiles", "top", "random", "mix"])
)
def test_samplers_take_as_many_as_asked_without_repeats(windows, count, quantiles, sampler):
    quantile = _quantiles(windows, quantiles)
    places = _chosen(quantile, count, sampler, np.random.default_rng(0))
    assert len(places) == min(windows, count) == len(set(places.tolist()))
    if sampler == "quantiles" and windows >= quantiles * (count // quantiles + 1):
        each = np.bincount(quantile[places], minlength=quantiles + 1)[1:]
        assert each.max() - each.min() <= 1
    if sampler == "top":
        assert places.tolist() == list(range(min(windows, count)))
    if sampler == "mix":
        assert set(range(int(0.2 * min(windows, count)))) <= set(places.tolist())


def test_quantile_one_is_weakest(builder):
    test = builder.build(THE).test
    weak = np.mean([w.peak for w in test if w.quantile == 1])
    strong = np.mean([w.peak for w in test if w.quantile == 5])
    assert weak < strong


def test_too_rare_latents_are_refused_with_the_remedy(builder):
    with pytest.raises(CalibrationError, match=r"latent 4 is active in 0 windows, .*; 20 are needed, .* leave it out"):
        builder.build(RARE)
    with pytest.raises(UnknownNameError, match="latent"):
        builder.build(99)


def test_neighbours_are_the_latents_that_share_most_tokens(activity):
    near = neighbours_by_coactivation(activity, THE)
    dense = activity.codes.to_dense() > 0
    both = (dense[:, THE] & dense[:, SAME_AS_THE]).sum() / (dense[:, THE] | dense[:, SAME_AS_THE]).sum()
    assert near[0][0] == SAME_AS_THE
    assert near[0][1] == pytest.approx(float(both))
    directions = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert [latent for latent, _ in neighbours_by_direction(directions, 0)] == [1]


def test_negatives_of_neighbours_are_silent_and_know_the_neighbour(activity, tokenizer, builder):
    wanted = replace(builder.settings, negatives=("neighbour", "random"), n_negatives=10)
    hard = ExampleBuilder(activity, tokenizer, wanted).build(THE)
    kinds = [w.kind for w in hard.negatives]
    assert kinds.count("neighbour") == 5
    assert kinds.count("random") == 5
    for window in hard.negatives:
        assert not window.active
        if window.kind == "neighbour":
            assert window.decoy.max() > 0
            assert 0 < window.distance <= 1


def test_similar_negatives_are_the_nearest_silent_windows(activity, tokenizer, builder):
    def embed(texts):
        vectors = np.array([[text.count(" whale") + 1e-3, text.count(" ship") + 1e-3] for text in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    wanted = replace(builder.settings, negatives=("similar",), n_negatives=6)
    record = ExampleBuilder(activity, tokenizer, wanted, embed=embed).build(NUMBER)
    assert len({(w.document, w.start) for w in record.negatives}) == 6
    assert all(w.kind == "similar" and not w.active and w.distance > 0.9 for w in record.negatives)
    with pytest.raises(ConfigurationError, match="give embed"):
        ExampleBuilder(activity, tokenizer, wanted)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"length": 0}, "length is 0"), ({"negatives": ("far",)}, "negatives are")]
)
def test_settings_out_of_range_are_named(wrong, said):
    with pytest.raises(ConfigurationError, match=said):
        ExampleSettings(**wrong)


def test_activity_of_a_cache_is_that_of_its_codes(tiny_llama, tmp_path):
    from gossamer.features.activation_rules import TopK
    from gossamer.features.sae import SAE

    documents = [torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    sae = SAE(48, 80, TopK(5)).eval()
    cache = cache_latents(tiny_llama, documents, 1, sae, tmp_path / "latents", progress=False, shard=60)
    cached = CachedActivity(cache)
    coded = CodedActivity(documents, cache.codes(0, len(cache)), skipped=1)
    np.testing.assert_array_equal(cached.counts, coded.counts)
    latent = int(cached.counts.argmax())
    for part in ("documents", "positions", "values"):
        np.testing.assert_array_equal(getattr(cached.firings(latent), part), getattr(coded.firings(latent), part))
    np.testing.assert_array_equal(cached.shared(latent), coded.shared(latent))
    np.testing.assert_array_equal(cached.tokens(3, 20, 10), documents[3][0, 20:])


def test_codes_of_another_text_are_refused():
    with pytest.raises(CalibrationError, match="3 rows of codes for 4 tokens"):
        CodedActivity([np.arange(4)], SparseCodes.from_dense(torch.ones(3, 2)))


def window(values, pieces=None, **facts):
    values = np.array(values, np.float32)
    return Window(
        np.arange(len(values)), tuple(pieces or [f" w{i}" for i in range(len(values))]), values, 0, 0, **facts
    )


def test_marked_runs_stand_between_marks():
    shown = window([0, 2, 3, 0, 4], [" a", " b", " c", " d", " e"])
    assert shown.highlighted(shown.values > 0) == " a<< b c>> d<< e>>"
    with pytest.raises(ConfigurationError, match="3 marks for 5 tokens"):
        shown.highlighted([True] * 3)


def test_marks_are_above_a_share_of_the_peak_and_strengths_go_to_ten():
    shown = window([0, 0.1, 1.0, 10.0])
    assert shown.marks(0.3).tolist() == [False, False, False, True]
    assert shown.marks(0.05).tolist() == [False, False, True, True]
    assert shown.strengths(10.0).tolist() == [0, 1, 1, 10]
    with pytest.raises(ConfigurationError, match="maximum is 0"):
        shown.strengths(0)


class Bytes:
    """A tokenizer of bytes: most letters beyond English take several."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


@given(st.text(min_size=1, max_size=20))
def test_pieces_of_bytes_add_up_to_the_text(text):
    ids = list(text.encode("utf-8", "surrogatepass").decode("utf-8", "ignore").encode())
    pieces = token_pieces(Bytes(), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == bytes(ids).decode()


class Spaced:
    """A tokenizer whose decoder drops the space in front of a text, as those of SentencePiece do."""

    def decode(self, ids, **_):
        return " ".join("abc"[i] for i in ids)


def test_pieces_keep_spaces_that_a_token_alone_does_not_show():
    assert token_pieces(Spaced(), [0, 1, 1]) == ("a", " b", " b")


def test_a_cut_letter_at_the_end_is_kept_as_the_decoder_writes_it():
    assert "".join(token_pieces(Bytes(), "é".encode()[:1])) == "\ufffd"
