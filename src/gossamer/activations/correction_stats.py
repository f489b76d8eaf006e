"""What corrected decoding took: drafted, checked and kept tokens, and the weights that were read for them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Window:
    """What happened between two checks.

    Attributes
    ----------
    drafted
        Tokens of the sparse model (the depth of a tree).
    accepted
        Those that were kept.
    advance
        Tokens by which the text grew: those, and the full model's own.
    read
        Tokens that the check read; more than a tree is deep if it has branches.
    """

    drafted: int
    accepted: int
    advance: int
    read: int


@dataclass
class SiriusStats:
    """Figures of one generation.

    Attributes
    ----------
    kernel_size
        k.
    density
        d, the share of weights that a step of the sparse model reads.
    windows
        One for each check.
    """

    kernel_size: int
    density: float
    windows: list[Window] = field(default_factory=list)

    @property
    def checks(self) -> int:
        """Calls of the full model after the prompt."""
        return len(self.windows)

    @property
    def rollbacks(self) -> int:
        """Checks that threw tokens away."""
        return sum(window.accepted < window.drafted for window in self.windows)

    @property
    def aal(self) -> float:
        """Average advance length of a check, at most k; windows that the end of the text cut short do not count.

        All count where there are no others; NaN without any check.
        """
        full = [w for w in self.windows if w.drafted == self.kernel_size - 1] or self.windows
        return sum(w.advance for w in full) / len(full) if full else float("nan")

    @property
    def effective_density(self) -> float:
        """((k − 1) d + 1) / AAL: weights read for a token, as a share of what the full model reads."""
        return ((self.kernel_size - 1) * self.density + 1) / self.aal

    @property
    def measured_density(self) -> float:
        """The same from the steps that were really made, windows that were cut short included."""
        advance = sum(w.advance for w in self.windows)
        steps = sum(w.drafted * self.density + 1 for w in self.windows)
        return steps / advance if advance else float("nan")
