"""Where the latents of a corpus are active, looked up by latent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, UnknownNameError
from gossamer.features.latent_cache import LatentCache


@dataclass(frozen=True, eq=False)
class Firings:
    """All activations of one latent, in the order of the text.

    Attributes
    ----------
    documents, positions
        Where, ``(n,)`` int64 each.
    values
        How strongly, ``(n,)`` float32, above 0.
    """

    documents: np.ndarray
    positions: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def inside(self, documents: np.ndarray) -> Firings:
        """Those in some documents."""
        kept = np.isin(self.documents, documents)
        return Firings(self.documents[kept], self.positions[kept], self.values[kept])

    def window(self, document: int, start: int, length: int) -> np.ndarray:
        """Activations of some consecutive tokens, ``(length,)`` float32."""
        found = np.zeros(length, np.float32)
        first = int(np.searchsorted(self._keys, _key(document, start)))
        last = int(np.searchsorted(self._keys, _key(document, start + length)))
        found[self.positions[first:last] - start] = self.values[first:last]
        return found

    @cached_property
    def _keys(self) -> np.ndarray:
        return _key(self.documents, self.positions)


def _key(document: np.ndarray | int, position: np.ndarray | int) -> np.ndarray:
    return np.asarray(document, np.int64) * (1 << 32) + np.asarray(position, np.int64)


class Activity(ABC):
    """A corpus of documents and the latents that are active in it.

    Attributes
    ----------
    latents
        How many there are.
    rows
        Tokens that were encoded.
    lengths
        Tokens of every document, ``(documents,)`` int64.
    """

    latents: int
    rows: int
    lengths: np.ndarray

    @abstractmethod
    def tokens(self, document: int, start: int, length: int) -> np.ndarray:
        """Ids of some consecutive tokens; fewer at the end of the document."""

    @abstractmethod
    def shared(self, latent: int) -> np.ndarray:
        """Tokens at which each latent is active together with this one, ``(latents,)``."""

    @property
    @abstractmethod
    def counts(self) -> np.ndarray:
        """Tokens at which each latent is active, ``(latents,)``."""

    @abstractmethod
    def _occurrences(self, latent: int) -> Firings: ...

    def firings(self, latent: int) -> Firings:
        """All activations of a latent.

        Raises
        ------
        UnknownNameError
            If there is no such latent.
        """
        if not 0 <= latent < self.latents:
            raise UnknownNameError("latent", str(latent), [f"0 to {self.latents - 1}"])
        return self._occurrences(latent)


class CachedActivity(Activity):
    """Of a cache on disk, which is read as far as it is needed.

    Parameters
    ----------
    cache
        What :func:`gossamer.features.latent_capture.cache_latents` makes.
    """

    def __init__(self, cache: LatentCache):
        self.cache = cache
        self.latents, self.rows = cache.width, len(cache)
        self.lengths = np.diff(cache.offsets)[: cache.facts.done]

    def tokens(self, document: int, start: int, length: int) -> np.ndarray:  # noqa: D102
        first = int(self.cache.offsets[document])
        return np.asarray(self.cache.tokens[first + start : first + min(start + length, int(self.lengths[document]))])

    def shared(self, latent: int) -> np.ndarray:  # noqa: D102
        return self.cache.coactive(latent)

    @cached_property
    def counts(self) -> np.ndarray:  # noqa: D102
        return self.cache.statistics(bins=1).counts

    def _occurrences(self, latent: int) -> Firings:
        found = self.cache.occurrences(latent)
        active = found.values > 0
        return Firings(*self.cache.places(found.rows[active]), found.values[active])


class CodedActivity(Activity):
    """Of codes in memory.

    Parameters
    ----------
    texts
        Token ids of every document.
    codes
        Active latents of every token, a row each, document after document.
    skipped
        First tokens of every document that have no codes.

    Raises
    ------
    CalibrationError
        If there is not one row for each token.
    """

    def __init__(self, texts: Sequence[Tensor | np.ndarray], codes: SparseCodes, skipped: int = 0):
        self._texts = [np.asarray(text).reshape(-1) for text in texts]
        self.lengths = np.array([len(text) for text in self._texts], np.int64)
        encoded = np.maximum(self.lengths - skipped, 0)
        if len(codes) != encoded.sum():
            raise CalibrationError(f"{len(codes)} rows of codes for {encoded.sum()} tokens; give the text of the codes")
        self.codes, self.latents, self.rows = codes, codes.width, len(codes)
        self._documents = np.repeat(np.arange(len(encoded)), encoded)
        self._positions = np.arange(len(codes)) - np.repeat(encoded.cumsum() - encoded, encoded) + skipped

    def tokens(self, document: int, start: int, length: int) -> np.ndarray:  # noqa: D102
        return self._texts[document][start : start + length]

    @cached_property
    def _by_latent(self) -> SparseCodes:
        return self.codes.transposed()

    @cached_property
    def counts(self) -> np.ndarray:  # noqa: D102
        return self._by_latent.counts.numpy()

    def shared(self, latent: int) -> np.ndarray:  # noqa: D102
        here = np.zeros(self.rows, bool)
        here[self._by_latent[latent : latent + 1].indices.numpy()] = True
        return np.bincount(self.codes.indices.numpy()[here[self.codes.row_of.numpy()]], minlength=self.latents)

    def _occurrences(self, latent: int) -> Firings:
        found = self._by_latent[latent : latent + 1]
        values = found.values.detach().float().numpy()
        rows = found.indices.numpy()[values > 0]
        return Firings(self._documents[rows], self._positions[rows], values[values > 0])
