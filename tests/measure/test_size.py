from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import ConfigurationError, ModelError, UnknownNameError
from gossamer.measure import bytes_in_memory, bytes_on_disk, density


def test_every_parameter_is_counted_exactly():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -0.0, 3.0]]))
        model[0].bias.zero_()
        model[1].weight.fill_(1.0)
    rows = {row.name: (row.shape, row.nonzeros, row.total) for row in density(model).layers}
    assert rows == {"0.weight": ((2, 3), 3, 6), "0.bias": ((2,), 0, 2), "1.weight": ((2, 2), 4, 4)}


@given(zeros=st.integers(0, 24 * 16))
def test_sparsity_is_the_share_of_zeros(zeros):
    model = nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0).view(-1)[:zeros] = 0
    (row,) = density(model, prunable=["weight"]).layers
    assert row.total - row.nonzeros == zeros
    assert row.sparsity == pytest.approx(zeros / (24 * 16))


def test_totals_name_their_denominator(llama):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    found = density(llama)
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    feedforward = 2 * 3 * 32 * 48
    norms = 5 * 32
    assert found.total("prunable").total == attention + feedforward
    assert found.total("without embeddings").total == attention + feedforward + norms
    assert found.total("all").total == attention + feedforward + norms + 2 * 64 * 32
    zeros = 2 * 32 * 24
    for of in ("prunable", "without embeddings", "all"):
        total = found.total(of)
        assert total.total - total.nonzeros == zeros
        assert total.denominator in str(total)


def test_tied_embeddings_count_once_and_are_not_prunable(build_llama):
    tied = build_llama(tie_word_embeddings=True)
    found = density(tied)
    assert sum(row.embedding for row in found.layers) == 1
    assert found.total("all").total == sum(p.numel() for p in tied.parameters())
    assert not any(row.prunable for row in found.layers if row.embedding)


def test_unknown_denominators_and_parameters_are_refused(llama):
    with pytest.raises(ConfigurationError, match="of is 'some'"):
        density(llama).total("some")
    with pytest.raises(UnknownNameError, match="did you mean"):
        density(llama, prunable=["model.layers.0.mlp.up_prj.weight"])


def test_parameters_without_data_are_named():
    with pytest.raises(ModelError, match="'weight' has no data"):
        density(nn.Linear(2, 2, device="meta"))


def test_bytes_in_memory_follow_the_dtype(llama):
    values = sum(p.numel() for p in llama.parameters())
    buffers = sum(b.nbytes for b in llama.buffers())
    assert bytes_in_memory(llama) == 4 * values + buffers
    half = nn.Linear(10, 10, bias=False).bfloat16()
    assert bytes_in_memory(half) == 200


def test_shared_storage_counts_once(build_llama):
    tied, untied = build_llama(tie_word_embeddings=True), build_llama()
    assert bytes_in_memory(untied) - bytes_in_memory(tied) == 4 * 64 * 32

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.zeros(10)
            self.register_buffer("left", whole[:5])
            self.register_buffer("right", whole[5:])

    assert bytes_in_memory(Views()) == 40


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_count_all_their_parts():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            rows, columns = torch.arange(9), torch.arange(8)
            self.register_buffer(
                "weight", torch.sparse_csr_tensor(rows, columns, torch.ones(8), (8, 8), check_invariants=True)
            )

    assert bytes_in_memory(Packed()) == 8 * 4 + 8 * 8 + 9 * 8


def test_meta_tensors_take_no_memory():
    assert bytes_in_memory(nn.Linear(100, 100, device="meta")) == 0


def test_bytes_on_disk_count_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "sub" / "config.json").write_bytes(bytes(7))
    os.link(tmp_path / "model.safetensors", tmp_path / "again.safetensors")
    (tmp_path / "linked.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert bytes_on_disk(tmp_path) == 107
    assert bytes_on_disk(tmp_path, {".safetensors"}) == 100
    assert bytes_on_disk(tmp_path / "sub" / "config.json") == 7


def test_a_path_with_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="missing"):
        bytes_on_disk(tmp_path / "missing")
