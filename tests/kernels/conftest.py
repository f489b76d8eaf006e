from __future__ import annotations

import pytest

from gossamer.kernels import attention_native, native


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


@pytest.fixture(params=["reference", *native.instruction_sets()])
def way(request, monkeypatch):
    """Every way in which attention can be computed on this machine, with torch alone first."""
    if request.param == "reference":
        monkeypatch.setattr(attention_native, "offers", lambda name: False)
        yield request.param
    else:
        if not all(native.offers(f"attention_{part}") for part in ("forward", "backward", "gather_listed")):
            pytest.skip("the compiled kernels are older than attention")
        with native.using(request.param):
            yield request.param
