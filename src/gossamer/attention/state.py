"""What sparse attention remembers from one denoising step to the next, and when it may no longer be believed.

Attention hardly changes over the steps of a sample, so patterns and statistics are found at a few steps and used at all
others. What is remembered belongs to one sample, one layer and one branch of the guidance; :class:`StepCache` keeps it
apart, forgets it when a sample begins, and refuses what can only be a mistake: a step that goes backwards, or something
that was found at another length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gossamer.attention.base import Answer, Installed, SparseAttention
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.denoising import Denoiser, DenoiserSite
from gossamer.models.processor_sites import ProcessorSite


@dataclass(frozen=True, eq=False)
class Remembered:
    """A value, the step at which it was found, and for which shape of queries."""

    value: Any
    step: int
    shape: tuple[int, ...]


@dataclass
class StepCache:
    """Values by layer, branch and name, for the sample that is being made.

    Attributes
    ----------
    steps
        Of the sample; 0 before the first one begins.
    index
        The current step, from 0; −1 before the first.
    branch
        Of the guidance.
    context
        Where the given tokens are.
    """

    steps: int = 0
    index: int = -1
    branch: str = ""
    context: slice = field(default_factory=lambda: slice(0, 0))
    _values: dict[tuple[int | None, str, str], Remembered] = field(default_factory=dict, repr=False)

    def begin(self, steps: int, context: slice = slice(0, 0)) -> None:
        """Forget everything; a sample of so many steps begins.

        Raises
        ------
        ConfigurationError
            If there is no step.
        """
        if steps < 1:
            raise ConfigurationError(f"steps is {steps}; a sample has at least 1")
        self._values.clear()
        self.steps, self.index, self.branch, self.context = steps, -1, "", context

    def advance(self, index: int, branch: str = "") -> None:
        """The next calls belong to a step; it may be told repeatedly, for solvers that ask twice, and for branches.

        Raises
        ------
        ConfigurationError
            If no sample has begun, the step goes backwards, or there is none of that number.
        """
        if not self.steps:
            raise ConfigurationError(f"step {index} belongs to no sample; call begin(steps) first")
        if index < self.index:
            raise ConfigurationError(
                f"step {index} follows step {self.index}; steps go forward, and a new sample starts with begin(steps)"
            )
        if index >= self.steps:
            raise ConfigurationError(f"step is {index}; this sample has the steps 0 to {self.steps - 1}")
        self.index, self.branch = index, branch

    def put(self, call: AttentionCall, name: str, value: Any) -> None:
        """Remember a value for the layer of a call, in the place of an earlier one."""
        self.check()
        self._values[call.layer, self.branch, name] = Remembered(value, self.index, tuple(call.query.shape[:3]))

    def find(self, call: AttentionCall, name: str) -> Remembered | None:
        """What is remembered for the layer of a call; None if nothing is.

        Raises
        ------
        ConfigurationError
            If it was found for another batch, number of heads or length, or no sample has begun.
        """
        self.check()
        found = self._values.get((call.layer, self.branch, name))
        shape = tuple(call.query.shape[:3])
        if found is not None and found.shape != shape:
            raise ConfigurationError(
                f"the {name} of {call.place} was found for queries (batch, heads, tokens) of {found.shape} and these "
                f"are {shape}; call begin(steps) when a new sample starts"
            )
        return found

    def get(self, call: AttentionCall, name: str) -> Any:
        """The value remembered for the layer of a call.

        Raises
        ------
        ConfigurationError
            If there is none, or it was found for another shape.
        """
        found = self.find(call, name)
        if found is None:
            branch = f" in branch {self.branch!r}" if self.branch else ""
            raise ConfigurationError(
                f"{call.place} has no {name} at step {self.index}{branch}; run every step from 0 on, as the step "
                "that finds it was left out"
            )
        return found.value

    def named(self, name: str) -> dict[tuple[int | None, str], Any]:
        """(Layer, branch) → value, of all values of a name."""
        return {(layer, branch): kept.value for (layer, branch, what), kept in self._values.items() if what == name}

    @property
    def bytes(self) -> int:
        """Memory of what is remembered."""
        return sum(_size(kept.value) for kept in self._values.values())

    def clear(self) -> None:
        """Forget everything, the sample included."""
        self._values.clear()
        self.steps, self.index, self.branch, self.context = 0, -1, "", slice(0, 0)

    def check(self) -> None:
        """Refuse calls outside of a step.

        Raises
        ------
        ConfigurationError
            If no sample or no step has begun.
        """
        if self.index < 0:
            what = "step(0)" if self.steps else "begin(steps) and step(0)"
            raise ConfigurationError(f"attention is called before the first step of a sample; call {what} first")


def _size(value: Any) -> int:
    if isinstance(value, BlockMask):
        value = value.blocks
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


@dataclass(kw_only=True)
class StepwiseAttention(SparseAttention, ABC):
    """A method that remembers something from step to step; attention must see both directions.

    It works in the denoisers of :mod:`gossamer.models`, whose samplers tell it about steps; in transformers of
    diffusers, where ``begin(steps)`` has to be called before every sample; and in Hugging Face models, where a loop
    of one's own calls ``begin(steps)`` and ``step(index)``.

    Attributes
    ----------
    cache
        What is remembered.
    """

    cache: StepCache = field(init=False, repr=False, compare=False, default_factory=StepCache)
    _followed: list[ProcessorSite] = field(init=False, repr=False, compare=False, default_factory=list)

    def begin(self, steps: int, context: slice = slice(0, 0)) -> None:
        """A sample of so many steps begins; `context` is where its given tokens are (prompt, text)."""
        self.cache.begin(steps, context)
        for site in self._followed:
            site.begin()

    def step(self, index: int, branch: str = "") -> None:
        """The next calls belong to this step and branch."""
        self.cache.advance(index, branch)

    def reset(self) -> None:
        """Forget everything."""
        self.cache.clear()

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention of a call at the current step; cross-attention stays dense.

        Raises
        ------
        ConfigurationError
            If attention is causal, no step has begun, or the order of steps is not kept.
        """
        if call.layer in self.dense_layers or call.query.shape[2] != call.key.shape[2]:
            return None
        if call.causal:
            raise ConfigurationError(
                f"{call.place} is causal; {type(self).__name__} is for models that see both directions: "
                "pass is_causal=False, or use a method for causal models"
            )
        self.cache.check()
        return self.mix(call)

    @abstractmethod
    def mix(self, call: AttentionCall) -> Answer | None:
        """What the method does at the current step; None for dense attention."""

    def install(self, model: nn.Module) -> Installed:
        """Put the method into a model, until ``remove()`` or the end of a ``with`` block.

        Raises
        ------
        ModelError
            If the model does not let its attention be replaced, or another method is at work there.
        """
        return InstalledInSteps(model, self)


class InstalledInSteps(Installed):
    """A method that remembers, at work in a model."""

    method: StepwiseAttention

    def _attach(self) -> DenoiserSite | ProcessorSite | AttentionSite:
        if isinstance(self.model, Denoiser):
            return DenoiserSite(self.model, self._attend, self.method)
        if any(hasattr(module, "processor") for module in self.model.modules()):
            site = ProcessorSite(self.model, self._attend, self.method, self._masked)
            self.method._followed.append(site)
            return site
        return AttentionSite(self.model, self._attend, self._masked)

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        super().remove()
        if self._site in self.method._followed:
            self.method._followed.remove(self._site)
