"""Stand-ins for data that experiments download."""

from __future__ import annotations

import pytest
import torch

from gossamer.papers import digits as module
from gossamer.papers.textures import Textures


@pytest.fixture
def drawn_digits(monkeypatch):
    """Twelve noisy images of each of ten drawings in the place of the real digits; nothing is downloaded."""
    generator = torch.Generator().manual_seed(0)
    drawings = (torch.rand(10, 1, 28, 28, generator=generator) > 0.7).float()
    labels = torch.arange(120) % 10
    images = (drawings[labels] + 0.2 * torch.rand(120, 1, 28, 28, generator=generator)).clamp(0, 1)
    drawn = module.Digits(images, labels)
    for name in ("digits", "magnitude", "essential_vision"):
        monkeypatch.setattr(f"gossamer.papers.{name}.digits", lambda: drawn)
    return drawn


@pytest.fixture
def drawn_textures():
    """Twelve crops of each of ten stripe patterns, to learn from and as many to judge by; nothing is downloaded."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 10
    place = torch.arange(16.0)

    def drawn(labels):
        angle = labels.view(-1, 1, 1, 1) * (torch.pi / 10)
        waves = torch.sin(2 * (place * angle.cos() + place.view(-1, 1) * angle.sin()))
        return waves + 0.5 * torch.randn(len(labels), 1, 16, 16, generator=generator)

    parts = [module.Digits(drawn(labels), labels) for _ in range(2)]
    return Textures(*parts, torch.randn(40, 1, 16, 16, generator=generator))
