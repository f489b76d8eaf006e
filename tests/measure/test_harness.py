from __future__ import annotations

import builtins
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError, MissingDependencyError, UnknownNameError
from gossamer.measure import evaluate_tasks, harness
from gossamer.measure.harness import TaskScore

RESULTS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25},
        "gsm": {"exact_match,strict": 0.125, "exact_match_stderr,strict": "N/A", "sample_len": 8},
    },
    "groups": {"arc": {"acc,none": 0.4}},
    "n-shot": {"arc_easy": 5, "arc": 5},
    "versions": {"arc_easy": 1.0},
}


class StubTasks:
    """Stands in for the harness's task manager."""

    all_tasks = ("arc_challenge", "arc_easy", "gsm")
    failure: Exception | None = None

    def __init__(self, include_path=None):
        self.include_path = include_path

    def match_tasks(self, names):
        return [task for task in self.all_tasks for name in names if task.startswith(name.rstrip("*"))]

    def load(self, names):
        if self.failure:
            raise self.failure
        return {"tasks": {name: f"task {name}" for name in names}, "groups": {}}


@pytest.fixture
def stub(monkeypatch):
    calls: dict = {}
    tasks = type("Tasks", (StubTasks,), {})

    def simple_evaluate(**arguments):
        calls.update(arguments)
        return RESULTS

    parts = SimpleNamespace(simple_evaluate=simple_evaluate), tasks, lambda **arguments: arguments
    monkeypatch.setattr(harness, "_import_harness", lambda: parts)
    return SimpleNamespace(calls=calls, tasks=tasks)


def test_scores_become_rows(stub):
    found = evaluate_tasks(nn.Identity(), "tokenizer", ["arc_easy", "gsm"])
    assert found.scores == (
        TaskScore("arc_easy", "acc", "none", 0.5, 0.1, 5),
        TaskScore("arc_easy", "acc_norm", "none", 0.25, None, 5),
        TaskScore("gsm", "exact_match", "strict", 0.125, None, None),
        TaskScore("arc", "acc", "none", 0.4, None, None),
    )
    assert found.value("arc_easy", "acc_norm") == 0.25
    assert found.versions == {"arc_easy": 1.0}
    with pytest.raises(UnknownNameError, match="did you mean 'arc_easy/acc'"):
        found.value("arc_esy")


def test_the_loaded_model_is_handed_over_as_it_is(stub):
    model, tokenizer = nn.Identity(), object()
    evaluate_tasks(model.train(), tokenizer, "arc_*", shots=3, limit=10, batch_size=4, seed=9)
    assert stub.calls["model"]["pretrained"] is model
    assert model.training
    assert stub.calls["model"]["tokenizer"] is tokenizer
    assert stub.calls["tasks"] == ["task arc_challenge", "task arc_easy"]
    assert (stub.calls["num_fewshot"], stub.calls["limit"], stub.calls["random_seed"]) == (3, 10, 9)


def test_unknown_tasks_suggest_the_nearest(stub):
    with pytest.raises(UnknownNameError, match="did you mean 'gsm'"):
        evaluate_tasks(nn.Identity(), "tokenizer", "gsn")


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'ai2_arc'\non the Hub"),
        FileNotFoundError("no such data set"),
        ValueError("Couldn't find cache for ai2_arc"),
        type("ConnectError", (Exception,), {"__module__": "httpx"})("name resolution failed"),
    ],
)
def test_data_that_cannot_be_reached_is_one_clear_line(stub, failure):
    stub.tasks.failure = failure
    with pytest.raises(CalibrationError, match="data of task 'gsm' cannot be reached") as caught:
        evaluate_tasks(nn.Identity(), "tokenizer", "gsm")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is failure


def test_other_failures_are_not_disguised_as_missing_data(stub):
    stub.tasks.failure = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        evaluate_tasks(nn.Identity(), "tokenizer", "gsm")


def test_no_tasks_is_an_error(stub):
    with pytest.raises(ConfigurationError, match="tasks is empty"):
        evaluate_tasks(nn.Identity(), "tokenizer", [])


def test_a_missing_harness_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"gossamer\[evaluation\]"):
        evaluate_tasks(nn.Identity(), "tokenizer", "arc_easy")


