"""Sirius: decode with a contextually sparse model, and let the full one re-read, correct and roll back now and then.

Contextual sparsity keeps understanding but breaks reasoning, where one wrong token spoils all that follow. So every k
tokens the full model reads them again in one pass, which costs about as much as one of its steps. Its keys and values
take the place of the sparse ones, the longest plausible beginning is kept, and the full model's own next token follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.activations.contextual import ContextualSparse, Kind
from gossamer.activations.correction_runtimes import CompiledText, NativeText, Runtime, Text
from gossamer.activations.correction_stats import SiriusStats, Window
from gossamer.activations.draft_tree import DraftTree
from gossamer.activations.greedy_text import GreedyText, check_greedy, prompt_inputs, run_generate
from gossamer.activations.text_positions import PlacedText, check_positions, noting_positions, position_shift
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, check_sparsity
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import accepted
from gossamer.models.key_value_cache import entries, keep_positions, overwrite, rewritable
from gossamer.models.streamed_feedforward import StreamedFeedForwards

Acceptance = Literal["likely", "exact"]


@dataclass(frozen=True)
class SiriusOutput:
    """A generated text.

    Attributes
    ----------
    sequences
        Prompt and continuation, ``(1, tokens)``.
    stats
        What it took.
    """

    sequences: Tensor
    stats: SiriusStats


class SiriusGenerator:
    """Generation by a sparse model that the full model corrects [Zhou et al., 2024, arXiv 2409.03856].

    Greedy: a drafted token is kept while the full model gives it a probability of `thr` or more at temperature `tau`.
    That is a heuristic, neither the full model's greedy text nor a sample of its distribution; ``accept="exact"`` is
    ordinary speculative decoding with the sparse model as the draft, which is the full model's greedy text.

    With a tree, the sparse model keeps the `tree_width` likeliest continuations and the full model reads all of them in
    one pass, each token seeing the text and its own ancestors; the path with the longest accepted beginning is kept.

    A model that is too large for its device is offloaded: the cut matrices of ``griffin`` and everything outside of
    feed-forward layers stay on the device, and the full matrices stream in for prompts and checks only, each layer's
    while the one before it computes. Where accelerate streams them from memory or disk, that happens then only as well.

    Parameters
    ----------
    model
        A causal language model of transformers.
    sparse
        How it computes between checks.
    kernel_size
        k: a check reads k tokens, of which the sparse model has made k − 1.
    thr
        Probability from which on a token is kept (the paper takes 0.05 where speed counts).
    tau
        Temperature of that probability.
    tree_width
        Continuations that are kept; 1 for none besides the best.
    accept
        ``likely`` or ``exact``.
    rewrite, rollback
        Ablations: leave the sparse model's keys and values; keep all tokens whatever the check says.
    runtime
        ``eager`` runs transformers' own code. ``compile`` runs a graph of torch.compile for each of the two models over
        a cache of fixed size; the first text waits for the compiler. ``native`` runs gossamer's compiled steps on the
        CPU, for ``griffin`` and models that they know; a cache that is given then keeps the prompt only.
    offload
        Device to compute on, to which the model moves; its full feed-forward matrices stay and stream in. None to
        leave all where it is. For ``griffin`` with ``eager``.
    backend
        Of torch.compile.

    Attributes
    ----------
    streamed
        Where the full matrices come from, with the bytes that moved; None without offloading.

    Raises
    ------
    ConfigurationError
        If a value is out of its range, settings do not fit each other, or the sparsity belongs to another model.
    ModelError
        If the model cannot run in the native runtime, or a tree in the model, as with ALiBi.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse: ContextualSparse,
        kernel_size: int = 16,
        thr: float = 0.1,
        tau: float = 0.6,
        tree_width: int = 1,
        accept: Acceptance = "likely",
        rewrite: bool = True,
        rollback: bool = True,
        runtime: Runtime = "eager",
        offload: torch.device | str | None = None,
        backend: Any = "inductor",
    ):
        _check_settings(kernel_size, thr, tau, tree_width, accept)
        _check_runtime(runtime, sparse.kind, tree_width, rewrite, offload)
        if sparse.model is not model:
            raise ConfigurationError("sparse was made for another model; make a ContextualSparse of the one you give")
        if tree_width > 1 and not (rewrite and rollback):
            raise ConfigurationError("rewrite=False and rollback=False are for tree_width=1; a tree needs both")
        if tree_width > 1:
            check_positions(model, "a tree of drafts")
        self.model, self.sparse, self.tree_width = model, sparse, tree_width
        self.kernel_size, self.thr, self.tau = kernel_size, thr, tau
        self.accept, self.rewrite, self.rollback = accept, rewrite, rollback
        self.stats = SiriusStats(kernel_size, sparse.density)
        self.streamed: StreamedFeedForwards | None = None
        if offload is not None:
            self.streamed = StreamedFeedForwards(model, sparse.layers, offload)
            sparse.device = self.streamed.device
        self._text = self._runtime(runtime, backend)

    def _runtime(self, runtime: Runtime, backend: Any) -> Text:
        if runtime == "compile":
            return CompiledText(self.model, self.sparse, self.kernel_size, backend)
        return (NativeText if runtime == "native" else PlacedText)(self.model, self.sparse)

    def generate(self, **inputs: Any) -> SiriusOutput:
        """Continue a prompt.

        Parameters
        ----------
        **inputs
            As for transformers' ``generate``: ``input_ids`` ``(1, tokens)``, ``attention_mask``, ``max_new_tokens``,
            ``eos_token_id``, a ``generation_config``, processors, stopping criteria, and so on.

        Raises
        ------
        ConfigurationError
            For more than one sequence, for sampling and beams, and for a cache that cannot be cropped.
        CalibrationError
            If `griffin` is to choose by a prompt of one token.
        """
        return SiriusOutput(run_generate(self.model, self.loop, inputs), self.stats)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.sparse.remove()
        if self.streamed is not None:
            self.streamed.remove()

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
        check_greedy(input_ids, generation_config, "Sirius")
        cache = rewritable(model_kwargs.get("past_key_values"))
        max_length = getattr(generation_config, "max_length", None) or input_ids.shape[1] + 20
        text = GreedyText(input_ids, logits_processor, stopping_criteria, max_length, streamer)
        past = cache.get_seq_length()
        inputs = prompt_inputs(input_ids, model_kwargs, past)
        more = inputs.keys() - {"input_ids", "position_ids"}
        if more and isinstance(self._text, NativeText):
            raise ConfigurationError(f"runtime='native' reads tokens, and no {', '.join(more)}; use runtime='eager'")
        self.stats = SiriusStats(self.kernel_size, self.sparse.density)
        with evaluation_mode(self.model):
            with self.sparse.observing(), noting_positions(model) as seen:
                logits = _prompt(model, cache, inputs)
            self._text.begin(input_ids if past else inputs["input_ids"], cache, text.room)
            self._place(position_shift(seen, cache.get_seq_length()))
            ended = text.append([int(text.scores(logits, []).argmax())])
            while not ended:
                ended = self._window(text)
            self._text.end()
        return text.ids

    def _place(self, shift: Tensor | None) -> None:
        """Let the positions of drafts and checks be so far from their numbers."""
        if isinstance(self._text, PlacedText):
            self._text.shift = shift
        elif shift is not None and shift.any():
            raise ConfigurationError("positions in the prompt do not count tokens (M-RoPE); use runtime='eager'")

    def _window(self, text: GreedyText) -> bool:
        """Draft, check, keep; returns whether the text has ended."""
        base = self._text.length
        tree, leaves = self._draft(text, min(self.kernel_size - 1, text.room - 1))
        stored = None if self.rewrite else entries(self._eager.cache, base, self._text.length)
        self._text.crop(base)
        if self.tree_width == 1:
            scores = self._text.check(tree.tokens)
        else:
            tree, leaves = tree.pruned(leaves)
            everything = list(range(len(tree.tokens)))
            scores = self._read(tree, everything, dict(zip(everything, everything)), base)
        path, kept, following = self._judge(text, tree, leaves, scores)
        if self.tree_width == 1:
            self._text.crop(base + kept + 1)
        else:
            chosen = [*range(base), *(base + place for place in path[: kept + 1])]
            keep_positions(self._eager.cache, torch.tensor(chosen))
        if stored is not None:
            overwrite(self._eager.cache, base, stored, min(kept + 1, stored[0][0].shape[-2]))
        before = text.generated
        ended = text.append([tree.tokens[place] for place in path[1 : kept + 1]])
        ended = ended or text.append([following])
        self.stats.windows.append(Window(len(path) - 1, kept, text.generated - before, len(tree.tokens)))
        return ended

    def _draft(self, text: GreedyText, steps: int) -> tuple[DraftTree, list[int]]:
        """Let the sparse model go on for some steps; a path stops where the text would end, which a check must approve.

        Returns the tree and the places of its leaves, the likeliest first.
        """
        tree, base = DraftTree([int(text.ids[0, -1])]), self._text.length
        beam: list[tuple[int, float, bool]] = [(0, 0.0, False)]
        slots: dict[int, int] = {}
        with self._text.drafting():
            for _ in range(steps):
                live = [place for place, _, ended in beam if not ended]
                if not live:
                    break
                slots |= {place: len(slots) + i for i, place in enumerate(live)}
                if self.tree_width == 1:
                    logits = self._text.draft(tree.tokens[live[0]])
                else:
                    logits = self._read(tree, live, slots, base)
                beam = self._extended(text, tree, beam, dict(zip(live, logits)))
        return tree, [place for place, _, _ in beam]

    def _extended(
        self, text: GreedyText, tree: DraftTree, beam: list[tuple[int, float, bool]], logits: dict[int, Tensor]
    ) -> list[tuple[int, float, bool]]:
        """The likeliest continuations of a beam of (place, log probability, ended)."""
        if self.tree_width == 1:
            place = beam[0][0]
            words = tree.words(place)
            # threads of torch that wait for more work after an argmax would take cores from compiled steps
            known = self._text.best if text.is_plain else None
            word = int(text.scores(logits[place], words).argmax()) if known is None else known
            return [(tree.add(word, place), 0.0, text.ends([*words, word]))]
        candidates: list[tuple[float, int, int | None]] = [(score, at, None) for at, score, ended in beam if ended]
        for place, score, ended in beam:
            if ended:
                continue
            scores = text.scores(logits[place], tree.words(place))
            best = (scores / self.tau).log_softmax(-1).topk(min(self.tree_width, len(scores)))
            candidates += [(score + v, place, t) for v, t in zip(best.values.tolist(), best.indices.tolist())]
        candidates.sort(key=lambda candidate: -candidate[0])
        found = []
        for score, place, token in candidates[: self.tree_width]:
            if token is None:
                found.append((place, score, True))
            else:
                new = tree.add(token, place)
                found.append((new, score, text.ends(tree.words(new))))
        return found

    def _judge(
        self, text: GreedyText, tree: DraftTree, leaves: list[int], logits: Tensor
    ) -> tuple[list[int], int, int]:
        """The path with the longest accepted beginning, the length of that, and the full model's token behind it."""
        best: tuple[list[int], int, Tensor] | None = None
        for leaf in leaves:
            path, words = tree.path(leaf), tree.words(leaf)
            scores = text.rows(logits[path], words)
            kept = self._accepted(scores[:-1], torch.tensor(words, dtype=torch.long, device=scores.device))
            if best is None or kept > best[1]:
                best = path, kept, scores[kept]
        path, kept, scores = best  # type: ignore[misc]
        return path, kept, int(scores.argmax())

    def _accepted(self, scores: Tensor, words: Tensor) -> int:
        """How many tokens ``(n,)`` are kept, given the full model's scores ``(n, vocabulary)`` before each of them."""
        if not self.rollback or not len(words):
            return len(words)
        if self.accept == "exact":
            good = scores.argmax(-1) == words
        else:
            good = (scores / self.tau).softmax(-1).gather(1, words[:, None])[:, 0] >= self.thr
        return int(good.long().cumprod(0).sum())

    def _read(self, tree: DraftTree, places: list[int], slots: dict[int, int], base: int) -> Tensor:
        text = self._eager
        ids, positions, mask = tree.inputs(places, slots, base, text.cache.layers[0].keys.new_empty(0))
        return text.read_at(positions, ids, attention_mask=mask)

    @property
    def _eager(self) -> PlacedText:
        """The text, for trees and ablations, which look into its cache."""
        assert isinstance(self._text, PlacedText)  # as _check_runtime has made sure
        return self._text


