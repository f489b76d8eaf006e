"""Sparse autoencoders against dense ones with the same matches, and their rules by themselves."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import FeatureChoice, GradientTopK, JumpReLU, MutualChoice, ReLU, TopK
from gossamer.features.sae import SAE


def batch(tokens=12, size=8, seed=0):
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoencoder(rule, seed=0):
    sae = SAE(8, 20, rule, seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.encoder_bias += 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
        sae.bias += 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
        sae.encoder += 0.1 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
        sae.scale.fill_(0.7)
    return sae


RULES = [ReLU(), TopK(3), MutualChoice(3), FeatureChoice(3), GradientTopK(3)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_values_output_and_gradients_are_those_of_a_dense_autoencoder_with_the_same_matches(rule):
    sae, x = autoencoder(copy.deepcopy(rule)), batch().requires_grad_()
    found = sae(x)
    weight = batch(seed=5)
    ours = torch.autograd.grad((found.output * weight).sum(), [x, *sae.parameters()])
    mask = found.codes.to_dense() != 0
    dense = ((x * sae.scale - sae.bias) @ sae.encoder.T + sae.encoder_bias).relu() * mask
    output = (dense @ sae.decoder + sae.bias) / sae.scale
    torch.testing.assert_close(found.output, output)
    torch.testing.assert_close(sae.affinity(x) * mask, dense.detach())
    theirs = torch.autograd.grad((output * weight).sum(), [x, *sae.parameters()])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "rule", [MutualChoice(3), FeatureChoice(3), TopK(3), JumpReLU(0.2)], ids=lambda r: type(r).__name__
)
def test_once_trained_a_token_does_not_depend_on_the_others(rule):
    sae = autoencoder(copy.deepcopy(rule))
    for seed in range(30):
        sae(batch(64, seed=seed))
    sae.eval()
    x = batch(40, seed=99)
    together = sae.encode(x)
    alone = torch.cat([sae.encode(one[None]).to_dense() for one in x])
    torch.testing.assert_close(together.to_dense(), alone)
    assert 0 < float(together.counts.double().mean()) < 20


def test_thresholds_keep_about_as_many_as_the_batch_rule_did():
    for rule in (MutualChoice(3, memory=0.9), FeatureChoice(3, zipf=None, memory=0.9)):
        sae = autoencoder(rule)
        for seed in range(60):
            sae(batch(256, seed=seed))
        sae.eval()
        assert 2 < float(sae.encode(batch(2000, seed=1234)).counts.double().mean()) < 4


def test_without_training_thresholds_are_missing_and_it_says_so():
    sae = autoencoder(MutualChoice(3)).eval()
    with pytest.warns(UserWarning, match="has not been trained"):
        assert len(sae.encode(batch()).values) == 3 * 12


def test_effects_decide_between_features_of_like_affinity():
    sae, x = autoencoder(GradientTopK(2, beta=100.0)), batch()
    plain = SAE.encode(sae, x)
    assert plain.to_dense().equal(autoencoder(TopK(2)).encode(x).to_dense())
    gradient = sae.decoder[7].detach().expand(12, 8) * 5
    looked = sae.encode(x, gradient)
    wanted = sae.affinity(x)[:, 7] > 0
    assert (looked.to_dense()[:, 7] != 0).sum() >= (plain.to_dense()[:, 7] != 0).sum()
    ranked = sae.affinity(x) * (1 + 100 * (gradient @ sae.decoder.T).abs() / (gradient @ sae.decoder.T).abs().mean())
    best = ranked.topk(2, 1).indices
    assert (looked.to_dense() != 0).gather(1, best)[ranked.gather(1, best) > 0].all()
    assert wanted.any()
    zero = autoencoder(GradientTopK(2, beta=0.0))
    assert zero.encode(x, gradient).to_dense().equal(plain.to_dense())


def test_the_jump_has_the_gradient_of_its_rectangle():
    width = 0.4
    sae, x = autoencoder(JumpReLU(0.3, width)), batch()
    found = sae(x)
    weight = batch(seed=5)
    (ours,) = torch.autograd.grad((found.output * weight).sum(), sae.activation.log_threshold)
    with torch.no_grad():
        before = (x * sae.scale - sae.bias) @ sae.encoder.T + sae.encoder_bias
        upstream = (weight / sae.scale) @ sae.decoder.T
        near = ((before - 0.3).abs() < width / 2) & (before > 0)
        of_threshold = -(upstream * near * 0.3 / width).sum(0)
    torch.testing.assert_close(ours, of_threshold * 0.3, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.codes.to_dense(), before * (before > 0.3), rtol=1e-6, atol=1e-9)


def test_every_feature_gets_tokens_when_features_choose():
    sae = autoencoder(FeatureChoice(5, zipf=None))
    with torch.no_grad():
        sae.encoder_bias[4] = -0.2  # a feature that tokens would hardly choose
    alive = sum(sae(batch(64, seed=seed)).codes.activity() for seed in range(20)) > 0
    assert alive.all()


def planted(tokens, seed, size=16, features=24):
    generator = torch.Generator().manual_seed(7)
    atoms = torch.nn.functional.normalize(torch.randn(features, size, generator=generator), dim=1)
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, features, generator=draw).argsort(1) < 2
    return (active * (0.5 + torch.rand(tokens, features, generator=draw))) @ atoms, atoms


def test_training_finds_planted_directions():
    sae = SAE(16, 48, TopK(2))
    data, atoms = planted(512, 0)
    sae.prepare(data)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
    for step in range(400):
        x = planted(256, step + 1)[0]
        loss = (sae(x).output - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        sae.straighten_gradient_()
        optimizer.step()
        sae.normalize_()
    x = planted(1000, 10_001)[0]
    unexplained = (sae.eval()(x).output - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(unexplained) < 0.2
    assert float((atoms @ sae.decoder.detach().T).amax(1).mean()) > 0.9


def test_scale_and_bias_come_from_a_sample():
    sae, x = SAE(8, 20, TopK(3)).double(), 30 * batch(500) + 4
    sae.prepare(x)
    scaled = x * sae.scale
    torch.testing.assert_close(scaled.square().sum(1).mean(), torch.tensor(8.0, dtype=torch.float64))
    torch.testing.assert_close(sae.bias.detach(), scaled.mean(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAE(8, 20, TopK(0)), "k is 0"),
        (lambda: SAE(8, 20, TopK(21)), "only 20 features"),
        (lambda: SAE(0, 20, TopK(2)), "d_in is 0"),
        (lambda: GradientTopK(2, beta=-1), "beta is -1"),
        (lambda: JumpReLU(0.0), "threshold is 0.0"),
        (lambda: autoencoder(TopK(2)).encode(torch.zeros(3, 9)), "last dimension must be 8"),
        (lambda: autoencoder(TopK(2)).encode(batch(), batch(3)), "shape of x"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_damaged_activations_are_named():
    x = batch()
    x[5, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="token 5"):
        autoencoder(TopK(2)).encode(x)
