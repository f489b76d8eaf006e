"""What TopK autoencoders of ours and of sae-lens explain of a language model: same activations, k, tokens and order.

Both see the activations at mean square one. Each is trained with the learning rates below, and the better of its own is
compared: variance that is left unexplained on held-out text, and the loss that the model keeps when reconstructions
take the place of the activations. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.features_peer import FeaturePeer, installed
from benchmarks.harness import Options, Row, main
from gossamer.features.activation_rules import TopK
from gossamer.features.losses import unexplained_variance
from gossamer.features.sae import SAE
from gossamer.features.saelens_format import load_saelens
from gossamer.features.training import TrainingSettings, train
from gossamer.papers.language_features import LanguageFeatures, language_features

FEATURES, K, BATCH, STEPS = 4096, 32, 1024, 600
RATES = (3e-4, 1e-3)
_TOLERANCE = 0.99  # seeds alone move either figure by about as much


def measure(options: Options) -> list[Row]:
    """Unexplained variance and lost loss, ours against theirs."""
    if not installed(options.peer_python):
        return []
    assert options.peer_python is not None
    features, count, steps = language_features(), 256 if options.quick else FEATURES, 5 if options.quick else STEPS
    order = _order(features, steps)
    found = {"ours": [], "sae-lens": []}
    for rate in RATES:
        ours = _ours(features, order, count, rate)
        found["ours"].append(_judged(features, ours))
        theirs, version = _theirs(features, order, count, rate, float(ours.scale), options.peer_python)
        found["sae-lens"].append(_judged(features, theirs))
    best = {name: min(judged) for name, judged in found.items()}
    case = (
        f"{len(order)} activations of {features.d_in}, {count} features, k = {K}, batches of {BATCH}, {features.site}"
    )
    names = ("variance left unexplained by a TopK autoencoder", "loss that a TopK autoencoder does not recover")
    return [_row(name, case, best["ours"][i], best["sae-lens"][i], version, options) for i, name in enumerate(names)]


def _order(features: LanguageFeatures, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = len(features.training)
    epochs = -(-steps * BATCH // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[: steps * BATCH]


def _ours(features: LanguageFeatures, order: Tensor, count: int, rate: float) -> SAE:
    sae, everything = SAE(features.d_in, count, TopK(K)), features.training[:]

    def batches(begin: int):
        for part in order.split(BATCH)[begin:]:
            yield everything[part].float()

    settings = TrainingSettings(
        steps=len(order) // BATCH, batch_size=BATCH, learning_rate=rate, final_rate=0.1, dead_after=200_000
    )
    train({"ours": sae}, batches, settings, progress=False)
    return sae


def _theirs(
    features: LanguageFeatures, order: Tensor, count: int, rate: float, scale: float, python: Path
) -> tuple[SAE, str]:
    with tempfile.TemporaryDirectory() as name, FeaturePeer(python, torch.get_num_threads()) as peer:
        folder = Path(name)
        np.save(folder / "x.npy", features.training[:].float().numpy() * np.float32(scale))
        np.save(folder / "held.npy", features.held_out[:].float().numpy() * np.float32(scale))
        np.save(folder / "order.npy", order.numpy())
        peer.load(**{part: folder / f"{part}.npy" for part in ("x", "held", "order")})
        steps = len(order) // BATCH
        peer.autoencoder("sae-lens", features.d_in, count, K, BATCH, steps, rate)
        answer = {"target": str(folder / "output.npy"), "save_to": str(folder / "sae")}
        peer.run("fit", library="sae-lens", batch=BATCH, **answer)
        sae = load_saelens(folder / "sae")[0]
        held, output = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("held", "output"))
        with torch.no_grad():
            torch.testing.assert_close(sae(held).output, output, rtol=1e-3, atol=1e-3)
        sae.scale.fill_(scale)
        return sae, peer.versions["sae-lens"]


@torch.no_grad()
def _judged(features: LanguageFeatures, sae: SAE) -> tuple[float, float]:
    held = features.held_out[:].float()
    unexplained = float(unexplained_variance(sae(held).output, held))
    return unexplained, 1 - features.splice({"sae": sae})["sae"].recovered


def _row(operation: str, case: str, ours: float, theirs: float, version: str, options: Options) -> Row:
    bar = 0.0 if options.quick else _TOLERANCE
    ratio = theirs / ours
    return Row(
        operation=operation,
        case=case,
        peer=f"sae-lens {version}",
        ours=ours,
        theirs=theirs,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        bar=bar,
        met=ratio >= bar,
        unit="",
    )


if __name__ == "__main__":
    main(measure)
