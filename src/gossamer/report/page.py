"""One run, on one page: what became smaller, faster or worse, and everything needed to repeat it.

A run record (plain JSON data) goes in, a self-contained HTML file comes out: no network, no fonts. Every
change is put into words by one rule, :func:`gossamer.report.wording.compare`, so that a speed that stayed the
same reads "no faster" and never looks like a gain.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from gossamer.errors import ConfigurationError, OutputError
from gossamer.report import charts
from gossamer.report.charts import number
from gossamer.report.wording import (
    MISSING,
    QUANTITIES,
    Change,
    Quantity,
    compare,
    figure,
    in_words,
    median_of,
    percent,
    scaled,
    split_common,
    spread_of,
    times,
)

REQUIRED = ("title", "model.name", "method.name", "dense.perplexity", "sparse.perplexity")
MAPPINGS = (
    "model",
    "method",
    "dense",
    "sparse",
    "activations",
    "limit",
    "calibration",
    "evaluation",
    "seconds",
    "machine",
    "versions",
)
LISTS = ("layers", "curve", "engines", "generations", "notes")
SHARES = {1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half", 2 / 3: "two thirds", 3 / 4: "three quarters"}
ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7}")


@dataclass(frozen=True)
class Comparison:
    """A quantity of both models in words, its change, and its two bars."""

    quantity: Quantity
    dense: str
    sparse: str
    change: Change
    dense_bar: charts.Bar
    sparse_bar: charts.Bar
    limit_text: str


def comparisons(record: Mapping) -> dict[str, Comparison]:
    """Compare every quantity that the record has for either model."""
    found = {}
    for quantity in QUANTITIES:
        sides = [record[side].get(quantity.key) for side in ("dense", "sparse")]
        if not any(quantity.key in record[side] for side in ("dense", "sparse")):
            continue
        limits = [record.get("limit", {}).get(name) for name in quantity.limits]
        rows = []
        for side, limit in zip(sides, limits):
            low, high = spread_of(side) or (None, None)
            rows.append({"value": median_of(side), "low": low, "high": high, "limit": number(limit)})
        reached = [
            f"{row['value'] / row['limit']:.0%} ({name})"
            for name, row in zip(("dense", "sparse"), rows)
            if row["value"] is not None and row["limit"]
        ]
        dense_text, sparse_text = (quantity.write(row["value"]) for row in rows)
        dense_bar, sparse_bar = charts.bars(rows)
        found[quantity.key] = Comparison(
            quantity, dense_text, sparse_text, compare(quantity, *sides), dense_bar, sparse_bar, " and ".join(reached)
        )
    return found


def headline(record: Mapping, found: Mapping[str, Comparison]) -> str:
    """Put the run into one sentence of plain words."""
    density = number(record["sparse"].get("density"))
    name, removed = record["model"]["name"], None if density is None else 1 - density
    read = number((record.get("activations") or {}).get("weights_read"))
    if read is not None:
        subject = f"{name} reading {100 * read:.3g}% of its weights for a token"
    elif removed is None:
        subject = f"{name} made sparse with {record['method']['name']}"
    else:
        near = min(SHARES, key=lambda share: abs(share - removed))
        share = SHARES[near] if abs(near - removed) < 0.005 else f"{100 * removed:.3g}%"
        subject = f"{name} with {share} of its block weights removed"
    parts = []
    for key, label in (
        ("file_bytes", "file"),
        ("perplexity", "perplexity"),
        ("decode_tokens_per_second", "decode"),
    ):
        if key not in found:
            continue
        item = found[key]
        if key == "perplexity":
            parts.append(f"{label} {item.dense}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{item.sparse}")
        else:
            parts.append(f"{label} {MISSING if item.change.ratio is None else times(item.change.ratio)}")
    return f"{subject}: {', '.join(parts)}"


def plain_truth(found: Mapping[str, Comparison]) -> str:
    """Say what the zeros did not buy, where they did not make the model faster."""
    decode, size = found.get("decode_tokens_per_second"), found.get("file_bytes")
    if decode is None or decode.change.meaning not in ("same", "worse"):
        return ""
    gain = "size, not speed" if size is not None and size.change.meaning == "better" else "no speed"
    return (
        "The sparse model does not run faster here. A dense kernel multiplies a zero like any other number, "
        f"so the pruning alone has bought {gain}."
    )


def reference(paper: object) -> dict[str, str] | None:
    """Write a paper as `Authors, year` with its title and, where the identifier is one, a link to arXiv."""
    if not isinstance(paper, Mapping):
        return None
    identifier = str(paper.get("arxiv") or "")
    by = [in_words(paper[key]) for key in ("authors", "year") if paper.get(key)]
    return {
        "title": str(paper.get("title") or ""),
        "by": ", ".join(by),
        "arxiv": identifier,
        "link": f"https://arxiv.org/abs/{identifier}" if ARXIV.fullmatch(identifier) else "",
    }


def check_record(record: object) -> None:
    """Refuse a record that lacks a required part or has a section of the wrong kind.

    Raises
    ------
    ConfigurationError
        Naming every missing key, or the section and its type.
    """
    if not isinstance(record, Mapping):
        raise ConfigurationError(f"the run record is a {type(record).__name__}; it must be a dict")
    for names, kind, word in ((MAPPINGS, Mapping, "dict"), (LISTS, (list, tuple), "list")):
        for name in names:
            value = record.get(name)
            if value is not None and not isinstance(value, kind):
                found = type(value).__name__
                raise ConfigurationError(f"{name} of the run record is a {found}; it must be a {word}")
    for name in LISTS[:-1]:
        for index, row in enumerate(record.get(name) or ()):
            if not isinstance(row, Mapping):
                found = type(row).__name__
                raise ConfigurationError(f"{name}[{index}] of the run record is a {found}; it must be a dict")
    missing = []
    for path in REQUIRED:
        section, _, key = path.rpartition(".")
        if key not in (record.get(section) or {} if section else record):
            missing.append(path)
    if missing:
        raise ConfigurationError(
            f"the run record lacks {', '.join(missing)}; a page needs {', '.join(REQUIRED)} (values may be None)"
        )


@cache
def environment() -> jinja2.Environment:
    """Templates of this folder, and what they may call."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gossamer.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.finalize = lambda value: "" if value is None else value
    filters = (scaled, figure, percent, in_words, number)
    made.filters.update({function.__name__: function for function in filters})
    return made


