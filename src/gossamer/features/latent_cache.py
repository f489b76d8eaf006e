"""Active features of a whole corpus on disk: where each of them fires, how strongly, and on which text.

An inverted index and nothing else. The corpus is cut into shards of at most 65,536 tokens; within a shard occurrences
lie feature after feature, each as the place of its token in the shard (two bytes) and its value (two). Which feature
it is need not be written, since a table says where each begins. That makes four bytes for an occurrence, less than one
in a hundred of what dense float16 activations of a usual dictionary take, and a feature is read without reading others.

What is lost: values are rounded to float16, a part in 2,000 (or kept, with float32). Places are exact, and what was
active stays active, however small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.features.latent_facts import TYPES, check_origin, read_facts

SHARD = 1 << 16
_STARTS, _ROWS, _TOKENS, _OFFSETS = np.uint32, np.uint16, np.int32, np.int64


@dataclass(frozen=True, eq=False)
class Occurrences:
    """Where a feature is active: `rows` ``(n,)`` int64, ascending, and `values` ``(n,)`` float32."""

    rows: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Context:
    """A stretch of a document around an occurrence.

    Attributes
    ----------
    document, begin
        Number of the document, and position of the first token of the stretch.
    tokens
        Their ids, ``(n,)`` int32.
    values
        Of the feature at each of them, float32; zero where it is silent or where tokens have no codes.
    centre
        Place of the occurrence in the stretch.
    """

    document: int
    begin: int
    tokens: np.ndarray
    values: np.ndarray
    centre: int


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Of all features, each a line.

    Attributes
    ----------
    counts
        Tokens on which it is active, int64 ``(features,)``.
    maximum, mean
        Of its values where it is active, float32; zero if it never is.
    histogram
        Of its values, int64 ``(features, bins)``, in equal steps from 0 to its maximum; what is negative is in the
        first.
    """

    counts: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    histogram: np.ndarray


