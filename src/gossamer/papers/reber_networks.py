"""Networks that tell strings of the Reber grammar from others, and how they are trained and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.sparsifier import Sparsifier
from gossamer.papers.reber import VOCABULARY, ReberStrings
from gossamer.training.graph_rnn import GraphRNN

CELLS = ("tanh", "relu", "gru", "lstm")
_GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


def dense_body(cell: str, input_size: int, hidden: int, layers: int = 1) -> nn.RNNBase:
    """A recurrent layer of torch."""
    if cell in ("tanh", "relu"):
        return nn.RNN(input_size, hidden, layers, nonlinearity=cell)
    return (nn.GRU if cell == "gru" else nn.LSTM)(input_size, hidden, layers)


def equal_hidden(cell: str, input_size: int, parameters: int) -> int:
    """Width of the dense cell whose number of weights and biases comes closest to a given one."""

    def count(hidden: int) -> int:
        return _GATES[cell] * hidden * (input_size + hidden + 2)

    widest = math.isqrt(parameters // _GATES[cell]) + 2
    return min(range(1, widest + 1), key=lambda hidden: abs(count(hidden) - parameters))


class Recogniser(nn.Module):
    """Embedding of the symbols, a recurrent body, and a linear head on its state after the last symbol.

    Parameters
    ----------
    body
        A recurrent layer of torch, or a network with the wiring of a graph.
    """

    def __init__(self, body: nn.RNNBase | GraphRNN):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, body.input_size)
        self.body = body
        self.head = nn.Linear(body.output_size if isinstance(body, GraphRNN) else body.hidden_size, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits ``(batch, 2)`` of padded tokens ``(batch, longest)``."""
        embedded = self.embedding(tokens.t())
        if isinstance(self.body, GraphRNN):
            return self.head(self.body(embedded, lengths)[1])
        output = self.body(embedded)[0]
        return self.head(output[lengths - 1, torch.arange(len(lengths))])


@dataclass(frozen=True)
class GrammarTask:
    """Telling valid strings from others.

    Attributes
    ----------
    training, held_out
        Strings to learn from, and others to be judged by.
    batch, learning_rate
        Of Adam; gradients are clipped at 5, as in the thesis.
    """

    training: ReberStrings
    held_out: ReberStrings
    batch: int
    learning_rate: float

    def train(self, network: Recogniser, epochs: int, method: Sparsifier | None = None, cool: bool = True) -> None:
        """Train in place on batches drawn by torch's generator.

        Parameters
        ----------
        network
            What learns.
        epochs
            How often each string is seen.
        method
            What keeps the weights sparse meanwhile.
        cool
            Whether the learning rate falls to zero along a cosine.
        """
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        steps = epochs * math.ceil(len(self.training) / self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2 if cool else 1.0
        )
        run = method.attach(network, optimizer) if method else None
        network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(self.training)).split(self.batch):
                data = self.training
                loss = nn.functional.cross_entropy(network(data.tokens[rows], data.lengths[rows]), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5)
                optimizer.step()
                schedule.step()
        network.eval()
        if run:
            run.finalize()

    def accuracy(self, network: Recogniser) -> float:
        """Share of the held-out strings that the network gets right."""
        data = self.held_out
        with torch.inference_mode():
            parts = zip(data.tokens.split(500), data.lengths.split(500), data.labels.split(500))
            hits = [network(tokens, lengths).argmax(1) == labels for tokens, lengths, labels in parts]
        return float(torch.cat(hits).double().mean())
