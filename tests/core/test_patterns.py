from __future__ import annotations

import pytest
import torch

from gossamer.core.patterns import NM, Block, Channels, Pattern, Unstructured
from gossamer.errors import PatternError, SparsityError, UnknownNameError

TEXTS = [
    "unstructured",
    "unstructured:row",
    "unstructured:model",
    "2:4",
    "1:16@0",
    "16x1",
    "1x8:row",
    "rows",
    "columns",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_object_agree(text):
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(Pattern.parse(text)) == Pattern.parse(text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_mask_verifies_itself_and_no_other(text):
    pattern = Pattern.parse(text)
    sparsity = None if pattern.sparsity is not None else 0.5
    scores = torch.randint(0, 3, (32, 16), generator=torch.Generator().manual_seed(0)).float()
    mask = pattern.select(scores, sparsity)
    pattern.verify(mask, sparsity)
    broken = mask.clone()
    position = (~mask).nonzero()[0]
    broken[tuple(position)] = True
    with pytest.raises(PatternError):
        pattern.verify(broken, sparsity)


def test_two_of_four_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]])
    assert NM(2, 4).select(scores).int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (1, 16), (5, 40)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_nm_keeps_exactly_n_of_every_m(n, m, dim):
    shape = [3, 5, 2]
    shape[dim] = 2 * m
    mask = NM(n, m, dim).select(torch.rand(shape))
    assert (mask.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1) == n).all()


def test_blocks_go_as_a_whole_by_their_mean():
    scores = torch.tensor([[1.0, 1, 9, 9], [1, 1, 0, 0], [5, 5, 2, 2], [5, 5, 2, 2]])
    mask = Block((2, 2)).select(scores, 0.5)
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_channels_go_as_a_whole():
    scores = torch.tensor([[1.0, 5.0, 1.0], [1.0, 5.0, 3.0]])
    assert Channels(1).select(scores, 0.34).int().tolist() == [[0, 1, 1], [0, 1, 1]]
    assert Channels(0).select(scores, 0.5).int().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_scopes_differ_as_they_should():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert Unstructured("row").select(scores, 0.5).sum(1).tolist() == [2, 2]
    assert Unstructured("layer").select(scores, 0.5).sum(1).tolist() == [0, 4]
    both = Unstructured("model").select_jointly({"low": scores, "high": scores + 10}, 0.5)
    assert both["low"].sum() == 0
    assert both["high"].all()


def test_contradictions_and_nonsense_are_refused():
    with pytest.raises(SparsityError, match=r"0\.7 contradicts the pattern 2:4"):
        NM(2, 4).select(torch.rand(4, 4), 0.7)
    with pytest.raises(SparsityError, match="leaves the sparsity open"):
        Unstructured().select(torch.rand(4, 4))
    with pytest.raises(PatternError, match=r"\(4, 6\).*multiple of 4"):
        NM(2, 4).select(torch.rand(4, 6))
    with pytest.raises(PatternError, match="impossible"):
        Pattern.parse("5:4")
    with pytest.raises(UnknownNameError, match="did you mean 'unstructured'"):
        Pattern.parse("unstructerd")
