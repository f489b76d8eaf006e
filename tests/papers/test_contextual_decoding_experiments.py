from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch

from gossamer.models.load import LoadedModel
from gossamer.papers import core_pictures, corematching, sirius
from gossamer.papers.chain_arithmetic import Chains
from gossamer.papers.core_pictures import cells_of_patches, draw_pictures, picture_quiz
from gossamer.papers.corematching import draw_quiz, overlap_of_random_weights


class Letters:
    """Tokenises text into characters."""

    bos_token_id = eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 97 for letter in text]}


@pytest.fixture
def tiny(monkeypatch, tiny_llama):
    for module in (sirius, corematching):
        monkeypatch.setattr(module, "load", lambda source, dtype: LoadedModel(tiny_llama, Letters(), source))
    return tiny_llama


def quietly(items, description):
    return iter(items)


@pytest.mark.slow  # half a minute: it trains, decodes in every way, and does it twice
def test_sirius_goes_through_every_case_and_leaves_the_model_as_it_was(tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    small = {
        "steps": 3,
        "batch": 4,
        "width": 16,
        "middle": 32,
        "prompts": 2,
        "ablation_prompts": 1,
        "page": 20,
        "new": 6,
    }
    observed = sirius.run({**sirius.QUICK, **small}, 0, quietly)
    json.dumps(observed, allow_nan=False)
    assert set(sirius.QUICK["ablations"]) <= {name.rpartition(", ")[2] for name in observed["points"]}
    assert observed["points"]["Sirius on CSparse, no rollback"]["rollbacks a check"] == 0
    assert observed["density"]["CSparse"] < observed["density"]["FSparse"] < 1
    # whatever the draft, speculative decoding says what the full model says
    again = sirius.run({**sirius.QUICK, **small, "ablation_prompts": 2, "ablations": {}}, 0, quietly)["points"]
    assert again["speculative on CSparse"]["exact"] == again["full"]["exact"]
    assert again["speculative on FSparse"]["tokens"] == again["full"]["tokens"]
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_chains_follow_their_rule():
    chains = Chains(shown=3, asked=4)
    for text in chains.draw(20, torch.Generator().manual_seed(0)).tolist():
        a, b = (1, 3)[text[0] - 31], text[1] - 31 - 2 + 1
        assert 1 <= b <= 8
        assert all((a * x + b) % 31 == y for x, y in pairwise(text[2:]))
        assert len(text) == chains.prompt + 4
    long = Chains().draw(20, torch.Generator().manual_seed(0))[:, 2:]
    assert not any(len(set(text[:30])) < 30 for text in long.tolist() if len(set(text)) > 1)  # nothing to copy
    truth = chains.draw(2, torch.Generator().manual_seed(1))
    wrong = truth.clone()
    wrong[0, -1] += 1
    wrong[:, 0] += 1  # the prompt does not count
    assert chains.right(wrong, truth) == {"exact": 0.5, "tokens": pytest.approx(7 / 8)}


def chain_observations(full=1.0, sparse=0.5, ours=0.98, aal=15.0, spread=0.01):
    made = []
    for seed in range(3):
        shift = spread * (seed - 1)
        points = {"full": full, "CSparse": sparse + shift, "Sirius on CSparse": ours}
        points = {name: {"exact": value} for name, value in points.items()}
        points["Sirius on CSparse"]["aal"] = aal + 10 * shift
        made.append({"points": points, "window": 16, "real": {}})
    return made


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"sparse": 0.9}, "does not hold"),  # nothing to mend
        ({"sparse": 0.79}, "inconclusive"),
        ({"ours": 0.6}, "does not hold"),
        ({"ours": 0.925}, "inconclusive"),
        ({"aal": 6.0}, "does not hold"),
        ({"aal": 12.85}, "inconclusive"),
    ],
)
def test_the_rule_of_sirius(changes, outcome):
    assert sirius.decide(chain_observations(**changes)).outcome == outcome


def test_one_seed_decides_nothing():
    assert sirius.decide(chain_observations()[:1]).outcome == "inconclusive"
    assert corematching.decide(matched()[:1]).outcome == "inconclusive"


# ----------------------------------------------------------------------------------------- corematching


SMALL = {"page": 24, "pages": 3, "question": 6, "answer": 6, "prompts": 2, "steps": 2, "simulated_neurons": 500}
PICTURES = {"training": 8, "width": 16, "layers": 2, "steps": 3, "batch": 2, "pictures": 2, "shares": [0.25]}


