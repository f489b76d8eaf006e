"""Routing attention: against brute force, against dense attention, and what a later token may change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gossamer.attention.cluster_attention import (
    SELF_SCORE,
    Members,
    balanced_topk_route,
    clustered_attention,
    ordered_attention,
)
from gossamer.attention.local_attention import RelativeLocalAttention
from gossamer.attention.routing_attention import RoutingAttention, update_centroids_after
from gossamer.errors import ConfigurationError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q, k, v, members, causal, shared):
    """One token, one cluster, one key at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                found = []
                for queries, keys in zip(members.queries[b, h].tolist(), members.keys[b, h].tolist()):
                    seen = [j for j in keys if j < k.shape[2] and (j <= i or not causal)]
                    if i not in queries or not seen:
                        continue
                    scores = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[3]) for j in seen])
                    if shared:
                        scores = torch.where(torch.tensor([j == i for j in seen]), SELF_SCORE, scores)
                    found.append(scores.softmax(0) @ v[b, h, seen])
                if found:
                    out[b, h, i] = torch.stack(found).mean(0)
    return out


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 14),
    clusters=st.integers(1, 5),
    window=st.integers(1, 16),
    causal=st.booleans(),
    shared=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clusters_attend_as_written_by_hand(n, clusters, window, causal, shared, padded, seed):
    q, k, v = draw(3, 2, 2, n, 4, seed=seed)
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n - 3)]]) if padded else None
    chosen = [balanced_topk_route(draw(2, 2, n, clusters, seed=seed + part), window, mask) for part in range(2)]
    members = Members(chosen[0], chosen[0] if shared else chosen[1])
    got = clustered_attention(q, k, v, members, causal=causal, shared=shared)
    torch.testing.assert_close(got, by_hand(q, k, v, members, causal, shared))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 14),
    clusters=st.integers(1, 4),
    window=st.integers(1, 16),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_strict_attention_reads_the_last_members_of_the_cluster(n, clusters, window, padded, seed):
    q, k, v = draw(3, 2, 2, n, 4, seed=seed)
    nearest = draw(2, 2, n, clusters, seed=seed + 1).argmax(-1)
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n - 3)]]) if padded else torch.ones(2, n, dtype=torch.bool)
    expected = torch.zeros_like(v)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(n)).tolist():
        if mask[b, i]:
            mine = [j for j in range(i + 1) if nearest[b, h, j] == nearest[b, h, i] and mask[b, j]][-window:]
            scores = torch.stack([q[b, h, i] @ k[b, h, j] / 2 if j < i else torch.tensor(SELF_SCORE) for j in mine])
            expected[b, h, i] = scores.double().softmax(0) @ v[b, h, mine]
    torch.testing.assert_close(ordered_attention(q, k, v, nearest, window, mask if padded else None), expected)


def test_a_route_takes_the_best_tokens_of_every_cluster():
    scores = torch.tensor([[[[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]]]])
    assert balanced_topk_route(scores, 2).tolist() == [[[[1, 2], [0, 2]]]]
    assert balanced_topk_route(scores, 9).shape == (1, 1, 2, 3)
    only = torch.tensor([[True, False, False]])
    assert balanced_topk_route(scores, 2, only).tolist() == [[[[0, 3], [0, 3]]]]


def test_one_cluster_of_all_tokens_is_dense_attention():
    q, k, v = draw(3, 1, 2, 9, 4)
    everything = balanced_topk_route(draw(1, 2, 9, 1), 9)
    got = clustered_attention(q, k, v, Members(everything, everything.clone()), causal=True, shared=False)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, is_causal=True))


