"""Local attention with relative positions, in pieces: each reads itself and its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gossamer.errors import ConfigurationError


class RelativeLocalAttention(nn.Module):
    """Attention of each piece of a sequence to itself and the piece before, and behind unless causal.

    Scores are ``q·(k + r)``, where r is learned for each distance and head [Shaw et al., 2018, arXiv 1803.02155].

    Parameters
    ----------
    num_heads, head_size
        Of queries, keys and values.
    window
        Tokens of a piece; a token reads between `window` and twice as many, itself included.
    causal
        Whether keys behind the query are hidden.

    Raises
    ------
    ConfigurationError
        If the window is below 1.
    """

    def __init__(self, num_heads: int, head_size: int, window: int, causal: bool = True):
        super().__init__()
        if window < 1:
            raise ConfigurationError(f"local_window is {window}; it must be at least 1")
        self.window, self.causal = window, causal
        distances = 2 * window if causal else 4 * window - 1
        self.positions = nn.Parameter(torch.randn(num_heads, distances, head_size) * head_size**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of ``(batch, heads, n, head_size)``; `mask` is bool ``(batch, n)``, True for real tokens.

        Returns
        -------
        Tensor
            ``(batch, heads, n, head_size)``; zero for queries that see no real token.
        """
        length, width = q.shape[2:]
        spare = -length % self.window
        pieces = pad(q * width**-0.5, (0, 0, 0, spare)).unflatten(2, (-1, self.window))
        keys, values = self._neighbours(k, spare), self._neighbours(v, spare)
        scores = pieces @ keys + self._by_distance(pieces)
        real = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
        seen = self._neighbours(real[:, None, :, None], spare).transpose(-1, -2).squeeze(-1)[..., None, :]
        if self.causal:
            seen = seen & (self._distances(q.device) >= 0)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1) @ values.transpose(-1, -2)
        mixed = mixed.masked_fill(~seen.any(-1, keepdim=True), 0)
        return mixed.flatten(2, 3)[:, :, :length]

    def _neighbours(self, x: Tensor, spare: int) -> Tensor:
        """Windows of two or three pieces, ``(batch, heads, pieces, width, keys)``; a view of the padded sequence."""
        behind = 0 if self.causal else self.window
        padded = pad(x, (0, 0, self.window, spare + behind))
        return padded.unfold(2, 2 * self.window + behind, self.window)

    def _distances(self, device: torch.device) -> Tensor:
        """Query minus key, ``(window, keys)``."""
        keys = (2 if self.causal else 3) * self.window
        return torch.arange(self.window, device=device)[:, None] + self.window - torch.arange(keys, device=device)

    def _by_distance(self, pieces: Tensor) -> Tensor:
        """q·r of the distance of each pair; where the distance is not allowed, whatever."""
        found = pieces @ self.positions[:, None].transpose(-1, -2)
        rows, distances = found.shape[-2:]
        keys = (2 if self.causal else 3) * self.window
        # columns descend in distance, and a row further down wants all of them one place to the right: a matrix with
        # one column more, read in the old width, is shifted by one place in each row
        sheared = pad(found, (0, 1)).flatten(-2)[..., rows - 1 : rows - 1 + rows * distances]
        return sheared.unflatten(-1, (rows, distances))[..., :keys]