def test_corematching_goes_through_every_case_and_leaves_the_model_as_it_was(tiny, drawn_digits, monkeypatch):
    monkeypatch.setattr(core_pictures, "digits", lambda: drawn_digits)
    settings = {**corematching.QUICK, **SMALL, "pictures": {**corematching.QUICK["pictures"], **PICTURES}}
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    observed = corematching.run(settings, 0, quietly)
    json.dumps(observed, allow_nan=False)
    for row in observed["tokens"]:
        assert row["full"]["kept"] == 1 + 72 + 6
        assert row["full"]["relevant"] == pytest.approx(1 / 3)
        for share in corematching.QUICK["shares"]:
            assert len({row[f"{name} at {share}"]["kept"] for name in ("core", "attention", "random", "norm")}) == 1
    assert set(observed["neurons"][0]) == {"all", "core", *corematching.OTHER_NEURONS}
    # with all neurons, and nothing dropped, it is the plain model
    assert observed["neurons"][0]["all"] == pytest.approx(observed["tokens"][0]["full"]["loss"], rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert tiny.config._attn_implementation == "sdpa"
    # of three layers, the caches of the one that is the 6th to the 19th of 32 are thinned out
    assert {row["layers"] for row in observed["released schedule"]} == {1}
    assert all(0 < row["kept"] < 1 for row in observed["released schedule"])
    pictures = observed["pictures"]["tokens"]
    assert pictures["full"]["kept"] == 1 + 36 + 2
    assert pictures["full"]["relevant"] == pytest.approx(4 / 36)
    assert {pictures[f"{name} at 0.25"]["kept"] for name in ("core", "attention", "random", "last")} == {1 + 9 + 2}
    assert set(observed["pictures"]["neurons"]) == {"all", "core", "random"}
    assert observed["pictures"]["neurons"]["all"] == pytest.approx(pictures["full"]["loss"], rel=1e-4)


def test_a_picture_shows_what_its_question_asks_for(drawn_digits):
    def is_line(pixels):
        return pixels.min() == pixels.max() > 2  # white; digits have no straight border

    for seed in range(6):
        quiz = picture_quiz(drawn_digits, torch.Generator().manual_seed(seed))
        pixels = quiz.inputs["pixel_values"][0, 0]
        place = cells_of_patches()[quiz.relevant[1:37]].unique()
        assert len(place) == 1
        assert quiz.relevant.sum() == 4
        row, column = divmod(int(place), 3)
        cell = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        upright = int(quiz.prompt[0, -2]) - core_pictures.LINES
        ends = (cell[:, 0], cell[:, -1]) if upright else (cell[0], cell[-1])
        assert all(is_line(end) for end in ends)
        shown = torch.nn.functional.avg_pool2d(drawn_digits.images[drawn_digits.labels == quiz.answer.item()], 2)
        inner = (shown[:, 0, 1:-1, 1:-1] - 0.13) / 0.31
        assert float((inner - cell[1:-1, 1:-1]).abs().amax((1, 2)).min()) < 1e-5
        assert quiz.droppable.tolist() == [False, *[True] * 36, False, False]


def test_patches_know_their_place_and_digits_their_label(drawn_digits):
    assert cells_of_patches().view(6, 6)[:3].tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    pixels, shown, marked = draw_pictures(drawn_digits, 5, torch.Generator().manual_seed(1))
    assert pixels.shape == (5, 1, 42, 42)
    assert shown.shape == (5, 9)
    assert bool((marked[:, 0] != marked[:, 1]).all())
    again = draw_pictures(drawn_digits, 5, torch.Generator().manual_seed(1))
    assert torch.equal(pixels, again[0])


def test_a_quiz_asks_for_what_its_relevant_page_says():
    book, others = torch.arange(1000, 2000), torch.arange(5000, 6000)
    for seed in range(5):
        quiz = draw_quiz(book, others, {**corematching.QUICK, **SMALL}, torch.Generator().manual_seed(seed))
        own = quiz.prompt[0, quiz.relevant].tolist()
        assert own == list(range(own[0], own[0] + 24))
        question = quiz.prompt[0, -6:].tolist()
        said = [*question, *quiz.answer[0].tolist()]
        assert said == list(range(question[0], question[0] + 12))
        assert set(said) <= set(own)
        assert not quiz.droppable[-6:].any()
        assert not quiz.droppable[0]
        assert quiz.droppable.sum() == 72


def test_overlap_tells_the_angle():
    found = overlap_of_random_weights(4096, 0)
    assert found["correlation with cosine"] > 0.98
    assert found["correlation with formula"] > 0.998
    assert found["largest error, share of neurons"] < 0.03


def matched(core=1.0, attention=1.5, other=1.3, correlation=0.995, spread=0.02):
    made = []
    for seed in range(3):
        rows = []
        for number in range(2):
            shift = spread * (seed - 1 + 0.3 * number)
            losses = {"core": core, "attention": attention + shift, "random": 2 + shift}
            losses |= {"norm": 2.0, "last": 2.0, "attention and angle": 1.4 - shift}
            rows.append({f"{name} at 0.2": {"loss": value} for name, value in losses.items()})
        cell = {"all": 0.9, "core": 1.0, "random": 3 + seed / 9, "largest weights": 2 + seed / 9}
        cells = [{**cell, "another prompt": other + spread * seed}]
        overlap = {"correlation with cosine": correlation}
        pictures = {"tokens": {"core at 0.4": {"right": 0.5, "loss": 1.0}}, "neurons": {"all": 0.5, "core": 0.6}}
        told = {"cost": {"times": 2.0}, "pictures": pictures, "released schedule": [{"loss": 1.0 + seed, "kept": 0.4}]}
        made.append({"tokens": rows, "neurons": copy.deepcopy(cells), "overlap": overlap, **told})
    return made


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"attention": 0.5}, "does not hold"),
        ({"attention": 1.0}, "inconclusive"),
        ({"other": 0.6}, "does not hold"),
        ({"correlation": 0.98}, "does not hold"),
    ],
)
def test_the_rule_of_corematching(changes, outcome):
    verdict = corematching.decide(matched(**changes))
    assert verdict.outcome == outcome
    assert verdict.numbers["released schedule, loss"] == pytest.approx(2)
    assert verdict.numbers["pictures, right, core at 0.4"] == pytest.approx(0.5)
    assert verdict.numbers["pictures, neurons, loss, core"] == pytest.approx(0.6)
