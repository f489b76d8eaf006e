import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from autointerp_corpus import WordTokenizer, corpus

from gossamer.features.autointerp.examples import ExampleBuilder, ExampleSettings


@pytest.fixture(scope="session")
def activity():
    return corpus()


@pytest.fixture(scope="session")
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def builder(activity, tokenizer):
    settings = ExampleSettings(length=8, n_train=20, n_test=20, quantiles=5, n_negatives=20, least=20)
    return ExampleBuilder(activity, tokenizer, settings)
