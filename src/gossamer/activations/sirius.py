"""Sirius: decode with a contextually sparse model, and let the full one re-read, correct and roll back now and then.

Contextual sparsity keeps understanding but breaks reasoning, where one wrong token spoils all that follow. So every k
tokens the full model reads them again in one pass, which costs about as much as one of its steps. Its keys and values
take the place of the sparse ones, the longest plausible beginning is kept, and the full model's own next token follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.activations.contextual import ContextualSparse, Kind
from gossamer.activations.draft_tree import DraftTree
from gossamer.activations.greedy_text import GreedyText, check_greedy, prompt_inputs, real_tokens, run_generate
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, check_sparsity
from gossamer.measure.windows import accepted, evaluation_mode
from gossamer.models.key_value_cache import crop_to, entries, keep_positions, overwrite, rewritable

Acceptance = Literal["likely", "exact"]


@dataclass(frozen=True)
class Window:
    """What happened between two checks.

    Attributes
    ----------
    drafted
        Tokens of the sparse model (the depth of a tree).
    accepted
        Those that were kept.
    advance
        Tokens by which the text grew: those, and the full model's own.
    read
        Tokens that the check read; more than a tree is deep if it has branches.
    """

    drafted: int
    accepted: int
    advance: int
    read: int


@dataclass
class SiriusStats:
    """Figures of one generation.

    Attributes
    ----------
    kernel_size
        k.
    density
        d, the share of weights that a step of the sparse model reads.
    windows
        One for each check.
    """

    kernel_size: int
    density: float
    windows: list[Window] = field(default_factory=list)

    @property
    def checks(self) -> int:
        """Calls of the full model after the prompt."""
        return len(self.windows)

    @property
    def rollbacks(self) -> int:
        """Checks that threw tokens away."""
        return sum(window.accepted < window.drafted for window in self.windows)

    @property
    def aal(self) -> float:
        """Average advance length of a check, at most k; windows that the end of the text cut short do not count.

        All count where there are no others; NaN without any check.
        """
        full = [w for w in self.windows if w.drafted == self.kernel_size - 1] or self.windows
        return sum(w.advance for w in full) / len(full) if full else float("nan")

    @property
    def effective_density(self) -> float:
        """((k − 1) d + 1) / AAL: weights read for a token, as a share of what the full model reads."""
        return ((self.kernel_size - 1) * self.density + 1) / self.aal

    @property
    def measured_density(self) -> float:
        """The same from the steps that were really made, windows that were cut short included."""
        advance = sum(w.advance for w in self.windows)
        steps = sum(w.drafted * self.density + 1 for w in self.windows)
        return steps / advance if advance else float("nan")


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

    Where accelerate streams the full feed-forward layers in from memory or disk, that happens at checks only: the cut
    matrices of ``griffin`` stay where the model computes.

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

    Raises
    ------
    ConfigurationError
        If a value is out of its range, or the sparsity belongs to another model.
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
    ):
        _check_settings(kernel_size, thr, tau, tree_width, accept)
        if sparse.model is not model:
            raise ConfigurationError("sparse was made for another model; make a ContextualSparse of the one you give")
        if tree_width > 1 and not (rewrite and rollback):
            raise ConfigurationError("rewrite=False and rollback=False are for tree_width=1; a tree needs both")
        self.model, self.sparse = model, sparse
        self.kernel_size, self.thr, self.tau, self.tree_width = kernel_size, thr, tau, tree_width
        self.accept, self.rewrite, self.rollback = accept, rewrite, rollback
        self.stats = SiriusStats(kernel_size, sparse.density)

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

    def loop(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The decoding loop, for ``model.generate(…, custom_generate=generator.loop)``; returns the sequences."""
        check_greedy(input_ids, generation_config, "Sirius")
        cache = rewritable(model_kwargs.get("past_key_values"))
        max_length = getattr(generation_config, "max_length", None) or input_ids.shape[1] + 20
        text = GreedyText(input_ids, logits_processor, stopping_criteria, max_length)
        fresh = real_tokens(input_ids, model_kwargs.get("attention_mask"), cache.get_seq_length())
        self.stats = SiriusStats(self.kernel_size, self.sparse.density)
        with evaluation_mode(self.model):
            with self.sparse.observing():
                logits = self._call(fresh, cache, **prompt_inputs(model_kwargs), **accepted(model, logits_to_keep=1))
            ended = text.append([int(text.scores(logits[-1], []).argmax())])
            while not ended:
                ended = self._window(text, cache)
        return text.ids

    def _window(self, text: GreedyText, cache: Any) -> bool:
        """Draft, check, keep; returns whether the text has ended."""
        steps = min(self.kernel_size - 1, text.room - 1)
        base = cache.get_seq_length()
        tree, leaves = self._draft(text, cache, steps)
        stored = None if self.rewrite else entries(cache, base, cache.get_seq_length())
        crop_to(cache, base)
        if self.tree_width == 1:
            scores = self._call(torch.tensor([tree.tokens], device=text.ids.device), cache)
        else:
            tree, leaves = tree.pruned(leaves)
            everything = list(range(len(tree.tokens)))
            scores = self._read(tree, everything, dict(zip(everything, everything)), base, cache)
        path, kept, following = self._judge(text, tree, leaves, scores)
        if self.tree_width == 1:
            crop_to(cache, base + kept + 1)
        else:
            chosen = [*range(base), *(base + place for place in path[: kept + 1])]
            keep_positions(cache, torch.tensor(chosen))
        if stored is not None:
            overwrite(cache, base, stored, min(kept + 1, stored[0][0].shape[-2]))
        before = text.generated
        ended = text.append([tree.tokens[place] for place in path[1 : kept + 1]])
        ended = ended or text.append([following])
        self.stats.windows.append(Window(len(path) - 1, kept, text.generated - before, len(tree.tokens)))
        return ended

    def _draft(self, text: GreedyText, cache: Any, steps: int) -> tuple[DraftTree, list[int]]:
        """Let the sparse model go on for some steps; a path stops where the text would end, which a check must approve.

        Returns the tree and the places of its leaves, the likeliest first.
        """
        tree, base = DraftTree([int(text.ids[0, -1])]), cache.get_seq_length()
        beam: list[tuple[int, float, bool]] = [(0, 0.0, False)]
        slots: dict[int, int] = {}
        with self.sparse.active():
            for _ in range(steps):
                live = [place for place, _, ended in beam if not ended]
                if not live:
                    break
                slots |= {place: len(slots) + i for i, place in enumerate(live)}
                if self.tree_width == 1:
                    logits = self._call(torch.tensor([[tree.tokens[live[0]]]], device=text.ids.device), cache)
                else:
                    logits = self._read(tree, live, slots, base, cache)
                beam = self._extended(text, tree, beam, dict(zip(live, logits)))
        return tree, [place for place, _, _ in beam]

    def _extended(
        self, text: GreedyText, tree: DraftTree, beam: list[tuple[int, float, bool]], logits: dict[int, Tensor]
    ) -> list[tuple[int, float, bool]]:
        """The likeliest continuations of a beam of (place, log probability, ended)."""
        if self.tree_width == 1:
            place = beam[0][0]
            words = tree.words(place)
            token = int(text.scores(logits[place], words).argmax())
            return [(tree.add(token, place), 0.0, text.ends([*words, token]))]
        candidates: list[tuple[float, int, int | None]] = []
        candidates += [(score, place, None) for place, score, ended in beam if ended]
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

    def _read(self, tree: DraftTree, places: list[int], slots: dict[int, int], base: int, cache: Any) -> Tensor:
        like = torch.empty(0, dtype=cache.layers[0].keys.dtype, device=cache.layers[0].keys.device)
        ids, positions, mask = tree.inputs(places, slots, base, like)
        return self._call(ids, cache, position_ids=positions, attention_mask=mask)

    def _call(self, ids: Tensor, cache: Any, **options: Any) -> Tensor:
        """Logits ``(tokens, vocabulary)``; the tokens go into the cache."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[0]


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
    kernel_size, thr, tau, tree_width
        See :class:`SiriusGenerator`.
    """

    sparsity: float = 0.5
    kind: Kind = "griffin"
    kernel_size: int = 16
    thr: float = 0.1
    tau: float = 0.6
    tree_width: int = 1

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        _check_settings(self.kernel_size, self.thr, self.tau, self.tree_width, "likely")
        if self.kind not in get_args(Kind):
            raise ConfigurationError(f"kind is {self.kind!r}; it must be griffin (by prompt) or cats (by token)")

    def install(self, model: nn.Module) -> SiriusGenerator:
        """A generator for a model, until its ``remove()`` is called."""
        sparse = ContextualSparse(model, self.kind, 1 - self.sparsity)
        return SiriusGenerator(model, sparse, self.kernel_size, self.thr, self.tau, self.tree_width)


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
