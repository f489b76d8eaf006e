"""Sparse autoencoders in the files of SAELens: read and written, without the library.

A directory with ``cfg.json`` and ``sae_weights.safetensors``. There is no scale of activations in it, so ours is
multiplied into the weights, and what rules have learned of a batch becomes thresholds: a reader of SAELens gets
exactly the features and outputs that ours gives in evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.features.activation_rules import (
    RULES,
    ActivationRule,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    MutualChoice,
    ReLU,
    TopK,
)
from gossamer.features.matching_pursuit import MatchingPursuit, MatchingPursuitSAE
from gossamer.features.phased_choice import PhasedChoice
from gossamer.features.sae import SAE
from gossamer.storage.atomic import atomic_directory

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = 1
_PURSUIT = "matching_pursuit"
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def save_saelens(
    sae: SAE, directory: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write an autoencoder for SAELens; the directory appears whole or not at all.

    Parameters
    ----------
    sae
        With :class:`TopK` and :class:`GradientTopK` it becomes a ``topk``, with :class:`ReLU` a ``standard`` one, with
        all others, by their thresholds, a ``jumprelu``. A :class:`MatchingPursuitSAE` becomes a ``matching_pursuit``
        one, whose values are ours divided by the scale, for its features must have the length one.
    directory
        Where.
    metadata
        What SAELens keeps about its use, such as ``model_name``, ``hook_name``, ``hook_layer``.
    overwrite
        Whether to replace a directory that has something in it.

    Raises
    ------
    ConfigurationError
        If the rule has no thresholds yet, or is an orthogonal pursuit.
    OutputError
        If the directory is in use or cannot be written.
    """
    scale = sae.scale.detach()
    weights = {
        "W_enc": (sae.encoder.detach() * scale).t(),
        "b_enc": sae.encoder_bias.detach(),
        "W_dec": sae.decoder.detach() / scale,
        "b_dec": sae.bias.detach() / scale,
    }
    config: dict[str, Any] = {
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": next(name for name, kind in _TYPES.items() if kind == sae.decoder.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    rule = sae.activation
    if isinstance(rule, MatchingPursuit):
        if rule.pursuit != "mp":
            raise ConfigurationError("an orthogonal pursuit cannot be written: SAELens has none")
        del weights["W_enc"], weights["b_enc"]
        weights["W_dec"] = sae.decoder.detach()
        stops = {"stop_on_duplicate_support": rule.stop_on_repeat, "residual_threshold": rule.tolerance}
        config |= {"architecture": _PURSUIT, "max_iterations": rule.k, **stops}
    elif isinstance(rule, TopK | GradientTopK):
        config |= {"architecture": "topk", "k": rule.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(rule, ReLU):
        config["architecture"] = "standard"
    else:
        config["architecture"] = "jumprelu"
        weights["threshold"] = _thresholds(rule, sae.n_features).to(sae.decoder.dtype)
    own = {"version": _VERSION, "activation": rule.settings(), "scale": float(scale)}
    config["metadata"] = {**(metadata or {}), "gossamer": own}
    with atomic_directory(directory, overwrite) as part:
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, part / _WEIGHTS)
        (part / _CONFIG).write_text(json.dumps(config, indent=1))


def load_saelens(directory: str | os.PathLike[str]) -> tuple[SAE, dict[str, Any]]:
    """Read an autoencoder that SAELens, or :func:`save_saelens`, has written.

    Parameters
    ----------
    directory
        With ``cfg.json`` and ``sae_weights.safetensors``.

    Returns
    -------
    sae, metadata
        In evaluation mode, and what the file says about its use.

    Raises
    ------
    CheckpointError
        If files are missing or damaged, of a newer version, or of an architecture that there is no rule for.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / _CONFIG).read_text())
        weights = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no autoencoder of SAELens ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / _CONFIG} does not describe an autoencoder")
    metadata = dict(config.get("metadata") or {})
    own = metadata.pop("gossamer", None) or {}
    if own.get("version", _VERSION) != _VERSION:
        raise CheckpointError(
            f"{folder} is of version {own['version']}, this gossamer reads {_VERSION}; update gossamer"
        )
    _check(folder, config, weights)
    scale = float(own.get("scale", 1.0))
    if config["architecture"] == _PURSUIT:
        return _pursuing(config, weights, scale), metadata
    return _built(folder, config, weights, scale), metadata


def _pursuing(config: dict[str, Any], weights: dict[str, Tensor], scale: float) -> MatchingPursuitSAE:
    with_bias = bool(config.get("apply_b_dec_to_input", True))  # without, theirs does not use it at all
    sae = MatchingPursuitSAE(
        int(config["d_in"]),
        int(config["d_sae"]),
        int(config.get("max_iterations") or config["d_in"]),
        float(config.get("residual_threshold", 1e-2)),
        with_bias,
        stop_on_repeat=bool(config.get("stop_on_duplicate_support", True)),
    ).to(weights["W_dec"].dtype)
    with torch.no_grad():
        sae.scale.fill_(scale)
        sae.decoder.copy_(weights["W_dec"])
        sae.bias.copy_(weights["b_dec"] * (scale if with_bias else 0.0))
    return sae.eval()


def _built(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], scale: float) -> SAE:
    encoder, decoder = weights["W_enc"].t(), weights["W_dec"]
    encoder_bias, bias = weights["b_enc"], weights["b_dec"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = decoder.norm(dim=1, keepdim=True)
        encoder, decoder, encoder_bias = encoder * norms, decoder / norms, encoder_bias * norms[:, 0]
    if not config.get("apply_b_dec_to_input", True):
        encoder_bias = encoder_bias + encoder @ bias
    sae = SAE(int(config["d_in"]), int(config["d_sae"]), _rule(folder, config)).to(decoder.dtype)
    with torch.no_grad():
        sae.scale.fill_(scale)
        sae.encoder.copy_(encoder / scale)
        sae.decoder.copy_(decoder * scale)
        sae.encoder_bias.copy_(encoder_bias)
        sae.bias.copy_(bias * scale)
        if isinstance(sae.activation, JumpReLU):
            sae.activation.log_threshold.copy_(weights["threshold"].clamp(min=0).log())
    return sae.eval()


def _rule(folder: Path, config: dict[str, Any]) -> ActivationRule:
    match config.get("architecture"):
        case "topk":
            return TopK(int(config["k"]))
        case "standard":
            return ReLU()
        case "jumprelu":
            return JumpReLU()
        case other:
            raise CheckpointError(
                f"{folder} has architecture {other!r}; it must be topk, standard, jumprelu or {_PURSUIT}"
            )


def _check(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    for key in ("d_in", "d_sae", "architecture"):
        if key not in config:
            raise CheckpointError(f"{folder / _CONFIG} lacks {key!r}; the file is damaged")
    unusual = {"normalize_activations": "none", "reshape_activations": "none"}
    for key, usual in unusual.items():
        if config.get(key, usual) != usual:
            raise CheckpointError(f"{folder} wants {key} {config[key]!r}; only {usual!r} can be read")
    size, features = int(config["d_in"]), int(config["d_sae"])
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (features, size), "b_dec": (size,)}
    if config["architecture"] != _PURSUIT:
        shapes |= {"W_enc": (size, features), "b_enc": (features,)}
    if config["architecture"] == "jumprelu":
        shapes["threshold"] = (features,)
    for name, shape in shapes.items():
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != shape:
            raise CheckpointError(f"{folder / _WEIGHTS}: {name} is {found} instead of {shape}; the file is damaged")


def _thresholds(rule: ActivationRule, features: int) -> Tensor:
    """What an affinity must exceed."""
    if isinstance(rule, PhasedChoice):
        return _thresholds(rule.feature if rule.feature_phase else rule.mutual, features)
    if isinstance(rule, JumpReLU):
        return rule.thresholds.detach()
    if isinstance(rule, MutualChoice):
        found = rule.threshold.expand(features)
    elif isinstance(rule, FeatureChoice):
        found = rule.thresholds
    else:
        raise ConfigurationError(f"{type(rule).__name__} cannot be written; rules are {', '.join(sorted(RULES))}")
    if bool(found.isnan().all()):
        raise ConfigurationError(f"{type(rule).__name__} has no thresholds yet; train it before it is saved")
    # ours are reached, theirs are exceeded; a feature that was never chosen has none, and is never active
    return torch.nextafter(found.nan_to_num(torch.inf), found.new_tensor(-torch.inf)).clamp(min=0)
