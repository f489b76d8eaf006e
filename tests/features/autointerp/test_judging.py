from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from autointerp_corpus import AFTER_THE, NUMBER, THE, Scripted
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.autointerp.explainers import PromptedExplainer, TokenExplainer, spread
from gossamer.features.autointerp.judges import OfflineJudge, PromptedJudge
from gossamer.features.autointerp.lexical import evidence, whole_words
from gossamer.features.autointerp.predicates import KINDS, Clause, Predicate, parse
from gossamer.features.autointerp.prompts import read_explanation
from gossamer.features.autointerp.score import Score, auc, auc_interval, paired_p_value
from gossamer.features.autointerp.scorers import DetectionScorer, FuzzingScorer, IntruderScorer, SimulationScorer

TRUE = {
    THE: 'the token is one of ["the"]',
    NUMBER: "the token is a number",
    AFTER_THE: 'the previous token is one of ["the"]',
}


# ------------------------------------------------------------------------------------------------ predicates


def test_predicates_are_carried_out():
    pieces = ["The", " 19", " whales", ".", " It", " said", ' "', "no"]
    assert parse("the token is a number").holds(pieces).tolist() == [False, True] + [False] * 6
    assert parse('The previous token is one of ["the"].').holds(pieces).tolist() == [False, True] + [False] * 6
    assert KINDS["the beginning of a sentence"](pieces).tolist() == [False] * 4 + [True] + [False] * 3
    assert KINDS["a quotation mark"](pieces).tolist() == [False] * 6 + [True, False]
    assert KINDS["a continued word"](pieces).tolist() == [True] + [False] * 6 + [True]
    both = parse('the token is punctuation or the token is one of ["it", "no"]')
    assert np.flatnonzero(both.holds(pieces)).tolist() == [3, 4, 6, 7]


words = st.lists(
    st.text(min_size=1, max_size=6).map(lambda t: t.strip().casefold()).filter(bool), min_size=1, max_size=4
)
clauses = st.one_of(
    st.builds(Clause, st.booleans(), words.map(tuple)),
    st.builds(Clause, st.booleans(), st.just(()), st.sampled_from(sorted(KINDS))),
)


@given(st.lists(clauses, min_size=1, max_size=3))
def test_predicates_are_read_as_they_are_written(said):
    predicate = Predicate(tuple(said))
    found = parse(str(predicate))
    pieces = [" a", "7", *(word for clause in said for word in clause.words)]
    assert found is not None
    assert found.holds(pieces).tolist() == predicate.holds(pieces).tolist()


@pytest.mark.parametrize("text", ["", "words about whales", "the token is one of []", "the token is a number and more"])
def test_free_text_is_no_predicate(text):
    assert parse(text) is None


def test_a_clause_needs_words_or_a_known_kind():
    with pytest.raises(ConfigurationError, match="a clause has words"):
        Clause()
    with pytest.raises(ConfigurationError, match="a clause has words"):
        Clause(kind="green")


# ------------------------------------------------------------------------------------------------ lexical


def test_words_speak_for_tokens_of_the_same_stem_and_quoted_text_for_itself():
    pieces = [" The", " wh", "aling", " ships", " of", " Nan", "tucket", ",", " 1851"]
    assert whole_words(pieces) == ["the", "whaling", "whaling", "ships", "of", "nantucket", "nantucket", "", "1851"]
    assert evidence("mentions of whaling and a ship", pieces).tolist() == [0, 1, 1, 0.7, 0, 0, 0, 0, 0]
    assert evidence('the word "of"', pieces).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert evidence("commas and numbers", pieces).tolist() == [0] * 7 + [1, 1]
    assert evidence('the phrase "ships of"', pieces).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert evidence("words that are used in the text", pieces) is None


@given(st.text(max_size=60), st.lists(st.text(max_size=8), max_size=12))
def test_evidence_is_between_nothing_and_one(explanation, pieces):
    found = evidence(explanation, pieces)
    assert found is None or (len(found) == len(pieces) and ((found >= 0) & (found <= 1)).all())


# ------------------------------------------------------------------------------------------------ scores


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_area_is_that_of_scikit_learn(positive, negative):
    truth = [1] * len(positive) + [0] * len(negative)
    assert auc(positive, negative) == pytest.approx(roc_auc_score(truth, positive + negative))


def test_interval_holds_the_area_and_narrows_with_more_windows():
    draw = np.random.default_rng(0)
    few, many = (auc_interval(draw.normal(1, 1, n), draw.normal(0, 1, n)) for n in (10, 400))
    assert 0 <= few[0] < few[1] <= 1
    assert many[0] <= 0.76 <= many[1]  # P(N(1, 1) > N(0, 1)) = 0.760
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert auc_interval([1.0], [0.0, 0.5]) is None
    with pytest.raises(NonFiniteError, match="must abstain"):
        auc([math.nan], [0.0])


