from __future__ import annotations

import pytest
import torch

from gossamer.core.effective_rank import truncate_rank
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.measure.laziness import kernel_alignment
from gossamer.training.rich_lazy import aligned_low_rank
from gossamer.training.two_layer_linear import (
    expected_alignment,
    feature_kernel,
    final_kernel,
    linear_ntk,
    predicted_alignment,
    train_two_layer,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n, d, seed=1):
    return torch.linalg.qr(gaussian(n, d, seed=seed))[0] * n**0.5


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_prediction_is_what_training_from_small_weights_does(rank):
    d, h = 10, 12
    x = whitened(60, d)
    for seed in range(3):
        direction = gaussian(d, seed=seed + 10)
        w1 = truncate_rank(gaussian(h, d, seed=seed), rank) * 1e-3
        w2 = gaussian(h, seed=seed + 20) * 1e-3
        run = train_two_layer(w1, w2, x, x @ direction, learning_rate=0.05)
        found = kernel_alignment(linear_ntk(w1, w2, x), linear_ntk(run.w1, run.w2, x))
        assert found == pytest.approx(predicted_alignment(w1, w2, direction), abs=0.01)
        torch.testing.assert_close(feature_kernel(run.w1, run.w2), final_kernel(direction), rtol=0.02, atol=0.02)


def test_the_mean_over_directions_is_the_expectation_and_grows_with_the_rank():
    full = gaussian(12, 10) * 1e-3
    w2 = gaussian(12, seed=3) * 1e-4
    expectations = []
    for rank in (1, 2, 5, 10):
        w1 = truncate_rank(full, rank)
        directions = gaussian(1000, 10, seed=4)
        mean = sum(predicted_alignment(w1, w2, direction) for direction in directions) / 1000
        expectations.append(expected_alignment(w1, w2))
        assert mean == pytest.approx(expectations[-1], abs=0.02)
    assert expectations == sorted(expectations)
    assert expectations[-1] > 2 * expectations[0]


def test_one_aligned_direction_is_the_exception_and_partial_alignment_lies_between():
    direction, w2 = gaussian(10), torch.full((12,), 1e-3 / 12**0.5, dtype=torch.float64)
    values = [
        predicted_alignment(aligned_low_rank(direction, 12, 1e-3, c), w2, direction) for c in (0.0, 0.5, 0.8, 1.0)
    ]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1)
    # interpolates in the squared cosine
    assert values[1] == pytest.approx(values[0] + 0.25 * (values[-1] - values[0]))


def test_at_one_norm_low_rank_changes_more_than_full_and_an_aligned_direction_hardly():
    d = h = 40
    x = gaussian(400, d)
    direction = gaussian(d, seed=5)
    direction /= direction.norm()
    full = gaussian(h, d, seed=6) / d**0.5
    w2 = 0.01 * gaussian(h, seed=7) / h**0.5
    changes = {}
    for name, w1 in {
        "full": full,
        "10": truncate_rank(full, 10),
        "3": truncate_rank(full, 3),
        "1": truncate_rank(full, 1),
        "aligned": aligned_low_rank(direction, h, float(full.norm())),
    }.items():
        assert w1.norm() == pytest.approx(float(full.norm()))
        changes[name] = float((train_two_layer(w1, w2, x, x @ direction, tolerance=1e-4).w1 - w1).norm())
    assert changes["full"] < 0.75 * min(changes["10"], changes["3"], changes["1"])
    assert changes["aligned"] < 0.01


def test_training_reaches_the_least_squares_solution():
    x, noise = gaussian(50, 6), gaussian(50, seed=8)
    y = x @ gaussian(6, seed=9) + 0.1 * noise
    run = train_two_layer(gaussian(7, 6, seed=2) / 3, gaussian(7, seed=3) / 3, x, y, tolerance=0.0, steps=5000)
    best = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(run.w2 @ run.w1, best, rtol=1e-4, atol=1e-4)
    assert run.loss == pytest.approx(float((x @ best - y).square().mean() / 2), rel=1e-4)


def test_bad_input_is_refused():
    x = gaussian(20, 3)
    with pytest.raises(ConfigurationError, match="needed"):
        train_two_layer(gaussian(4, 5), gaussian(4), x, x[:, 0])
    with pytest.raises(NonFiniteError, match="learning rate"):
        train_two_layer(gaussian(4, 3), gaussian(4), x, x[:, 0], learning_rate=100.0)
