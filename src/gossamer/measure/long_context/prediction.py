"""Answers of a language model, in two phases: the prompt is read, then tokens are decoded one by one.

Where the first token of the answer comes from decides what a phase is answerable for. If the whole prompt is read, its
last token looks for the answer while reading; if that token is decoded, every token of the answer is looked for by a
step of decoding. Either way the search itself is exposed to what is being judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.sample import Sample
from gossamer.measure.long_context.words import batch_of
from gossamer.measure.windows import evaluation_mode, logits_of, model_device


def answers(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, batch_size: int = 8, decoded_prompt: int = 1
) -> list[str]:
    """Greedy answers to prompts of equal length.

    Parameters
    ----------
    model
        A Hugging Face causal language model, with a sparse method at work or without.
    samples
        Prompts.
    tokenizer
        Of the model.
    batch_size
        Prompts that are answered together.
    decoded_prompt
        How many last tokens of the prompt are decoded instead of read.

    Returns
    -------
    list of str
        Decoded tokens, special ones left out.

    Raises
    ------
    ConfigurationError
        If the prompts differ in length, or are not longer than what is to be decoded of them.
    """
    lengths = {len(sample.prompt) for sample in samples}
    if len(lengths) != 1:
        raise ConfigurationError(f"prompts have {sorted(lengths)} tokens; give prompts of one length")
    if not 0 <= decoded_prompt < min(lengths):
        raise ConfigurationError(
            f"decoded_prompt is {decoded_prompt}; it must be at least 0 and below the prompt's {min(lengths)} tokens"
        )
    found: list[str] = []
    with evaluation_mode(model):
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            ids = batch_of([sample.prompt for sample in part]).to(model_device(model))
            tokens = _decode(model, ids, max(s.max_new_tokens for s in part), _ends(model, tokenizer), decoded_prompt)
            found += [
                tokenizer.decode(_until_end(row, sample.max_new_tokens, _ends(model, tokenizer)))
                for row, sample in zip(tokens.tolist(), part)
            ]
    return found


def decoded_nll(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Negative log-likelihood of each token behind a prompt and the one after it, decoded one by one.

    Parameters
    ----------
    model
        A Hugging Face causal language model.
    ids
        ``(1, tokens)``.
    prompt
        How many tokens are read as the prompt.

    Returns
    -------
    Tensor
        ``(tokens − prompt − 1,)``, in nats.
    """
    found = []
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
        for place in range(prompt, ids.shape[1] - 1):
            output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            scores = logits_of(output)[0, -1].float().log_softmax(-1)
            found.append(-scores[ids[0, place + 1]])
    return torch.stack(found)


def _decode(model: nn.Module, ids: Tensor, count: int, ends: set[int], decoded: int) -> Tensor:
    """Greedily chosen tokens, ``(prompts, at most count)``."""
    read = ids.shape[1] - decoded
    output = model(input_ids=ids[:, :read], use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    for place in range(read, ids.shape[1]):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    chosen: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(sorted(ends), device=ids.device)
    while True:
        chosen.append(logits_of(output)[:, -1:].argmax(-1))
        done |= torch.isin(chosen[-1][:, 0], stops)
        if len(chosen) == count or bool(done.all()):
            return torch.cat(chosen, 1)
        output = model(input_ids=chosen[-1], past_key_values=cache, use_cache=True)


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end an answer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, list | tuple) else {ends} if isinstance(ends, int) else set()
    return found


def _until_end(tokens: list[int], count: int, ends: set[int]) -> list[int]:
    kept = []
    for token in tokens[:count]:
        if token in ends:
            break
        kept.append(token)
    return kept
