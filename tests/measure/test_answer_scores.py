"""Scores of answers, worked by hand."""

from __future__ import annotations

import pytest

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.answer_scores import answer_scores, plain_answer, word_f1


def test_case_marks_articles_and_spaces_do_not_count():
    assert plain_answer("  The U.S.   President's\tan apple") == "us presidents apple"
    assert plain_answer("Theory of a theatre") == "theory of theatre"  # articles are whole words


@pytest.mark.parametrize(
    ("given", "right", "expected"),
    [
        ("two red cats", "red dogs", 2 / 5),
        ("red red red", "red", 2 / 4),
        ("cats", "dogs", 0.0),
        ("The cat!", "a cat", 1.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("cat", "", 0.0),
    ],
)
def test_overlap_of_words_worked_by_hand(given, right, expected):
    assert word_f1(given, right) == pytest.approx(expected)
    assert word_f1(right, given) == pytest.approx(expected)


def test_the_nearest_of_several_right_answers_counts():
    found = answer_scores(["a red cat", "blue", ""], [["dog", "red cats", "Red cat."], ["green", "dark blue"], []])
    assert found.exact == pytest.approx(100 * 2 / 3)
    assert found.f1 == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)


def test_answers_without_questions_are_refused():
    with pytest.raises(ConfigurationError, match="1 answers were given to 2"):
        answer_scores(["a"], [["a"], ["b"]])
    with pytest.raises(CalibrationError, match="no question"):
        answer_scores([], [])
