"""Real images among clutter: an object anywhere on a canvas, with pieces of others strewn around it.

What belongs to the object is then a matter of what is seen and not of where, which is what a choice of attention
links has to find out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.papers.digits import SIDE, Digits


@dataclass(frozen=True)
class ClutteredImages:
    """Draws images with clutter.

    Attributes
    ----------
    source
        Images ``(n, 1, 28, 28)`` in [0, 1] and their classes.
    canvas
        Side of the square on which they are put.
    pieces, size
        How many square pieces of other images are put around, and their side.
    """

    source: Digits
    canvas: int
    pieces: int
    size: int

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images ``(count, 1, canvas, canvas)``, about zero mean, and classes ``(count,)``."""
        rows = torch.randint(len(self.source), (count,), generator=generator)
        canvas = torch.zeros(count, 1, self.canvas, self.canvas)
        others = torch.randint(len(self.source), (count, self.pieces), generator=generator)
        inside = torch.randint(SIDE - self.size + 1, (count, self.pieces, 2), generator=generator).tolist()
        onto = torch.randint(self.canvas - self.size + 1, (count, self.pieces, 2), generator=generator).tolist()
        place = torch.randint(self.canvas - SIDE + 1, (count, 2), generator=generator).tolist()
        for image in range(count):
            for piece in range(self.pieces):
                (y, x), (v, u) = inside[image][piece], onto[image][piece]
                part = self.source.images[others[image, piece], :, y : y + self.size, x : x + self.size]
                canvas[image, :, v : v + self.size, u : u + self.size] = part
            y, x = place[image]
            here = canvas[image, :, y : y + SIDE, x : x + SIDE]
            torch.maximum(here, self.source.images[rows[image]], out=here)
        return (canvas - 0.3) / 0.4, self.source.labels[rows]
