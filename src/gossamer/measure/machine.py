"""What a result was measured on, without anything that says whose machine it was."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import gossamer

# The instruction sets for which kernels exist or would pay; /proc/cpuinfo lists more than a hundred flags.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
ARM_FLAGS = ("asimd", "asimddp", "sve", "sve2", "bf16", "i8mm")


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, accelerator, operating system and versions of the libraries that matter.

    Returns
    -------
    dict
        Plain values, ready for JSON: ``cpu``, ``cores`` (physical), ``threads`` (logical, usable by this
        process), ``memory_gib``, ``flags`` (the instruction sets of interest that are present), ``gpu``
        (names), ``os``, ``python``, ``torch``, ``transformers``, ``gossamer``, ``torch_threads``. No host or
        user names and no paths.
    """
    cpu, flags = _processor()
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": _usable_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "flags": [flag for flag in (*FLAGS, *ARM_FLAGS) if flag in flags],
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": _operating_system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "gossamer": gossamer.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> tuple[str, frozenset[str]]:
    """Return the model name of the processor and its flags."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass
    flags = fields.get("flags") or fields.get("features") or ""
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(flags.split())


def _usable_threads() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _operating_system() -> str:
    """Return the distribution and its version; kernel releases carry the names of those who build them."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.mac_ver()[0]}".strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