def test_p_value_counts_the_ways_to_flip_signs():
    assert paired_p_value([1.0, 1.0, 1.0]) == 1 / 8
    assert paired_p_value([-1.0]) == 1.0
    assert paired_p_value([0.1] * 60) < 1e-3
    assert paired_p_value([]) == 1.0


# ------------------------------------------------------------------------------------------------ offline


@pytest.mark.parametrize("latent", [THE, NUMBER, AFTER_THE])
@pytest.mark.parametrize("scorer", [DetectionScorer, FuzzingScorer])
def test_true_explanations_score_one_and_those_of_others_about_one_half(builder, latent, scorer):
    record, judge = builder.build(latent), OfflineJudge()
    true = scorer(judge).score(record, TRUE[latent])
    # what comes after "the" is seen with it in the same window, except at the window's edge
    assert true.value > (0.8 if latent == AFTER_THE else 0.99)
    assert true.low <= true.value <= true.high
    assert true.abstained == 0
    assert set(true.per_quantile) == {1, 2, 3, 4, 5}
    other = scorer(judge).score(record, TRUE[NUMBER if latent != NUMBER else THE])
    assert other.value < 0.75


def test_simulation_of_the_truth_correlates_and_that_of_another_does_not(builder):
    record = builder.build(THE)
    scorer = SimulationScorer(OfflineJudge())
    assert scorer.score(record, TRUE[THE]).value > 0.85
    assert abs(scorer.score(record, TRUE[NUMBER]).value) < 0.3


def test_wrong_marks_in_active_windows_are_on_silent_tokens(builder):
    record = builder.build(THE)
    shown, marks, right = FuzzingScorer(OfflineJudge(), wrong="active").marked(record)
    wrong = [(w, m) for w, m, r in zip(shown, marks, right) if not r]
    count = math.ceil(np.mean([w.marks().sum() for w in record.test]))
    assert len(wrong) == len(record.test)
    assert all(m.sum() == count and not (m & (w.values > 0)).any() for w, m in wrong)
    assert FuzzingScorer(OfflineJudge(), wrong="active").score(record, TRUE[THE]).value == 1.0
    with pytest.raises(ConfigurationError, match="wrong is"):
        FuzzingScorer(OfflineJudge(), wrong="nowhere")


def test_neighbours_lower_the_score_of_an_explanation_that_is_too_wide(builder, activity, tokenizer):
    wide = 'the token is one of ["the", "of"]'
    hard = replace(builder.settings, negatives=("neighbour",))
    easy_score = FuzzingScorer(OfflineJudge()).score(builder.build(THE), wide).value
    record = type(builder)(activity, tokenizer, hard).build(THE)
    assert FuzzingScorer(OfflineJudge()).score(record, wide).value < easy_score - 0.3


def test_strong_windows_alone_overrate_narrow_explanations(builder, tokenizer, activity):
    record = builder.build(THE)
    strong = replace(record, test=[w for w in record.test if w.quantile == 5])
    # an explanation that knows only the strong half: true where activations are above the median
    cut = np.median([w.peak for w in record.test])

    class Narrow(OfflineJudge):
        def active(self, explanation, windows):
            return [float(w.peak > cut) for w in windows]

    scorer = DetectionScorer(Narrow())
    assert scorer.score(strong, "").value > scorer.score(record, "").value + 0.2


def test_abstentions_are_counted_and_never_a_no(builder):
    record = builder.build(THE)
    nothing = DetectionScorer(OfflineJudge()).score(record, "words of the text")
    assert nothing.value is None
    assert (nothing.count, nothing.abstained, nothing.answered) == (0, 40, 0.0)
    turns = iter(range(1000))
    judge = PromptedJudge(
        Scripted(lambda said: None if next(turns) % 2 else ("1" if " the" in said.split("Text:")[1] else "0"))
    )
    half = DetectionScorer(judge).score(record, "the")
    assert (half.count, half.abstained, half.value) == (20, 20, 1.0)


def test_scores_survive_the_file(builder):
    score = DetectionScorer(OfflineJudge()).score(builder.build(THE), TRUE[THE])
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score


# ------------------------------------------------------------------------------------------------ explaining


