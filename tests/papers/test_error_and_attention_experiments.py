"""Verdicts on the dark matter of autoencoders and on those of attention, and the measures that are theirs alone."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.features.activation_rules import ReLU
from gossamer.features.attention_sae import AttentionSAE
from gossamer.papers import attention_sae, sae_dark_matter


def dark(shift=0.0):
    def report(fvu, nonlinear):
        return {"r2_vec": 0.5, "r2_norm": 0.9 + shift, "fvu": fvu, "fvu_nonlinear": nonlinear}

    return {
        "scaling": {
            "widths": [1, 2, 3],
            "reports": [report(0.5, 0.21), report(0.4, 0.2), report(0.3, 0.19 + shift)],
            "correlation": 0.95,
            "predicted": 0.9,
            "with nonlinear": 0.92,
            "with linear": 0.91,
        },
        "downstream": {"nonlinear_share": 0.3 + shift, "nonlinear_length": 0.4},
        "other tokens": {"r2_vec": -0.1, "r2_norm": -0.2},
        "length from": {"activation": 0.9},
        "parts": {"linear": {"learned": 0.3}},
        "pursuit": {"encoder": 0.4, "pursuit": 0.35, "encoder, nonlinear": 0.2, "pursuit, nonlinear": 0.19},
        "before": {"nonlinear": 0.2 + shift},
        "planted": {"off": 0.01 + shift / 10},
    }


def test_the_dark_matter_is_judged_part_by_part():
    held = sae_dark_matter.decide([dark(), dark(0.01)])
    assert held.outcome == "holds"
    assert held.numbers["width 3: fvu"] == pytest.approx(0.3)
    reversed_ = [dark(), dark(0.01)]
    for observation in reversed_:
        observation["pursuit"]["pursuit"] = 0.5
    found = sae_dark_matter.decide(reversed_)
    assert found.outcome == "does not hold"
    assert "encoder − pursuit" in found.reason
    open_ = [dark(), dark()]
    open_[1]["scaling"]["correlation"] = 0.5
    assert sae_dark_matter.decide(open_).outcome == "inconclusive"
    assert sae_dark_matter.decide([dark()]).outcome == "inconclusive"


def heads(shift=0.0):
    layer = {"exact": 1e-7, "recovered_from_zero": 0.95 + shift, "removed with the first head": 0.8}
    axes = {name: {"recovered_from_zero": 0.7} for name in ("neurons", "components", "random")}
    return {
        "roles": {"layer 0": layer, "layer 1": dict(layer), "ranks": 0.9 + shift, "long": 1, "learned": {"copy": 1.0}},
        "language": {
            "sae": {"recovered_from_zero": 0.8},
            **axes,
            "several": [1.0, 1.0, 0.0],
            "labels": [["local"]] * 3,
            "indirect objects": {"features": 0.2, "random": 0.1},
            "exact": 1e-7,
        },
    }


def test_attention_is_judged_part_by_part():
    held = attention_sae.decide([heads(), heads(0.001)])
    assert held.outcome == "holds"
    assert held.numbers["share of heads with several roles"].mean == pytest.approx(2 / 3)
    reversed_ = [heads(), heads(0.001)]
    for observation in reversed_:
        observation["language"]["components"]["recovered_from_zero"] = 0.9
    assert "best axes" in attention_sae.decide(reversed_).reason
    inexact = [heads(), copy.deepcopy(heads())]
    for observation in inexact:
        observation["roles"]["layer 1"]["exact"] = 1e-2
    assert attention_sae.decide(inexact).outcome == "does not hold"


def test_axes_keep_the_largest_coordinates():
    z = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7) + 3
    for name, sae in attention_sae._axes(z, 2, 0).items():
        output = sae(z[:5]).output.detach()
        if name == "neurons":
            centred = z[:5] - z.mean(0)
            kept = centred.abs() >= centred.abs().topk(2, dim=1).values[:, 1:]
            torch.testing.assert_close(output, z.mean(0) + centred * kept)
        assert (sae(z[:5]).codes.counts == 2).all()
    whole = attention_sae._axes(z, 6, 0)
    for sae in whole.values():
        torch.testing.assert_close(sae(z[:5]).output.detach(), z[:5], rtol=1e-4, atol=1e-4)


def test_what_goes_with_a_head_is_what_is_gone_without_it():
    sae = AttentionSAE(2, 1, 2, ReLU()).eval()
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        sae.decoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    z = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])  # its mean is zero
    removed, chance = attention_sae._removed(sae, z)
    # feature 0 is 2, all of it by head 0; feature 1 is 4, of which head 1 holds 2
    assert removed == pytest.approx((2 + 2) / 6)
    assert chance == pytest.approx((1 + 2) / 6)
