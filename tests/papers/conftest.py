"""Stand-ins for data that experiments download."""

from __future__ import annotations

import pytest
import torch

from gossamer.papers import digits as module


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
