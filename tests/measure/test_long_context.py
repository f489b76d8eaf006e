"""Tasks of exact length, answers in two phases, and the statistics of what sparsity costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context import (
    TASKS,
    CommonWords,
    Frontier,
    Needle,
    QuestionAnswering,
    Row,
    Sample,
    StoryFiltering,
    StoryMultihop,
    StoryRetrieval,
    VariableTracking,
    answers,
    decoded_nll,
    draw,
    fit_sparse_attention_law,
    holm,
    isoflops,
    max_safe_sparsity,
    paired_test,
    prompts_needed,
    small_vocabulary,
    validate_law,
)
from gossamer.measure.long_context.isoflops import flops
from gossamer.measure.long_context.reading import questions
from gossamer.measure.long_context.sample import sentences_of
from gossamer.measure.perplexity import perplexity

PROSE = [
    Needle(),
    Needle(queries=3, distractors=None),
    VariableTracking(),
    CommonWords(),
    QuestionAnswering(),
    QuestionAnswering(source="novel"),
    StoryRetrieval(),
    StoryMultihop(),
    StoryFiltering(),
]
TERSE = [task(wording="terse") for name, task in TASKS.items() if not name.startswith("question-answering")]


class Characters:
    """A tokenizer with a token a letter, and a first token of its own."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [1 + ord(letter) for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids, **options):
        return "".join(chr(int(number) - 1) for number in ids if int(number) > 1)


class Chat(Characters):
    """One that frames what a user says."""

    chat_template = "yes"

    def apply_chat_template(self, messages, **options):
        return f"<user>{messages[0]['content']}<model>"


def named(task):
    return f"{task.name} {task.wording}"


@pytest.mark.parametrize("task", PROSE, ids=named)
@pytest.mark.parametrize("length", [2000, 2357])
def test_prompts_have_exactly_the_length_asked_for(task, length):
    sample = task.sample(np.random.default_rng(0), length, Characters())
    assert len(sample.prompt) == length
    assert sample.prompt[0] == 1


@pytest.mark.parametrize("task", TERSE, ids=named)
@pytest.mark.parametrize("length", [96, 131, 512])
def test_terse_prompts_have_exactly_the_length_asked_for(task, length):
    tokenizer = small_vocabulary()
    sample = task.sample(np.random.default_rng(1), length, tokenizer)
    assert len(sample.prompt) == length
    assert 2 not in sample.prompt  # no word is unknown


@pytest.mark.parametrize("task", PROSE + TERSE, ids=named)
def test_the_right_answer_scores_one_and_nothing_scores_zero(task):
    tokenizer = small_vocabulary() if task.wording == "terse" else Characters()
    for seed in range(5):
        sample = task.sample(np.random.default_rng(seed), 128 if task.wording == "terse" else 2500, tokenizer)
        assert task.score(sample.answer, sample.gold) == 1
        assert task.score("", sample.gold) == 0


@pytest.mark.parametrize("task", [*PROSE[:3], *PROSE[4:]], ids=named)
def test_what_is_hidden_is_never_cut(task):
    tokenizer = Characters()
    for seed in range(5):
        sample = task.sample(np.random.default_rng(seed), 2000, tokenizer)
        text = tokenizer.decode(sample.prompt[1:])
        for start, end in sample.evidence:
            piece = tokenizer.decode(sample.prompt[start:end])
            assert piece in text
            assert piece.rstrip()[-1] in ".…;"
        if not isinstance(task, StoryFiltering | QuestionAnswering):
            assert all(
                any(right in tokenizer.decode(sample.prompt[a:b]) for a, b in sample.evidence) for right in sample.gold
            )


def test_filler_is_the_text_itself():
    tokenizer = Characters()
    sample = Needle(distractors=0).sample(np.random.default_rng(3), 1500, tokenizer)
    start = sample.evidence[0][0]
    before = tokenizer.decode(sample.prompt[1:start]).split("\n\n")[-1].strip()
    assert before[-60:] in " ".join(sentences_of("moby-dick"))


def test_a_chat_template_frames_the_prompt_and_the_answer_begins_with_its_turn():
    tokenizer = Chat()
    text = tokenizer.decode(Needle().sample(np.random.default_rng(0), 1200, tokenizer).prompt)
    assert text.startswith("<user>Code numbers")
    assert "<model>The code number of the" in text


