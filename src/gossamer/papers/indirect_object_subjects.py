"""Models that read who gives something to whom, and where in them the answer is decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.features.dictionary_evaluation import Counterfactual
from gossamer.features.heads import evaluating, last_logits
from gossamer.features.indirect_object import NameLanguage, changed
from gossamer.features.replay import Replay
from gossamer.features.sections import Node, read_nodes, replaced_logits
from gossamer.models import calibration_batches, load, read_text
from gossamer.models.blocks import find_stacks
from gossamer.papers.small_transformers import IGNORED, SmallTransformer, teach


@dataclass(eq=False)
class Subject:
    """A model, prompts, and the place where the answer is decided.

    Attributes
    ----------
    model, language
        What reads, and what is written.
    node
        The place.
    labels, tests
        Values of all variables, of prompts to learn from and to judge by.
    text
        Activations at the same place on everything else that the model reads.
    features, edits
        Of the autoencoders, and how many are exchanged.
    """

    model: nn.Module
    language: NameLanguage
    node: Node
    labels: dict[str, Tensor]
    tests: dict[str, Tensor]
    text: Tensor
    features: int
    edits: list[int]

    def activations(self, labels: Mapping[str, Tensor]) -> Tensor:
        """What the model's own are on prompts, ``(prompts, d)``."""
        return read_nodes(self.model, self.language.render(labels), [self.node])[0]

    def patch(self, labels: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Puts activations in the place of those on these prompts; logits of names alone, for only they can follow."""
        tokens = self.language.render(labels)
        replay = Replay(self.model, tokens)
        skipped = replay.before(self.node.module) + 1

        def into(x: Tensor) -> Tensor:
            with replay.skipping(skipped):
                logits = replaced_logits(self.model, tokens, [self.node], [x], batch=len(tokens))
            return logits[:, list(self.language.names)]

        return into

    def metric(self, labels: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """How far the receiver is ahead of the giver."""
        rows = torch.arange(len(labels["io"]))
        return lambda logits: logits[rows, labels["io"]] - logits[rows, labels["s"]]

    def counterfactual(self, attribute: str, seed: int) -> Counterfactual:
        """The prompts to judge by, and what they would be with another value of a variable."""
        old, new = self.tests, changed(self.tests, self.language.sizes, attribute, seed)
        rows = torch.arange(len(old["io"]))
        return Counterfactual(
            attribute,
            self.activations(old),
            self.activations(new),
            old,
            new,
            self.patch(old),
            lambda logits: logits[rows, new[attribute]] - logits[rows, old[attribute]],
        )


def small_subject(settings: dict[str, Any], seed: int) -> Subject:
    """A transformer that has learned who receives, and nothing else."""
    people = settings["names"]
    words = iter(range(6, 1000))
    language = NameLanguage(
        (0, "first", 1, "second", 2, "place", 3, "subject", 4, "object", 5),
        *(tuple(next(words) for _ in range(count)) for count in (people, 8, 8)),
    )
    model = SmallTransformer(
        next(words), len(language.frame), settings["width"], settings["heads"], settings["layers"], True, seed
    )

    def lesson(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = language.sample(settings["batch"], int(torch.randint(2**40, (), generator=generator)))
        tokens = language.render(labels)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -1] = language.answers(labels)[0][:, 0]
        return tokens, targets

    teach(model, lesson, settings["steps"], settings["learning_rate"], seed)
    labels, tests = _solved(model, language, settings["prompts"], settings["held_out"], seed)
    node = _deciding(model, language, tests)
    # everything that passes this place, at whatever token: what the model's own text is
    text = _anywhere(model, node, language.render(labels)[:400])
    return Subject(model, language, node, labels, tests, text, settings["features"], settings["edits"])


def real_subject(settings: dict[str, Any], seed: int) -> Subject:
    """The demo model."""
    loaded = load("demo", dtype="bfloat16")
    language = NameLanguage.of(loaded.tokenizer, names=settings["names"])
    labels, tests = _solved(loaded.model, language, settings["real_prompts"], settings["real_held_out"], seed)
    node = _deciding(loaded.model, language, tests)
    windows = calibration_batches(read_text("moby-dick"), loaded.tokenizer, settings["text_tokens"] // 100, 100, seed)
    tokens = torch.cat(windows)
    text = _anywhere(loaded.model, node, tokens)
    return Subject(loaded.model, language, node, labels, tests, text, settings["real_features"], settings["real_edits"])


def _anywhere(model: nn.Module, node: Node, tokens: Tensor) -> Tensor:
    """Activations of the node's module at all tokens but the first, ``(n, d)``."""
    nodes = [Node(node.module, node.side, place) for place in range(1, tokens.shape[1])]
    return torch.cat(read_nodes(model, tokens, nodes, batch=16))


def _solved(
    model: nn.Module, language: NameLanguage, count: int, held_out: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prompts on which the receiver is ahead, to learn from, and to judge by: with pairs of names that are new."""
    parts = []
    for number, (wanted, unseen) in enumerate(((count, False), (held_out, True))):
        labels = language.sample(wanted, 2 * seed + number, unseen)
        task = language.task(labels)
        kept = task.solved(model)
        parts.append({name: value[kept] for name, value in labels.items()})
    return parts[0], parts[1]


@torch.no_grad()
def _deciding(model: nn.Module, language: NameLanguage, labels: dict[str, Tensor]) -> Node:
    """The first block whose output at the last token, put in from other prompts, moves the answer by nine tenths."""
    few = {name: value[:40] for name, value in labels.items()}
    other = {name: value.roll(1, 0) for name, value in few.items()}
    names = torch.tensor(language.names)
    rows = torch.arange(len(few["io"]))

    def ahead(logits: Tensor) -> float:
        return float((logits[rows, names[other["io"]]] - logits[rows, names[few["io"]]]).mean())

    tokens, twins = language.render(few), language.render(other)
    blocks = [name for stack in find_stacks(model) for name in stack.blocks]
    nodes = [Node(name, "output", language.position("end")) for name in blocks]
    values = read_nodes(model, twins, nodes)
    replay = Replay(model, tokens)
    with evaluating(model):
        base, goal = ahead(replay.logits), ahead(last_logits(model, twins))
    for number, node in enumerate(nodes):
        with replay.skipping(number + 1):
            found = ahead(replaced_logits(model, tokens, [node], [values[number]]))
        if (found - base) >= 0.9 * (goal - base):
            return node
    return nodes[-1]
