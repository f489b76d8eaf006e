"""A small masked-diffusion language model, and the sampler that writes with it.

Such a model knows no direction: every position sees all others. Training hides a random share of the tokens behind a
mask token and asks for them; writing starts from nothing but masks behind the prompt, and each step predicts all of
them and keeps the predictions it is surest of [Nie et al., 2025, arXiv 2502.09992].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.models.denoising import AttentionFunction, Denoiser, SelfAttention, feed_forward, rotations

_LOCALITY = 2.0  # of heads before training; without it, small models take long to find out what is near
_LEAST_HIDDEN = 0.02  # share of tokens below which the weight 1 / share would make one sequence rule a batch


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, _LOCALITY)
        self.feed_forward = feed_forward(width)

    def forward(
        self,
        x: Tensor,
        attention: AttentionFunction,
        layer: int,
        rotation: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), attention, layer, rotation, key_mask)
        return x + self.feed_forward(self.norm2(x))


class MaskedDiffusionLM(Denoiser):
    """A bidirectional transformer that predicts the tokens behind a mask token.

    Parameters
    ----------
    vocabulary
        Tokens without the mask token, which is number `vocabulary`.
    layers, width, heads
        Of the transformer.
    length
        Longest sequence.
    """

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, length: int):
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        cosine, sine = rotations(length, width // heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:  # residual branches start small, as in GPT-2
            for layer in (block.attention.out, block.feed_forward[2]):
                layer.weight.data.div_((2 * layers) ** 0.5)

    @property
    def mask_token(self) -> int:
        """Number of the mask token."""
        return self.vocabulary

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logits ``(batch, n, vocabulary)`` of tokens ``(batch, n)``; `key_mask` is True at tokens that are no padding.

        Raises
        ------
        ConfigurationError
            If the sequence is longer than the model allows.
        """
        n = tokens.shape[1]
        if n > self.length:
            raise ConfigurationError(f"the sequence has {n} tokens; the model takes at most {self.length}")
        x = self.embedding(tokens)
        rotation = (self.cosine[:n], self.sine[:n])
        for layer, block in enumerate(self.blocks):
            x = block(x, self.attention, layer, rotation, key_mask)
        return self.head(self.norm(x))


def masked_loss(
    model: MaskedDiffusionLM, tokens: Tensor, generator: torch.Generator, hideable: Tensor | None = None
) -> Tensor:
    """The bound on the log-likelihood that masked diffusion trains: L = E_t [Σ hidden −log p / t] / n, t ~ U(0, 1).

    Shares t are spread evenly over the batch, so that it never lacks easy or hard sequences.

    Parameters
    ----------
    model
        The model.
    tokens
        ``(batch, n)``.
    generator
        Of shares and places, on the CPU.
    hideable
        True where a token may be hidden, ``(batch, n)`` or ``(n,)``; by default everywhere. A prompt is not.
    """
    batch, n = tokens.shape
    start = torch.rand((), generator=generator)
    share = ((start + torch.arange(batch) / batch) % 1).clamp(min=_LEAST_HIDDEN)[:, None]
    hidden = torch.rand(batch, n, generator=generator) < share
    if hideable is not None:
        hidden &= hideable
    logits = model(tokens.masked_fill(hidden, model.mask_token))
    losses = functional.cross_entropy(logits[hidden], tokens[hidden], reduction="none")
    places = batch * n if hideable is None else int(hideable.expand(batch, n).sum())
    return (losses / share.expand(batch, n)[hidden]).sum() / places


@dataclass(frozen=True)
class MaskedDiffusionSampler:
    """Write behind a prompt, in `steps` steps.

    Parameters
    ----------
    model
        The model; its listener is told of the sample and of every step.
    steps
        Of the whole sample, shared equally by its blocks.
    block_length
        Tokens of a block; blocks are written one after the other, and inside one all positions at once
        (semi-autoregressive). By default one block.
    remasking
        Which predictions of a step are kept: those of the highest probability (``low_confidence``: the others are
        masked again), or ``random`` ones.
    temperature
        Of the softmax from which tokens are drawn; 0 takes the likeliest.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """

    model: MaskedDiffusionLM
    steps: int
    block_length: int | None = None
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigurationError(f"steps is {self.steps}; it must be at least 1")
        if self.block_length is not None and self.block_length < 1:
            raise ConfigurationError(f"block_length is {self.block_length}; it must be at least 1, or None")
        if self.remasking not in ("low_confidence", "random"):
            raise ConfigurationError(f"remasking is {self.remasking!r}; it must be low_confidence or random")
        if self.temperature < 0:
            raise ConfigurationError(f"temperature is {self.temperature}; it must be 0 or more")

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        key_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Write `length` tokens.

        Parameters
        ----------
        prompt
            ``(batch, p)``.
        length
            Tokens to write.
        key_mask
            True at tokens of the prompt that are no padding, ``(batch, p)``.
        generator
            For a positive temperature and for random remasking.
        watch
            Called after every step with its number and all tokens so far.

        Returns
        -------
        Tensor
            ``(batch, p + length)``.

        Raises
        ------
        ConfigurationError
            If blocks do not divide the length, or the steps.
        CalibrationError
            If the prompt is no batch of tokens.
        """
        if prompt.dim() != 2 or prompt.is_floating_point():
            raise CalibrationError(f"the prompt is {prompt.dtype} {tuple(prompt.shape)}; give token ids (batch, p)")
        blocks, block_length = self._blocks(length)
        batch, p = prompt.shape
        tokens = torch.cat([prompt, prompt.new_full((batch, length), self.model.mask_token)], 1)
        if key_mask is not None:
            key_mask = torch.cat([key_mask.bool(), key_mask.new_ones(batch, length, dtype=torch.bool)], 1)
        per_block = self.steps // blocks
        self.model.begin(self.steps, slice(0, p))
        for index in range(self.steps):
            block, within = divmod(index, per_block)
            self.model.step(index)
            start = p + block * block_length
            logits = self.model(tokens, key_mask)[:, start : start + block_length]
            count = block_length // per_block + (within < block_length % per_block)
            self._commit(tokens[:, start : start + block_length], logits, count, generator)
            if watch is not None:
                watch(index, tokens)
        return tokens

    def _blocks(self, length: int) -> tuple[int, int]:
        block_length = length if self.block_length is None else self.block_length
        if length < 1 or length % block_length:
            raise ConfigurationError(f"length is {length}; it must be a multiple of the block length {block_length}")
        blocks = length // block_length
        if self.steps % blocks or self.steps // blocks > block_length:
            raise ConfigurationError(
                f"steps is {self.steps}; it must be a multiple of {blocks} blocks and at most {length}, a token each"
            )
        return blocks, block_length

    def _commit(self, block: Tensor, logits: Tensor, count: int, generator: torch.Generator | None) -> None:
        """Replace the `count` surest masks of each row of a view of the tokens."""
        probabilities = logits.float().softmax(-1)
        if self.temperature > 0:
            warmed = (logits.float() / self.temperature).softmax(-1)
            drawn = torch.multinomial(warmed.flatten(0, 1), 1, generator=generator).view(block.shape)
        else:
            drawn = probabilities.argmax(-1)
        confidence = probabilities.gather(-1, drawn[..., None])[..., 0]
        if self.remasking == "random":
            confidence = torch.rand(confidence.shape, generator=generator)
        masked = block == self.model.mask_token
        chosen = confidence.masked_fill(~masked, -1.0).topk(count, -1).indices
        block.scatter_(1, chosen, drawn.gather(1, chosen))
