"""Pictures of nine digits, a question about one of them, and a small model of pictures and words that answers it.

One digit lies between two lines, above and below, another between two at its sides; the question says which of them is
meant. The model is a LLaVA of transformers: an encoder of patches, and a decoder that reads them as tokens before the
question. It is trained here, on handwritten digits; of the 36 patches four show what is asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.activations.core_sets import CoreNeurons, CoreTokens
from gossamer.activations.corematching import CoreMatching, CoreMatchingGenerator
from gossamer.core.randomness import generator_for
from gossamer.models.sliced_feedforward import slice_gated_ffn
from gossamer.papers.core_quiz import Quiz, judged, token_scores
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Track
from gossamer.papers.lazy_networks import DEVIATION, MEAN

ROWS = 3
CELLS = ROWS * ROWS
CELL, PATCH = 14, 7  # pixels
SIDE = ROWS * CELL
PATCHES = (SIDE // PATCH) ** 2
# digits are the tokens 0 to 9, and then come the two kinds of lines
LINES, ASK, BEGIN, PICTURE, VOCABULARY = 10, 12, 13, 14, 15


def cells_of_patches() -> Tensor:
    """In which place each patch lies, ``(36,)``, rows first."""
    across = torch.arange(SIDE // PATCH) // (CELL // PATCH)
    return (ROWS * across[:, None] + across).flatten()


def draw_pictures(data: Digits, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of nine digits at half resolution, two of them between lines.

    Returns
    -------
    tuple
        Pixels ``(count, 1, 42, 42)``, what is in each place ``(count, 9)``, and the places between horizontal and
        between vertical lines ``(count, 2)``.
    """
    rows = torch.randint(len(data), (count, CELLS), generator=generator)
    small = functional.avg_pool2d(data.images[rows.flatten()], 2).view(count, CELLS, CELL, CELL)
    marked = torch.rand(count, CELLS, generator=generator).argsort(1)[:, :2]
    each = torch.arange(count)[:, None]
    ends = torch.tensor([0, CELL - 1])
    small[each, marked[:, :1], ends] = 1.0
    small[each, marked[:, 1:], :, ends] = 1.0
    tiled = small.view(count, ROWS, ROWS, CELL, CELL).transpose(2, 3).reshape(count, 1, SIDE, SIDE)
    return (tiled - MEAN) / DEVIATION, data.labels[rows], marked


def new_model(settings: dict[str, Any]) -> Any:
    """A LLaVA with random weights."""
    import transformers

    size = {"hidden_size": settings["width"], "intermediate_size": 2 * settings["width"], "num_attention_heads": 4}
    # the usual deviation, 0.02, is made for wide models; a narrow one starts to learn late with it
    spread = settings["width"] ** -0.5
    text = transformers.LlamaConfig(
        **size, num_hidden_layers=settings["layers"], vocab_size=VOCABULARY, initializer_range=spread
    )
    pictures = transformers.CLIPVisionConfig(
        **size,
        num_hidden_layers=1,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        projection_dim=size["hidden_size"],
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=pictures,
            text_config=text,
            image_seq_length=PATCHES,
            image_token_index=PICTURE,
            image_token_id=PICTURE,
            vision_feature_layer=-1,
        )
    )


