"""Who is asked: a server, a model in this process, or answers that were given before.

A client gets many conversations at once and is free to answer them together. Where it has no usable answer it says
None, which counts as an abstention and never as a no.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gossamer.errors import CheckpointError, OutputError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": …}``."""
Conversation = Sequence[Message]
_Reply = TypeVar("_Reply")


class Client(ABC):
    """Answers conversations."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Which model answers; answers of different names are kept apart."""

    @abstractmethod
    def complete(
        self, conversations: Sequence[Conversation], max_tokens: int = 200, temperature: float = 0.0, seed: int = 0
    ) -> list[str | None]:
        """The next message of each conversation.

        Parameters
        ----------
        conversations
            What has been said.
        max_tokens
            Length of an answer, at most.
        temperature
            0 is the likeliest answer.
        seed
            Of the draw, where the temperature is above 0.
        """

    @abstractmethod
    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[list[float] | None]:
        """Probability of each option as the next message, which add up to 1, for every conversation.

        Parameters
        ----------
        conversations
            What has been said.
        options
            Short answers that begin differently, such as ``("0", "1")``.
        """


class ReplayClient(Client):
    """Never asks twice: keeps every answer of another client in a file and gives it again.

    The file is appended to after every answer, so that work which was interrupted goes on where it was. Abstentions
    are not kept; they are asked again.

    Parameters
    ----------
    client
        Who is asked what has not been answered yet. None only replays, and abstains where there is no answer.
    path
        A file of JSON lines; is created.
    chunk
        Conversations that are asked together and kept together.

    Attributes
    ----------
    asked, replayed
        How many answers came from the client, and from the file.
    """

    def __init__(self, client: Client | None, path: Path | str, name: str | None = None, chunk: int = 16):
        self.client, self.path, self.chunk = client, Path(path), chunk
        self._name = name or (client.name if client else "")
        self.asked = self.replayed = 0
        self._lock = threading.Lock()
        self._known = _read_lines(self.path)

    @property
    def name(self) -> str:  # noqa: D102
        return self._name

    def complete(  # noqa: D102
        self, conversations: Sequence[Conversation], max_tokens: int = 200, temperature: float = 0.0, seed: int = 0
    ) -> list[str | None]:
        settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed if temperature else 0}

        def ask(client: Client, part: Sequence[Conversation]) -> Sequence[str | None]:
            return client.complete(part, max_tokens, temperature, seed)

        return self._answers("complete", conversations, settings, ask)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[list[float] | None]:  # noqa: D102
        def ask(client: Client, part: Sequence[Conversation]) -> Sequence[list[float] | None]:
            return client.choose(part, options)

        return self._answers("choose", conversations, {"options": list(options)}, ask)

    def _answers(
        self,
        kind: str,
        conversations: Sequence[Conversation],
        settings: dict[str, Any],
        ask: Callable[[Client, Sequence[Conversation]], Sequence[_Reply | None]],
    ) -> list[_Reply | None]:
        keys = [_key(self.name, kind, conversation, settings) for conversation in conversations]
        first_of = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = sorted(place for key, place in first_of.items() if key not in self._known)
        self.replayed += len(keys) - len(missing)
        if self.client is not None:
            for first in range(0, len(missing), self.chunk):
                places = missing[first : first + self.chunk]
                replies = ask(self.client, [conversations[place] for place in places])
                self.asked += len(places)
                self._keep({keys[place]: reply for place, reply in zip(places, replies) if reply is not None})
        return [self._known.get(key) for key in keys]

    def _keep(self, replies: dict[str, Any]) -> None:
        with self._lock:
            _append_lines(self.path, replies)
            self._known.update(replies)


def _key(name: str, kind: str, conversation: Conversation, settings: dict[str, Any]) -> str:
    asked = [name, kind, [dict(message) for message in conversation], settings]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _read_lines(path: Path) -> dict[str, Any]:
    """Answers by key; what an interrupted run left of a last line is cut off."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror}); choose another file") from None
    whole = content[: content.rfind(b"\n") + 1]
    known: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            said = json.loads(line)
            known[said["key"]] = said["reply"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} line {number} is no stored answer ({error}); delete the line") from None
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return known


def _append_lines(path: Path, replies: dict[str, Any]) -> None:
    lines = [json.dumps({"key": key, "reply": reply}, ensure_ascii=False) for key, reply in replies.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another file") from None
