"""Choosing storages by measured time, and putting them in place."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError, TargetError
from gossamer.kernels.native import available
from gossamer.models.packed import load_packed
from gossamer.runtime.choice import Case, Choices, Storage, candidates, fastest, measure_storages
from gossamer.runtime.compress import compress
from gossamer.storage.layers import PackedEmbedding, SparseLinear

needs_native = pytest.mark.skipif(not available(), reason="needs the compiled kernels")


def preferring(kind):
    """Choices by a made-up measurement in which one kind of storage is the fastest."""

    def measure(case, storages):
        return {storage: 1.0 if storage.kind == kind else 2.0 for storage in storages}

    return measure


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 32, bias=False)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(torch.rand_like(parameter) < 0.5, 0)
    return model


@needs_native
def test_layers_become_what_is_fastest_and_outputs_stay(network, tmp_path):
    x = torch.randn(5, 64)
    before = network(x)
    report = compress(network, choices=Choices(tmp_path / "c.json", preferring("bitmask")), progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2.0"]
    assert all(isinstance(network.get_submodule(layer.name), SparseLinear) for layer in report.layers)
    assert torch.allclose(network(x), before, atol=1e-5)
    assert report.after < report.before
    assert report.layers[0].density == pytest.approx(0.5, abs=0.05)
    json.dumps(report.to_dict())
    with pytest.raises(TargetError, match="only once"):
        compress(network, progress=False)


def test_layers_that_are_fastest_as_they_are_stay_the_same_objects(network, tmp_path):
    before = [network[0], network[2][0]]
    report = compress(network, choices=Choices(tmp_path / "c.json", preferring("plain")), progress=False)
    assert [network[0], network[2][0]] == before
    assert report.before == report.after


@needs_native
def test_only_what_matches_is_replaced(network, tmp_path):
    compress(network, include=["2.*"], choices=Choices(tmp_path / "c.json", preferring("dense")), progress=False)
    assert type(network[0]) is nn.Linear
    assert network[2][0].kind == "dense"


@needs_native
def test_a_tied_head_and_the_embedding_share_one_packed_matrix(tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    ids = torch.tensor([[1, 5, 7, 2]])
    expected = model(ids).logits
    report = compress(model, choices=Choices(tmp_path / "c.json", preferring("dense")), progress=False)
    assert report.layers[-1].name == "lm_head"
    assert report.layers[-1].storage == "dense int8"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.values.data_ptr() == head.values.data_ptr()
    assert float((model(ids).logits - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_measurement_is_made_once_and_kept(tmp_path):
    calls = []

    def measure(case, storages):
        calls.append(case)
        return dict.fromkeys(storages, 0.5)

    path = tmp_path / "deep" / "c.json"
    case, storages = Case(8, 64, 0.5, torch.float32), [Storage("plain", "float32")]
    assert Choices(path, measure).seconds(case, storages) == {storages[0]: 0.5}
    again = Choices(path, measure)
    again.seconds(case, storages)
    again.seconds(Case(8, 64, 0.48, torch.float32), storages)  # nearly the same density
    assert len(calls) == 1
    again.seconds(Case(8, 64, 0.3, torch.float32), storages)
    assert len(calls) == 2
    path.write_text("broken")
    assert Choices(path, measure).seconds(case, storages) == {storages[0]: 0.5}


@needs_native
def test_every_candidate_can_be_measured():
    storages = candidates(["float32", "bfloat16", "int8", "int4"], torch.float32, 64)
    assert Storage("plain", "float32") in storages
    seconds = measure_storages(Case(16, 128, 0.5, torch.float32), storages, repeats=1)
    assert set(seconds) == set(storages)
    assert all(value > 0 for value in seconds.values())


def test_what_cannot_be_compressed_is_refused_by_name(network):
    with pytest.raises(ConfigurationError, match="int3"):
        compress(network, head="int3")
    with pytest.raises(TargetError, match="no linear layer"):
        compress(nn.ReLU())
    with pytest.raises(ConfigurationError, match=r"0 is torch\.float64"):
        compress(network.double())


@needs_native
@pytest.mark.parametrize(("height", "kind"), [(1, "csr"), (4, "blocks4"), (8, "blocks8"), (16, "blocks16")])
def test_layers_of_few_weights_and_of_blocks_become_these(height, kind, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80))
    with torch.no_grad():
        model[0].weight.masked_fill_((torch.rand(80 // height, 64) > 0.2).repeat_interleave(height, 0), 0)
    dense, x = copy.deepcopy(model), torch.randn(3, 64)
    report = compress(model, choices=Choices(tmp_path / "c.json", preferring(kind)), progress=False)
    assert report.layers[0].storage == f"{kind} float32"
    assert torch.equal(model[0].weight, dense[0].weight)
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_a_layer_is_left_alone_unless_another_storage_is_faster_beyond_doubt():
    plain, other = Storage("plain", "float32"), Storage("bitmask", "float32")
    assert fastest({plain: 1.0, other: 0.98}) == plain
    assert fastest({plain: 1.0, other: 0.96}) == other
    assert fastest({other: 1.0}) == other


def test_single_weights_are_no_candidate_where_many_are_left():
    assert all(storage.kind != "csr" for storage in candidates(["float32"], torch.float32, density=0.5))
    assert all(storage.kind != "csr" for storage in candidates(["int8"], torch.float32, 64, density=0.05))


@needs_native
@pytest.mark.parametrize("block", [4, 8, 16])
def test_blocks_can_be_measured(block):
    storages = candidates(["bfloat16"], torch.bfloat16, density=0.1, block=block)
    case = Case(40, 128, 0.1, torch.bfloat16, 20, block=block)
    assert f"blocks of {block}" in case.key
    assert {"csr", f"blocks{block}"} <= {storage.kind for storage in storages}
    assert set(measure_storages(case, storages, repeats=1)) == set(storages)


@needs_native
@pytest.mark.parametrize("format", [None, "int8"])
def test_layers_that_follow_a_pattern_become_packed_n_m(format, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 7))
    with torch.no_grad():
        model[0].weight.mul_(NM(2, 8).select(model[0].weight.abs()))
        model[1].weight.masked_fill_(torch.rand(7, 80) < 0.75, 0)
    dense, x = copy.deepcopy(model), torch.randn(3, 64)
    report = compress(model, format, choices=Choices(tmp_path / "c.json", preferring("nm")), progress=False)
    assert report.layers[0].storage == f"nm {format or 'float32'}"
    assert (model[0].matrix.n, model[0].matrix.m) == (2, 8)
    assert not any(storage.startswith("nm") for storage in report.layers[1].seconds)
    if format is None:
        assert torch.allclose(model(x), dense(x), atol=1e-5)


@needs_native
def test_patterns_can_be_measured():
    storages = candidates(["bfloat16", "int8"], torch.bfloat16, 64, density=0.25, pattern=NM(2, 8))
    case = Case(40, 100, 0.25, torch.bfloat16, 3, pattern=NM(2, 8))
    assert "2:8" in case.key
    assert {Storage("nm", "bfloat16"), Storage("nm", "int8", 64)} <= set(storages)
    assert set(measure_storages(case, storages, repeats=1)) == set(storages)
    assert all(storage.kind != "nm" for storage in candidates(["bfloat16"], torch.bfloat16, density=0.25))


@needs_native
@pytest.mark.parametrize("kind", ["dense", "bitmask", "nm"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_compressed_model_is_saved_and_loaded_as_it_is(kind, format, tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    with torch.no_grad():
        for layer in model.modules():
            if kind == "nm" and isinstance(layer, nn.Linear):
                layer.weight.mul_(NM(2, 4).select(layer.weight.abs()))
    report = compress(model, format, choices=Choices(tmp_path / "c.json", preferring(kind)), progress=False)
    assert {layer.storage.split()[0] for layer in report.layers} == {kind}
    gossamer.save(model, tmp_path / "model")
    again = load_packed(tmp_path / "model", None, torch.device("cpu"), None)
    ids = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert embedding.values.data_ptr() == head.values.data_ptr()
