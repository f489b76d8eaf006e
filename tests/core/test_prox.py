"""Every proximal operator against a search over a fine grid, and what sets penalties apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.prox import CEL0, L1, PENALTIES, KSparse, Lq, penalty, prox
from gossamer.errors import ConfigurationError, UnknownNameError

GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(-6, 6, 48_001, dtype=torch.float64)])
VARIANTS = [
    ("l1", {}),
    ("l1", {"nonnegative": True}),
    ("l0", {}),
    ("l1/2", {}),
    *(("lq", {"q": q}) for q in (0.1, 0.3, 0.5, 2 / 3, 0.8, 0.95)),
    *(("cel0", {"length": length}) for length in (0.4, 1.0, 1.7)),
    *(("mcp", {"a": a}) for a in (0.5, 1.2, 3.0)),
    *(("scad", {"a": a}) for a in (2.1, 3.7)),
    *(("log", {"eps": eps}) for eps in (0.01, 0.1, 2.0)),
]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(VARIANTS),
    st.floats(-5, 5),
    st.floats(0.01, 3),
    st.sampled_from([0.2, 0.5, 0.99, 1.0, 1.7]),
)
def test_no_point_of_a_grid_is_better(variant, u, lam, step):
    name, parameters = variant
    one = penalty(name, lam, **parameters)
    u = torch.tensor(u, dtype=torch.float64)

    def objective(x):
        return (x - u).square() / 2 + step * one.value(x)

    found = one.prox(u[None], step)
    assert float(objective(found)) <= float(objective(GRID).min()) + 1e-9
    assert found.dtype == u.dtype


@pytest.mark.parametrize(("name", "parameters"), [one for one in VARIANTS if "nonnegative" not in one[1]])
def test_operators_are_odd_and_grow(name, parameters):
    values = torch.linspace(0, 5, 400, dtype=torch.float64)
    found = prox(name, values, 0.7, 0.8, **parameters)
    assert torch.equal(prox(name, -values, 0.7, 0.8, **parameters), -found)
    assert (found.diff() >= -1e-12).all()
    assert found[0] == 0
    assert (found <= values + 1e-12).all()


@pytest.mark.parametrize("name", sorted(set(PENALTIES) - {"k-sparse"}))
def test_without_weight_nothing_changes(name):
    values = torch.linspace(-2, 2, 41, dtype=torch.float64)
    assert torch.allclose(prox(name, values, 0.0, 0.5), values)


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_single_precision_agrees_with_double(name):
    values = torch.linspace(-4, 4, 1001, dtype=torch.float64)
    found = prox(name, values.float(), 0.6, 0.9)
    assert found.dtype == torch.float32
    apart = (found.double() - prox(name, values, 0.6, 0.9)).abs() > 1e-4
    assert apart.sum() <= 2  # next to a jump


def test_nonnegative_codes_have_their_own_soft_threshold():
    assert prox("l1", torch.tensor([-3.0, 0.5, 2.0]), 1.0, nonnegative=True).tolist() == [0, 0, 1]
    assert L1(1.0, nonnegative=True).value(torch.tensor([-1.0, 2.0])).tolist() == [math.inf, 2]


@pytest.mark.parametrize(("name", "parameters"), [("cel0", {"length": 0.9}), ("mcp", {"a": 1.5})])
def test_the_quick_way_is_the_definition(name, parameters):
    u = torch.linspace(-4, 4, 801, dtype=torch.float64)
    for lam in (0.0, 0.3, 2.0):
        one = penalty(name, lam, **parameters)
        assert torch.allclose(one.prox(u, 0.8), u.sign() * one.shrunk(u.abs(), 0.8), atol=1e-12)


def test_thresholds_by_hand():
    assert prox("l0", torch.tensor([1.9, 2.1]), 2.0).tolist() == pytest.approx([0, 2.1])
    assert prox("l1", torch.tensor([1.9, 2.1]), 2.0).tolist() == pytest.approx([0, 0.1])
    # of Xu et al.: (54^(1/3) / 4) l^(2/3) for min (x − u)² + l |x|^(1/2)
    edge = 54 ** (1 / 3) / 4 * (2 * 0.3) ** (2 / 3)
    assert prox("l1/2", torch.tensor([edge - 1e-4, edge + 1e-4]), 0.3).ne(0).tolist() == [False, True]


def test_cel0_is_l0_where_it_is_flat_and_never_above():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    relaxed, exact = CEL0(0.5, length=2.0).value(x), penalty("l0", 0.5).value(x)
    assert (relaxed <= exact + 1e-12).all()
    far = x.abs() >= math.sqrt(2 * 0.5) / 2
    assert torch.allclose(relaxed[far], exact[far])
    assert float(relaxed.min()) == pytest.approx(0, abs=1e-12)


def test_cel0_takes_a_length_for_every_coefficient():
    u = torch.tensor([[1.0, 1.0], [0.4, 0.4]], dtype=torch.float64)
    both = CEL0(0.3, torch.tensor([0.5, 1.5])).prox(u, 0.4)
    for column, length in enumerate((0.5, 1.5)):
        assert torch.allclose(both[:, column], CEL0(0.3, length).prox(u[:, column], 0.4))


def test_cel0_with_a_long_step_is_the_hard_threshold():
    u = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert torch.equal(prox("cel0", u, 0.5, 1.0), prox("l0", u, 0.5, 1.0))
    assert not torch.equal(prox("cel0", u, 0.5, 0.9), prox("l0", u, 0.5, 0.9))


def test_k_sparse_keeps_the_largest():
    u = torch.tensor([[0.1, -3.0, 2.0, 0.5]])
    assert KSparse(k=2).prox(u).tolist() == [[0, -3, 2, 0]]
    assert KSparse(k=9).prox(u).equal(u)
    assert float(KSparse(k=1).value(u).max()) == math.inf
    assert float(KSparse(k=4).value(u).sum()) == 0


def test_only_l1_is_convex():
    assert [name for name in PENALTIES if penalty(name, 0.1).convex] == ["l1"]
    assert L1(0.1) == penalty("l1", 0.1)


@pytest.mark.parametrize(
    ("name", "lam", "parameters", "word"),
    [
        ("l1", -1.0, {}, "lam is -1.0"),
        ("l0", math.nan, {}, "lam is nan"),
        ("lq", 1.0, {"q": 1.0}, "q is 1.0"),
        ("cel0", 1.0, {"length": 0.0}, "length is 0.0"),
        ("mcp", 1.0, {"a": 0}, "a is 0"),
        ("scad", 1.0, {"a": 2}, "a is 2"),
        ("log", 1.0, {"eps": 0}, "eps is 0"),
        ("k-sparse", 0.0, {"k": 0}, "k is 0"),
        ("mcp", 1.0, {"b": 1}, "no parameter 'b'"),
        ("l1/2", 1.0, {"q": 0.5}, "no parameter 'q'"),
    ],
)
def test_bad_input_is_named(name, lam, parameters, word):
    with pytest.raises(ConfigurationError, match=word):
        penalty(name, lam, **parameters)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UnknownNameError, match="cel0"):
        prox("cel1", torch.zeros(1), 1.0)
    with pytest.raises(ConfigurationError, match="step is 0"):
        prox("l1", torch.zeros(1), 1.0, 0)


def test_newton_meets_the_closed_forms():
    u = torch.linspace(0.01, 8, 500, dtype=torch.float64)
    for closed, near in ((0.5, 0.5 + 1e-12), (2 / 3, 2 / 3 + 1e-12)):
        assert torch.allclose(Lq(0.7, closed).prox(u), Lq(0.7, near).prox(u), atol=1e-7)
