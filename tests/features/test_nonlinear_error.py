"""What is in the nonlinear error and what it does: against brute force and against models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.activation_rules import TopK
from gossamer.features.error_decomposition import error_decomposition, reconstruct
from gossamer.features.nonlinear_error import (
    downstream_split,
    learnability,
    map_from_earlier,
    missing_features,
    share_in_features,
)
from gossamer.features.planted_activations import PlantedActivations
from gossamer.features.sae import SAE
from gossamer.features.training import TrainingSettings


def test_features_are_missing_that_no_direction_resembles():
    small = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    large = torch.tensor([[1.0, 0.1, 0], [0, 0, 3], [0.7, 0.7, 0], [0, 0.5, 0.5]])
    assert missing_features(small, large).tolist() == [False, True, False, False]
    assert missing_features(small, large, 0.9).tolist() == [False, True, True, True]
    with pytest.raises(ConfigurationError, match="one size"):
        missing_features(small, large[:, 1:])


def test_the_share_in_features_is_that_of_a_projection():
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(30, 8, generator=generator)
    dense = torch.rand(600, 30, generator=generator) * (torch.rand(600, 30, generator=generator) < 0.1)
    chosen = torch.rand(30, generator=generator) < 0.5
    parts = torch.randn(600, 8, generator=generator)
    inside = 0.0
    for row, part in zip(dense, parts):
        atoms = decoder[(row > 0) & chosen].double()
        if len(atoms):
            basis = torch.linalg.qr(atoms.t()).Q
            inside += float((basis.t() @ part.double()).square().sum())
    found = share_in_features(parts, SparseCodes.from_dense(dense), decoder, chosen)
    assert found == pytest.approx(inside / float(parts.double().square().sum()), rel=1e-5)
    assert share_in_features(parts, SparseCodes.from_dense(dense), decoder, torch.zeros(30, dtype=torch.bool)) == 0


def test_a_sparse_part_is_easier_to_learn_than_noise():
    law = PlantedActivations(d=16, features=24, known=0, probability=0.08, rank=0, shrinkage=0)
    sparse, fresh = law.draw(3000, 0).x.float(), law.draw(800, 1).x.float()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(part), 16, generator=generator) * sparse.std() for part in (sparse, fresh)]
    settings = TrainingSettings(steps=150, batch_size=256, learning_rate=3e-3, auxiliary="none")
    found = learnability({"sparse": sparse, "noise": noise[0]}, {"sparse": fresh, "noise": noise[1]}, 32, 3, settings)
    assert found["sparse"][0] < found["noise"][0] - 0.1
    assert found["sparse"][1].n_features == 32


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 97, (60,), generator=generator) for _ in range(12)]


def test_parts_are_spliced_and_cost_what_the_model_says(tiny_llama, documents):
    def states(text):
        with torch.no_grad():
            return tiny_llama(text[None], output_hidden_states=True).hidden_states[2][0]

    x = torch.cat([states(text)[1:] for text in documents])
    sae = SAE(48, 96, TopK(4)).eval()
    sae.prepare(x)
    report = error_decomposition(x, reconstruct(sae, x))
    split = downstream_split(tiny_llama, 1, sae, report, documents[:2])
    layer = tiny_llama.model.layers[1]

    def loss(edit):
        total, count = 0.0, 0
        for text in documents[:2]:

            def replace(module, args, output):
                h = output[0] if isinstance(output, tuple) else output
                return torch.cat([h[:, :1], edit(h[0, 1:])[None]], 1)

            handle = layer.register_forward_hook(replace)
            with torch.no_grad():
                logits = tiny_llama(text[None]).logits[0, 1:-1]
            handle.remove()
            total += float(nn.functional.cross_entropy(logits, text[2:], reduction="sum"))
            count += len(text) - 2
        return total / count

    assert split.dense == pytest.approx(loss(lambda h: h), abs=1e-5)
    assert split.sae == pytest.approx(loss(lambda h: reconstruct(sae, h)), abs=1e-4)
    linear = loss(lambda h: reconstruct(sae, h) + report.parts(h, reconstruct(sae, h))[0])
    assert split.with_linear == pytest.approx(linear, abs=1e-4)
    rest = loss(lambda h: reconstruct(sae, h) + report.parts(h, reconstruct(sae, h))[1])
    assert split.with_nonlinear == pytest.approx(rest, abs=1e-4)
    assert split.linear_share == pytest.approx((split.sae - linear) / (split.sae - split.dense), abs=1e-2)
    assert split.with_noise != split.dense
    assert split.tokens == 2 * 58
    assert 0 < split.linear_length < 1.5
    assert 0 < split.nonlinear_length < 1.5
    assert split.to_dict()["nonlinear_share"] == split.nonlinear_share
    with pytest.raises(CalibrationError, match="longer"):
        downstream_split(tiny_llama, 1, sae, report, [documents[0][:2]])


def test_what_came_before_explains_what_depends_on_it():
    generator = torch.Generator().manual_seed(0)
    before, other = torch.randn(2, 900, 5, generator=generator)
    error = before @ torch.randn(5, 4, generator=generator) + 0.1 * torch.randn(900, 4, generator=generator)
    documents = torch.arange(900) // 10
    found = map_from_earlier(error, {"before": before, "other": other}, documents=documents)
    assert found.explained > 0.95
    assert found.r2.pooled > 0.95
    assert map_from_earlier(error, {"other": other}, documents=documents).r2.pooled < 0.05
    with pytest.raises(ConfigurationError, match="the error of 900"):
        map_from_earlier(error, {"short": other[1:]})
    with pytest.raises(ConfigurationError, match="no tokens"):
        map_from_earlier(error, {})
    with pytest.raises(CalibrationError, match="five for each"):
        map_from_earlier(error[:40], {"before": before[:40]})
