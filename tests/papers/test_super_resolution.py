from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.errors import ConfigurationError
from gossamer.papers import iss_p
from gossamer.papers.iss_p import decide
from gossamer.papers.super_resolution import (
    Photographs,
    SuperResolution,
    larger,
    luma,
    psnr_y,
    smaller,
    ssim_y,
)
from gossamer.papers.super_resolution_networks import CrossAggregationNetwork, ResidualNetwork, WindowNetwork
from gossamer.training.iss_p import IterativeSoftShrinkage
from gossamer.training.static import Static


def pictures(count, side=40, seed=0):
    """Smooth bytes, so that there is something to find."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    return tuple((functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).byte())


DRAWN = Photographs(pictures(3), pictures(2, seed=1))


def show(items, description):
    return iter(items)


def test_luma_runs_from_16_to_235():
    assert luma(torch.zeros(3, 1, 1)).item() == 16
    assert luma(torch.ones(3, 1, 1)).item() == pytest.approx(235)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert luma(red).item() == pytest.approx(16 + 65.481)


def test_a_constant_error_has_a_known_ratio():
    one = torch.full((3, 20, 20), 0.5)
    other = one + 1 / 219  # one step of Y
    assert psnr_y(one, other, 2) == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert psnr_y(one, one, 2) == math.inf
    spoilt = one.clone()
    spoilt[:, 0] = 0.0
    assert psnr_y(one, spoilt, 2) == math.inf  # the border does not count
    assert psnr_y(one, spoilt, 0) < 30


def test_similarity_is_that_of_the_definition():
    """A plain loop over windows in float64."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(3, 15, 14, generator=generator), torch.rand(3, 15, 14, generator=generator)
    a, b = luma(one).numpy(), luma(other).numpy()
    window = np.exp(-(np.subtract.outer(np.arange(11), [5]) ** 2) / 4.5)
    window = window @ window.T / (window.sum() ** 2)
    found = []
    for top in range(5):
        for left in range(4):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy, c = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, (window * x * y).sum() - mx * my
            c1, c2 = 2.55**2, 7.65**2
            found.append((2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim_y(one, other, 0) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim_y(one, one, 1) == pytest.approx(1)


def test_similarity_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    one, other = (picture.float() / 255 for picture in pictures(2))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    a, b = luma(one).numpy(), luma(other).numpy()
    assert ssim_y(one, other, 0) == pytest.approx(metrics.structural_similarity(a, b, **options), rel=1e-9)
    assert psnr_y(one, other, 0) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255), rel=1e-9)


def test_pictures_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigurationError, match="cannot be compared"):
        psnr_y(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9), 0)
    with pytest.raises(ConfigurationError, match="border of 4"):
        psnr_y(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), 4)
    with pytest.raises(ConfigurationError, match="too small"):
        ssim_y(torch.zeros(3, 12, 12), torch.zeros(3, 12, 12), 1)


def test_small_pictures_are_bytes_of_the_right_size():
    large = pictures(2)[0].float() / 255
    small = smaller(large, 2)
    assert small.shape == (3, 20, 20)
    assert torch.equal((small * 255).round() / 255, small)
    assert larger(small.unsqueeze(0), 2).shape == (1, 3, 40, 40)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("build", [ResidualNetwork, WindowNetwork, CrossAggregationNetwork])
def test_networks_make_pictures_of_any_size_larger(build, scale):
    torch.manual_seed(0)
    assert build(scale, width=8, blocks=2)(torch.rand(1, 3, 11, 13)).shape == (1, 3, 11 * scale, 13 * scale)


def test_attention_stays_within_its_window():
    torch.manual_seed(0)
    network = WindowNetwork(2, width=8, blocks=1, window=4)
    block = network.body[0]
    x = torch.randn(1, 8, 8, 8)
    moved = x.clone()
    moved[0, 5, 6, 0] += 1  # a shift of all channels would not survive the norm
    changed = (block(x) - block(moved)).abs().sum(-1)[0] > 0
    assert changed[4:, 4:].all()
    assert not changed[:4].any()
    assert not changed[:, :4].any()