def test_both_sources_of_questions_are_tasks_of_their_own():
    assert TASKS["question-answering"]().source == "addresses"
    assert TASKS["question-answering-novel"]().source == "novel"


def test_too_short_prompts_are_refused_with_what_is_needed():
    with pytest.raises(ConfigurationError, match=r"max_tokens is 100; this task needs at least \d+"):
        Needle().sample(np.random.default_rng(0), 100, Characters())


def test_every_question_about_the_novel_has_its_answer_in_its_passage():
    for question in questions("novel"):
        found = [answer for answer in question.answers if all(part in question.passage for part in answer.split(", "))]
        assert found, question.text
    assert len(questions("addresses")) == 36


@pytest.mark.parametrize(
    ("task", "prediction", "gold", "score"),
    [
        (Needle(queries=2), " 111. The code number of the red hat is 222.", ("111", "222"), 1.0),
        (Needle(queries=2), " 222, 111", ("111", "222"), 0.5),
        (VariableTracking(), " ABCD, EFGH and IJKL.", ("ABCD", "EFGH"), 2 / 3),
        (CommonWords(), " whale, ship and sea", ("sea", "ship", "wind"), 0.5),
        (StoryRetrieval(), " Mossgate, by coach. Then", ("Mossgate",), 1.0),
        (StoryRetrieval(), " Moss. Mossgate", ("Mossgate",), 0.0),
        (StoryFiltering(), " 2, 3 and 7. In chapter 9", ("2", "3"), 2 / 3),
        (QuestionAnswering(), " The harpooneer Daggoo.", ("Daggoo",), 2 / 3),
    ],
)
def test_answers_are_scored_by_what_they_name(task, prediction, gold, score):
    assert task.score(prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize("task", PROSE, ids=lambda task: task.name)
def test_with_reasoning_the_answer_is_what_follows_it(task):
    reasoned = replaced(task, reasoning=True)
    plain, sample = (one.sample(np.random.default_rng(0), 6000, Characters()) for one in (task, reasoned))
    assert len(sample.prompt) == 6000
    assert (sample.gold, sample.answer) == (plain.gold, plain.answer)
    assert sample.max_new_tokens == plain.max_new_tokens + 256
    text = Characters().decode(sample.prompt)
    assert text.endswith("Then write 'Answer:' and nothing but the answer.")
    assert reasoned.judge(f"Could it be nothing? Answer: none. No. Answer:{sample.answer}", sample.gold) == 1.0
    assert reasoned.judge(sample.answer, sample.gold) == 0.0
    assert task.judge(sample.answer, sample.gold) == 1.0


def test_terse_prompts_have_no_words_to_reason_in():
    with pytest.raises(ConfigurationError, match="too few to reason in"):
        Needle(wording="terse", reasoning=True)


def test_common_words_are_common_and_the_others_rare():
    tokenizer = small_vocabulary()
    sample = CommonWords(wording="terse", common=2, share=0.4).sample(np.random.default_rng(0), 400, tokenizer)
    counts = {word: tokenizer.decode(sample.prompt).split().count(word) for word in sample.gold}
    others = [word for word in tokenizer.decode(sample.prompt[:-2]).split() if word not in sample.gold]
    assert min(counts.values()) > 4 * max(others.count(word) for word in set(others))


def test_the_same_seed_draws_the_same_prompts():
    tokenizer = small_vocabulary()
    task = Needle(wording="terse")
    assert draw(task, tokenizer, 64, 3, 0) == draw(task, tokenizer, 64, 3, 0) != draw(task, tokenizer, 64, 3, 1)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = small_vocabulary()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval(), tokenizer


class TestPrediction:
    def test_answers_are_those_of_generate(self, tiny):
        model, tokenizer = tiny
        samples = draw(Needle(wording="terse", queries=3), tokenizer, 64, 3, 0)
        found = answers(model, samples, tokenizer, batch_size=2, decoded_prompt=1)
        assert found == answers(model, samples, tokenizer, batch_size=3, decoded_prompt=0)
        for sample, answer in zip(samples, found):
            ids = torch.tensor([sample.prompt])
            made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=1)[0, 64:]
            assert answer == tokenizer.decode(made, skip_special_tokens=True)

    @pytest.mark.parametrize(("decoded", "wanted"), [(0, [64, 1]), (1, [63, 1, 1]), (3, [61, 1, 1, 1, 1])])
    def test_the_end_of_the_prompt_is_read_or_decoded(self, tiny, decoded, wanted):
        model, tokenizer = tiny
        sample = replaced(draw(Needle(wording="terse"), tokenizer, 64, 1, 0)[0], max_new_tokens=2)
        lengths = []
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        answers(model, [sample], tokenizer, decoded_prompt=decoded)
        handle.remove()
        assert lengths == wanted

    def test_decoded_tokens_are_as_likely_as_in_one_pass(self, tiny):
        model, tokenizer = tiny
        ids = torch.tensor([draw(Needle(wording="terse"), tokenizer, 64, 1, 0)[0].prompt])
        one_by_one = decoded_nll(model, ids, 40)
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[40:, 0]
        assert torch.allclose(one_by_one, -logs, atol=1e-5)
        assert math.isfinite(perplexity(model, ids, 64, 64, progress=False).value)

    def test_prompts_of_different_lengths_are_refused(self, tiny):
        model, tokenizer = tiny
        samples = [Sample((3,) * length, ("a",), "a", (), 1) for length in (5, 6)]
        with pytest.raises(ConfigurationError, match=r"prompts have \[5, 6\] tokens"):
            answers(model, samples, tokenizer)


