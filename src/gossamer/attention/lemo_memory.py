"""What combines with token sparsity: channels left out of the feed-forward layers too, and activations kept elsewhere.

Both become cheaper with every token that a layer leaves out: fewer rows to compute channels for, fewer bytes to carry
away and to bring back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.attention.token_sparse_layers import decoder_stack
from gossamer.errors import ConfigurationError, ModelError, UnknownNameError
from gossamer.models.offload import spilled

Place = Literal["mapped", "host", "pinned"]


@dataclass(frozen=True, eq=False)
class _Away:
    """A tensor that was carried away."""

    stored: Tensor
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    def back(self) -> Tensor:
        return self.stored.view(self.dtype).view(self.shape).to(self.device, non_blocking=True)


@contextmanager
def offloaded_activations(
    model: nn.Module, place: Place = "mapped", minimum: int = 1 << 16, folder: str | Path | None = None
) -> Iterator[dict[str, int]]:
    """Keep what the backward pass needs in a file or in the host's memory until it is needed.

    Tokens that a layer leaves out are not stored, and so not carried either.

    Parameters
    ----------
    model
        Whose parameters and buffers stay where they are.
    place
        ``mapped``: files without a name, which go when the graph does. ``host``: the CPU's memory, for models on a
        GPU; ``pinned`` there.
    minimum
        Bytes from which a tensor is carried away.
    folder
        On the disk to use; by default the one for temporary files.

    Yields
    ------
    dict
        ``bytes`` and ``tensors`` that were carried away so far. A tensor that is saved twice is carried twice.

    Raises
    ------
    UnknownNameError
        If there is no such place.
    """
    if place not in get_args(Place):
        raise UnknownNameError("place", place, get_args(Place))
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    counts = {"bytes": 0, "tensors": 0}

    def pack(tensor: Tensor) -> Tensor | _Away:
        size = tensor.numel() * tensor.element_size()
        if size < minimum or tensor.untyped_storage().data_ptr() in there:
            return tensor
        counts["bytes"] += size
        counts["tensors"] += 1
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        if place == "mapped":
            stored = spilled({"": raw}, folder)[""]
        else:
            stored = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=place == "pinned").copy_(raw)
        return _Away(stored, tensor.dtype, tensor.shape, tensor.device)

    def unpack(packed: Tensor | _Away) -> Tensor:
        return packed.back() if isinstance(packed, _Away) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield counts


@contextmanager
def channel_sparsity(model: Any, share: float = 0.5, every: int = 16) -> Iterator[dict[int, Tensor]]:
    """Leave channels of the feed-forward layers out as well: two dimensions of sparsity, tokens and channels.

    Of the tokens that enter a layer every sixteenth is computed in full first; the channels that are largest there,
    on average and times the length of what they write, are computed and stored for all. Acts in training mode only;
    LoRA on these layers is cut in the same way.

    Parameters
    ----------
    model
        A decoder of Hugging Face, wrapped by PEFT or not.
    share
        Of the channels that are kept, in (0, 1].
    every
        Distance of the tokens that choose.

    Yields
    ------
    dict
        Layer → the channels of its last call.

    Raises
    ------
    ConfigurationError
        If the share is outside (0, 1], or the distance below 1.
    ModelError
        If layers have no feed-forward layer that can be told by its width.
    """
    if not 0 < share <= 1 or every < 1:
        raise ConfigurationError(f"share is {share} and every {every}; a share in (0, 1] and 1 or more are needed")
    chosen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(decoder_stack(model).blocks.values()):
            module, width = _feed_forward(model, layer)
            cut = _Cut(module, width, max(1, round(share * width)), every, chosen, number)
            stack.enter_context(_called(module, cut))
        yield chosen


class _Cut:
    """A feed-forward layer that is called with some of its channels."""

    def __init__(self, module: nn.Module, width: int, count: int, every: int, chosen: dict[int, Tensor], number: int):
        self.module, self.width, self.count, self.every = module, width, count, every
        self.chosen, self.number = chosen, number
        self.forward = module.forward
        self.narrow = next(m for m in module.modules() if isinstance(m, nn.Linear) and m.in_features == width)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.module.training or self.count == self.width:
            return self.forward(hidden, *args, **kwargs)
        channels = self._choose(hidden)
        self.chosen[self.number] = channels
        some = {name: self._part(value, channels) for name, value in self.module.named_parameters()}
        before = self.module.forward
        self.module.forward = self.forward
        try:
            return functional_call(self.module, some, (hidden, *args), kwargs)
        finally:
            self.module.forward = before

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self.narrow.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.forward(hidden[:, :: self.every])
        finally:
            handle.remove()
        strength = seen[0].abs().float().mean((0, 1)) * self.narrow.weight.float().norm(dim=0)
        return strength.topk(self.count).indices.sort().values

    def _part(self, value: Tensor, channels: Tensor) -> Tensor:
        if value.shape[0] == self.width:
            return value.index_select(0, channels)
        return value.index_select(1, channels) if value.dim() == 2 and value.shape[1] == self.width else value


def _feed_forward(model: Any, layer: nn.Module) -> tuple[nn.Module, int]:
    """The child of a layer that widens the hidden states, and how wide."""
    config = model.config.get_text_config()
    width = int(getattr(config, "intermediate_size", None) or 0)
    found = [child for child in layer.children() if any(width in p.shape for p in child.parameters())]
    if len(found) != 1 or width == config.hidden_size:
        raise ModelError(
            f"{type(layer).__name__} has no feed-forward layer that its width, {width}, tells from the rest; leave "
            "channel sparsity out"
        )
    return found[0], width


@contextmanager
def _called(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
