"""A training step of a GPT of 40 million weights whose feed-forward layers are 90% zero, and what training holds.

Five models of the same shape take turns on the same batch: dense; the same under masks of one bit a weight; the same
with the layers that :func:`gossamer.training.layer_choice.sparsify_layers` chose to store without zeros; and, where it
is installed, SparseLab's. All with AdamW in float32.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main, paired
from gossamer.core.masks import MaskSet
from gossamer.measure import Timing, interleave
from gossamer.measure.training_memory import training_memory
from gossamer.storage import save
from gossamer.training.layer_choice import first_masks, sparsify_layers
from gossamer.training.sparse_layers import SparseLinear
from gossamer.training.static import Static

SPARSITY = 0.9
FEED_FORWARD = ("*.up", "*.down")


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of the same."""
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class ByteModel(nn.Module):
    """A GPT over bytes."""

    def __init__(self, width: int, depth: int, heads: int, length: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(batch, length, 256)``."""
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def measure(options: Options) -> list[Row]:
    """Times of steps, then bytes."""
    width, depth, heads, length, batch = (64, 1, 2, 32, 2) if options.quick else (640, 8, 10, 128, 8)
    torch.manual_seed(0)
    dense = ByteModel(width, depth, heads, length)
    tokens = torch.randint(0, 256, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    masks = first_masks(_static(), dense)
    ours = copy.deepcopy(dense)
    chosen = sparsify_layers(ours, masks, batch * length)
    steps = {
        "dense": _step(copy.deepcopy(dense), tokens),
        "masked": _step(copy.deepcopy(dense), tokens, _static()),
        "ours": _step(ours, tokens, _static()),
    }
    if find_spec("sparselab"):
        steps["sparselab"] = _step(_sparselab(copy.deepcopy(dense)), tokens)
    timings = interleave(steps, repeats=2 if options.quick else 7)
    weights = sum(parameter.numel() for parameter in dense.parameters()) / 1e6
    case = f"GPT, {weights:.1f} M weights, {batch} × {length} bytes, feed-forward {SPARSITY:.0%} zero, AdamW"
    note = f"{sum(row.sparse for row in chosen)} of {len(chosen)} layers stored without zeros"
    found = [paired("training step", case, timings["ours"], "dense torch", timings["dense"], 1.3, note=note)]
    if "sparselab" in timings:
        found.append(paired("training step", case, timings["ours"], "SparseLab", timings["sparselab"], 1.3, note=note))
    found.append(paired("masked training step", case, timings["masked"], "dense torch", timings["dense"], 1 / 1.02))
    return [*found, _memory(256 if options.quick else 2560), _checkpoint(dense, masks)]


def _static() -> Static:
    return Static(sparsity=SPARSITY, include=FEED_FORWARD, allocation="uniform")


def _step(model: nn.Module, tokens: Tensor, method: Static | None = None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if method is not None:
        method.attach(model, optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def _sparselab(model: ByteModel) -> nn.Module:
    """The same model with SparseLab's layers, of the same sparsity."""
    import sparselab

    for block in model.blocks:
        for name in ("up", "down"):
            layer = getattr(block, name)
            setattr(block, name, sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=SPARSITY))
    return model


def _memory(width: int) -> Row:
    """Everything that training of one layer with 95% zeros keeps, beside a dense one, counted after a step of Adam."""
    dense = nn.Linear(width // 4, width)
    mask = torch.rand(dense.weight.shape, generator=torch.Generator().manual_seed(0)) >= 0.95
    held = []
    for layer in (SparseLinear.from_dense(dense, mask), dense):
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.ones(2, width // 4)).sum().backward()
        optimizer.step()
        held.append(training_memory(layer, optimizer).total)
    case = f"{width} × {width // 4}, 95% zero: values, gradients, Adam and indices"
    return _bytes("training memory", case, held[0], "dense Adam", held[1], 1 / 0.15)


def _checkpoint(dense: ByteModel, masks: MaskSet) -> Row:
    """Feed-forward layers alone, in float32, as :func:`gossamer.save` writes them."""
    layers = nn.ModuleDict({name.replace(".", "_"): copy.deepcopy(dense.get_submodule(name)) for name in _names(masks)})
    whole = sum(tensor.numel() * tensor.element_size() for tensor in layers.state_dict().values())
    MaskSet({f"{name.replace('.', '_')}.weight": masks[f"{name}.weight"] for name in _names(masks)}).apply_(layers)
    with tempfile.TemporaryDirectory() as folder:
        save(layers, Path(folder) / "model")
        written = sum(file.stat().st_size for file in (Path(folder) / "model").iterdir())
    return _bytes("checkpoint", f"feed-forward layers, {SPARSITY:.0%} zero, float32", written, "dense", whole, 1 / 0.14)


def _names(masks: MaskSet) -> list[str]:
    return [name.removesuffix(".weight") for name in masks]


def _bytes(operation: str, case: str, ours: float, peer: str, theirs: float, bar: float) -> Row:
    row = paired(operation, case, Timing.of([float(ours)]), peer, Timing.of([float(theirs)]), bar)
    return Row(**{**row.__dict__, "unit": "B"})


if __name__ == "__main__":
    main(measure)
