from __future__ import annotations

import pytest

from gossamer.core.taxonomy import Taxonomy
from gossamer.errors import ConfigurationError, UnknownNameError

GIVEN = {
    "timing": "during training",
    "path": ("sparse-to-sparse",),
    "topology": "dynamic",
    "criterion": ("magnitude", "gradient"),
    "allocation": "erdos-renyi",
    "patterns": ("unstructured", "n:m"),
    "aims": ("training",),
}


@pytest.mark.parametrize(
    ("path", "paradigm"),
    [
        (("sparse-to-sparse",), "sparse training"),
        (("dense-to-sparse",), "pruning"),
        (("dense-to-dense",), "pruning"),
        (("sparse-to-dense",), "sparse training"),
        (("dense-to-sparse", "sparse-to-sparse"), "either"),
    ],
)
def test_the_paradigm_follows_from_where_it_starts(path, paradigm):
    assert Taxonomy(**GIVEN | {"path": path}).paradigm == paradigm


@pytest.mark.parametrize("axis", GIVEN)
def test_every_axis_knows_its_values(axis):
    wrong = ("nonsense",) if isinstance(GIVEN[axis], tuple) else "nonsense"
    with pytest.raises(ConfigurationError, match=f"{axis} is 'nonsense'"):
        Taxonomy(**GIVEN | {axis: wrong})


def test_an_empty_axis_is_refused():
    with pytest.raises(ConfigurationError, match="criterion is empty"):
        Taxonomy(**GIVEN | {"criterion": ()})


def test_words_filter_by_value_or_its_beginning():
    taxonomy = Taxonomy(**GIVEN)
    for word in ("during", "during training", "dynamic", "gradient", "sparse-to-sparse", "sparse training"):
        assert taxonomy.matches(word)
    for word in ("after", "static", "second", "pruning"):
        assert not taxonomy.matches(word)
    with pytest.raises(UnknownNameError, match="did you mean 'dynamic'"):
        taxonomy.matches("dynamical")


def test_patterns_are_found_by_their_family():
    taxonomy = Taxonomy(**GIVEN)
    assert taxonomy.takes("2:4")
    assert taxonomy.takes("1:32")
    assert taxonomy.takes("unstructured:row")
    assert not taxonomy.takes("rows")
    with pytest.raises(UnknownNameError):
        taxonomy.takes("hexagons")


def test_a_sentence_says_it_all():
    assert Taxonomy(**GIVEN).explain() == (
        "sparse training (sparse-to-sparse), dynamic, during training; unstructured or n:m zeros by magnitude and "
        "gradient, erdos-renyi allocation; aims at training"
    )
