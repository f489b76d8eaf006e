"""The heads of a circuit, from the integers that a small autoencoder turns their outputs into.

What a head writes on a prompt is a vector; the strongest feature of a small sparse autoencoder, trained on the outputs
of all heads on some ten prompts, makes it an integer. A head that takes part in a task writes integers on prompts of
the task that it never writes on others like them. So counting suffices, without gradients or ablation of the model
[O'Neill and Bui, 2024, arXiv 2405.12522].
"""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import ReLU
from gossamer.features.sae import SAE

Start = Literal["zero", "median"]
Unit = Literal["features", "coordinates"]
Ranking = Literal["nodes", "edges"]


def train_head_sae(
    rows: Tensor,
    n_codes: int = 200,
    l1: float = 0.02,
    epochs: int = 500,
    lr: float = 1e-3,
    start: Start = "zero",
    unit: Unit = "features",
    rescale: bool = False,
    seed: int = 0,
) -> SAE:
    """Train the small autoencoder on all outputs at once.

    The loss is ``mean((x − x̂)²) + λ · mean‖f‖₁``, the first mean over numbers and the second over rows, so that λ acts
    the more the larger d is. Rows of the encoder stay of length one, as those of the decoder.

    Parameters
    ----------
    rows
        Outputs of heads, ``(rows, d)``.
    n_codes
        Features F.
    l1
        λ.
    epochs, lr
        Steps of Adam, and its rate.
    start
        Of the bias: zero, or the geometric median of the rows.
    unit
        What has length one in the decoder: a feature's direction, or, as in the published code, a coordinate of the
        output over all features.
    rescale
        Whether rows are first scaled so that their mean square is one, which makes λ mean the same for every model.
    seed
        Of the weights at the beginning.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite.
    """
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("outputs of heads hold NaN or infinity; the model or the capture is damaged")
    width = rows.shape[1]
    generator = generator_for("features of heads", seed)
    sae = SAE(width, n_codes, ReLU(), seed)
    with torch.no_grad():
        if rescale:
            sae.scale.copy_(1 / rows.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
        x = rows * sae.scale
        sae.encoder.copy_(torch.nn.functional.normalize(torch.randn(n_codes, width, generator=generator), dim=1))
        sae.encoder_bias.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        if start == "median":
            sae.bias.copy_(geometric_median(x))
    constrained = ((sae.encoder, 1), (sae.decoder, 1 if unit == "features" else 0))
    optimizer = torch.optim.Adam(sae.parameters(), lr)
    for _ in range(epochs):
        # dense on purpose: half of the features of every row are active at first, and rows are few
        features = torch.addmm(sae.encoder_bias, x - sae.bias, sae.encoder.t()).relu()
        loss = (torch.addmm(sae.bias, features, sae.decoder) - x).square().mean() + l1 * features.sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for weight, axis in constrained:
            _straighten_(weight, axis)
        optimizer.step()
        with torch.no_grad():
            for weight, axis in constrained:
                weight.copy_(torch.nn.functional.normalize(weight, dim=axis))
    return sae.eval()


@torch.no_grad()
def _straighten_(weight: Tensor, axis: int) -> None:
    """Take out of a gradient what would only change lengths."""
    grad = weight.grad
    if grad is not None:
        grad -= (grad * weight).sum(axis, keepdim=True) * weight


def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point of which the distances to all rows ``(n, d)`` sum up to the least, by Weiszfeld's iteration."""
    point = rows.mean(0)
    for _ in range(iterations):
        weight = 1 / (rows - point).norm(dim=1).clamp(min=1e-12)
        found = (weight[:, None] * rows).sum(0) / weight.sum()
        moved = (found - point).norm()
        point = found
        if moved <= tolerance * point.norm().clamp(min=1e-12):
            break
    return point


def discretise(sae: SAE, outputs: Tensor) -> Tensor:
    """The strongest feature of every output ``(…, d)``, int64; F where none is active: silence is a code too."""
    affinity = sae.affinity(outputs)
    best = affinity.max(1)
    codes = torch.where(best.values > 0, best.indices, sae.n_features)
    return codes.view(outputs.shape[:-1])


def count_unique(codes: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """For every column, how many codes appear in positive rows only, and how many appear at all.

    Parameters
    ----------
    codes
        ``(rows, columns)`` int64, not negative.
    positive
        ``(rows,)`` bool.

    Examples
    --------
    >>> count_unique(torch.tensor([[1, 5], [2, 5], [2, 6]]), torch.tensor([True, True, False]))
    (tensor([1, 1]), tensor([2, 2]))
    """
    # sorted together with the label, a code that some negative has begins with an even number
    keys = (2 * codes + positive[:, None]).sort(0).values
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] // 2 != keys[:-1] // 2
    return (begins & (keys % 2 == 1)).sum(0), begins.sum(0)


class DiscreteSAECircuit(BaseEstimator):
    """Score heads and pairs of heads by the integers that only prompts of a task have.

    Parameters
    ----------
    n_codes
        Features of the autoencoder, F.
    l1
        Weight of its penalty, λ; the paper takes 0.05 for docstrings.
    epochs, lr
        Of its training.
    n_examples
        Prompts that it is trained on, drawn from both kinds; codes are then counted on all.
    normalize
        Whether counts are divided by the number of different codes, since raw ones favour heads with many.
    start, unit, rescale
        See :func:`train_head_sae`.
    seed
        Of the draw and of the weights.

    Attributes
    ----------
    sae_
        The autoencoder.
    codes_
        ``(prompts, heads)`` int64.
    node_scores_
        ``(heads,)``: codes of a head that only positives have.
    edge_scores_
        ``(heads, heads)``, symmetric: pairs of codes of two heads that meet only on positives. ``edge_scores_[a, b]``
        of an earlier a and a later b is the score of an edge between them.
    edge_node_scores_
        ``(heads,)``: how often a head is an end of the best pairs.

    Examples
    --------
    >>> outputs = head_outputs(model, task.prompts)  # doctest: +SKIP
    >>> DiscreteSAECircuit().fit(outputs, task.labels).circuit(0.02)  # doctest: +SKIP
    """

    def __init__(
        self,
        n_codes: int = 200,
        l1: float = 0.02,
        epochs: int = 500,
        lr: float = 1e-3,
        n_examples: int = 10,
        normalize: bool = False,
        start: Start = "zero",
        unit: Unit = "features",
        rescale: bool = False,
        seed: int = 0,
    ):
        self.n_codes, self.l1, self.epochs, self.lr = n_codes, l1, epochs, lr
        self.n_examples, self.normalize = n_examples, normalize
        self.start, self.unit, self.rescale, self.seed = start, unit, rescale, seed

    def fit(self, outputs: Tensor, labels: Tensor) -> DiscreteSAECircuit:
        """Train the autoencoder and count.

        Parameters
        ----------
        outputs
            What every head writes, ``(prompts, heads, d)``, as :func:`~gossamer.features.heads.head_outputs` gives it.
        labels
            True for prompts of the task, ``(prompts,)``.

        Raises
        ------
        CalibrationError
            If shapes do not fit, or a kind of prompt is missing.
        ConfigurationError
            If a parameter is out of its range.
        NonFiniteError
            If an output is NaN or infinite.
        """
        outputs, positive = torch.as_tensor(outputs).float(), torch.as_tensor(labels).bool()
        self._check(outputs, positive)
        chosen = self._examples(positive)
        self.sae_ = train_head_sae(
            outputs[chosen].flatten(0, 1),
            self.n_codes,
            self.l1,
            self.epochs,
            self.lr,
            self.start,
            self.unit,
            self.rescale,
            self.seed,
        )
        self.codes_ = discretise(self.sae_, outputs)
        self.node_scores_ = self._score(self.codes_, positive)
        self.edge_scores_ = self._edges(positive)
        self.edge_node_scores_ = named_in_best(self.edge_scores_)
        return self

    def _check(self, outputs: Tensor, positive: Tensor) -> None:
        if outputs.dim() != 3 or positive.shape != outputs.shape[:1]:
            raise CalibrationError(
                f"outputs are {tuple(outputs.shape)} and labels {tuple(positive.shape)}; they must be (prompts, heads, "
                "d) and (prompts,)"
            )
        if not bool(positive.any()) or bool(positive.all()):
            raise CalibrationError("all labels are the same; give prompts of the task and others")
        if min(self.n_codes, self.epochs, self.n_examples) < 1 or self.l1 < 0 or not self.lr > 0:
            raise ConfigurationError(
                f"n_codes is {self.n_codes}, epochs {self.epochs}, n_examples {self.n_examples}, l1 {self.l1}, lr "
                f"{self.lr}; the first three must be 1 or more, l1 at least 0 and lr above 0"
            )

    def _examples(self, positive: Tensor) -> Tensor:
        """Random prompts of both kinds, as many of each as there can be."""
        order = torch.randperm(len(positive), generator=generator_for("prompts for features of heads", self.seed))
        wanted = min(self.n_examples, len(positive))
        ones, zeros = order[positive[order]], order[~positive[order]]
        first = min(len(ones), max((wanted + 1) // 2, wanted - len(zeros)))
        return torch.cat([ones[:first], zeros[: wanted - first]])

    def _score(self, codes: Tensor, positive: Tensor) -> Tensor:
        unique, distinct = count_unique(codes, positive)
        return unique / distinct if self.normalize else unique.float()

    def _edges(self, positive: Tensor) -> Tensor:
        heads = self.codes_.shape[1]
        scores = torch.zeros(heads, heads)
        for head in range(heads - 1):
            pairs = self.codes_[:, head, None] * (self.n_codes + 1) + self.codes_[:, head + 1 :]
            scores[head, head + 1 :] = self._score(pairs, positive)
        return scores + scores.t()

    def probabilities(self, by: Ranking = "nodes", layer_of: Tensor | None = None) -> Tensor:
        """Softmax of the scores, over all heads or over those of each layer, ``(heads,)``: thresholds between 0 and 1.

        The softmax of counts saturates; what matters is their order.
        """
        scores = self.node_scores_ if by == "nodes" else self.edge_node_scores_
        if layer_of is None:
            return scores.softmax(0)
        found = torch.empty_like(scores)
        for layer in layer_of.unique():
            found[layer_of == layer] = scores[layer_of == layer].softmax(0)
        return found

    def circuit(self, threshold: float, by: Ranking = "nodes", layer_of: Tensor | None = None) -> Tensor:
        """The heads whose probability reaches a threshold, bool ``(heads,)``."""
        return self.probabilities(by, layer_of) >= threshold

    def edges(self, count: int, layer_of: Tensor) -> Tensor:
        """The best edges from earlier to later layers, ``(count, 2)``.

        Parameters
        ----------
        count
            How many.
        layer_of
            Layer of every head.
        """
        forward = layer_of[:, None] < layer_of
        ranked = self.edge_scores_.masked_fill(~forward, -torch.inf).flatten()
        best = ranked.argsort(descending=True, stable=True)[: min(count, int(forward.sum()))]
        return torch.stack([best // len(layer_of), best % len(layer_of)], 1)


def named_in_best(edge_scores: Tensor, entries: int | None = None) -> Tensor:
    """How often each head is an end of the best pairs, ``(heads,)``.

    Parameters
    ----------
    edge_scores
        ``(heads, heads)``, symmetric.
    entries
        Ends that are looked at, two a pair; by default heads²/2. Pairs that tie at the border share what is left.
    """
    heads = len(edge_scores)
    rows, columns = torch.triu_indices(heads, heads, 1)
    scores = edge_scores[rows, columns]
    pairs = min(len(scores), max(1, (heads**2 // 2 if entries is None else entries) // 2))
    border = scores.topk(pairs).values[-1]
    above, at = (scores > border).float(), (scores == border).float()
    weight = above + at * (pairs - above.sum()) / at.sum()
    found = torch.zeros(heads)
    return found.index_add(0, rows, weight).index_add(0, columns, weight)
