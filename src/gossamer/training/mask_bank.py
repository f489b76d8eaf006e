"""Many masks for one model: what MaskLLM's frozen weights make possible.

A mask of N:M is one number below C(M, N) for every group, and numbers of that kind fill machine words almost without
loss: 24 of six values fit 64 bits. A task then costs 0.67 bits a weight at 2:4 where its own weights would cost 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import comb

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.masking import zeroed
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Pattern
from gossamer.errors import CheckpointError, ConfigurationError, PatternError, UnknownNameError
from gossamer.storage.combinations import masks_by_rank, rank_groups

_WORD = 2**64 - 1


def codes_per_word(n: int, m: int) -> int:
    """How many numbers below C(m, n) fit 64 bits: the largest k with C(m, n)^k < 2^64."""
    base, count, power = comb(m, n), 0, 1
    while base > 1 and power * base <= _WORD:
        power, count = power * base, count + 1
    return max(1, count)


def encode_mask(mask: Tensor, pattern: NM) -> Tensor:
    """Write a mask as numbers of its groups, in words to the base C(M, N).

    Parameters
    ----------
    mask
        Bool, exactly N of every M along ``pattern.dim``.
    pattern
        N of M, with C(M, N) at most 65,536.

    Returns
    -------
    Tensor
        int64, the bits of unsigned words; the first group is the lowest digit of the first word.

    Raises
    ------
    PatternError
        If the mask does not follow the pattern.
    """
    pattern.check_shape(tuple(mask.shape), "mask")
    groups = mask.movedim(pattern.dim, -1).reshape(-1, pattern.m)
    wrong = (groups.sum(1) != pattern.n).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise PatternError(
            f"the mask keeps {int(groups[first].sum())} of {pattern.m} in group {first}; {pattern} needs {pattern.n}"
        )
    codes = rank_groups(np.ascontiguousarray(groups.numpy()), pattern.n).astype(np.uint64)
    digits, base = codes_per_word(pattern.n, pattern.m), np.uint64(comb(pattern.m, pattern.n))
    padded = np.zeros((-(-len(codes) // digits), digits), np.uint64)
    padded.reshape(-1)[: len(codes)] = codes
    words = padded[:, -1].copy()
    for digit in range(digits - 2, -1, -1):
        words = words * base + padded[:, digit]
    return torch.from_numpy(words.view(np.int64))


def decode_mask(words: Tensor, pattern: NM, shape: torch.Size) -> Tensor:
    """Undo :func:`encode_mask`: a bool tensor of a shape.

    Raises
    ------
    CheckpointError
        If there are not exactly as many words as the shape needs.
    """
    digits, base = codes_per_word(pattern.n, pattern.m), np.uint64(comb(pattern.m, pattern.n))
    groups = shape.numel() // pattern.m
    if len(words) != -(-groups // digits):
        raise CheckpointError(
            f"{len(words)} words of mask for shape {tuple(shape)}, which needs {-(-groups // digits)}"
        )
    left = words.numpy().view(np.uint64).copy()
    codes = np.empty((len(left), digits), np.int64)
    for digit in range(digits):
        left, codes[:, digit] = np.divmod(left, base)
    table = masks_by_rank(pattern.n, pattern.m)
    if left.any():
        raise CheckpointError(f"a word holds more than {digits} choices of {len(table)} for {pattern}; it is damaged")
    moved = list(shape)
    moved.append(moved.pop(pattern.dim))
    mask = torch.from_numpy(table[codes.reshape(-1)[:groups]]).view(moved)
    return mask.movedim(-1, pattern.dim).contiguous()


class MaskBank(Mapping[str, MaskSet]):
    """Masks of several tasks for one model, at ``log₂ C(M, N)`` bits a group, rounded up to whole words.

    Fang et al., 2024, arXiv 2409.17481, section 3.4: one frozen model, one mask for each task.

    Parameters
    ----------
    pattern
        That all masks follow, along the dimension of the stored parameters.

    Examples
    --------
    >>> bank, layer = MaskBank("2:4"), nn.Linear(4, 1, bias=False)
    >>> bank.add("odd", MaskSet({"weight": torch.tensor([[True, False, True, False]])}))
    >>> with bank.active(layer, "odd"):
    ...     int((layer.weight != 0).sum())
    2
    """

    def __init__(self, pattern: Pattern | str = "2:4"):
        parsed = Pattern.parse(pattern)
        if not isinstance(parsed, NM):
            raise PatternError(f"pattern is {parsed}; a bank holds N:M masks such as 2:4")
        self.pattern = parsed
        self._tasks: dict[str, dict[str, tuple[Tensor, torch.Size]]] = {}

    def add(self, task: str, masks: MaskSet) -> None:
        """Take in the masks of a task.

        Raises
        ------
        PatternError
            If one does not follow the pattern.
        ConfigurationError
            If they cover other parameters than those of the tasks before.
        """
        covered = next(iter(self._tasks.values()), None)
        if covered is not None and {name: shape for name, (_, shape) in covered.items()} != masks.shapes:
            raise ConfigurationError(f"the masks of {task!r} cover other parameters than {next(iter(self._tasks))!r}")
        self._tasks[task] = {name: (encode_mask(masks[name], self.pattern), masks.shapes[name]) for name in masks}

    def __getitem__(self, task: str) -> MaskSet:
        if task not in self._tasks:
            raise UnknownNameError("task", task, self._tasks)
        parts = self._tasks[task]
        return MaskSet({name: decode_mask(words, self.pattern, shape) for name, (words, shape) in parts.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def nbytes(self) -> int:
        """Of all masks."""
        return sum(words.nbytes for parts in self._tasks.values() for words, _ in parts.values())

    @contextmanager
    def active(self, model: nn.Module, task: str) -> Iterator[None]:
        """Give a dense model the masks of a task while the block lasts; every weight then has its old bits again."""
        with zeroed(model, self[task]):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a safetensors file: ``task:parameter:words`` and ``…:shape``."""
        state: dict[str, Tensor] = {}
        for task, parts in self._tasks.items():
            for name, (words, shape) in parts.items():
                state[f"{task}:{name}:words"] = words
                state[f"{task}:{name}:shape"] = torch.tensor(shape, dtype=torch.int64)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], pattern: Pattern | str = "2:4") -> MaskBank:
        """Rebuild a bank.

        Raises
        ------
        CheckpointError
            If a part is missing or does not fit.
        """
        bank = cls(pattern)
        for key, words in state.items():
            name, _, part = key.rpartition(":")
            if part not in ("words", "shape") or not {f"{name}:words", f"{name}:shape"} <= state.keys():
                raise CheckpointError(
                    f"{key!r} is not a complete entry of a mask bank (words and shape are both needed)"
                )
            if part == "words":
                task, _, parameter = name.partition(":")
                shape = torch.Size(state[f"{name}:shape"].tolist())
                decode_mask(words, bank.pattern, shape)
                bank._tasks.setdefault(task, {})[parameter] = (words, shape)
        return bank
