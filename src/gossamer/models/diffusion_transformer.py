"""A small diffusion transformer for images and videos, and the sampler that draws with it.

Pictures are cut into patches, patches are tokens, and every layer is told the time of the diffusion and the class by
scales and shifts of its norms (adaptive layer norm) [Peebles & Xie, 2023, arXiv 2212.09748]. Where a patch is, queries
and keys say by rotations, a part of their features for each direction. The class also comes as a few "text" tokens in
front of the patches, which take part in attention as text does in a joint transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.errors import ConfigurationError
from gossamer.models.denoising import AttentionFunction, Denoiser, SelfAttention, feed_forward

_FREQUENCIES = 64
_LOCALITY = 2.0  # of heads before training; without it, small models take long to find out what is near
_BASE = 100.0  # of rotary angles: grids are small
_EARLIEST, _LATEST = 0.002, 0.998  # times of the schedule, which divides by its ends


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, heads, _LOCALITY)
        self.feed_forward = feed_forward(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: Tensor, condition: Tensor, attention: AttentionFunction, layer: int, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, attention, layer, rotation)
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


class DiffusionTransformer(Denoiser):
    """Predicts the velocity v = α·ε − σ·x of noisy pictures α·x + σ·ε [Salimans & Ho, 2022, arXiv 2202.00512].

    Parameters
    ----------
    size
        Height and width of a picture, or frames, height and width of a video.
    patch
        Side of a patch; it divides height and width.
    channels
        Of a picture.
    layers, width, heads
        Of the transformer.
    classes
        Labels; one more, number `classes`, stands for "no class".
    text_tokens
        Tokens that say the class, in front of the patches.

    Raises
    ------
    ConfigurationError
        If the patch does not divide the picture.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        patch: int,
        channels: int,
        layers: int,
        width: int,
        heads: int,
        classes: int,
        text_tokens: int = 0,
    ):
        super().__init__()
        if len(size) not in (2, 3) or any(side % patch for side in size[-2:]):
            raise ConfigurationError(f"size is {size}; give (height, width) or frames too, multiples of patch {patch}")
        self.size, self.patch, self.channels = size, patch, channels
        self.classes, self.text_tokens = classes, text_tokens
        self.grid = (size[0] if len(size) == 3 else 1, size[-2] // patch, size[-1] // patch)
        self.inlet = nn.Linear(channels * patch * patch, width)
        angles = functional.pad(_angles(self.grid, width // heads), (0, 0, text_tokens, 0))
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        self.text = nn.Embedding((classes + 1) * max(1, text_tokens), width)
        self.labels = nn.Embedding(classes + 1, width)
        self.clock = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.outlet = nn.Linear(width, channels * patch * patch)
        self._initialise()

    def _initialise(self) -> None:
        for embedding in (self.text, self.labels):
            nn.init.normal_(embedding.weight, std=0.5)
        # blocks begin as the identity (gates of zero), and so does the whole: it predicts zero
        for layer in [self.modulation, self.outlet, *(block.modulation for block in self.blocks)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def tokens(self) -> int:
        """Text tokens and patches together."""
        return self.text_tokens + math.prod(self.grid)

    def forward(self, pictures: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Velocity of noisy pictures.

        Parameters
        ----------
        pictures
            ``(batch, channels, height, width)`` or ``(batch, frames, channels, height, width)``.
        time
            In [0, 1], ``(batch,)``: 0 is clean, 1 is noise.
        labels
            ``(batch,)``, or the number of classes for none.

        Returns
        -------
        Tensor
            Of the shape of the pictures.
        """
        x = self.inlet(self.patches(pictures))
        if self.text_tokens:
            rows = labels[:, None] * self.text_tokens + torch.arange(self.text_tokens, device=labels.device)
            x = torch.cat([self.text(rows), x], 1)
        condition = functional.silu(self.clock(_waves(time)) + self.labels(labels))
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, self.attention, layer, (self.cosine, self.sine))
        scale, shift = self.modulation(condition)[:, None].chunk(2, -1)
        x = self.outlet((self.norm(x) * (1 + scale) + shift)[:, self.text_tokens :])
        return self.unpatched(x)

    def patches(self, pictures: Tensor) -> Tensor:
        """``(batch, frames · rows · columns, channels · patch²)``, in raster order."""
        frames = pictures if len(self.size) == 3 else pictures[:, None]
        cut = frames.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)

    def unpatched(self, x: Tensor) -> Tensor:
        """What :meth:`patches` takes apart."""
        cut = x.unflatten(1, self.grid).unflatten(-1, (self.channels, self.patch, self.patch))
        frames = cut.permute(0, 1, 4, 2, 5, 3, 6).flatten(-2).flatten(-3, -2)
        return frames if len(self.size) == 3 else frames[:, 0]


def schedule(time: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ at a time in [0, 1]: the cosine schedule, α² + σ² = 1 [Nichol & Dhariwal, 2021, arXiv 2102.09672]."""
    angle = time.clamp(_EARLIEST, _LATEST) * (math.pi / 2)
    return angle.cos(), angle.sin()


def diffusion_loss(
    model: DiffusionTransformer, pictures: Tensor, labels: Tensor, generator: torch.Generator, unlabelled: float = 0.1
) -> Tensor:
    """Mean squared error of the velocity at times spread evenly over the batch.

    Parameters
    ----------
    model
        The model.
    pictures, labels
        Clean ones, of deviation about 1, and their classes.
    generator
        Of times and noise, on the CPU.
    unlabelled
        Share of the pictures whose class is kept from the model, for guidance.
    """
    batch = len(pictures)
    time = (torch.rand((), generator=generator) + torch.arange(batch) / batch) % 1
    alpha, sigma = (part.view(-1, *[1] * (pictures.dim() - 1)) for part in schedule(time))
    noise = torch.randn(pictures.shape, generator=generator)
    hidden = torch.rand(batch, generator=generator) < unlabelled
    found = model(alpha * pictures + sigma * noise, time, labels.masked_fill(hidden, model.classes))
    return functional.mse_loss(found, alpha * noise - sigma * pictures)


@dataclass(frozen=True)
class DDIMSampler:
    """Deterministic sampling from noise [Song et al., 2021, arXiv 2010.02502], with classifier-free guidance.

    Parameters
    ----------
    model
        The model; its listener is told of the sample, of every step, and of the branch of every call.
    steps
        Times at which the model is asked.
    guidance
        w in v = v_none + w (v_class − v_none) [Ho & Salimans, 2022, arXiv 2207.12598]; 1 asks for the class only.
    together
        Whether both branches share one call, the one without class in the first half of its batch; otherwise each has
        its own, named ``none`` and ``class``.

    Raises
    ------
    ConfigurationError
        If there is no step.
    """

    model: DiffusionTransformer
    steps: int = 50
    guidance: float = 2.0
    together: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigurationError(f"steps is {self.steps}; it must be at least 1")

    @torch.no_grad()
    def sample(
        self, labels: Tensor, generator: torch.Generator, watch: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Draw a picture for each label.

        Parameters
        ----------
        labels
            ``(batch,)``.
        generator
            Of the noise it starts from, on the CPU.
        watch
            Called after every step with its number and what it has at that time.

        Returns
        -------
        Tensor
            ``(batch, channels, height, width)``, with frames in front of the channels for a video.
        """
        model = self.model
        shape = (*model.size[:-2], model.channels, *model.size[-2:])
        x = torch.randn((len(labels), *shape), generator=generator)
        model.begin(self.steps, slice(0, model.text_tokens))
        times = torch.linspace(1, 0, self.steps + 1)
        for index in range(self.steps):
            (alpha, sigma), (next_alpha, next_sigma) = schedule(times[index]), schedule(times[index + 1])
            velocity = self._velocity(x, times[index].expand(len(labels)), labels, index)
            clean, noise = alpha * x - sigma * velocity, sigma * x + alpha * velocity
            x = next_alpha * clean + next_sigma * noise
            if watch is not None:
                watch(index, x)
        return x

    def _velocity(self, x: Tensor, time: Tensor, labels: Tensor, index: int) -> Tensor:
        model, none = self.model, torch.full_like(labels, self.model.classes)
        if self.guidance == 1:
            model.step(index, "class")
            return model(x, time, labels)
        if self.together:
            model.step(index)
            without, given = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([none, labels])).chunk(2)
        else:
            model.step(index, "none")
            without = model(x, time, none)
            model.step(index, "class")
            given = model(x, time, labels)
        return without + self.guidance * (given - without)


def _angles(grid: tuple[int, int, int], head_size: int) -> Tensor:
    """Rotary angles of the place in each direction, ``(tokens, head size / 2)``; text, in front of them, has none."""
    axes = [axis for axis, side in enumerate(grid) if side > 1] or [0]
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3)
    shares = torch.tensor_split(torch.arange(head_size // 2), len(axes))
    rates = [_BASE ** -(torch.arange(len(share)) / max(1, len(share))) for share in reversed(shares)]
    return torch.cat([places[:, axis, None] * rate for axis, rate in zip(axes, rates)], 1)


def _waves(time: Tensor) -> Tensor:
    rates = torch.exp(torch.linspace(0, math.log(1000.0), _FREQUENCIES, device=time.device))
    angles = time[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
