"""Explanations of features with their scores, in a file that can be handed around."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError
from gossamer.features.autointerp.score import Score
from gossamer.storage.atomic import write_json

VERSION = 1
_FORMAT = "gossamer explanations"


@dataclass(frozen=True)
class Explanation:
    """What a feature is said to be.

    Attributes
    ----------
    text
        In words.
    by
        Who says so.
    scores
        How well it does, by each scorer.
    """

    text: str
    by: str = ""
    scores: Sequence[Score] = ()

    def headline_score(self) -> float | None:
        """Mean of its areas under curves, or None if it has none."""
        areas = [score.value for score in self.scores if score.metric == "auc" and score.value is not None]
        return round(math.fsum(areas) / len(areas), 4) if areas else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"text": self.text, "by": self.by, "scores": [score.to_dict() for score in self.scores]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Explanation:
        """What :meth:`to_dict` has written."""
        return cls(str(plain["text"]), str(plain.get("by", "")), [Score.from_dict(s) for s in plain.get("scores", ())])


def save_explanations(explanations: Mapping[int, Explanation], path: str | os.PathLike[str], encoder: str = "") -> None:
    """Write explanations of features.

    Parameters
    ----------
    explanations
        Feature → what it is said to be.
    path
        A JSON file; is replaced.
    encoder
        Fingerprint of the autoencoder, by which a reader finds out whether they belong to another.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    plain = {str(feature): said.to_dict() for feature, said in sorted(explanations.items())}
    write_json(path, {"format": _FORMAT, "version": VERSION, "encoder": encoder, "features": plain})


def load_explanations(path: str | os.PathLike[str], encoder: str | None = None) -> dict[int, Explanation]:
    """Read what :func:`save_explanations`, or a person, has written.

    Parameters
    ----------
    path
        A JSON file. Written by hand, it needs no more than ``{"format": "gossamer explanations", "version": 1,
        "features": {"12": {"text": "words about the sea"}}}``.
    encoder
        Fingerprint of the autoencoder that they must belong to, where the file names one.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, of a newer version, or of another autoencoder.
    """
    file = Path(path)
    try:
        said = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} holds no explanations ({error}); give a JSON file") from error
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise CheckpointError(f"{file} does not say that it holds explanations; its format must be {_FORMAT!r}")
    if said.get("version") != VERSION:
        raise CheckpointError(
            f"{file} is of version {said.get('version')}, this gossamer reads {VERSION}; update gossamer"
        )
    if encoder and said.get("encoder") and said["encoder"] != encoder:
        raise CheckpointError(f"{file} explains the features of another autoencoder; make explanations of this one")
    try:
        return {int(feature): Explanation.from_dict(plain) for feature, plain in said["features"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); every feature needs a text") from error
