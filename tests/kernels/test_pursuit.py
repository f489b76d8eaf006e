"""Pursuits against plain loops, least squares, finite differences and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.kernels import native, pursuit_compiled
from gossamer.kernels.pursuit import matching_pursuit, orthogonal_matching_pursuit


def problem(seed, signals=6, atoms=11, size=5):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(atoms, size, generator=generator, dtype=torch.float64)
    x = torch.randn(signals, size, generator=generator, dtype=torch.float64)
    return x, torch.nn.functional.normalize(dictionary, dim=1)


def by_hand(signal, dictionary, k, tolerance, nonnegative):
    residual, code = signal.clone(), torch.zeros(len(dictionary), dtype=signal.dtype)
    for _ in range(k):
        common = dictionary @ residual
        best = int((common if nonnegative else common.abs()).argmax())
        if (nonnegative and common[best] <= 0) or residual.norm() <= tolerance:
            break
        code[best] += common[best]
        residual = residual - common[best] * dictionary[best]
    return code, residual


@pytest.fixture(params=["reference", *native.instruction_sets()])
def path(request, monkeypatch):
    """Every way in which signals are pursued on this machine, with torch alone first."""
    if request.param == "reference":
        monkeypatch.setattr(pursuit_compiled, "offers", lambda name: False)
        yield request.param
    else:
        if not native.offers("pursuit_match"):
            pytest.skip("the compiled kernels are older than pursuits")
        with native.using(request.param):
            yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("nonnegative", "gram"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("k", [3, 40])
def test_all_ways_choose_the_same_atoms_with_the_same_gradients(path, dtype, nonnegative, gram, k):
    x, dictionary = (part.to(dtype) for part in problem(7, signals=9, atoms=70, size=37))
    weight = problem(8, signals=9, size=37)[0].to(dtype)
    parts = x.requires_grad_(), dictionary.requires_grad_()
    options = {"nonnegative": nonnegative, "gram": gram, "tolerance": 0.05}
    found = matching_pursuit(*parts, k, **options)
    for row, signal in enumerate(x.detach().double()):
        code, residual = by_hand(signal, dictionary.detach().double(), k, 0.05, nonnegative)
        torch.testing.assert_close(found.codes.to_dense()[row].double(), code, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.residual[row].double(), residual, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad((found.residual * weight).sum() + found.values.square().sum(), parts)
    residual, loss = x, 0.0
    for step in range(k):
        atom = dictionary[found.atoms[:, step]]
        value = (residual * atom).sum(1) * (found.values[:, step] != 0)
        residual, loss = residual - value[:, None] * atom, loss + value.square().sum()
    theirs = torch.autograd.grad((residual * weight).sum() + loss, parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.0, 4.5])
def test_all_ways_pursue_orthogonally(path, dtype, tolerance):
    x, dictionary = (part.to(dtype) for part in problem(9, signals=8, atoms=130, size=40))
    found = orthogonal_matching_pursuit(x, dictionary, 6, tolerance=tolerance)
    arguments = {"tol": tolerance**2} if tolerance else {"n_nonzero_coefs": 6}
    wanted = torch.zeros(8, 130, dtype=torch.float64)
    for row, signal in enumerate(x.double()):
        chosen = orthogonal_mp(dictionary.double().T.numpy(), signal.numpy(), **arguments)
        wanted[row] = torch.from_numpy(chosen)
    enough = (wanted != 0).sum(1) <= 6
    assert bool(enough.any())
    dense = found.codes.to_dense().double()
    torch.testing.assert_close(dense[enough], wanted[enough], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.residual.double(), x.double() - dense @ dictionary.double(), rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 8), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 1.5]))
def test_matching_pursuit_is_the_plain_loop(seed, k, nonnegative, gram, tolerance):
    x, dictionary = problem(seed)
    found = matching_pursuit(x, dictionary, k, tolerance=tolerance, nonnegative=nonnegative, gram=gram)
    for row, signal in enumerate(x):
        code, residual = by_hand(signal, dictionary, k, tolerance, nonnegative)
        torch.testing.assert_close(found.codes.to_dense()[row], code)
        torch.testing.assert_close(found.residual[row], residual)
    assert int(found.codes.counts.max()) <= k


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9))
def test_energy_falls_by_the_square_of_every_value(seed, k):
    x, dictionary = problem(seed)
    found = matching_pursuit(x, dictionary, k)
    energy = x.square().sum(1) - found.values.square().sum(1)
    torch.testing.assert_close(found.residual.square().sum(1), energy)
    shorter = matching_pursuit(x, dictionary, k - 1)
    assert bool((found.residual.norm(dim=1) <= shorter.residual.norm(dim=1) + 1e-12).all())
    # where nothing is left, which atom still has something in common with it is a matter of rounding
    left = found.values[:, : k - 1].abs() > 1e-9
    assert found.atoms[:, : k - 1][left].equal(shorter.atoms[left]), "more steps only go on"
    torch.testing.assert_close(found.values[:, : k - 1], shorter.values)


def test_the_gradient_is_that_of_finite_differences():
    x, dictionary = problem(3, signals=4)
    weight = problem(4, signals=4)[0]

    def loss(signal, atoms):
        found = matching_pursuit(signal, atoms, 6, gram=False)
        return (found.residual * weight).sum() + (found.codes.values.square()).sum()

    arguments = (x.requires_grad_(), dictionary.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda signal, raw: loss(signal, torch.nn.functional.normalize(raw, dim=1)), arguments, eps=1e-7, atol=1e-5
    )


def test_the_gradient_stores_no_dictionary_for_each_step():
    x, dictionary = (part.float() for part in problem(5, signals=8, atoms=500, size=16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        matching_pursuit(x.requires_grad_(), dictionary.requires_grad_(), 12)
    assert sum(saved) <= 500 * 16 + 8 * (2 * 16 + 2 * 12), "the dictionary once; signals, residuals, choices, values"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5))
def test_orthogonal_pursuit_is_scikit_learn_s(seed, k):
    x, dictionary = problem(seed)
    found = orthogonal_matching_pursuit(x, dictionary, k)
    expected = torch.from_numpy(orthogonal_mp(dictionary.T.numpy(), x.T.numpy(), n_nonzero_coefs=k)).reshape(11, -1).T
    torch.testing.assert_close(found.codes.to_dense(), expected, rtol=1e-6, atol=1e-8)
    products = torch.einsum("nd,nkd->nk", found.residual, dictionary[found.atoms])
    assert float(products.abs().max()) < 1e-9


def test_signals_are_done_when_they_are_explained():
    dictionary = problem(1)[1]
    exact = dictionary[:3] * 2
    for pursue in (matching_pursuit, orthogonal_matching_pursuit):
        found = pursue(exact, dictionary, 4, tolerance=1e-9)
        assert found.codes.counts.tolist() == [1, 1, 1]
    assert matching_pursuit(torch.zeros(2, 5, dtype=torch.float64), dictionary, 3).codes.counts.tolist() == [0, 0]


def test_equal_atoms_are_chosen_in_order_and_only_once_by_the_orthogonal_one():
    dictionary = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    x = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    assert matching_pursuit(x, dictionary, 2).codes.to_dense().tolist() == [[2, 0, 1]]
    assert orthogonal_matching_pursuit(x, dictionary, 3).codes.to_dense().tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, d: (x, d, 0), "k is 0"),
        (lambda x, d: (x[:, :4], d, 2), r"x is \(6, 4\)"),
        (lambda x, d: (x, 2 * d, 2), "has the length 2"),
        (lambda x, d: (x, d * torch.arange(11)[:, None].clamp(max=1), 2), "atom 0 has the length 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        matching_pursuit(*change(*problem(0)))
    with pytest.raises(ConfigurationError, match="only 11 atoms"):
        orthogonal_matching_pursuit(*problem(0), 12)
    x, dictionary = problem(0)
    x[4, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="signal 4"):
        matching_pursuit(x, dictionary, 2)
