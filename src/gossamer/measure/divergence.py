"""How far a sparse model has moved from the dense one it came from.

Perplexity can stay the same while the predictions change; the Kullback-Leibler divergence of the next-token
distributions cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError
from gossamer.measure.perplexity import Perplexity, window_sums
from gossamer.measure.windows import (
    as_sequences,
    batches,
    check_fits,
    chunks,
    evaluation_mode,
    first_token_of,
    scored_logits,
    sliding_windows,
    widen,
)


@dataclass(frozen=True)
class Divergence:
    """Comparison of two models on the same tokens.

    Attributes
    ----------
    kl
        Mean over tokens of KL(dense || sparse), in nats.
    kl_p99
        99th percentile of the same over tokens: how bad the worst moments are.
    top1_agreement
        Share of tokens, in [0, 1], for which both models find the same token most likely.
    dense, sparse
        Perplexities of the two models.
    """

    kl: float
    kl_p99: float
    top1_agreement: float
    dense: Perplexity
    sparse: Perplexity

    @property
    def tokens(self) -> int:
        """Number of tokens compared."""
        return self.dense.tokens


def divergence(
    dense: nn.Module,
    sparse: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    window: int = 1024,
    stride: int = 512,
    *,
    mask: Tensor | Iterable[Tensor] | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Divergence:
    """Compare the next-token distributions of two models, window by window.

    The logits of one batch of windows of each model are held at a time, nothing else of the size of the
    vocabulary. Both perplexities come from the same pass and equal those of
    :func:`gossamer.measure.perplexity`.

    Parameters
    ----------
    dense, sparse
        Causal language models with the same vocabulary.
    tokens, window, stride, mask, batch_size, progress
        As in :func:`gossamer.measure.perplexity`.

    Returns
    -------
    Divergence

    Raises
    ------
    CalibrationError, NonFiniteError
        As in :func:`gossamer.measure.perplexity`.
    ConfigurationError
        As there, or if the vocabularies differ in size.
    """
    windows = sliding_windows(as_sequences(tokens, mask), window, stride, first_token_of(dense))
    check_fits(dense, windows)
    check_fits(sparse, windows)
    dense_sums: list[float] = []
    sparse_sums: list[float] = []
    counts: list[int] = []
    kls: list[Tensor] = []
    agreements = 0
    with evaluation_mode(dense, sparse):
        for batch in track(batches(windows, batch_size), "divergence", enabled=progress):
            expected, targets = scored_logits(dense, batch)
            found, _ = scored_logits(sparse, batch)
            kl, agree, dense_nll, sparse_nll = _compare(expected, found.to(expected.device), targets)
            dense_sums += window_sums(dense_nll, dense, batch, "dense model")
            sparse_sums += window_sums(sparse_nll, sparse, batch, "sparse model")
            counts += [piece.scored for piece in batch]
            kls.append(kl.double().cpu())
            agreements += int(agree)
    all_kl = torch.cat(kls)
    return Divergence(
        kl=all_kl.mean().item(),
        kl_p99=_percentile_99(all_kl),
        top1_agreement=agreements / all_kl.numel(),
        dense=Perplexity.from_windows(dense_sums, counts),
        sparse=Perplexity.from_windows(sparse_sums, counts),
    )


def _compare(dense: Tensor, sparse: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return KL (rows,), number of equal top-1 tokens (), and both negative log-likelihoods (rows,)."""
    if dense.shape != sparse.shape:
        raise ConfigurationError(
            f"the dense model predicts {dense.shape[-1]} tokens and the sparse one {sparse.shape[-1]}; "
            "divergence needs one vocabulary"
        )
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for p, q, target in chunks(dense, sparse, targets):
        log_p, log_q = widen(p).log_softmax(-1), widen(q).log_softmax(-1)
        index = target[:, None]
        agree = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        nll = -log_p.gather(-1, index)[:, 0], -log_q.gather(-1, index)[:, 0]
        probability = log_p.exp()
        # A token that the dense model rules out (logit -inf) contributes nothing, not 0 * inf.
        terms = (probability * log_p.sub_(log_q)).masked_fill_(probability == 0, 0.0)
        rows.append((terms.sum(-1), agree, *nll))
    kls, agreements, dense_nll, sparse_nll = zip(*rows)
    return torch.cat(kls), torch.stack(agreements).sum(), torch.cat(dense_nll), torch.cat(sparse_nll)


def _percentile_99(values: Tensor) -> float:
    """Return the smallest of the values (n,) that at least 99% of them do not exceed."""
    rank = -(-99 * values.numel() // 100)
    return values.kthvalue(rank).values.item()