def test_gradients_are_those_of_differences():
    q, k, v = (part.requires_grad_() for part in draw(3, 1, 1, 7, 3).unbind())
    members = Members(*(balanced_topk_route(draw(1, 1, 7, 3, seed=s), 3) for s in (1, 2)))
    assert torch.autograd.gradcheck(
        lambda *x: clustered_attention(*x, members, causal=True, shared=False), (q, k, v), fast_mode=True
    )
    nearest = draw(1, 1, 7, 2).argmax(-1)
    assert torch.autograd.gradcheck(lambda *x: ordered_attention(*x, nearest, 3), (q, k, v), fast_mode=True)
    local = RelativeLocalAttention(1, 3, 2).double()
    assert torch.autograd.gradcheck(lambda *x: local(*x), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 4, 11])
def test_local_heads_see_their_piece_and_its_neighbours(causal, n):
    q, k, v = draw(3, 2, 2, n, 4)
    local = RelativeLocalAttention(2, 4, 4, causal).double()
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n - 2)]])
    got = local(q, k, v, mask)
    last = local.positions.shape[1] - 1 if causal else (local.positions.shape[1] - 1) // 2 + 0
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(n)).tolist():
        piece = i // 4
        seen = [j for j in range(n) if mask[b, j] and piece - 1 <= j // 4 <= (piece if causal else piece + 1)]
        seen = [j for j in seen if j <= i or not causal]
        if not seen:
            assert (got[b, h, i] == 0).all()
            continue
        rows = local.positions[h, [last - (i - j) if causal else 2 * 4 - 1 - (i - j) for j in seen]]
        scores = (k[b, h, seen] + rows) @ q[b, h, i] / 2
        torch.testing.assert_close(got[b, h, i], scores.softmax(0) @ v[b, h, seen])


def layer(seed=0, **options):
    torch.manual_seed(seed)
    options = {"local_window": 4, **options}
    return RoutingAttention(16, 4, 3, **options).double()


def changes(model, x, place):
    """Which outputs another token at a place changes."""
    other = x.clone()
    other[:, place:] = draw(*other[:, place:].shape, seed=77)
    return ((model(x)[0] - model(other)[0]).abs().amax((0, 2)) > 1e-12).tolist()


@settings(max_examples=10, deadline=None)
@given(place=st.integers(1, 29), seed=st.integers(0, 9), window=st.integers(1, 12))
def test_in_strict_mode_later_tokens_change_nothing(place, seed, window):
    model = layer(seed, strict_causal=True, window=window).eval()
    found = changes(model, draw(1, 30, 16, seed=seed), place)
    assert not any(found[:place])
    assert found[place]


def test_as_published_a_later_token_can_change_the_choice():
    model = layer(local_heads=0, window=4).eval()
    assert any(any(changes(model, draw(1, 30, 16, seed=seed), 20)[:20]) for seed in range(5))


def test_as_published_nothing_is_read_from_later_tokens():
    q, k, v = draw(3, 1, 1, 8, 4)
    members = Members(*[balanced_topk_route(draw(1, 1, 8, 2), 5)] * 2)
    other = v.clone()
    other[:, :, 5:] += 1
    for shared in (True, False):
        one, two = (clustered_attention(q, k, x, members, causal=True, shared=shared) for x in (v, other))
        assert torch.equal(one[:, :, :5], two[:, :, :5])


@pytest.mark.parametrize(
    "options",
    [
        {"window": 6},
        {"strict_causal": True, "window": 6},
        {"shared_qk": False},
        {"causal": False},
        {"local_heads": 0},
    ],
)
def test_a_padded_sequence_gives_what_it_gives_alone(options):
    model = layer(**options).train()
    x = draw(2, 20, 16)
    padding = torch.arange(20) >= torch.tensor([[20], [13]])
    x[1, 13:] = float("nan")
    model(draw(1, 40, 16, seed=3))
    model.eval()
    both, _ = model(x, padding)
    alone, _ = model(x[1:, :13])
    torch.testing.assert_close(both[1, :13], alone[0])
    assert (both[1, 13:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"window": 6, "strict_causal": True}, {"causal": False}, {"local_heads": 4}])
