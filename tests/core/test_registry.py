from __future__ import annotations

import json

import pytest

from gossamer.core import registry
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.methods import methods


@pytest.fixture
def empty(monkeypatch):
    monkeypatch.setattr(registry, "REGISTER", {})


def test_a_method_that_leaves_out_an_axis_is_refused(empty):
    with pytest.raises(ConfigurationError, match="'new' does not say its path"):
        register("new", paper="gmp", when="during training", topology="static", criterion=("magnitude",))
    with pytest.raises(ConfigurationError, match="'new' does not say its criterion"):
        register("new", paper="wanda", when="after training")


def test_what_is_usual_for_a_protocol_need_not_be_said(empty):
    @register("new", paper="wanda", when="after training", criterion=("magnitude",), allocation="global")
    def new():
        """Do nothing."""

    said = registry.REGISTER["new"].taxonomy
    assert (said.timing, said.path, said.topology) == ("after training", ("dense-to-sparse",), "static")
    assert said.allocation == "global"


def test_two_methods_of_one_name_are_refused(empty):
    @register("new", paper="wanda", when="after training", criterion=("magnitude",))
    def one():
        """Do nothing."""

    with pytest.raises(ConfigurationError, match="two methods are called 'new'"):

        @register("new", paper="wanda", when="after training", criterion=("magnitude",))
        def other():
            """Do nothing."""


def test_every_method_becomes_plain_json():
    stored = json.loads(json.dumps([spec.to_dict() for spec in methods().values()]))
    assert all(row["summary"] and row["taxonomy"]["criterion"] for row in stored)
