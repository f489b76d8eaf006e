"""SQuAD by an encoder and a decoder: reading it, batches, and DEFT over adapters, LoRA and a base in 4 bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from gossamer.activations.answer_tuning import (
    AnswerBatches,
    Question,
    answer,
    answer_features,
    answer_training_defaults,
    fine_tune_to_answer,
    judge_answers,
    read_squad,
)
from gossamer.activations.deft import DEFT, density_change, density_taps
from gossamer.activations.efficient_modules import Adapter, add_adapters, efficient, four_bit_loading
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError

WORDS = ["question:", "context:", "what", "colour", "is", "the", "cat", "dog", "red", "blue", "green", "and", "black"]
QUICK = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "length": 20, "answer_length": 4}


@pytest.fixture(scope="module")
def tokenizer():
    """Words as tokens; a text ends as T5's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def flan():
    """A T5 as Flan has it, gated and with its ends apart."""
    torch.manual_seed(0)
    # matrices of 4 bits have scales of 64 inputs
    size = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(WORDS) + 3,
            **size,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )


def questions():
    return [
        Question(f"what colour is the {animal}", f"the {animal} is {colour}", (colour,))
        for animal in ("cat", "dog")
        for colour in ("red", "blue", "green", "black")
    ]


def test_files_of_both_versions_are_read(tmp_path):
    asked = [
        {"id": "1", "question": " what colour is the cat", "answers": [{"text": "red", "answer_start": 11}] * 2},
        {"id": "2", "question": "why", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "dev.json"
    path.write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": " the cat is red", "qas": asked}]}]})
    )
    first, second = read_squad(path)
    assert first.prompt == "question: what colour is the cat context: the cat is red"
    assert first.answers == ("red", "red")
    assert second.answers == ()
    for broken in ("{", json.dumps({"version": "1.1"}), json.dumps([1])):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match="cannot be read as questions"):
            read_squad(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_squad(tmp_path / "nowhere.json")


def test_batches_mark_padding_on_both_sides(tokenizer):
    asked = [Question("cat", "red dog", ("red", "blue")), Question("dog", "blue", ())]
    rows = answer_features(asked, tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]) == "question: cat context: red dog </s>"
    assert [tokenizer.decode(row["labels"]) for row in rows] == ["red </s>", "</s>"]
    batch = AnswerBatches(0)(rows)
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["input_ids"][1, -1] == 0
    assert batch["labels"][1].tolist() == [1, -100]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1], [1, 0]]
    cut = answer_features(asked, tokenizer, length=3, answer_length=1)
    assert [len(row["input_ids"]) for row in cut] == [3, 3]
    assert [len(row["labels"]) for row in cut] == [1, 1]


def test_padding_of_answers_does_not_weigh_in_the_penalty(tokenizer, flan):
    asked = [Question("cat", "red dog", ("red and blue",)), Question("dog", "blue", ("blue",))]
    rows, pad = answer_features(asked, tokenizer), AnswerBatches(0)
    run = DEFT(eps=1e-2).attach(flan.train())
    parts, sizes = [], []
    for row in rows:
        flan(**pad([row]))
        run.loss()
        parts.append(dict(run.penalty.per_tap))
        sizes.append({"encoder": len(row["input_ids"]), "decoder": len(row["labels"])})
    flan(**pad(rows))
    run.loss()
    for name, found in run.penalty.per_tap.items():
        weights = [size[name.partition(".")[0]] for size in sizes]
        expected = sum(part[name] * weight for part, weight in zip(parts, weights)) / sum(weights)
        assert found == pytest.approx(expected, rel=1e-4)
    run.finish()


def test_a_model_learns_to_answer_under_the_penalty(tmp_path, tokenizer, flan):
    """All weights, so that a random model can; what it is asked for it has seen."""
    options = {**QUICK, "learning_rate": 1e-2, "num_train_epochs": 50, "logging_steps": 10}
    torch.manual_seed(0)
    run = fine_tune_to_answer(flan, tokenizer, questions(), str(tmp_path), DEFT(weight=0.1, eps=1e-2), **options)
    assert run.penalty.step == 100
    assert run.history[-1]["penalty"] < run.history[0]["penalty"]
    report = judge_answers(flan, tokenizer, questions(), batch=3)
    assert report.scores.exact == report.scores.f1 == 100
    assert answer(flan, tokenizer, questions()[:1]) == ["red"]
    assert set(report.density.groups) == {"encoder.block", "decoder.block"}
    assert report.usable.density <= report.density.density
    assert not any(module._forward_hooks for module in flan.modules())


