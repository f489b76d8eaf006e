"""Attention of any Hugging Face model, taken over by a function of ours and given back.

Models compute attention through a function that they look up by name in transformers' ``AttentionInterface``. A model
is taken over by giving it another name, under which our function stands; no code of any model is copied or replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gossamer.errors import ConfigurationError, ModelError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one layer's attention is called with.

    Attributes
    ----------
    layer
        Index of the layer; None for none in particular.
    query
        ``(batch, heads, queries, size)``, with rotary positions applied where the model has them.
    key, value
        ``(batch, key heads, keys, size)``, the cache included; heads are a multiple of key heads.
    scale
        What scores are multiplied by.
    causal
        Whether query i reads only keys j ≤ i + keys − queries.
    window
        How many keys up to its own a query reads at most; None for all.
    key_mask
        Bool ``(batch, keys)``, False at padding; None if there is none.
    module
        The attention module of the model, if there is one.
    """

    layer: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool = True
    window: int | None = None
    key_mask: Tensor | None = None
    module: nn.Module | None = None

    @property
    def place(self) -> str:
        """What messages call the layer."""
        return "attention" if self.layer is None else f"layer {self.layer}"

    @property
    def phase(self) -> Phase:
        """``decode`` for a single query of a causal model, else ``prefill``."""
        return "decode" if self.causal and self.query.shape[2] == 1 else "prefill"

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def slides(self) -> bool:
        """Whether the window is shorter than what there is to read."""
        return self.window is not None and self.window < self.key.shape[2]

    def links(self) -> Tensor | None:
        """Which keys each query may read, bool ``(batch or 1, 1, queries, keys)``; None for all."""
        return _links(
            self.query.shape[2], self.key.shape[2], self.causal, self.window, self.key_mask, self.query.device
        )

    def dense(self) -> Tensor:
        """Attention over everything that is allowed, by torch: ``(batch, heads, queries, value size)``.

        Queries without a key, which are padding, get zeros.
        """
        square = self.query.shape[2] == self.key.shape[2]
        plain = self.causal and square and not self.slides and self.key_mask is None
        links = None if plain else self.links()
        found = nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, links, is_causal=plain, scale=self.scale, enable_gqa=self.group > 1
        )
        if self.key_mask is None or links is None:
            return found
        return torch.where(links.any(-1, keepdim=True), found, 0)


class AttentionSite:
    """A model whose attention is computed by a function, from the moment this is made until :meth:`remove`.

    Parameters
    ----------
    model
        A Hugging Face model, or any module that holds some.
    attend
        Gets every call, and returns ``(batch, heads, queries, value size)`` or None for dense attention.
    masked
        Is told of calls whose mask is more than causality and padding, which stay dense: the call without its mask, and
        the mask.

    Raises
    ------
    ModelError
        If the model does not look its attention up by name, or is taken over already.
    """

    def __init__(
        self,
        model: nn.Module,
        attend: Callable[[AttentionCall], Tensor | None],
        masked: Callable[[AttentionCall, Tensor], None] | None = None,
    ):
        self._configs = _configurations(model)
        if any(config._attn_implementation == _NAME for config, _ in self._configs):
            raise ModelError("another attention method is at work in this model; call its remove() first")
        self.attend, self.masked = attend, masked
        self._parsed: Any = WeakTensorKeyDictionary()
        self._layers: dict[int, int] = {}
        _register()
        for config, _ in self._configs:
            config._attn_implementation_internal = _NAME
        for module in model.modules():
            _SITES[module] = self

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        for config, earlier in self._configs:
            config._attn_implementation_internal = earlier
        self._configs = []
        for module in [module for module, site in _SITES.items() if site is self]:
            del _SITES[module]

    def layer(self, module: nn.Module) -> int:
        """Index of an attention module: what it says itself, or the order in which modules are first called."""
        index = getattr(module, "layer_idx", None)
        return index if isinstance(index, int) else self._layers.setdefault(id(module), len(self._layers))

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        window: int | None,
        causal: bool | None,
    ) -> AttentionCall | None:
        """What the model asks for; None if it is a mask that only dense attention can follow, which is told."""
        causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
        if causal and mask is None and 1 < query.shape[2] < key.shape[2]:
            # the empty rest of a cache of fixed size
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        call = AttentionCall(
            self.layer(module), query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, causal, window
        )
        call = replace(call, module=module)
        if mask is None:
            return call
        parsed = self._parse(mask, query.shape[2], causal, window)
        if parsed is None:
            if self.masked is not None:
                self.masked(call, mask)
            return None
        real, length = parsed
        if real is not None:
            real = real.expand(len(query), -1).contiguous()
        return replace(call, key=key[:, :, :length], value=value[:, :, :length], key_mask=real)

    def _parse(self, mask: Tensor, *about: Any) -> tuple[Tensor | None, int] | None:
        """As :func:`parse_mask`, once for all layers that ask the same, until the mask is written to."""
        parsed = self._parsed.get(mask)
        if parsed is None or not parsed.holds(mask):
            parsed = self._parsed[mask] = _Parsed(mask)
        if about not in parsed.found:
            parsed.found[about] = parse_mask(mask, *about)
        return parsed.found[about]


