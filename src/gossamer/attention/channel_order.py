"""Which channels of queries and keys decide their scores: found once on a little text, and kept in a small file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.attention.base import named_layer
from gossamer.core.progress import track
from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, CheckpointError, NonFiniteError, UnknownNameError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.blocks import Batch, run_batch
from gossamer.storage.atomic import PathLike, atomic_file

Importance = Literal["qk", "q", "k", "pairs", "variance"]
Scope = Literal["group", "head"]

FORMAT = "gossamer-channel-order"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """The channels of every head, the most important first.

    Attributes
    ----------
    layers
        Layer → int64 ``(key heads or heads, size)``.
    importance
        By what they are sorted.
    tokens
        How many tokens were seen.
    """

    layers: dict[int, Tensor]
    importance: str = "qk"
    tokens: int = 0

    def first(self, layer: int | None, count: int, heads: int, device: torch.device) -> Tensor:
        """The most important channels of a layer, ``(key heads or heads, count)``.

        Raises
        ------
        ConfigurationError
            If no layer is named.
        CalibrationError
            If the layer was not seen, or the order is for fewer heads or channels.
        """
        order = self.layers.get(named_layer(layer, self.layers))
        if order is None or heads % len(order) or order.shape[1] < count:
            found = "no order" if order is None else f"an order of {tuple(order.shape)}"
            raise CalibrationError(
                f"layer {layer} has {heads} heads and needs {count} channels, but {found} was found; calibrate on this "
                "model"
            )
        return order[:, :count].to(device)

    def agreement(self, other: ChannelOrder) -> float:
        """Spearman's correlation of the ranks of channels in two orders, averaged over heads and layers.

        Raises
        ------
        CalibrationError
            If they are for different layers, heads or sizes.
        """
        shapes = {layer: order.shape for layer, order in self.layers.items()}
        if shapes != {layer: order.shape for layer, order in other.layers.items()}:
            raise CalibrationError("the orders are for different layers, heads or head sizes; compare like with like")
        found = []
        for layer, order in self.layers.items():
            gap = (order.argsort(1) - other.layers[layer].argsort(1)).double()
            size = order.shape[1]
            found.append(1 - 6 * gap.square().sum(1) / (size * (size**2 - 1)))
        return float(torch.cat(found).mean())

    def save(self, path: PathLike) -> None:
        """Write the order atomically, as safetensors with a checksum; an existing file is replaced.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        state = {f"layer.{layer}": order.to(torch.int16).cpu().contiguous() for layer, order in self.layers.items()}
        said = {"format": FORMAT, "version": VERSION, "importance": self.importance, "tokens": str(self.tokens)}
        with atomic_file(path, needed=sum(2 * order.numel() for order in state.values())) as part:
            save_file(state, part, metadata={**said, "sha256": _digest(state)})

    @classmethod
    def load(cls, path: PathLike) -> ChannelOrder:
        """Read an order and check its checksum.

        Raises
        ------
        CheckpointError
            If the file is missing, truncated, altered, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as an order of channels ({error}); calibrate again") from None
        if said.get("format") != FORMAT or said.get("version") != VERSION:
            raise CheckpointError(f"{path} is no order of channels of version {VERSION}; calibrate again")
        if said.get("sha256") != _digest(state):
            raise CheckpointError(f"{path} was altered or damaged (its checksum differs); calibrate again")
        layers = {int(key.removeprefix("layer.")): order.long() for key, order in state.items()}
        return cls(dict(sorted(layers.items())), said["importance"], int(said["tokens"]))


@dataclass
class _Sums:
    """What one layer's statistics are made of; each ``(heads, size)`` float64."""

    tokens: int = 0
    pairs: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, call: AttentionCall, importance: Importance) -> None:
        """Take in one call; padding does not count."""
        query = call.query.double()
        key = call.key.double().repeat_interleave(call.group, 1)[:, :, -query.shape[2] :]
        if call.key_mask is not None:
            real = call.key_mask[:, None, -query.shape[2] :, None]
            query, key = query * real, key * real
            tokens = call.key_mask[:, -query.shape[2] :].sum(1)
        else:
            tokens = torch.full((len(query),), query.shape[2], device=query.device)
        self.tokens += int(tokens.sum())
        self.pairs += int((tokens * (tokens + 1) // 2).sum())
        if importance == "qk":
            self.add("qk", (query * key).abs().sum((0, 2)))
        elif importance == "q":
            self.add("q", query.abs().sum((0, 2)))
        elif importance == "k":
            self.add("k", key.abs().sum((0, 2)))
        elif importance == "pairs":
            self.add("pairs", (query.abs() * key.abs().cumsum(2)).sum((0, 2)))
        else:
            self.add("score", (query * key.cumsum(2)).sum((0, 2)))
            self.add("square", (query.square() * key.square().cumsum(2)).sum((0, 2)))

    def importance(self, importance: Importance) -> Tensor:
        """``(heads, size)``."""
        if importance == "variance":
            return self.sums["square"] / self.pairs - (self.sums["score"] / self.pairs).square()
        return self.sums[importance] / (self.pairs if importance == "pairs" else self.tokens)


def check_names(importance: str, scope: str) -> None:
    """Refuse an importance or a scope that :func:`calibrate_channels` does not know.

    Raises
    ------
    UnknownNameError
        If there is no such importance or scope.
    """
    for name, value, known in (("importance", importance, Importance), ("scope", scope, Scope)):
        if value not in get_args(known):
            raise UnknownNameError(name, value, get_args(known))


@torch.no_grad()
def calibrate_channels(
    model: nn.Module,
    data: Iterable[Batch],
    importance: Importance = "qk",
    scope: Scope = "group",
    progress: bool = True,
) -> ChannelOrder:
    """Sort the channels of every head by how much they matter to its scores, on calibration text.

    Yang et al., 2024, "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092, section 3: queries and
    keys are taken behind the rotary positions, where the channels that matter are the same from text to text.

    Parameters
    ----------
    model
        A Hugging Face model.
    data
        Batches of token ids, or of keyword arguments; the authors took 256 windows of 512 tokens.
    importance
        ``qk``: mean over tokens of ``|q_c k_c|``, each token with itself. ``q``, ``k``: mean magnitude of one side.
        ``pairs``: mean of ``|q_c k_c|`` over all pairs that causality allows. ``variance``: of ``q_c k_c`` over them.
    scope
        ``group``: one order for the heads that share keys, by the sum over them. ``head``: one for each head.
    progress
        Whether to show a bar.

    Raises
    ------
    UnknownNameError
        If there is no such importance or scope.
    CalibrationError
        If there is no data.
    NonFiniteError
        If queries or keys are NaN or infinite.
    ModelError
        If the model's attention cannot be listened to.
    """
    check_names(importance, scope)
    found: dict[int, _Sums] = {}
    groups: dict[int, int] = {}

    def listen(call: AttentionCall) -> None:
        groups[call.layer] = call.group
        found.setdefault(call.layer, _Sums()).update(call, importance)

    site = AttentionSite(model, listen)
    try:
        with evaluation_mode(model):
            for batch in track(list(data), "calibrating channels", enabled=progress):
                run_batch(model, batch, logits=False)
    finally:
        site.remove()
    if not found:
        raise CalibrationError("the calibration data is empty: at least one batch of token ids is needed")
    layers = {}
    for layer, sums in sorted(found.items()):
        values = sums.importance(importance)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"queries or keys of layer {layer} hold NaN or infinity; evaluate in float32")
        values = values.unflatten(0, (-1, groups[layer])).sum(1) if scope == "group" else values
        layers[layer] = values.argsort(dim=1, descending=True, stable=True).clone().cpu()
    return ChannelOrder(layers, importance, next(iter(found.values())).tokens)


def random_order(like: ChannelOrder, seed: int = 0) -> ChannelOrder:
    """An order of the same shape without any reason, to compare with."""
    generator = generator_for("random channels", seed)
    draw = lambda size: torch.randperm(size, generator=generator)  # noqa: E731
    layers = {n: torch.stack([draw(order.shape[1]) for _ in order]) for n, order in like.layers.items()}
    return ChannelOrder(layers, "random")


def first_channels(like: ChannelOrder) -> ChannelOrder:
    """The channels as they are numbered, to compare with."""
    layers = {n: torch.arange(order.shape[1]).expand_as(order).contiguous() for n, order in like.layers.items()}
    return ChannelOrder(layers, "first")


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over names in order and the bytes of their tensors."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + b"\0" + state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()
