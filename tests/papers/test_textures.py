from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from gossamer.errors import CalibrationError, CheckpointError
from gossamer.papers import textures as module
from gossamer.papers.textures import crops, grey, residual, vgg


@pytest.fixture
def downloaded(monkeypatch, tmp_path):
    """Noisy pictures in the place of the package."""
    folder = tmp_path / "skimage/data"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in (*module.CLASSES, *module.HELD_OUT):
        pixels = torch.randint(256, (140, 200, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    monkeypatch.setattr(module, "fetch", lambda *_: tmp_path)
    module.textures.cache_clear()
    yield folder
    module.textures.cache_clear()


def test_no_pixel_is_both_learnt_from_and_judged_by():
    numbered = torch.rand(130, 200, generator=torch.Generator().manual_seed(0))
    white, black = crops(numbered, 0), crops(numbered, 1)
    assert len(white) == len(black) == 3 * 49  # of 2 × 3 squares, with 7 × 7 crops in each
    square = numbered[:64, 64:128]
    expected = square[8:24, 48:64]
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert any(torch.allclose(crop[0], expected, atol=1e-5) for crop in black)
    assert not any(torch.allclose(crop[0], expected, atol=1e-2) for crop in white)


def test_crops_have_no_brightness_and_no_contrast():
    picture = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(crops(picture, 0), crops(0.3 + 0.2 * picture, 0), atol=1e-4, rtol=0)
    found = crops(picture, 0)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(49), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var((1, 2, 3), correction=0), torch.ones(49))


def test_flat_crops_are_left_out():
    picture = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    picture[:16, :16] = 0.5
    assert len(crops(picture, 0)) == 48
    assert len(crops(torch.full((200, 200), 0.5), 0)) == 0


def test_every_photograph_is_a_class_and_others_are_strange(downloaded):
    found = module.textures()
    assert set(found.training.labels.tolist()) == set(found.held_out.labels.tolist()) == set(range(10))
    assert found.training.images.shape[1:] == found.strange.shape[1:] == (1, 16, 16)
    assert len(found.strange) == 4 * 6 * 49
    assert not set(module.CLASSES) & set(module.HELD_OUT)
    first, second = found.split(5, 3, 0), found.split(5, 3, 0)
    assert [len(part) for part in first] == [50, 30]
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, second))
    with pytest.raises(CalibrationError, match="147"):
        found.split(147, 3, 0)


def test_a_photograph_that_cannot_be_read_is_named(downloaded):
    (downloaded / "brick.png").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"brick\.png"):
        grey(downloaded / "brick.png")


@pytest.mark.parametrize("blocks", [1, 3])
def test_residual_networks_are_as_deep_as_they_say(blocks):
    network = residual(4, blocks)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 6 * blocks + 2
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_a_block_without_weights_passes_its_input_on():
    block = module.ResidualBlock(2, 4, 2)
    nn.init.zeros_(block.body[4].weight)
    x = torch.rand(1, 2, 4, 4)
    made = block(x)
    assert torch.equal(made[:, :2], x[:, :, ::2, ::2])
    assert not made[:, 2:].any()


def test_a_small_vgg_takes_crops():
    assert vgg(4)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
