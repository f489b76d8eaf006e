"""The same decoder in another basis, in which its key and gate matrices have orthogonal columns.

An RMS norm without gain commutes with rotations of the residual stream, so that a rotation can be put between any two
layers if the next layer undoes it. Where attention and feed-forward want different bases, the stream that skips them
has to be rotated by the product of both, which costs a d × d matrix each [Chen et al., 2025, arXiv 2505.19427, §3.2].

The skips live in hooks and not among the weights, so that a rotated model cannot be saved: save the original, and
rotate again after loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models.feedforward_search import _evaluating
from gossamer.models.residual_halves import SAMPLE, Half, find_halves, norm_gain, sample_logits


@dataclass(eq=False)
class Rotation:
    """What :func:`orthogonalise` has done to a model.

    Attributes
    ----------
    skips
        Names of layers (the ones that map back to the stream) → the d × d matrix of their skip connection.
    untied
        Whether the output head was given a weight of its own.
    """

    skips: dict[str, Tensor]
    untied: bool

    @property
    def size(self) -> int:
        """Weights that every token reads besides those of the layers."""
        return sum(matrix.numel() for matrix in self.skips.values())


def is_rotated(model: nn.Module) -> bool:
    """Whether :func:`orthogonalise` has been at this model."""
    return getattr(model, "_rotation", None) is not None


def rotation_size(model: nn.Module) -> int:
    """Weights of the skip connections of a rotated model; 0 for any other."""
    rotation: Rotation | None = getattr(model, "_rotation", None)
    return 0 if rotation is None else rotation.size


@torch.no_grad()
def orthogonalise(model: nn.Module) -> Rotation:
    """Rotate a decoder so that W_kᵀ W_k and W_gateᵀ W_gate are diagonal, in place, without changing what it computes.

    Gains of norms are folded into the layers after them. The bases are the right singular vectors of each block's key
    matrix (of the fused one where query, key and value are one) and of its gate matrix; decompositions and products
    are in float64. A tied output head gets a weight of its own. Weights are held twice meanwhile: if the rotated model
    computes something else on a few tokens, all of them are put back.

    From then on the model cannot be saved, since a file of weights has no room for the skips: its ``save_pretrained``
    and :func:`gossamer.storage.save` refuse. Save the original, and rotate again after loading.

    Parameters
    ----------
    model
        A decoder whose blocks are ``x + c · attention(norm(x))`` and ``x + c · feed_forward(norm(x))`` with RMS norms
        and any number c (Granite has one that is not 1).

    Raises
    ------
    ModelError
        If its blocks are different: norms after attention or feed-forward layers (Gemma), norms that subtract the mean
        (GPT-2, OPT), norms that others read as well (the routers of mixtures of experts), one norm for both halves, no
        key matrix (latent attention); or if it has been rotated already. The model is then as it was.
    """
    if is_rotated(model):
        raise ModelError("this model has been rotated already; load it again to start from the original")
    embedding, head = _ends(model)
    with _evaluating(model):
        halves, final = find_halves(model, head)
        before = sample_logits(model)
        hooks: list[Any] = []
        parts = [embedding, head, final, *(m for half in halves for m in (half.norm, half.writer, *half.readers))]
        with _undone_on_failure(model, parts, hooks):
            rotation = Rotation(*_rotate(model, halves, final, embedding, head, hooks))
            _check_same(model, before)
    model._rotation = rotation  # type: ignore[assignment]
    _refuse_to_save(model)
    return rotation


def _rotate(
    model: nn.Module, halves: list[Half], final: nn.Module, embedding: nn.Module, head: nn.Module, hooks: list[Any]
) -> tuple[dict[str, Tensor], bool]:
    """Turn all weights, add the skips, and return what :class:`Rotation` keeps."""
    untied = _untie(model, embedding, head)
    for half in halves:
        _fold(half.norm, half.readers)
    _fold(final, [head])
    bases = [torch.linalg.svd(half.key.weight.double(), full_matrices=True).Vh.T for half in halves]  # type: ignore[operator]
    _times(embedding, bases[0])
    skips: dict[str, Tensor] = {}
    for index, half in enumerate(halves):
        basis, after = bases[index], bases[min(index + 1, len(bases) - 1)]
        for reader in half.readers:
            _times(reader, basis)
        _turn_output(half.writer, after)
        skips[half.name] = (basis.T @ after).to(half.writer.weight.dtype)  # type: ignore[arg-type]
        hooks += _rotate_skip(half, skips[half.name])
    _times(head, bases[-1])
    return skips, untied


@contextmanager
def _undone_on_failure(model: nn.Module, parts: Sequence[nn.Module], hooks: list[Any]) -> Iterator[None]:
    """Put parameters back, and remove hooks, if anything goes wrong inside; copies are held on the CPU."""
    kept = [
        (m, n, p, p.detach().to("cpu", copy=True)) for m in parts for n, p in m._parameters.items() if p is not None
    ]
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    try:
        yield
    except BaseException:
        for hook in hooks:
            hook.remove()
        for module, name, parameter, values in kept:
            parameter.copy_(values)
            module._parameters[name] = parameter
        if tied is not None:
            config.tie_word_embeddings = tied
        raise


def _check_same(model: nn.Module, before: Tensor) -> None:
    after = sample_logits(model)
    # what norms compute in float32 is no better than that
    exact = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    allowed = 4 * max(exact, torch.finfo(torch.float32).eps) ** 0.5
    change = float((after - before).norm() / before.norm())
    if not change <= allowed:
        raise ModelError(
            f"the rotated {type(model).__name__} computes something else (logits of {SAMPLE} tokens differ by "
            f"{change:.1%}), so its blocks are not x + attention(norm(x)) and x + feed_forward(norm(x)); its weights "
            f"have been put back: use WINA without the transformation"
        )


def _refuse_to_save(model: nn.Module) -> None:
    reason = (
        f"this {type(model).__name__} has been rotated, and the matrices of its skip connections are no weights that "
        f"could be saved; save the original, and call models.rotation.orthogonalise(model) after loading"
    )

    def refuse(*args: Any, **options: Any) -> None:
        raise ModelError(reason)

    model._unsaved = reason  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse  # type: ignore[assignment]


def _ends(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} does not name its embedding and its head; use a causal language model"
        )
    return embedding, head


def _untie(model: nn.Module, embedding: nn.Module, head: nn.Module) -> bool:
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)  # type: ignore[union-attr, operator]
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    return True


def _fold(norm: nn.Module, readers: list[nn.Module]) -> None:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    before = weight.double().clone()
    gain = norm_gain(norm, len(weight))
    for reader in readers:
        matrix: Tensor = reader.weight  # type: ignore[assignment]
        matrix.copy_((matrix.double() * _exactnorm_gain(before, gain)).to(matrix.dtype))
    # some keep the gain, some the gain minus one
    weight.fill_(0.0 if _is_offset(before, gain) else 1.0)


def _exactnorm_gain(weight: Tensor, measured: Tensor) -> Tensor:
    """The gain without the rounding of its measurement: the norm's weight, or one more."""
    return weight + 1 if _is_offset(weight, measured) else weight


def _is_offset(weight: Tensor, measured: Tensor) -> bool:
    return bool((weight + 1 - measured).abs().max() < (weight - measured).abs().max())


def _times(module: nn.Module, basis: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_((weight.double() @ basis.to(weight.device)).to(weight.dtype))


def _turn_output(module: nn.Module, basis: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_((basis.T.to(weight.device) @ weight.double()).to(weight.dtype))
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_((basis.T.to(bias.device) @ bias.double()).to(bias.dtype))


def _rotate_skip(half: Half, matrix: Tensor) -> list[Any]:
    """Add what the rotated skip has more than the plain one to what the half writes to the stream."""
    change = matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    skip = _Skip(change / half.factor)
    return [half.norm.register_forward_pre_hook(skip.keep), half.writer.register_forward_hook(skip.add)]


class _Skip:
    """Keeps the stream that a norm reads until the half writes to it."""

    def __init__(self, change: Tensor):
        self._change = change
        self._stream: list[Tensor] = []

    def keep(self, module: nn.Module, args: tuple) -> None:
        self._stream[:] = [args[0]]

    def add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not self._stream:  # a layer that is called by itself has no stream to rotate
            return output
        self._change = self._change.to(output.device, output.dtype)
        return output + self._stream.pop() @ self._change
