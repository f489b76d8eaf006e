"""A dictionary that nobody trained, for tests of its page: every feature loves a word of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.features.autointerp.pipeline import Interpretation
from gossamer.features.autointerp.score import Score
from gossamer.features.exploration import Exploration
from gossamer.features.latent_cache import Context, FeatureStatistics
from gossamer.features.logit_effects import LogitEffects
from gossamer.features.steering import Steered
from gossamer.report.features_page import FeaturesPage

WORDS = ["whale", "ship", "sea", "captain", "the", " of", "\n", "<b>", "</script>", "😀", "water", "'quoted'", "ahab"]


class Text:
    """What a page asks of a cache: how long its text is, and where its documents begin."""

    def __init__(self, documents: int, length: int):
        self.offsets = np.arange(documents + 1) * length
        self.rows = documents * length

    def __len__(self):
        return self.rows


@pytest.fixture(scope="session")
def synthetic_page():
    """Makes a page of so many features."""
    return make_page


def make_page(features: int, documents: int = 40, length: int = 64, contexts: int = 8, seed: int = 0):
    """A page of random facts; feature i fires on word i, every hundredth never, and every tenth is explained."""
    draw = np.random.default_rng(seed)
    cache = Text(documents, length)
    words = [f" {word}{number // len(WORDS) or ''}" for number, word in enumerate(WORDS * 200)][:2000]
    ids = draw.integers(0, len(words), len(cache))
    alive = np.arange(features) % 100 != 99
    counts = np.where(alive, draw.integers(1, len(cache) // 4, features), 0)
    maximum = np.where(alive, draw.uniform(0.5, 9, features), 0).astype(np.float32)
    histogram = draw.integers(0, 50, (features, 24)) * alive[:, None]
    statistics = FeatureStatistics(counts, maximum, maximum / 3, histogram)

    def one(feature: int, height: float) -> Context:
        size, centre = 29, 20
        document, begin = int(draw.integers(documents)), int(draw.integers(length - size))
        values = np.zeros(size, np.float32)
        values[[centre, 3, 27]] = maximum[feature] * height * np.array([1, 0.4, 0.1])
        return Context(document, begin, np.zeros(size, np.int32), values, centre)

    def near(count: int):
        return torch.from_numpy(draw.integers(0, features, (features, count))), torch.from_numpy(
            draw.uniform(0, 1, (features, count))
        )

    def effects(sign: int):
        values = sign * np.sort(draw.uniform(0, 4, (features, 10)))[:, ::-1]
        return torch.from_numpy(draw.integers(0, len(words), (features, 10))), torch.from_numpy(values.copy())

    tokens = [
        [(int(f) % len(words), 0.6), (int(draw.integers(len(words))), 0.2)] if alive[f] else [] for f in range(features)
    ]
    exploration = Exploration(
        statistics,
        tokens,
        [[one(f, 1 - 0.05 * n) for n in range(contexts)] if alive[f] else [] for f in range(features)],
        [[one(f, 0.5 - 0.1 * n) for n in range(4)] if alive[f] else [] for f in range(features)],
        LogitEffects(*effects(1), *effects(-1)),
        near(6),
        near(6),
        [words[token] for token in ids],
    )
    explanations = {
        feature: Interpretation(
            feature,
            f"words about {WORDS[feature % len(WORDS)]} <i>number {feature}</i>",
            {
                "detection": Score("detection", "auc", 0.9, 0.8, 0.95, count=100),
                "fuzzing": Score("fuzzing", "auc", None, abstained=7),
            },
        )
        for feature in range(0, features, 10)
    }
    steered = {
        feature: [Steered("I think that", " it rains.", (" whales <swim>.", " whale whale"))]
        for feature in (5, 12)
        if feature < features
    }
    record = {
        "title": "A test",
        "date": "2026-11-22",
        "model": {"name": "a model & more", "licence": "none"},
        "site": "model.layers.9",
        "tokens": len(cache),
        "quality": {
            "unexplained": 0.25, "recovered": 0.91, "spliced": 3.1, "dense": 3.0, "ablated": 8.0, "active": 31.9,
        },
        "command": "gossamer features demo --layer 9",
        "more": "gossamer features demo --layer 9 --steer {feature}",
        "explainer": "a test",
        "dictionary": {"rule": "TopK", "k": 32},
    }  # fmt: skip
    return FeaturesPage(record, exploration, cache, dict(enumerate(words)), explanations, steered, (1.0, 2.0))
