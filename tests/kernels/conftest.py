from __future__ import annotations

import pytest

from gossamer.kernels import native


@pytest.fixture(params=["reference", *native.instruction_sets()])
def face(request, monkeypatch):
    """Every way in which a packed matrix can be multiplied on this machine, the torch reference first."""
    if request.param == "reference":
        for module in ("matrix", "channel_products", "gated_feedforward", "histogram"):
            monkeypatch.setattr(f"gossamer.kernels.{module}.available", lambda: False)
        yield request.param
    else:
        with native.using(request.param):
            yield request.param
