"""Files and directories that appear whole or not at all.

Everything is written to a temporary sibling, forced to the disk, and then renamed into place. Whatever goes wrong in
between, including Ctrl-C, the target is as it was before and the sibling is gone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gossamer.errors import OutputError

PathLike = str | os.PathLike[str]

# an operating system's error number where a library written in another language reports it only in words
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: PathLike, needed: int | None = None) -> Iterator[Path]:
    """Write a file that appears whole or not at all; an existing file is replaced.

    Parameters
    ----------
    path
        Where the file shall be. A symbolic link keeps pointing to where it does.
    needed
        Bytes that will be written, if known: too small a disk is then refused at once.

    Yields
    ------
    Path
        Temporary path beside the target. Write there and close it.

    Raises
    ------
    OutputError
        If the parent directory is missing or not writable, the target is a directory, or the disk is full.

    Examples
    --------
    >>> with atomic_file("result.txt") as part:
    ...     part.write_text("done")
    """
    target = _resolve(path)
    if target.is_dir():
        raise OutputError(f"{target} is a directory; give the name of a file in it")
    _check_parent(target, needed)
    temporary = _sibling(target, "partial")
    try:
        with _reporting(target, needed):
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: PathLike, overwrite: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Fill a directory that appears whole or not at all.

    Parameters
    ----------
    path
        Where the directory shall be.
    overwrite
        Whether a directory that has something in it may be replaced. Its old content is then gone altogether,
        not merged.
    needed
        Bytes that will be written, if known: too small a disk is then refused at once.

    Yields
    ------
    Path
        An empty temporary directory beside the target. Write there and close what you opened.

    Raises
    ------
    OutputError
        If the target has content and `overwrite` is false, is not a directory, or contains the working
        directory; if the parent is missing or not writable; or if the disk is full.
    """
    target = _resolve(path)
    _check_target_directory(target, overwrite)
    _check_parent(target, needed)
    temporary = _sibling(target, "partial")
    try:
        with _reporting(target, needed):
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            _replace_directory(temporary, target, overwrite)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises
    ------
    OutputError
        As :func:`atomic_file`.
    """
    data = text.encode()
    with atomic_file(path, needed=len(data)) as part:
        part.write_bytes(data)


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline.

    Raises
    ------
    OutputError
        As :func:`atomic_file`; also if `value` holds NaN, infinity or an object that JSON does not have.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be written as JSON ({error}); use null for values that are not finite"
        ) from None
    write_text(path, text + "\n")


def _resolve(path: PathLike) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{os.fspath(path)!r} is no usable path ({error}); choose another output path") from None


def _check_parent(target: Path, needed: int | None) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(f"{target} cannot be written: its parent directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target} cannot be written: no permission to write in {parent}; choose another output path")
    if needed is not None and needed > (free := shutil.disk_usage(parent).free):
        raise OutputError(_full(target, needed, free))


def _check_target_directory(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file, not a directory; choose another output directory")
    try:
        used = any(target.iterdir())
    except PermissionError:
        raise OutputError(f"{target} exists and cannot be read; choose another output directory") from None
    if used and not overwrite:
        raise OutputError(f"{target} is in use (not empty); choose another output directory or allow overwriting it")
    if target == Path.home() or Path.cwd().is_relative_to(target) or target.is_mount():
        raise OutputError(f"{target} is a home, working or mounted directory and is not replaced; choose one inside it")


def _replace_directory(temporary: Path, target: Path, overwrite: bool) -> None:
    """Put a finished directory in the place of none, an empty one, or a full one (for which no single call exists)."""
    try:
        os.replace(temporary, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM) or not target.is_dir():
            raise
    if not overwrite:
        raise OutputError(f"{target} was filled by someone else meanwhile; choose another output directory")
    old = _sibling(target, "old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    # long names are cut, since a name may have 255 bytes at most
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.{suffix}")


def _sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(directory)


@contextmanager
def _reporting(target: Path, needed: int | None) -> Iterator[None]:
    """Turn what the operating system refuses into an OutputError; leave every other exception alone."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        code = _error_number(error)
        if code in _FULL:
            free = None
            with suppress(OSError):
                free = shutil.disk_usage(target.parent).free
            raise OutputError(_full(target, needed, free)) from error
        # an error about some other file, which the caller happens to read meanwhile, is not about this output
        if isinstance(error, OSError) and code in (errno.EACCES, errno.EPERM, errno.EROFS) and _concerns(error, target):
            raise OutputError(f"{target} cannot be written: {error.strerror}; choose another output path") from error
        raise


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _concerns(error: OSError, target: Path) -> bool:
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(target.parent)


def _full(target: Path, needed: int | None, free: int | None) -> str:
    numbers = [
        f"{needed:,} bytes are needed" if needed is not None else "",
        f"{free:,} are free" if free is not None else "",
    ]
    known = ", ".join(part for part in numbers if part)
    return (
        f"{target} cannot be written: the disk is full{f' ({known})' if known else ''}; "
        f"free some space or choose another output path"
    )
