"""A language model made ready to run: compressed, compiled where that is possible, and able to write text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure import GenerationSpeed, bytes_in_memory, generation_speed
from gossamer.measure.speed import measure_generation, prompt_ids
from gossamer.models.prompts import encode_prompt, end_tokens
from gossamer.runtime.choice import Choices
from gossamer.runtime.compress import CompressionReport, check_formats, compress
from gossamer.runtime.generation import Generation, Sampling, generate
from gossamer.runtime.program import DecodeProgram
from gossamer.runtime.thresholds import Thresholds, lay_out_

FORMATS = ("off", "exact", "bfloat16", "int8", "int4")
_CONTEXT = 2048


def check_engine(format: str, head: str, activations: str = "float") -> None:
    """Check the settings of an engine, before a model is loaded for it.

    Raises
    ------
    ConfigurationError
        If one of them is unknown, or activations in int8 would meet no weights in whole numbers.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    check_formats(None if format in ("off", "exact") else format, head, activations)


@dataclass
class Engine:
    """A language model, and how it is run.

    Attributes
    ----------
    model, tokenizer
        The first may have packed layers.
    program
        Its compiled steps, or None where it is run through Hugging Face.
    reason
        Why there is no program.
    report
        What became of every layer, or None if nothing was compressed.
    thresholds
        Sizes below which activations count as zero, or None.
    """

    model: nn.Module
    tokenizer: Any = None
    program: DecodeProgram | None = None
    reason: str | None = None
    report: CompressionReport | None = None
    thresholds: Thresholds | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any = None,
        format: str = "exact",
        head: str = "int8",
        group: int | None = None,
        activations: str = "float",
        context: int = _CONTEXT,
        choices: Choices | None = None,
        progress: bool = True,
        thresholds: Thresholds | None = None,
    ) -> Engine:
        """Compress a model in place and compile it.

        Parameters
        ----------
        model
            A causal language model of Hugging Face. One that is not on the CPU, or is packed already, stays as it is.
        tokenizer
            Its tokenizer, for :meth:`write`.
        format
            What weights become: ``exact`` keeps them bit for bit, ``off`` leaves the model and its speed as they are.
        head, group, activations, choices, progress
            As in :func:`~gossamer.runtime.compress.compress`.
        context
            Most tokens of a text.
        thresholds
            Of inputs and gates, as a method of activation sparsity has found them. The layers that they belong to are
            stored channel by channel. Where no program runs the model, they hold in the model itself.

        Raises
        ------
        ConfigurationError
            If `format`, `head` or `activations` is unknown, or they do not fit each other.
        """
        check_engine(format, head, activations)
        if thresholds is not None:
            thresholds.check(model)
        engine = cls(model, tokenizer, thresholds=thresholds)
        if format == "off":
            engine.reason = "it was asked to be left as it is"
            return engine
        if next(model.parameters()).device.type != "cpu":
            engine.reason = "it is not on the CPU"
            return engine
        if any(type(module) is nn.Linear for module in model.modules()):
            wanted = None if format == "exact" else format
            engine.report = compress(
                model,
                wanted,
                head=head,
                group=group,
                activations=activations,
                exclude=[] if thresholds is None else lay_out_(model, thresholds, wanted),
                choices=choices,
                progress=progress,
            )
        try:
            engine.program = DecodeProgram.of(model, context, thresholds=thresholds)
        except ModelError as error:
            engine.reason = str(error)
        return engine

    def __str__(self) -> str:
        """Say what runs it."""
        how = "compiled steps" if self.program is not None else f"Hugging Face, since {self.reason}"
        return how if self.report is None else f"{how}; {self.report}"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return bytes_in_memory(self.model)

    @contextmanager
    def _silencing(self) -> Iterator[None]:
        """Let thresholds hold in the model itself, where no program knows them."""
        if self.thresholds is None or self.program is not None:
            yield
            return
        with self.thresholds.holding(self.model):
            yield

    def write(
        self,
        prompt: str,
        new_tokens: int = 64,
        sampling: Sampling | None = None,
        on_text: Callable[[str], Any] | None = None,
    ) -> tuple[str, Generation]:
        """Answer or continue a prompt.

        Parameters
        ----------
        prompt
            Text; put through the chat template where the tokenizer has one.
        new_tokens, sampling
            As in :func:`~gossamer.runtime.generation.generate`.
        on_text
            Called with every piece of text as soon as it is known.

        Returns
        -------
        str
            What was written, without the prompt.
        Generation
            Its tokens and times.

        Raises
        ------
        ConfigurationError
            As :func:`~gossamer.runtime.generation.generate` does.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        written: list[int] = []
        shown = ""

        def tell(token: int) -> None:
            nonlocal shown
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if on_text is not None and not text.endswith("\ufffd"):  # half a character: the rest comes with the next
                on_text(text[len(shown) :])
                shown = text

        stop = end_tokens(self.model, self.tokenizer)
        with self._silencing():
            found = generate(self.program or self.model, ids, new_tokens, sampling, stop, tell)
        text = self.tokenizer.decode(found.tokens, skip_special_tokens=True)
        if on_text is not None and len(text) > len(shown):
            on_text(text[len(shown) :])
        return text, found

    def speed(
        self, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 5, warmup: int = 1
    ) -> GenerationSpeed:
        """Measure reading and writing, as :func:`gossamer.measure.generation_speed` does it.

        Raises
        ------
        ConfigurationError
            If a number is out of range.
        """
        program = self.program
        if program is None:
            with self._silencing():
                return generation_speed(self.model, self.tokenizer, prompt_tokens, new_tokens, repeats, warmup)
        prompt = prompt_ids(self.model, self.tokenizer, prompt_tokens)

        def run() -> tuple[float, float]:
            session = program.session(prompt_tokens + new_tokens)
            begin = time.perf_counter()
            session.feed(prompt[0])
            middle = time.perf_counter()
            for _ in range(new_tokens):
                session.feed([session.best])
            return middle - begin, time.perf_counter() - middle

        return measure_generation(run, prompt, new_tokens, repeats, warmup)
