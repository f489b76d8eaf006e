"""Is the nonlinear error of an autoencoder a thing of its own? Tests of what is in it and of what it does.

If it is made by the autoencoder, and not by the model, then it holds fewer of the features that a larger dictionary
learns, its length is harder to predict, it is harder to learn as a sparse code, and what it costs the model is its own
share [Engels et al., 2024, arXiv 2410.14670, sections 5 and 6]. Another test, whether it tells which tokens larger
autoencoders fail on, is in :mod:`gossamer.features.error_scaling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.core.regression import Determination, LinearMap, determination, fit_linear
from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.activation_rules import TopK
from gossamer.features.error_decomposition import Autoencoder, ErrorReport, split_rows
from gossamer.features.losses import unexplained_variance
from gossamer.features.sae import SAE
from gossamer.features.splicing import edited
from gossamer.features.training import TrainingSettings, train
from gossamer.measure.windows import evaluation_mode, logits_of
from gossamer.models.blocks import run_batch

# ------------------------------------------------------------------------------------------ features to come


def missing_features(small: Tensor, large: Tensor, threshold: float = 0.7) -> Tensor:
    """Which features of a larger dictionary a smaller one lacks, bool ``(features of the large one,)``.

    A feature is lacking if its direction has a cosine below the threshold with all directions of the small one
    [Leask et al., 2025, arXiv 2502.04878].

    Parameters
    ----------
    small, large
        Decoders, ``(features, d)``.
    threshold
        In (0, 1].
    """
    if small.shape[1:] != large.shape[1:] or not 0 < threshold <= 1:
        raise ConfigurationError(
            f"dictionaries are {tuple(small.shape)} and {tuple(large.shape)}, threshold {threshold}; give directions "
            "of one size and a cosine in (0, 1]"
        )
    known, other = (nn.functional.normalize(part.detach(), dim=1) for part in (small, large))
    return torch.cat([(part @ known.t()).amax(1) < threshold for part in other.split(1024)])


def share_in_features(parts: Tensor, codes: SparseCodes, decoder: Tensor, chosen: Tensor) -> float:
    """Share of the squared length of errors that lies in the span of the chosen features of their tokens.

    Parameters
    ----------
    parts
        ``(tokens, d)``.
    codes
        What another autoencoder finds in the same tokens.
    decoder
        Its directions ``(features, d)``.
    chosen
        Which of them count, bool ``(features,)``.
    """
    counted = chosen[codes.indices.long()] & (codes.values > 0)
    rows = codes.row_of[counted]
    count = torch.bincount(rows, minlength=len(codes))
    most = int(count.max()) if len(count) else 0
    if not most:
        return 0.0
    place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
    inside = 0.0
    for first in range(0, len(codes), 512):
        here = (rows >= first) & (rows < first + 512)
        atoms = torch.zeros(min(512, len(codes) - first), most, decoder.shape[1], dtype=torch.float64)
        atoms[rows[here] - first, place[here]] = decoder[codes.indices[counted][here].long()].detach().double()
        some = parts[first : first + 512].double()
        products = atoms @ atoms.transpose(1, 2) + 1e-9 * torch.eye(most, dtype=torch.float64)
        common = (atoms @ some[:, :, None])[:, :, 0]
        inside += float((common * torch.linalg.solve(products, common)).sum())
    return inside / float(parts.double().square().sum())


# ------------------------------------------------------------------------------------------ learning a part


def learnability(
    parts: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    n_features: int,
    k: int,
    settings: TrainingSettings,
    progress: bool = False,
) -> dict[str, tuple[float, SAE]]:
    """Fraction of the variance of each part that an autoencoder trained on it leaves, on tokens that it has not seen.

    Parameters
    ----------
    parts, held_out
        Name → vectors ``(tokens, d)``, such as activations, linear and nonlinear error.
    n_features, k
        Width and L0 of all autoencoders.
    settings
        Of their training.

    Returns
    -------
    dict
        Name → FVU and the autoencoder.
    """
    found = {}
    for name, vectors in parts.items():
        sae = SAE(vectors.shape[1], n_features, TopK(k), seed=settings.seed)
        train({name: sae}, _batches(vectors, settings), settings, progress=progress)
        with torch.no_grad():
            output = torch.cat([sae(part).output for part in held_out[name].split(2048)])
        found[name] = (float(unexplained_variance(output, held_out[name])), sae)
    return found


def _batches(vectors: Tensor, settings: TrainingSettings) -> Any:
    size = min(settings.batch_size, len(vectors))
    each = len(vectors) // size

    def batches(begin: int) -> Any:
        for number in range(begin, settings.steps):
            epoch, step = divmod(number, each)
            order = torch.randperm(len(vectors), generator=generator_for(f"epoch {epoch}", settings.seed))
            yield vectors[order[step * size : (step + 1) * size]]

    return batches


# ------------------------------------------------------------------------------------------ what a part does


@dataclass(frozen=True)
class DownstreamSplit:
    """What each part of the error costs a model, beside how much of the error it is.

    Attributes
    ----------
    dense, sae
        Mean loss of a predicted token, in nats: of the model as it is, and with x̂ in place of x.
    with_linear, with_nonlinear
        With one part of the error given back: ``x̂ + W x``, and ``x̂ + n``.
    with_noise
        With x plus noise of the error's length in a random direction.
    linear_length, nonlinear_length
        Mean over tokens of the part's squared length as a share of the error's; they need not add up to one.
    tokens
        Predicted tokens.
    """

    dense: float
    sae: float
    with_linear: float
    with_nonlinear: float
    with_noise: float
    linear_length: float
    nonlinear_length: float
    tokens: int

    def _recovered(self, loss: float) -> float:
        gap = self.sae - self.dense
        return (self.sae - loss) / gap if gap else float("nan")

    @property
    def linear_share(self) -> float:
        """Share of the increase of the loss that goes away with the linear error."""
        return self._recovered(self.with_linear)

    @property
    def nonlinear_share(self) -> float:
        """Share of the increase of the loss that goes away with the nonlinear error."""
        return self._recovered(self.with_nonlinear)

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {**asdict(self), "linear_share": self.linear_share, "nonlinear_share": self.nonlinear_share}


def downstream_split(
    model: nn.Module,
    site: str | int,
    sae: Autoencoder,
    report: ErrorReport,
    documents: Iterable[Tensor],
    skip_first: int = 1,
    seed: int = 0,
) -> DownstreamSplit:
    """Splice each part of the error into a model and see what it costs.

    Parameters
    ----------
    model
        A causal language model.
    site
        Name of the module whose output is explained, or number of the block.
    sae
        In evaluation mode.
    report
        The decomposition of its error, fitted on other documents.
    documents
        Token ids, ``(tokens,)`` or ``(1, tokens)`` each.
    skip_first
        Tokens at the beginning of a document that pass as they are; the paper leaves out 200.
    seed
        Of the noise.

    Raises
    ------
    CalibrationError
        If no document has a token to predict.
    """
    texts = [text.reshape(1, -1) for text in documents]
    texts = [text for text in texts if text.shape[1] > skip_first + 1]
    if not texts:
        raise CalibrationError(f"no document has more than {skip_first + 1} tokens; give longer ones")
    generator = generator_for("noise of the error's length", seed)
    lengths: list[Tensor] = []

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        x_hat = sae.decode(sae.encode(flat))
        linear, rest = report.parts(flat, x_hat)
        return x_hat.view_as(x), linear.view_as(x), rest.view_as(x)

    def noisy(x: Tensor) -> Tensor:
        x_hat, linear, rest = parts(x)
        error = (linear + rest)[:, skip_first:].double().square().sum(-1).clamp(min=1e-30)
        kinds = [part[:, skip_first:].double().square().sum(-1) / error for part in (linear, rest)]
        lengths.append(torch.stack(kinds, -1).reshape(-1, 2))
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x + noise * ((x - x_hat).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    edits = {
        "sae": lambda x: parts(x)[0],
        "linear": lambda x: sum(parts(x)[:2]),
        "nonlinear": lambda x: parts(x)[0] + parts(x)[2],
        "noise": noisy,
    }
    totals = dict.fromkeys(("dense", *edits), 0.0)
    with evaluation_mode(model):
        for text in texts:
            totals["dense"] += _loss(model, text, skip_first)
            for name, edit in edits.items():
                with edited(model, site, edit, skip_first):
                    totals[name] += _loss(model, text, skip_first)
    tokens = sum(text.shape[1] - 1 - skip_first for text in texts)
    share = torch.cat(lengths).mean(0)
    losses = [total / tokens for total in totals.values()]
    return DownstreamSplit(*losses, float(share[0]), float(share[1]), tokens)


def _loss(model: nn.Module, text: Tensor, skip_first: int) -> float:
    """Sum over the tokens that come after one that was replaced."""
    logits = logits_of(run_batch(model, text))[0, skip_first:-1].float()
    return float(nn.functional.cross_entropy(logits, text[0, skip_first + 1 :], reduction="sum"))


# ------------------------------------------------------------------------------------------ help from before


@dataclass(frozen=True, eq=False)
class EarlierMap:
    """How much of an error is a linear function of what earlier autoencoders reconstruct.

    Attributes
    ----------
    map
        From the reconstructions, side by side, to the error.
    r2
        On tokens that were not fitted.
    explained
        Share of the error's squared length that goes away there.
    scored
        Those tokens, int64.
    """

    map: LinearMap
    r2: Determination
    explained: float
    scored: Tensor


def map_from_earlier(
    error: Tensor,
    reconstructions: Mapping[str, Tensor],
    *,
    documents: Tensor | None = None,
    ridge: float = 1e-3,
    train_frac: float = 0.5,
    seed: int = 0,
) -> EarlierMap:
    """Fit an error, or a part of it, from reconstructions by autoencoders of earlier layers and components.

    What helps costs no feature more: adding the map's guess to x̂ lowers the error at the same sparsity.

    Parameters
    ----------
    error
        ``(tokens, d)``.
    reconstructions
        Name → ``(tokens, size)`` for the same tokens.
    documents, train_frac, seed
        Of the split; see :func:`~gossamer.features.error_decomposition.error_decomposition`.
    ridge
        See :func:`gossamer.core.regression.fit_linear`.

    Raises
    ------
    ConfigurationError
        If there are no reconstructions or they are of other tokens.
    CalibrationError
        If there are fewer than five tokens to fit for every dimension of the reconstructions.
    """
    lengths = {name: len(part) for name, part in reconstructions.items()}
    if not lengths or set(lengths.values()) != {len(error)}:
        raise ConfigurationError(f"reconstructions are of {lengths or 'no'} tokens, the error of {len(error)}")
    known = torch.cat(list(reconstructions.values()), 1)
    fitted, scored = split_rows(len(error), documents, train_frac, seed)
    if len(fitted) < 5 * known.shape[1]:
        raise CalibrationError(f"{len(fitted)} tokens to fit {known.shape[1]} dimensions; give at least five for each")
    found = fit_linear(known[fitted], error[fitted], ridge, intercept=True)
    guess, wanted = found(known[scored]), error[scored]
    left = float((wanted - guess).double().square().sum() / wanted.double().square().sum())
    return EarlierMap(found, determination(wanted, guess), 1 - left, scored)
