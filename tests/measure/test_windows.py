from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.windows import as_sequences, batches, evaluation_mode, sliding_windows


def scored_positions(windows) -> list[int]:
    return [
        position
        for piece in windows
        for position in range(piece.start + piece.ids.numel() - piece.scored, piece.start + piece.ids.numel())
    ]


@given(length=st.integers(2, 200), window=st.integers(2, 50), data=st.data())
def test_overlapping_windows_score_every_token_after_the_first_exactly_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows([torch.arange(length)], window, stride)
    assert scored_positions(windows) == list(range(1, length))
    for piece in windows:
        assert piece.ids.numel() <= window
        assert torch.equal(piece.ids, torch.arange(piece.start, piece.start + piece.ids.numel()))


@given(length=st.integers(2, 200), window=st.integers(2, 50), data=st.data())
def test_every_scored_token_sees_as_much_context_as_the_overlap_gives(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    for piece in sliding_windows([torch.arange(length)], window, stride):
        first = piece.start + piece.ids.numel() - piece.scored
        assert first - piece.start >= min(first, window - stride)


def test_windows_without_overlap_skip_the_first_token_of_each():
    windows = sliding_windows([torch.arange(10)], window=4, stride=4)
    assert scored_positions(windows) == [1, 2, 3, 5, 6, 7, 9]


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=5), batch_size=st.integers(1, 7))
def test_batches_hold_every_window_once_and_never_need_padding(lengths, batch_size):
    windows = sliding_windows([torch.arange(n) for n in lengths], 16, 8)
    grouped = batches(windows, batch_size)
    assert sorted(id(w) for group in grouped for w in group) == sorted(map(id, windows))
    for group in grouped:
        assert len(group) <= batch_size
        assert len({(w.ids.numel(), w.scored) for w in group}) == 1


def test_padding_is_taken_out_on_either_side():
    tokens = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert [s.tolist() for s in as_sequences(tokens, mask)] == [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(1, 1, dtype=torch.long), None, "sequence 0 has 1 tokens"),
        ([], None, "no token sequences"),
        (torch.zeros(1, 4), None, "torch.float32"),
        ("text", None, "str"),
        (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3), r"\(1, 3\)"),
        (torch.zeros(1, 4, dtype=torch.long), [], "0 tensors"),
        (torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1, 0, 0, 0]]), "sequence 0 has 1 tokens"),
    ],
)
def test_unusable_tokens_are_refused_in_one_line(tokens, mask, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        as_sequences(tokens, mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9), (8.0, 4), (8, -1)])
def test_windows_out_of_range_are_refused(window, stride):
    with pytest.raises(ConfigurationError, match=r"window|stride"):
        sliding_windows([torch.arange(20)], window, stride)


def test_evaluation_mode_restores_every_module_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[1].eval()

    def fail_while_evaluating():
        with evaluation_mode(model):
            assert not model[0].training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_while_evaluating()
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
