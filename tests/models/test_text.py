from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import word_tokenizer

from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.models import BUNDLED_TEXTS, calibration_batches, evaluation_tokens, read_text

LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("name", BUNDLED_TEXTS)
def test_bundled_texts_are_long_and_clean(name):
    text = read_text(name)
    assert 1_000_000 < len(text.encode()) < 1_500_000
    assert not any(ord(character) < 32 and character != "\n" for character in text)


def test_moby_dick_has_its_chapters_in_order():
    text = read_text("moby-dick")
    assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    places = [text.index(f"\nCHAPTER {number}. ") for number in range(2, 136)]
    assert places == sorted(places)


def test_text_and_jsonl_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(tmp_path / "a.txt") == "café"
    lines = [json.dumps({"text": "one\u2028line", "id": 1}, ensure_ascii=False), "", json.dumps({"text": "two"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), "utf-8")
    assert read_text(tmp_path / "b.jsonl") == "one\u2028line\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
        ("model.txt", b"PK\x03\x00", "binary file .byte 3"),
        ("broken.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
        ("other.jsonl", b'{"content": "a"}', "line 1 has no string field 'text'"),
        ("empty.jsonl", b"\n", "no text"),
    ],
)
def test_files_without_usable_text_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(tmp_path / name)


def test_missing_file_and_misspelt_name_are_told_apart(tmp_path):
    with pytest.raises(CalibrationError, match="is not a file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="is not a file"):
        read_text(tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'moby-dick'"):
        read_text("moby-dik")


@given(words=st.integers(8, 200), sequences=st.integers(1, 8), length=st.integers(3, 8), bos=st.booleans())
def test_windows_are_pieces_of_the_text_and_do_not_overlap_if_it_is_long_enough(words, sequences, length, bos):
    tokenizer = word_tokenizer(bos)
    # distinct neighbours: the position of a window can be read off its tokens
    positions = [str(index) for index in range(words)]
    tokenizer.add_tokens(positions)
    ids = tokenizer(" ".join(positions), add_special_tokens=False)["input_ids"]
    batches = calibration_batches(" ".join(positions), tokenizer, sequences, length, seed=1)
    assert [batch.shape for batch in batches] == [(1, length)] * sequences
    assert all(batch.dtype == torch.int64 for batch in batches)
    bodies = [batch[0, bos:].tolist() for batch in batches]
    assert all(batch[0, 0] == 1 for batch in batches) or not bos
    starts = [ids.index(body[0]) for body in bodies]
    assert all(ids[start : start + len(body)] == body for start, body in zip(starts, bodies))
    if words // (length - bos) >= sequences:
        ordered = sorted(starts)
        assert all(b - a >= length - bos for a, b in pairwise(ordered))


def test_windows_depend_on_the_seed_alone(tokenizer):
    text = LETTERS * 20
    first, again, other = (calibration_batches(text, tokenizer, 4, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))


def test_too_short_text_says_how_many_tokens_there_are_and_are_needed(tokenizer):
    with pytest.raises(CalibrationError, match="has 26 tokens; 512 are needed"):
        calibration_batches(LETTERS, tokenizer)
    with pytest.raises(CalibrationError, match="text is empty"):
        calibration_batches(" \n", tokenizer)


@pytest.mark.parametrize("arguments", [{"sequences": 0}, {"length": 0}, {"length": 1}])
def test_impossible_window_settings_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="must be at least"):
        calibration_batches(LETTERS, word_tokenizer(bos=True), **arguments)


def test_evaluation_tokens_keep_the_order_and_begin_with_bos():
    assert evaluation_tokens("a b c d", word_tokenizer(bos=True)).tolist() == [[1, 3, 4, 5, 6]]
    assert evaluation_tokens("a b c d", word_tokenizer(bos=True), limit=3).tolist() == [[1, 3, 4]]
    assert evaluation_tokens("a b c d", word_tokenizer(), limit=3).tolist() == [[3, 4, 5]]


def test_evaluation_needs_two_tokens(tokenizer):
    with pytest.raises(CalibrationError, match="gives 1 tokens; at least 2"):
        evaluation_tokens("a", tokenizer)
    with pytest.raises(ConfigurationError, match="limit is 1"):
        evaluation_tokens("a b", tokenizer, limit=1)
