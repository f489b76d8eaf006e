from __future__ import annotations

import numpy as np
import pytest
import torch
from autointerp_corpus import AFTER_THE, NUMBER, RARE, THE
from scipy.stats import spearmanr

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CheckpointError, ConfigurationError, ModelError
from gossamer.features.autointerp.explainers import TokenExplainer
from gossamer.features.autointerp.judges import OfflineJudge
from gossamer.features.autointerp.matching import (
    coactivation_similarity,
    explanation_similarity,
    match,
    similarity_by_distance,
)
from gossamer.features.autointerp.pipeline import _rank_correlation, interpret, read_interpretations, summarise
from gossamer.features.autointerp.scorers import DetectionScorer, FuzzingScorer

SCORERS = [DetectionScorer(OfflineJudge()), FuzzingScorer(OfflineJudge())]


class Counting(TokenExplainer):
    def __init__(self, stop_at=None):
        super().__init__()
        self.explained, self.stop_at = [], stop_at

    def explain(self, record):
        if len(self.explained) == self.stop_at:
            raise KeyboardInterrupt
        self.explained.append(record.latent)
        return super().explain(record)


def test_latents_are_explained_and_scored_once(builder, tmp_path):
    path = tmp_path / "found.jsonl"
    with pytest.raises(KeyboardInterrupt):
        interpret(builder, [THE, NUMBER, AFTER_THE], Counting(2), SCORERS, path, progress=False)
    with path.open("a") as file:
        file.write('{"latent": 2, "expl')
    explainer = Counting()
    found = interpret(builder, [AFTER_THE, RARE, THE, NUMBER], explainer, SCORERS, path, progress=False)
    assert explainer.explained == [AFTER_THE]
    assert [f.latent for f in found] == [AFTER_THE, RARE, THE, NUMBER]
    assert "windows" in found[1].skipped
    assert found[1].explanation is None
    assert all(f.scores["fuzzing"].value > 0.9 for f in found if f.explanation)
    assert read_interpretations(path) == sorted(found, key=lambda f: f.latent)


def test_latents_may_be_interpreted_side_by_side(builder, tmp_path):
    latents = [THE, NUMBER, AFTER_THE, RARE]
    alone, together = (
        interpret(builder, latents, TokenExplainer(), SCORERS, tmp_path / str(n), progress=False, workers=n)
        for n in (1, 4)
    )
    assert alone == together
    with pytest.raises(ConfigurationError, match="workers is 0"):
        interpret(builder, latents, TokenExplainer(), SCORERS, tmp_path / "none", progress=False, workers=0)


def test_another_study_is_refused(builder, tmp_path):
    path = tmp_path / "found.jsonl"
    interpret(builder, [THE], Counting(), SCORERS, path, {"model": "a"}, progress=False)
    with pytest.raises(ModelError, match="other study"):
        interpret(builder, [THE], Counting(), SCORERS, path, {"model": "b"}, progress=False)
    with pytest.raises(ModelError, match="other scorers"):
        interpret(builder, [THE], Counting(), SCORERS[:1], path, {"model": "a"}, progress=False)
    with pytest.raises(ConfigurationError, match="a name of its own"):
        interpret(builder, [THE], Counting(), SCORERS[:1] * 2, path, progress=False)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="make them first"):
        read_interpretations(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"format": "other"}\n')
    with pytest.raises(CheckpointError, match="holds no interpretations"):
        read_interpretations(tmp_path / "other.jsonl")
    (tmp_path / "new.jsonl").write_text('{"format": "gossamer interpretations", "version": 99}\n{"odd": 1}\n')
    with pytest.raises(CheckpointError, match="is of version 99"):
        read_interpretations(tmp_path / "new.jsonl")


def test_many_latents_are_summed_up(builder, tmp_path):
    found = interpret(
        builder, [THE, NUMBER, AFTER_THE, RARE], TokenExplainer(), SCORERS, tmp_path / "f", progress=False
    )
    summary = summarise(found)
    assert (summary.explained, summary.skipped) == (3, 1)
    assert summary.means["fuzzing"] == pytest.approx(
        np.mean([f.scores["fuzzing"].value for f in found if f.explanation])
    )
    assert set(summary.abstained) == {"detection", "fuzzing"}
    low, high = summary.intervals["detection"]
    assert low <= summary.means["detection"] <= high


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, 30), draw.integers(0, 6, 30)
    assert _rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert _rank_correlation(np.ones(4), np.arange(4)) is None


# ------------------------------------------------------------------------------------------------ matching


def test_matching_undoes_a_permutation():
    draw = np.random.default_rng(0)
    order = draw.permutation(9)
    similarity = 0.3 * draw.random((9, 9))
    similarity[np.arange(9), order] = 0.9
    found = match(similarity)
    assert found.second[np.argsort(found.first)].tolist() == order.tolist()
    assert found.mean == pytest.approx(0.9)
    with pytest.raises(ConfigurationError, match="finite"):
        match(np.full((2, 2), np.nan))


def test_coactivation_is_the_jaccard_index():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, n, generator=generator) * (torch.rand(50, n, generator=generator) < 0.3) for n in (6, 4))
    found = coactivation_similarity(SparseCodes.from_dense(a), SparseCodes.from_dense(b))
    for i in range(6):
        for j in range(4):
            both, either = ((a[:, i] > 0) & (b[:, j] > 0)).sum(), ((a[:, i] > 0) | (b[:, j] > 0)).sum()
            assert found[i, j] == pytest.approx(float(both / either))
    with pytest.raises(ConfigurationError, match="50 and 49 tokens"):
        coactivation_similarity(SparseCodes.from_dense(a), SparseCodes.from_dense(b[1:]))


def test_near_layers_are_more_alike():
    topics = ["whale", "sea", "ship", "law", "war", "peace"]

    def embed(texts):
        found = np.array([[t in text for t in topics] for text in texts], float) + 1e-3
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    layers = {0: ["whale", "sea", "ship"], 1: ["sea", "whale", "law"], 2: ["law", "war", "sea"]}
    found = similarity_by_distance(layers, embed)
    assert found[1] > found[2]
    assert explanation_similarity(embed, layers[0], layers[1])[0, 1] == pytest.approx(1.0, abs=1e-2)