@pytest.mark.parametrize("kind", ["adapter", "lora", "prefix", "prompt"])
def test_every_kind_of_few_parameters_reaches_encoder_and_decoder(tmp_path, tokenizer, flan, kind):
    if kind != "adapter":
        pytest.importorskip("peft")
    frozen = copy.deepcopy(flan.state_dict())
    options = {} if kind in ("adapter", "lora") else {"num_virtual_tokens": 3}
    model = efficient(flan, kind, "SEQ_2_SEQ_LM", **options)
    # four questions make one batch, the same in every step
    changes = {**QUICK, "learning_rate": 2e-2, "max_steps": 10, "logging_steps": 1}
    method = DEFT(weight=1000.0, eps=1.0)  # so that the task, which is far from learned, has no say
    run = fine_tune_to_answer(model, tokenizer, questions()[:4], str(tmp_path), method, **changes)
    assert {name.rpartition(".block.")[0].rpartition(".")[2] for name in run.penalty.per_tap} == {"encoder", "decoder"}
    assert run.history[-1]["penalty"] < run.history[0]["penalty"]
    after = {name.replace("base_layer.", ""): value for name, value in flan.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_an_adapter_in_t5_starts_as_the_layer_it_wraps(flan):
    ids = torch.arange(3, 9).view(1, 6)
    flan.eval()
    before = flan(input_ids=ids, labels=ids).logits
    add_adapters(flan, reduction=16)
    # products of frozen matrices are rounded otherwise
    torch.testing.assert_close(flan(input_ids=ids, labels=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, Adapter) for module in flan.modules()) == 4
    assert {tap.group for tap in density_taps(flan)} == {"encoder.block", "decoder.block"}


def test_a_base_in_four_bits_is_tuned_and_its_density_falls(tmp_path, tokenizer, flan):
    """QLoRA as the paper has it: the matrices stay packed, and what trains silences neurons in both halves."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    flan.save_pretrained(tmp_path / "base")
    found = {}
    for name, method in (("PEFT", None), ("DEFT", DEFT(weight=1000.0, eps=1.0))):
        base = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / "base", quantization_config=four_bit_loading(), device_map="cpu"
        )
        packed = base.encoder.block[0].layer[1].DenseReluDense.wi_0
        assert type(packed).__name__ == "Linear4bit"
        assert packed.weight.dtype == torch.uint8
        before = packed.weight.detach().clone()
        torch.manual_seed(0)
        model = efficient(base, "lora", "SEQ_2_SEQ_LM", r=4, target_modules=["q", "k", "v", "o", "wi_0"])
        changes = {**QUICK, "learning_rate": 5e-2, "max_steps": 24}
        fine_tune_to_answer(model, tokenizer, questions()[:4], str(tmp_path), method, **changes)
        # the wrapped layer still holds the bytes of its base
        assert torch.equal(packed.weight, before)
        found[name] = judge_answers(model, tokenizer, questions()[:4], tolerance=0.1, max_new_tokens=2).usable
    for group in found["PEFT"].groups:
        assert density_change(found["PEFT"].groups[group], found["DEFT"].groups[group]) > 5
    with pytest.raises(ConfigurationError, match="packed in few bits"):
        add_adapters(base)


def test_what_cannot_answer_is_refused(tmp_path, tokenizer, flan, tiny_llama):
    with pytest.raises(ConfigurationError, match="no encoder and decoder"):
        fine_tune_to_answer(tiny_llama, tokenizer, questions(), str(tmp_path))
    with pytest.raises(ConfigurationError, match="AutoModelForSeq2SeqLM"):
        answer(tiny_llama, tokenizer, questions())
    with pytest.raises(CalibrationError, match="no question"):
        answer_features([], tokenizer)
    with pytest.raises(ConfigurationError, match="length is 0"):
        answer_features(questions(), tokenizer, length=0)
    with pytest.raises(ConfigurationError, match="batch is 0"):
        answer(flan, tokenizer, questions(), batch=0)


def test_training_starts_from_the_settings_of_the_paper(tmp_path):
    found = answer_training_defaults(str(tmp_path), use_cpu=True)
    assert (found.learning_rate, found.per_device_train_batch_size, found.num_train_epochs) == (3e-5, 4, 10)
    assert answer_training_defaults(str(tmp_path), use_cpu=True, learning_rate=1.0).learning_rate == 1.0
