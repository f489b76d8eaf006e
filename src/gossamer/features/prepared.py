"""A model, an autoencoder of one of its places, and where every feature fires: from the cache as far as it is there.

Capturing, training and encoding take minutes and are kept, each under the settings that it depends on. Whatever was
interrupted goes on where it was, and whoever asks again for the same gets it at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError, ModelError, UnknownNameError
from gossamer.features.activation_rules import ActivationRule, FeatureChoice, JumpReLU, MutualChoice, ReLU, TopK
from gossamer.features.latent_cache import LatentCache
from gossamer.features.latent_capture import cache_of_store
from gossamer.features.latent_facts import encoder_fingerprint
from gossamer.features.matching_pursuit import MatchingPursuitSAE
from gossamer.features.phased_choice import PhasedChoice
from gossamer.features.sae import SAE
from gossamer.features.saelens_format import load_saelens, save_saelens
from gossamer.features.store import ActivationStore, capture, find_site, model_fingerprint
from gossamer.features.store_facts import text_fingerprint
from gossamer.features.training import TrainingSettings, train
from gossamer.models import calibration_batches, load, read_text
from gossamer.models.packages import cache_directory

PENALISED = ("relu", "jumprelu")
RULES = ("topk", "batch-topk", "feature-choice", "phased", "matching-pursuit", *PENALISED)


@dataclass(frozen=True, kw_only=True)
class DictionarySettings:
    """Which model, place, text and autoencoder.

    Parameters
    ----------
    model
        As :func:`gossamer.load` takes it.
    site
        Number of a block, or name of the module whose output is explained.
    sae
        Directory of an autoencoder in the format of SAELens; None trains one.
    width
        Features; by default eight times the size of an activation.
    k
        Features of a token, for rules that count them.
    rule
        ``topk``, ``batch-topk``, ``feature-choice``, ``phased`` (the one for four fifths of the steps, then the other),
        ``matching-pursuit``, ``relu`` or ``jumprelu``.
    sparsity
        Weight of the penalty that ``relu`` and ``jumprelu`` need.
    tokens, length
        Of text to train on and to look at, and of a document.
    texts
        As :func:`gossamer.read_text` takes them; each gives equally many documents.
    steps, batch_size, learning_rate
        Of training.
    seed
        Of the choice of text, the directions at the beginning and the order of training.
    device, dtype
        Of the model.
    stored
        Type of stored activations, ``float16`` or ``float32``.
    """

    model: str = "demo"
    site: int | str
    sae: str | None = None
    width: int | None = None
    k: int = 32
    rule: str = "topk"
    sparsity: float = 3e-3
    tokens: int = 100_000
    length: int = 256
    texts: tuple[str, ...] = ("moby-dick", "state-of-the-union")
    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    stored: str = "float16"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UnknownNameError("rule", self.rule, RULES)
        if self.width is not None and self.width < 2:
            raise ConfigurationError(f"width is {self.width}; there must be 2 features or more")
        if self.k < 1:
            raise ConfigurationError(f"k is {self.k}; it must be at least 1, such as 32")
        if self.sae is None and self.rule not in PENALISED and self.width is not None and self.k > self.width:
            raise ConfigurationError(
                f"k is {self.k} and width {self.width}; a token cannot have more than all features"
            )
        if self.length < 8 or self.tokens < 4 * self.length:
            raise ConfigurationError(
                f"tokens is {self.tokens} and length {self.length}; give documents of 8 or more, and at least four"
            )
        if not self.texts:
            raise ConfigurationError("there is no text; name at least one, such as moby-dick")
        if not self.sparsity > 0:
            raise ConfigurationError(f"sparsity is {self.sparsity}; it must be above 0")

    def autoencoder(self, size: int) -> SAE:
        """Of activations of so many numbers, not trained yet."""
        width = self.width or 8 * size
        if self.rule == "matching-pursuit":
            return MatchingPursuitSAE(size, width, self.k, seed=self.seed)
        rules: dict[str, Callable[[], ActivationRule]] = {
            "topk": lambda: TopK(self.k),
            "batch-topk": lambda: MutualChoice(self.k),
            "feature-choice": lambda: FeatureChoice(self.k),
            "phased": lambda: PhasedChoice(self.k, max(1, 4 * self.steps // 5)),
            "relu": ReLU,
            "jumprelu": JumpReLU,
        }
        return SAE(size, width, rules[self.rule](), self.seed)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A dictionary that is ready to be looked at.

    Attributes
    ----------
    model, tokenizer, licence
        The model.
    site
        Name of the module.
    sae
        In evaluation mode, on the model's device.
    metadata
        What a loaded file says of its use; empty for one that was trained here.
    cache
        Where its features are active.
    documents, held_out
        Token ids, ``(1, length)`` each: those that were captured, and others.
    store
        Activations of the captured documents.
    settings
        What was asked for.
    """

    model: nn.Module
    tokenizer: Any
    licence: str
    site: str
    sae: SAE
    metadata: dict[str, Any]
    cache: LatentCache
    documents: list[Tensor]
    held_out: list[Tensor]
    store: ActivationStore
    settings: DictionarySettings = field(repr=False)


