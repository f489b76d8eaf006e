"""Errors of growing dictionaries: laws of their width, and one predicted from another."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.features.error_scaling import fit_width_law, scaling_report


class Known:
    """Reconstructs with some of the dimensions, and with noise that is the same for every width."""

    def __init__(self, dimensions, noise):
        self.dimensions, self.noise = dimensions, noise

    def encode(self, x):
        return x[:, : self.dimensions], x.abs().sum(1, keepdim=True)

    def decode(self, codes):
        known, size = codes
        x_hat = torch.zeros(len(known), 12, dtype=known.dtype)
        x_hat[:, : self.dimensions] = known
        # a bounded wiggle of the length: nothing of it is linear
        return x_hat + self.noise * torch.sin(40 * size) * torch.ones(12, dtype=known.dtype)


@pytest.mark.parametrize("law", [(0.1, 3.0, 0.5), (0.0, 50.0, 1.0), (0.2, 0.0, 0.0)])
def test_a_law_is_found(law):
    widths = [64, 256, 1024, 4096, 16384]
    found = fit_width_law(widths, [law[0] + law[1] * width ** -law[2] for width in widths])
    for width in widths:
        assert found.at(width) == pytest.approx(law[0] + law[1] * width ** -law[2], rel=1e-3, abs=1e-5)
    if law[1]:
        assert found.floor == pytest.approx(law[0], abs=5e-3)
        assert found.exponent == pytest.approx(law[2], rel=0.1)


def test_the_linear_part_falls_and_the_nonlinear_stays():
    x = torch.randn(3000, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = scaling_report({32: Known(8, 0.3), 8: Known(2, 0.3), 16: Known(5, 0.3)}, x)
    assert report.widths == (8, 16, 32)
    linear = [each.fvu_linear for each in report.reports]
    nonlinear = [each.fvu_nonlinear for each in report.reports]
    assert linear == pytest.approx([10 / 12, 7 / 12, 4 / 12], abs=0.03)
    assert max(nonlinear) - min(nonlinear) < 0.01
    assert report.total.at(8) > report.total.at(32)
    assert report.nonlinear.at(8) == pytest.approx(report.nonlinear.at(32), abs=0.01)


def test_errors_of_one_are_predicted_from_those_of_another():
    x = torch.randn(3000, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = scaling_report({8: Known(2, 0.0), 16: Known(9, 0.0), 32: Known(9, 0.0)}, x)
    assert report.larger_from_smaller == [(0, 1), (0, 2), (1, 2)]
    assert report.predicted[1, 2] == pytest.approx(1)
    errors = x[report.reports[0].scored]
    expected = torch.corrcoef(torch.stack([errors[:, 2:].norm(dim=1), errors[:, 9:].norm(dim=1)]))[0, 1]
    assert report.correlation[0, 1] == pytest.approx(float(expected), abs=1e-3)
    assert report.predicted[0, 1] == pytest.approx(float(expected) ** 2, abs=0.1)
    pairs = [report.predicted[pair] for pair in report.larger_from_smaller]
    assert report.mean(report.predicted) == pytest.approx(float(sum(pairs) / 3))
    assert len(report.table().splitlines()) == 4
    assert set(report.to_dict()) >= {"widths", "correlation", "with nonlinear"}


def test_few_widths_have_no_law_and_no_autoencoder_no_report():
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert scaling_report({8: Known(2, 0.1)}, x).total is None
    with pytest.raises(ConfigurationError, match="no autoencoder"):
        scaling_report({}, x)
    with pytest.raises(ConfigurationError, match="three different widths"):
        fit_width_law([1, 1, 2], [1, 1, 1])
