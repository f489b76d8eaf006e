"""Activations of a real language model, captured once into the cache and shared by the experiments on features.

Every study of sparse features needs the same three things: what a model's middle block puts out over real text, text
of the same kind that nothing was trained on, and a plain autoencoder to study. Here they are made once:

>>> features = language_features()  # doctest: +SKIP
>>> features.training[:4].shape, features.held_out.gradients(slice(0, 4)).shape  # doctest: +SKIP
(torch.Size([4, 576]), torch.Size([4, 576]))
>>> sae = features.reference_sae()  # doctest: +SKIP
>>> features.splice({"TopK": sae})["TopK"].recovered  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer.errors import CalibrationError
from gossamer.features.activation_rules import TopK
from gossamer.features.prepared import in_turn
from gossamer.features.sae import SAE
from gossamer.features.saelens_format import load_saelens, save_saelens
from gossamer.features.splicing import SpliceReport, evaluate_splices
from gossamer.features.store import ActivationStore, capture, find_site
from gossamer.features.training import TrainingSettings, train
from gossamer.models import calibration_batches, load, read_text
from gossamer.models.blocks import find_stacks
from gossamer.models.packages import cache_directory


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which activations.

    Parameters
    ----------
    model
        As :func:`gossamer.models.load` takes it.
    site
        Name of the module whose output is captured, or number of the block; None is the block in the middle.
    texts
        As :func:`gossamer.models.read_text` takes them; each gives equally many documents.
    documents, held_out
        Windows of text to train on, and to judge by; together they do not overlap.
    length
        Tokens of a document.
    skip_first
        Tokens at the beginning of a document that are left out of the stores and never replaced: attention rests on
        one of them, whose activation is a hundred times larger than all others.
    gradients
        Whether gradients of the model's loss are captured too.
    seed
        Of the choice of windows.
    """

    model: str = "demo"
    site: str | int | None = None
    texts: tuple[str, ...] = ("moby-dick", "state-of-the-union")
    documents: int = 256
    held_out: int = 24
    length: int = 256
    skip_first: int = 4
    gradients: bool = True
    seed: int = 0

    def fingerprint(self) -> str:
        """A short text that changes with any of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class LanguageFeatures:
    """A model, its activations, and what can be asked of them.

    Attributes
    ----------
    model, tokenizer
        In float32.
    site
        Name of the module.
    training, held_out
        Stores; ``store[:]`` are activations ``(rows, d)``, ``store.gradients(rows)`` gradients if captured,
        ``store.tokens``, ``store.documents`` and ``store.positions`` where each comes from.
    training_documents, held_out_documents
        Token ids, ``(1, length)`` each; ``store.document(i)`` are the rows of document i.
    folder
        In the cache; what belongs to these activations may be kept there.
    """

    model: nn.Module
    tokenizer: Any
    site: str
    training: ActivationStore
    held_out: ActivationStore
    training_documents: list[Tensor]
    held_out_documents: list[Tensor]
    folder: Path

    @property
    def d_in(self) -> int:
        """Size of an activation."""
        return self.training.facts.size

    def batches(self, size: int, seed: int = 0) -> Any:
        """What :func:`gossamer.features.training.train` takes: shuffled activations to train on."""
        return lambda begin: self.training.batches(size, seed, begin)

    def splice(self, saes: Mapping[str, SAE], documents: int | None = None) -> dict[str, SpliceReport]:
        """What the model loses with each autoencoder in its place, on the first held-out documents."""
        texts, skip = self.held_out_documents[:documents], self.training.facts.skipped
        return evaluate_splices(self.model, self.site, saes, texts, skip, progress=False)

    def reference_sae(
        self, n_features: int = 4096, k: int = 32, steps: int = 2000, batch_size: int = 1024, seed: int = 0
    ) -> SAE:
        """A TopK autoencoder of these activations, trained the first time and then read from the cache."""
        folder = self.folder / f"topk-{n_features}-{k}-{steps}-{batch_size}-{seed}"
        with locked(folder):
            if not folder.is_dir():
                sae = SAE(self.d_in, n_features, TopK(k), seed)
                settings = TrainingSettings(
                    steps=steps, batch_size=batch_size, learning_rate=1e-3, dead_after=100_000, seed=seed
                )
                train({"topk": sae}, self.batches(batch_size, seed), settings, progress=False)
                save_saelens(sae, folder, {"hook_name": self.site})
        return load_saelens(folder)[0]


@lru_cache(maxsize=2)
def language_features(source: Source = Source(), progress: bool = False) -> LanguageFeatures:
    """Load a model and its activations; captures them the first time, which takes minutes.

    Several processes may ask at once: one captures, the others wait for it.

    Raises
    ------
    CalibrationError
        If the texts are too short for so many documents.
    """
    loaded = load(source.model, dtype="float32")
    site = source.site if source.site is not None else len(find_stacks(loaded.model)[0].blocks) // 2
    name = find_site(loaded.model, site)[0]
    training, held_out = documents_of(source, loaded.tokenizer)
    folder = cache_directory() / "features" / f"{source.model.replace('/', '-')}-{name}-{source.fingerprint()}"
    stores = []
    for part, texts in (("training", training), ("held-out", held_out)):
        with locked(folder / part):
            stores.append(
                capture(
                    loaded.model,
                    texts,
                    name,
                    folder / part,
                    skip_first=source.skip_first,
                    progress=progress,
                    gradients=source.gradients,
                )
            )
    return LanguageFeatures(loaded.model, loaded.tokenizer, name, *stores, training, held_out, folder)


def documents_of(source: Source, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to train on and to judge by, ``(1, length)`` each, in turn from all texts."""
    training: list[Sequence[Tensor]] = []
    held_out: list[Sequence[Tensor]] = []
    count = len(source.texts)
    for number, text in enumerate(source.texts):
        for_training, for_judging = (
            part // count + (number < part % count) for part in (source.documents, source.held_out)
        )
        wanted = for_training + for_judging
        content = read_text(text)
        windows = calibration_batches(content, tokenizer, wanted, source.length, source.seed)
        if wanted * source.length > len(tokenizer(content, verbose=False)["input_ids"]):
            raise CalibrationError(f"{text} is too short for {wanted} windows of {source.length} tokens that are apart")
        training.append(windows[:for_training])
        held_out.append(windows[for_training:])
    return in_turn(training), in_turn(held_out)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time work on a path of the cache; the others wait."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
