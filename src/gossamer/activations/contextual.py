"""Contextual sparsity without training: the channels of feed-forward layers that this prompt, or this token, needs.

Coarse: neurons that the prompt's tokens use most serve for the whole generation, so that the layers become small dense
ones. Fine: every token chooses its own by the size of the gate. Both can be switched off for a call, which is then
exactly that of the full model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.channel_rules import ChannelRule, TopK
from gossamer.core.selection import dropped_count, keep_highest
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, SparsityError
from gossamer.measure.weights_read import WeightsRead, weights_read
from gossamer.models.activation_sites import GateSite, find_gate_sites
from gossamer.models.feedforward import FeedForward
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.sliced_feedforward import SlicedFeedForward, slice_gated_ffn

Kind = Literal["griffin", "cats"]


class ContextualSparse:
    """Feed-forward layers that compute with a share of their neurons, chosen by context.

    ``griffin`` [Dong et al., 2024, arXiv 2404.01365]: Z = act(gate) ⊙ up over the prompt, every token's row scaled to
    norm 1; a neuron's statistic is the norm of its column, and the largest are kept for the generation. The paper on
    correction calls it CSparse. ``cats`` [Lee et al., 2024, arXiv 2404.08763], FSparse there: each token keeps the
    largest absolute act(gate), by number and not by threshold so that the level is exact; the gate itself is computed
    in full. Attention stays dense. What `cats` drops is zeroed before the next matrix, which shows its quality; reading
    less memory for it is the business of a kernel.

    Parameters
    ----------
    model
        A decoder with feed-forward layers. Its weights are never changed.
    kind
        ``griffin`` or ``cats``.
    keep
        Share of neurons, in (0, 1].

    Attributes
    ----------
    device
        Where cut matrices go; None for where the whole ones are.

    Raises
    ------
    ConfigurationError
        If there is no such kind, or `keep` is outside (0, 1].
    TargetError, ModelError
        If the model has no feed-forward layer, or (for `cats`) one whose activation is no module.
    """

    def __init__(self, model: nn.Module, kind: Kind = "griffin", keep: float = 0.5):
        if kind not in get_args(Kind):
            raise ConfigurationError(f"kind is {kind!r}; it must be griffin (by prompt) or cats (by token)")
        if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise SparsityError(f"keep is {keep!r}; it must be in (0, 1], such as 0.5 for half of the neurons")
        self.model, self.kind, self.keep = model, kind, keep
        self.cuts: list[SlicedFeedForward] = []
        self.device: torch.device | None = None
        self._on = False
        self._handles: list[Any] = []
        self._gates: list[GateSite] = find_gate_sites(model) if kind == "cats" else []
        self.layers: list[FeedForward] = [g.layer for g in self._gates] or find_feed_forwards(model)
        for gate in self._gates:
            rule = ChannelRule(TopK(kept_count(gate.width, keep)))
            self._handles.append(gate.activation.register_forward_hook(self._masking(rule)))

    @property
    def ready(self) -> bool:
        """Whether it knows what to keep; `griffin` has to see a prompt first."""
        return self.kind == "cats" or bool(self.cuts)

    @property
    def weights_read(self) -> WeightsRead:
        """Weights that a token reads while sparsity is on, over the whole model, attention and head included."""
        live: dict[str, float] = {}
        gates = {gate.name: gate for gate in self._gates}
        for layer in self.layers:
            share = kept_count(layer.width, self.keep) / layer.width
            live |= {target.module_name: share for target in layer.targets}
            if layer.name in gates:
                gate = gates[layer.name]
                # the gate is read in full, also where it shares a matrix with up
                live[gate.gate.module_name] = (1 + share) / 2 if gate.up is gate.gate else 1.0
        return weights_read(self.model, live)

    @property
    def density(self) -> float:
        """Share of the model's weights that a sparse token reads; d of the effective density."""
        return self.weights_read.share

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Choose the neurons by what the full model computes inside of the context, which is to be one prompt.

        Raises
        ------
        CalibrationError
            If the model saw fewer than 2 tokens inside, whose statistic would be useless.
        ConfigurationError
            If it saw more than one sequence.
        """
        if self.kind == "cats":
            yield
            return
        self.off()
        seen = {layer.name: PromptStatistic(layer.name, layer.width) for layer in self.layers}
        handles = [
            layer.down.module.register_forward_pre_hook(
                lambda module, args, name=layer.name: seen[name].update(args[0])  # type: ignore[misc]
            )
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        used = [layer for layer in self.layers if seen[layer.name].tokens]
        if not used:
            raise CalibrationError("no layer saw the prompt; call the model inside of observing()")
        self.cuts = [slice_gated_ffn(layer, seen[layer.name].largest(self.keep), self.device) for layer in used]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the model inside are sparse.

        Raises
        ------
        CalibrationError
            If `griffin` has not seen a prompt.
        """
        self.on()
        try:
            yield
        finally:
            self.off()

    def on(self) -> None:
        """Make the calls that follow sparse; see :meth:`active`."""
        if not self.ready:
            raise CalibrationError("griffin has seen no prompt yet; run the model on it inside of observing() first")
        for cut in self.cuts:
            cut.apply()
        self._on = True

    def off(self) -> None:
        """Make the calls that follow those of the full model."""
        for cut in self.cuts:
            cut.restore()
        self._on = False

    def remove(self) -> None:
        """Leave the model as it was before; a second call does nothing."""
        self.off()
        self.cuts = []
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _masking(self, rule: ChannelRule) -> Any:
        def mask(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return output * rule.live(output) if self._on else None

        return mask


class PromptStatistic:
    """How much the tokens of one prompt use each neuron: column norms of rows of norm 1.

    Parameters
    ----------
    name, width
        Of the layer.

    Attributes
    ----------
    squares
        Sum over tokens of squared shares, ``(width,)`` float64.
    tokens
        How many.
    """

    def __init__(self, name: str, width: int):
        self.name = name
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def update(self, middle: Tensor) -> None:
        """Count what goes into the matrix that maps back, ``(1, tokens, width)`` or ``(tokens, width)``."""
        if middle.dim() > 2 and middle.shape[0] != 1:
            raise ConfigurationError(
                f"{self.name}: {middle.shape[0]} sequences at once; neurons are chosen for one prompt, so give batch 1"
            )
        rows = middle.detach().reshape(-1, middle.shape[-1]).float()
        rows = torch.nn.functional.normalize(rows, dim=1)
        self.squares += rows.square().sum(0).double().cpu()
        self.tokens += len(rows)

    def largest(self, keep: float) -> Tensor:
        """Indices of the share `keep` of neurons that is used most, ``(n,)``."""
        if self.tokens < 2:
            raise CalibrationError(
                f"the prompt has {self.tokens} token; its statistic would be useless: give at least 2, or kind='cats'"
            )
        if not torch.isfinite(self.squares).all():
            raise NonFiniteError(f"{self.name}: the prompt's activations hold NaN or infinity")
        width = len(self.squares)
        kept = keep_highest(self.squares.sqrt().unsqueeze(0), width - kept_count(width, keep), self.name)
        return kept[0].nonzero().flatten()


def kept_count(width: int, keep: float) -> int:
    """Neurons that are kept: all but ⌊(1 − keep) · width⌋, at least 1."""
    return max(1, width - dropped_count(width, round(1 - keep, 12)))