def test_padding_on_the_left_changes_nothing(options):
    model = layer(**options).train()
    model(draw(1, 40, 16, seed=3))
    model.eval()
    x = draw(1, 13, 16)
    padded = torch.cat([draw(1, 7, 16, seed=5), x], 1)
    got, _ = model(padded, torch.arange(20)[None] < 7)
    torch.testing.assert_close(got[:, 7:], model(x)[0])
    assert (got[:, :7] == 0).all()


def test_centroids_move_once_for_each_training_pass_and_never_in_evaluation():
    model = layer(decay=0.5)
    model(draw(1, 30, 16))
    first = model.kmeans.means.clone()
    model(draw(1, 30, 16, seed=1))  # what the first pass has shown
    second = model.kmeans.means.clone()
    assert not torch.equal(first, second)
    model.eval()
    model(draw(1, 30, 16, seed=2))
    assert torch.equal(second, model.kmeans.means)


def test_gathered_gradients_move_centroids_once():
    model, whole = layer(decay=0.5), layer(decay=0.5)
    model(draw(2, 30, 16)), whole(draw(2, 30, 16))
    optimizers = []
    for one in (model, whole):
        one.kmeans.update()
        one.kmeans.means.copy_(model.kmeans.means)
        optimizers.append(torch.optim.SGD(one.parameters(), lr=0.0))
        update_centroids_after(optimizers[-1], one)
    before = model.kmeans.means.clone()
    batch = draw(2, 30, 16, seed=4)
    for part in batch.split(1):
        model(part)[0].sum().backward()
    assert torch.equal(before, model.kmeans.means)
    whole(batch)[0].sum().backward()
    optimizers[0].step(), optimizers[1].step()
    assert not torch.equal(before, model.kmeans.means)
    torch.testing.assert_close(model.kmeans.means, whole.kmeans.means)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_that_is_computed_again_shows_nothing_twice(reentrant):
    plain, saved = layer(decay=0.5), layer(decay=0.5)
    for step in range(3):
        x, y = draw(1, 30, 16, seed=step).requires_grad_(), draw(1, 30, 16, seed=step).requires_grad_()
        plain(x)[0].square().sum().backward()
        checkpoint(lambda z: saved(z)[0], y, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(plain.kmeans.means, saved.kmeans.means)


def test_the_auxiliary_loss_is_the_distance_from_the_centroids():
    model = layer(local_heads=0, commitment=0.5).eval()
    x = draw(1, 10, 16)
    q = layer_norm(model.routed_projection(x)[..., :16].unflatten(-1, (4, 4)).transpose(1, 2), (4,))
    q = normalize(q, dim=-1)
    best = (q @ model.kmeans.means.transpose(-1, -2)).max(-1).values
    expected = 0.5 * (2 - 2 * best).mean() / 4
    torch.testing.assert_close(model(x)[1], expected)


def test_more_clusters_than_tokens_and_wider_windows_than_sequences_work():
    for n in (1, 2, 5):
        for window in (None, 1, 50):
            out, loss = layer(window=window)(draw(1, n, 16))
            assert torch.isfinite(out).all()
            assert torch.isfinite(loss)


def test_bad_input_is_refused():
    for options, said in (
        ({"window": 0}, "window is 0"),
        ({"local_heads": 5}, "local_heads is 5"),
        ({"strict_causal": True, "shared_qk": False}, "strict_causal needs"),
        ({"strict_causal": True}, "needs a window"),
        ({"commitment": -1.0}, "commitment is -1"),
        ({"local_window": 0}, "local_window is 0"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            layer(**options)
    with pytest.raises(ConfigurationError, match="multiple"):
        RoutingAttention(10, 4, 2)
    model = layer()
    with pytest.raises(ConfigurationError, match=r"\(batch, n, 16\)"):
        model(torch.zeros(2, 3, 15))
    with pytest.raises(ConfigurationError, match="True for padding"):
        model(draw(1, 3, 16), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="True everywhere"):
        model(draw(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="no routed head"):
        update_centroids_after(torch.optim.SGD(model.parameters(), lr=1.0), torch.nn.Linear(1, 1))
