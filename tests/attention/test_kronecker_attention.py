from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention import tensor_exact, tensor_features
from gossamer.attention.kronecker_attention import (
    TensorSelfAttention,
    column_kronecker,
    exp_polynomial,
    feature_count,
    monomial_exponents,
    monomial_features,
    plan_polynomial,
    random_feature_attention,
    required_degree,
    score_bound,
    tensor_attention,
)
from gossamer.attention.tensor_polynomial import monomial_weights, relative_error
from gossamer.core.registry import REGISTER
from gossamer.errors import ConfigurationError


def drawn(order, n, seed=0, d=3, e=2, batch=2, heads=2, bound=1.2):
    generator = torch.Generator().manual_seed(seed)

    def table(width):
        return (2 * torch.rand(batch, heads, n, width, generator=generator, dtype=torch.float64) - 1) * bound

    return table(d), [table(d) for _ in range(order - 1)], [table(e) for _ in range(order - 1)]


def by_hand(q, keys, values, scale, causal=False, mask=None):
    """Every tuple of every query, one after the other."""
    out = torch.zeros(*q.shape[:-1], values[0].shape[-1], dtype=torch.float64)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        above, below = torch.zeros(out.shape[-1], dtype=torch.float64), 0.0
        for members in itertools.product(range(keys[0].shape[2]), repeat=len(keys)):
            if (causal and max(members) > i) or (mask is not None and not all(mask[b, j] for j in members)):
                continue
            score = math.prod([key[b, h, j] for key, j in zip(keys, members)], start=q[b, h, i]).sum()
            weight = math.exp(scale * float(score))
            above = above + weight * math.prod([v[b, h, j] for v, j in zip(values, members)])
            below += weight
        out[b, h, i] = above / below if below else 0.0
    return out


class TestTheAlgebra:
    def test_a_column_of_the_product_is_the_kronecker_product_of_the_columns(self):
        a, b = torch.randn(3, 2), torch.randn(4, 2)
        found = column_kronecker(a, b)
        for column in range(2):
            assert torch.equal(found[:, column], torch.kron(a[:, column], b[:, column]))

    def test_sums_over_pairs_are_products_of_sums(self):
        psi = [torch.randn(7, 20, dtype=torch.float64) for _ in range(2)]
        v = [torch.randn(7, 3, dtype=torch.float64) for _ in range(2)]
        left = column_kronecker(*psi).T @ column_kronecker(*v)
        right = (psi[0].T @ v[0]) * (psi[1].T @ v[1])
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)

    @given(st.integers(1, 4), st.integers(0, 5))
    @settings(max_examples=20, deadline=None)
    def test_monomials_are_all_there_once(self, width, degree):
        exponents = monomial_exponents(width, degree)
        wanted = {m for m in itertools.product(range(degree + 1), repeat=width) if sum(m) <= degree}
        assert {tuple(row) for row in exponents} == wanted
        assert len(exponents) == len(wanted) == feature_count(width, degree)
        x = torch.randn(5, width, dtype=torch.float64)
        powers = torch.stack([(x ** torch.from_numpy(row)).prod(-1) for row in exponents], -1)
        torch.testing.assert_close(monomial_features(x, degree), powers, rtol=1e-12, atol=1e-12)

    @given(st.integers(2, 4), st.integers(0, 5), st.integers(0, 99))
    @settings(max_examples=20, deadline=None)
    def test_weighted_monomials_make_the_polynomial_of_the_score(self, order, degree, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(order)]
        coefficients = np.random.default_rng(seed).normal(size=degree + 1)
        weights = torch.from_numpy(monomial_weights(coefficients, 3, 0.4))
        found = (weights * math.prod([monomial_features(row, degree) for row in rows])).sum()
        score = 0.4 * math.prod(rows).sum()
        assert float(found) == pytest.approx(np.polynomial.polynomial.polyval(float(score), coefficients), rel=1e-9)


class TestPolynomials:
    @pytest.mark.parametrize("basis", ["chebyshev", "taylor"])
    @pytest.mark.parametrize(("bound", "eps"), [(0.1, 1e-2), (1.0, 1e-3), (4.0, 1e-2), (8.0, 1e-4)])
    def test_the_relative_error_is_kept_and_a_degree_less_does_not_keep_it(self, bound, eps, basis):
        coefficients = exp_polynomial(bound, eps, basis)
        x = np.linspace(-bound, bound, 999)
        assert (np.abs(np.polynomial.polynomial.polyval(x, coefficients) - np.exp(x)) <= 1.001 * eps * np.exp(x)).all()
        from gossamer.attention.tensor_polynomial import truncated_exp

        shorter = truncated_exp(bound, len(coefficients) - 2, basis)
        assert relative_error(shorter, bound) > eps

    def test_a_constant_is_enough_where_every_score_is_zero(self):
        assert exp_polynomial(0.0, 1e-3).tolist() == [1.0]

    def test_chebyshev_needs_no_more_than_taylor(self):
        for bound in (0.5, 1.0, 3.0, 8.0):
            assert required_degree(bound, 1e-3) <= required_degree(bound, 1e-3, "taylor")

    def test_the_degree_grows_by_as_much_for_each_step_of_the_bound(self):
        degrees = [required_degree(bound, 1e-2) for bound in (2, 4, 6, 8, 10)]
        steps = np.diff(degrees)
        assert (steps >= 3).all()
        assert (steps <= 6).all()

    @pytest.mark.parametrize(
        ("bound", "eps", "said"), [(-1, 0.1, "bound is -1"), (1, 0, "eps 0"), (float("nan"), 0.1, "nan")]
    )
    def test_impossible_wishes_are_refused(self, bound, eps, said):
        with pytest.raises(ConfigurationError, match=said):
            exp_polynomial(bound, eps)

    def test_a_bound_beyond_double_precision_is_refused(self):
        with pytest.raises(ConfigurationError, match="double precision"):
            required_degree(30.0, 1e-6)


