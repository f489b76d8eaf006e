from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.papers.reber import INSIDE, count_valid, encode, is_valid, near_miss, reber_dataset, valid_string


@pytest.mark.parametrize("string", ["BTXSE", "BPVVE", "BTSSXSE", "BTXXVVE", "BPTVPSE", "BPVPXTVVE"])
def test_walks_of_the_automaton_are_valid(string):
    assert is_valid(string)


@pytest.mark.parametrize(
    "string", ["", "B", "BE", "TXSE", "BTXS", "BTXSEE", "BTXVE", "BPPVE", "BTXXE", "bTXSE", "B0XSE"]
)
def test_everything_else_is_not(string):
    assert not is_valid(string)


def test_the_count_is_that_of_brute_force():
    for length in (5, 6, 7, 8):
        strings = ("B" + "".join(inside) + "E" for inside in product(INSIDE, repeat=length - 2))
        assert count_valid(length) == sum(map(is_valid, strings))


def test_valid_strings_of_a_length_are_equally_likely():
    generator = Random(0)
    drawn = [valid_string(8, generator) for _ in range(2000)]
    assert all(map(is_valid, drawn))
    counts = [drawn.count(string) for string in set(drawn)]
    assert len(counts) == count_valid(8) == 7
    assert min(counts) > 2000 / 7 * 0.75
    with pytest.raises(ConfigurationError, match="4 symbols"):
        valid_string(4, generator)


def test_a_near_miss_differs_in_one_symbol_and_is_invalid():
    generator = Random(0)
    for length in range(5, 40):
        string = valid_string(length, generator)
        wrong = near_miss(string, generator)
        assert sum(a != b for a, b in zip(string, wrong, strict=True)) == 1
        assert not is_valid(wrong)
        assert (wrong[0], wrong[-1]) == ("B", "E")


@pytest.mark.parametrize("p_valid", [0.0, 0.3, 0.5, 1.0])
def test_shares_are_exact_and_no_string_comes_twice(p_valid):
    data = reber_dataset(400, p_valid, seed=1, lengths=(10, 25))
    assert len(set(data.strings)) == len(data) == 400
    assert int(data.labels.sum()) == round(400 * p_valid)
    assert data.labels.tolist() == [int(is_valid(string)) for string in data.strings]
    assert {len(string) for string in data.strings} <= set(range(10, 26))


def test_lengths_tell_nothing():
    data = reber_dataset(1000, seed=0, lengths=(10, 25))
    of = [sorted(data.lengths[data.labels == label].tolist()) for label in (0, 1)]
    assert of[0] == of[1]


def test_near_misses_have_their_share():
    def distance_one(string):
        changed = (string[:i] + s + string[i + 1 :] for i in range(1, len(string) - 1) for s in INSIDE)
        return any(map(is_valid, changed))

    for share in (0.0, 0.5, 1.0):
        data = reber_dataset(300, near_misses=share, seed=2, lengths=(12, 25))
        wrong = [string for string, label in zip(data.strings, data.labels) if not label]
        close = sum(map(distance_one, wrong)) / len(wrong)
        assert close == pytest.approx(share, abs=0.02)


def test_tokens_are_ascii_and_padded_with_zero():
    data = encode(["BTXSE", "BPVPSE"])
    assert data.tokens.tolist() == [[66, 84, 88, 83, 69, 0], [66, 80, 86, 80, 83, 69]]
    assert data.lengths.tolist() == [5, 6]
    assert data.labels.tolist() == [1, 1]


def test_a_seed_fixes_everything_and_parts_do_not_overlap():
    one, other, third = (reber_dataset(100, seed=seed) for seed in (3, 3, 4))
    assert one.strings == other.strings != third.strings
    training, held_out = one.split(70)
    assert (len(training), len(held_out)) == (70, 30)
    assert torch.equal(torch.cat([training.tokens, held_out.tokens]), one.tokens)
    with pytest.raises(ConfigurationError, match="training is 100"):
        one.split(100)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 10, "lengths": (4, 20)}, r"lengths \(4, 20\)"),
        ({"n": 10, "p_valid": 1.5}, "p_valid is 1.5"),
        ({"n": 10, "near_misses": -1}, "near_misses is -1"),
        ({"n": 100, "lengths": (5, 8)}, "50 valid strings of 5 to 8 symbols"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        reber_dataset(**arguments)