@pytest.mark.parametrize("latent", [THE, NUMBER, AFTER_THE])
def test_counting_finds_the_rule_of_planted_latents(builder, latent):
    record = builder.build(latent)
    found = TokenExplainer().explain(record)
    held_out = np.concatenate([w.values > 0 for w in (*record.test, *record.negatives)])
    said = np.concatenate([parse(found).holds(w.pieces) for w in (*record.test, *record.negatives)])
    assert (said == held_out).mean() > 0.97
    assert TokenExplainer().explain(record) == found


def test_no_active_token_gives_no_explanation(builder):
    record = builder.build(THE)
    assert TokenExplainer().explain(replace(record, train=[], contrast=record.contrast)) is None


def test_the_prompt_shows_marks_strengths_thoughts_and_counterexamples(builder):
    record = builder.build(THE)
    client = Scripted(lambda _: "thinking…\n[EXPLANATION]: The word the.\n")
    explainer = PromptedExplainer(client, strengths=True, step_by_step=True, contrast=True, windows=5)
    assert explainer.explain(record) == "The word the."
    system, asked = client.heard[0][0]["content"], client.heard[0][-1]["content"]
    assert "in steps" in system
    assert "strength" in system
    assert asked.count("<<") >= 5
    assert asked.count("Strengths:") == 5
    assert "Counterexamples:" in asked
    roles = [message["role"] for message in client.heard[0]]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]
    for window in record.test:
        assert window.text.strip() not in asked


def test_latents_of_single_tokens_may_be_explained_by_these_alone(builder):
    record = builder.build(THE)
    single = replace(record, train=[w for w in record.train if w.marks().sum() == 1])
    client = Scripted(lambda said: f"[EXPLANATION]: {json.loads(said)[0]}")
    assert PromptedExplainer(client, single_token=True).explain(single) == "the"


@pytest.mark.parametrize(
    ("reply", "said"),
    [(None, None), ("no mark", None), ("[EXPLANATION]:", None), ("[EXPLANATION]: a\n[EXPLANATION]: b \nc", "b")],
)
def test_explanations_are_read_from_the_last_mark(reply, said):
    assert read_explanation(reply) == said


def test_windows_are_spread_over_all_strengths(builder):
    record = builder.build(THE)
    shown = spread(record.train, 3)
    assert shown[0] is record.train[0]
    assert shown[-1] is record.train[-1]
    assert len(shown) == 3


# ------------------------------------------------------------------------------------------------ prompted


def test_a_prompted_judge_takes_one_window_at_a_time_or_several(builder):
    record = builder.build(THE)

    def right(text):
        return "1" if " the " in f"{text} " else "0"

    one = Scripted(lambda said: right(said.split("Text:")[1]))
    assert DetectionScorer(PromptedJudge(one)).score(record, "the").value == 1.0
    assert len(one.heard) == 40

    def listed(said):
        return str([int(right(line.split(":", 1)[1])) for line in said.split("\n")[1:]])

    several = Scripted(listed)
    assert DetectionScorer(PromptedJudge(several, per_prompt=7)).score(record, "the").value == 1.0
    assert len(several.heard) == 6
    short = PromptedJudge(Scripted(lambda _: "[1, 0]"), per_prompt=5)
    assert DetectionScorer(short).score(record, "the").abstained == 40


def test_a_prompted_judge_sees_the_marks(builder):
    record = builder.build(NUMBER)
    client = Scripted(lambda said: "1" if "<< 7>>" in said or "<< 19>>" in said else "0")
    assert FuzzingScorer(PromptedJudge(client)).score(record, "numbers").value > 0.95


def test_a_prompted_judge_simulates_with_a_list_of_numbers(builder):
    record = builder.build(NUMBER)

    def strengths(said):
        return str([10 if piece.strip().isdigit() else 0 for piece in json.loads(said.split("Tokens: ")[1])])

    score = SimulationScorer(PromptedJudge(Scripted(strengths))).score(record, "numbers")
    assert score.value > 0.85
    wrong = SimulationScorer(PromptedJudge(Scripted(lambda _: "[1, 2]"))).score(record, "numbers")
    assert (wrong.value, wrong.abstained) == (None, 40)


def test_an_intruder_is_told_by_its_marks(builder):
    record = builder.build(NUMBER)

    def odd_one(said):
        lines = said.split("\n")
        return next((line[0] for line in lines if "<< 7" not in line and "<< 19" not in line), "1")

    score = IntruderScorer(Scripted(odd_one), shown=4).score(record)
    assert score.value > 0.9
    assert score.facts["by_guessing"] == 0.25
    assert IntruderScorer(Scripted(lambda _: "1"), shown=4).score(record).value < 0.6
    with pytest.raises(ConfigurationError, match="shown is 2"):
        IntruderScorer(Scripted(odd_one), shown=2)