class TestAttention:
    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("chunk", [40, 1 << 20])
    def test_all_ways_agree_with_every_tuple_by_hand(self, order, causal, masked, chunk, monkeypatch):
        monkeypatch.setattr(tensor_exact, "_CHUNK", chunk)
        monkeypatch.setattr(tensor_features, "_AT_ONCE", chunk)
        n = {2: 6, 3: 5, 4: 3}[order]
        q, keys, values = drawn(order, n, seed=order)
        mask = torch.tensor([[False, True, True, False, True, True], [True] * 5 + [False]])[:, :n] if masked else None
        wanted = by_hand(q, keys, values, 1 / 3, causal, mask)
        options = {"causal": causal, "key_mask": mask}
        exact = tensor_attention(q, keys, values, **options)
        torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-12)
        everything = tensor_attention(q, keys, values, method="topk", count=n ** (order - 1), **options)
        torch.testing.assert_close(everything, wanted, rtol=0, atol=1e-12)
        close = tensor_attention(q, keys, values, method="polynomial", eps=1e-4, **options)
        bound = plan_polynomial(q, keys, 1 / 3, eps=1e-4).output_error(values)
        assert 0 < float((close - wanted).abs().max()) < bound

    def test_order_two_is_torchs_attention(self):
        q, keys, values = drawn(2, 9)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, keys[0], values[0], scale=1 / 3)
        torch.testing.assert_close(tensor_attention(q, keys, values), wanted, rtol=0, atol=1e-12)

    def test_padding_without_any_real_token_gives_zeros(self):
        q, keys, values = drawn(3, 4)
        mask = torch.tensor([[False] * 4, [True] * 4])
        for method in ("exact", "polynomial", "topk"):
            out = tensor_attention(q, keys, values, method=method, key_mask=mask)
            assert not out[0].any()
            assert torch.isfinite(out).all()
            assert out[1].all()

    def test_large_scores_do_not_overflow(self):
        q, keys, values = drawn(3, 5, bound=60.0)
        out = tensor_attention(q, keys, values)
        assert torch.isfinite(out).all()
        best = tensor_attention(q, keys, values, method="topk", count=1)
        torch.testing.assert_close(out, best, rtol=1e-6, atol=1e-3)

    def test_the_best_pair_alone_is_its_product_of_values(self):
        q, keys, values = drawn(3, 5, batch=1, heads=1)
        scores = torch.einsum("ic,jc,lc->ijl", q[0, 0], keys[0][0, 0], keys[1][0, 0]).flatten(1).argmax(1)
        wanted = values[0][0, 0][scores // 5] * values[1][0, 0][scores % 5]
        torch.testing.assert_close(tensor_attention(q, keys, values, method="topk", count=1)[0, 0], wanted)

    def test_gradients_are_those_of_the_dense_form(self):
        q, keys, values = drawn(3, 4, batch=1, heads=1)
        leaves = [t.requires_grad_() for t in (q, *keys, *values)]
        scores = torch.einsum("bhic,bhjc,bhlc->bhijl", q, *keys).flatten(3) / 3
        pairs = column_kronecker(values[0], values[1])
        wanted = torch.autograd.grad((scores.softmax(-1) @ pairs).square().sum(), leaves)
        found = torch.autograd.grad(tensor_attention(q, keys, values).square().sum(), leaves)
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_training_keeps_no_scores_and_gradients_of_several_chunks_are_right(self, monkeypatch):
        q, keys, values = drawn(3, 12, batch=1, heads=2)
        mask = torch.arange(12)[None] > 1
        leaves = [t.requires_grad_() for t in (q, *keys, *values)]
        grads, stored = [], []

        def keep(saved):
            stored[-1].append(saved.numel())
            return saved

        for chunk in (1 << 20, 400):
            monkeypatch.setattr(tensor_exact, "_CHUNK", chunk)
            stored.append([])
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = tensor_attention(q, keys, values, causal=True, key_mask=mask)
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        largest = [max(sizes) for sizes in stored]
        assert largest[0] >= 2 * 12**3 > 10 * largest[1]

    @pytest.mark.parametrize("method", ["exact", "polynomial", "topk"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
    def test_what_padding_holds_does_not_matter(self, method, bad):
        q, keys, values = drawn(3, 6, batch=1)
        mask = torch.arange(6)[None] < 4
        wanted = tensor_attention(q, keys, values, method=method, key_mask=mask)
        spoiled = [[table.clone() for table in tables] for tables in (keys, values)]
        for table in (*spoiled[0], *spoiled[1]):
            table[:, :, 4:] = bad
        found = tensor_attention(q, *spoiled, method=method, key_mask=mask)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        layer = TensorSelfAttention(8, 2, method=method)
        x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
        x[:, 4:] = bad
        assert torch.isfinite(layer(x, mask)).all()

    def test_no_score_exceeds_the_bound(self):
        q, keys, _ = drawn(3, 8)
        scores = torch.einsum("bhic,bhjc,bhlc->bhijl", q, *keys) / 3
        assert float(scores.abs().max()) <= score_bound(q, keys, 1 / 3) <= 1.2**3

    def test_more_random_features_come_closer(self):
        q, keys, values = drawn(3, 12, bound=1.0)
        exact = tensor_attention(q, keys, values)

        def error(features):
            found = [
                random_feature_attention(q, keys, values, features, generator=torch.Generator().manual_seed(seed))
                for seed in range(5)
            ]
            return float(torch.stack([(one - exact).square().mean() for one in found]).mean().sqrt())

        errors = [error(features) for features in (30, 300, 3000)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("method", ["exact", "polynomial", "topk"])
    def test_low_precision_in_gives_low_precision_out_and_no_worse(self, dtype, method):
        q, keys, values = drawn(3, 40)
        low = q.to(dtype), [key.to(dtype) for key in keys], [value.to(dtype) for value in values]
        found = tensor_attention(*low, method=method, count=1600)
        rounded = tensor_attention(low[0].double(), [k.double() for k in low[1]], [v.double() for v in low[2]])
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), rounded, rtol=0.01, atol=1e-3)


class TestRefusals:
    def test_features_beyond_memory_are_refused_with_what_caused_them(self):
        q, keys, values = drawn(3, 4, d=16)
        with pytest.raises(ConfigurationError, match=r"width 16 and degree 6 .* 74613 features"):
            tensor_attention(q, keys, values, method="polynomial", degree=6, memory_limit=1 << 20)

    def test_a_degree_too_low_for_a_positive_denominator_is_refused(self):
        q = torch.full((1, 1, 4, 1), 2.0, dtype=torch.float64)
        keys, values = [-q, q], [q, q]
        with pytest.raises(ConfigurationError, match="denominator of 4 queries is not positive"):
            tensor_attention(q, keys, values, method="polynomial", degree=1, basis="taylor")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"method": "guess"}, "method is 'guess'"),
            ({"method": "topk", "count": 0}, "count is 0"),
            ({"method": "polynomial", "degree": -1}, "degree is -1"),
            ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_mask has shape"),
        ],
    )
    def test_bad_options_are_named(self, change, said):
        q, keys, values = drawn(3, 4)
        with pytest.raises(ConfigurationError, match=said):
            tensor_attention(q, keys, values, **change)

    def test_bad_shapes_are_named(self):
        q, keys, values = drawn(3, 4)
        with pytest.raises(ConfigurationError, match="2 keys and 1 values"):
            tensor_attention(q, keys, values[:1])
        with pytest.raises(ConfigurationError, match=r"keys \(2, 2, 3, 3\)"):
            tensor_attention(q, [keys[0], keys[1][:, :, :3]], values)
        with pytest.raises(ConfigurationError, match="3 queries and 4 keys"):
            tensor_attention(q[:, :, :3], keys, values, causal=True)

    def test_infinite_entries_are_refused_by_the_polynomial(self):
        q, keys, values = drawn(3, 4)
        q[0, 0, 0, 0] = math.inf
        with pytest.raises(ConfigurationError, match="NaN or infinity"):
            tensor_attention(q, keys, values, method="polynomial")

    def test_impossible_layers_are_refused(self):
        with pytest.raises(ConfigurationError, match="num_heads is 3"):
            TensorSelfAttention(16, 3)
        with pytest.raises(ConfigurationError, match="order is 1"):
            TensorSelfAttention(16, 2, order=1)


class TestTheLayer:
    def test_it_is_registered(self):
        assert REGISTER["kronecker-attention"].factory is TensorSelfAttention

    @pytest.mark.parametrize("order", [2, 3, 4])
    def test_padding_and_later_tokens_change_nothing(self, order):
        torch.manual_seed(0)
        layer = TensorSelfAttention(8, 2, order=order, causal=True).double()
        x = torch.randn(2, 6, 8, dtype=torch.float64)
        mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        out = layer(x, mask)
        changed = x.clone()
        changed[:, 4:] += 1.0
        torch.testing.assert_close(layer(changed, mask)[:, :4], out[:, :4], rtol=0, atol=1e-12)

    def test_the_polynomial_layer_is_close_to_the_exact_one(self):
        torch.manual_seed(0)
        layer = TensorSelfAttention(8, 2).double()
        x = torch.randn(2, 6, 8, dtype=torch.float64)
        exact = layer(x)
        layer.method, layer.eps = "polynomial", 1e-5
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=1e-5)
        layer(x).sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