def answering_model(data: Digits, settings: dict[str, Any]) -> Any:
    """Train a model to say what each patch shows, and which digit lies between the lines that it is asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_model(settings)
    generator = generator_for("core pictures", 0)
    rate, steps = settings["learning_rate"], settings["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20, 1.5 * (1 - step / steps))
        pixels, shown, marked = draw_pictures(data, settings["batch"], generator)
        asked = torch.rand(marked.shape, generator=generator).argsort(1)
        answers = shown.gather(1, marked.gather(1, asked))
        turns = torch.stack([LINES + asked, torch.full_like(asked, ASK), answers], 2).flatten(1)
        ids = torch.cat([_beginning(len(shown)), turns], 1)
        logits = model(input_ids=ids, pixel_values=pixels).logits
        said = logits[:, PATCHES + 2 :: 3]
        loss = functional.cross_entropy(said.flatten(0, 1), answers.flatten())
        loss = loss + functional.cross_entropy(
            logits[:, 1 : PATCHES + 1].flatten(0, 1), shown[:, cells_of_patches()].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _beginning(count: int) -> Tensor:
    ids = torch.full((count, 1 + PATCHES), PICTURE)
    ids[:, 0] = BEGIN
    return ids


def picture_quiz(data: Digits, generator: torch.Generator) -> Quiz:
    """One picture, the question for the digit between lines of one kind, and that digit."""
    pixels, shown, marked = draw_pictures(data, 1, generator)
    kind = int(torch.randint(2, (), generator=generator))
    place = int(marked[0, kind])
    question = torch.tensor([[LINES + kind, ASK]])
    prompt = torch.cat([_beginning(1), question], 1)
    relevant = torch.zeros(prompt.shape[1], dtype=torch.bool)
    relevant[1 : PATCHES + 1] = cells_of_patches() == place
    return Quiz(prompt, shown[:, place : place + 1], prompt[0] == PICTURE, relevant, {"pixel_values": pixels})


@cache
def _trained(settings: tuple[tuple[str, Any], ...]) -> tuple[Any, Digits]:
    """A model, the same for all seeds, and digits that it has not seen."""
    given = dict(settings)
    training, held_out = digits().split(given["training"], 0)
    return answering_model(training, given), held_out


def on_pictures(settings: dict[str, Any], rho: float, beta: float, seed: int, progress: Track) -> dict[str, Any]:
    """Answers about pictures of which patches were dropped, and answers by a share of the neurons.

    Parameters
    ----------
    settings
        Of the model, its training, and how many pictures are asked about.
    rho, beta
        Of the core neurons.
    seed
        Of the pictures; the model is the same for all.
    progress
        Tells how far it is.

    Returns
    -------
    dict
        ``tokens``: for every way to choose, the share of right answers, their loss, and the relevant share of the
        patches that were kept. ``neurons``: the loss by each set of them.
    """
    model, unseen = _trained(tuple(sorted((name, _frozen(value)) for name, value in settings.items())))
    generator = generator_for("picture quizzes", seed)
    matching = CoreMatching(layer=0, neurons=CoreNeurons(rho, beta)).install(model)
    quizzes = [picture_quiz(unseen, generator) for _ in range(settings["pictures"])]
    rows = [_dropped(matching, quiz, settings["shares"], generator) for quiz in progress(quizzes, "dropping patches")]
    cells = [_silenced(matching, quiz, generator) for quiz in quizzes]
    return {"tokens": {label: _mean([row[label] for row in rows]) for label in rows[0]}, "neurons": _mean(cells)}


def _dropped(
    matching: CoreMatchingGenerator, quiz: Quiz, shares: list[float], generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """As pages of text are dropped: the first token stays, and so does the question."""
    scores = token_scores(matching, quiz, generator, late=-2)  # the kind of lines that is asked for
    found = {"full": judged(matching, quiz, torch.arange(quiz.prompt.shape[1]))}
    for name in ("core", "core of a late token"):
        found[f"elbow, {name}"] = judged(matching, quiz, CoreTokens(sinks=1).choose(scores[name], quiz.droppable))
    for share in shares:
        chooser = CoreTokens(sinks=1, elbow=False, share=share)
        for name, values in scores.items():
            found[f"{name} at {share}"] = judged(matching, quiz, chooser.choose(values, quiz.droppable))
    return found


def _silenced(matching: CoreMatchingGenerator, quiz: Quiz, generator: torch.Generator) -> dict[str, float]:
    """Loss on the answer if the last token of the question is read with a share of the neurons."""
    before, last = quiz.prompt[:, :-1], quiz.prompt[:, -1:]
    found = {}
    for name in ("all", "core", "random"):
        read = matching.read(before, quiz.droppable[:-1], kept=torch.arange(before.shape[1]), **quiz.inputs)
        if name == "all":
            read.neurons = []
        elif name == "random":
            read.neurons = [
                slice_gated_ffn(cut.layer, torch.randperm(cut.layer.width, generator=generator)[: len(cut.index)])
                for cut in read.neurons
            ]
        with matching.sparse(read):
            logits = matching.extend(read, last)
        found[name] = float(functional.cross_entropy(logits, quiz.answer[0]))
    return found


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
