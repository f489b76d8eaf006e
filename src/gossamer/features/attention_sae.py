"""Sparse autoencoders of what attention heads have read, all heads of a layer side by side.

z, the outputs of all heads of a layer one after the other, is where attention is still apart by heads and still linear
in the tokens that were read. A feature of z can therefore be laid at the door of heads and of tokens exactly
[Kissane et al., 2024, arXiv 2406.17759]. Attribution to tokens is in :mod:`gossamer.features.direct_attribution`.

>>> with exposed_heads(model) as sites:  # doctest: +SKIP
...     site = sites[5]
...     store = capture(model, documents, site.name, "heads-of-layer-5")
...     sae = AttentionSAE(site.count, site.size, 8 * store.facts.size, TopK(32))
...     train({"heads": sae}, lambda begin: store.batches(4096, 0, begin), TrainingSettings())
...     quality = attention_quality(model, site.name, sae, held_out)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import ActivationRule
from gossamer.features.sae import SAE
from gossamer.features.splicing import SpliceReport, edited, evaluate_splice, judged_texts
from gossamer.measure.windows import evaluation_mode, logits_of
from gossamer.models.blocks import run_batch


class AttentionSAE(SAE):
    """A sparse autoencoder of the concatenated outputs of attention heads.

    Parameters
    ----------
    n_heads, d_head
        Heads, and numbers that each puts out; an activation is one after the other, ``n_heads · d_head``.
    n_features
        Features of the dictionary; 8 to 32 times the size of an activation in the paper.
    activation, seed
        As in :class:`~gossamer.features.sae.SAE`. For the ℓ1 loss of the paper, :class:`ReLU` and a `sparsity` in the
        settings of training.

    Examples
    --------
    >>> from gossamer.features.activation_rules import TopK
    >>> sae = AttentionSAE(4, 8, 64, TopK(3))
    >>> sae.encoder_blocks.shape
    torch.Size([64, 4, 8])
    """

    def __init__(self, n_heads: int, d_head: int, n_features: int, activation: ActivationRule, seed: int = 0):
        if n_heads < 1 or d_head < 1:
            raise ConfigurationError(f"n_heads is {n_heads} and d_head {d_head}; both must be 1 or more")
        super().__init__(n_heads * d_head, n_features, activation, seed)
        self.n_heads, self.d_head = n_heads, d_head

    @classmethod
    def of(cls, sae: SAE, n_heads: int) -> AttentionSAE:
        """The same weights as an autoencoder of heads, such as one that was read from a file.

        Raises
        ------
        ConfigurationError
            If its activations cannot be divided into so many heads.
        """
        if n_heads < 1 or sae.d_in % n_heads:
            raise ConfigurationError(f"d_in is {sae.d_in}; it cannot be divided into {n_heads} heads of equal size")
        found = cls(n_heads, sae.d_in // n_heads, sae.n_features, sae.activation)
        found.load_state_dict(sae.state_dict())
        return found.train(sae.training)

    @property
    def encoder_blocks(self) -> Tensor:
        """Encoders by heads, ``(features, heads, d_head)``; a view."""
        return self.encoder.unflatten(1, (self.n_heads, self.d_head))

    @property
    def decoder_blocks(self) -> Tensor:
        """Decoders by heads, ``(features, heads, d_head)``; a view."""
        return self.decoder.unflatten(1, (self.n_heads, self.d_head))

    def settings(self) -> dict[str, Any]:
        """Plain values that say what this is, without its weights."""
        return {**super().settings(), "n_heads": self.n_heads, "d_head": self.d_head}


@torch.no_grad()
def head_attribution(sae: AttentionSAE, output: Tensor | None = None) -> Tensor:
    """Share of every head in every feature by its decoder alone, ``(features, heads)``; a feature's shares sum to one.

    Parameters
    ----------
    sae
        The autoencoder.
    output
        The parts of the matrix behind the heads, ``(heads, d, d_head)``, as ``AttentionHeads.slices`` gives them. With
        them shares are of what reaches the residual stream, ``‖W_O^h d_i^h‖``: without them a head that the matrix
        makes large counts no more than one that it makes small.
    """
    blocks = sae.decoder_blocks
    if output is not None:
        if output.shape[0] != sae.n_heads or output.shape[2] != sae.d_head:
            raise ConfigurationError(
                f"output is {tuple(output.shape)}; {sae.n_heads} heads of {sae.d_head} need ({sae.n_heads}, d, "
                f"{sae.d_head})"
            )
        blocks = torch.einsum("fhv,hdv->fhd", blocks, output.to(blocks))
    lengths = blocks.norm(dim=-1)
    return lengths / lengths.sum(1, keepdim=True).clamp(min=torch.finfo(lengths.dtype).tiny)


def top_features(shares: Tensor, count: int = 10, alive: Tensor | None = None) -> Tensor:
    """The features of which each head has the largest share, best first, ``(heads, count)`` int64.

    Parameters
    ----------
    shares
        ``(features, heads)`` of :func:`head_attribution`.
    count
        For each head.
    alive
        Features that may be chosen, bool ``(features,)``; None for all.
    """
    if alive is not None:
        shares = shares.masked_fill(~alive[:, None], -1)
    most = len(shares) if alive is None else int(alive.sum())
    if not 1 <= count <= most:
        raise ConfigurationError(f"count is {count}; there are {most} features to choose from")
    return shares.topk(count, dim=0).indices.t()


@dataclass(frozen=True, eq=False)
class AttentionQuality:
    """How good an autoencoder of heads is.

    Attributes
    ----------
    splice
        What the model loses with it; its ``recovered`` is measured from the mean of z in its place.
    zero
        Mean loss with zeros in the place of z.
    density
        Share of the tokens in which each feature is active, ``(features,)``.
    """

    splice: SpliceReport
    zero: float
    density: Tensor

    @property
    def recovered_from_zero(self) -> float:
        """Loss recovered, ``(CE_zero − CE_sae) / (CE_zero − CE_clean)``."""
        gap = self.zero - self.splice.dense
        return (self.zero - self.splice.spliced) / gap if gap else float("nan")

    @property
    def dead(self) -> float:
        """Share of the features that are never active."""
        return float((self.density == 0).double().mean())

    @property
    def explained(self) -> float:
        """Share of the variance."""
        return 1 - self.splice.unexplained

    def histogram(self, lowest: float = 1e-6, bins: int = 24) -> tuple[list[float], list[int]]:
        """Edges of bins of log₁₀ density and how many features lie in each; those below the lowest in the first."""
        logs = self.density.double().clamp(min=lowest).log10()
        edges = torch.linspace(torch.tensor(lowest).log10().item(), 0, bins + 1, dtype=torch.float64)
        place = (torch.bucketize(logs, edges, right=True) - 1).clamp(0, bins - 1)
        return edges.tolist(), torch.bincount(place, minlength=bins).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without densities."""
        own = {"zero": self.zero, "recovered_from_zero": self.recovered_from_zero, "dead": self.dead}
        return {**asdict(self.splice), "recovered": self.splice.recovered, **own}


