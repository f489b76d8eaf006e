"""How a model computes while it is corrected: a text, tokens that the sparse model drafts, and those that are checked.

``eager`` is the model's own code with a cache that is rewritten in place. ``compile`` has a graph of torch.compile for
each of the two models, over keys and values of fixed size. ``native`` has the compiled steps of
:mod:`gossamer.runtime.program` for each, which share the keys and values of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.activations.contextual import ContextualSparse
from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.few_vectors import FewVectors
from gossamer.models.key_value_cache import StaticMemory, crop_to
from gossamer.runtime.program import DecodeProgram
from gossamer.runtime.session import Session

Runtime = Literal["eager", "compile", "native"]
_LEAST = 256  # places for tokens


class EagerText:
    """A text in transformers' own code.

    Parameters
    ----------
    model
        A causal language model.
    sparse
        How it computes while it drafts.

    Attributes
    ----------
    cache
        Keys and values of the text.
    best
        The most likely token after the last draft, where it has been found on the way; None elsewhere.
    """

    best: int | None = None

    def __init__(self, model: Any, sparse: ContextualSparse):
        self.model, self.sparse = model, sparse
        self.cache: Any = None

    def begin(self, ids: Tensor, cache: Any, room: int) -> None:
        """Go on from a prompt.

        Parameters
        ----------
        ids
            Its tokens, ``(1, tokens)``, without padding.
        cache
            That holds them.
        room
            Most tokens that will come.
        """
        self.cache = cache

    def end(self) -> None:
        """Leave the cache as one that the text can be continued from."""

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self.cache.get_seq_length()

    def crop(self, length: int) -> None:
        """Forget what comes after so many tokens."""
        crop_to(self.cache, length)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Let the sparse model read inside of the context."""
        with self.sparse.active():
            yield

    def draft(self, token: int) -> Tensor:
        """Read one token; logits ``(1, vocabulary)``."""
        return self.read(torch.tensor([[token]], device=self.model.device))

    def check(self, tokens: list[int]) -> Tensor:
        """Read tokens at once; logits ``(tokens, vocabulary)``."""
        with FewVectors():  # on the CPU torch's own products with sixteen vectors take as long as two or three steps
            return self.read(torch.tensor([tokens], device=self.model.device))

    def read(self, ids: Tensor, **options: Any) -> Tensor:
        """Call the model with positions and masks of one's own."""
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **options).logits[0]


