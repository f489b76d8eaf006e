"""Clips of real handwritten digits that drift and bounce before a real photograph, seen by a noisy camera.

A digit moves by a pixel every second frame, down or up and to the left or right, and turns back at the walls. Almost
everything in such a clip stays where it is, and a camera's noise still makes every pixel change from frame to frame:
the case for which networks that compute only changes are made. The backgrounds are crops of photographs, those of clips
to learn from other ones than those of clips to judge by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.papers.digits import Digits

SIDE = 24
_DIGIT = 14
_CONTRAST = 0.4  # of the background, whose crops have mean 0 and deviation 1
_BRIGHT = 3.0  # of the ink


@dataclass(frozen=True)
class Clips:
    """Moving images and what they show.

    Attributes
    ----------
    frames
        ``(n, time, 1, 24, 24)``, of mean about 0.
    labels
        Digit, ``(n,)`` int64.
    """

    frames: Tensor
    labels: Tensor

    def mixed(self, generator: torch.Generator) -> Clips:
        """The same frames, each taken from another clip: nothing is redundant any more, and labels mean nothing."""
        count, time = self.frames.shape[:2]
        # shifted by different numbers of clips, so that neighbours never come from the same one
        shifts = torch.randperm(count, generator=generator)[:time]
        if len(shifts) < time:
            raise ConfigurationError(f"{count} clips of {time} frames cannot be mixed; as many clips are needed")
        frames = [self.frames[:, t].roll(int(shift), 0) for t, shift in enumerate(shifts)]
        return Clips(torch.stack(frames, 1), self.labels)

    def shuffled(self, generator: torch.Generator) -> Clips:
        """The frames of every clip in another order: the background stays, the motion is gone."""
        count, time = self.frames.shape[:2]
        order = torch.rand(count, time, generator=generator).argsort(1)
        return Clips(self.frames[torch.arange(count).unsqueeze(1), order], self.labels)


def moving_clips(
    digits: Digits, backgrounds: Tensor, count: int, time: int, generator: torch.Generator, noise: float = 0.08
) -> Clips:
    """Draw clips.

    Parameters
    ----------
    digits
        Images ``(n, 1, 28, 28)``, shown at half their size.
    backgrounds
        Crops ``(m, 1, 16, 16)`` of mean 0 and deviation 1, shown a little larger.
    count, time
        Clips, and frames of each.
    generator
        On the CPU.
    noise
        Standard deviation of what the camera adds to every pixel of every frame.
    """
    chosen = torch.randint(len(digits), (count,), generator=generator)
    small = _BRIGHT * nn.functional.avg_pool2d(digits.images[chosen], 2)
    behind = backgrounds[torch.randint(len(backgrounds), (count,), generator=generator)]
    behind = _CONTRAST * nn.functional.interpolate(behind, size=SIDE, mode="bilinear")
    room = SIDE - _DIGIT
    place = torch.randint(room + 1, (count, 2), generator=generator)
    speed = 2 * torch.randint(2, (count, 2), generator=generator) - 1
    frames = behind.unsqueeze(1).repeat(1, time, 1, 1, 1)
    rows = torch.arange(_DIGIT)
    which = torch.arange(count).view(-1, 1, 1)
    for t in range(time):
        # a path that bounces is a straight one, folded at the walls; a step takes two frames
        folded = (place + t // 2 * speed) % (2 * room)
        folded = torch.where(folded > room, 2 * room - folded, folded)
        ys, xs = (folded[:, axis].view(-1, 1) + rows for axis in (0, 1))
        window = (which, t, 0, ys.unsqueeze(2), xs.unsqueeze(1))
        frames[window] = torch.maximum(frames[window], small[:, 0])
    frames += noise * torch.randn(frames.shape, generator=generator)
    return Clips(frames, digits.labels[chosen])
