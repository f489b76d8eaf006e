"""A step of LoRA fine-tuning on a long text with half of the tokens in every layer, and what it stores.

The model is the demo language model, its text real. Predictors that were fitted on shorter windows choose the blocks,
and stay in the cache with how well they do; all positions bear a label, so that the last layer keeps all of them. Dense
fine-tuning is the same model with its own loss; for the note it also runs with the loss in segments, to tell both parts
apart. Kept rows are read and written where they lie; against that runs the same with copies of them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, main, paired
from gossamer.activations.efficient_modules import efficient
from gossamer.attention import lemo_predictors, lemo_scores
from gossamer.attention.lemo import TokenSparseConfig, TokenSparsity, apply_token_sparsity
from gossamer.attention.lemo_predictors import BlockPredictor, fit_predictors, observe_blocks, recall_of_kept
from gossamer.core.segments import SegmentedLMLoss
from gossamer.features.store import model_fingerprint
from gossamer.measure import Timing, interleave
from gossamer.measure.saved_activations import saved_activations
from gossamer.models import calibration_batches, load, read_text
from gossamer.models.packages import cache_directory, cached_folder

SHARE = 0.5
DENSE, SEGMENTED, COPIED, OURS = "dense LoRA", "dense, loss in segments", "rows copied", "rows in place"


def measure(options: Options) -> list[Row]:
    """Time and memory of a step beside dense LoRA fine-tuning, and beside copies of the kept rows."""
    length = 256 if options.quick else 2048
    model, text = _model(options.quick)
    tokens = text(1, length, 0)[0]
    config = TokenSparseConfig(block=32 if options.quick else 64, share=SHARE)
    predictors, recall = _predictors(model, text, config, length, options.quick)
    sparsity = apply_token_sparsity(model, config, predictors)
    steps = {
        OURS: _step(model, tokens, sparsity, True, in_place=True),
        COPIED: _step(model, tokens, sparsity, True, in_place=False),
        DENSE: _step(model, tokens, sparsity, False, segments=False),
        SEGMENTED: _step(model, tokens, sparsity, False),
    }
    timings = interleave(steps, repeats=1 if options.quick else 3)
    saved = {name: _saved(model, step) for name, step in steps.items()}
    case = f"LoRA, {length:,} tokens, {sparsity.report.share:.0%} of them in a layer"
    note = (
        f"{recall:.0%} of the best half found (chance: {SHARE:.0%}); dense with the loss in segments takes "
        f"{timings[SEGMENTED].median:.3g} s, with rows copied {timings[COPIED].median:.3g} s"
    )
    blocks = f"dense with the loss in segments stores {saved[SEGMENTED]:,} B, with rows copied {saved[COPIED]:,} B"
    bytes_of = {name: Timing.of([float(count)]) for name, count in saved.items()}
    memory = paired("LeMo saved activations", case, bytes_of[OURS], DENSE, bytes_of[DENSE], 1.6, note=blocks)
    return [
        paired("LeMo training step", case, timings[OURS], DENSE, timings[DENSE], 1.5, note=note),
        replace(memory, unit="B"),
        paired("LeMo rows in place", case, timings[OURS], COPIED, timings[COPIED], 1.0),
    ]


def _predictors(
    model: Any, text: Callable[[int, int, int], list[Tensor]], config: TokenSparseConfig, length: int, quick: bool
) -> tuple[list[BlockPredictor], float]:
    """Predictors that were fitted on windows half as long, and how many of the best blocks they find; kept."""
    made = [
        model_fingerprint(model),
        repr(config),
        str(length),
        *map(inspect.getsource, (lemo_predictors, lemo_scores)),
    ]
    folder = cache_directory() / "predictors" / hashlib.sha256("\n".join(made).encode()).hexdigest()[:16]
    if not folder.is_dir():
        predictors = fit_predictors(model, text(1 if quick else 3, length // 2, 1), config, progress=False)
        observed = observe_blocks(model, text(1, length, 2), config.block, progress=False)
        found = recall_of_kept(predictors, observed, SHARE)
        with cached_folder(folder) as fresh:
            torch.save({"states": [p.state_dict() for p in predictors], "recall": found}, fresh / "predictors.pt")
    return _stored(folder, model.config.hidden_size, config.predictor_rank)


def _stored(folder: Path, width: int, rank: int) -> tuple[list[BlockPredictor], float]:
    kept = torch.load(folder / "predictors.pt", weights_only=True)
    predictors = [BlockPredictor(width, rank) for _ in kept["states"]]
    for predictor, state in zip(predictors, kept["states"]):
        predictor.load_state_dict(state)
        predictor.eval().requires_grad_(False)
    return predictors, sum(kept["recall"]) / len(kept["recall"])


def _model(quick: bool) -> tuple[Any, Callable[[int, int, int], list[Tensor]]]:
    """A model under LoRA, and windows of text for it."""
    torch.manual_seed(0)
    if not quick:
        loaded = load("demo", dtype="float32")
        book = read_text("moby-dick")
        model = efficient(loaded.model, "lora", "CAUSAL_LM").train()
        return model, lambda count, length, seed: calibration_batches(book, loaded.tokenizer, count, length, seed)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = efficient(LlamaForCausalLM(shape), "lora", "CAUSAL_LM").train()
    return model, lambda count, length, seed: list(torch.randint(512, (count, 1, length)))


def _step(
    model: Any, tokens: Tensor, sparsity: TokenSparsity, sparse: bool, segments: bool = True, in_place: bool = False
) -> Callable[[], Tensor]:
    """A whole step: forward, backward, and AdamW on what LoRA trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def forward() -> Tensor:
        sparsity.when = "training" if sparse else "never"
        sparsity.config = replace(sparsity.config, permutation_free=in_place)
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
