"""Indirect objects: "Then, Mary and John went to the store. John gave a drink to", and then "Mary".

A sentence is a frame with slots, each of one token, so that all prompts have the same length and every variable of the
task is known: who receives (``io``), who gives (``s``), which of them comes first (``order``), and two that do not
matter, the ``object`` and the ``place`` [Wang et al., 2022, arXiv 2211.00593].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.circuit_tasks import CircuitTask, single_tokens

Labels = Mapping[str, Tensor]
"""Variable → value of every prompt, ``(prompts,)`` int64."""

ATTRIBUTES = ("io", "s", "order", "object", "place")
FRAMES = (
    "Then, [first] and [second] went to the [place]. [subject] gave a [object] to",
    "When [first] and [second] got home from the [place], [subject] gave a [object] to",
    "Friends [first] and [second] met at the [place]. [subject] gave a [object] to",
    "While [first] and [second] were working at the [place], [subject] gave a [object] to",
)
NAMES = (
    "Michael Jessica Ashley Matthew Jennifer David James Robert John Joseph Andrew Ryan Jason Sarah William Brian "
    "Anthony Eric Elizabeth Adam Kevin Thomas Laura Richard Amy Mark Emily Charles Paul Scott Mary Lisa Anna Peter "
    "George Alice Henry Jane Kate Tom Sam Max Luke Ben Dan Jack"
)
PLACES = "store garden restaurant school hospital office house station"
OBJECTS = "ring book bone ball computer necklace drink snack"
_SLOTS = {"first", "second", "subject", "object", "place"}


@dataclass(frozen=True)
class NameLanguage:
    """Sentences about two people of whom one gives something to the other.

    Attributes
    ----------
    frame
        Tokens, and names of slots: ``first``, ``second`` and ``subject`` for people, ``object`` and ``place``.
    names, objects, places
        Tokens for the slots.
    """

    frame: tuple[int | str, ...]
    names: tuple[int, ...]
    objects: tuple[int, ...]
    places: tuple[int, ...]

    def __post_init__(self) -> None:
        slots = [part for part in self.frame if isinstance(part, str)]
        if set(slots) != _SLOTS or len(slots) != len(_SLOTS):
            raise ConfigurationError(
                f"the frame has slots {sorted(slots)}; each of {sorted(_SLOTS)} must be there once"
            )
        if len(self.names) < 3:
            raise ConfigurationError(f"{len(self.names)} names; a prompt and its twin need three")

    @classmethod
    def of(cls, tokenizer: Any, frame: str = FRAMES[0], names: int = 20) -> NameLanguage:
        """For a model, with the words that are single tokens of its tokenizer.

        Raises
        ------
        CalibrationError
            If there are not enough of them.
        """
        parts: list[int | str] = []
        for piece in frame.replace(" [", "[").split("["):
            slot, bracket, rest = piece.partition("]")
            if bracket:
                parts.append(slot)
            parts += tokenizer(rest if bracket else piece, add_special_tokens=False)["input_ids"]
        known = [list(single_tokens(tokenizer, words.split()).values()) for words in (NAMES, OBJECTS, PLACES)]
        if len(known[0]) < names or min(len(known[1]), len(known[2])) < 2:
            raise CalibrationError(
                f"{len(known[0])} names, {len(known[1])} objects and {len(known[2])} places are single tokens of this "
                f"tokenizer; {names}, 2 and 2 are needed"
            )
        return cls(tuple(parts), tuple(known[0][:names]), tuple(known[1]), tuple(known[2]))

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each variable has."""
        people = len(self.names)
        return {"io": people, "s": people, "order": 2, "object": len(self.objects), "place": len(self.places)}

    def position(self, slot: str) -> int:
        """Number of the token in a slot; ``end`` is the last token."""
        return len(self.frame) - 1 if slot == "end" else self.frame.index(slot)

    def sample(self, count: int, seed: int = 0, held_out: bool | None = None) -> dict[str, Tensor]:
        """Values of all variables, drawn evenly and independently; giver and receiver are different people.

        Parameters
        ----------
        count, seed
            Prompts, and what they are drawn from.
        held_out
            True for pairs of names that False never draws, about a fifth of all; None for any.
        """
        generator = generator_for("indirect objects", seed)
        people = torch.arange(len(self.names))
        pairs = torch.cartesian_prod(people, people)
        kept = pairs[:, 0] != pairs[:, 1]
        if held_out is not None:
            kept &= ((pairs[:, 0] + 2 * pairs[:, 1]) % 5 == 0) == held_out
        pairs = pairs[kept]
        io, s = pairs[torch.randint(len(pairs), (count,), generator=generator)].unbind(1)
        rest = {
            name: torch.randint(self.sizes[name], (count,), generator=generator)
            for name in ("order", "object", "place")
        }
        return {"io": io, "s": s, **rest}

    def render(self, labels: Labels, subject: Tensor | None = None) -> Tensor:
        """Token ids ``(prompts, length)``.

        Parameters
        ----------
        labels
            Of every variable.
        subject
            Numbers of other names in the place of the giver.
        """
        names = torch.tensor(self.names)
        io_first = labels["order"] == 0
        slots = {
            "first": names[torch.where(io_first, labels["io"], labels["s"])],
            "second": names[torch.where(io_first, labels["s"], labels["io"])],
            "subject": names[labels["s"] if subject is None else subject],
            "object": torch.tensor(self.objects)[labels["object"]],
            "place": torch.tensor(self.places)[labels["place"]],
        }
        count = len(labels["io"])
        columns = [slots[part] if isinstance(part, str) else torch.full((count,), part) for part in self.frame]
        return torch.stack(columns, 1)

    def answers(self, labels: Labels) -> tuple[Tensor, Tensor]:
        """The right and the wrong token, each ``(prompts, 1)``."""
        names = torch.tensor(self.names)
        return names[labels["io"]][:, None], names[labels["s"]][:, None]

    def task(self, labels: Labels, seed: int = 0) -> CircuitTask:
        """The prompts, and twins in which a third person gives: "Mary and John … Tom gave a drink to"."""
        io, s = labels["io"], labels["s"]
        people = len(self.names)
        drawn = torch.randint(people - 2, io.shape, generator=generator_for("third names", seed))
        low, high = torch.minimum(io, s), torch.maximum(io, s)
        third = drawn + (drawn >= low).long()
        third = third + (third >= high).long()
        right, wrong = self.answers(labels)
        return CircuitTask(list(self.render(labels)), list(self.render(labels, third)), right, wrong)


