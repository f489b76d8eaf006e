"""Operations of reading a prompt and of decoding, when tokens and neurons are dropped on the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.measure.weights_read import weights_read
from gossamer.models.activation_sites import find_input_sites

_FEED_FORWARD = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class GenerationFlops:
    """Operations of one generation; a multiplication with its addition counts as two.

    Attributes
    ----------
    prefill
        Of reading the prompt, up to the first new token.
    decode
        Of all the steps after it.
    """

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Both."""
        return self.prefill + self.decode


def generation_flops(
    model: nn.Module,
    prompt: int,
    new: int,
    kept: int | None = None,
    layer: int | None = None,
    neurons: float = 1.0,
    own: range | None = None,
) -> GenerationFlops:
    """Operations of a decoder's matrices, of its attention over the cache, and of its head.

    Parameters
    ----------
    model
        A decoder, of which every block has attention and a feed-forward layer.
    prompt, new
        Tokens of the prompt, and steps of decoding after the first new token.
    kept
        Tokens of the prompt that blocks behind `layer`, and the cache while decoding, hold; None for all.
    layer
        The last block that sees all tokens; None for all blocks.
    neurons
        Share of the feed-forward neurons with which tokens are decoded.
    own
        Blocks whose caches alone are thinned out to `kept` tokens, after all blocks have seen the whole prompt; None
        if tokens leave behind `layer` and all caches lose them.

    Raises
    ------
    ConfigurationError
        If more is kept than there is, or a number is negative.
    """
    kept = prompt if kept is None else kept
    if not 0 < kept <= prompt or new < 0 or not 0 < neurons <= 1:
        raise ConfigurationError(
            f"kept is {kept} of {prompt} tokens, new is {new}, neurons is {neurons}; give 0 < kept ≤ prompt, new ≥ 0 "
            f"and neurons in (0, 1]"
        )
    blocks: dict[str, list[int]] = {}
    for site in find_input_sites(model):
        sizes = blocks.setdefault(site.block, [0, 0, 0])
        sizes[1 if site.role in _FEED_FORWARD else 0] += site.size
        if site.role == "o":
            sizes[2] = site.width
    inside = sum(attention + forward for attention, forward, _ in blocks.values())
    head = weights_read(model, {}).total - inside
    prefill, decode = 2 * head, 2 * head * new
    for number, (attention, forward, width) in enumerate(blocks.values()):
        tokens = prompt if own is not None or layer is None or number <= layer else kept
        held = kept if own is None or number in own else prompt
        prefill += 2 * (attention + forward) * tokens + 4 * width * (tokens * (tokens + 1) // 2)
        decode += 2 * (attention + round(neurons * forward)) * new
        decode += 4 * width * sum(held + step for step in range(1, new + 1))
    return GenerationFlops(prefill, decode)
