"""LeMo's claims on a pretrained language model: half of the tokens of a long text are enough, if they are well chosen.

Documents are pieces of a book with numbered values between them; at their end some of the values are asked for, and
these answers alone bear labels, and stay in every layer. A model is fine-tuned on them by LoRA with all tokens, or with
half of the blocks of every layer: those that receive most attention, as predictors see it coming, or those that chance
picks. Every model is judged on held-out documents with all tokens; the one that was tuned dense also with half of them,
chosen in all ways, which shows what the choice is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.efficient_modules import efficient
from gossamer.attention.lemo import TokenSparseConfig, always, apply_token_sparsity
from gossamer.attention.lemo_predictors import BlockPredictor, fit_predictors, observe_blocks, recall_of_kept
from gossamer.core.segments import SegmentedLMLoss
from gossamer.measure.saved_activations import saved_activations
from gossamer.models import load, read_text
from gossamer.papers.byte_model import train
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

SHARE, RECALL, COST, POINTS, BYTES = 0.5, 0.85, 0.05, 0.02, 0.1
DENSE, ORACLE, PREDICTED, CHANCE, RECENT = "dense", "attention", "predicted", "random", "recent"
SPARSE = (ORACLE, PREDICTED, CHANCE, RECENT)
_DIGITS = 3

Document = tuple[Tensor, Tensor]


class Documents:
    """Pieces of a book, a numbered value behind each, and questions for some of the values at the end.

    Parameters
    ----------
    tokenizer
        Of the model.
    pairs, questions
        How many values, and how many of them are asked for.
    seed
        Of everything that is drawn.
    """

    def __init__(self, tokenizer: Any, pairs: int, questions: int, seed: int):
        book = read_text("moby-dick")
        self.tokenizer, self.pairs, self.questions = tokenizer, pairs, questions
        self.halves = (book[: len(book) // 2], book[len(book) // 2 :])
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int, length: int, held_out: bool = False) -> list[Document]:
        """Token ids and labels, ``(1, about length)`` each; a label is −100 where none of an answer's digits stands."""
        return [self._document(length, self.halves[held_out]) for _ in range(count)]

    def _random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def _document(self, length: int, text: str) -> Document:
        names = (torch.randperm(90, generator=self.generator)[: self.pairs] + 10).tolist()
        values = {name: self._random(10 ** (_DIGITS - 1), 10**_DIGITS) for name in names}
        lines = [self._tokens(f"\n{name} = {value}\n") for name, value in values.items()]
        asked = torch.randperm(self.pairs, generator=self.generator)[: self.questions].tolist()
        answers = [self._tokens(f"\n{names[i]} = {values[names[i]]}") for i in asked]
        start = self._random(0, len(text) - 8 * length)
        filler = self._tokens(text[start : start + 8 * length])
        room = (length - sum(map(len, (*lines, *answers)))) // self.pairs
        prompt = [token for i, line in enumerate(lines) for token in (*filler[i * room : (i + 1) * room], *line)]
        tokens = torch.tensor([prompt + [token for answer in answers for token in answer]])
        labels = torch.full_like(tokens, -100)
        end = len(prompt)
        for answer in answers:
            end += len(answer)
            labels[0, end - _DIGITS : end] = tokens[0, end - _DIGITS : end]
        return tokens, labels

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Fit predictors, fine-tune dense and sparse, judge."""
    loaded = load(settings["model"], dtype="float32")
    model, length = loaded.model, settings["length"]
    documents = Documents(loaded.tokenizer, settings["pairs"], settings["questions"], seed)
    rules = {"block": settings["block"], "predictor_rank": settings["rank"], "loss_layers": settings["loss layers"]}
    config = TokenSparseConfig(share=SHARE, **rules)
    fitted = [tokens for tokens, _ in documents.draw(settings["fitted"], length)]
    predictors = fit_predictors(model, fitted, config, progress=False, steps=settings["predictor steps"])
    longer = [tokens for tokens, _ in documents.draw(settings["longer"], 2 * length, held_out=True)]
    recall = recall_of_kept(predictors, observe_blocks(model, longer, config.block, progress=False), SHARE)
    training = documents.draw(settings["steps"], length)
    held_out = documents.draw(settings["judged"], length, held_out=True)
    found: dict[str, dict[str, float]] = {"before": _judged(model, held_out)}
    for name in progress((DENSE, PREDICTED, CHANCE), "fine-tuning"):
        tuned = _tuned(model, training, settings, seed, None if name == DENSE else _rules(config, name), predictors)
        found[name] = _judged(tuned, held_out)
        if name == DENSE:
            for other in SPARSE:
                with apply_token_sparsity(tuned, _rules(config, other), predictors) as sparsity, always(sparsity):
                    found[f"dense, read by {other}"] = _judged(tuned, held_out)
            saved = _saved(tuned, training[0], _rules(config, PREDICTED), predictors)
        model = tuned.unload()
    dense = found[DENSE]["loss"]
    curves = {
        f"tuned dense, read by {name}": {"x": [SHARE, 1.0], "y": [found[f"dense, read by {name}"]["loss"], dense]}
        for name in SPARSE
    }
    curves |= {f"tuned by {name}": {"x": [SHARE], "y": [found[name]["loss"]]} for name in (PREDICTED, CHANCE)}
    return {"found": found, "recall": recall, "saved": saved, "curves": curves}


def _rules(config: TokenSparseConfig, scores: str) -> TokenSparseConfig:
    return TokenSparseConfig(**{**config.__dict__, "scores": scores})


def _tuned(
    model: Any,
    training: Sequence[Document],
    settings: dict[str, Any],
    seed: int,
    rules: TokenSparseConfig | None,
    predictors: list[BlockPredictor],
) -> Any:
    """The model, fine-tuned by LoRA with some of the tokens or all; its own weights stay as they are."""
    torch.manual_seed(seed)
    tuned = efficient(model, "lora", "CAUSAL_LM").train()
    sparsity = None if rules is None else apply_token_sparsity(tuned, rules, predictors)
    with SegmentedLMLoss().installed(tuned):
        train(tuned, iter(training), lambda pair: _loss(tuned, pair), len(training), settings["rate"])
    if sparsity is not None:
        sparsity.remove()
    return tuned.eval()


def _loss(model: Any, document: Document, **options: Any) -> Tensor:
    return model(input_ids=document[0], labels=document[1], use_cache=False, **options).loss


@torch.no_grad()
def _judged(model: Any, held_out: Sequence[Document]) -> dict[str, float]:
    """Loss of the answers in nats a digit, and share of the values that are right in every digit."""
    model.eval()
    losses, right = [], []
    for tokens, labels in held_out:
        output = model(input_ids=tokens, labels=labels, use_cache=False)
        losses.append(float(output.loss))
        places = labels[0, 1:] != -100
        hits = output.logits[0, :-1].argmax(-1)[places] == tokens[0, 1:][places]
        right += hits.view(-1, _DIGITS).all(1).tolist()
    return {"loss": sum(losses) / len(losses), "looked up": sum(right) / len(right)}


def _saved(
    tuned: Any, document: Document, rules: TokenSparseConfig, predictors: list[BlockPredictor]
) -> dict[str, float]:
    """The most bytes that are held for the backward pass at any time, logits left out, and the share of tokens kept."""
    tuned.train()

    def held(**options: Any) -> float:
        with saved_activations(tuned) as saved, SegmentedLMLoss().installed(tuned):
            _loss(tuned, document, **options).backward()
        tuned.zero_grad()
        return float(saved.peak)

    length = document[0].shape[1]
    links = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    found = {"dense": held(), "all keys, by a mask": held(attention_mask=links)}
    links[..., rules.block : length // 2] = False
    found["half of the keys, by a mask"] = held(attention_mask=links)
    with apply_token_sparsity(tuned, rules, predictors) as sparsity:
        found["half of the tokens"] = held()
        found["kept share"] = sparsity.report.share
    tuned.eval()
    return found


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: Sequence[Observation]) -> Verdict:
    """Paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})

    def gap(name: str, measure: str, other: str = DENSE) -> list[float]:
        return [o["found"][name][measure] - o["found"][other][measure] for o in observations]

    read = "dense, read by"
    lost = {name: gap(f"{read} {name}", "loss") for name in SPARSE}
    saved = [o["saved"] for o in observations]
    needed = {
        "loss with half of the tokens: random − predicted": [a - b for a, b in zip(lost[CHANCE], lost[PREDICTED])],
        "half of what chance costs above attention − what prediction does": [
            (chance - best) / 2 - (ours - best)
            for chance, best, ours in zip(lost[CHANCE], lost[ORACLE], lost[PREDICTED])
        ],
        f"{COST} − loss that tuning on half of the tokens costs": [COST - value for value in gap(PREDICTED, "loss")],
        f"look-ups, predicted − dense + {POINTS}": [value + POINTS for value in gap(PREDICTED, "looked up")],
        f"recall at twice the length − {RECALL}": [sum(o["recall"]) / len(o["recall"]) - RECALL for o in observations],
        f"kept share + {BYTES} − share of the bytes": [
            s["kept share"] + BYTES - s["half of the tokens"] / s["dense"] for s in saved
        ],
    }
    intervals: dict[str, Interval] = {name: mean_interval(values) for name, values in needed.items()}
    numbers: dict[str, Interval | float] = {**intervals, **_told(observations)}
    wrong = [name for name, value in intervals.items() if value.below_zero]
    open_ = [name for name, value in intervals.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "half of the tokens, predicted, are enough, and the rest is not stored", numbers)


