"""Centroids on the sphere: where they start, how they move, and who may move them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from gossamer.core.kmeans import SphericalKMeans
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, UnknownNameError


def blobs(heads=2, clusters=3, each=20, dim=8, noise=0.05, seed=0):
    """Tokens around known directions, ``(1, heads, n, dim)``, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q[:, :clusters]
    tokens = centers.repeat_interleave(each, 1) + noise * torch.randn(heads, clusters * each, dim, generator=generator)
    return tokens[None], centers


def test_lloyd_finds_the_directions_of_blobs():
    tokens, centers = blobs(clusters=2)
    model = SphericalKMeans(2, 2, 8, seed=1)
    model.initialize(tokens)
    nearest = (model.means @ centers.transpose(-1, -2)).max(-1).values
    assert (nearest > 0.99).all()
    assert model.initialized


def test_an_update_is_the_published_formula():
    torch.manual_seed(0)
    x = normalize(torch.randn(2, 1, 10, 4), dim=-1)
    model = SphericalKMeans(1, 3, 4, decay=0.7)
    old = model.means.clone()
    model.observe(x[:1], weight=0.5)
    model.observe(x[1:], weight=0.5)
    model.update()
    for cluster in range(3):
        mine = x.transpose(0, 1).flatten(1, 2)[0]
        mine = mine[(mine @ old[0].T).argmax(-1) == cluster]
        expected = 0.7 * old[0, cluster] + 0.3 * 0.5 * mine.sum(0)
        torch.testing.assert_close(model.means[0, cluster], normalize(expected, dim=-1))


def test_a_cluster_without_tokens_keeps_its_centroid():
    model = SphericalKMeans(1, 2, 3, decay=0.5)
    model.means.copy_(torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]))
    model.observe(torch.tensor([[[[1.0, 0, 0.2]]]]))
    model.update()
    assert model.means[0, 0, 2] > 0
    assert model.means[0, 1].tolist() == [0, 1, 0]


def test_the_mean_moves_as_far_for_many_tokens_as_for_one():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 1, 4)
    few, many = (SphericalKMeans(2, 3, 4, decay=0.9, reduction="mean") for _ in range(2))
    few.observe(x)
    many.observe(x.expand(1, 2, 50, 4))
    few.update(), many.update()
    torch.testing.assert_close(few.means, many.means)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    clusters=st.integers(1, 9),
    dim=st.integers(1, 6),
    n=st.integers(1, 20),
    decay=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_centroids_stay_on_the_sphere(heads, clusters, dim, n, decay, seed):
    x = torch.randn(2, heads, n, dim, generator=torch.Generator().manual_seed(seed))
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0, 0] = True
    model = SphericalKMeans(heads, clusters, dim, decay, seed=seed)
    model.initialize(x, mask, iterations=2)
    model.observe(x, mask)
    model.update()
    torch.testing.assert_close(model.means.norm(dim=-1), torch.ones(heads, clusters))
    assert model.occupancy(x, mask).sum() == heads * mask.sum()


def test_padding_is_not_clustered_even_if_it_is_not_a_number():
    tokens, _ = blobs()
    torch.manual_seed(0)
    longer = torch.cat([tokens, torch.full((1, 2, 7, 8), float("nan"))], 2)
    mask = torch.arange(67)[None] < 60
    plain, padded = SphericalKMeans(2, 3, 8), SphericalKMeans(2, 3, 8)
    for model, x, real in ((plain, tokens, None), (padded, longer, mask)):
        model.initialize(x, real)
        model.observe(x, real)
        model.update()
    torch.testing.assert_close(plain.means, padded.means)


def test_with_fewer_tokens_than_centroids_every_token_is_at_one():
    tokens, _ = blobs(clusters=1, each=2)
    model = SphericalKMeans(2, 5, 8)
    model.initialize(tokens, iterations=0)
    torch.testing.assert_close(model.similarity(normalize(tokens, dim=-1)).max(-1).values, torch.ones(1, 2, 2))


def test_the_state_comes_back():
    tokens, _ = blobs()
    model = SphericalKMeans(2, 3, 8)
    model.initialize(tokens)
    again = SphericalKMeans(2, 3, 8, seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.means, model.means)
    assert again.initialized


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="decay is 2"):
        SphericalKMeans(1, 1, 1, 2)
    with pytest.raises(ConfigurationError, match="num_clusters is 0"):
        SphericalKMeans(1, 0, 1)
    with pytest.raises(UnknownNameError, match="reduction"):
        SphericalKMeans(1, 1, 1, reduction="median")
    model = SphericalKMeans(1, 2, 3)
    with pytest.raises(ConfigurationError, match=r"\(batch, 1, n, 3\)"):
        model.observe(torch.zeros(1, 2, 4, 3))
    with pytest.raises(ConfigurationError, match=r"bool \(1, 4\)"):
        model.observe(torch.zeros(1, 1, 4, 3), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="no token is real"):
        model.initialize(torch.zeros(1, 1, 4, 3), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(NonFiniteError, match="NaN"):
        model.initialize(torch.full((1, 1, 4, 3), float("nan")))


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    tokens, _ = blobs(each=10, noise=0.3)
    model = SphericalKMeans(2, 3, 8, decay=0.5)
    model.initialize(tokens[:, :, rank::2], iterations=3)
    first = model.means.clone()
    if rank == 0:  # the other has nothing to show in this step
        model.observe(tokens)
    model.update()
    torch.save((first, model.means), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_move_alike_and_by_the_average(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    (first, means), (other_first, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, other_first)
    assert torch.equal(means, other)
    tokens, _ = blobs(each=10, noise=0.3)
    alone = SphericalKMeans(2, 3, 8, decay=0.5)
    alone.means.copy_(first)
    alone.observe(tokens, weight=0.5)
    alone.update()
    torch.testing.assert_close(means, alone.means)
