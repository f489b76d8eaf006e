from __future__ import annotations

import pytest

from gossamer.kernels import native


@pytest.fixture(params=["reference", *native.instruction_sets()])
def face(request, monkeypatch):
    """Every way in which a packed matrix can be multiplied on this machine, the torch reference first."""
    if request.param == "reference":
        monkeypatch.setattr("gossamer.kernels.matrix.available", lambda: False)
        yield request.param
    else:
        with native.using(request.param):
            yield request.param
