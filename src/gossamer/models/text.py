"""Text for calibration and evaluation: bundled books, your own files, and token windows cut from them."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

BUNDLED_TEXTS = ("moby-dick", "state-of-the-union")


def read_text(source: str | os.PathLike[str]) -> str:
    """Return a bundled text, or the content of a file.

    Parameters
    ----------
    source
        ``"moby-dick"``, ``"state-of-the-union"``, a UTF-8 text file, or a ``.jsonl`` file whose objects have a
        field ``text`` (they are joined by blank lines).

    Raises
    ------
    UnknownNameError
        If it is neither a file nor a bundled text; suggests the nearest.
    CalibrationError
        If the file is missing, empty, or not text.
    """
    name = os.fspath(source)
    if name in BUNDLED_TEXTS:
        return resources.files("gossamer").joinpath("data", f"{name}.txt").read_text("utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        if path.exists() or path.suffix or path.name != name:
            raise CalibrationError(
                f"text {name!r} is not a file; give a .txt or .jsonl file, or one of: {', '.join(BUNDLED_TEXTS)}"
            )
        raise UnknownNameError("text", name, BUNDLED_TEXTS)
    text = _decode(path)
    if path.suffix == ".jsonl":
        text = _join_jsonl(path, text)
    if not text.strip():
        raise CalibrationError(f"{path} has no text in it; give a file with at least a few pages")
    return text


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if "\0" in text:
        raise CalibrationError(f"{path} is a binary file (byte {content.index(0)} is 0); give plain text")
    return text


def _join_jsonl(path: Path, lines: str) -> str:
    texts = []
    # not splitlines(): that also cuts at separators which JSON allows inside a string
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON ({error.msg}); give one object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise CalibrationError(f"{path} line {number} has no string field 'text'; name the field so")
        texts.append(record["text"])
    return "\n\n".join(texts)


def calibration_batches(
    text: str, tokenizer: Any, sequences: int = 16, length: int = 512, seed: int = 0
) -> list[Tensor]:
    """Cut random windows of equal length out of a text.

    The windows do not overlap if the text is long enough, and each begins and ends with the special tokens that
    the tokenizer puts around a text, such as the first token without which Gemma does not work.

    Parameters
    ----------
    text
        Plain text.
    tokenizer
        Of the model, from transformers.
    sequences
        Number of windows.
    length
        Tokens in each, special ones included.
    seed
        Of the choice of windows.

    Returns
    -------
    list of Tensor
        `sequences` tensors of shape (1, length), int64.

    Raises
    ------
    CalibrationError
        If the text is empty or has fewer tokens than one window needs.
    ConfigurationError
        If `sequences` is below 1, or `length` too small for a token besides the special ones.
    """
    before, after = special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if sequences < 1:
        raise ConfigurationError(f"sequences is {sequences}; it must be at least 1")
    if body < 1:
        raise ConfigurationError(f"length is {length}; it must be at least {length - body + 1} for this tokenizer")
    tokens = _tokens(text, tokenizer)
    if len(tokens) < body:
        raise CalibrationError(
            f"the text has {len(tokens)} tokens; {body} are needed for one window of length {length}; "
            "give a longer text or a smaller length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = _window_starts(len(tokens), body, sequences, generator)
    return [torch.cat([before, tokens[start : start + body], after])[None] for start in starts]


def _window_starts(tokens: int, body: int, sequences: int, generator: torch.Generator) -> list[int]:
    slots = tokens // body
    if slots < sequences:
        return torch.randint(tokens - body + 1, (sequences,), generator=generator).tolist()
    offset = int(torch.randint(tokens - slots * body + 1, (), generator=generator))
    return [offset + body * slot for slot in torch.randperm(slots, generator=generator)[:sequences].tolist()]


def evaluation_tokens(text: str, tokenizer: Any, limit: int | None = None) -> Tensor:
    """Return the tokens of a text in order, with the tokenizer's special tokens around them.

    Parameters
    ----------
    text
        Plain text.
    tokenizer
        Of the model, from transformers.
    limit
        Most tokens to return, special ones included. Default: all.

    Returns
    -------
    Tensor
        Shape (1, n), int64, with n ≥ 2.

    Raises
    ------
    CalibrationError
        If the text is empty or has fewer than two tokens.
    ConfigurationError
        If `limit` is below 2 or leaves no room for a token besides the special ones.
    """
    before, after = special_tokens(tokenizer)
    least = max(2, len(before) + len(after) + 1)
    if limit is not None and limit < least:
        raise ConfigurationError(f"limit is {limit}; it must be at least {least} for this tokenizer")
    tokens = _tokens(text, tokenizer)
    if limit is not None:
        tokens = tokens[: limit - len(before) - len(after)]
    tokens = torch.cat([before, tokens, after])
    if len(tokens) < least:
        raise CalibrationError(f"the text gives {len(tokens)} tokens; at least {least} are needed, give a longer text")
    return tokens[None]


def special_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens that a tokenizer puts before and after a text.

    Returns
    -------
    (Tensor, Tensor)
        Ids before and after, int64, often empty.
    """
    # asked of the tokenizer's behaviour, because its settings (add_bos_token, post-processor) differ from kind to kind
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(alone) + 1):
        if framed[start : start + len(alone)] == alone:
            before, after = framed[:start], framed[start + len(alone) :]
            return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)
    raise CalibrationError(f"{type(tokenizer).__name__} changes a text's own tokens when it adds special ones")


def _tokens(text: str, tokenizer: Any) -> Tensor:
    if not text.strip():
        raise CalibrationError("the text is empty; give a file with at least a few pages, or 'moby-dick'")
    # verbose: a text longer than the model's window is meant here
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
