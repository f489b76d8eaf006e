"""The sweep against the optimal brain surgeon written out: one explicit inverse for every column, in float64."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.patterns import NM, Unstructured
from gossamer.core.quantization import Quantizer
from gossamer.core.selection import dropped_count
from gossamer.errors import ConfigurationError, NonFiniteError, PatternError, SingularError, SparsityError
from gossamer.pruning.column_sweep import Layer, factor, prune_columns, sweep

DAMPING = 0.01


def problem(rows=10, features=24, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    inputs = torch.randn(tokens, features, generator=generator) @ mixing
    return torch.randn(rows, features, generator=generator), inputs.t() @ inputs


def surgeon_by_the_book(weight, gram, pattern, sparsity=None, block=8, order=None, dead=(), quantizer=None):
    """Every row visits the columns in order; the inverse of what is left of the Hessian is taken anew each time."""
    rows, features = weight.shape
    order = list(range(features)) if order is None else order
    weight, hessian = weight.double()[:, order].clone(), gram.double()[order][:, order].clone()
    is_dead = torch.tensor([column in dead for column in order])
    weight[:, is_dead] = 0
    mean = hessian.diagonal()[~is_dead].mean()
    hessian.diagonal().add_(DAMPING * mean)
    hessian[is_dead, is_dead] = mean
    grid = quantizer.fit(weight, dim=1) if quantizer and quantizer.group_size is None else None
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(features)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    mask = torch.ones(rows, features, dtype=torch.bool)
    for j in range(features):
        if isinstance(pattern, NM):
            if j % pattern.m == 0:
                choose(mask, weight, pivots, j, j + pattern.m, pattern.m - pattern.n, by_row=True)
        elif j % block == 0:
            stop = min(j + block, features)
            width = 1 if pattern.scope == "row" else rows
            dropped = dropped_count(stop * width, sparsity) - dropped_count(j * width, sparsity)
            choose(mask, weight, pivots, j, stop, dropped, by_row=pattern.scope == "row")
        if quantizer and quantizer.group_size and j % quantizer.group_size == 0:
            grid = quantizer.fit(weight[:, j : j + quantizer.group_size], dim=1)
        target = grid.round(weight[:, j : j + 1])[:, 0] if grid else weight[:, j]
        target = target * mask[:, j]
        step = (weight[:, j] - target) / pivots[j]
        weight[:, j:] -= step[:, None] * inverses[j][0]
        weight[:, j] = target
    result, chosen = torch.empty_like(weight), torch.empty_like(mask)
    result[:, order], chosen[:, order] = weight, mask
    return result, chosen


def choose(mask, weight, pivots, start, stop, dropped, by_row):
    score = weight[:, start:stop].square() / pivots[start:stop]
    part = mask[:, start:stop]
    for rows in range(len(mask)) if by_row else [slice(None)]:
        flat = score[rows].reshape(-1)
        chosen = torch.ones_like(flat, dtype=torch.bool)
        chosen[flat.argsort(stable=True)[:dropped]] = False
        part[rows] = chosen.view(part[rows].shape)


PATTERNS = [
    (Unstructured("layer"), 0.5),
    (Unstructured("row"), 0.7),
    (NM(2, 4), None),
    (NM(4, 8), None),
    (NM(1, 4), None),
    (NM(2, 3), None),
]


def blocks_for(pattern):
    return 12 if isinstance(pattern, NM) and pattern.m == 3 else 16


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_the_sweep_is_the_surgeon(pattern, sparsity):
    weight, gram = problem()
    block = blocks_for(pattern)
    pruned, mask, _ = prune_columns(weight, factor(gram, DAMPING), pattern, sparsity, block_size=block)
    expected, chosen = surgeon_by_the_book(weight, gram, pattern, sparsity, block)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


def test_a_block_that_does_not_divide_the_columns_ends_early():
    weight, gram = problem(features=29)
    pruned, mask, _ = prune_columns(weight, factor(gram, DAMPING), Unstructured(), 0.6, block_size=8)
    expected, chosen = surgeon_by_the_book(weight, gram, Unstructured(), 0.6, 8)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("pattern", "group"), [(Unstructured(), 1), (NM(2, 4), 4)])
def test_ordered_by_the_hessian_the_largest_come_first_and_groups_stay_whole(pattern, group):
    weight, gram = problem()
    factored = factor(gram, DAMPING, "hessian", group)
    mass = gram.diagonal().view(-1, group).sum(1)
    order = [g * group + i for g in mass.argsort(descending=True).tolist() for i in range(group)]
    assert factored.order.tolist() == order
    pruned, mask, _ = prune_columns(weight, factored, pattern, 0.5, block_size=8)
    expected, chosen = surgeon_by_the_book(weight, gram, pattern, 0.5, 8, order)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_rounding_in_the_same_sweep_is_the_surgeon_too(group_size, pattern):
    weight, gram = problem()
    quantizer = Quantizer(bits=4, group_size=group_size)
    pruned, mask, _ = prune_columns(weight, factor(gram, DAMPING), pattern, 0.5, block_size=16, quantizer=quantizer)
    expected, chosen = surgeon_by_the_book(weight, gram, pattern, 0.5, 16, quantizer=quantizer)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("order", ["natural", "hessian"])
def test_dead_columns_are_zeroed_and_disturb_nobody(order):
    weight, gram = problem()
    dead = [3, 17]
    gram[dead], gram[:, dead] = 0, 0
    places = gram.diagonal().argsort(descending=True, stable=True).tolist() if order == "hessian" else None
    pruned, mask, _ = prune_columns(weight, factor(gram, DAMPING, order), Unstructured(), 0.5, block_size=8)
    expected, chosen = surgeon_by_the_book(weight, gram, Unstructured(), 0.5, 8, places, dead)
    assert not pruned[:, dead].any()
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


def test_a_hessian_of_fewer_tokens_than_features_is_swept_all_the_same():
    weight, gram = problem(tokens=6)
    assert torch.linalg.matrix_rank(gram) == 6
    pruned, mask, _ = prune_columns(weight, factor(gram, DAMPING), Unstructured(), 0.5, block_size=8)
    expected, chosen = surgeon_by_the_book(weight, gram, Unstructured(), 0.5, 8)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("features", [24, 300])
def test_the_factor_is_that_of_the_inverse(features):
    _, gram = problem(features=features, tokens=2 * features)
    upper = factor(gram, DAMPING).upper.double()
    damped = gram.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    torch.testing.assert_close(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(features).double(), rtol=1e-3, atol=1e-3)


def test_the_damping_grows_until_the_hessian_can_be_factored():
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.05  # smallest eigenvalue −0.05
    assert factor(gram, 0.01).damping == pytest.approx(0.1)


def test_the_scale_of_the_hessian_changes_nothing_even_beside_dead_columns():
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    whole, mask, _ = prune_columns(weight, factor(gram), Unstructured(), 0.5)
    scaled, same, _ = prune_columns(weight, factor(gram * 2.0**-9), Unstructured(), 0.5)
    assert torch.equal(mask, same)
    torch.testing.assert_close(scaled, whole)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("quantizer", [None, Quantizer(bits=4)])
def test_layers_swept_side_by_side_are_what_they_are_alone(pattern, sparsity, quantizer):
    factored = factor(problem()[1])
    layers = [Layer(problem(rows, seed=rows)[0], sparsity, name=f"layer {rows}") for rows in (5, 1, 12)]
    options = {"block_size": blocks_for(pattern), "quantizer": quantizer}
    for layer, beside in zip(layers, sweep(layers, factored, pattern, **options)):
        (alone,) = sweep([layer], factored, pattern, **options)
        assert torch.equal(beside.mask, alone.mask)
        torch.testing.assert_close(beside.weight, alone.weight, rtol=1e-5, atol=1e-5)
        assert beside.loss == pytest.approx(alone.loss, rel=1e-5)


def test_layers_side_by_side_may_differ_in_sparsity():
    factored = factor(problem()[1])
    layers = [Layer(problem(seed=1)[0], 0.25), Layer(problem(seed=2)[0], 0.75)]
    swept = sweep(layers, factored, Unstructured(), block_size=8)
    assert [float((~one.mask).float().mean()) for one in swept] == [0.25, 0.75]


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("sparsity", [0.3, 0.77, 0.999])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_count_is_exact_whatever_the_block(scope, sparsity, block):
    weight, gram = problem(rows=11, features=29)
    _, mask, _ = prune_columns(weight, factor(gram), Unstructured(scope), sparsity, block_size=block)
    if scope == "row":
        assert set((~mask).sum(1).tolist()) == {dropped_count(29, sparsity)}
    else:
        assert int((~mask).sum()) == dropped_count(11 * 29, sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4)])
def test_zeros_that_are_there_stay_even_where_there_are_too_many(pattern):
    weight, gram = problem()
    weight[:, :7] = 0
    pruned, mask, _ = prune_columns(weight, factor(gram), pattern, 0.5, block_size=8, fixed_zeros=weight == 0)
    assert not mask[:, :7].any()
    assert not pruned[:, :7].any()
    assert int((~mask[:, 8:]).sum()) == 10 * 16 // 2


def test_masks_are_given_to_all_layers_or_to_none():
    weight, gram = problem()
    layers = [Layer(weight, 0.5), Layer(weight, mask=weight > 0)]
    with pytest.raises(ConfigurationError, match="only some of the layers"):
        sweep(layers, factor(gram), Unstructured())


def test_a_sparsity_that_is_missing_or_contradicts_the_pattern_is_refused():
    weight, gram = problem()
    with pytest.raises(SparsityError, match="leaves the sparsity open"):
        prune_columns(weight, factor(gram), Unstructured())
    with pytest.raises(SparsityError, match=r"0\.7 contradicts the pattern 2:4"):
        prune_columns(weight, factor(gram), NM(2, 4), 0.7)


def test_blocks_and_groups_must_fit_together():
    weight, gram = problem(features=18)
    factored = factor(gram)
    with pytest.raises(ConfigurationError, match="block_size 10 must be a multiple of 4"):
        prune_columns(weight, factored, NM(2, 4), block_size=10)
    with pytest.raises(PatternError, match="multiple of 4"):
        prune_columns(weight, factored, NM(2, 4), block_size=8)
    with pytest.raises(ConfigurationError, match="group_size is 6"):
        prune_columns(weight, factored, NM(2, 4), block_size=24, quantizer=Quantizer(group_size=6))


def test_a_hessian_without_sense_is_refused_by_name():
    with pytest.raises(NonFiniteError, match=r"up_proj: the Hessian holds NaN"):
        factor(torch.full((2, 2), float("nan")), name="up_proj")
    with pytest.raises(SingularError, match=r"up_proj.*2 features from 3 tokens.*eigenvalues from -49 to 51"):
        factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), name="up_proj", tokens=3)
    with pytest.raises(ConfigurationError, match="damping is 0"):
        factor(torch.eye(2), damping=0)
    with pytest.raises(ConfigurationError, match="order 'backwards'"):
        factor(torch.eye(2), order="backwards")
