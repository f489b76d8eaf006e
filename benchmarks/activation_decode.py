"""Whole decoding with half of the activations silent, against our own dense decoding of the same weights in bfloat16.

``python -m benchmarks.activation_decode --json FILE`` runs the demo model and a random one whose matrices are as large
as those of models that people serve. The limit is 1 / (φ + (1 − φ) · (1 − s)) with φ the share of the bytes of weights
that every token reads in any case, the head included, and s the share of silent inputs that was really met.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Options, Row, main, paired
from gossamer.measure import Timing, interleave
from gossamer.models import load
from gossamer.runtime.program import DecodeProgram
from gossamer.runtime.thresholds import Thresholds

BAR = 0.9  # of the limit
SPARSITY, PROMPT, STEPS = 0.5, 32, 24
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}


def measure(options: Options) -> list[Row]:
    """The demo model and a larger one."""
    models: dict[str, Callable[[], nn.Module]] = {"demo model": lambda: load("demo", dtype="bfloat16").model}
    if not options.quick:
        models["random model of width 2048"] = _large
    return [_row(name, make(), options) for name, make in models.items()]


def _large() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**LARGE, num_hidden_layers=4, vocab_size=8192, max_position_embeddings=512)
    return LlamaForCausalLM(config).bfloat16().eval()


@torch.no_grad()
def thresholds_of(model: nn.Module, sparsity: float, tokens: Tensor) -> tuple[Thresholds, float]:
    """One threshold for each layer's inputs, and the share of them that it silences."""
    seen: dict[str, Tensor] = {}
    head = model.get_output_embeddings()  # type: ignore[operator]
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    model(tokens[None])
    for handle in handles:
        handle.remove()
    inputs, silent, all_inputs = {}, 0, 0
    for name, x in seen.items():
        sizes = x.float().abs().flatten()
        threshold = float(sizes.kthvalue(max(1, int(sparsity * len(sizes)))).values)
        inputs[name] = torch.full((x.shape[-1],), threshold)
        silent, all_inputs = silent + int((sizes <= threshold).sum()), all_inputs + len(sizes)
    return Thresholds(inputs), silent / all_inputs


def _row(name: str, model: nn.Module, options: Options) -> Row:
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (64,), generator=torch.Generator().manual_seed(0))
    thresholds, _ = thresholds_of(model, SPARSITY, tokens)
    dense = DecodeProgram.of(model, 256, verify=False)
    sparse = DecodeProgram.of(model, 256, verify=False, thresholds=thresholds)
    met = _met(model, thresholds, tokens)
    per_token = _in_turns({"ours": sparse, "theirs": dense}, tokens, 3 if options.quick else 15)
    phi = sparse.dense_share
    limit = 1 / (phi + (1 - phi) * (1 - met))
    return paired(
        f"decode, {SPARSITY:.0%} of inputs silent",
        f"{name}, {torch.get_num_threads()} threads",
        per_token["ours"],
        "our dense decode, bfloat16",
        per_token["theirs"],
        BAR * limit,
        per_token["theirs"].median / limit,
        note=f"φ {phi:.2f}, {met:.1%} silent, limit {limit:.2f}",
    )


@torch.no_grad()
def _met(model: nn.Module, thresholds: Thresholds, tokens: Tensor) -> float:
    """Share of the weights behind thresholds whose input is silent, while the thresholds hold."""
    silent = total = 0.0
    handles = []

    def count(name: str, module: nn.Linear) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal silent, total
            share = float((given[0].float().abs() <= thresholds.inputs[name]).float().mean())
            silent, total = silent + share * module.weight.numel(), total + module.weight.numel()

        return hook

    for name in thresholds.inputs:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(count(name, module)))  # type: ignore[arg-type]
    with thresholds.holding(model):
        model(tokens[None])
    for handle in handles:
        handle.remove()
    return silent / total


def _in_turns(programs: dict[str, DecodeProgram], tokens: Tensor, rounds: int) -> dict[str, Timing]:
    """Seconds of a token, without those of the prompt."""
    found: dict[str, list[float]] = {name: [] for name in programs}

    def once(name: str) -> None:
        found[name].append(_decode(programs[name], tokens))

    interleave({name: (lambda name=name: once(name)) for name in programs}, repeats=rounds)  # type: ignore[misc]
    return {name: Timing.of(seconds[1:]) for name, seconds in found.items()}  # the first was a warm-up


def _decode(program: DecodeProgram, tokens: Tensor) -> float:
    """The same tokens for both, so that neither the texts nor what is silent in them differ by chance."""
    session = program.session(PROMPT + STEPS)
    session.feed(tokens[:PROMPT])
    begin = time.perf_counter()
    for at in range(STEPS):
        session.feed(tokens[PROMPT + at : PROMPT + at + 1])
    return (time.perf_counter() - begin) / STEPS


if __name__ == "__main__":
    main(measure)
