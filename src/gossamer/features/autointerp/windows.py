"""Stretches of text with a latent's activations: what explainers and judges get to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from gossamer.errors import ConfigurationError

Kind = Literal["active", "random", "neighbour", "similar"]
OPEN, CLOSE = "<<", ">>"
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet


@dataclass(frozen=True, eq=False)
class Window:
    """Some consecutive tokens of a document.

    Attributes
    ----------
    tokens
        Ids, ``(n,)``.
    pieces
        The text of each token; together they are the text of the window.
    values
        Activations of the latent, ``(n,)`` float32, 0 where it is silent.
    document, start
        Where the window lies.
    kind
        ``active``, or how an inactive window was found: at ``random``, where a ``neighbour`` of the latent is active,
        or because its text is ``similar`` to that of active windows.
    quantile
        Of an active window's strongest activation among the windows at hand: 1 is weakest. 0 if inactive.
    decoy
        Activations of the neighbour for whose sake the window was chosen, ``(n,)``.
    distance
        How close that neighbour, or the most similar active window, is: the Jaccard index or a cosine.
    """

    tokens: np.ndarray
    pieces: tuple[str, ...]
    values: np.ndarray
    document: int
    start: int
    kind: Kind = "active"
    quantile: int = 0
    decoy: np.ndarray | None = field(default=None, repr=False)
    distance: float | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.pieces) == len(self.values):
            lengths = (len(self.tokens), len(self.pieces), len(self.values))
            raise ConfigurationError(f"tokens, pieces and values have lengths {lengths}; a window needs one of each")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        """What one reads."""
        return "".join(self.pieces)

    @property
    def active(self) -> bool:
        """Whether the latent is active anywhere."""
        return bool((self.values > 0).any())

    @property
    def peak(self) -> float:
        """The strongest activation."""
        return float(self.values.max(initial=0.0))

    def marks(self, threshold: float = 0.3) -> np.ndarray:
        """Tokens whose activation is more than this share of the window's strongest, bool ``(n,)``."""
        return (self.values > 0) & (self.values >= threshold * self.peak)

    def strengths(self, maximum: float) -> np.ndarray:
        """Activations on a scale from 0 to 10: ``⌈10 · a / maximum⌉``, int ``(n,)``."""
        if not maximum > 0:
            raise ConfigurationError(f"maximum is {maximum}; give the strongest activation of the latent")
        # so that rounding does not lift the maximum itself above 10
        return np.clip(np.ceil(10 * self.values.astype(np.float64) / maximum - 1e-9), 0, 10).astype(int)

    def highlighted(self, marks: Sequence[bool] | np.ndarray) -> str:
        """The text with every run of marked tokens between ``<<`` and ``>>``."""
        if len(marks) != len(self):
            raise ConfigurationError(f"{len(marks)} marks for {len(self)} tokens; give one for each")
        parts: list[str] = []
        inside = False
        for piece, marked in zip(self.pieces, marks):
            if bool(marked) != inside:
                parts.append(CLOSE if inside else OPEN)
                inside = not inside
            parts.append(piece)
        return "".join([*parts, CLOSE] if inside else parts)


def token_pieces(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """The text that each token adds to the text of those before it.

    A character may be spread over several tokens; it then belongs to the last of them and the others are empty, so
    that the pieces always add up to the text.

    Parameters
    ----------
    tokenizer
        Of Hugging Face.
    tokens
        Ids, ``(n,)``.
    """
    ids = [int(token) for token in tokens]
    alone = _pieces_alone(tokenizer, ids)
    # most tokens read the same alone and in a text, and are then looked up instead of decoded
    if "".join(alone) == _decoded(tokenizer, ids) and not any(_UNFINISHED in piece for piece in alone):
        return tuple(alone)
    pieces: list[str] = []
    done = 0
    for end in range(1, len(ids) + 1):
        text = _decoded(tokenizer, ids[:end])
        whole = len(text) if end == len(ids) else len(text.rstrip(_UNFINISHED))
        whole = max(whole, done)
        pieces.append(text[done:whole])
        done = whole
    return tuple(pieces)


_known: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


def _pieces_alone(tokenizer: Any, ids: list[int]) -> list[str]:
    known = _known.setdefault(tokenizer, {})
    for token in set(ids) - known.keys():
        known[token] = _decoded(tokenizer, [token])
    return [known[token] for token in ids]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=False))
