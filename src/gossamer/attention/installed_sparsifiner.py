"""A vision transformer at work with learned links: what each block guesses, reads and passes on, and its teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gossamer.attention.connectivity_predictor import ConnectivityPredictor, Guess
from gossamer.attention.link_attention import LinkMask, link_attention, link_count, masked_attention
from gossamer.attention.link_flops import VisionFlops, layer_cost
from gossamer.attention.vision_sites import (
    Answering,
    VisionSite,
    count_tokens,
    final_norm,
    find_vision_sites,
    first_tensor,
    gather_tokens,
    logits_of,
    with_first,
)
from gossamer.errors import CalibrationError, ConfigurationError

if TYPE_CHECKING:
    from gossamer.attention.sparsifiner import Sparsifiner

Phase = Literal["reconstruct", "distill"]
_CHILD = "connectivity"
Selector = Callable[[int, Tensor, Tensor], Tensor]
"""Layer, queries, keys → scores of links ``(batch, heads, rows, keys)``, instead of the predictor's."""


@dataclass(frozen=True)
class TeacherOutput:
    """What the frozen dense model says of a batch.

    Attributes
    ----------
    logits
        ``(batch, classes)``.
    attention
        Probabilities of every layer, ``(batch, heads, tokens, tokens)``.
    tokens
        Patch tokens behind the last norm, ``(batch, patches, width)``.
    inputs
        Queries and keys of every layer, ``(batch, heads, tokens, d)`` each.
    """

    logits: Tensor
    attention: list[Tensor]
    tokens: Tensor
    inputs: list[tuple[Tensor, Tensor]]


