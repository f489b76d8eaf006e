"""What feed-forward layers lose when their smallest contributions are left out: the tolerance called CETT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.core.channel_rules import column_norms
from gossamer.errors import CalibrationError
from gossamer.measure.runs import run_over
from gossamer.models.activation_sites import InputSite
from gossamer.models.blocks import Batch

_CANDIDATES = 65_536
_HIGHEST = 0.99  # quantile of the contributions up to which thresholds are looked for


class Truncation:
    """What a feed-forward layer loses when its smallest contributions are left out.

    The contribution of neuron i to a token is n_i = x_i W_down[:, i], of the norm |x_i| ‖W_down[:, i]‖; a bias of the
    matrix that maps back belongs to none.

    Parameters
    ----------
    inputs
        x, ``(tokens, m)``, what the matrix that maps back receives.
    down
        W_down, ``(d, m)``.
    """

    def __init__(self, inputs: Tensor, down: Tensor):
        self._inputs, self._down = inputs.detach().float(), down.detach().float()
        self._norms = self._inputs.abs() * column_norms(down).to(inputs.device)
        self._whole = (self._inputs @ self._down.T).norm(dim=1)
        flat = self._norms.flatten()
        self.low = float(flat.min())
        self.high = float(flat.kthvalue(max(1, int(_HIGHEST * len(flat)))).values)

    def error(self, threshold: float) -> float:
        """CETT: ‖Σ_{i: ‖n_i‖ ≤ ε} n_i‖ / ‖Σ_i n_i‖, averaged over tokens.

        What goes is added up before the norm is taken, so that contributions that cancel cost nothing.
        """
        gone = ((self._inputs * (self._norms <= threshold)) @ self._down.T).norm(dim=1)
        # a token for which the layer puts out nothing loses nothing
        return float(torch.where(self._whole > 0, gone / self._whole, 0.0).double().mean())

    def threshold(self, cett: float) -> float:
        """The largest of 65,536 evenly spaced thresholds whose error is at most `cett`.

        They lie between the least contribution and the 99% quantile of all of them. If even the first costs more, the
        threshold is 0, at which only exact zeros go.
        """
        first, last = -1, _CANDIDATES - 1
        while first < last:
            middle = (first + last + 1) // 2
            if self.error(self._candidate(middle)) <= cett:
                first = middle
            else:
                last = middle - 1
        return 0.0 if first < 0 else self._candidate(first)

    def _candidate(self, index: int) -> float:
        return self.low + (self.high - self.low) * index / (_CANDIDATES - 1)


def middle_activations(
    model: nn.Module, data: Sequence[Batch], sites: Sequence[InputSite], tokens: int, progress: bool = True
) -> dict[str, Tensor]:
    """What layers receive, ``(at most tokens, m)`` each, spread evenly over the batches."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    share = max(1, tokens // len(data))
    handles = []

    def keep(name: str, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1])
        chosen = torch.linspace(0, len(rows) - 1, min(share, len(rows))).long().unique()
        found[name].append(rows[chosen.to(rows.device)].clone())

    for site in sites:
        hook = lambda module, args, name=site.name: keep(name, args[0])  # noqa: E731
        handles.append(site.module.register_forward_pre_hook(hook))
    try:
        run_over(model, data, "activations", progress)
    finally:
        for handle in handles:
            handle.remove()
    unused = next((name for name, parts in found.items() if not sum(map(len, parts))), None)
    if unused is not None:
        raise CalibrationError(f"{unused} never ran on the calibration data; give data that use it")
    return {name: torch.cat(parts) for name, parts in found.items()}
