"""ProSper's own code as a peer: a checkout of github.com/ml-uol/prosper, run as it is.

It asks for MPI, PyTables and six on import, and for names that NumPy has dropped. Here it gets the names, and stand-ins
for the libraries with which it runs as one process, as ``mpirun -n 1`` would.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class _OneProcess:
    """The communicator of a single process."""

    rank, size = 0, 1

    def allreduce(self, value: Any) -> Any:
        return value

    def bcast(self, value: Any) -> Any:
        return value

    def Bcast(self, message: Any) -> None:
        pass

    def Barrier(self) -> None:
        pass

    def Allreduce(self, sent: Any, received: Any) -> None:
        received[0][...] = sent[0]

    Allgather = Allreduce


def prosper(checkout: Path) -> dict[str, Any]:
    """Model classes of a checkout by their short names, and its linear annealing under ``"annealing"``."""
    if not (checkout / "prosper" / "em" / "camodels").is_dir():
        raise FileNotFoundError(f"{checkout} is no checkout of github.com/ml-uol/prosper")
    _stand_in()
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    found = {}
    for name, module, kind in (
        ("BSC", "bsc_et", "BSC_ET"),
        ("DSC", "dsc_et", "DSC_ET"),
        ("MCA", "mca_et", "MCA_ET"),
        ("MMCA", "mmca_et", "MMCA_ET"),
        ("GSC", "gsc_et", "GSC"),
    ):
        found[name] = getattr(importlib.import_module(f"prosper.em.camodels.{module}"), kind)
    found["annealing"] = importlib.import_module("prosper.em.annealing").LinearAnnealing
    return found


def schedule(peer: dict[str, Any], temperature: float = 1.0, cut: float = 0.0) -> Any:
    """Its annealing object, with the same temperature and cut throughout."""
    annealing = peer["annealing"](10)
    annealing["T"], annealing["Ncut_factor"], annealing["anneal_prior"] = temperature, cut, False
    return annealing


def _stand_in() -> None:
    for name, kind in (("int", int), ("bool", bool), ("object", object), ("str", str)):
        if name not in np.__dict__:
            setattr(np, name, kind)
    if "linalg" not in np.linalg.__dict__:
        np.linalg.linalg = np.linalg  # type: ignore[attr-defined]
    mpi = ModuleType("mpi4py.MPI")
    mpi.COMM_WORLD = _OneProcess()  # type: ignore[attr-defined]
    for name in ["DOUBLE", "FLOAT", "SHORT", "INT", "LONG", "UNSIGNED_SHORT", "UNSIGNED_INT", "UNSIGNED_LONG"]:
        setattr(mpi, name, name)
    mpi4py, tables = ModuleType("mpi4py"), ModuleType("tables")
    mpi4py.MPI = mpi  # type: ignore[attr-defined]
    tables.open_file = tables.openFile = None  # type: ignore[attr-defined]
    tables.IsDescription = object  # type: ignore[attr-defined]
    six = ModuleType("six")
    six.add_metaclass = lambda kind: lambda of: of  # type: ignore[attr-defined]
    for name, module in (("mpi4py", mpi4py), ("mpi4py.MPI", mpi), ("tables", tables)):
        sys.modules.setdefault(name, module)
    if importlib.util.find_spec("six") is None:
        sys.modules.setdefault("six", six)
