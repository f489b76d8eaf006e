import pytest
import torch

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.circuit_tasks import CircuitTask, docstring, greater_than
from gossamer.features.indirect_object import FRAMES, NameLanguage, changed, indirect_object


class WordTokenizer:
    """Splits before spaces, and, if asked to, between digits."""

    def __init__(self, digits=False):
        self.words, self.digits = {}, digits

    def __call__(self, text, add_special_tokens=False):
        pieces = text.replace("\n", " \n ").replace(" ", "\0 ").split("\0")
        pieces = [part for piece in pieces for part in self._parts(piece) if part]
        return {"input_ids": [self.words.setdefault(piece, len(self.words)) for piece in pieces]}

    def _parts(self, piece):
        word = piece.strip()
        if not word.isdigit():
            return [piece]
        if self.digits:
            return [piece[: len(piece) - len(word)], *word]
        return [piece[:-2], word[-2:]] if len(word) > 2 else [piece]

    def decode(self, ids):
        known = {number: word for word, number in self.words.items()}
        return "".join(known[int(number)] for number in ids)


@pytest.fixture
def language():
    return NameLanguage.of(WordTokenizer(), names=10)


def test_sentences_read_as_meant():
    tokenizer = WordTokenizer()
    language = NameLanguage.of(tokenizer, names=10)
    labels = {name: torch.tensor([1, 1]) for name in ("io", "object", "place")}
    labels |= {"s": torch.tensor([4, 4]), "order": torch.tensor([0, 1])}
    first, second = (tokenizer.decode(row) for row in language.render(labels))
    assert first == "Then, Jessica and Jennifer went to the garden. Jennifer gave a book to"
    assert second == "Then, Jennifer and Jessica went to the garden. Jennifer gave a book to"


@pytest.mark.parametrize("frame", FRAMES)
def test_every_frame_has_one_token_a_slot(frame):
    language = NameLanguage.of(WordTokenizer(), frame, names=10)
    tokens = language.render(language.sample(50))
    assert tokens.shape == (50, len(language.frame))
    end = language.position("end")
    assert len(set(tokens[:, end].tolist())) == 1
    assert set(tokens[:, language.position("subject")].tolist()) <= set(language.names)


def test_variables_are_even_and_independent(language):
    labels = language.sample(20_000, seed=1)
    for name, size in language.sizes.items():
        share = torch.bincount(labels[name], minlength=size) / 20_000
        assert (share - 1 / size).abs().max() < 0.02
    assert not (labels["io"] == labels["s"]).any()
    both = torch.stack([labels["order"].double(), labels["object"].double(), labels["io"].double()])
    assert torch.corrcoef(both).fill_diagonal_(0).abs().max() < 0.03


def test_held_out_pairs_of_names_are_never_drawn_for_training(language):
    seen, unseen = (language.sample(5000, held_out=held_out) for held_out in (False, True))
    pairs = [set(zip(part["io"].tolist(), part["s"].tolist())) for part in (seen, unseen)]
    assert not pairs[0] & pairs[1]
    assert 0.1 < len(pairs[1]) / 90 < 0.3
    # and every name appears in both roles
    assert {one for one, _ in pairs[1]} == {two for _, two in pairs[1]} == set(range(10))


def test_twins_name_a_third_person(language):
    labels = language.sample(200)
    task = language.task(labels)
    place = language.position("subject")
    for prompt, twin, right, wrong in zip(task.positive, task.negative, task.right, task.wrong):
        assert (prompt != twin).nonzero()[:, 0].tolist() == [place]
        assert int(twin[place]) not in (int(right), int(wrong))
        assert int(prompt[place]) == int(wrong)


@pytest.mark.parametrize("attribute", ["io", "s", "order", "object", "place"])
def test_a_changed_variable_is_the_only_one_that_changes(language, attribute):
    labels = language.sample(500)
    other = changed(labels, language.sizes, attribute)
    assert (other[attribute] != labels[attribute]).all()
    assert all(torch.equal(other[name], labels[name]) for name in labels if name != attribute)
    assert not (other["io"] == other["s"]).any()
    assert int(other[attribute].max()) < language.sizes[attribute]