def _prompt(model: Any, cache: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits ``(vocabulary,)`` behind a prompt, which goes into the cache."""
    return model(past_key_values=cache, use_cache=True, **inputs, **accepted(model, logits_to_keep=1)).logits[0, -1]


@register(
    "sirius",
    paper="sirius",
    when="at inference",
    granularity="activations",
    needs_data=False,
    criterion=("activation",),
)
@dataclass(kw_only=True)
class Sirius:
    """Contextual sparsity with correction by the full model [Zhou et al., 2024, arXiv 2409.03856].

    The settings of a :class:`SiriusGenerator`, which :meth:`install` makes for a model; nothing is calibrated, since
    the neurons are chosen by each prompt (``griffin``) or each token (``cats``).

    Parameters
    ----------
    sparsity
        Share of the neurons of feed-forward layers that a step between checks leaves out.
    kind
        ``griffin`` or ``cats``; see :class:`ContextualSparse`.
    kernel_size, thr, tau, tree_width, runtime, offload
        See :class:`SiriusGenerator`.
    """

    sparsity: float = 0.5
    kind: Kind = "griffin"
    kernel_size: int = 16
    thr: float = 0.1
    tau: float = 0.6
    tree_width: int = 1
    runtime: Runtime = "eager"
    offload: str | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        _check_settings(self.kernel_size, self.thr, self.tau, self.tree_width, "likely")
        if self.kind not in get_args(Kind):
            raise ConfigurationError(f"kind is {self.kind!r}; it must be griffin (by prompt) or cats (by token)")
        _check_runtime(self.runtime, self.kind, self.tree_width, True, self.offload)

    def install(self, model: nn.Module) -> SiriusGenerator:
        """A generator for a model, until its ``remove()`` is called."""
        sparse = ContextualSparse(model, self.kind, 1 - self.sparsity)
        return SiriusGenerator(
            model,
            sparse,
            self.kernel_size,
            self.thr,
            self.tau,
            self.tree_width,
            runtime=self.runtime,
            offload=self.offload,
        )


def _check_settings(kernel_size: int, thr: float, tau: float, tree_width: int, accept: str) -> None:
    for name, value in (("kernel_size", kernel_size), ("tree_width", tree_width)):
        if not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, at least 1")
    if not 0 <= thr <= 1:
        raise ConfigurationError(f"thr is {thr!r}; it must be a probability from 0 to 1, such as 0.1")
    if not tau > 0:
        raise ConfigurationError(f"tau is {tau!r}; it must be a temperature above 0, such as 0.6")
    if accept not in get_args(Acceptance):
        raise ConfigurationError(f"accept is {accept!r}; it must be likely or exact")


def _check_runtime(runtime: str, kind: Kind, tree_width: int, rewrite: bool, offload: Any) -> None:
    if runtime not in get_args(Runtime):
        raise ConfigurationError(f"runtime is {runtime!r}; it must be eager, compile or native")
    wanted = {"tree_width": (tree_width, 1), "rewrite": (rewrite, True), "offload": (offload, None)}
    for name, (value, usual) in wanted.items():
        if runtime != "eager" and value != usual:
            raise ConfigurationError(f"{name}={value!r} is for runtime='eager', not {runtime!r}; use one of both")
    if kind != "griffin" and (runtime == "native" or offload is not None):
        raise ConfigurationError(
            f"kind={kind!r} chooses neurons for each token and needs all weights at hand; offload and runtime='native' "
            f"are for kind='griffin'"
        )
