"""Any server that speaks the chat protocol of OpenAI: a service, vLLM, llama.cpp, Ollama, and many more."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gossamer.errors import ConfigurationError, ModelError
from gossamer.features.autointerp.clients import Client, Conversation

_AGAIN = (408, 409, 425, 429)  # of the errors that are the asker's, those that may pass
_LOCAL = ("localhost", "127.0.0.1", "::1")
_LONGEST_WAIT = 60.0


class HTTPClient(Client):
    """Asks a server at ``URL/chat/completions``, several conversations at a time.

    What can pass (no answer in time, an overloaded server, an answer that is no answer) is tried again, later each
    time; what then still fails is an abstention. What cannot pass (a wrong key, an unknown model, no server) is an
    error at once, or after the last try.

    Parameters
    ----------
    url
        Such as ``http://localhost:8000/v1``.
    model
        As the server knows it.
    api_key
        Default: what the environment variable ``OPENAI_API_KEY`` says, if anything.
    timeout
        Seconds that an answer may take.
    retries
        Further tries.
    wait
        Seconds before the first of them; doubled each time, unless the server says how long.
    workers
        Conversations at a time.

    Raises
    ------
    ConfigurationError
        If the URL is none of HTTP, or a number is out of range.

    Examples
    --------
    >>> client = HTTPClient("http://localhost:8000/v1", "llama-3.1-70b")  # doctest: +SKIP
    >>> client.complete([[{"role": "user", "content": "Say yes."}]])  # doctest: +SKIP
    ['Yes.']
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        workers: int = 8,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"url is {url!r}; give that of a server, such as http://localhost:8000/v1")
        if not timeout > 0 or retries < 0 or wait < 0 or workers < 1:
            raise ConfigurationError(
                f"timeout is {timeout}, retries {retries}, wait {wait} and workers {workers}; "
                "give a timeout above 0, at least one worker, and nothing negative"
            )
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self.wait, self.workers = wait, workers
        self._key = api_key or os.environ.get("OPENAI_API_KEY")
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def name(self) -> str:  # noqa: D102
        return f"{self.url} {self.model}"

    def complete(  # noqa: D102
        self, conversations: Sequence[Conversation], max_tokens: int = 200, temperature: float = 0.0, seed: int = 0
    ) -> list[str | None]:
        settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return self._all(conversations, settings, _text)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[list[float] | None]:
        """Probabilities as the server reports them; of one that reports none, 1 for the option it says."""
        settings = {"max_tokens": 8, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        return self._all(conversations, settings, lambda answer: _probabilities(answer, options))

    def _all(
        self, conversations: Sequence[Conversation], settings: dict[str, Any], read: Callable[[Any], Any]
    ) -> list[Any]:
        def one(conversation: Conversation) -> Any:
            body = {"model": self.model, "messages": [dict(message) for message in conversation], **settings}
            return self._persistently(json.dumps(body).encode(), read)

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(one, conversations))

    def _persistently(self, body: bytes, read: Callable[[Any], Any]) -> Any:
        unreachable: Exception | None = None
        for attempt in range(self.retries + 1):
            wait = self.wait * 2**attempt * random.uniform(0.75, 1.25)
            try:
                found = read(json.loads(self._post(body)))
                unreachable = None
                if found is not None:
                    return found
            except urllib.error.HTTPError as error:
                unreachable = None
                wait = _wanted_wait(error) or wait
                if error.code < 500 and error.code not in _AGAIN:
                    raise ModelError(f"{self.url} refuses to answer ({error.code}: {_said(error)})") from None
            except urllib.error.URLError as error:
                unreachable = None if isinstance(error.reason, TimeoutError) else error
            except (TimeoutError, ConnectionError, http.client.HTTPException, ValueError):
                unreachable = None
            if attempt < self.retries:
                time.sleep(min(wait, _LONGEST_WAIT))
        if unreachable is not None:
            raise ModelError(f"{self.url} cannot be reached ({unreachable}); start the server, or correct the URL")
        return None

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "gossamer"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            found: bytes = response.read()
            return found


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    text = error.read(2000).decode("utf-8", "replace")
    try:
        said = json.loads(text)["error"]
        text = said["message"] if isinstance(said, dict) else str(said)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300] or error.reason


def _wanted_wait(error: urllib.error.HTTPError) -> float | None:
    said = error.headers.get("Retry-After", "")
    return float(said) if re.fullmatch(r"\d+(\.\d+)?", said) else None


def _choice(answer: Any) -> dict[str, Any]:
    """The first choice; nothing if the answer has another form."""
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        return {}
    return choice if isinstance(choice, dict) else {}


def _text(answer: Any) -> str | None:
    message = _choice(answer).get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) and content.strip() else None


def _probabilities(answer: Any, options: Sequence[str]) -> list[float] | None:
    reported = _choice(answer).get("logprobs")
    tokens = reported.get("content") if isinstance(reported, dict) else None
    for token in tokens if isinstance(tokens, list) else []:
        try:
            likely = [(str(top["token"]).strip(), float(top["logprob"])) for top in token["top_logprobs"]]
            said = str(token["token"]).strip()
        except (KeyError, TypeError, ValueError):
            break
        if said in options:
            found = [sum(math.exp(p) for text, p in likely if text == option) for option in options]
            return [p / sum(found) for p in found] if sum(found) > 0 else None
    text = _text(answer)
    found_at = re.search("|".join(rf"(?<!\w){re.escape(option)}(?!\w)" for option in options), text or "")
    return [float(option == found_at[0]) for option in options] if found_at else None
