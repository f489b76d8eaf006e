"""What heads are for: families of the features that each contributes most to.

A feature belongs to *induction* if it is active on a token that has been there before and comes from what followed it
then; to the *local* context if it comes from the last few tokens; to the *long-range* context if it comes from many
tokens, or from far back. A head whose best features belong to several families does several things [Kissane et al.,
2024, arXiv 2406.17759, section 3]. The paper names features by hand; families are found from attribution alone, and
labels of any other origin can be given besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.attention_sae import AttentionSAE, head_attribution, top_features
from gossamer.features.attention_trace import AttentionTrace, trace_attention
from gossamer.features.direct_attribution import dfa

Family = Literal["induction", "local", "long-range", "other", "silent"]


@dataclass(frozen=True, kw_only=True)
class FamilyRules:
    """When a feature belongs to which family; tried in this order.

    Parameters
    ----------
    examples
        Tokens on which a feature is looked at, those where it is most active.
    induction
        Share of the attribution that must come from tokens behind an earlier occurrence of the token itself.
    local_reach, local
        So many of the latest tokens, the token itself included, must hold this share.
    far_reach, far
        Tokens further back than this must hold this share; or
    spread
        so many tokens must be needed for 80 % of it.
    """

    examples: int = 20
    induction: float = 0.4
    local_reach: int = 10
    local: float = 0.7
    far_reach: int = 50
    far: float = 0.5
    spread: int = 50


@dataclass(frozen=True)
class FeatureFamily:
    """Where the attribution of a feature comes from; shares of its positive part, without the first token.

    Attributes
    ----------
    feature
        Which.
    family
        By :class:`FamilyRules`; ``silent`` if it is never active.
    induction
        Share from tokens behind an earlier occurrence of the token on which it is active.
    by_chance
        Share of all tokens that stand there, which is what chance would give.
    local, far
        Shares from the latest tokens, and from those far back.
    spread
        Tokens that hold 80 % of it, in the mean.
    from_first
        Attribution to the first token, as a share of all of it.
    examples
        Tokens that were looked at.
    """

    feature: int
    family: Family
    induction: float = 0.0
    by_chance: float = 0.0
    local: float = 0.0
    far: float = 0.0
    spread: float = 0.0
    from_first: float = 0.0
    examples: int = 0


_SHARES = [each.name for each in fields(FeatureFamily)][2:-1]


def after_repeats(tokens: Tensor, position: int) -> Tensor:
    """Tokens behind an earlier occurrence of the token at a position, bool ``(tokens,)``."""
    found = torch.zeros(len(tokens), dtype=torch.bool)
    found[1 : position + 1] = tokens[:position] == tokens[position]
    return found


def feature_family(
    sae: AttentionSAE,
    traces: Sequence[AttentionTrace],
    active: Sequence[tuple[int, int]],
    feature: int,
    rules: FamilyRules = FamilyRules(),
) -> FeatureFamily:
    """Put one feature into a family.

    Parameters
    ----------
    sae, traces
        Of the same layer.
    active
        Number of the trace and position, for every token at which the feature is looked at.
    feature
        Which.
    rules
        Where families end.
    """
    if not active:
        return FeatureFamily(feature, "silent")
    sums = dict.fromkeys(_SHARES, 0.0)
    for number, position in active:
        for name, value in _shares(sae, traces[number], feature, position, rules).items():
            sums[name] += value / len(active)
    return FeatureFamily(feature, _family(sums, rules), **sums, examples=len(active))


def _shares(
    sae: AttentionSAE, trace: AttentionTrace, feature: int, position: int, rules: FamilyRules
) -> dict[str, float]:
    found = dfa(sae, trace, feature, [position])
    mass = found.by_source[0].clamp(min=0)
    first = float(found.from_first.abs()) / max(float(found.by_source.abs().sum()), 1e-30)
    mass[0] = 0
    total = max(float(mass.sum()), 1e-30)
    distance = position - torch.arange(len(mass))
    behind = after_repeats(trace.tokens, position)
    ordered = mass.sort(descending=True).values.cumsum(0)
    return {
        "induction": float(mass[behind].sum()) / total,
        "by_chance": float(behind[1 : position + 1].double().mean()) if position else 0.0,
        "local": float(mass[distance < rules.local_reach].sum()) / total,
        "far": float(mass[distance > rules.far_reach].sum()) / total,
        "spread": float((ordered < 0.8 * total).sum()) + 1,
        "from_first": first,
    }


def _family(shares: Mapping[str, float], rules: FamilyRules) -> Family:
    if shares["induction"] >= rules.induction and shares["induction"] > 2 * shares["by_chance"]:
        return "induction"
    if shares["local"] >= rules.local:
        return "local"
    if shares["far"] >= rules.far or shares["spread"] > rules.spread:
        return "long-range"
    return "other"


@dataclass(frozen=True, eq=False)
class HeadSurvey:
    """The best features of every head, and what they are for.

    Attributes
    ----------
    features
        ``(heads, count)``, those with the largest share of the head.
    shares
        Of the head in them, ``(heads, count)``.
    families
        Feature → family, for all of these.
    labels
        For every head the labels of its features, families unless others were given.
    """

    features: Tensor
    shares: Tensor
    families: dict[int, FeatureFamily]
    labels: list[list[str]]

    def polysemantic(self, at_least: int = 1) -> list[bool]:
        """For every head whether its features bear two or more labels, each on at least so many of them.

        Silent features and those of no family count for nothing: they may belong to any.
        """
        counts = [Counter(label for label in labels if label not in ("silent", "other")) for labels in self.labels]
        return [sum(number >= at_least for number in count.values()) >= 2 for count in counts]

    def table(self) -> str:
        """One line for each head."""
        lines = []
        for head, (labels, many) in enumerate(zip(self.labels, self.polysemantic())):
            told = ", ".join(f"{label} {number}" for label, number in Counter(labels).most_common())
            lines.append(f"head {head:<3} {'several' if many else 'one':8} {told}")
        return "\n".join(lines)


def survey_heads(
    model: nn.Module,
    sae: AttentionSAE,
    layer: int,
    documents: Iterable[Tensor],
    count: int = 10,
    rules: FamilyRules = FamilyRules(),
    labels: Mapping[int, str] | None = None,
    output: Tensor | None = None,
    progress: bool = False,
) -> HeadSurvey:
    """Look at the best features of every head of a layer.

    Parameters
    ----------
    model, layer
        Whose attention is explained.
    sae
        Of its heads, in evaluation mode.
    documents
        Token ids, ``(tokens,)`` or ``(1, tokens)`` each, in which features are looked for.
    count
        Features of each head; 10 in the paper. Only features that are active somewhere are taken.
    rules
        Where families end.
    labels
        Feature → label of another origin, such as an explanation; features without one keep their family.
    output
        As in :func:`~gossamer.features.attention_sae.head_attribution`.
    progress
        Whether to show a bar.

    Raises
    ------
    CalibrationError
        If there is no document, or too few features are ever active.
    """
    texts = [text.reshape(-1) for text in documents]
    if not texts:
        raise CalibrationError("there is no document to look for features in; give some")
    traces, codes = [], []
    for text in track(texts, "tracing attention", enabled=progress):
        trace = trace_attention(model, text, layer)[layer]
        traces.append(trace)
        with torch.no_grad():
            codes.append(sae.encode(trace.z.flatten(1)))
    alive = sum(torch.bincount(code.indices[code.values > 0], minlength=sae.n_features) for code in codes) > 0
    if int(alive.sum()) < count:
        raise CalibrationError(f"{int(alive.sum())} features are active in these documents; give more text")
    shares = head_attribution(sae, output)
    best = top_features(shares, count, alive)
    families = {}
    for feature in track(best.unique().tolist(), "families of features", enabled=progress):
        families[feature] = feature_family(sae, traces, _most_active(codes, feature, rules.examples), feature, rules)
    named = [[(labels or {}).get(feature, families[feature].family) for feature in row] for row in best.tolist()]
    return HeadSurvey(best, shares.t().gather(1, best), families, named)


def _most_active(codes: Sequence[SparseCodes], feature: int, count: int) -> list[tuple[int, int]]:
    """Document and position of the highest values; the first token of a document is left out."""
    found: list[tuple[float, int, int]] = []
    for number, code in enumerate(codes):
        here = (code.indices == feature) & (code.values > 0)
        rows, values = code.row_of[here], code.values[here]
        found += [(value, number, row) for value, row in zip(values.tolist(), rows.tolist()) if row]
    if count < 1:
        raise ConfigurationError(f"examples is {count}; look at one token or more")
    return [(number, row) for _, number, row in sorted(found, reverse=True)[:count]]