def row(accuracies, sparsity=0.5, method="m", **options):
    shape = {"model": "a", "parameters": 1000, "layers": 2, "heads": 4, "head_size": 8, "phase": "prefill"}
    shape |= {"task": "t", "length": 128, "realised": sparsity, "method": method, "sparsity": sparsity}
    return Row(**shape | {"scores": tuple(accuracies)} | options)


class TestSafety:
    def test_lost_prompts_are_counted_by_the_binomial_distribution(self):
        dense, sparse = [1.0] * 30, [0.0] * 2 + [1.0] * 28
        chance = sum(math.comb(30, lost) * 0.1**lost * 0.9 ** (30 - lost) for lost in range(3))
        found = paired_test(sparse, dense, tolerance=0.1)
        assert found.mean == pytest.approx(-2 / 30)
        assert found.p_value == pytest.approx(chance)
        # at its lower bound, as few lost prompts have a chance of alpha
        chance = sum(math.comb(30, lost) * (-found.low) ** lost * (1 + found.low) ** (30 - lost) for lost in range(3))
        assert chance == pytest.approx(0.05)
        assert paired_test([0.0] * 10, [1.0] * 10).p_value == 1.0
        assert paired_test([0.0] * 10, [1.0] * 10).low == -1.0

    def test_fewer_prompts_than_needed_never_convince(self):
        assert (prompts_needed(), prompts_needed(0.1), prompts_needed(tasks=4)) == (59, 29, 86)
        for graded, needed in ((False, 59), (True, prompts_needed(graded=True))):
            equal = [1.0] * needed
            assert paired_test(equal, equal, graded=graded).p_value <= 0.05
            assert paired_test(equal[1:], equal[1:], graded=graded).p_value > 0.05

    @pytest.mark.parametrize("count", [2, 4, 10, 20, 40, 80])
    def test_scores_of_0_and_1_keep_the_level_at_any_number_of_prompts(self, count):
        generator = np.random.default_rng(count)
        dense = np.ones(count)
        lost = generator.random((500, count)) < 0.05  # true loss exactly at the tolerance
        rejected = np.mean([paired_test(1.0 - one, dense, graded=False).p_value <= 0.05 for one in lost])
        assert rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)

    @pytest.mark.parametrize("count", [2, 60])
    @pytest.mark.parametrize("low", [0.0, 0.5])
    def test_graded_scores_keep_the_level_at_any_number_of_prompts(self, count, low):
        generator = np.random.default_rng(count)
        share = 0.1 / (1 - low)  # so that a tenth is lost on average
        sparse = np.where(generator.random((200, count)) < share, low, 1.0)
        rejected = np.mean(
            [paired_test(one, np.ones(count), tolerance=0.1, graded=True).p_value <= 0.05 for one in sparse]
        )
        assert rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)

    def test_many_graded_scores_show_a_small_loss_by_pairs_alone(self):
        generator = np.random.default_rng(0)
        dense = generator.random(120)
        shuffled = generator.permutation(dense)
        close = paired_test(dense - 0.01, dense)
        assert close.p_value < 0.05 < paired_test(shuffled - 0.01, dense).p_value
        assert -0.05 < close.low < close.mean == pytest.approx(-0.01)

    def test_holm_is_stricter_than_each_alone_and_milder_than_bonferroni(self):
        assert holm({"a": 0.01, "b": 0.02, "c": 0.2}) == {"a", "b"}
        assert holm({"a": 0.03, "b": 0.04}) == set()
        assert holm({"a": 0.011, "b": 0.015, "c": 0.04, "d": 0.045}) == {"a", "b", "c", "d"} - {"c", "d"}

    def made(self, count=100, unable=0.0):
        good, bad, weak = [1.0] * count, [0.0] * count, [unable] * count
        rows = [row(good, 0.0, "dense", phase="dense", realised=0.0), row(good, 0.5), row(bad, 0.7), row(good, 0.9)]
        rows += [replaced(one, task="u") for one in rows[:2]] + [row(good, s, task="u") for s in (0.7, 0.9)]
        rows += [replaced(one, task="cannot", scores=tuple(weak)) for one in rows[:4]]
        return Frontier(tuple(rows))

    def test_the_largest_safe_sparsity_stops_at_the_first_loss(self):
        found = max_safe_sparsity(self.made())[0]
        assert found.tasks == {"t": 0.5, "u": 0.9}
        assert found.everywhere == 0.5
        assert found.outcomes["t"] == {0.5: True, 0.7: False, 0.9: False}
        assert [found.safe_at(sparsity) for sparsity in (0.5, 0.7, 0.9)] == [True, False, False]
        assert found.differences["t"][0.7].mean == -1.0

    def test_tasks_that_dense_attention_does_not_do_are_left_out(self):
        found = max_safe_sparsity(self.made(unable=0.4))[0]
        assert found.left_out == {"cannot": "dense attention scores 0.40, below 0.5"}
        assert "cannot" not in found.outcomes
        assert "cannot" in max_safe_sparsity(self.made(unable=0.4), able=0.3)[0].outcomes

    def test_too_few_prompts_conclude_nothing_but_a_loss(self):
        found = max_safe_sparsity(self.made(count=10))[0]
        assert found.tasks == {}
        assert found.everywhere is None
        assert [found.safe_at(sparsity) for sparsity in (0.5, 0.7, 0.9)] == [None, False, False]
        assert found.outcomes["u"] == {0.5: None, 0.7: None, 0.9: None}
        assert found.left_out["t"] == "10 prompts cannot tell; 72 are needed"
        nothing = max_safe_sparsity(Frontier(self.made().where(task="cannot").rows))[0]
        assert nothing.everywhere is None is nothing.safe_at(0.5)

    def test_what_cannot_be_tested_is_refused(self):
        with pytest.raises(ConfigurationError, match="2 and 3 scores"):
            paired_test([1.0, 1.0], [1.0] * 3)
        with pytest.raises(ConfigurationError, match=r"tolerance 1.0; they must be"):
            paired_test([1.0], [1.0], tolerance=1.0)
        with pytest.raises(ConfigurationError, match="must be above 0"):
            prompts_needed(tolerance=0.0)