def render_page(record: Mapping) -> str:
    """Render a run record as one self-contained HTML page.

    Parameters
    ----------
    record
        JSON-able run record. `title`, `model.name`, `method.name`, `dense.perplexity` and `sparse.perplexity`
        must be there; every other missing part leaves its section out, and None or NaN is shown as `n/a`.

    Returns
    -------
    str
        The page; the same record always gives the same text.

    Raises
    ------
    ConfigurationError
        If a required key is missing or a section has the wrong type; the message names it.
    """
    check_record(record)
    record = {key: value for key, value in record.items() if value is not None}
    found = comparisons(record)
    layers, method = record.get("layers", []), record["method"]
    dense_perplexity = number(record["dense"]["perplexity"])
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            record=record,
            headline=headline(record, found),
            plain_truth=plain_truth(found),
            comparisons=found,
            paper=reference(method.get("paper")),
            curve=charts.quality_curve(record.get("curve", []), str(method["name"]), dense_perplexity),
            heat_maps=[charts.heat_map(layers, quantity) for quantity in ("sparsity", "error")],
            layers=layers,
            generations=[
                {"prompt": row.get("prompt", ""), **split_common(row.get("dense"), row.get("sparse"))}
                for row in record.get("generations", [])
            ],
        )
    )


def write_page(record: Mapping, path: str | os.PathLike[str]) -> Path:
    """Render a run record and put the page at `path`, complete or not at all.

    Parameters
    ----------
    record
        As in :func:`render_page`.
    path
        File to write; its directory must exist, an older page is replaced.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ConfigurationError
        If the record is incomplete.
    OutputError
        If the file cannot be written; nothing is left behind.
    """
    page, path = render_page(record), Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(page)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        message = f"cannot write the page {str(path)!r}: {error.strerror}; choose a writable path"
        raise OutputError(message) from error
    return path
