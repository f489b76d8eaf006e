"""Gradient pursuit against a loop over signals, and against the encoder whose dictionary it uses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import TopK
from gossamer.features.gradient_pursuit import gradient_pursuit, pursue
from gossamer.features.sae import SAE
from gossamer.kernels.pursuit import matching_pursuit


def one_by_one(x, dictionary, k, nonneg=True):
    """The steps of the paper, one signal and one step at a time."""
    codes = torch.zeros(len(x), len(dictionary), dtype=x.dtype)
    for i, signal in enumerate(x):
        chosen, residual = [], signal
        for _ in range(k):
            common = dictionary @ residual
            ranked = common.clone() if nonneg else common.abs()
            ranked[chosen] = -torch.inf
            best = int(ranked.argmax())
            if ranked[best] <= 0:
                break
            chosen.append(best)
            gradient = common[chosen]
            direction = gradient @ dictionary[chosen]
            step = gradient.square().sum() / direction.square().sum()
            moved = codes[i, chosen] + step * gradient
            codes[i, chosen] = moved.clamp(min=0) if nonneg else moved
            residual = signal - codes[i] @ dictionary
    return codes


def draw(seed, signals=6, atoms=20, size=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(signals, size, generator=generator, dtype=torch.float64)
    return x, torch.randn(atoms, size, generator=generator, dtype=torch.float64)


@given(st.integers(0, 500), st.integers(1, 8), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_takes_the_steps_of_the_paper(seed, k, nonneg, with_gram):
    x, dictionary = draw(seed)
    gram = dictionary @ dictionary.t() if with_gram else None
    found = gradient_pursuit(x, dictionary, k, nonneg=nonneg, gram=gram)
    expected = one_by_one(x, dictionary, k, nonneg)
    torch.testing.assert_close(found.codes.to_dense(), expected)
    torch.testing.assert_close(found.residual, x - expected @ dictionary)


@given(st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_every_step_helps_where_values_are_free(seed):
    x, dictionary = draw(seed)
    lengths = [gradient_pursuit(x, dictionary, k, nonneg=False).residual.norm(dim=1) for k in range(8)]
    assert all(bool((after <= before + 1e-12).all()) for before, after in pairwise(lengths))


def test_orthogonal_atoms_are_found_exactly_with_budgets_of_their_own():
    dictionary = 3 * torch.eye(5)
    x = torch.tensor([[0.0, 6, 0, 3, 0], [1, 0, 0, 0, 2], [5, 4, 3, 2, 1]])
    found = gradient_pursuit(x, dictionary, torch.tensor([2, 1, 0]))
    expected = [[0, 2, 0, 1, 0], [0, 0, 0, 0, 2 / 3], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(found.codes.to_dense(), torch.tensor(expected))


def test_it_stops_where_no_atom_has_anything_in_common():
    dictionary = torch.tensor([[1.0, 0], [0, 1]])
    found = gradient_pursuit(torch.tensor([[-1.0, -2], [3, -1], [0, 0]]), dictionary, 2)
    assert found.codes.counts.tolist() == [0, 1, 0]
    assert torch.isfinite(found.values).all()


def test_it_beats_matching_pursuit_on_atoms_that_overlap():
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator) + 0.7, dim=1)
    x = torch.rand(50, 64, generator=generator) @ dictionary
    ours = gradient_pursuit(x, dictionary, 6).residual.square().sum()
    assert ours < matching_pursuit(x, dictionary, 6).residual.square().sum()


@pytest.mark.parametrize("tokens", [30, 130])
def test_an_autoencoder_is_pursued_with_as_many_features_as_it_uses(tokens):
    sae = SAE(16, 60, TopK(4), seed=1).eval()
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sae.prepare(x)
    codes = pursue(sae, x, rows=32)
    assert bool((codes.counts <= sae.encode(x).counts).all())
    better = (sae.decode(codes) - x).square().sum()
    assert better < (sae.decode(sae.encode(x)) - x).square().sum()
    assert int(pursue(sae, x, 2).counts.max()) == 2


def test_what_does_not_fit_is_refused():
    x, dictionary = draw(0)
    with pytest.raises(ConfigurationError, match="give \\(signals, d\\)"):
        gradient_pursuit(x, dictionary[:, 1:], 2)
    with pytest.raises(ConfigurationError, match="from 21 to 21"):
        gradient_pursuit(x, dictionary, 21)
    with pytest.raises(ConfigurationError, match="one for each of 6"):
        gradient_pursuit(x, dictionary, torch.tensor([1, 2]))
    with pytest.raises(ConfigurationError, match="gram is"):
        gradient_pursuit(x, dictionary, 2, gram=torch.eye(3))
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="signal 2"):
        gradient_pursuit(x, dictionary, 2)
