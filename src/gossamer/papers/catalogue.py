"""The catalogue of papers: what each one is, what becomes zero in it, and how much of it works here.

The rows are in ``catalogue.toml`` beside this file. They are checked as they are read, so that a row with a
misspelt field or an unknown room never gets as far as a table.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from gossamer.errors import ConfigurationError, UnknownNameError

Status = Literal["none", "partial", "works"]

# room -> what becomes zero there; the order is that of the generated tables
ROOMS = {
    "pruning": "zeros in trained weights",
    "training": "zeros in weights while they train",
    "structured": "whole channels, heads and layers",
    "finetuning": "zeros in updates",
    "activations": "zeros in activations",
    "experts": "zeros in gates and mixtures of experts",
    "attention": "zeros in attention and tokens",
    "features": "sparse features: autoencoders, dictionaries, distributed representations",
    "linear": "zeros in coefficients: regression, sketches, transforms, solvers",
    "discovery": "sparse equations",
    "retrieval": "sparse vectors for search and recommendation",
    "graphs": "zeros in edges and dynamic graphs",
    "lifelong": "continual learning and unlearning",
    "spiking": "spiking networks",
    "imaging": "sparse measurements of images",
    "vision": "sparse scenes",
    "control": "sparse models for control",
}

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Paper:
    """One row of the catalogue.

    Attributes
    ----------
    slug
        Short name, under which everything else knows the paper.
    title, authors, year
        As cited; authors in short form.
    room
        Package in which its method lives, one of :data:`ROOMS`.
    zeros
        What becomes zero.
    idea
        The paper's idea in one sentence.
    status
        ``none``, ``partial``, or ``works``: every part is there and a result is stored.
    entry_points
        Importable names, such as ``gossamer.pruning.wanda.Wanda``; empty while the status is ``none``.
    arxiv
        arXiv identifier, such as ``2306.11695``, or None.
    reference
        Where else it is published (a DOI or a venue), for a paper without arXiv identifier.
    baseline
        Whether it is here as a common point of comparison only.
    """

    slug: str
    title: str
    authors: str
    year: int
    room: str
    zeros: str
    idea: str
    status: Status = "none"
    entry_points: tuple[str, ...] = ()
    arxiv: str | None = None
    reference: str | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ConfigurationError(f"catalogue row {self.slug!r}: {problem}")

    @property
    def citation(self) -> str:
        """Authors, year and identifier: ``Sun et al., 2024, arXiv 2306.11695``."""
        source = f"arXiv {self.arxiv}" if self.arxiv else self.reference
        return f"{self.authors}, {self.year}, {source}"

    @property
    def url(self) -> str | None:
        """Address of the arXiv page, or None."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def load_entry_points(self) -> list[Any]:
        """Import every entry point.

        Raises
        ------
        ConfigurationError
            If one cannot be imported; the message names it.
        """
        return [_import(self.slug, name) for name in self.entry_points]


def papers() -> list[Paper]:
    """Return every paper, by room and then by slug, as in the file.

    Raises
    ------
    ConfigurationError
        If a row of the catalogue is malformed; the message names the row and the field.
    """
    return list(_by_slug().values())


def paper(slug: str) -> Paper:
    """Return the paper called `slug`.

    Raises
    ------
    UnknownNameError
        If there is none; suggests the nearest.
    """
    known = _by_slug()
    if slug not in known:
        raise UnknownNameError("paper", slug, known)
    return known[slug]


def parse(text: str) -> list[Paper]:
    """Read and check a catalogue in TOML: an array of tables called ``paper``.

    Raises
    ------
    ConfigurationError
        If the text is not TOML, a row lacks a field or has one too many, a value is out of its range, or two rows
        share a slug.
    """
    try:
        rows = tomllib.loads(text).get("paper", [])
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"the catalogue is not valid TOML: {error}") from None
    found = [_paper(row) for row in rows]
    repeated = [slug for slug, count in Counter(paper.slug for paper in found).items() if count > 1]
    if repeated:
        raise ConfigurationError(f"catalogue row {repeated[0]!r} occurs more than once; slugs must be unique")
    return found


@cache
def _by_slug() -> dict[str, Paper]:
    text = resources.files("gossamer.papers").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return {paper.slug: paper for paper in parse(text)}


def _paper(row: dict[str, Any]) -> Paper:
    known = {field.name for field in fields(Paper)}
    required = {"slug", "title", "authors", "year", "room", "zeros", "idea", "status"}
    name = row.get("slug", row.get("title", "without slug"))
    if missing := sorted(required - row.keys()):
        raise ConfigurationError(f"catalogue row {name!r}: {missing[0]} is missing; every row must have it")
    if unknown := sorted(row.keys() - known):
        raise ConfigurationError(
            f"catalogue row {name!r}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    return Paper(**{**row, "entry_points": tuple(row.get("entry_points", ()))})


def _problem(paper: Paper) -> str | None:
    texts = {name: getattr(paper, name) for name in ("slug", "title", "authors", "zeros", "idea")}
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        return f"{empty[0]} is {texts[empty[0]]!r}; it must be some text"
    if not _SLUG.fullmatch(paper.slug):
        return "a slug is made of lower-case letters and digits joined by single hyphens"
    if paper.room not in ROOMS:
        return f"room is {paper.room!r}; it must be one of {', '.join(ROOMS)}"
    if paper.status not in get_args(Status):
        return f"status is {paper.status!r}; it must be none, partial or works"
    if not isinstance(paper.year, int) or not 1950 <= paper.year <= 2100:
        return f"year is {paper.year!r}; it must be a whole number such as 2024"
    if paper.arxiv is not None and not _ARXIV.fullmatch(paper.arxiv):
        return f"arxiv is {paper.arxiv!r}; it must look like 2306.11695"
    if paper.arxiv is None and not paper.reference:
        return "arxiv and reference are both missing; give one of them"
    if (paper.status == "none") != (not paper.entry_points):
        return f"status {paper.status!r} with {len(paper.entry_points)} entry points; only 'none' has none"
    return None


def _import(slug: str, name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"catalogue row {slug!r}: entry point {name!r} cannot be imported ({error}); correct its name"
        ) from error
