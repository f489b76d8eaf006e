"""Numbers and changes in plain words, the same wherever the page shows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer.report.charts import number

MISSING = "n/a"


def scaled(value: object, unit: str = "") -> str:
    """Write a number with three digits and a decimal prefix: 269_000_000 bytes become `269 MB`."""
    known = number(value)
    if known is None:
        return MISSING
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= 0.9995 * size:
            return f"{known / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{known:.3g} {unit}".rstrip()


def figure(value: object) -> str:
    """Write a plain number with three significant digits, and whole thousands in full."""
    known = number(value)
    if known is None:
        return MISSING
    return f"{known:,.0f}" if abs(known) >= 100 or known == int(known) else f"{known:.3g}"


def percent(value: object) -> str:
    """Write a share with one decimal."""
    known = number(value)
    return MISSING if known is None else f"{known:.1%}"


def times(value: float) -> str:
    """Write a ratio, sparse over dense."""
    return f"{value:.2f}×" if value < 10 else f"{value:.3g}×"


def in_words(value: object, key: str = "") -> str:
    """Write any JSON value for a list of settings; the key tells bytes from plain numbers."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(item, str(name))}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(item, key) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    if isinstance(value, (int, float)):
        if key.endswith("bytes_per_second"):
            return scaled(value, "B/s")
        if key.endswith("bytes"):
            return scaled(value, "B")
        if number(value) is None:
            return MISSING
        return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}"
    return str(value)


@dataclass(frozen=True)
class Quantity:
    """Something measured on both models, and the words for its becoming better or worse."""

    key: str
    label: str
    write: Callable[[object], str]
    better: str
    worse: str
    more_is_better: bool = False
    unit: str = ""
    limits: tuple[str, str] = ("", "")

    @property
    def aim(self) -> str:
        """Which direction is good, in words."""
        return "more is better" if self.more_is_better else "less is better"


QUANTITIES = (
    Quantity("perplexity", "Perplexity", figure, "better", "worse"),
    Quantity("file_bytes", "File on disk", lambda value: scaled(value, "B"), "smaller", "larger"),
    Quantity("memory_bytes", "Weights in memory", lambda value: scaled(value, "B"), "smaller", "larger"),
    Quantity("flops_per_token", "Arithmetic", scaled, "less", "more", unit="FLOP/token"),
    Quantity("prefill_tokens_per_second", "Prefill speed", figure, "faster", "slower", True, "tokens/s"),
    Quantity(
        "decode_tokens_per_second",
        "Decode speed",
        figure,
        "faster",
        "slower",
        True,
        "tokens/s",
        ("decode_limit_dense", "decode_limit_sparse"),
    ),
)


@dataclass(frozen=True)
class Change:
    """How a quantity moved: its `meaning` (better, worse, same, unknown), a sign, and words."""

    meaning: str
    sign: str
    text: str
    ratio: float | None


def median_of(value: object) -> float | None:
    """Return the median of a measurement with spread, or the number itself."""
    return number(value.get("median")) if isinstance(value, Mapping) else number(value)


def spread_of(value: object) -> tuple[float, float] | None:
    """Return the lowest and highest run of a measurement, or None if it has no spread."""
    if not isinstance(value, Mapping):
        return None
    low, high = number(value.get("low")), number(value.get("high"))
    return None if low is None or high is None else (low, high)


def compare(quantity: Quantity, dense: object, sparse: object) -> Change:
    """Say in words how a quantity moved from the dense to the sparse model.

    A change counts only if the two spreads do not overlap or, for figures without spread, if it is at least
    half a per cent. The rest is "no faster", "no smaller": never a gain.

    Parameters
    ----------
    quantity
        What is compared, with its words.
    dense, sparse
        Numbers, or mappings with `median`, `low` and `high`.

    Returns
    -------
    Change
        With meaning `unknown` if either side is missing or not a positive number.
    """
    before, after = median_of(dense), median_of(sparse)
    if before is None or after is None or before <= 0 or after < 0:
        return Change("unknown", "", "no comparison", None)
    ratio = after / before
    spreads = spread_of(dense), spread_of(sparse)
    if spreads[0] and spreads[1] and spreads[0][0] <= spreads[1][1] and spreads[1][0] <= spreads[0][1]:
        return Change("same", "=", f"no {quantity.better}: {times(ratio)}, within the spread", ratio)
    if abs(ratio - 1) < 0.005:
        return Change("same", "=", f"no {quantity.better}: {times(ratio)}", ratio)
    better = (ratio > 1) == quantity.more_is_better
    change = 100 * abs(ratio - 1)
    amount = f"{times(ratio)}," if ratio >= 3 else f"{change:.0f}%" if change >= 10 else f"{change:.1f}%"
    text = f"{amount} {quantity.better if better else quantity.worse}"
    return Change("better" if better else "worse", "▲" if ratio > 1 else "▼", text, ratio)


def split_common(dense: object, sparse: object) -> dict[str, str | int | bool]:
    """Cut two generations where they part ways, at the last space before the first different character."""
    texts = [MISSING if text is None else str(text).strip() for text in (dense, sparse)]
    if texts[0] == texts[1]:
        return {"common": texts[0], "dense": "", "sparse": "", "words": len(texts[0].split()), "same": True}
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts))
    common = "".join(character for character, _ in alike)
    if any(rest and not rest[0].isspace() for rest in (text[len(common) :] for text in texts)):
        common = common[: common.rfind(" ") + 1]
    tails = [text[len(common) :] for text in texts]
    return {
        "common": common,
        "dense": tails[0],
        "sparse": tails[1],
        "words": len(common.split()),
        "same": False,
    }
