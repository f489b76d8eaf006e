"""A text that compiled steps read or write: the keys and values of its tokens, which are rolled back and rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.native import VALUE_CODES

if TYPE_CHECKING:
    from gossamer.runtime.program import DecodeProgram

_SPAN = 64  # a cache holds a multiple of these positions


class Session:
    """A text that is being read or written: the keys and values of its tokens, and the logits of the next one.

    Attributes
    ----------
    length
        Tokens so far.
    capacity
        Tokens that it may have.
    best
        The most likely next token after the last call of :meth:`feed`.
    """

    def __init__(self, program: DecodeProgram, capacity: int, dtype: torch.dtype):
        self.program, self.capacity, self.length, self.best = program, capacity, 0, -1
        self._value = VALUE_CODES[dtype]
        self._positions = -(-capacity // _SPAN) * _SPAN
        self._cache = torch.zeros(program._native.cache_bytes(self._positions, self._value), dtype=torch.uint8)
        self._logits = torch.empty(program.vocabulary)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.numel()

    def feed(
        self,
        tokens: Sequence[int] | Tensor,
        every: bool = False,
        threads: int | None = None,
        sparse: bool | None = None,
    ) -> Tensor:
        """Append tokens.

        Parameters
        ----------
        tokens
            At least one.
        every
            Whether logits of all of these tokens are wanted, and not only of the last.
        threads
            By default as many as torch uses. The result does not depend on it.
        sparse
            Whether thresholds of activations hold, if the program has any; by default for one token, and for more of
            them if :attr:`Thresholds.prompt` says so.

        Returns
        -------
        Tensor
            ``(vocabulary,)`` float32, valid until the next call; with `every` ``(tokens, vocabulary)``.

        Raises
        ------
        ConfigurationError
            If there is no token, one is not in the vocabulary, or they do not fit into the cache.
        """
        return self._feed(tokens, every, threads, sparse=sparse)

    def _feed(
        self,
        tokens: Sequence[int] | Tensor,
        every: bool = False,
        threads: int | None = None,
        exact: bool = False,
        sparse: bool | None = None,
    ) -> Tensor:
        """As :meth:`feed`; if `exact`, kernels for four-bit weights do not round their inputs."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).contiguous()
        if ids.ndim != 1 or not len(ids):
            raise ConfigurationError(f"tokens are {tuple(ids.shape)}; give at least one id, in one dimension")
        if self.length + len(ids) > self.capacity:
            raise ConfigurationError(
                f"{self.length} tokens and {len(ids)} more do not fit into a cache for {self.capacity}; make a larger "
                f"session"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.program.vocabulary:
            raise ConfigurationError(f"token {low if low < 0 else high} is outside 0 … {self.program.vocabulary - 1}")
        logits = torch.empty(len(ids), self.program.vocabulary) if every else self._logits
        thresholds = self.program.thresholds
        if thresholds is not None:
            self.program._native.limit(len(ids) == 1 or thresholds.prompt if sparse is None else sparse)
        self.best = self.program._native.step(
            ids.data_ptr(),
            len(ids),
            self.length,
            self._cache.data_ptr(),
            self._positions,
            self._value,
            logits.data_ptr(),
            every,
            threads or torch.get_num_threads(),
            exact,
        )
        self.length += len(ids)
        return logits

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`.

        Raises
        ------
        ConfigurationError
            If there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ConfigurationError(f"length is {length}; the text has {self.length} tokens")
        self.length = length

    def switch(self, program: DecodeProgram) -> None:
        """Let another program go on with the text; it reads the keys and values that are there and overwrites them.

        Parameters
        ----------
        program
            One of the same layers and heads, such as that of a model with fewer neurons.

        Raises
        ------
        ConfigurationError
            If its keys and values are of other sizes, its vocabulary is another, or it was made for fewer tokens.
        """
        own, found = ((p.vocabulary, p.key_sizes) for p in (self.program, program))
        if own != found:
            raise ConfigurationError(
                f"the program has {found[0]} tokens and {len(found[1])} layers, whose keys and values are not those of "
                f"the text with its {own[0]} tokens and {len(own[1])} layers; give a program of the same model"
            )
        if program.context < self.capacity:
            raise ConfigurationError(
                f"the program was made for {program.context} tokens, the text for {self.capacity}; give more context"
            )
        self.program = program