def changed_pixels(block, size, moved):
    """Where a block's result changes when one pixel does."""
    x = torch.randn(1, *size, 8, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, *moved, 0] += 1  # a shift of all channels would not survive the norm
    return (block(x) - block(other)).abs().sum(-1)[0] > 0


def test_shifted_windows_do_not_join_opposite_edges():
    torch.manual_seed(0)
    shifted = WindowNetwork(2, width=8, blocks=2, window=4).body[1]
    changed = changed_pixels(shifted, (8, 8), (0, 0))
    assert changed[:2, :2].all()
    assert changed.sum() == 4
    changed = changed_pixels(shifted, (8, 8), (2, 5))
    assert changed[2:6, 2:6].all()
    assert changed.sum() == 16


def test_rectangles_of_both_directions_meet():
    torch.manual_seed(0)
    straight, shifted = CrossAggregationNetwork(2, width=8, heads=2, window=(2, 4)).body[0].blocks
    changed = changed_pixels(straight, (8, 8), (3, 4))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:8] = expected[0:4, 4:6] = expected[2:5, 3:6] = True  # wide, high, and the convolution
    assert torch.equal(changed, expected)
    changed = changed_pixels(shifted, (8, 8), (3, 4))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3:5, 2:6] = expected[2:6, 3:5] = expected[2:5, 3:6] = True
    assert torch.equal(changed, expected)


def test_biases_are_those_of_the_distance():
    torch.manual_seed(0)
    bias = CrossAggregationNetwork(2, width=64).body[0].blocks[0].wide(2, 3)
    assert bias.shape == (2, 6, 6)
    places = [(row, column) for row in range(2) for column in range(3)]
    seen = {}
    for i, one in enumerate(places):
        for j, other in enumerate(places):
            distance = (one[0] - other[0], one[1] - other[1])
            assert torch.equal(bias[:, i, j], seen.setdefault(distance, bias[:, i, j]))
    assert len({tuple(values.tolist()) for values in seen.values()}) == len(seen) == 15


def test_rectangles_that_heads_cannot_share_are_refused():
    with pytest.raises(ConfigurationError, match="3 heads, 32 channels"):
        CrossAggregationNetwork(2, heads=3)


def test_soft_shrinkage_trains_the_cross_aggregation_transformer():
    torch.manual_seed(0)
    task = SuperResolution(DRAWN, 2, 8, 4, 40, 5e-3)
    model = CrossAggregationNetwork(2, width=16, blocks=2, window=(2, 8), mlp_ratio=2)
    method = IterativeSoftShrinkage(sparsity=0.9, end=20)
    before = task.judge(model)[0]
    run = task.train(model, method)
    assert task.judge(model)[0] > before
    assert run.masks.sparsity == pytest.approx(0.9, abs=2e-3)
    assert not run.masks.violations(model)
    assert any("near" in name for name in run.masks)


def test_patches_are_pieces_of_the_pictures():
    task = SuperResolution(DRAWN, 2, 8, 5, 4, 1e-3)
    generator = torch.Generator().manual_seed(0)
    made = task.patches(generator)
    assert made.shape == (5, 3, 16, 16)
    wholes = [p.float() / 255 for p in DRAWN.training]
    for patch in made:
        variants = [v for k in range(4) for v in (patch.rot90(k, (1, 2)), patch.rot90(k, (1, 2)).flip(2))]
        found = any(
            torch.equal(variant, whole[:, top : top + 16, left : left + 16])
            for whole in wholes
            for variant in variants
            for top in range(25)
            for left in range(25)
        )
        assert found


def test_training_helps_and_zeros_hold():
    torch.manual_seed(0)
    task = SuperResolution(DRAWN, 2, 8, 4, 60, 5e-3)
    model = ResidualNetwork(2, width=8, blocks=1)
    before = task.judge(model)[0]
    run = task.train(model, Static(sparsity=0.5, exclude=("*tail*",)))
    assert task.judge(model)[0] > before + 3
    assert not run.masks.violations(model)
    assert run.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert isinstance(model.tail[0], nn.Conv2d)


