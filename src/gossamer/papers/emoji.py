"""Small colour pictures with their names, and one space for both, learned by contrast.

The pictures are the emoji of Google (Apache-2.0) and of Twitter (CC BY 4.0), 32 × 32 each, from the npm package
emoji-datasource (MIT); no other maker's art is read. A small convolutional network learns to bring a picture close to
its name, as a pretrained sentence encoder reads it, and away from other names [Radford et al., 2021, arXiv
2103.00020].
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gossamer.core.randomness import generator_for
from gossamer.errors import CheckpointError
from gossamer.features.autointerp.embedding import MeanPooledEncoder
from gossamer.papers.encoder_text import encoder, encoder_tokenizer
from gossamer.papers.npm_packages import content, npm_data

_PACKAGE, _VERSION = "emoji-datasource", "16.0.0"
_SHA256 = "2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9"
_MAKERS = ("google", "twitter")
_SIDE, _PITCH = 32, 34  # of a picture, and from one to the next on a sheet
_FILE, _NAMES = "pictures.npy", "names.json"


@dataclass(frozen=True, eq=False)
class Emoji:
    """Pictures and what they are called.

    Attributes
    ----------
    images
        ``(pictures, 4, 32, 32)`` uint8: red, green, blue and opacity.
    of
        Number of the name of every picture, ``(pictures,)``.
    names
        In lower case.
    """

    images: Tensor
    of: Tensor
    names: list[str]


@cache
def emoji() -> Emoji:
    """All emoji without tones of skin, by two makers; downloaded the first time (25 MB).

    Raises
    ------
    ModelError
        If npm is not installed, or cannot download the package.
    CheckpointError
        If it is not the one that is expected, or the cache is damaged.
    """
    folder = npm_data(_PACKAGE, _VERSION, _SHA256, _keep)
    try:
        told = json.loads((folder / _NAMES).read_text("utf-8"))
        return Emoji(torch.from_numpy(np.load(folder / _FILE)), torch.tensor(told["of"]), told["names"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); delete it to download it again") from error


def _keep(archive: Path, folder: Path) -> None:
    images, of, names = _read(archive)
    np.save(folder / _FILE, images)
    (folder / _NAMES).write_text(json.dumps({"of": of, "names": names}), "utf-8")


def _read(archive: Path) -> tuple[np.ndarray, list[int], list[str]]:
    from PIL import Image

    images, of = [], []
    with tarfile.open(archive) as files:
        entries = json.loads(content(files, "emoji.json"))
        for maker in _MAKERS:
            sheet = np.asarray(Image.open(io.BytesIO(content(files, f"img/{maker}/sheets/32.png"))).convert("RGBA"))
            for number, entry in enumerate(entries):
                if entry[f"has_img_{maker}"]:
                    row, column = entry["sheet_y"] * _PITCH + 1, entry["sheet_x"] * _PITCH + 1
                    images.append(sheet[row : row + _SIDE, column : column + _SIDE].transpose(2, 0, 1))
                    of.append(number)
    return np.stack(images), of, [(entry["name"] or entry["short_name"]).lower() for entry in entries]


# --------------------------------------------------------------------------------------------------- one space for both


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Pictures and names as unit vectors of one space.

    Attributes
    ----------
    images, texts
        ``(pictures, size)``, and the name of each picture.
    held_out
        Pictures whose name was not seen in training, bool ``(pictures,)``.
    retrieved
        Share of these for which their own name is among the five nearest of all names that were held out.
    """

    images: Tensor
    texts: Tensor
    held_out: Tensor
    retrieved: float


class TwoTowers(nn.Module):
    """A convolutional network for pictures, and a linear map of sentence vectors, into one space.

    Parameters
    ----------
    size
        Of the space.
    width
        Channels of the first convolution.
    sentence
        Size of a sentence vector.
    """

    def __init__(self, size: int, width: int, sentence: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((4, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.pictures = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, size))
        self.names = nn.Linear(sentence, size)
        self.sharpness = nn.Parameter(torch.tensor(2.5))

    def embed(self, images: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of both."""
        scaled = images.float() / 127.5 - 1
        return normalize(self.pictures(scaled), dim=1), normalize(self.names(sentences), dim=1)

    def loss(self, images: Tensor, sentences: Tensor) -> Tensor:
        """Symmetric cross-entropy of every picture among the names of its batch, and the other way round."""
        pictures, names = self.embed(images, sentences)
        logits = self.sharpness.exp() * pictures @ names.t()
        own = torch.arange(len(logits))
        return (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2


def contrastive_embeddings(settings: dict[str, Any], seed: int) -> Embeddings:
    """Train two towers, and embed all pictures and names.

    Parameters
    ----------
    settings
        ``size`` of the space, ``width`` of the network, ``steps`` of Adam, ``batch`` and ``rate``.
    seed
        Of the weights, of what is held out (a fifth of the names), and of the batches.
    """
    data, generator = emoji(), generator_for("emoji", seed)
    sentences = _sentences()[data.of]
    unseen = torch.rand(len(data.names), generator=generator) < 0.2
    held_out = unseen[data.of]
    known = held_out.logical_not().nonzero()[:, 0]
    torch.manual_seed(seed)
    towers = TwoTowers(settings["size"], settings["width"], sentences.shape[1])
    optimizer = torch.optim.Adam(towers.parameters(), lr=settings["rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["rate"], total_steps=settings["steps"])
    for _ in range(settings["steps"]):
        rows = known[torch.randint(len(known), (settings["batch"],), generator=generator)]
        optimizer.zero_grad()
        towers.loss(data.images[rows], sentences[rows]).backward()
        optimizer.step()
        schedule.step()
    towers.eval()
    with torch.no_grad():
        parts = [towers.embed(*pair) for pair in zip(data.images.split(512), sentences.split(512), strict=True)]
    images, texts = (torch.cat(each) for each in zip(*parts, strict=True))
    return Embeddings(images, texts, held_out, _retrieved(images, texts, data.of, held_out))


@cache
def _sentences() -> Tensor:
    """Every name as a sentence vector."""
    return torch.from_numpy(MeanPooledEncoder(encoder(), encoder_tokenizer())(emoji().names))


def _retrieved(images: Tensor, texts: Tensor, of: Tensor, held_out: Tensor, nearest: int = 5) -> float:
    own = of[held_out]
    names = own.unique()
    place = torch.searchsorted(names, own)
    vectors = torch.zeros(len(names), texts.shape[1]).index_copy(0, place, texts[held_out])
    found = (images[held_out] @ vectors.t()).topk(min(nearest, len(names)), dim=1).indices
    return float((found == place[:, None]).any(1).double().mean())