def changed(labels: Labels, sizes: Mapping[str, int], attribute: str, seed: int = 0) -> dict[str, Tensor]:
    """The same prompts with another value of one variable; no person gives to themselves.

    Raises
    ------
    ConfigurationError
        If there is no such variable.
    """
    if attribute not in labels:
        raise ConfigurationError(f"there is no attribute {attribute!r}; there are {sorted(labels)}")
    old = labels[attribute]
    taken = [old]
    if attribute in ("io", "s"):
        taken.append(labels["s" if attribute == "io" else "io"])
    blocked = torch.stack(taken, 1).sort(1).values
    drawn = torch.randint(sizes[attribute] - len(taken), old.shape, generator=generator_for(f"other {attribute}", seed))
    for column in blocked.unbind(1):
        drawn = drawn + (drawn >= column).long()
    return {**labels, attribute: drawn}


def indirect_object(
    tokenizer: Any, count: int, seed: int = 0, frames: Sequence[str] = FRAMES, names: int = 20
) -> CircuitTask:
    """Indirect objects in several frames, in equal parts.

    Parameters
    ----------
    tokenizer
        Of the model.
    count, seed
        Prompts, and what they are drawn from.
    frames
        Sentences with their slots in brackets.
    names
        People to choose from.
    """
    tasks = []
    for number, frame in enumerate(frames):
        language = NameLanguage.of(tokenizer, frame, names)
        share = count // len(frames) + (number < count % len(frames))
        if share:
            tasks.append(language.task(language.sample(share, seed * len(frames) + number), seed))
    positive, negative = (
        [prompt for task in tasks for prompt in getattr(task, side)] for side in ("positive", "negative")
    )
    right, wrong = (torch.cat([getattr(task, side) for task in tasks]) for side in ("right", "wrong"))
    return CircuitTask(positive, negative, right, wrong)