def _told(observations: Sequence[Observation]) -> dict[str, float]:
    count = len(observations)
    told = {
        f"{name}: {measure}": sum(o["found"][name][measure] for o in observations) / count
        for name, measures in observations[0]["found"].items()
        for measure in measures
    }
    saved = {f"saved, {name}": sum(o["saved"][name] for o in observations) / count for name in observations[0]["saved"]}
    layers = range(len(observations[0]["recall"]))
    recall = {f"recall of layer {i}": sum(o["recall"][i] for o in observations) / count for i in layers}
    return told | saved | recall


_QUICK = {
    "model": "demo",
    "length": 384,
    "pairs": 16,
    "questions": 8,
    "block": 16,
    "rank": 32,
    "loss layers": 30,
    "fitted": 3,
    "predictor steps": 100,
    "longer": 1,
    "steps": 4,
    "rate": 2e-3,
    "judged": 2,
}
_FULL = {
    **_QUICK,
    "length": 4096,
    "pairs": 64,
    "questions": 16,
    "block": 64,
    "fitted": 64,
    "predictor steps": 1000,
    "longer": 8,
    "steps": 200,
    "judged": 32,
}

experiment = Experiment(
    slug="lemo",
    claim=(
        "In fine-tuning on long contexts half of the tokens may be left out of every layer, chosen by a predictor "
        "before the layer is computed: accuracy stays, chance does much worse, and what is left out is not stored."
    ),
    rule=(
        "holds if, at 95 % over seeds, of the densely tuned model read with half of the blocks the loss of the answers "
        "is lower for predicted than for random blocks, by at least half of what attention itself gains; tuning with "
        "predicted blocks costs less than 0.05 nats a digit and less than 2 points of values when read with all "
        "tokens; predictors find more than 85 % of the best half in held-out documents of twice the length; and the "
        "share of the dense model's stored bytes exceeds the share of kept tokens by less than 0.1. Does not hold if "
        "one is wholly reversed. Recent blocks, and masks of keys, which store as much as dense, are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": _QUICK, "full": _FULL},
    seeds=3,
    x_label="share of the blocks in a layer",
    y_label="loss of held-out answers, nats a digit",
)