def prepare(
    settings: DictionarySettings, progress: bool = True, say: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Load the model, capture, train or load the autoencoder, and find out where its features are active.

    Parameters
    ----------
    settings
        Which model, place, text and autoencoder.
    progress
        Whether to show progress bars.
    say
        Gets a line before each step.

    Raises
    ------
    UnknownNameError
        If there is no such model, layer or text; names the nearest.
    ConfigurationError
        If k is above the width.
    ModelError
        If the autoencoder is of activations of another size, or its file says that it is of another place.
    CalibrationError
        If the text is too short.
    NonFiniteError
        If an activation is NaN or infinite.
    CheckpointError
        If a file is damaged, or of a newer version.
    """
    given = None if settings.sae is None else load_saelens(settings.sae)
    loaded = load(settings.model, dtype=settings.dtype, device=settings.device)
    if loaded.licence:
        say(loaded.licence)
    site, _ = find_site(loaded.model, settings.site)
    if given is not None:
        _check_site(settings, given[1], site)
    documents, held_out = documents_of(settings, loaded.tokenizer)
    folder = cache_directory() / "dictionaries" / _key(model_fingerprint(loaded.model), site)
    text = _key(text_fingerprint(documents), settings.stored)
    say(f"{site}: activations of {sum(d.numel() for d in documents):,} tokens in {folder / f'activations-{text}'}")
    store = capture(loaded.model, documents, site, folder / f"activations-{text}", settings.stored, progress=progress)
    sae, metadata = given or (
        _trained(settings, store, folder / f"trained-{_training_key(settings, text)}", progress, say),
        {},
    )
    if sae.d_in != store.facts.size:
        raise ModelError(
            f"the autoencoder is of activations of {sae.d_in} numbers, those of {site} have {store.facts.size}; "
            "choose the place that it was trained on"
        )
    sae = sae.to(settings.device).eval()
    latents = folder / f"latents-{_key(text, encoder_fingerprint(sae))}"
    cache = cache_of_store(store, documents, sae, latents, progress=progress)
    return Prepared(
        loaded.model, loaded.tokenizer, loaded.licence, site, sae, metadata, cache, documents, held_out, store, settings
    )


def documents_of(settings: DictionarySettings, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Documents to capture, and one in twenty to judge by; no two overlap.

    Raises
    ------
    CalibrationError
        If a text has fewer than four documents.
    """
    wanted = -(-settings.tokens // settings.length // len(settings.texts))
    captured: list[Sequence[Tensor]] = []
    held_out: list[Sequence[Tensor]] = []
    for text in settings.texts:
        content = read_text(text)
        there = len(tokenizer(content, verbose=False)["input_ids"]) // settings.length
        judging = max(1, min(wanted, there) // 20)
        training = min(wanted, there - judging)
        if training < 2:
            raise CalibrationError(
                f"{text} has {there} documents of {settings.length} tokens; give a longer text, or a smaller length"
            )
        windows = calibration_batches(content, tokenizer, training + judging, settings.length, settings.seed)
        captured.append(windows[:training])
        held_out.append(windows[training:])
    return in_turn(captured), in_turn(held_out)


def in_turn(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The first of every group, then the second of every group that has one, and so on."""
    longest = max(map(len, groups))
    return [group[place] for place in range(longest) for group in groups if place < len(group)]


def _trained(
    settings: DictionarySettings,
    store: ActivationStore,
    folder: Path,
    progress: bool,
    say: Callable[[str], None],
) -> SAE:
    file = folder / "sae"
    if not file.is_dir():
        sae = settings.autoencoder(store.facts.size).to(settings.device)
        say(f"training {sae.n_features:,} features with {settings.rule}, kept in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        batch = min(settings.batch_size, len(store))
        how = TrainingSettings(
            steps=settings.steps,
            batch_size=batch,
            learning_rate=settings.learning_rate,
            sparsity=settings.sparsity if settings.rule in PENALISED else 0.0,
            dead_after=max(len(store), 10 * batch),
            seed=settings.seed,
        )

        def batches(begin: int) -> Iterator[Tensor]:
            return (x.to(settings.device) for x in store.batches(batch, settings.seed, begin))

        train({"sae": sae}, batches, how, checkpoint=folder / "checkpoint.pt", every=100, progress=progress)
        save_saelens(sae, file, {"model_name": settings.model, "hook_name": store.facts.site})
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return load_saelens(file)[0]


def _check_site(settings: DictionarySettings, metadata: dict[str, Any], site: str) -> None:
    """Refuse an autoencoder that gossamer has written for another place; names of other libraries are not compared."""
    written = metadata.get("hook_name")
    if isinstance(written, str) and written != site and "." in written and written.split(".")[0] == site.split(".")[0]:
        raise ModelError(f"{settings.sae} is an autoencoder of {written}, not of {site}; give --site {written}")


def _training_key(settings: DictionarySettings, text: str) -> str:
    named = ("width", "k", "rule", "sparsity", "steps", "batch_size", "learning_rate", "seed")
    return _key(text, {name: value for name, value in asdict(settings).items() if name in named})


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
