"""Floating-point operations of training a transformer, by formula: before a run, and without the model in memory.

Only the matrices inside the blocks become sparse. Attention scores and the output head cost what they always did, which
is why three quarters of zeros save a factor of two and a half and not of four.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class TrainingFlops:
    """Operations for each token, and what a run of many tokens adds up to.

    A multiplication with its addition counts as two; the backward pass takes twice the forward one; attention counts
    the full square. Thangarasa et al., 2023, arXiv 2303.10464, appendix.

    Attributes
    ----------
    linear
        Forward operations for a token in the prunable matrices, when all of their weights are there.
    attention
        In queries times keys and probabilities times values, for a token.
    head
        In everything else that multiplies with weights, mostly the output head, for a token.
    density
        Share of the prunable weights that is left, in [0, 1].

    Examples
    --------
    >>> dense = TrainingFlops.of_shape(layers=24, width=2048, context=2048, vocabulary=50_257)
    >>> round(dense.forward / dense.at(0.25).forward, 2)
    2.49
    """

    linear: float
    attention: float
    head: float
    density: float = 1.0

    def __post_init__(self) -> None:
        for name in ("linear", "attention", "head"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; operations for a token are 0 or more")
        if not 0 <= self.density <= 1:
            raise ConfigurationError(f"density is {self.density}; it must lie in [0, 1], such as 0.25")

    @classmethod
    def of_shape(
        cls,
        layers: int,
        width: int,
        context: int,
        vocabulary: int,
        feedforward: int | None = None,
        density: float = 1.0,
    ) -> TrainingFlops:
        """Of a GPT: queries, keys, values and output of the full width, and a feed-forward layer of two matrices.

        Parameters
        ----------
        layers, width, context, vocabulary
            Of the model; `context` is the length of the sequences in tokens.
        feedforward
            Inner width of the feed-forward layer, by default four times the width.
        density
            Share of the weights in the blocks that is left.

        Raises
        ------
        ConfigurationError
            If a size is not positive.
        """
        inner = 4 * width if feedforward is None else feedforward
        sizes = {"layers": layers, "width": width, "context": context, "vocabulary": vocabulary, "feedforward": inner}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigurationError(f"{name} is {size}; it must be at least 1")
        weights = layers * (4 * width * width + 2 * width * inner)
        return cls(2.0 * weights, 4.0 * layers * context * width, 2.0 * vocabulary * width, density)

    @classmethod
    def of_model(cls, model: nn.Module, context: int, density: float = 1.0) -> TrainingFlops:
        """Of a causal language model with a Hugging Face configuration; its weights may be on the meta device.

        Parameters
        ----------
        model
            Whose linear layers are counted. All experts of a mixture count, chosen or not.
        context
            Length of the sequences in tokens.
        density
            Share of the prunable weights that is left.

        Raises
        ------
        ConfigurationError
            If the configuration does not say how many layers and heads there are, or `context` is not positive.
        TargetError
            If the model has no prunable layer.
        """
        if context < 1:
            raise ConfigurationError(f"context is {context}; it must be at least 1 token")
        targets = find_targets(model)
        within = {id(target.parameter) for target in targets}
        linear = sum(target.shape.numel() for target in targets)
        others = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear) and id(module.weight) not in within
        )
        return cls(2.0 * linear, 4.0 * context * _attention_width(model), 2.0 * others, density)

    @classmethod
    def of_config(cls, config: Any, context: int, density: float = 1.0) -> TrainingFlops:
        """Of the causal language model that a Hugging Face configuration describes; no weight is made."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return cls.of_model(AutoModelForCausalLM.from_config(config), context, density)

    def at(self, density: float) -> TrainingFlops:
        """The same model with another share of its prunable weights."""
        return replace(self, density=density)

    @property
    def forward(self) -> float:
        """Operations of the forward pass for a token."""
        return self.density * self.linear + self.attention + self.head

    @property
    def fixed_share(self) -> float:
        """Share of the dense operations that pruning cannot remove."""
        return (self.attention + self.head) / (self.linear + self.attention + self.head)

    def pretrain(self, tokens: float) -> float:
        """Operations of training on so many tokens, forward and backward, at this density."""
        return 3 * self.forward * tokens

    def end_to_end(self, pretraining: float, finetuning: float) -> float:
        """Operations of sparse pretraining with dense fine-tuning after it, each in tokens."""
        return self.pretrain(pretraining) + self.at(1.0).pretrain(finetuning)

    def saving(self, pretraining: float = 1.0, finetuning: float = 0.0) -> float:
        """How many times fewer operations than with dense pretraining on equally many tokens."""
        return self.at(1.0).end_to_end(pretraining, finetuning) / self.end_to_end(pretraining, finetuning)


def _attention_width(model: nn.Module) -> int:
    """Layers times heads times the width of a head."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [getattr(config, name, 0) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")]
    if not all(sizes):
        raise ConfigurationError(
            f"the configuration of {type(model).__name__} does not name num_hidden_layers, num_attention_heads and "
            f"hidden_size; use TrainingFlops.of_shape"
        )
    layers, heads, width = sizes
    return layers * heads * (getattr(config, "head_dim", None) or width // heads)
