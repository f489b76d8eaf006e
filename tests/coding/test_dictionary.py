"""Dictionaries that are planted and found again."""

from __future__ import annotations

import pytest
import torch

from gossamer.coding.dictionary import DictionaryLearning
from gossamer.errors import ConfigurationError, NonFiniteError, UnknownNameError


def planted(signals=2000, atoms=24, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, size, generator=generator), dim=1)
    codes = torch.randn(signals, atoms, generator=generator) * (torch.rand(signals, atoms, generator=generator) < 0.1)
    return codes @ dictionary + 0.01 * torch.randn(signals, size, generator=generator), dictionary


def found_again(dictionary, atoms):
    return float(((atoms @ dictionary.T).abs().max(0).values > 0.95).float().mean())


@pytest.mark.parametrize("penalty", ["cel0", "l0", "l1/2", "mcp", "l1"])
def test_planted_atoms_are_found(penalty):
    x, dictionary = planted()
    learning = DictionaryLearning(24, penalty, target_l0=2.4, epochs=8, batch_size=200, seed=1)
    found = learning.fit(x)
    assert found_again(dictionary, found.atoms) > 0.7  # of random atoms, none
    assert torch.allclose(found.atoms.norm(dim=1), torch.ones(24), atol=1e-5)
    assert found.error[-1] < 0.5 * found.error[0]
    assert sum(found.counts[-15:]) / 15 == pytest.approx(2.4, rel=0.2)


@pytest.mark.parametrize(("update", "rate"), [("gradient", 5.0), ("mod", 1.0)])
def test_other_steps_of_atoms_find_them_too(update, rate):
    x, dictionary = planted()
    how = DictionaryLearning(24, target_l0=2.4, epochs=12, batch_size=300, update=update, rate=rate, seed=1)
    assert found_again(dictionary, how.fit(x).atoms) > 0.8


def test_a_fixed_number_of_codes_finds_them():
    x, dictionary = planted()
    how = DictionaryLearning(24, "k-sparse", parameters={"k": 3}, epochs=8, batch_size=200, seed=1)
    found = how.fit(x)
    assert found_again(dictionary, found.atoms) > 0.75
    assert found.counts[-1] <= 3


def test_atoms_that_nothing_uses_are_drawn_anew():
    x, dictionary = planted(atoms=8)
    away = (torch.arange(16) > 0).float()
    start = torch.cat([dictionary * away, torch.zeros(4, 16)])
    start[8:, 0] = 1
    only = x * away
    found = DictionaryLearning(12, target_l0=1, epochs=30, batch_size=500, warm_up=0, seed=0).fit(only, start)
    assert found.replaced >= 4
    assert not (found.atoms[8:, 0].abs() > 0.99).any()


def test_the_same_seed_learns_the_same_and_starts_count():
    x, dictionary = planted(signals=500)
    how = DictionaryLearning(24, target_l0=2, epochs=2, batch_size=100)
    assert torch.equal(how.fit(x).atoms, how.fit(x).atoms)
    kept = DictionaryLearning(24, target_l0=2, epochs=1, batch_size=500).fit(x, dictionary)
    assert found_again(dictionary, kept.atoms) == 1


def test_a_given_weight_stays():
    x, _ = planted(signals=400)
    assert DictionaryLearning(10, "l1", lam=0.3, epochs=2).fit(x).lam == 0.3
    assert DictionaryLearning(10, "cel0", lam=0.02, epochs=2).fit(x).lam == 0.02


def test_more_atoms_than_signals():
    x, _ = planted(signals=6)
    atoms = DictionaryLearning(10, lam=0.05, epochs=1).fit(x).atoms
    assert len(torch.unique((atoms * 1e4).round(), dim=0)) == 10


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lam": 0.1, "target_l0": 2}, "give one of the two"),
        ({}, "give one of the two"),
        ({"penalty": "k-sparse"}, "parameters="),
        ({"lam": 0.1, "epochs": 0}, "epochs is 0"),
        ({"lam": 0.1, "forget": 2.0}, "forget is 2.0"),
        ({"lam": 0.1, "rate": 0}, "rate is 0"),
        ({"lam": 0.1, "update": "svd"}, "'svd'"),
    ],
)
def test_bad_settings_are_named(options, word):
    with pytest.raises(ConfigurationError, match=word):
        DictionaryLearning(8, **options)


def test_bad_signals_are_named():
    how = DictionaryLearning(8, lam=0.1)
    x, _ = planted(signals=50)
    with pytest.raises(ConfigurationError, match="not zero"):
        how.fit(torch.zeros(4, 8))
    with pytest.raises(ConfigurationError, match="start is"):
        how.fit(x, torch.zeros(3, 3))
    x[7, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="signal 7"):
        how.fit(x)
    with pytest.raises(UnknownNameError, match="cel0"):
        DictionaryLearning(8, "cel", lam=0.1)