class _Parsed:
    """What a mask says to calls of each kind, and by what it is seen that this still holds."""

    def __init__(self, mask: Tensor):
        # tensors of inference mode have no version
        self.state = mask.clone() if mask.is_inference() else mask._version
        self.found: dict[tuple[Any, ...], tuple[Tensor | None, int] | None] = {}

    def holds(self, mask: Tensor) -> bool:
        """Whether the mask was not written to since."""
        return torch.equal(mask, self.state) if isinstance(self.state, Tensor) else mask._version == self.state


_NAME = "gossamer"
_COMPARED = 1 << 24  # links that are looked at together
_SITES: weakref.WeakKeyDictionary[nn.Module, AttentionSite] = weakref.WeakKeyDictionary()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; the result is ``(batch, queries, heads, value size)``."""
    site = _SITES.get(module)
    if site is None:
        raise ModelError(
            f"a {type(module).__name__} computes attention under the name {_NAME!r} but no method is at work in it; "
            "call model.set_attn_implementation('sdpa')"
        )
    if dropout > 0:
        raise ModelError(f"attention dropout is {dropout}; sparse attention has none: set it to 0 in the configuration")
    for unknown in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise ModelError(f"{type(module).__name__} asks for {unknown}, which sparse attention does not know")
    query, key, value = as_autocast(query, key, value)
    call = site.read(module, query, key, value, attention_mask, scaling, sliding_window, is_causal)
    found = site.attend(call) if call is not None else None
    if found is not None:
        return found.transpose(1, 2).contiguous(), None
    if call is not None:
        return call.dense().transpose(1, 2).contiguous(), None
    # a cache may hold its keys in the host's memory
    dense = nn.functional.scaled_dot_product_attention(
        query,
        key.to(query.device),
        value.to(query.device),
        attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return dense.transpose(1, 2).contiguous(), None


def as_autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype of autocast where it is at work, as torch's own attention takes them; float64 stays."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    dtype = torch.get_autocast_dtype(kind)
    # what lies elsewhere is a cache in the host's memory, of which only a part will be read
    mine = [part.device.type == kind and part.dtype != torch.float64 for part in parts]
    return tuple(part.to(dtype) if cast else part for part, cast in zip(parts, mine))


def _configurations(model: nn.Module) -> list[tuple[Any, str]]:
    """Configurations of all models within, with the names of their attention."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        found: list[Any] = []
    else:
        found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} is not a Hugging Face model; call the method itself in place of "
            "scaled_dot_product_attention"
        )
    for module in found:
        if not module._can_set_attn_implementation():
            raise ModelError(
                f"{type(module).__name__} does not look its attention up by name, so it cannot be replaced"
            )
    configs = {id(module.config): module.config for module in found}
    return [(config, config._attn_implementation) for config in configs.values()]


def _links(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    real: Tensor | None,
    device: torch.device,
    rows: slice = slice(None),
) -> Tensor | None:
    """Links of some rows of queries; None if all of them read everything."""
    if not causal and window is not None:
        raise ConfigurationError("a window is for causal attention; leave it out")
    links = None
    if causal and (queries > 1 or (window is not None and window < keys)):
        place = torch.arange(queries, device=device)[rows, None] + (keys - queries)
        key = torch.arange(keys, device=device)
        links = key <= place
        if window is not None:
            links &= key > place - window
        links = links[None, None]
    if real is not None:
        padding = real[:, None, None, :]
        links = padding if links is None else links & padding
    return links


def parse_mask(mask: Tensor, queries: int, causal: bool, window: int | None) -> tuple[Tensor | None, int] | None:
    """What a mask of torch's attention says, if it is no more than causality and padding.

    Parameters
    ----------
    mask
        ``(batch or 1, 1, queries or 1, keys)``, of truths, or added to scores.
    queries
        How many there are.
    causal, window
        What is known beforehand; see :class:`AttentionCall`.

    Returns
    -------
    (Tensor or None, int) or None
        Which keys are real, bool ``(batch or 1, keys)``, None for all; and the number of keys, without those at the end
        that no query reads. None if the mask is more than that.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or (causal and queries > mask.shape[3]):
        return None
    if mask.is_floating_point() and not bool(((mask == 0) | ~allowed_links(mask)).all()):
        return None  # it biases scores
    step = max(1, _COMPARED // max(1, mask[:, :, :1].numel()))
    parts = [slice(first, first + step) for first in range(0, mask.shape[2], step)]
    real = torch.zeros(mask.shape[0], mask.shape[3], dtype=torch.bool, device=mask.device)
    for rows in parts:
        real |= allowed_links(mask[:, 0, rows]).any(1)
    anyone = real.any(0).nonzero()
    # a batch may be padded beyond its longest sequence, and its padding asks, too
    length = max(int(anyone[-1]) + 1 if len(anyone) else 0, min(queries, mask.shape[3]))
    real = real[:, :length]
    for rows in parts:
        expected = _links(queries, length, causal, window if causal else None, real, mask.device, rows)
        if not bool((allowed_links(mask[:, :, rows, :length]) == expected).all()):
            return None
    whole = bool(real.all()) or (window is not None and not bool(_padding(real, queries, window).any()))
    return (None if whole else real), length


def allowed_links(mask: Tensor) -> Tensor:
    """Links that a mask allows, whether it is of truths or of what is added to scores."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


def _padding(real: Tensor, queries: int, window: int) -> Tensor:
    """Keys that are not real although some query's window reaches them."""
    first = max(real.shape[1] - queries - window + 1, 0)
    return ~real[:, first:]
