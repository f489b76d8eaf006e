"""A step of LoRA fine-tuning on a long text with half of the tokens in every layer, and what it stores.

The model is the demo language model, its text real. Predictors that were fitted on shorter windows choose the blocks;
all positions bear a label, so that the last layer keeps all of them. Dense fine-tuning is the same model with its own
loss; for the note it also runs with the loss in segments, to tell both parts apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, main, paired
from gossamer.activations.efficient_modules import efficient
from gossamer.attention.lemo import TokenSparseConfig, TokenSparsity, apply_token_sparsity
from gossamer.attention.lemo_predictors import fit_predictors, observe_blocks, recall_of_kept
from gossamer.core.segments import SegmentedLMLoss
from gossamer.measure import Timing, interleave
from gossamer.measure.saved_activations import saved_activations
from gossamer.models import calibration_batches, load, read_text

SHARE = 0.5


def measure(options: Options) -> list[Row]:
    """Time and memory of a step beside dense LoRA fine-tuning."""
    length, fitted, windows = (256, 128, 1) if options.quick else (2048, 1024, 3)
    model, text = _model(options.quick)
    tokens, short, judged = text(1, length, 0)[0], text(windows, fitted, 1), text(1, length, 2)
    config = TokenSparseConfig(block=32 if options.quick else 64, share=SHARE)
    predictors = fit_predictors(model, short, config, progress=False)
    recall = recall_of_kept(predictors, observe_blocks(model, judged, config.block, progress=False), SHARE)
    sparsity = apply_token_sparsity(model, config, predictors)
    steps = {
        "ours": _step(model, tokens, sparsity, True, True),
        "theirs": _step(model, tokens, sparsity, False, False),
        "dense, loss in segments": _step(model, tokens, sparsity, False, True),
    }
    timings = interleave(steps, repeats=1 if options.quick else 3)
    saved = {name: _saved(model, step) for name, step in steps.items()}
    segmented = timings["dense, loss in segments"]
    case = f"LoRA, {length:,} tokens, {sparsity.report.share:.0%} of them in a layer"
    note = (
        f"{sum(recall) / len(recall):.0%} of the best half found; dense with the loss in segments takes "
        f"{segmented.median:.3g} s"
    )
    time = paired("LeMo training step", case, timings["ours"], "dense LoRA", timings["theirs"], 1.5, note=note)
    blocks = f"dense with the loss in segments stores {saved['dense, loss in segments']:,} B"
    memory = paired(
        "LeMo saved activations",
        case,
        Timing.of([float(saved["ours"])]),
        "dense LoRA",
        Timing.of([float(saved["theirs"])]),
        1.6,
        note=blocks,
    )
    return [time, Row(**{**memory.__dict__, "unit": "B"})]


def _model(quick: bool) -> tuple[Any, Callable[[int, int, int], list[Tensor]]]:
    """A model under LoRA, and windows of text for it."""
    if not quick:
        loaded = load("demo", dtype="float32")
        book = read_text("moby-dick")
        model = efficient(loaded.model, "lora", "CAUSAL_LM").train()
        return model, lambda count, length, seed: calibration_batches(book, loaded.tokenizer, count, length, seed)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = efficient(LlamaForCausalLM(shape), "lora", "CAUSAL_LM").train()
    return model, lambda count, length, seed: list(torch.randint(512, (count, 1, length)))


def _step(model: Any, tokens: Tensor, sparsity: TokenSparsity, sparse: bool, segments: bool) -> Callable[[], Tensor]:
    """A whole step: forward, backward, and AdamW on what LoRA trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def forward() -> Tensor:
        sparsity.when = "training" if sparse else "never"
        if not segments:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss
        with SegmentedLMLoss(512).installed(model):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss

    step.forward = forward  # type: ignore[attr-defined]
    return step


def _saved(model: Any, step: Callable[[], Tensor]) -> int:
    with saved_activations(model) as saved:
        loss = step.forward()  # type: ignore[attr-defined]
        held = saved.bytes
    del loss
    return held


if __name__ == "__main__":
    main(measure)
