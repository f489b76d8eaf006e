"""Files of SAELens: there and back, and against the library itself where it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.errors import CheckpointError, ConfigurationError, OutputError
from gossamer.features.activation_rules import FeatureChoice, GradientTopK, JumpReLU, MutualChoice, ReLU, TopK
from gossamer.features.matching_pursuit import MatchingPursuitSAE
from gossamer.features.sae import SAE
from gossamer.features.saelens_format import load_saelens, save_saelens

MAKERS = {
    "TopK": lambda: TopK(4),
    "GradientTopK": lambda: GradientTopK(4),
    "ReLU": lambda: ReLU(),
    "MutualChoice": lambda: MutualChoice(4),
    "FeatureChoice": lambda: FeatureChoice(4),
    "JumpReLU": lambda: JumpReLU(0.3),
}


def activations(seed, tokens=64):
    return 5 * torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed)) + 1


def trained(name):
    sae = SAE(12, 40, MAKERS[name](), seed=1)
    sae.prepare(activations(0, 500))
    with torch.no_grad():
        sae.encoder_bias += 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    for seed in range(20):
        sae(activations(seed))
    return sae.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_read_again_explains_the_same(name, tmp_path):
    sae, x = trained(name), activations(99)
    save_saelens(sae, tmp_path / "sae", {"model_name": "demo", "hook_layer": 9})
    again, metadata = load_saelens(tmp_path / "sae")
    assert metadata == {"model_name": "demo", "hook_layer": 9}
    torch.testing.assert_close(again.encode(x).to_dense(), sae.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again(x).output, sae(x).output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.scale, sae.scale)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_alone_say_what_saelens_computes_from_them(name, tmp_path):
    sae, x = trained(name), activations(99)
    save_saelens(sae, tmp_path / "sae")
    config, w = (
        json.loads((tmp_path / "sae" / "cfg.json").read_text()),
        load_file(tmp_path / "sae/sae_weights.safetensors"),
    )
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "topk":
        best = before.topk(config["k"])
        codes = torch.zeros_like(before).scatter(1, best.indices, best.values.relu())
    elif config["architecture"] == "jumprelu":
        codes = before.relu() * (before > w["threshold"])
    else:
        codes = before.relu()
    torch.testing.assert_close(codes, sae.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codes @ w["W_dec"] + w["b_dec"], sae(x).output, rtol=1e-4, atol=1e-4)


def test_variants_of_the_file_are_read(tmp_path):
    sae, x = trained("TopK"), activations(99)
    save_saelens(sae, tmp_path / "sae")
    file, weights = tmp_path / "sae" / "cfg.json", load_file(tmp_path / "sae/sae_weights.safetensors")
    config = json.loads(file.read_text())
    lengths = torch.linspace(0.5, 2, 40)
    moved = {
        **weights,
        "W_dec": weights["W_dec"] * lengths[:, None],
        "W_enc": weights["W_enc"] / lengths,
        "b_enc": weights["b_enc"] / lengths,
    }
    moved["b_enc"] = moved["b_enc"] - moved["b_dec"] @ moved["W_enc"]
    save_file(moved, tmp_path / "sae/sae_weights.safetensors")
    config |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False, "metadata": {}}
    file.write_text(json.dumps(config))
    again, _ = load_saelens(tmp_path / "sae")
    torch.testing.assert_close(again(x).output, sae(x).output, rtol=1e-3, atol=1e-3)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    save_saelens(trained("TopK"), tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    config = json.loads(file.read_text())
    cases = [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"d_sae": 41}, r"W_dec is \(40, 12\) instead of \(41, 12\)"),
        ({"metadata": {"gossamer": {"version": 2}}}, "update gossamer"),
    ]
    for change, message in cases:
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_saelens(tmp_path / "sae")
    with pytest.raises(CheckpointError, match="no autoencoder of SAELens"):
        load_saelens(tmp_path)
    with pytest.raises(OutputError):
        save_saelens(trained("TopK"), tmp_path / "sae")
    with pytest.raises(ConfigurationError, match="no thresholds yet"):
        save_saelens(SAE(12, 40, MutualChoice(4)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens is not installed")
@pytest.mark.parametrize("name", MAKERS)
def test_the_library_reads_ours_and_we_read_what_it_writes(name, tmp_path):
    from sae_lens import SAE as Theirs

    sae, x = trained(name), activations(99)
    save_saelens(sae, tmp_path / "sae", {"model_name": "demo"})
    theirs = Theirs.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x), sae(x).output, rtol=1e-4, atol=1e-4)
    theirs.save_model(tmp_path / "back")
    again, _ = load_saelens(tmp_path / "back")
    torch.testing.assert_close(again(x).output, sae(x).output, rtol=1e-4, atol=1e-4)


def pursuing(**options):
    sae = MatchingPursuitSAE(12, 40, **{"k": 5, **options}, seed=1)
    sae.prepare(activations(0, 500))
    return sae.eval()


@pytest.mark.parametrize("options", [{}, {"tolerance": 6.0}, {"k": 30, "stop_on_repeat": True}, {"bias": False}])
def test_a_pursuit_is_written_with_directions_of_length_one(options, tmp_path):
    sae, x = pursuing(**options), activations(99)
    save_saelens(sae, tmp_path / "sae")
    again, _ = load_saelens(tmp_path / "sae")
    torch.testing.assert_close(again.encode(x).to_dense(), sae.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again(x).output, sae(x).output, rtol=1e-4, atol=1e-4)
    w = load_file(tmp_path / "sae/sae_weights.safetensors")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    residual, chosen = x - w["b_dec"], torch.zeros(len(x), 40)
    going = torch.ones(len(x), dtype=torch.bool)
    for _ in range(config["max_iterations"]):
        value, best = (residual @ w["W_dec"].T).relu().max(1)
        before = chosen.clone()
        chosen[going, best[going]] += value[going]
        residual = torch.where(going[:, None], residual - value[:, None] * w["W_dec"][best], residual)
        if config["stop_on_duplicate_support"]:
            going = going & ((chosen != 0) != (before != 0)).any(1)
        going = going & (residual.norm(dim=1) >= config["residual_threshold"])
    torch.testing.assert_close(chosen, sae.encode(x).to_dense() / sae.scale, rtol=1e-3, atol=1e-3)


def test_what_saelens_has_no_pursuit_for_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="orthogonal"):
        save_saelens(pursuing(pursuit="omp"), tmp_path / "sae")
