"""Words that tasks are made of, and a tokenizer with a word for a token, for models too small for prose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


THINGS = _listed(
    """
    anchor apple arrow banner barrel basket bell boat bottle bowl box bridge broom brush bucket button cable
    candle canvas carpet chain chair chest clock coat coin compass crown cup curtain diary door drum feather
    fiddle flag flute fork globe glove hammer harp hat helmet horn jar kettle key kite knife ladder lamp lantern
    lens letter lock map mask mirror necklace needle
    """
)
ADJECTIVES = _listed(
    """
    amber ancient bitter bold brave bright broken calm clever cold copper crimson curious dark distant dusty
    early faded fierce gentle golden green hollow humble icy ivory jolly little lonely lucky marble mellow
    """
)
PLACES = _listed(
    """
    Aldermoor Brackwater Cinderholm Dunmere Elderfen Fallowby Glasswick Harrowgate Inverlyn Juniper-Cross
    Kettlewell Larkspur Mossgate Northolme Oakhurst Pebblecombe Quillbury Ravenscar Saltmarsh Thornbury
    Umberleigh Valewood Westerby Yarrowdale Ashcombe Birchfield Coldstream Dovetail Eastmere Foxglove Greywater
    Highcliff
    """
)
PEOPLE = _listed(
    """
    Adela Barnaby Cordelia Dorian Edith Florian Greta Harriet Ivor Josephine Kaspar Leonora Magnus Nerissa
    Oswald Petra Quentin Rosalind Silas Theodora Ulric Viola Wilhelm Xenia Yorick Zelda Ansel Beatrix Clement
    Daphne Emeric Felicia
    """
)
SMALL_WORDS = ("the", "of", "and", "to", "in", "that", "it", "was", "his", "he", "but", "with", "as", "for", "on", "at")
MARKERS = ("<pad>", "<end>", "<unknown>", "?", ";", "chapter", "went", "met", "bought", "common", "before", "empty")
CHAPTERS = 64


class WordTokenizer:
    """One token for every word of a list; words are separated by spaces.

    Has of transformers' tokenizers what evaluation needs: calling, ``decode``, ``eos_token_id``, ``vocab_size``.

    Parameters
    ----------
    words
        The vocabulary, without repetition; the first three are padding, end and unknown.
    """

    chat_template = None

    def __init__(self, words: Sequence[str]):
        if len(set(words)) != len(words) or len(words) < 4:
            raise ConfigurationError(f"{len(words)} words, {len(set(words))} of them different; give each word once")
        self.words = tuple(words)
        self.pad_token_id, self.eos_token_id, self._unknown = range(3)
        self._ids = {word: index for index, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self.words)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Ids of the words of a text, under ``input_ids``."""
        return {"input_ids": [self._ids.get(word, self._unknown) for word in text.split()]}

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = False, **options: Any) -> str:
        """Words of ids, with a space between them."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        left_out = (self.pad_token_id, self.eos_token_id) if skip_special_tokens else ()
        return " ".join(self.words[number] for number in numbers if number not in left_out)


def small_vocabulary() -> WordTokenizer:
    """The tokenizer in which the terse wording of every task takes one token a word."""
    numbers = [f"n{number}" for number in range(CHAPTERS)]
    places, people = [place.lower() for place in PLACES], [person.lower() for person in PEOPLE]
    return WordTokenizer([*MARKERS, *SMALL_WORDS, *THINGS, *places, *people, *numbers])


def normalised(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation and articles."""
    return [word for word in re.findall(r"[\w\-']+", text.lower()) if word not in ("a", "an", "the")]


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a piece of text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_of(samples: Sequence[Sequence[int]]) -> Tensor:
    """Equally long prompts as one tensor ``(samples, tokens)``."""
    return torch.tensor([list(ids) for ids in samples], dtype=torch.int64)
