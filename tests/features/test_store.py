"""Activations on disk: the model's own, resumable, and refused where they belong to something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gossamer.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    OutputError,
    UnknownNameError,
)
from gossamer.features import store as module
from gossamer.features.gradients import loss_gradient
from gossamer.features.store import ActivationStore, capture, find_site


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 97, (length,), generator=generator) for length in (20, 1, 33, 12)]


def outputs(model, documents, layer, skip=1):
    with torch.no_grad():
        states = [model(text[None], output_hidden_states=True).hidden_states[layer + 1][0, skip:] for text in documents]
    return torch.cat(states)


def test_a_store_holds_what_the_block_puts_out_and_where_it_came_from(tiny_llama, documents, tmp_path):
    store = capture(tiny_llama, documents, 1, tmp_path / "s", "float32", progress=False)
    torch.testing.assert_close(store[:], outputs(tiny_llama, documents, 1))
    assert store.facts.site == "model.layers.1"
    assert len(store) == 19 + 0 + 32 + 11
    for row in (0, 18, 19, 50, 51):
        document, position = int(store.documents[row]), int(store.positions[row])
        assert store.tokens[row] == documents[document][position]
    half = capture(tiny_llama, documents, "model.layers.1", tmp_path / "h", progress=False)
    torch.testing.assert_close(half[:], outputs(tiny_llama, documents, 1).half().float())


def test_an_interrupted_capture_goes_on_and_is_the_same_to_the_byte(tiny_llama, documents, tmp_path, monkeypatch):
    whole = capture(tiny_llama, documents, 0, tmp_path / "whole", progress=False)
    calls = []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            (tmp_path / "part" / "activations.bin").open("ab").write(b"torn")
            raise KeyboardInterrupt
        return run(model, batch)

    run = module.run_batch
    monkeypatch.setattr(module, "run_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        capture(tiny_llama, documents, 0, tmp_path / "part", progress=False)
    assert ActivationStore(tmp_path / "part").facts.done == 2
    found = capture(tiny_llama, documents, 0, tmp_path / "part", progress=False)
    assert len(calls) == 3 + 2, "finished documents are not run again"
    for name in ("activations", "tokens", "documents", "positions"):
        assert (tmp_path / "part" / f"{name}.bin").read_bytes() == (tmp_path / "whole" / f"{name}.bin").read_bytes()
    assert found.facts == whole.facts
    capture(tiny_llama, documents, 0, tmp_path / "part", progress=False)
    assert len(calls) == 5, "a finished store is only opened"


def test_batches_cover_an_epoch_once_and_begin_anywhere(tiny_llama, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    store = capture(tiny_llama, documents, 0, tmp_path / "s", "float32", progress=False)
    stream = store.batches(8, seed=1)
    seen = [next(stream) for _ in range(16)]
    first = torch.cat(seen[:7])
    rows = {tuple(row) for row in store[:].tolist()}
    assert len({tuple(row) for row in first.tolist()} & rows) == 7 * 8
    assert not torch.cat(seen[7:14]).equal(first)
    later = store.batches(8, seed=1, begin=9)
    assert all(next(later).equal(batch) for batch in seen[9:])
    assert not next(store.batches(8, seed=2)).equal(seen[0])
    with pytest.raises(ConfigurationError, match="from 1 to the 62"):
        next(store.batches(63))


def test_gradients_lie_beside_their_activations(tiny_llama, documents, tmp_path):
    store = capture(tiny_llama, documents, 1, tmp_path / "s", "float32", progress=False, gradients=True)
    plain = capture(tiny_llama, documents, 1, tmp_path / "p", "float32", progress=False)
    torch.testing.assert_close(store[:], plain[:])
    for number, text in enumerate(documents):
        rows = store.document(number)
        assert rows.stop - rows.start == len(text) - 1
        if len(text) > 1:
            expected = loss_gradient(tiny_llama, tiny_llama.model.layers[1], text[None])[1][0, 1:]
            torch.testing.assert_close(store.gradients(rows), expected)
            assert not expected[-1].any(), "nothing is predicted from the last token"
    pairs, alone = store.batches_with_gradients(8, seed=1), store.batches(8, seed=1)
    (x, gradient), wanted = next(pairs), next(alone)
    assert x.equal(wanted)
    place = {tuple(row): i for i, row in enumerate(store[:].tolist())}
    assert gradient.equal(store.gradients(torch.tensor([place[tuple(row)] for row in x.tolist()])))
    half = capture(tiny_llama, documents, 1, tmp_path / "h", progress=False, gradients=True)
    small = store.gradients(slice(None))
    torch.testing.assert_close(half.gradients(slice(None)), small, rtol=1e-2, atol=1e-3 * float(small.abs().max()))
    with pytest.raises(CheckpointError, match="gradients=True"):
        plain.gradients(slice(0, 1))
    with pytest.raises(ModelError, match="another gradients"):
        capture(tiny_llama, documents, 1, tmp_path / "p", "float32", progress=False, gradients=True)


def test_rows_are_taken_in_any_order(tiny_llama, documents, tmp_path):
    store = capture(tiny_llama, documents, 0, tmp_path / "s", "float32", progress=False)
    rows = torch.tensor([5, 2, 60])
    assert store[rows].equal(store[:][rows])
    assert isinstance(store._activations, np.memmap)


def test_stores_of_something_else_are_refused(tiny_llama, documents, tmp_path):
    capture(tiny_llama, documents, 0, tmp_path / "s", progress=False)
    with pytest.raises(ModelError, match=r"of 'model\.layers\.0', not of 'model\.layers\.2'"):
        ActivationStore(tmp_path / "s", tiny_llama, 2)
    with pytest.raises(ModelError, match="another text"):
        capture(tiny_llama, documents[:2], 0, tmp_path / "s", progress=False)
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ModelError, match="another model"):
        ActivationStore(tmp_path / "s", tiny_llama)
    with pytest.raises(ModelError, match="another model"):
        capture(tiny_llama, documents, 0, tmp_path / "s", progress=False)


def test_damaged_and_newer_stores_are_refused(tiny_llama, documents, tmp_path):
    capture(tiny_llama, documents, 0, tmp_path / "s", progress=False)
    facts = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "s" / "store.json").write_text(json.dumps({**facts, "version": 3}))
    with pytest.raises(CheckpointError, match="update gossamer"):
        ActivationStore(tmp_path / "s")
    del facts["gradients"]
    (tmp_path / "s" / "store.json").write_text(json.dumps({**facts, "version": 1}))
    assert not ActivationStore(tmp_path / "s").facts.gradients, "the first version had none"
    (tmp_path / "s" / "activations.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="5 bytes of"):
        ActivationStore(tmp_path / "s")
    with pytest.raises(CheckpointError, match="capture one first"):
        ActivationStore(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    with pytest.raises(OutputError, match="not empty"):
        capture(tiny_llama, documents, 0, tmp_path / "full", progress=False)


def test_bad_input_is_refused_and_nothing_is_left_behind(tiny_llama, documents, tmp_path):
    with pytest.raises(UnknownNameError, match=r"did you mean 'model\.layers\.1'"):
        capture(tiny_llama, documents, "model.layer.1", tmp_path / "s", progress=False)
    with pytest.raises(UnknownNameError, match="0 to 2"):
        capture(tiny_llama, documents, 3, tmp_path / "s", progress=False)
    with pytest.raises(CalibrationError, match="longer"):
        capture(tiny_llama, documents, 0, tmp_path / "s", skip_first=40, progress=False)
    with pytest.raises(ModelError, match="one activation for each token"):
        capture(tiny_llama, documents, "model.layers", tmp_path / "r", progress=False)
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.down_proj.weight[:] = 1e6
    with pytest.raises(NonFiniteError, match="dtype='float32'"):
        capture(tiny_llama, documents, 0, tmp_path / "s", progress=False)
    assert not (tmp_path / "s" / "store.json").exists()


def test_a_block_is_found_by_its_number(tiny_llama):
    assert find_site(tiny_llama, 2)[0] == "model.layers.2"