class Teacher:
    """A frozen copy of a vision transformer that also tells its attention and its last tokens.

    Parameters
    ----------
    model
        Copied as it is now.
    prefix
        Tokens that are no patches.
    """

    def __init__(self, model: nn.Module, prefix: int = 1):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.prefix = prefix
        sites = find_vision_sites(self.model)
        self._attention: list[Tensor] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._tokens: list[Tensor] = []
        for site in sites:
            Answering(site, self._attend)
        _record_tokens(self.model, sites, self._tokens)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> TeacherOutput:
        """Call the model as one would, without gradients."""
        self._attention, self._inputs = [], []
        logits = logits_of(self.model(*args, **kwargs))
        return TeacherOutput(logits, self._attention, self._tokens[-1][:, self.prefix :], self._inputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self._inputs.append((q, k))
        self._attention.append((q @ k.transpose(-1, -2) * scale).softmax(-1))
        return self._attention[-1] @ v


def _record_tokens(model: nn.Module, sites: list[VisionSite], into: list[Tensor]) -> Any:
    norm = final_norm(model, sites)
    last = sites[-1].block if isinstance(norm, nn.Identity) else norm

    def record(module: nn.Module, args: Any, output: Any) -> None:
        into[:] = [first_tensor(output)]

    return last.register_forward_hook(record)


class InstalledSparsifiner:
    """A model with predictors in its attention layers, until :meth:`remove`; a context manager.

    The predictors are children of the attention modules, so that they train, move and are saved with the model. In
    evaluation mode, links alone are computed; in training mode the phase decides.

    Parameters
    ----------
    model, method
        The vision transformer, and what is to be done to it.
    num_tokens
        Of an image, where the model does not tell by its positions.

    Attributes
    ----------
    teacher
        The model as it was before.
    guesses, masks
        Of the last call, layer → what was guessed and what was read.
    places
        Of the last call: which tokens the last block passed on, ``(batch, tokens)``, or None for all.
    selector
        Chooses links instead of the predictors, for comparisons; None for the method itself.
    """

    def __init__(self, model: nn.Module, method: Sparsifiner, num_tokens: int | None = None):
        self.model, self.method, self.current = model, method, "reconstruct"
        self.sites = find_vision_sites(model)
        self.num_tokens = count_tokens(model) if num_tokens is None else num_tokens
        self._check()
        self.teacher = Teacher(model, method.prefix)
        self.guesses: dict[int, Guess] = {}
        self.masks: dict[int, LinkMask] = {}
        self.selector: Selector | None = None
        self._seen: dict[int, int] = {}
        self._places: dict[int, Tensor] = {}
        self._class_attention: dict[int, Tensor] = {}
        self._tokens: list[Tensor] = []
        for site in self.sites:
            weight = next(site.module.parameters())
            predictor = method.predictor(site.head_dim, self.num_tokens)
            site.module.add_module(_CHILD, predictor.to(weight.device, weight.dtype).train(model.training))
        self._answers = [Answering(site, partial(self._attend, layer)) for layer, site in enumerate(self.sites)]
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for layer in method.token_layers:
            self._handles.append(self.sites[layer].block.register_forward_hook(partial(self._drop, layer)))
        self._handles.append(_record_tokens(model, self.sites, self._tokens))

    def _check(self) -> None:
        wrong = next((layer for layer in self.method.token_layers if not 0 <= layer < len(self.sites)), None)
        if wrong is not None:
            raise ConfigurationError(f"token_layers names {wrong}, but the model has blocks 0 to {len(self.sites) - 1}")
        if any(hasattr(site.module, _CHILD) for site in self.sites):
            raise ConfigurationError("this model has a Sparsifiner already; call its remove() first")

    @property
    def predictors(self) -> list[ConnectivityPredictor]:
        """One for each layer."""
        return [getattr(site.module, _CHILD) for site in self.sites]

    @property
    def places(self) -> Tensor | None:  # noqa: D102
        return self._places.get(len(self.sites))

    def phase(self, name: Phase) -> InstalledSparsifiner:
        """Choose what training does from now on.

        Parameters
        ----------
        name
            ``reconstruct``: attention stays dense and the predictors learn its map. ``distill``: attention is masked
            and the model learns to do without what is missing.

        Raises
        ------
        ConfigurationError
            If there is no such phase.
        """
        if name not in ("reconstruct", "distill"):
            raise ConfigurationError(f"phase is {name!r}; it must be 'reconstruct' or 'distill'")
        self.current = name
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What the phase trains: the predictors only, or everything; biases, norms and positions without decay."""
        learners = self.predictors if self.current == "reconstruct" else [self.model]
        parameters = [p for module in learners for p in module.parameters()]
        return [
            {"params": [p for p in parameters if p.dim() in (2, 4)], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() not in (2, 4)], "weight_decay": 0.0},
        ]

    def loss(self, student_out: Any, teacher_out: TeacherOutput, target: Tensor | None = None) -> Tensor:
        """The loss of the phase, for the call of the model that was made last.

        Parameters
        ----------
        student_out
            What that call returned.
        teacher_out
            What :attr:`teacher` says of the same images.
        target
            Classes ``(batch,)``; only needed to distill.

        Raises
        ------
        CalibrationError
            If the model was not called in this phase and in training mode, or there is no target.
        """
        reconstruct = self.current == "reconstruct"
        if not self._tokens or (reconstruct and len(self.guesses) < len(self.sites)):
            raise CalibrationError("the model was not called in training mode; call model.train(), then model(images)")
        if reconstruct:
            return self.method.reconstruction_loss(
                [self.guesses[layer].approx for layer in range(len(self.sites))], teacher_out.attention
            )
        if target is None:
            raise CalibrationError("target is missing; distillation needs the class of every image")
        theirs = teacher_out.tokens
        if self.places is not None:
            theirs = gather_tokens(theirs, self.places[:, self.method.prefix :] - self.method.prefix)
        ours = self._tokens[-1][:, self.method.prefix :]
        return self.method.distillation_loss(logits_of(student_out), teacher_out.logits, target, ours, theirs)

    def flops(self) -> VisionFlops:
        """Operations for one image, counted from the last call in evaluation mode.

        Raises
        ------
        CalibrationError
            If there was none.
        """
        if len(self._seen) < len(self.sites):
            raise CalibrationError("nothing was read yet; call the model on images in evaluation mode first")
        parts = enumerate(zip(self.sites, self.predictors))
        return VisionFlops(
            tuple(
                layer_cost(site, predictor, self._seen[i], self.guesses.get(i), self.masks.get(i))
                for i, (site, predictor) in parts
            )
        )

    def resize(self, num_tokens: int) -> InstalledSparsifiner:
        """Interpolate the predictors for images of another size; see :meth:`ConnectivityPredictor.resize`."""
        for site, predictor in zip(self.sites, self.predictors):
            setattr(site.module, _CHILD, predictor.resize(num_tokens))
        self.num_tokens = num_tokens
        return self

    def remove(self) -> None:
        """Take everything out: the model attends densely again, with the weights that it has now."""
        for answer in self._answers:
            answer.remove()
        for handle in self._handles:
            handle.remove()
        for site in self.sites:
            if hasattr(site.module, _CHILD):
                delattr(site.module, _CHILD)

    def __enter__(self) -> InstalledSparsifiner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.remove()

    # ------------------------------------------------------------------------------------------- inside a call

    @property
    def _reconstructing(self) -> bool:
        return self.model.training and self.current == "reconstruct"

    def _begin(self, module: nn.Module, args: Any) -> None:
        for state in (self.guesses, self.masks, self._seen, self._places, self._class_attention):
            state.clear()

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        places = self._places.get(layer)
        if self._reconstructing:
            # cut off from the model: the guess learns what attention is, and attention does not learn to be guessed
            self.guesses[layer] = self.predictors[layer].guess(q.detach(), k.detach(), False, tokens=places)
            return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        if layer in self.method.token_layers:
            first = (q[:, :, :1].detach() @ k.detach().transpose(-1, -2) * scale).softmax(-1)
            self._class_attention[layer] = first[:, :, 0, self.method.prefix :].mean(1)
        count = min(link_count(self.method.keep_rate, self.num_tokens), k.shape[2])
        self._seen[layer] = k.shape[2]
        if count == k.shape[2] and self.method.link_threshold is None:
            return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        self.masks[layer] = mask = self._choose(layer, q, k, count, places)
        if self.model.training:
            return masked_attention(q, k, v, mask.to_dense(), scale)
        return link_attention(q, k, v, mask, scale)

    @torch.no_grad()
    def _choose(self, layer: int, q: Tensor, k: Tensor, count: int, places: Tensor | None) -> LinkMask:
        if self.selector is not None:
            scores = self.selector(layer, q, k)
        else:
            self.guesses[layer] = self.predictors[layer].guess(q, k, True, tokens=places)
            scores = self.guesses[layer].approx
        if self.method.link_threshold is not None:
            return LinkMask.threshold(scores, self.method.link_threshold, self.method.prefix)
        return LinkMask.highest(scores, count, prefix=self.method.prefix)

    def _drop(self, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Pass on the patches that the class token looks at, and remember which they are."""
        if self._reconstructing:
            return output
        tokens, prefix = first_tensor(output), self.method.prefix
        rank = 1 + sorted(self.method.token_layers).index(layer)
        wanted = math.ceil(round(self.method.token_keep_rate**rank * (self.num_tokens - prefix), 9))
        kept = self._class_attention[layer].topk(min(wanted, tokens.shape[1] - prefix), -1).indices.sort(-1).values
        always = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
        here = torch.cat([always, kept + prefix], 1)
        before = self._places.get(layer)
        after = here if before is None else before.gather(1, here)
        for later in range(layer + 1, len(self.sites) + 1):
            self._places[later] = after
        return with_first(output, gather_tokens(tokens, here))