def test_frames_are_used_in_equal_parts():
    task = indirect_object(WordTokenizer(), 10, names=10)
    lengths = [len(prompt) for prompt in task.positive]
    assert len(task) == 10
    assert len(set(lengths)) >= 2


def test_greater_years_are_right():
    tokenizer = WordTokenizer()
    task = greater_than(tokenizer, 30)
    for prompt, twin, right, wrong in zip(task.positive, task.negative, task.right, task.wrong):
        text = tokenizer.decode(prompt)
        year = int(text.split("year ")[1][2:4])
        assert {tokenizer.decode([token]) for token in right if token >= 0} == {
            f"{y:02d}" for y in range(year + 1, 100)
        }
        assert {tokenizer.decode([token]) for token in wrong if token >= 0} == {f"{y:02d}" for y in range(year + 1)}
        assert "01 to the year" in tokenizer.decode(twin)


def test_tokenizers_of_digits_are_asked_for_tens():
    tokenizer = WordTokenizer(digits=True)
    task = greater_than(tokenizer, 10)
    for prompt, right, wrong in zip(task.positive, task.right, task.wrong):
        ten = int(tokenizer.decode(prompt).split("year ")[1][2])
        assert {int(tokenizer.decode([token])) for token in right if token >= 0} == set(range(ten + 1, 10))
        assert {int(tokenizer.decode([token])) for token in wrong if token >= 0} == set(range(ten))


def test_docstrings_ask_for_the_third_argument():
    tokenizer = WordTokenizer()
    tokenizer._parts = lambda piece: [part for part in piece.replace(",", "\0,").split("\0") if part]
    task = docstring(tokenizer, 20)
    for prompt, twin, right, wrong in zip(task.positive, task.negative, task.right, task.wrong):
        text = tokenizer.decode(prompt)
        arguments = text.split("(self, ")[1].split(")")[0].replace(",", "").split()
        assert tokenizer.decode(right).strip() == arguments[2]
        assert len(set(wrong.tolist())) == 3
        assert f":param {arguments[0]}:" in text
        assert f":param {arguments[0]}:" not in tokenizer.decode(twin)


def test_metrics_by_hand():
    prompts = [torch.tensor([1])] * 2
    right, wrong = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[2, -1], [0, 1]])
    logits = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 2.0]])
    rows = torch.tensor([0, 1])
    mean = CircuitTask(prompts, prompts, right, wrong).score(logits, rows)
    assert mean.tolist() == [-3.0, 2.0]
    share = CircuitTask(prompts, prompts, right, wrong, "probability").score(logits, rows)
    p = logits.softmax(-1)
    assert torch.allclose(share, torch.stack([p[0, 0] + p[0, 1] - p[0, 2], p[1, 2] - p[1, 0] - p[1, 1]]))


def test_only_solved_prompts_are_kept(tiny_llama):
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 1])]
    with torch.no_grad():
        logits = tiny_llama(torch.stack(prompts)).logits[:, -1]
    right, wrong = logits.argmax(1)[:, None], logits.argmin(1)[:, None]
    right[1], wrong[1] = wrong[1].clone(), right[1].clone()
    task = CircuitTask(prompts, prompts, right, wrong)
    assert task.solved(tiny_llama).tolist() == [True, False]
    assert len(task.only_solved(tiny_llama)) == 1
    with pytest.raises(CalibrationError, match="solves 1 of 2"):
        task.only_solved(tiny_llama, least=2)


def test_bad_input_is_named(language):
    one, two = torch.tensor([1]), torch.tensor([1, 2])
    with pytest.raises(CalibrationError, match="different numbers of tokens"):
        CircuitTask([one], [two], torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(CalibrationError, match=r"\(1, 0, 1, 1\)"):
        CircuitTask([one], [], torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ConfigurationError, match="metric is 'rank'"):
        CircuitTask([one], [one], torch.zeros(1, 1), torch.zeros(1, 1), "rank")
    with pytest.raises(ConfigurationError, match="no attribute 'verb'"):
        changed(language.sample(2), language.sizes, "verb")
    with pytest.raises(ConfigurationError, match="slots"):
        NameLanguage((1, "first"), (1, 2, 3), (4, 5), (6, 7))
    with pytest.raises(CalibrationError, match="single tokens"):
        NameLanguage.of(WordTokenizer(), names=1000)
