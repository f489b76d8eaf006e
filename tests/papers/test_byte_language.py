from __future__ import annotations

import pytest
import torch

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure import count_flops
from gossamer.measure.training_flops import TrainingFlops
from gossamer.papers import docstrings as docstrings_module
from gossamer.papers.byte_language import ByteGPT, evaluate, next_byte_loss, pretrain
from gossamer.papers.docstrings import docstrings, overlap
from gossamer.papers.regression import linear_regression
from gossamer.training.static import Static


def test_a_byte_model_sees_only_what_came_before():
    torch.manual_seed(0)
    model = ByteGPT(2, 16, 2, 12)
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = 0
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :7], other[:, :7])
    assert not torch.allclose(one[:, 7:], other[:, 7:])


def test_pretraining_learns_repeats_and_counts():
    text = torch.tensor(list(b"abcd")).repeat(200)
    held_out = text[:48].view(3, 16)

    def run(seed, method=None):
        torch.manual_seed(0)
        return pretrain(ByteGPT(1, 16, 2, 16), text, held_out, 40, 4, 1e-2, method, seed)

    first, second = run(0), run(0)
    assert first.loss == second.loss < 1
    assert run(1).loss != first.loss
    assert first.cost.units == 40 * 4 * 16
    assert first.masks is None
    sparse = run(0, Static(sparsity=0.5, allocation="uniform"))
    assert sparse.masks is not None
    assert sparse.masks.sparsity == 0.5
    assert sparse.cost.training_flops < first.cost.training_flops
    with pytest.raises(ConfigurationError, match="16 bytes"):
        pretrain(ByteGPT(1, 16, 2, 16), text[:16], held_out, 1, 1, 1e-2)


def test_flops_of_the_model_are_those_of_the_ledger():
    model = ByteGPT(2, 16, 2, 12)
    run = pretrain(model, torch.zeros(100, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long), 1, 2, 1e-3)
    assert model.flops() == TrainingFlops.of_shape(2, 16, 12, 256)
    assert run.cost.inference_flops == pytest.approx(model.flops().forward)


def test_the_inner_width_changes_the_blocks_and_nothing_else():
    small, large = ByteGPT(2, 16, 2, 12, inner=8), ByteGPT(2, 16, 2, 12)
    flops = small.flops()
    assert (2 * flops.linear, 2 * flops.attention) == (large.flops().linear, large.flops().attention)
    assert flops.head == large.flops().head
    counts = count_flops(small, torch.zeros(1, 12, dtype=torch.long))
    assert counts.dense == 12 * flops.forward


def test_evaluation_is_the_mean_over_sequences():
    torch.manual_seed(0)
    model = ByteGPT(1, 8, 2, 8)
    sequences = torch.randint(0, 256, (100, 8))
    assert evaluate(model, sequences) == pytest.approx(float(next_byte_loss(model, sequences).detach()), rel=1e-5)


SOURCE = b'''
    def send(self, data, timeout=None):
        """Send all of the data to the peer."""
def plain(x):
    return x
def typed(a: int) -> str:
    r"""Say what the number is called.

    More.
    """
'''


@pytest.fixture
def pairs(monkeypatch):
    files = {package: [] for package in docstrings_module.PACKAGES}
    many = b"".join(SOURCE.replace(b"number", b"number %d" % i) for i in range(120))
    files["http"] = [many]
    monkeypatch.setattr(docstrings_module, "read_sources", lambda root: (files, [SOURCE.replace(b"all", b"none")]))
    docstrings_module._pairs.cache_clear()
    yield docstrings(1000, 1000, 90, ("http",), 0)
    docstrings_module._pairs.cache_clear()


def test_docstrings_are_found_with_their_signatures(pairs):
    learned, judged = pairs
    texts = {bytes(row.tolist()).rstrip(b"\n") for row in learned.tokens}
    assert b'def send(self, data, timeout=None):\n"""Send none of the data to the peer."""' in texts
    assert b'def typed(a: int) -> str:\n"""Say what the number 0 is called."""' in texts
    assert not any(b"plain" in text for text in texts)
    assert not texts & {bytes(row.tolist()).rstrip(b"\n") for row in judged.tokens}


def test_only_the_docstring_is_learned_and_its_first_byte_follows_the_quotes(pairs):
    learned, _ = pairs
    for row in range(4):
        labels, start = learned.labels[row], int(learned.starts[row])
        assert bytes(learned.tokens[row, start - 3 : start].tolist()) == b'"""'
        places = (labels >= 0).nonzero().flatten()
        assert int(places[0]) == start - 1
        assert torch.equal(labels[places], learned.tokens[row][places + 1])
        assert bytes(labels[places].tolist()).endswith(b'."""')


def test_an_installation_without_docstrings_is_named(pairs):
    with pytest.raises(CalibrationError, match="install Python with its source files"):
        docstrings(1000, 1000, 10, ("http",), 0)


def test_overlap_of_texts():
    assert overlap(b"the same text", b"the same text") == pytest.approx(1)
    assert overlap(b"xyz", b"abc") == 0
    assert overlap(b"", b"abc") == 0
    # one of two single characters, no pair: precision and recall 1/4 on average
    assert overlap(b"ax", b"ab") == pytest.approx(0.25)
    assert overlap(b"abc", b"abd") < overlap(b"abcd", b"abce")


def test_regression_finds_the_coefficients_and_how_well_they_are_known():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(200):
        a, b, noise = torch.randn(3, generator=generator).tolist()
        rows.append({"a": a, "b": b, "y": 1 + 2 * a - 3 * b + 0.1 * noise})
    found = linear_regression(rows, ["a", "b"], "y")
    for name, value in (("intercept", 1), ("a", 2), ("b", -3)):
        assert found[name].low < value < found[name].high
        assert found[name].high - found[name].low == pytest.approx(4 * 0.1 / 200**0.5, rel=0.2)
    with pytest.raises(ConfigurationError, match="3 rows cannot determine"):
        linear_regression(rows[:3], ["a", "b"], "y")
    with pytest.raises(ConfigurationError, match="one follows from the others"):
        linear_regression([{**row, "b": 2 * row["a"]} for row in rows], ["a", "b"], "y")
