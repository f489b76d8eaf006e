from __future__ import annotations

import pytest
import torch

from gossamer.coding.pictures import draw_fields, draw_shapes, mosaic
from gossamer.coding.receptive_fields import gabor_fit
from gossamer.errors import ConfigurationError


def test_tiles_stand_side_by_side():
    atoms = torch.stack([torch.full((16,), -2.0), torch.zeros(16), torch.full((16,), 0.5)])
    picture = mosaic(atoms, columns=2)
    assert picture.shape == (9, 9)
    assert (picture[:4, :4] == 0).all()
    assert (picture[:4, 5:] == 0.5).all()
    assert (picture[5:, :4] == 1).all()
    assert (picture[4] == 1).all()


def test_pictures_are_written(tmp_path):
    atoms = torch.randn(10, 36, generator=torch.Generator().manual_seed(0))
    draw_fields({"one": atoms, "other": atoms[:3]}, tmp_path / "fields.png")
    draw_shapes({"one": gabor_fit(atoms)}, tmp_path / "shapes.png")
    for name in ("fields.png", "shapes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"\(3, 10\)"):
        mosaic(torch.zeros(3, 10))
    for draw in (draw_fields, draw_shapes):
        with pytest.raises(ConfigurationError, match="at least one"):
            draw({}, tmp_path / "none.png")
