import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.magnitude_histogram import MagnitudeHistogram
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, SparsityError


def filled(values, scale=None, parts=1):
    histogram = MagnitudeHistogram("layer", scale)
    for part in values.chunk(parts):
        histogram.update(part)
    return histogram


@given(st.floats(0.01, 0.99), st.integers(0, 1000))
def test_a_threshold_drops_the_share_that_was_asked_for(sparsity, seed):
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(seed))
    threshold = filled(x).threshold(sparsity)
    assert abs(float((x.abs() <= threshold).double().mean()) - sparsity) < 2e-3


def test_the_order_and_size_of_batches_change_nothing():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    one, other = filled(x), filled(x.flip(0), parts=7)
    assert torch.equal(one.counts, other.counts)
    assert one.total == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_may_lie_anywhere_in_memory(dtype):
    import gossamer.kernels  # noqa: F401 — whose kernel counts, where there is one

    memory = torch.randn(4, 7, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = {
        "last tokens": memory[:, -1:],
        "a step of a batch": memory[:1].transpose(0, 1),  # whose stride of a dimension of size 1 says nothing
        "every other": memory[::2, :, ::2],
        "one vector": memory[0, 0],
    }
    for name, view in views.items():
        found, wanted = MagnitudeHistogram(name), MagnitudeHistogram(name)
        found.update(view)
        wanted.update(view.clone(memory_format=torch.contiguous_format).reshape(-1, view.shape[-1]))
        assert torch.equal(found.counts, wanted.counts), name
        assert found.total == view.numel()


def test_a_scale_of_other_channels_is_refused():
    with pytest.raises(ConfigurationError, match="up: inputs of 5 channels, but a scale of 4"):
        MagnitudeHistogram("up", torch.ones(4)).update(torch.ones(2, 5))


def test_a_scale_is_that_of_the_scores():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(8) + 0.1
    assert torch.equal(filled(x, scale).counts, filled(x * scale).counts)


def test_values_of_bfloat16_go_as_a_whole_so_that_the_share_is_the_nearest_there_is():
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    threshold = filled(x).threshold(0.5)
    reached = abs(float((x.abs() <= threshold).double().mean()) - 0.5)
    steps = x.abs().float().unique()
    best = min(abs(float((x.abs() <= step).double().mean()) - 0.5) for step in steps)
    assert reached == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_zeros_go_at_any_sparsity_since_they_cost_nothing(dtype, sparsity):
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    threshold = filled(x).threshold(sparsity)
    assert torch.equal(x <= threshold, x == 0)


def test_a_threshold_that_few_entries_decide_is_told():
    with pytest.warns(UserWarning, match="layer: only 60 of 600 calibration activations.*give more data"):
        filled(torch.rand(60, 10)).threshold(0.9)
    with warnings.catch_warnings(action="error"):
        filled(torch.rand(60, 10)).threshold(0.5)


def test_nothing_goes_at_a_sparsity_of_zero():
    assert filled(torch.ones(2, 2)).threshold(0.0) is None


def test_bad_data_and_bad_sparsities_are_refused():
    with pytest.raises(CalibrationError, match="layer never ran"):
        MagnitudeHistogram("layer").threshold(0.5)
    for broken in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="layer: 1 calibration activations"):
            filled(torch.tensor([[1.0, broken]])).threshold(0.5)
    with pytest.raises(SparsityError):
        filled(torch.ones(2, 2)).threshold(1.0)
