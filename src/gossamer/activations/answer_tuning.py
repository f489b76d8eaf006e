"""Learning to answer questions about a text, as DEFT does with Flan-T5 on SQuAD, with as few neurons as it can.

An encoder reads the question and the text, a decoder writes the answer, and few parameters train. The penalty is the
mean over the encoder's layers plus the mean over the decoder's; padding counts on neither side. For instance, on a base
held in 4 bits::

    base = AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-xl", quantization_config=four_bit_loading())
    model = efficient(base, "lora", "SEQ_2_SEQ_LM")
    fine_tune_to_answer(model, tokenizer, read_squad("train-v1.1.json"), "out", DEFT())
    print(judge_answers(model, tokenizer, read_squad("dev-v1.1.json")))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.deft import density_taps
from gossamer.activations.penalized_training import PenalizedMethod, PenalizedTraining, penalty_callback
from gossamer.core.labels import IGNORED
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError
from gossamer.measure.activation_density import ActivationDensity, activation_density
from gossamer.measure.answer_scores import AnswerScores, answer_scores
from gossamer.measure.windows import evaluation_mode

LENGTH, ANSWER_LENGTH = 384, 30
"""Tokens of question and text together, and of an answer, after which the authors cut."""


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes
    ----------
    question, context
        The question, and the text that answers it.
    answers
        The right ones; none if the text does not say.
    """

    question: str
    context: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the encoder reads."""
        return f"question: {self.question.lstrip()} context: {self.context.lstrip()}"


@dataclass(frozen=True)
class AnswerReport:
    """What a model makes of questions.

    Attributes
    ----------
    scores
        Exact answers and overlap of words, in percent.
    density, usable
        Activations that are not zero, and those above a tolerance, by layer; ``groups`` has encoder and decoder.
    """

    scores: AnswerScores
    density: ActivationDensity
    usable: ActivationDensity


def read_squad(path: str | Path) -> list[Question]:
    """Read questions from a file of SQuAD, of version 1.1 or 2.0.

    Parameters
    ----------
    path
        Such as ``train-v1.1.json``.

    Raises
    ------
    CheckpointError
        If it is no such file.
    """
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        return [
            Question(asked["question"], part["context"], tuple(answer["text"] for answer in asked["answers"]))
            for article in articles
            for part in article["paragraphs"]
            for asked in part["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as questions of SQuAD ({type(error).__name__}: {error}); give its train or dev file"
        ) from error


def answer_features(
    questions: Sequence[Question], tokenizer: Any, length: int = LENGTH, answer_length: int = ANSWER_LENGTH
) -> list[dict[str, list[int]]]:
    """Tokens of prompts and of each question's first answer, which is empty where there is none.

    Parameters
    ----------
    questions
        To learn from, or to be judged by.
    tokenizer
        Of the model; what is beyond the lengths is cut off.
    length, answer_length
        Tokens at most.

    Raises
    ------
    CalibrationError
        If there is no question.
    ConfigurationError
        If a length is below 1.
    """
    if not questions:
        raise CalibrationError("there is no question; give at least one")
    if min(length, answer_length) < 1:
        raise ConfigurationError(f"length is {length} and answer_length {answer_length}; both must be at least 1")
    prompts = tokenizer([q.prompt for q in questions], max_length=length, truncation=True)
    answers = [q.answers[0] if q.answers else "" for q in questions]
    labels = tokenizer(text_target=answers, max_length=answer_length, truncation=True)["input_ids"]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(prompts["input_ids"], prompts["attention_mask"], labels)
    ]


class AnswerBatches:
    """Pads rows of :func:`answer_features` to a batch, and marks what is padding for the decoder too.

    Parameters
    ----------
    padding
        The token that pads prompts.
    """

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """A batch: ``input_ids``, ``attention_mask``, ``labels`` and ``decoder_attention_mask``, ``(rows, tokens)``."""
        labels = _padded([row["labels"] for row in rows], IGNORED)
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self.padding),
            "attention_mask": _padded([row["attention_mask"] for row in rows], 0),
            "labels": labels,
            "decoder_attention_mask": (labels != IGNORED).long(),
        }


def answer_training_defaults(folder: str, **changes: Any) -> Any:
    """The authors' settings for SQuAD as arguments of ``transformers.Seq2SeqTrainer``, with changes.

    AdamW at 3e-5, lowered along a line, 10 epochs of batches of 4.
    """
    from transformers import Seq2SeqTrainingArguments

    usual = {
        "learning_rate": 3e-5,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 10,
        "report_to": [],
        "remove_unused_columns": False,
    }
    return Seq2SeqTrainingArguments(folder, **{**usual, **changes})


def fine_tune_to_answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    folder: str,
    method: PenalizedMethod | None = None,
    *,
    length: int = LENGTH,
    answer_length: int = ANSWER_LENGTH,
    **changes: Any,
) -> PenalizedTraining | None:
    """Train what is free in a model with encoder and decoder on questions and answers, in place.

    Parameters
    ----------
    model, tokenizer
        Such as Flan-T5 after :func:`~gossamer.activations.efficient_modules.efficient`.
    questions
        To learn from.
    folder
        For checkpoints.
    method
        What penalises activations, such as :class:`~gossamer.activations.deft.DEFT`; None for the task alone.
    length, answer_length
        Tokens at most.
    **changes
        To :func:`answer_training_defaults`.

    Returns
    -------
    PenalizedTraining or None
        With the history of the penalty, if there was one.

    Raises
    ------
    ConfigurationError
        If the model has no encoder and decoder.
    CalibrationError
        If there is no question.
    """
    from transformers import Seq2SeqTrainer

    _check_encoder_decoder(model)
    rows: Any = answer_features(questions, tokenizer, length, answer_length)
    callbacks = [] if method is None else [penalty_callback(method)]
    arguments = answer_training_defaults(folder, **changes)
    batches = AnswerBatches(tokenizer.pad_token_id)
    Seq2SeqTrainer(model, arguments, data_collator=batches, train_dataset=rows, callbacks=callbacks).train()
    return callbacks[0].training if callbacks else None


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch: int = 4, length: int = LENGTH, **options: Any
) -> list[str]:
    """Let a model answer questions greedily.

    Parameters
    ----------
    model, tokenizer
        See :func:`fine_tune_to_answer`.
    questions
        To be answered.
    batch
        How many at once.
    length
        Tokens of a prompt at most.
    **options
        Of ``generate``; answers have at most 30 tokens unless told otherwise.

    Raises
    ------
    ConfigurationError
        If the model has no encoder and decoder.
    """
    _check_encoder_decoder(model)
    given: list[str] = []
    with evaluation_mode(model):
        for rows in _batches(questions, tokenizer, batch, length, 1, model.device):
            prompt = {name: rows[name] for name in ("input_ids", "attention_mask")}
            tokens = model.generate(**prompt, **{"max_new_tokens": ANSWER_LENGTH, "do_sample": False, **options})
            given += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return given


def judge_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    tolerance: float = 1e-3,
    batch: int = 4,
    length: int = LENGTH,
    **options: Any,
) -> AnswerReport:
    """Scores of a model's own answers, and densities of its activations while it reads the right ones.

    Parameters
    ----------
    model, tokenizer, questions, batch, length, **options
        See :func:`answer`.
    tolerance
        Up to which size an activation is no use to a kernel.
    """
    scores = answer_scores(
        answer(model, tokenizer, questions, batch, length, **options), [question.answers for question in questions]
    )
    batches = list(_batches(questions, tokenizer, batch, length, ANSWER_LENGTH, model.device))
    taps = density_taps(model)
    exact, usable = (activation_density(model, batches, taps, tolerance=limit) for limit in (0.0, tolerance))
    return AnswerReport(scores, exact, usable)


def _batches(
    questions: Sequence[Question], tokenizer: Any, batch: int, length: int, answer_length: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    if batch < 1:
        raise ConfigurationError(f"batch is {batch}; it must be at least 1")
    rows = answer_features(questions, tokenizer, length, answer_length)
    pad = AnswerBatches(tokenizer.pad_token_id)
    for start in range(0, len(rows), batch):
        yield {name: values.to(device) for name, values in pad(rows[start : start + batch]).items()}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _check_encoder_decoder(model: Any) -> None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigurationError(
            f"{type(model).__name__} has no encoder and decoder; give a model such as Flan-T5, "
            f"from AutoModelForSeq2SeqLM"
        )
