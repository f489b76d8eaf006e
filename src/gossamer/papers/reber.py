"""Strings of the Reber grammar, and others that look like them: data for recurrent networks, exact by construction.

Reber, 1967, "Implicit learning of artificial grammars". A walk through seven states writes a symbol at each step, from
B to E. A string is valid if some walk writes it. Invalid strings are of two kinds: random symbols between B and E,
which are easy to tell, and near misses, in which one symbol of a valid string is replaced by one that the state before
it does not allow. All kinds have the lengths of valid strings, so that length tells nothing, and no string occurs
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from random import Random

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

#: state → symbol → next state; the walk begins at 0 and is complete at :data:`END`
AUTOMATON: dict[int, dict[str, int]] = {
    0: {"B": 1},
    1: {"T": 2, "P": 3},
    2: {"S": 2, "X": 4},
    3: {"T": 3, "V": 5},
    4: {"X": 3, "S": 6},
    5: {"P": 4, "V": 6},
    6: {"E": 7},
}
END = 7
INSIDE = "TPSXV"  # what may stand between B and E
VOCABULARY = 128  # ASCII; 0 is padding
SHORTEST = 5  # symbols: BTXSE and BPVVE
_ATTEMPTS = 1000


def is_valid(string: str) -> bool:
    """Whether a walk from the first to the last state writes exactly this string."""
    state = 0
    for symbol in string:
        following = AUTOMATON.get(state, {}).get(symbol)
        if following is None:
            return False
        state = following
    return state == END


@cache
def count_valid(length: int, state: int = 0) -> int:
    """How many walks of `length` steps lead from a state to the end."""
    if length == 0:
        return int(state == END)
    return sum(count_valid(length - 1, following) for following in AUTOMATON.get(state, {}).values())


def valid_string(length: int, generator: Random) -> str:
    """One of all valid strings of a length, each with the same probability.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    if not count_valid(length):
        raise ConfigurationError(f"no string of the grammar has {length} symbols; the shortest have {SHORTEST}")
    state, symbols = 0, []
    for left in range(length - 1, -1, -1):
        steps = AUTOMATON[state]
        walks = [count_valid(left, following) for following in steps.values()]
        (symbol,) = generator.choices(tuple(steps), walks)
        symbols.append(symbol)
        state = steps[symbol]
    return "".join(symbols)


def near_miss(string: str, generator: Random) -> str:
    """A valid string with one symbol between B and E replaced by one that is not allowed there."""
    place = generator.randrange(1, len(string) - 1)
    state = 0
    for symbol in string[:place]:
        state = AUTOMATON[state][symbol]
    wrong = [symbol for symbol in INSIDE if symbol not in AUTOMATON[state]]
    return string[:place] + generator.choice(wrong) + string[place + 1 :]


def random_string(length: int, generator: Random) -> str:
    """B, random symbols, E."""
    return "B" + "".join(generator.choices(INSIDE, k=length - 2)) + "E"


@dataclass(frozen=True)
class ReberStrings:
    """Strings, coded for a network, and whether they are valid.

    Attributes
    ----------
    strings
        As text.
    tokens
        ASCII codes, padded with 0, ``(n, longest)`` int64.
    lengths
        Symbols before the padding, ``(n,)`` int64.
    labels
        1 where valid, ``(n,)`` int64.
    """

    strings: tuple[str, ...]
    tokens: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.strings)

    def split(self, training: int) -> tuple[ReberStrings, ReberStrings]:
        """The first strings, and the rest.

        Raises
        ------
        ConfigurationError
            If one of the parts would be empty.
        """
        if not 0 < training < len(self):
            raise ConfigurationError(f"training is {training}; of {len(self)} strings some must be left on both sides")
        return self._part(slice(training)), self._part(slice(training, None))

    def _part(self, part: slice) -> ReberStrings:
        return ReberStrings(self.strings[part], self.tokens[part], self.lengths[part], self.labels[part])


def reber_dataset(
    n: int,
    p_valid: float = 0.5,
    near_misses: float = 0.5,
    seed: int = 0,
    lengths: tuple[int, int] = (10, 50),
) -> ReberStrings:
    """Different strings in random order, of which an exact number is valid.

    Parameters
    ----------
    n
        How many.
    p_valid
        Share of valid ones in [0, 1], rounded to whole strings.
    near_misses
        Share of near misses among the invalid ones, in [0, 1]; the others are random.
    seed
        Of everything.
    lengths
        Shortest and longest string, in symbols, B and E included. At most half of the valid strings of a length are
        taken.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range, or the grammar has too few strings of these lengths.
    """
    shortest, longest = lengths
    if n < 1 or not SHORTEST <= shortest <= longest:
        raise ConfigurationError(f"n is {n} and lengths {lengths}; n >= 1 and {SHORTEST} <= shortest <= longest")
    for name, share in (("p_valid", p_valid), ("near_misses", near_misses)):
        if not 0 <= share <= 1:
            raise ConfigurationError(f"{name} is {share}; it must be a share in [0, 1]")
    generator = Random(seed)

    valid = round(n * p_valid)
    missed = round((n - valid) * near_misses)
    sizes = _lengths(valid or n, range(shortest, longest + 1), generator)
    others = (sizes * -(-n // len(sizes)))[: n - valid]
    generator.shuffle(others)
    seen: set[str] = set()
    for size in sizes[:valid]:
        _add(seen, True, partial(valid_string, size, generator))
    for size in others[:missed]:
        _add(seen, False, partial(_near_miss_of, size, generator))
    for size in others[missed:]:
        _add(seen, False, partial(random_string, size, generator))
    strings = sorted(seen)  # a set has no order that a seed could fix
    generator.shuffle(strings)
    return encode(strings)


def _lengths(number: int, allowed: range, generator: Random) -> list[int]:
    """Lengths of `number` valid strings, uniform, but at most half of the strings that a length has."""
    room = {size: (count_valid(size) + 1) // 2 for size in allowed}
    if sum(room.values()) < number:
        raise ConfigurationError(
            f"{number} valid strings of {allowed[0]} to {allowed[-1]} symbols are asked for, and half of those that "
            f"the grammar has are {sum(room.values())}; ask for fewer, or longer ones"
        )
    found: list[int] = []
    while len(found) < number:
        open_ = [size for size, left in room.items() if left]
        size = generator.choice(open_)
        room[size] -= 1
        found.append(size)
    return found


def _near_miss_of(length: int, generator: Random) -> str:
    return near_miss(valid_string(length, generator), generator)


def _add(seen: set[str], valid: bool, draw: Callable[[], str]) -> None:
    """Add a string that is not there yet; a random one that happens to be valid does not count as invalid."""
    for _ in range(_ATTEMPTS):
        string = draw()
        if string not in seen and is_valid(string) == valid:
            seen.add(string)
            return
    raise ConfigurationError(f"no further string of {len(string)} symbols was found; ask for fewer, or longer ones")


def encode(strings: list[str]) -> ReberStrings:
    """Code strings as numbers, with the labels that the automaton gives them."""
    lengths = torch.tensor([len(string) for string in strings])
    tokens = torch.zeros(len(strings), int(lengths.max()), dtype=torch.int64)
    for row, string in enumerate(strings):
        tokens[row, : len(string)] = torch.tensor(list(string.encode("ascii")))
    labels = torch.tensor([int(is_valid(string)) for string in strings])
    return ReberStrings(tuple(strings), tokens, lengths, labels)
