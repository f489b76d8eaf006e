"""Probabilities of many endings of the same beginning, which a language model reads only once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure.windows import evaluation_mode, logits_of, model_device

Ids = Sequence[int]


def shared_beginning(sequences: Sequence[Ids]) -> int:
    """Number of tokens with which all sequences begin."""
    if not sequences:
        return 0
    first, last = min(sequences), max(sequences)  # all others lie between these in alphabetical order
    for place, (a, b) in enumerate(zip(first, last)):
        if a != b:
            return place
    return min(len(first), len(last))


class EndingReader:
    """Reads many endings of the same beginning with a causal language model of Hugging Face.

    What the last beginning has in common with the next one, such as instructions and worked examples, is not read
    again either.

    Parameters
    ----------
    model
        The model.
    batch
        Endings at a time.
    """

    def __init__(self, model: nn.Module, batch: int = 16):
        if batch < 1:
            raise ConfigurationError(f"batch is {batch}; it must be at least 1")
        self.model, self.batch = model, batch
        self._ids: list[int] = []
        self._cache: Any = None

    def losses(self, beginning: Ids, endings: Sequence[Ids]) -> list[Tensor]:
        """−log p of every token of every ending, in nats, given the beginning and the ending so far.

        Parameters
        ----------
        beginning
            Token ids, at least one.
        endings
            Token ids, at least one each.

        Returns
        -------
        list of Tensor
            ``(tokens,)`` float32 for each ending.
        """
        if not len(beginning):
            raise ConfigurationError("the beginning has no tokens; give at least one")
        _check(endings)
        losses: dict[int, Tensor] = {}
        # the last token of the beginning is read with each ending, for the sake of what it predicts
        rows = [[*beginning[-1:], *ending[:-1]] for ending in endings]
        for places, logits in self._read(beginning[:-1], rows):
            for row, place in enumerate(places):
                ids = torch.tensor(list(endings[place]), device=logits.device)
                log = logits[row, : len(ids)].float().log_softmax(-1)
                losses[place] = -log.gather(1, ids[:, None])[:, 0].cpu()
        return [losses[place] for place in range(len(endings))]

    def next_log_probabilities(self, sequences: Sequence[Ids], wanted: Ids | None = None) -> Tensor:
        """Logarithm of p of the token after each sequence, ``(sequences, wanted or vocabulary)`` float32.

        Parameters
        ----------
        sequences
            Token ids, at least one each; what all begin with is read once.
        wanted
            Tokens of interest. Default: all.
        """
        shared = max(min(shared_beginning(sequences), min(map(len, sequences), default=1) - 1), 0)
        found: dict[int, Tensor] = {}
        endings = [sequence[shared:] for sequence in sequences]
        for places, logits in self._read(sequences[0][:shared] if sequences else [], endings):
            for row, place in enumerate(places):
                log = logits[row, len(endings[place]) - 1].float().log_softmax(-1)
                found[place] = (log if wanted is None else log[list(wanted)]).cpu()
        return torch.stack([found[place] for place in range(len(sequences))])

    def _read(self, beginning: Ids, endings: Sequence[Ids]) -> Iterator[tuple[list[int], Tensor]]:
        """Places of some endings, and logits ``(endings, tokens, vocabulary)`` behind each of their tokens."""
        _check(endings)
        with evaluation_mode(self.model):
            self._remember(list(beginning))
            order = sorted(range(len(endings)), key=lambda place: len(endings[place]))  # little padding
            for first in range(0, len(order), self.batch):
                places = order[first : first + self.batch]
                ids, mask = _padded([endings[place] for place in places], len(beginning), model_device(self.model))
                options: dict[str, Any] = {"use_cache": False}
                if self._cache is not None:
                    own = copy.deepcopy(self._cache)
                    own.batch_repeat_interleave(len(places))
                    options = {"past_key_values": own, "use_cache": True}
                yield places, logits_of(self.model(input_ids=ids, attention_mask=mask, **options))

    def _remember(self, beginning: list[int]) -> None:
        """Have the cache hold the beginning and nothing else."""
        known, cache = self._kept(beginning)
        self._ids, self._cache = [], None  # until all is read, so that an interruption leaves nothing half read
        if known < len(beginning):
            ids = torch.tensor([beginning[known:]], device=model_device(self.model))
            read: Any = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(read, "past_key_values", None)
            if cache is None:
                raise ModelError(
                    f"{type(self.model).__name__} keeps no cache of what it has read; use a causal language model"
                )
        self._ids, self._cache = beginning, cache

    def _kept(self, beginning: list[int]) -> tuple[int, Any]:
        """How much of the beginning is known, and the cache of just that; models that cannot forget begin again."""
        known = shared_beginning([self._ids, beginning]) if self._cache is not None else 0
        if known == 0 or (known < len(self._ids) and not _cropped(self._cache, known)):
            return 0, None
        return known, self._cache


def _check(endings: Sequence[Ids]) -> None:
    if any(not len(ending) for ending in endings):
        raise ConfigurationError("an ending has no tokens; give at least one for each")


def _cropped(cache: Any, length: int) -> bool:
    try:
        cache.crop(length)
    except (AttributeError, NotImplementedError, ValueError):
        return False
    return int(cache.get_seq_length()) == length


def _padded(endings: Sequence[Ids], before: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``(endings, longest)``, padded behind, and the mask of everything, ``(endings, before + longest)``."""
    longest = max(map(len, endings))
    ids = torch.zeros(len(endings), longest, dtype=torch.int64, device=device)
    mask = torch.ones(len(endings), before + longest, dtype=torch.int64, device=device)
    for row, ending in enumerate(endings):
        ids[row, : len(ending)] = torch.tensor(list(ending), device=device)
        mask[row, before + len(ending) :] = 0
    return ids, mask
