"""The evaluation that the command line calls: one small model, everything from prompts to files."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.attention.evaluation import chosen_tasks, contender
from gossamer.errors import CheckpointError, ConfigurationError, OutputError, UnknownNameError
from gossamer.measure.long_context import Frontier, Needle, StoryRetrieval, Subject, frontier, small_vocabulary
from gossamer.report import attention_job
from gossamer.report.attention_job import evaluate_attention


@pytest.fixture(scope="module")
def subject():
    tokenizer = small_vocabulary()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size}
    shape = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return Subject(LlamaForCausalLM(shape).eval(), tokenizer)


@pytest.fixture
def loaded(monkeypatch, subject):
    """The model in place of one from disk, and tasks in its words."""

    class Loaded:
        model, tokenizer, licence = subject.model, subject.tokenizer, "free"

    monkeypatch.setattr(attention_job, "load", lambda source, dtype: Loaded)
    plain = chosen_tasks
    monkeypatch.setattr(attention_job, "chosen_tasks", lambda names: plain(names, wording="terse"))


def small(output=None, **options):
    given = {"methods": ["vertical-slash", "quest"], "sparsities": [0.5, 0.8], "lengths": [128], "samples": 3}
    given |= {"tasks": ["needle", "story-multihop"], "progress": False}
    return evaluate_attention("tiny", output=output, **given | options)


def test_every_cell_has_a_row_and_realised_sparsity_is_near_what_was_asked(loaded):
    result = small()
    cells = {(row.method, row.task, row.sparsity) for row in result.frontier.rows}
    wanted = {(m, t, s) for m in ("vertical-slash", "quest") for t in ("needle", "story-multihop") for s in (0.5, 0.8)}
    assert cells == wanted | {("dense", "needle", 0.0), ("dense", "story-multihop", 0.0)}
    for row in result.frontier.rows:
        assert row.realised == pytest.approx(row.sparsity, abs=0.03)
        assert len(row.scores) == 3


def test_files_appear_and_a_finished_evaluation_is_not_replaced(loaded, tmp_path):
    said = []
    result = small(tmp_path / "out", say=said.append)
    stored = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(result.to_dict()["rows"]))
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert said == ["free"]
    with pytest.raises(OutputError, match="finished evaluation"):
        small(tmp_path / "out")
    small(tmp_path / "out", overwrite=True, samples=2)


def test_an_interrupted_run_goes_on_and_gives_the_same(loaded, subject, tmp_path, monkeypatch):
    tasks = {"needle": Needle(wording="terse"), "retrieval": StoryRetrieval(wording="terse")}
    methods = {"quest": contender("quest", tasks.values())}
    options = {"samples": 2, "progress": False}
    whole = frontier({"tiny": subject}, methods, tasks, [96], [0.5], **options)
    journal = tmp_path / "journal.jsonl"
    module = importlib.import_module("gossamer.measure.long_context.frontier")
    made = []
    run = module._run

    def run_twice(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return run(*args)

    monkeypatch.setattr(module, "_run", run_twice)
    with pytest.raises(KeyboardInterrupt):
        frontier({"tiny": subject}, methods, tasks, [96], [0.5], journal=journal, **options)
    with journal.open("a") as file:
        file.write('{"cell": "half a li')
    monkeypatch.setattr(module, "_run", run)
    again = frontier({"tiny": subject}, methods, tasks, [96], [0.5], journal=journal, **options)
    assert again == whole
    with pytest.raises(CheckpointError, match="other tasks, samples or seed"):
        frontier({"tiny": subject}, methods, tasks, [96], [0.5], journal=journal, samples=3, progress=False)


def test_sparsities_that_a_method_cannot_reach_are_rows_without_scores(loaded):
    result = small(methods=["block-sparse"], sparsities=[0.5, 0.95])
    out_of_reach = result.frontier.where(sparsity=0.95).rows
    assert [row.scores for row in out_of_reach] == [(), ()]
    assert "comes no nearer" in out_of_reach[0].note
    assert math.isnan(result.frontier.where(sparsity=0.95).accuracy)
    json.dumps(result.to_dict(), allow_nan=False)


def test_rows_of_another_model_or_with_other_options_are_not_taken_from_a_journal(subject, tmp_path):
    tasks = {"needle": Needle(wording="terse")}
    other = LlamaForCausalLM(subject.model.config).eval()
    assert Subject(other, subject.tokenizer).fingerprint != subject.fingerprint
    assert Subject(subject.model, subject.tokenizer).fingerprint == subject.fingerprint
    lines = []
    for model, options in (
        (subject, {}),
        (subject, {}),
        (Subject(other, subject.tokenizer), {}),
        (subject, {"sinks": 2}),
    ):
        methods = {"snap-kv": contender("snap-kv", tasks.values(), **options)}
        journal = tmp_path / "journal.jsonl"
        frontier({"tiny": model}, methods, tasks, [96], [0.5], samples=2, progress=False, journal=journal)
        lines.append(len(journal.read_text().splitlines()))
    assert lines == [3, 3, 5, 6]


def test_overwriting_drops_the_journal_of_an_interrupted_run(loaded, tmp_path):
    (tmp_path / "journal.jsonl").write_text("of another run\n")
    with pytest.raises(CheckpointError, match="other tasks, samples or seed"):
        small(tmp_path, methods=["quest"], samples=1)
    small(tmp_path, methods=["quest"], samples=1, overwrite=True)
    assert (tmp_path / "attention.json").exists()


def test_what_is_safe_is_unknown_where_prompts_are_few_or_the_model_cannot_do_the_task(loaded):
    result = small()
    assert [row["safe"] for row in result.table()] == [True, None, None, None, None]
    assert "needle (dense attention scores" in result.unknown


def test_the_table_names_what_is_safe(loaded):
    rows = small().table()
    assert [row["method"] for row in rows] == ["dense", "vertical-slash", "vertical-slash", "quest", "quest"]
    assert set(rows[0]) == {"method", "phase", "length", "sparsity", "realised", "accuracy", "dense", "safe"}


def test_adaptive_methods_are_calibrated_on_other_prompts_of_the_same_tasks(subject):
    made = contender("flex-prefill", [Needle(wording="terse")]).at(subject, 128, 0.6)
    rows = frontier(
        {"tiny": subject}, {"flex": contender("flex-prefill", [Needle(wording="terse")])},
        {"needle": Needle(wording="terse")}, [128], [0.6], samples=4, progress=False,
    )  # fmt: skip
    assert 0 < made.alpha < 1
    assert rows.where(method="flex").realised == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["quets"]}, UnknownNameError, "did you mean 'quest'"),
        ({"tasks": ["needles"]}, UnknownNameError, "did you mean 'needle'"),
        ({"tasks": []}, ConfigurationError, "tasks is empty"),
        ({"sparsities": [1.0]}, ConfigurationError, "a sparsity is 1.0"),
        ({"lengths": [10]}, ConfigurationError, "a length is 10"),
        ({"lengths": [4096]}, ConfigurationError, "reads 512 tokens"),
        ({"samples": 0}, ConfigurationError, "samples is 0"),
        ({"batch_size": 0}, ConfigurationError, "batch_size is 0"),
        ({"tolerance": -1.0}, ConfigurationError, "tolerance is -1"),
        ({"tolerance": 1.0}, ConfigurationError, "tolerance is 1.0"),
    ],
)
def test_bad_input_is_refused_in_one_line(loaded, options, error, message):
    with pytest.raises(error, match=message) as caught:
        small(**options)
    assert "\n" not in str(caught.value)


def test_a_frontier_of_nothing_has_no_accuracy():
    assert math.isnan(Frontier().accuracy)