def attention_quality(
    model: nn.Module,
    site: str,
    sae: SAE,
    documents: Iterable[Tensor],
    skip_first: int = 1,
    progress: bool = False,
    labels: Iterable[Tensor] | None = None,
) -> AttentionQuality:
    """Measure sparsity, variance, loss recovered from the mean and from zero, and densities on unseen text.

    Parameters
    ----------
    model, documents, skip_first, progress, labels
        As in :func:`gossamer.features.splicing.evaluate_splices`.
    site
        Name of the heads' output, of :func:`gossamer.models.head_outputs.exposed_heads`, which must be in force.
    sae
        In evaluation mode; any with ``forward``, so that neurons or principal components can take its place.
    """
    texts, labels = list(documents), None if labels is None else list(labels)
    splice = evaluate_splice(model, site, sae, texts, skip_first, progress, labels=labels)
    texts, counted = judged_texts(texts, labels, skip_first)
    active, rows = torch.zeros(sae.n_features), 0
    lost = 0.0

    def count(x: Tensor) -> Tensor:
        nonlocal rows
        codes = sae.encode(x[:, skip_first:].to(sae.decoder.dtype))
        active.add_(torch.bincount(codes.indices[codes.values > 0], minlength=codes.width))
        rows += len(codes)
        return torch.zeros_like(x)

    with evaluation_mode(model), edited(model, site, count, skip_first):
        for text, here in zip(texts, counted, strict=True):
            logits = logits_of(run_batch(model, text))[0, :-1].float()
            lost += float(nn.functional.cross_entropy(logits[here], text[0, 1:][here], reduction="sum"))
    return AttentionQuality(splice, lost / splice.tokens, active / rows)