class CompiledText:
    """A text in two graphs of torch.compile, whose shapes are the same in every call.

    The sparse graph reads one token, the full one always as many as a check of full length has; where there are
    fewer, tokens that do not count follow them and are forgotten. Prompts are not compiled.

    Parameters
    ----------
    model, sparse
        As of :class:`EagerText`.
    tokens
        That a check reads.
    backend
        Of torch.compile: a name, or a function.
    """

    best: int | None = None

    def __init__(self, model: Any, sparse: ContextualSparse, tokens: int, backend: Any = "inductor"):
        self.model, self.sparse, self._tokens, self._backend = model, sparse, tokens, backend
        self._memory: StaticMemory | None = None
        self._given: Any = None
        self._draft, self._check = self._graph(), self._graph()

    def begin(self, ids: Tensor, cache: Any, room: int) -> None:
        """See :meth:`EagerText.begin`."""
        needed = cache.get_seq_length() + room + self._tokens
        if self._memory is None or self._memory.capacity < needed:
            self._memory = StaticMemory(len(cache.layers), _rounded_up(needed))
        self._memory.fill(cache)
        self._given = cache

    def end(self) -> None:
        """Give the tokens that have come to the cache of the prompt."""
        self._static.append_to(self._given)

    @property
    def _static(self) -> StaticMemory:
        if self._memory is None:
            raise ConfigurationError("there is no text yet; call begin() first")
        return self._memory

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self._static.length

    def crop(self, length: int) -> None:
        """Forget what comes after so many tokens."""
        self._static.rewind(length)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Let the sparse model read inside of the context."""
        with self.sparse.active():
            yield

    def draft(self, token: int) -> Tensor:
        """Read one token; logits ``(1, vocabulary)``."""
        return self._read(self._draft, [token], 1)

    def check(self, tokens: list[int]) -> Tensor:
        """Read tokens at once; logits ``(tokens, vocabulary)``."""
        return self._read(self._check, tokens, self._tokens)

    def _read(self, graph: Callable[..., Tensor], tokens: list[int], shape: int) -> Tensor:
        behind = self._static.length + len(tokens)
        ids = torch.tensor([[*tokens, *[0] * (shape - len(tokens))]], device=self.model.device)
        try:
            logits = graph(ids, *self._static.places(shape), self._static.cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).split("\n")[:2])
            raise ConfigurationError(
                f"{type(self.model).__name__} could not be compiled ({why}); the CPU takes a C++ compiler and a GPU "
                f"Triton: install it, or use runtime='eager'"
            ) from error
        if shape != len(tokens):
            self._static.rewind(behind)
        self._static.length = behind
        return logits[0, : len(tokens)]

    def _graph(self) -> Callable[..., Tensor]:
        def read(ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
            where = {"position_ids": positions, "attention_mask": mask}
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **where).logits

        # torch counts graphs by code, and all models of a process would share this one's
        read.__code__ = read.__code__.replace()
        mode = "reduce-overhead" if self.model.device.type == "cuda" else None
        return torch.compile(read, fullgraph=True, dynamic=False, backend=self._backend, mode=mode)


class NativeText:
    """A text in the compiled steps of both models, on the CPU; keys and values are those of one session.

    The prompt is read by the model itself, since its activations choose the neurons, and once more by the program.

    Parameters
    ----------
    model, sparse
        As of :class:`EagerText`; `sparse` of the kind ``griffin``, whose layers are dense.

    Raises
    ------
    ModelError
        If there are no compiled kernels, the model is not on the CPU, or it has parts that the program does not know.
    """

    def __init__(self, model: Any, sparse: ContextualSparse):
        if model.device.type != "cpu":
            raise ModelError(
                f"runtime='native' is for the CPU, and the model is on {model.device}; use another runtime"
            )
        self.model, self.sparse = model, sparse
        self._full = DecodeProgram.of(model, _LEAST)
        self._sparse = self._full
        self._session: Session | None = None
        self.best: int | None = None

    def begin(self, ids: Tensor, cache: Any, room: int) -> None:
        """See :meth:`EagerText.begin`; the cache stays as it is."""
        needed = ids.shape[1] + room
        if self._full.context < needed:
            self._full = DecodeProgram.of(self.model, _rounded_up(needed), verify=False)
        with self.sparse.active():
            self._sparse = DecodeProgram.of(self.model, self._full.context, verify=False)
        self._session = self._full.session(needed)
        self._session.feed(ids[0])

    def end(self) -> None:
        """Nothing is to be done: the cache of the prompt holds the prompt."""

    @property
    def _text(self) -> Session:
        if self._session is None:
            raise ConfigurationError("there is no text yet; call begin() first")
        return self._session

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self._text.length

    def crop(self, length: int) -> None:
        """Forget what comes after so many tokens."""
        self._text.truncate(length)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Let the sparse model read inside of the context."""
        self._text.switch(self._sparse)
        try:
            yield
        finally:
            self._text.switch(self._full)

    def draft(self, token: int) -> Tensor:
        """Read one token; logits ``(1, vocabulary)``, valid until the next call."""
        logits = self._text.feed([token])[None]
        self.best = self._text.best
        return logits

    def check(self, tokens: list[int]) -> Tensor:
        """Read tokens at once; logits ``(tokens, vocabulary)``."""
        return self._text.feed(tokens, every=True)


Text = EagerText | CompiledText | NativeText


def _rounded_up(tokens: int) -> int:
    """The next power of two, so that a text of another length needs no other graph."""
    return max(_LEAST, 1 << (tokens - 1).bit_length())
