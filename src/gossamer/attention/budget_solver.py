"""Parameters that give a sparse attention method the sparsity one asks for.

Methods count their budgets in columns, blocks, pages, tokens or shares of attention; a comparison is fair only if all
compute equally much. Sparsity here is the share of the query–key pairs that are left out: of the causal triangle while
a prompt is read, of the context while a token is decoded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.ada_snap_kv import AdaSnapKV
from gossamer.attention.base import SparseAttention
from gossamer.attention.block_sparse import FORCED, SMALLEST_CHUNK, BlockSparse
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.attention.flex_prefill import FlexPrefill
from gossamer.attention.quest import Quest
from gossamer.attention.snap_kv import SnapKV
from gossamer.attention.vertical_slash import VerticalSlash
from gossamer.attention.xattention import XAttention
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError, check_sparsity
from gossamer.measure.windows import evaluation_mode
from gossamer.models.attention_sites import Phase

TOLERANCE = 0.02
_STEPS = 9  # of a search whose every step runs the model
_FULL_SIZE = 4096  # tokens from which on granularities are those of the papers


@dataclass(frozen=True)
class Rule:
    """How a method comes by its budget.

    Attributes
    ----------
    phase
        What it makes sparse.
    solve
        ``solve(length, sparsity, options)`` gives the method.
    fit
        ``fit(model, data, length, sparsity, options)`` does, where a text must be looked at; one of the two is given.
    """

    phase: Phase
    solve: Callable[[int, float, Mapping[str, Any]], SparseAttention] | None = None
    fit: Callable[[nn.Module, list[Tensor], int, float, Mapping[str, Any]], SparseAttention] | None = None

    @property
    def adaptive(self) -> bool:
        """Whether a model and data are needed to find the parameters."""
        return self.fit is not None


def budget_for(
    method: str,
    length: int,
    sparsity: float,
    model: nn.Module | None = None,
    data: Iterable[Tensor] | None = None,
    **options: Any,
) -> SparseAttention:
    """A method whose parameters give a sparsity at a length.

    Windows, blocks and pages that are not given shrink with prompts shorter than 4096 tokens: a block of 64 queries in
    a prompt of 512 would be an eighth of it.

    Parameters
    ----------
    method
        A name in :data:`ALL_RULES`.
    length
        Tokens of the prompt.
    sparsity
        Share of the pairs to leave out, in [0, 1).
    model, data
        Where the sparsity depends on the text, as with ``flex-prefill`` and ``xattention``, whose parameter is searched
        for by bisection, and where a method is calibrated, as is ``double-sparsity``: a Hugging Face model and batches
        of token ids like those to come.
    **options
        Other hyper-parameters of the method.

    Returns
    -------
    SparseAttention
        Ready to be installed.

    Raises
    ------
    SparsityError
        If no parameters come within 0.02 of the sparsity.
    ConfigurationError
        If the length is too short, or a model or data is missing.
    UnknownNameError
        If there is no such method.

    Examples
    --------
    >>> budget_for("quest", 4096, 0.75).token_budget
    1008
    """
    rule = rule_of(method)
    check_sparsity(sparsity)
    if length < 16:
        raise ConfigurationError(f"length is {length}; there is nothing to leave out below 16 tokens")
    if rule.solve is not None:
        return rule.solve(length, float(sparsity), options)
    if model is None or data is None:
        raise ConfigurationError(
            f"what {method} leaves out depends on the text; give a model and data to find its parameters with"
        )
    return rule.fit(model, list(data), length, float(sparsity), options)


def rule_of(method: str) -> Rule:
    """How a method comes by its budget.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    """
    if method not in ALL_RULES:
        raise UnknownNameError("attention method with a budget", method, ALL_RULES)
    return ALL_RULES[method]


def granularity(length: int, largest: int, smallest: int = 1, share: int = 64) -> int:
    """A block or window for a length: `largest` from 4096 tokens on, else a power of two about length / share."""
    if length >= _FULL_SIZE:
        return largest
    return max(smallest, min(largest, 2 ** int(math.log2(max(length // share, 1)))))


def _lines(length: int) -> dict[str, Any]:
    """Options of methods of columns and diagonals."""
    size = granularity(length, 64)
    return {"local": size, "block_size": size, "sinks": min(4, size)}


def _vertical_slash(length: int, sparsity: float, options: Mapping[str, Any]) -> SparseAttention:
    defaults = {**_lines(length), "approximation": granularity(length, 64, share=16)}
    method = VerticalSlash(density=1 - sparsity, **{**defaults, **options})
    floor = _line_floor(length, method.sinks, method.local, method.block_size)
    return _within("vertical-slash", method, min(sparsity, 1 - floor), sparsity, length)


def _line_floor(length: int, sinks: int, local: int, block_size: int) -> float:
    """Density of the lines that are always read."""
    rows = -(-length // block_size)
    starts = torch.arange(rows) * block_size
    geometry = BlockMask.full(length, length, (block_size, 1))
    places = torch.arange(length)
    near = (places > starts[:, None] - local) & (places < starts[:, None] + block_size)
    pairs = geometry.pairs
    return float(torch.where(near | (places < sinks), pairs, 0).sum() / pairs.sum())


def _block_sparse(length: int, sparsity: float, options: Mapping[str, Any]) -> SparseAttention:
    chunk = options.get("chunk_size", granularity(length, 64, SMALLEST_CHUNK, share=128))
    blocks = -(-length // chunk)
    low, high = FORCED, max(FORCED, blocks)
    while low < high:  # the smallest count that leaves out no more than asked for
        middle = (low + high) // 2
        if _block_sparsity(length, chunk, middle) > sparsity:
            low = middle + 1
        else:
            high = middle
    near = min((low - 1, low), key=lambda count: abs(_block_sparsity(length, chunk, max(count, FORCED)) - sparsity))
    top = max(near, FORCED)
    method = BlockSparse(**{**options, "chunk_size": chunk, "top_chunks": top})
    return _within("block-sparse", method, _block_sparsity(length, chunk, top), sparsity, length)


def _block_sparsity(length: int, chunk: int, top: int) -> float:
    """Share of the causal triangle that is left out if every row reads `top` blocks, its own among them."""
    rows = range(-(-length // chunk))
    kept = 0
    for row in rows:
        queries = min(chunk, length - row * chunk)
        kept += queries * chunk * min(top - 1, row) + queries * (queries + 1) // 2
    return 1 - kept / (length * (length + 1) / 2)


def _quest(length: int, sparsity: float, options: Mapping[str, Any]) -> SparseAttention:
    page = options.get("page_size", granularity(length, 16, 4, share=128))
    wanted = (1 - sparsity) * length
    pages = max(1, round((wanted - (page + 1) / 2) / page))  # the current page is half full on average
    reached = 1 - min(1.0, (pages * page + (page + 1) / 2) / length)
    if sparsity == 0:
        pages, reached = 2 * -(-length // page), 0.0  # room for what will be decoded
    method = Quest(**{**options, "page_size": page, "token_budget": pages * page})
    return _within("quest", method, reached, sparsity, length)


def _eviction(factory: Callable[..., SnapKV], name: str) -> Callable[[int, float, Mapping[str, Any]], SparseAttention]:
    def solve(length: int, sparsity: float, options: Mapping[str, Any]) -> SparseAttention:
        capacity = max(1, round((1 - sparsity) * length))
        window = granularity(length, 128, share=64)
        defaults = {
            "approximation": granularity(length, 256, share=16),
            "local_window": max(1, min(window, capacity // 4)),
            "sinks": min(4, capacity // 8),
        }
        method = factory(**{**defaults, **options, "token_capacity": capacity})
        return _within(name, method, 1 - capacity / length, sparsity, length)

    return solve


def _flex_prefill(length: int, alpha: float, options: Mapping[str, Any]) -> SparseAttention:
    floor = granularity(length, 256)
    defaults = {**_lines(length), "approximation": granularity(length, 512, share=8), "min_budget": floor}
    return FlexPrefill(**{**defaults, **options, "alpha": alpha})


def _xattention(length: int, threshold: float, options: Mapping[str, Any]) -> SparseAttention:
    block = options.get("block_size", granularity(length, 128))
    defaults = {"block_size": block, "stride": min(8, max(1, block // 4))}
    return XAttention(**{**defaults, **options, "threshold": threshold})


def _double_sparsity(
    model: nn.Module, data: list[Tensor], length: int, sparsity: float, options: Mapping[str, Any]
) -> SparseAttention:
    method = DoubleSparsity(**options)
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    dense = sum(layer < layers for layer in set(method.dense_layers)) / layers
    # the layers that stay dense are made up for by the others
    tokens = 1.0 if dense == 1 else min(1.0, (1 - sparsity - dense) / (1 - dense))
    method = dataclasses.replace(method, tokens=1.0 if sparsity == 0 else max(1, round(tokens * length)))
    reached = 0.0 if sparsity == 0 else (1 - dense) * (1 - method.tokens / length)
    _within("double-sparsity", method, reached, sparsity, length)
    if method.channel_order is None:
        method.calibrate(model, data, progress=False)
    return method


def _searched(solve: Callable[[int, float, Mapping[str, Any]], SparseAttention], phase: Phase) -> Callable[..., Any]:
    """Bisection on the share of attention that `solve` takes, by what the model really computes."""

    def fit(
        model: nn.Module, data: list[Tensor], length: int, sparsity: float, options: Mapping[str, Any]
    ) -> SparseAttention:
        if sparsity == 0:
            return solve(length, 1.0, options)
        low, high = 0.0, 1.0
        best, gap = solve(length, 1.0, options), sparsity
        for _ in range(_STEPS):
            middle = (low + high) / 2
            method = solve(length, middle, options)
            found = 1 - realised_density(model, method, data, phase)
            if abs(found - sparsity) < gap:
                best, gap = method, abs(found - sparsity)
            if gap < TOLERANCE / 8:
                break
            low, high = (middle, high) if found > sparsity else (low, middle)
        if gap > TOLERANCE:
            raise SparsityError(
                f"no parameter of {type(best).__name__} comes within {TOLERANCE} of sparsity {sparsity} at {length} "
                f"tokens on this data; the nearest misses by {gap:.3f}"
            )
        return best

    return fit


def realised_density(model: nn.Module, method: SparseAttention, data: Iterable[Tensor], phase: Phase) -> float:
    """Share of the pairs that a method computes over batches of token ids ``(batch, tokens)``, read as prompts."""
    with evaluation_mode(model), method.active(model) as installed:
        for ids in data:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return installed.report().density(phase)


def _within(name: str, method: SparseAttention, reached: float, sparsity: float, length: int) -> SparseAttention:
    if abs(reached - sparsity) > TOLERANCE:
        parts = ", ".join(
            f"{f.name} {getattr(method, f.name)}" for f in dataclasses.fields(method) if f.init and f.name != "density"
        )
        raise SparsityError(
            f"{name} at {length} tokens comes no nearer to sparsity {sparsity} than {reached:.3f} ({parts}); take a "
            "longer prompt, finer blocks or another sparsity"
        )
    return method


RULES: dict[str, Rule] = {
    "vertical-slash": Rule("prefill", _vertical_slash),
    "block-sparse": Rule("prefill", _block_sparse),
    "flex-prefill": Rule("prefill", fit=_searched(_flex_prefill, "prefill")),
    "quest": Rule("decode", _quest),
    "snap-kv": Rule("decode", _eviction(SnapKV, "snap-kv")),
    "ada-snap-kv": Rule("decode", _eviction(AdaSnapKV, "ada-snap-kv")),
}
"""Methods that Nawrot et al. [2025, arXiv 2504.17768] compare."""

ALL_RULES: dict[str, Rule] = {
    **RULES,
    "xattention": Rule("prefill", fit=_searched(_xattention, "prefill")),
    "double-sparsity": Rule("decode", fit=_double_sparsity),
}
"""Methods that :func:`budget_for` knows."""