class LatentCache:
    """A directory of sparse codes, mapped into memory.

    Parameters
    ----------
    directory
        What :func:`gossamer.features.latent_capture.cache_latents` has written, finished or not.
    model, site, encoder
        If given, the cache must be of this model, this place and this autoencoder.

    Attributes
    ----------
    facts
        What it says of itself.
    tokens
        Ids of all tokens of the text, document after document, int32.
    offsets
        ``(documents + 1,)`` int64: where each document begins in `tokens`.

    Raises
    ------
    CheckpointError
        If there is no cache, it is damaged, or was written by a newer version.
    ModelError
        If it is of another model, place or autoencoder.

    Examples
    --------
    >>> cache = LatentCache("latents")
    >>> context = cache.top(7, 1)[0]
    >>> tokenizer.decode(context.tokens)
    """

    def __init__(
        self,
        directory: Path | str,
        model: nn.Module | None = None,
        site: str | int | None = None,
        encoder: nn.Module | None = None,
    ):
        self.directory = Path(directory)
        self.facts = facts = read_facts(self.directory)
        check_origin(self.directory, facts, model, site, encoder)
        self.offsets = self._map("documents", _OFFSETS, facts.documents + 1)
        self.tokens = self._map("tokens", _TOKENS, int(self.offsets[-1]))
        shards = len(facts.shards)
        self._starts = self._map("starts", _STARTS, shards * (facts.features + 1)).reshape(shards, facts.features + 1)
        self._rows = self._map("rows", _ROWS, facts.entries)
        self._values = self._map("values", TYPES[facts.dtype], facts.entries)
        self._first_row = np.cumsum([0, *(shard.rows for shard in facts.shards)])
        self._first_entry = np.cumsum([0, *(shard.entries for shard in facts.shards)])

    def _map(self, name: str, kind: Any, count: int) -> np.ndarray:
        file = self.directory / f"{name}.bin"
        needed = count * np.dtype(kind).itemsize
        size = file.stat().st_size if file.exists() else 0
        if size < needed:
            raise CheckpointError(f"{file} has {size} bytes of {needed}; the cache is damaged, make it again")
        return np.memmap(file, kind, "r", shape=(count,)) if needed else np.zeros(count, kind)

    def __len__(self) -> int:
        return self.facts.rows

    @property
    def width(self) -> int:
        """Number of features."""
        return self.facts.features

    @property
    def nbytes(self) -> int:
        """Bytes of all files, text included."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same codes take as dense float16."""
        return len(self) * self.width * 2

    @cached_property
    def row_starts(self) -> np.ndarray:
        """First row of every document, ``(documents + 1,)`` int64; those not written yet are counted too."""
        lengths = np.maximum(np.diff(self.offsets) - self.facts.skipped, 0)
        return np.concatenate([[0], np.cumsum(lengths)])

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Document of every row, and its position there; int64."""
        rows = self._checked(rows)
        documents = np.searchsorted(self.row_starts, rows, side="right") - 1
        return documents, rows - self.row_starts[documents] + self.facts.skipped

    def token_places(self, rows: np.ndarray) -> np.ndarray:
        """Where the token of every row lies in `tokens`; int64."""
        documents, positions = self.places(rows)
        return self.offsets[documents] + positions

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ConfigurationError(f"rows go from {rows.min()} to {rows.max()}; the cache has {len(self)}, from 0")
        return rows

    def occurrences(self, feature: int) -> Occurrences:
        """Where a feature is active, in the order of the text.

        Raises
        ------
        ConfigurationError
            If there is no such feature.
        """
        if not 0 <= feature < self.width:
            raise ConfigurationError(f"feature is {feature}; it must be from 0 to {self.width - 1}")
        rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for number in range(len(self.facts.shards)):
            first, last = (self._first_entry[number] + int(at) for at in self._starts[number, feature : feature + 2])
            rows.append(self._rows[first:last].astype(np.int64) + self._first_row[number])
            values.append(self._values[first:last].astype(np.float32))
        return Occurrences(np.concatenate(rows), np.concatenate(values))

    def shards(self) -> Iterator[tuple[int, SparseCodes]]:
        """The corpus a stretch at a time: the number of its first row, and its codes, features ascending."""
        for number in range(len(self.facts.shards)):
            yield int(self._first_row[number]), self._shard(number)

    def codes(self, first: int, last: int) -> SparseCodes:
        """Codes of rows from `first` to before `last`, features ascending."""
        if not 0 <= first <= last <= len(self):
            raise ConfigurationError(f"rows are asked for from {first} to {last}; there are {len(self)}")
        none = torch.zeros(0, dtype=torch.int32)
        parts = [SparseCodes(none, none.float(), torch.zeros(1, dtype=torch.int64), self.width)]
        for number, begin in enumerate(self._first_row[:-1]):
            end = self._first_row[number + 1]
            if begin < last and end > first:
                parts.append(self._shard(number)[max(first - begin, 0) : min(last, end) - begin])
        return SparseCodes.cat(parts)

    def _entries(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Feature, row in the shard, and value of all occurrences of a shard, feature after feature."""
        part = slice(self._first_entry[number], self._first_entry[number + 1])
        features = np.repeat(np.arange(self.width, dtype=np.int32), np.diff(self._starts[number].astype(np.int64)))
        return features, self._rows[part], self._values[part].astype(np.float32)

    def _shard(self, number: int) -> SparseCodes:
        features, rows, values = self._entries(number)
        order = np.argsort(rows, kind="stable")
        starts = np.zeros(self.facts.shards[number].rows + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(starts) - 1), out=starts[1:])
        parts = (torch.from_numpy(array) for array in (features[order], values[order], starts))
        return SparseCodes(*parts, self.width)

    def coactive(self, feature: int) -> np.ndarray:
        """Tokens at which each feature is active together with this one, int64 ``(features,)``."""
        rows, together = self.occurrences(feature).rows, np.zeros(self.width, np.int64)
        for number in range(len(self.facts.shards)):
            features, places, _ = self._entries(number)
            here = np.zeros(self.facts.shards[number].rows, bool)
            first, last = np.searchsorted(rows, self._first_row[number : number + 2])
            here[rows[first:last] - self._first_row[number]] = True
            together += np.bincount(features[here[places]], minlength=self.width)
        return together

    def statistics(self, bins: int = 24) -> FeatureStatistics:
        """Counts, extremes and histograms of all features, in two passes over the shards."""
        if bins < 1:
            raise ConfigurationError(f"bins is {bins}; it must be 1 or more")
        counts, total = np.zeros(self.width, np.int64), np.zeros(self.width)
        maximum = np.full(self.width, -np.inf, np.float32)
        for number in range(len(self.facts.shards)):
            features, _, values = self._entries(number)
            counts += np.bincount(features, minlength=self.width)
            total += np.bincount(features, weights=values, minlength=self.width)
            present, begins = np.unique(features, return_index=True)
            if len(present):
                maximum[present] = np.maximum(maximum[present], np.maximum.reduceat(values, begins))
        maximum[counts == 0] = 0
        histogram = np.zeros(self.width * bins, np.int64)
        step = np.where(maximum > 0, maximum, 1) / bins
        for number in range(len(self.facts.shards)):
            features, _, values = self._entries(number)
            at = np.clip(values / step[features], 0, bins - 1).astype(np.int64)
            histogram += np.bincount(features.astype(np.int64) * bins + at, minlength=len(histogram))
        mean = (total / np.maximum(counts, 1)).astype(np.float32)
        return FeatureStatistics(counts, maximum, mean, histogram.reshape(self.width, bins))

    def top(self, feature: int, count: int, before: int = 24, after: int = 8, apart: int = 16) -> list[Context]:
        """Contexts in which a feature is most active.

        Parameters
        ----------
        feature
            Its number.
        count
            Contexts, at most.
        before, after
            Tokens shown on either side, where the document has them.
        apart
            Of occurrences less than so many tokens apart, only the strongest is taken.
        """
        found = self.occurrences(feature)
        documents, _ = self.places(found.rows)
        chosen: list[int] = []
        for at in np.argsort(-found.values, kind="stable"):
            if len(chosen) == count:
                break
            near = [c for c in chosen if documents[c] == documents[at] and abs(found.rows[c] - found.rows[at]) < apart]
            if not near:
                chosen.append(int(at))
        return [self.context(int(found.rows[at]), found, before, after) for at in chosen]

    def context(self, row: int, found: Occurrences, before: int = 24, after: int = 8) -> Context:
        """The text around a row, with the values of the feature whose occurrences are given."""
        document, position = (int(part[0]) for part in self.places(np.array([row])))
        length = int(self.offsets[document + 1] - self.offsets[document])
        begin, end = max(position - before, 0), min(position + after + 1, length)
        first = int(self.offsets[document])
        values = np.zeros(end - begin, np.float32)
        # rows of this stretch; tokens in front of the first row have no codes
        base = int(self.row_starts[document]) - self.facts.skipped
        low, high = np.searchsorted(found.rows, (base + max(begin, self.facts.skipped), base + end))
        values[found.rows[low:high] - base - begin] = found.values[low:high]
        return Context(document, begin, np.asarray(self.tokens[first + begin : first + end]), values, position - begin)

    def document(self, number: int) -> Tensor:
        """Token ids of a document, ``(tokens,)`` int64."""
        if not 0 <= number < self.facts.documents:
            raise ConfigurationError(f"document is {number}; it must be from 0 to {self.facts.documents - 1}")
        return torch.from_numpy(self.tokens[self.offsets[number] : self.offsets[number + 1]].astype(np.int64))

    def __repr__(self) -> str:
        facts = self.facts
        mean = facts.entries / max(facts.rows, 1)
        return (
            f"LatentCache({facts.rows:,} tokens of {facts.site}, {facts.features:,} features, {mean:.1f} active on a "
            f"token, {self.nbytes:,} bytes, {self.directory})"
        )
