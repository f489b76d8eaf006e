"""How fast things run, on machines that are never quite still.

Contenders take turns, round after round and in changing order, so that a slow minute of the machine hits all
of them; what is reported is the median and the quartiles, never the best run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure.windows import evaluation_mode, logits_of, model_device
from gossamer.models.blocks import accepted

# Prompts are made of this text where there is a tokenizer: the path through a mixture of experts, or the
# zeros in activations, depend on the input being language.
PROMPT = (
    "The morning was cool and clear when the two of them walked down to the harbour, talking about the ships "
    "that would leave with the tide, the price of rope, and the letter that had still not come. "
)


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one quantity.

    Attributes
    ----------
    median, low, high
        Median and quartiles: half of the measurements lie between `low` and `high`.
    repeats
        Number of measurements.
    unit
        Unit of the three, such as ``"s"`` or ``"tokens/s"``; ``"x"`` for a ratio.
    samples
        The measurements in the order in which they were made.
    """

    median: float
    low: float
    high: float
    repeats: int
    unit: str = "s"
    samples: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, samples: Sequence[float], unit: str = "s") -> Timing:
        """Summarise measurements, of which there must be at least one."""
        if not samples:
            raise ConfigurationError("a timing needs at least one measurement, got none")
        values = tuple(float(sample) for sample in samples)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1, unit, values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values), unit, values)

    def __str__(self) -> str:
        return f"{self.median:.4g} {self.unit} ({self.low:.4g} to {self.high:.4g}, {self.repeats} runs)"


@dataclass(frozen=True)
class GenerationSpeed:
    """Speed of a language model in tokens per second, over all sequences of the batch together.

    Attributes
    ----------
    prefill
        Reading the prompt, up to and including the choice of the first new token.
    decode
        Producing one token after the other from the cache.
    prompt_tokens, new_tokens, batch_size
        What was run: tokens of each prompt, decoding steps, sequences at a time.
    """

    prefill: Timing
    decode: Timing
    prompt_tokens: int
    new_tokens: int
    batch_size: int


def interleave(contenders: Mapping[str, Callable[[], Any]], repeats: int = 7, warmup: int = 1) -> dict[str, Timing]:
    """Time several callables in turns.

    Parameters
    ----------
    contenders
        Name to callable without arguments.
    repeats
        Timed rounds; in each of them every contender runs once. Every second round runs in reverse order.
    warmup
        Rounds before these that do not count.

    Returns
    -------
    dict of str to Timing
        Seconds. Samples with the same index come from the same round, so :func:`ratio` can pair them.

    Raises
    ------
    ConfigurationError
        If there is no contender, `repeats` is below 1 or `warmup` below 0.
    """
    if not contenders:
        raise ConfigurationError("no contenders to time; give at least one name and callable")
    _check_rounds(repeats, warmup)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for turn in range(warmup + repeats):
        for name in order if turn % 2 == 0 else order[::-1]:
            with _quiet():
                elapsed = _seconds(contenders[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(samples) for name, samples in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> Timing:
    """Return how many times as long `slow` took as `fast`: median and quartiles of the ratios of each round.

    Raises
    ------
    ConfigurationError
        If the two were not measured in the same number of rounds.
    """
    if len(slow.samples) != len(fast.samples):
        raise ConfigurationError(
            f"timings of {len(slow.samples)} and {len(fast.samples)} rounds cannot be paired; interleave them"
        )
    return Timing.of([a / b for a, b in zip(slow.samples, fast.samples)], unit="x")


def generation_speed(
    model: nn.Module,
    tokenizer: Any = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    batch_size: int = 1,
) -> GenerationSpeed:
    """Measure prefill and decoding of a causal language model apart, with greedy choice and its cache.

    Decoding does not stop at an end-of-text token, so that every run does the same work.

    Parameters
    ----------
    model
        A Hugging Face causal language model, or a module with the same call: `past_key_values` and
        `use_cache` in, `logits` and `past_key_values` out.
    tokenizer
        Makes the prompt from a fixed English text; without one the prompt is random tokens.
    prompt_tokens, new_tokens
        Length of the prompt and number of decoding steps, each at least 1.
    repeats, warmup
        Runs that count and runs before them that do not.
    batch_size
        Equal prompts that run together.

    Returns
    -------
    GenerationSpeed
        Tokens per second.

    Raises
    ------
    ConfigurationError
        If a number is out of range.
    ModelError
        If the model keeps no cache.
    """
    _check_count("batch_size", batch_size)
    prompt = prompt_ids(model, tokenizer, prompt_tokens).repeat(batch_size, 1).to(model_device(model))
    with evaluation_mode(model):
        return measure_generation(lambda: _generate(model, prompt, new_tokens), prompt, new_tokens, repeats, warmup)


def measure_generation(
    run: Callable[[], tuple[float, float]], prompt: Tensor, new_tokens: int, repeats: int = 5, warmup: int = 1
) -> GenerationSpeed:
    """Measure anything that reads a prompt and writes on.

    Parameters
    ----------
    run
        Reads `prompt` and makes `new_tokens` decoding steps; returns the seconds of both.
    prompt
        ``(sequences, tokens)``.
    new_tokens, repeats, warmup
        As in :func:`generation_speed`.

    Raises
    ------
    ConfigurationError
        If a number is out of range.
    """
    _check_count("new_tokens", new_tokens)
    _check_rounds(repeats, warmup)
    prefill: list[float] = []
    decode: list[float] = []
    for turn in range(warmup + repeats):
        with _quiet():
            reading, writing = run()
        if turn >= warmup:
            prefill.append(prompt.numel() / reading)
            decode.append(len(prompt) * new_tokens / writing)
    sizes = (prompt.shape[1], new_tokens, len(prompt))
    return GenerationSpeed(Timing.of(prefill, "tokens/s"), Timing.of(decode, "tokens/s"), *sizes)


def prompt_ids(model: Any, tokenizer: Any, length: int) -> Tensor:
    """Return a prompt ``(1, length)``: an English text, or random tokens of the model where there is no tokenizer.

    Raises
    ------
    ConfigurationError
        If the length is below 1.
    """
    _check_count("prompt_tokens", length)
    if tokenizer is None:
        vocabulary = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (1, length), generator=generator)
    ids: list[int] = tokenizer(PROMPT)["input_ids"]
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]])


def _generate(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of reading the prompt (batch, length) and of the decoding steps after it."""
    last_only = accepted(model, logits_to_keep=1)
    _synchronise()
    start = time.perf_counter()
    output = model(prompt, use_cache=True, **last_only)
    token = logits_of(output)[:, -1:].argmax(-1)
    _synchronise()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ModelError(f"{type(model).__name__} returned no past_key_values; decoding speed needs a cache")
        output = model(token, past_key_values=cache, use_cache=True, **last_only)
        token = logits_of(output)[:, -1:].argmax(-1)
    _synchronise()
    return middle - start, time.perf_counter() - middle


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}; it must be an integer of at least 1")


def _check_rounds(repeats: int, warmup: int) -> None:
    if not isinstance(repeats, int) or repeats < 1:
        raise ConfigurationError(f"repeats is {repeats!r}; it must be an integer of at least 1")
    if not isinstance(warmup, int) or warmup < 0:
        raise ConfigurationError(f"warmup is {warmup!r}; it must be an integer of at least 0")


def _seconds(call: Callable[[], Any]) -> float:
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    """Wait for the accelerator, if one is in use: its kernels run after the call that starts them returns."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the garbage collector out of the measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
