"""Why what was read was there: attribution of a feature of attention, through earlier layers, to where it began.

A feature is active because heads read certain tokens (see :mod:`gossamer.features.direct_attribution`). What a head
read there is a sum over the embedding and over everything that earlier heads and feed-forward parts wrote, with the
scale of the normalisation held fixed. Of these an earlier head again read certain tokens, and so on. The largest terms,
step by step, are the circuit [Kissane et al., 2024, arXiv 2406.17759, section 4 and appendix on recursive attribution].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.features.attention_sae import AttentionSAE
from gossamer.features.direct_attribution import constants
from gossamer.features.residual_trace import ResidualTrace, trace_residual

Kind = Literal["feature", "source", "embedding", "head", "feed-forward", "bias"]


@dataclass
class Node:
    """A term of an attribution.

    Attributes
    ----------
    kind
        ``feature`` of an autoencoder; ``source``, what a head read from a token; and what was written there: by the
        ``embedding``, an earlier ``head``, a ``feed-forward`` part, or as a ``bias``.
    value
        How much it adds to the preactivation of the feature at the root.
    position
        Number of the token at which it is.
    layer, head, feature
        Which, where that makes sense; −1 elsewhere.
    children
        What it is made of, the largest first.
    rest
        What it is made of besides, all together.
    """

    kind: Kind
    value: float
    position: int
    layer: int = -1
    head: int = -1
    feature: int = -1
    children: list[Node] = field(default_factory=list)
    rest: float = 0.0

    @property
    def label(self) -> str:
        """Such as ``head 3.5 at 17``."""
        which = {
            "feature": f"feature {self.layer}.{self.feature}",
            "source": f"read by head {self.layer}.{self.head}",
            "head": f"head {self.layer}.{self.head}",
            "feed-forward": f"feed-forward {self.layer}",
            "embedding": "embedding",
            "bias": "biases",
        }[self.kind]
        return f"{which} at {self.position}"

    def path(self) -> list[Node]:
        """From here along the largest terms, by size, to the end."""
        best = max(self.children, key=lambda child: abs(child.value), default=None)
        return [self] if best is None else [self, *best.path()]

    def table(self, depth: int = 0) -> str:
        """The tree, indented."""
        lines = [f"{'  ' * depth}{self.value:+.4f}  {self.label}"]
        lines += [child.table(depth + 1) for child in self.children]
        if self.children:
            lines.append(f"{'  ' * (depth + 1)}{self.rest:+.4f}  the rest")
        return "\n".join(lines)


def rdfa(
    model: nn.Module,
    sae: AttentionSAE,
    tokens: Tensor,
    feature: int,
    position: int,
    layer: int,
    depth: int = 2,
    top: int = 5,
    saes: Mapping[int, AttentionSAE] | None = None,
) -> Node:
    """Recursive direct feature attribution of one feature at one token.

    Parameters
    ----------
    model
        See :func:`gossamer.features.residual_trace.trace_residual`.
    sae
        Of the heads of `layer`.
    tokens
        Ids, ``(tokens,)``.
    feature, position
        What is explained, and where.
    layer
        Number of the layer.
    depth
        How many times attention is followed back.
    top
        Terms that are kept of every sum; the others are summed up.
    saes
        Autoencoders of earlier layers by number: what attention wrote there is then told by features instead of heads.

    Returns
    -------
    Node
        Its value, as that of all nodes below, is the sum of its children's and the rest.

    Raises
    ------
    ConfigurationError
        If there is no such feature or position, or a number is out of range.
    ModelError, CalibrationError
        As of :func:`~gossamer.features.residual_trace.trace_residual`.
    """
    flat = tokens.reshape(-1)
    if not 0 <= feature < sae.n_features or not 0 <= position < len(flat) or depth < 1 or top < 1:
        raise ConfigurationError(
            f"feature {feature} of {sae.n_features} at {position} of {len(flat)} tokens, depth {depth}, top {top}; all "
            "must be within range, the last two 1 or more"
        )
    search = _Search(trace_residual(model, flat, layer), dict(saes or {}), top)
    return search.feature(sae, layer, feature, position, 1.0, depth)


class _Search:
    def __init__(self, trace: ResidualTrace, saes: dict[int, AttentionSAE], top: int):
        self.trace, self.saes, self.top = trace, saes, top

    def feature(self, sae: AttentionSAE, layer: int, feature: int, position: int, worth: float, depth: int) -> Node:
        """A feature whose preactivation counts `worth` times."""
        directions = sae.encoder_blocks[feature].detach().float() * float(sae.scale)
        constant = float(constants(sae)[feature]) * worth
        node = self._read(layer, directions * worth, position, depth)
        bias = Node("bias", constant, position, layer)
        total = sum(child.value for child in node) + constant
        return self._closed(Node("feature", total, position, layer, feature=feature), [*node, bias], depth)

    def _read(self, layer: int, directions: Tensor, position: int, depth: int) -> list[Node]:
        """What heads of a layer read along directions ``(heads, size)``, a term for each head and token."""
        attention = self.trace.layers[layer].attention
        worth = torch.einsum("hsv,hv->hs", attention.values, directions) * attention.pattern[:, position]
        terms = []
        for head in range(len(worth)):
            for source in range(position + 1):
                value = float(worth[head, source])
                if value:
                    terms.append(Node("source", value, source, layer, head))
        terms.sort(key=lambda term: -abs(term.value))
        for term in terms[: self.top]:
            share = float(attention.pattern[term.head, position, term.position])
            self._written(term, directions[term.head] * share, depth)
        return terms

    def _written(self, node: Node, direction: Tensor, depth: int) -> None:
        """Fill a source with what was written at its token and then read along a direction ``(size,)``."""
        here = self.trace.layers[node.layer]
        back = here.back(node.head, direction, node.position)
        terms: list[tuple[Node, Callable[[], None]]] = []

        def add(term: Node, fill: Callable[[], None] = lambda: None) -> None:
            terms.append((term, fill))

        add(Node("embedding", float(self.trace.embedding[node.position] @ back), node.position))
        for number in range(node.layer):
            earlier = self.trace.layers[number]
            self._attention(number, back, node.position, depth, add)
            add(Node("feed-forward", float(earlier.rest[node.position] @ back), node.position, number))
        known = sum(term.value for term, _ in terms)
        add(Node("bias", node.value - known, node.position, node.layer))
        terms.sort(key=lambda term: -abs(term[0].value))
        for _, fill in terms[: self.top]:
            fill()
        self._closed(node, [term for term, _ in terms], 1)

    def _attention(self, number: int, back: Tensor, position: int, depth: int, add: Callable[..., None]) -> None:
        """Terms of what attention wrote at a token: of features where there is an autoencoder, otherwise of heads."""
        earlier = self.trace.layers[number]
        directions = torch.einsum("hdv,d->hv", earlier.output, back)
        if number not in self.saes:
            for head in range(len(directions)):
                term = Node("head", float(earlier.heads[position, head] @ back), position, number, head)
                add(term, lambda term=term, row=directions[head]: self._hop(term, row, depth))
            return
        sae = self.saes[number]
        z = earlier.attention.z[position].reshape(1, -1)
        codes = sae.encode(z)
        worth = (sae.decoder.detach()[codes.indices.long()].float() @ directions.flatten()) / float(sae.scale)
        for index, value, each in zip(codes.indices.tolist(), codes.values.tolist(), worth.tolist()):
            term = Node("feature", value * each, position, number, feature=index)
            add(term, lambda term=term, each=each: self._hop_feature(sae, term, each, depth))

    def _hop(self, term: Node, direction: Tensor, depth: int) -> None:
        if depth > 1:
            directions = torch.zeros_like(self.trace.layers[term.layer].attention.values[:, 0])
            directions[term.head] = direction
            self._closed(term, self._read(term.layer, directions, term.position, depth - 1), depth)

    def _hop_feature(self, sae: AttentionSAE, term: Node, worth: float, depth: int) -> None:
        if depth > 1:
            found = self.feature(sae, term.layer, term.feature, term.position, worth, depth - 1)
            term.children, term.rest = found.children, term.value - sum(child.value for child in found.children)

    def _closed(self, node: Node, terms: list[Node], depth: int) -> Node:
        kept = sorted(terms, key=lambda term: -abs(term.value))[: self.top]
        node.children, node.rest = kept, node.value - sum(term.value for term in kept)
        return node