def replaced(one, **changes):
    from dataclasses import replace

    return replace(one, **changes)


class TestIsoFlops:
    def test_a_prompts_operations_are_weights_pairs_and_choosing(self):
        dense = row([1.0], 0.0, "dense", phase="dense", realised=0.0)
        pairs = 128 * 129 / 2
        assert flops(dense, "prefill") == 2 * 1000 * 128 + 4 * 32 * 2 * pairs
        sparse = row([1.0], 0.75, realised=0.75, selection_flops=500.0)
        assert flops(sparse, "prefill") == 2 * 1000 * 128 + 4 * 32 * 2 * pairs * 0.25 + 500
        assert flops(sparse, "decode") == 2 * 1000 + 4 * 32 * 2 * 128  # decoding stays dense

    def test_methods_that_evict_choose_once_a_prompt(self):
        evicted = row([1.0], 0.75, "snap-kv", phase="decode", selection_flops=500.0)
        assert flops(evicted, "decode") == 2 * 1000 + 4 * 32 * 2 * 128 * 0.25
        assert flops(evicted, "prefill") == 2 * 1000 * 128 + 4 * 32 * 2 * 128 * 129 / 2 + 500
        every_token = row([1.0], 0.75, "quest", phase="decode", selection_flops=500.0)
        assert flops(every_token, "decode") == flops(evicted, "decode") + 500

    def test_a_large_sparse_model_can_win(self):
        small = row([0.2, 0.2], 0.0, "dense", phase="dense", realised=0.0)
        large = row([0.9, 0.9], 0.9, model="b", parameters=1100, selection_flops=0.0)
        found = isoflops(Frontier((small, large)), "prefill")[0]
        assert [(one.model, two.model) for one, two in found.large_sparse_wins] == [("a", "b")]
        assert found.small_dense_wins == ()
        assert [point.efficient for point in found.points] == [True, False]


