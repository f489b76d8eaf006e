"""The compiled kernels, if they are there, and which of them are in use."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from gossamer.errors import ConfigurationError

#: number by which the compiled kernels know a dtype of weights or vectors
VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
INT4 = 4


def _load() -> tuple[ModuleType | None, str]:
    """Return the module, or None and the reason."""
    built = os.environ.get("GOSSAMER_NATIVE")
    if built == "":
        return None, "GOSSAMER_NATIVE is empty, which leaves it out"
    try:
        if built is None:
            return importlib.import_module("gossamer._native"), ""
        found = importlib.util.spec_from_file_location("_native", built)
        if found is None or found.loader is None:
            return None, f"GOSSAMER_NATIVE is {built}, which is no extension module"
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module, ""
    except ImportError as error:
        return None, f"it was not built when gossamer was installed, or cannot be loaded ({error})"


_module, _reason = _load()


def available() -> bool:
    """Whether there are compiled kernels; without them the torch reference is used."""
    return _module is not None


def why_not() -> str:
    """Return why there are no compiled kernels, or an empty text if there are."""
    return _reason


def native() -> Any:
    """Return the compiled module.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    if _module is None:
        raise ConfigurationError(
            f"the compiled kernels are missing: {_reason}; install a C++17 compiler and then gossamer again"
        )
    return _module


def offers(name: str) -> bool:
    """Whether there is a compiled function of this name; a module that was built from older sources may lack it."""
    return _module is not None and hasattr(_module, name)


def instruction_sets() -> list[str]:
    """Names of the instruction sets that kernels were compiled for and this processor has, the plainest first."""
    return list(_module.instruction_sets()) if _module else []


def instruction_set() -> str | None:
    """Name of the instruction set in use, or None without compiled kernels.

    The best that the processor has, or what the environment variable ``GOSSAMER_ISA`` names.
    """
    return _module.instruction_set() if _module else None


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use the kernels of another instruction set for a while, in all threads.

    Raises
    ------
    ConfigurationError
        If they cannot be used here.
    """
    before = native().instruction_set()
    try:
        native().use_instruction_set(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    try:
        yield
    finally:
        native().use_instruction_set(before)
