"""CoreMatching: drop the tokens that do not use a prompt's neurons, and the neurons that its tokens do not use.

Neurons that most tokens of a prompt activate are enough to decode with, and tokens whose neurons overlap these most
are enough to keep. So each picks the other: at an early layer of the prompt the other image tokens leave the model and
its cache, and afterwards the feed-forward layers shrink to the core neurons. The authors' released code lets the prompt
be read in full instead, and has each layer of a range pick what its own cache keeps; both are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.activations.core_sets import CoreNeurons, CoreTokens
from gossamer.activations.greedy_text import GreedyText, check_greedy, prompt_inputs, run_generate
from gossamer.activations.text_positions import check_positions, noting_positions, position_shift
from gossamer.activations.thinned_calls import behind, on_hidden, on_inputs, restored, thinned
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import accepted, find_stacks
from gossamer.models.feedforward import FeedForward
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.key_value_cache import empty_cache, keep_positions, rewritable
from gossamer.models.sliced_feedforward import SlicedFeedForward, slice_gated_ffn

Droppable = slice | Tensor | int
Schedule = Literal["drop", "cache"]


@dataclass
class CorePrompt:
    """A prompt that has been read, thinned out.

    Attributes
    ----------
    cache
        Keys and values of the tokens that stayed, and of those that came since.
    length
        Tokens of the prompt; new ones go on from this position, moved by `shift`.
    kept
        Those that stayed, ``(n,)`` int64.
    own
        Layers whose caches chose for themselves, and the tokens that each kept; empty under ``drop``.
    logits
        After the last token, ``(vocabulary,)``.
    neurons
        A cut for each layer; empty if neurons are not pruned.
    added
        Tokens that came since.
    shift
        What positions differ from counts of tokens by, ``(…, 1, 1)``, where images take fewer of them; 0 elsewhere.
    """

    cache: Any
    length: int
    kept: Tensor
    logits: Tensor
    neurons: list[SlicedFeedForward] = field(repr=False)
    added: int = 0
    own: dict[int, Tensor] = field(default_factory=dict)
    shift: Tensor | int = 0


class CoreMatchingGenerator:
    """Generation with core tokens and core neurons; see :class:`CoreMatching`, whose ``install`` makes it.

    Parameters
    ----------
    model
        A causal language model of transformers, with or without vision.
    settings
        What is kept.
    image_slice
        The tokens that may be dropped: a slice of the prompt, the id that stands for image tokens, or a mask. Here the
        default for all prompts, and in :meth:`generate` for one.

    Raises
    ------
    ModelError
        If the model has no blocks, a block without a feed-forward layer, or positions that cannot be told (ALiBi).
    ConfigurationError
        If the model has no such layer, or sliding windows, whose cache cannot be thinned out.
    """

    def __init__(self, model: nn.Module, settings: CoreMatching, image_slice: Droppable | None = None):
        self.model, self.settings, self.image_slice = model, settings, image_slice
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
        stacks = find_stacks(decoder)
        if not stacks:
            raise ModelError(f"{type(model).__name__} has no stack of blocks; tokens are dropped between blocks")
        check_positions(model, "CoreMatching")
        empty_cache(model)  # raises if it could not be thinned out
        self.blocks = list(stacks[-1].blocks.values())
        by_block = {layer.block: layer for layer in find_feed_forwards(decoder)}
        missing = next((name for name in stacks[-1].blocks if name not in by_block), None)
        if missing is not None:
            raise ModelError(
                f"block {missing!r} has no feed-forward layer, so its tokens and neurons cannot be matched"
            )
        self.layers: list[FeedForward] = [by_block[name] for name in stacks[-1].blocks]
        count = len(self.blocks)
        self.layer = count // 5 if settings.layer is None else settings.layer
        first = 5 * count // 32
        middle = range(first, max(first + 1, 19 * count // 32))
        own = middle if settings.layers is None else settings.layers
        self.own_caches = own if settings.schedule == "cache" else range(0)
        for number in (self.layer, *self.own_caches):
            if not 0 <= number < count:
                raise ConfigurationError(f"layer is {number}; the model has layers 0 to {count - 1}")
        self.prompt: CorePrompt | None = None

    def generate(self, image_slice: Droppable | None = None, **inputs: Any) -> Tensor:
        """Continue a prompt greedily, ``(1, tokens)``; arguments as of transformers' ``generate``.

        Raises
        ------
        ConfigurationError
            For more than one sequence, sampling, beams, or a cache that cannot be thinned out.
        CalibrationError
            If there is nothing that may be dropped.
        """
        before = self.image_slice
        self.image_slice = before if image_slice is None else image_slice
        try:
            return run_generate(self.model, self.loop, inputs)
        finally:
            self.image_slice = before

    def loop(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The decoding loop, for ``model.generate(…, custom_generate=generator.loop)``, which hands no streamer on."""
        check_greedy(input_ids, generation_config, "CoreMatching")
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if rewritable(cache).get_seq_length():
            raise ConfigurationError("the cache holds tokens already; a prompt is thinned out from its beginning")
        inputs = prompt_inputs(input_ids, model_kwargs, 0)
        droppable = self.droppable(input_ids)
        if inputs["input_ids"].shape[1] < input_ids.shape[1]:
            droppable = droppable[mask[0].bool().cpu()]  # type: ignore[index]
        max_length = getattr(generation_config, "max_length", None) or input_ids.shape[1] + 20
        text = GreedyText(input_ids, logits_processor, stopping_criteria, max_length, streamer)
        self.prompt = self.read(droppable=droppable, cache=cache, **inputs)
        logits = self.prompt.logits
        with self.sparse(self.prompt):
            while not text.append([token := int(text.scores(logits, []).argmax())]):
                logits = self.extend(self.prompt, torch.tensor([[token]], device=input_ids.device))[-1]
        return text.ids

    def droppable(self, input_ids: Tensor) -> Tensor:
        """Which tokens of a prompt ``(1, tokens)`` may be dropped, ``(tokens,)`` bool."""
        where = self.image_slice
        marks = torch.zeros(input_ids.shape[1], dtype=torch.bool)
        if isinstance(where, Tensor):
            if where.numel() != len(marks):
                raise ConfigurationError(f"image_slice marks {where.numel()} tokens of a prompt of {len(marks)}")
            marks = where.flatten().bool().cpu()
        elif isinstance(where, slice):
            marks[where] = True
        elif where is not None:
            marks = (input_ids[0] == where).cpu()
        if not marks.any():
            raise CalibrationError(f"image_slice is {where!r}: no token of the prompt may be dropped; say which may be")
        return marks

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        droppable: Tensor,
        kept: Tensor | None = None,
        cache: Any = None,
        neurons: bool | None = None,
        **model_inputs: Any,
    ) -> CorePrompt:
        """Read a prompt and thin it out.

        Parameters
        ----------
        input_ids
            ``(1, tokens)``.
        droppable
            ``(tokens,)`` bool.
        kept
            The tokens to keep, where something else than the core tokens is to be tried; the last must be among them.
        cache
            An empty one; by default a new one.
        neurons
            Whether to find core neurons; by default as the settings say.
        **model_inputs
            What else the model needs for the prompt, such as pixels.
        """
        length = input_ids.shape[1]
        cache = empty_cache(self.model) if cache is None else rewritable(cache)
        wanted = self.settings.prune_neurons if neurons is None else neurons
        chosen: dict[int, Tensor] = {}
        choosing = self._choosing(length, droppable, kept, chosen, wanted)
        with evaluation_mode(self.model), noting_positions(self.model) as seen, choosing as stays:
            options = accepted(self.model, logits_to_keep=1)
            output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options, **model_inputs)
        cuts = [slice_gated_ffn(self.layers[i], index) for i, index in sorted(chosen.items())]
        shift = position_shift(seen, length)
        prompt = CorePrompt(cache, length, torch.arange(length), output.logits[0, -1], cuts)
        prompt.shift = 0 if shift is None else shift
        if self.settings.schedule == "drop":
            prompt.kept = stays[self.layer]
            keep_positions(cache, prompt.kept, slice(0, self.layer + 1))
            return prompt
        prompt.own = dict(stays)
        for number, index in stays.items():
            keep_positions(cache, index, slice(number, number + 1))
        return prompt

    @torch.no_grad()
    def extend(self, prompt: CorePrompt, ids: Tensor) -> Tensor:
        """Read tokens ``(1, n)`` behind a prompt, at the positions they would have had; logits ``(n, vocabulary)``."""
        first = prompt.length + prompt.added
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0) + prompt.shift
        with evaluation_mode(self.model), self._own_masks(prompt):
            logits = self.model(
                input_ids=ids, past_key_values=prompt.cache, use_cache=True, position_ids=positions
            ).logits[0]
        prompt.added += ids.shape[1]
        prompt.logits = logits[-1]
        return logits

    @contextmanager
    def sparse(self, prompt: CorePrompt) -> Iterator[None]:
        """The feed-forward layers have the prompt's core neurons only, inside of the context."""
        for cut in prompt.neurons:
            cut.apply()
        try:
            yield
        finally:
            for cut in prompt.neurons:
                cut.restore()

    @contextmanager
    def _choosing(
        self, length: int, droppable: Tensor, kept: Tensor | None, chosen: dict[int, Tensor], neurons: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Hooks by which layers choose tokens and neurons, and by which tokens leave; yields what stays, by layer."""
        settings = self.settings
        choosers = (self.layer,) if settings.schedule == "drop" else self.own_caches
        stays: dict[int, Tensor] = {} if kept is None else dict.fromkeys(choosers, _checked(kept, length))

        def look(number: int) -> Any:
            def hook(module: nn.Module, args: tuple) -> None:
                middle = args[0].reshape(-1, args[0].shape[-1])
                if number in choosers and number not in stays:
                    stays[number] = _checked(settings.tokens.select(middle, droppable, settings.neurons), length)
                if neurons:
                    chosen[number] = settings.neurons.fit(middle)

            return hook

        def thin(value: Any) -> Any:
            return thinned(value, stays[self.layer], length)

        def restore(hidden: Tensor) -> Tensor:
            return restored(hidden, stays[self.layer], length)

        handles: list[Any] = [
            layer.down.module.register_forward_pre_hook(look(number)) for number, layer in enumerate(self.layers)
        ]
        if settings.schedule == "drop":
            later = self.blocks[self.layer + 1 :]
            handles.append(self.blocks[self.layer].register_forward_hook(on_hidden(thin)))
            handles += [block.register_forward_pre_hook(on_inputs(thin), with_kwargs=True) for block in later]
            # some models insist on as many tokens as they were given; nobody looks at those that have left
            handles.append(self.blocks[-1].register_forward_hook(on_hidden(restore)))
        try:
            yield stays
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _own_masks(self, prompt: CorePrompt) -> Iterator[None]:
        """Each block gets a mask as long as its own cache; the model makes one for all, from its first layer."""

        def fit(number: int) -> Any:
            return on_inputs(lambda value: behind(value, prompt.cache.get_seq_length(number)))

        blocks = enumerate(self.blocks) if prompt.own else ()
        handles = [block.register_forward_pre_hook(fit(number), with_kwargs=True) for number, block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@register(
    "corematching",
    paper="corematching",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    allocation="measured",
)
@dataclass(kw_only=True)
class CoreMatching:
    """Drop image tokens and neurons by how they match [Wang et al., 2025, arXiv 2505.19235].

    One layer early in the model decides on tokens. The others leave with their hidden states, so that later layers
    never see them, and their keys and values leave the caches of the layers before; positions stay the original ones.
    Tokens that come afterwards compute with each layer's core neurons only. Any long prompt of which a part may be
    dropped takes the place of an image. Nothing is calibrated; everything is chosen by the prompt.

    The released code does otherwise, which is the schedule ``cache`` with ``CoreTokens(reference=-5)``: the prompt is
    read in full, and then each layer of a range loses from its own cache the tokens that do not match its own neurons.
    There these entries are set to zero, and a key of zeros still draws attention; here they are gone.

    Parameters
    ----------
    neurons, tokens
        How they are chosen.
    layer
        Behind which tokens leave; by default a fifth of the way, layer 6 of 32.
    prune_neurons
        False to drop tokens only.
    schedule
        ``drop`` or ``cache``.
    layers
        Whose caches choose for themselves under ``cache``; by default the 6th to the 19th of 32, as in the released
        code, or as many in proportion.
    """

    neurons: CoreNeurons = field(default_factory=CoreNeurons)
    tokens: CoreTokens = field(default_factory=CoreTokens)
    layer: int | None = None
    prune_neurons: bool = True
    schedule: Schedule = "drop"
    layers: range | None = None

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ConfigurationError(f"schedule is {self.schedule!r}; it must be drop or cache")
        if self.layers is not None and not len(self.layers):
            raise ConfigurationError(f"layers is {self.layers}, which names none; give some, such as range(5, 19)")

    def install(self, model: nn.Module, image_slice: Droppable | None = None) -> CoreMatchingGenerator:
        """A generator for a model, which changes nothing in it but while it generates."""
        return CoreMatchingGenerator(model, self, image_slice)


def _checked(kept: Tensor, length: int) -> Tensor:
    if not len(kept) or int(kept[-1]) != length - 1 or int(kept[0]) < 0 or bool((kept.diff() <= 0).any()):
        raise ConfigurationError(
            f"{len(kept)} of {length} tokens would stay, not in order or without the last one, which the answer "
            f"follows; keep ascending places up to {length - 1}"
        )
    return kept