TINY = {
    **iss_p.FULL,
    "networks": {"residual": {"width": 8, "blocks": 1}},
    "scales": [2],
    "sparsities": [0.9, 0.95],
    "factors": [0.5],
    "patch": 8,
    "batch": 2,
    "steps": 24,
    "look": 2,
}


def test_every_method_is_marked(monkeypatch):
    monkeypatch.setattr(iss_p, "photographs", lambda: DRAWN)
    observed = iss_p.run(json.loads(json.dumps(TINY)), 0, show)
    json.dumps(observed, allow_nan=False)
    methods = set(TINY["methods"]) - {"dense"}
    expected = {f"{method}, residual, ×2, {s}" for method in methods for s in (0.9, 0.95)}
    assert set(observed["psnr"]) == expected | {"bicubic, ×2", "dense, residual, ×2", "factor 0.5, residual, ×2, 0.95"}
    assert set(observed["unsteadiness"]) == expected | {"factor 0.5, residual, ×2, 0.95"}
    assert all(0 <= share <= 1 for share in observed["flips"].values())
    assert observed["residual mass"]["hard thresholding, residual, ×2, 0.95"] < 1e-6
    assert 0 < observed["residual mass"]["soft shrinkage, residual, ×2, 0.95"] < 1
    assert observed["curves"]["bicubic"]["y"] == [observed["psnr"]["bicubic, ×2"]] * 2


def test_other_networks_and_scales_are_marked_where_a_method_fits_them(monkeypatch):
    monkeypatch.setattr(iss_p, "photographs", lambda: DRAWN)
    settings = {**TINY, "networks": {"residual": {"width": 8, "blocks": 1}, "window": {"width": 8, "blocks": 1}}}
    settings |= {"scales": [4], "methods": ["soft shrinkage", "ASSL", "SRP"], "sparsities": [0.9], "factors": []}
    observed = iss_p.run(json.loads(json.dumps(settings)), 0, show)
    place = "residual, ×4, 0.9"
    expected = {f"{method}, {place}" for method in ("soft shrinkage", "ASSL", "SRP")}
    assert set(observed["psnr"]) == expected | {"bicubic, ×4", "soft shrinkage, window, ×4, 0.9"}
    assert iss_p.FULL["scales"] == [2, 3, 4]
    assert {"ASSL", "SRP"} <= set(iss_p.FULL["methods"]) - set(iss_p.QUICK["methods"])


def observation(seed, soft, hard, one, steadier):
    noise = 0.01 * seed
    place = "residual, ×2, 0.95"
    return {
        "psnr": {
            f"soft shrinkage, {place}": soft + noise,
            f"hard thresholding, {place}": hard,
            f"one shot, {place}": one,
            "dense, residual, ×2": 31.0,
            "bicubic, ×2": 27.0,
            "soft shrinkage, residual, ×2, 0.9": 0.0,  # below 95 %: does not count
        },
        "unsteadiness": {f"soft shrinkage, {place}": 0.1, f"hard thresholding, {place}": 0.1 + steadier + noise / 10},
        "residual mass": {f"soft shrinkage, {place}": 0.1},
    }


def test_the_rule_is_applied_as_stated():
    def verdict(*values):
        return decide([observation(seed, *values) for seed in range(3)])

    assert verdict(29.0, 28.5, 28.7, 0.2).outcome == "holds"
    assert verdict(29.0, 29.5, 28.7, 0.2).outcome == "does not hold"
    assert "hard thresholding" in verdict(29.0, 29.5, 28.7, 0.2).reason
    assert verdict(29.0, 28.5, 28.7, -0.05).outcome == "does not hold"
    assert verdict(29.0, 29.01, 28.7, 0.2).outcome == "inconclusive"
    assert decide([observation(0, 29.0, 28.5, 28.7, 0.2)]).outcome == "inconclusive"
    assert verdict(29.0, 28.5, 28.7, 0.2).numbers["psnr, soft shrinkage − dense"].mean == pytest.approx(-1.99)