class TestLaw:
    def made(self, noise=0.0):
        generator = np.random.default_rng(0)
        rows = []
        for parameters in (1e4, 1e5, 1e6):
            for length in (128, 256, 512):
                for sparsity in (0.0, 0.5, 0.75, 0.9):
                    for task, term in (("t", -4.0), ("u", -5.0)):
                        logit = term + 0.6 * math.log(parameters) - 0.3 * math.log(length)
                        logit += 0.5 * math.log(1 - sparsity) + noise * generator.normal()
                        accuracy = 1 / (1 + math.exp(-logit))
                        scores = (accuracy,) * 500
                        rows.append(
                            row(
                                scores,
                                sparsity,
                                parameters=int(parameters),
                                length=length,
                                task=task,
                                model=str(parameters),
                            )
                        )
        return Frontier(tuple(rows))

    def test_a_law_that_holds_is_found(self):
        law = fit_sparse_attention_law(self.made())
        assert law.coefficients["parameters"] == pytest.approx(0.6, abs=0.02)
        assert law.coefficients["length"] == pytest.approx(-0.3, abs=0.02)
        assert law.coefficients["sparsity"] == pytest.approx(-0.5, abs=0.02)
        assert law.tasks["t"] - law.tasks["u"] == pytest.approx(1.0, abs=0.02)
        assert law.r_squared > 0.999

    @pytest.mark.parametrize("axis", ["parameters", "length", "sparsity"])
    def test_it_predicts_the_largest_from_the_rest(self, axis):
        found = validate_law(self.made(0.05), axis)
        assert found.beats_baseline
        assert found.r_squared > 0.9 > found.baseline_r_squared

    def test_held_out_rows_are_not_seen(self):
        rows = self.made().rows
        largest = max(one.parameters for one in rows)
        spoiled = [replaced(one, scores=(0.5,) * 500) if one.parameters == largest else one for one in rows]
        assert validate_law(spoiled, "parameters").r_squared < 0.5

    def test_what_cannot_be_fitted_is_refused(self):
        with pytest.raises(ConfigurationError, match="no row has scores"):
            fit_sparse_attention_law([])
        with pytest.raises(ConfigurationError, match="parameters has 1 values"):
            validate_law([row([1.0], s) for s in (0.1, 0.5, 0.9)], "parameters")
        with pytest.raises(ConfigurationError, match="link is 'probit'"):
            fit_sparse_attention_law(self.made(), link="probit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needle(queries=0), "queries is 0"),
        (lambda: Needle(wording="verse"), "wording is 'verse'"),
        (lambda: VariableTracking(chains=0), "chains is 0"),
        (lambda: CommonWords(share=1.0), "share 1.0"),
        (lambda: StoryRetrieval(chapters=1), "chapters is 1"),
        (lambda: StoryFiltering(empty=0), "empty is 0"),
        (lambda: QuestionAnswering(wording="terse"), "wording must be 'prose'"),
        (lambda: QuestionAnswering(source="web"), "source is 'web'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
