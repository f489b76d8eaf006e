"""Who gets to speak: a budget of matches between tokens and features, spent by one rule or another.

A sparse code is an assignment of features to tokens. What a batch may assign in all is its budget; a rule says within
which bounds. Each takes the matches of the highest affinity that its bounds allow [Ayonrinde, 2024, arXiv 2411.02124,
section 3], and of equal ones the first.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.selection import keep_highest
from gossamer.errors import ConfigurationError, NonFiniteError

Rule = Literal["token", "feature", "mutual"]
RULES: tuple[Rule, ...] = get_args(Rule)


def allocate(affinity: Tensor, budget: int, rule: Rule = "token", per_feature: Tensor | None = None) -> Tensor:
    """Choose matches of high affinity.

    Parameters
    ----------
    affinity
        ``(tokens, features)``, not negative: what is zero is no match and is never chosen.
    budget
        Matches of the whole batch.
    rule
        ``token``: the same number for every token, which the budget must be a multiple of; ``feature``: a number for
        each feature; ``mutual``: the highest of all.
    per_feature
        For ``feature``: how many tokens each feature gets, ``(features,)`` whole numbers that sum to the budget; by
        default all the same.

    Returns
    -------
    Tensor
        Bool ``(tokens, features)``: at most `budget` in all.

    Raises
    ------
    ConfigurationError
        If the budget is not from 1 to tokens × features, or does not fit the rule.
    NonFiniteError
        If an affinity is NaN or infinite.
    """
    tokens, features = affinity.shape
    if rule not in RULES:
        raise ConfigurationError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    if not 0 < budget <= tokens * features:
        raise ConfigurationError(f"budget is {budget}; it must be from 1 to {tokens} tokens × {features} features")
    if not bool(torch.isfinite(affinity.sum())) and not bool(torch.isfinite(affinity).all()):
        raise NonFiniteError("an affinity of a token to a feature is NaN or infinite; the activations are damaged")
    if rule == "mutual":
        return _best(affinity.reshape(1, -1), budget).view_as(affinity) & (affinity > 0)
    if rule == "token":
        if budget % tokens:
            raise ConfigurationError(f"budget is {budget}; {tokens} tokens need a multiple of their number")
        return _best(affinity, budget // tokens) & (affinity > 0)
    return _for_features(affinity, feature_budgets(features, tokens, budget, per_feature)) & (affinity > 0)


def feature_budgets(features: int, tokens: int, budget: int, per_feature: Tensor | None) -> Tensor:
    """Tokens of each feature, checked; `per_feature`, or all as equal as whole numbers can be."""
    if per_feature is None:
        share, rest = divmod(budget, features)
        return torch.full((features,), share) + (torch.arange(features) < rest)
    if per_feature.shape != (features,) or int(per_feature.sum()) != budget or bool((per_feature < 0).any()):
        raise ConfigurationError(
            f"per_feature has shape {tuple(per_feature.shape)} and sum {float(per_feature.sum()):g}; give {features} "
            f"numbers from 0 up that sum to the budget of {budget}"
        )
    return per_feature.clamp(max=tokens)


def zipf_budgets(features: int, budget: float, exponent: float = 1.0, shift: float = 0.0) -> Tensor:
    """Budgets that fall with the rank r of a feature as (r + q)⁻ˢ, float64 ``(features,)`` that sum to the budget.

    Parameters
    ----------
    features
        How many; the first has the largest.
    budget
        Sum of all.
    exponent, shift
        s and q of the law of Zipf and Mandelbrot.
    """
    if exponent < 0 or shift <= -1:
        raise ConfigurationError(f"exponent is {exponent} and shift {shift}; give at least 0, and more than −1")
    weights = (torch.arange(1, features + 1, dtype=torch.float64) + shift) ** -exponent
    return budget * weights / weights.sum()


def rounded_budgets(wanted: Tensor, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Whole numbers of the same sum, each at most the number of tokens, with the fractions as chances.

    A feature that deserves less than one token of a batch gets one now and then, and does not starve. What features
    deserve beyond the number of tokens goes to the others, in proportion to what these deserve.

    Parameters
    ----------
    wanted
        Budgets, ``(features,)``; their sum is rounded to a whole number.
    tokens
        Of the batch.
    generator
        For the chances; without one, the largest fractions win.
    """
    total = min(round(float(wanted.sum())), tokens * len(wanted))
    capped = _capped(wanted.double(), tokens)
    found = capped.floor().long()
    chance = capped - found
    if generator is not None:
        # where a running sum of the fractions, begun anywhere, passes a whole number: each has its own chance exactly
        begin = torch.rand((), generator=generator, dtype=torch.float64)
        passed = torch.cat([begin[None], begin + chance.cumsum(0)]).floor().diff().long()
        found = found + passed
        chance = torch.zeros_like(chance)
    while missing := total - int(found.sum()):
        open_ = found < tokens if missing > 0 else found > 0
        order = torch.where(open_, chance, -1.0).argsort(descending=missing > 0, stable=True)
        order = order[open_[order]][: abs(missing)]
        found[order] += 1 if missing > 0 else -1
        chance = torch.zeros_like(chance)
    return found


def _capped(wanted: Tensor, most: int) -> Tensor:
    """The same sum with no budget above `most`: the others grow by a common factor."""
    found, total = wanted, float(wanted.sum())
    while bool((over := found > most).any()):
        full = over | (found >= most)
        free = float(found[~full].sum())
        if not free:
            return torch.where(full, float(most), found)
        left = total - most * int(full.sum())
        found = torch.where(full, float(most), found * (left / free))
    return found


def _best(rows: Tensor, count: int) -> Tensor:
    width = rows.shape[1]
    # of equal scores the selection drops the first; read from the end, it keeps the first
    return keep_highest(rows.flip(1), width - min(count, width), "affinities").flip(1)


def _for_features(affinity: Tensor, counts: Tensor) -> Tensor:
    turned, counts = affinity.t().contiguous(), counts.to(affinity.device)
    lowest = _lowest_taken(turned, counts)[:, None]
    found = turned >= lowest
    crowded = (found.sum(1) > counts).nonzero()[:, 0]
    if len(crowded):  # equals of the lowest one that is taken: the first of them
        level, above = turned[crowded] == lowest[crowded], turned[crowded] > lowest[crowded]
        room = (counts[crowded] - above.sum(1))[:, None]
        found[crowded] = above | (level & (level.cumsum(1) <= room))
    return found.t().contiguous()


def _lowest_taken(turned: Tensor, counts: Tensor) -> Tensor:
    """The n-th highest of every row, with a number n for each; infinity where n is 0, the least positive if none is.

    Most budgets are small: rows whose n are of about the same size are searched together, and no deeper than needed.
    """
    floor = torch.finfo(turned.dtype).tiny
    lowest = torch.full((len(turned),), torch.inf, dtype=turned.dtype, device=turned.device)
    depth = torch.where(counts > 0, 2 ** counts.clamp(min=1).double().log2().ceil(), 0).long()
    for most in depth.unique().tolist():
        rows = (depth == most).nonzero()[:, 0]
        if most:
            best = turned[rows].topk(min(most, turned.shape[1]), dim=1).values
            lowest[rows] = best.gather(1, counts[rows, None] - 1)[:, 0].clamp(min=floor)
    return lowest
