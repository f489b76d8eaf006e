from __future__ import annotations

import pytest
import torch

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.papers.natural_images import NaturalImages, normalised, phase_scrambled, whitened


def slope(picture):
    """Exponent with which the amplitude of a square picture falls between a tenth and half of the top frequency."""
    amplitude = torch.fft.fft2(picture.double() - picture.double().mean()).abs()
    line = torch.fft.fftfreq(len(picture), dtype=torch.float64)
    frequency = torch.hypot(line[:, None], line[None, :])
    some = (frequency > 0.05) & (frequency < 0.25)
    x, y = frequency[some].log(), amplitude[some].log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def pink(side, seed=0):
    """Noise whose amplitude falls as 1/f, as that of photographs does."""
    line = torch.fft.fftfreq(side, dtype=torch.float64)
    frequency = torch.hypot(line[:, None], line[None, :]).clamp(min=1 / side)
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real.float()


def test_whitening_flattens_a_spectrum_that_falls_as_one_over_f():
    picture = pink(128)
    assert slope(picture) == pytest.approx(-1, abs=0.1)
    assert slope(whitened(picture)) == pytest.approx(0, abs=0.25)  # the cutoff already bends it a little
    assert whitened(picture).shape == (112, 112)


def test_whitening_moves_nothing():
    picture = torch.zeros(65, 65)
    picture[32, 32] = 1
    flat = whitened(picture)
    assert torch.allclose(flat, flat.flip(0), atol=1e-6)
    assert torch.allclose(flat, flat.flip(1), atol=1e-6)
    assert int(flat.argmax()) == 24 * 49 + 24


def test_scrambling_keeps_the_spectrum_and_loses_the_picture():
    picture = pink(64)
    picture[:, 30:] += 3
    scrambled = phase_scrambled(picture, generator_for("test", 0))
    before, after = (torch.fft.rfft2(p.double()).abs()[:, 1:-1] for p in (picture, scrambled))
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-2)
    assert scrambled.mean() == pytest.approx(float(picture.mean()), abs=1e-4)
    together = torch.corrcoef(torch.stack([picture.flatten(), scrambled.flatten()]))[0, 1]
    assert abs(float(together)) < 0.5


def test_patches_come_from_their_part_and_picture_alone():
    column = torch.arange(40.0).expand(30, 40)
    images = NaturalImages((column, column + 1000), ("a", "b"))
    for part, low, high in (("training", 0, 32), ("held out", 32, 40)):
        found, of = images.patches_and_pictures(200, 1 if part == "training" else 3, 0, part)
        assert set(of.tolist()) == {0, 1}
        assert torch.allclose(found.mean(1), torch.zeros(200), atol=1e-4)
        assert low < high
    edges = NaturalImages((torch.cat([torch.zeros(20, 32), torch.ones(20, 8)], 1),), ("a",))
    assert images.patches(5, 3, seed=1).equal(images.patches(5, 3, seed=1))
    assert not edges.patches(300, 8, 0).any()  # no patch reaches across the edge
    assert not edges.patches(300, 8, 0, "held out").any()


def test_patches_are_drawn_evenly_over_places():
    one, other = torch.zeros(10, 20), torch.zeros(30, 20)
    other[0, 0] = 1
    _, of = NaturalImages((one, other), ("a", "b")).patches_and_pictures(4000, 5, 0)
    share = (6 * 12) / (6 * 12 + 26 * 12)
    assert float((of == 0).float().mean()) == pytest.approx(share, abs=0.03)


def test_all_pictures_are_scaled_alike():
    images = normalised((torch.rand(20, 30), 5 * torch.rand(40, 30)), ("a", "b"))
    pixels = torch.cat([picture.flatten() for picture in images.pictures])
    assert pixels.mean() == pytest.approx(0, abs=1e-5)
    assert pixels.var() == pytest.approx(1, abs=1e-2)
    assert images.pictures[1].std() > 3 * images.pictures[0].std()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: whitened(torch.zeros(16, 40)), "16"),
        (lambda: whitened(torch.zeros(40, 40), cutoff=0), "cutoff is 0"),
        (lambda: NaturalImages((torch.zeros(9, 9),), ("a",)).patches(0, 3, 0), "count is 0"),
        (lambda: NaturalImages((torch.zeros(9, 9),), ("a",)).patches(1, 30, 0), "side is 30"),
        (lambda: NaturalImages((torch.zeros(9, 9),), ("a",)).patches(1, 3, 0, "test"), "part is 'test'"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(ConfigurationError, match=word):
        call()