def real_harness(test):
    """A test of the harness itself, which takes many seconds to look through its thousands of tasks."""
    missing = importlib.util.find_spec("lm_eval") is None
    return pytest.mark.slow(pytest.mark.skipif(missing, reason="lm-eval is not installed")(test))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): i + 3 for i in range(26)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


@real_harness
def test_the_real_harness_scores_a_task_of_ones_own(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"question": "{q}", "answer": {i % 2}}}\n' for i, q in enumerate("cdef")))
    (tmp_path / "tiny.yaml").write_text(TASK.format(name="gossamer_tiny", data=data))
    found = evaluate_tasks(llama, tokenizer, "gossamer_tiny", include_path=str(tmp_path))
    answers = []
    for i, question in enumerate("cdef"):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        logits = llama(ids).logits[0, -1]
        answers.append(int(logits[4] > logits[3]) == i % 2)
    assert found.value("gossamer_tiny") == sum(answers) / 4


PASSAGE = """
task: gossamer_passage
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
metadata: {{version: 1.0}}
"""


@real_harness
def test_the_real_harness_agrees_on_the_perplexity_of_a_sparse_model(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter[..., ::2] = 0
    data = tmp_path / "passage.jsonl"
    data.write_text('{"text": "c a t s a n d d o g s"}\n')
    (tmp_path / "passage.yaml").write_text(PASSAGE.format(data=data))
    found = evaluate_tasks(llama, tokenizer, "gossamer_passage", include_path=str(tmp_path))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("c a t s a n d d o g s")["input_ids"]]])
    with torch.no_grad():
        loss = nn.functional.cross_entropy(llama(ids).logits[0, :-1], ids[0, 1:])
    assert found.value("gossamer_passage", "word_perplexity") == pytest.approx(float(loss.exp()), rel=1e-5)


GENERATION = """
task: gossamer_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{settings}
metadata: {{version: 1.0}}
"""
_WRITES = """generation_kwargs: {max_gen_toks: 1, do_sample: false, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
_CHOOSES = """doc_to_choice: ["a", "b"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@real_harness
def test_the_real_harness_generates_and_takes_groups_with_solved_examples(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        llama.lm_head.weight[29:] = 0  # ids that the tokenizer does not know
        llama.lm_head.weight[:3] = 0
        likeliest = int(llama(torch.tensor([tokenizer("c")["input_ids"]])).logits[0, -1].argmax())
    data = tmp_path / "questions.jsonl"
    data.write_text(f'{{"question": "c", "answer": "{tokenizer.decode([likeliest])}"}}\n')
    written = {"name": "writes", "kind": "generate_until", "settings": _WRITES, "data": data}
    (tmp_path / "writes.yaml").write_text(GENERATION.format(**written))
    choices = tmp_path / "choices.jsonl"
    choices.write_text("".join(f'{{"question": "{q}", "answer": "{a}"}}\n' for q, a in zip("cdef", "abab")))
    chosen = {"name": "chooses", "kind": "multiple_choice", "settings": _CHOOSES, "data": choices}
    (tmp_path / "chooses.yaml").write_text(GENERATION.format(**chosen))
    (tmp_path / "both.yaml").write_text(
        "group: gossamer_both\ntask: [gossamer_chooses]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean}]\nmetadata: {version: 1.0}\n"
    )
    found = evaluate_tasks(llama, tokenizer, "gossamer_writes", include_path=str(tmp_path))
    assert found.value("gossamer_writes", "exact_match") == 1.0
    grouped = evaluate_tasks(llama, tokenizer, "gossamer_both", shots=2, include_path=str(tmp_path))
    assert {score.task: score.shots for score in grouped.scores} == {"gossamer_chooses": 2, "gossamer_both": None}


@real_harness
def test_the_real_harness_says_which_data_is_missing(llama, tokenizer, tmp_path):
    (tmp_path / "lost.yaml").write_text(TASK.format(name="gossamer_lost", data=tmp_path / "absent.jsonl"))
    with pytest.raises(CalibrationError, match="data of task 'gossamer_lost' cannot be reached"):
        evaluate_tasks(llama, tokenizer, "gossamer_lost", include_path=str(tmp_path))
