"""An autoencoder that pursues: its guarantees, its gradients, its stops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import TopK
from gossamer.features.matching_pursuit import MatchingPursuit, MatchingPursuitSAE
from gossamer.features.sae import SAE
from gossamer.features.training import TrainingSettings, train

SIZE, FEATURES = 12, 30


def activations(seed, tokens=20):
    return torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def prepared(**options):
    sae = MatchingPursuitSAE(SIZE, FEATURES, **{"k": 4, **options}).eval()
    sae.prepare(activations(0) * 3 + 1)
    return sae


def naive(sae, x, k, tolerance=0.0, stop_on_repeat=False):
    """Codes of one activation, step by step."""
    residual = x * sae.scale - sae.bias
    code, chosen = torch.zeros(FEATURES), set()
    for _ in range(k):
        common = sae.decoder @ residual
        best = int(common.argmax())
        if common[best] <= 0 or float(residual.norm()) <= tolerance * float(sae.scale):
            break
        code[best] += common[best]
        residual = residual - common[best] * sae.decoder[best]
        if stop_on_repeat and best in chosen:
            break
        chosen.add(best)
    return code


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 25), st.sampled_from([0.0, 1.5, 4.0]), st.booleans())
def test_codes_are_those_of_a_plain_pursuit(seed, k, tolerance, stop_on_repeat):
    sae, x = prepared(k=k, tolerance=tolerance, stop_on_repeat=stop_on_repeat), activations(seed) * 3 + 1
    with torch.no_grad():
        found = sae.encode(x).to_dense()
        expected = torch.stack([naive(sae, row, k, tolerance, stop_on_repeat) for row in x])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_every_step_lowers_the_error_by_what_it_takes():
    sae, x = prepared(k=3), activations(1)
    with torch.no_grad():
        found = sae.pursue(x, 24)
        energy = [(x - step).square().sum(1) * sae.scale**2 for step in sae.path(x, range(25))]
    for step in range(24):
        torch.testing.assert_close(energy[step] - found.values[:, step] ** 2, energy[step + 1], rtol=1e-3, atol=1e-4)
    assert all(bool((after < before).all()) for before, after in pairwise(energy[:10]))
    last = found.atoms[:, -1]
    assert float((found.residual * sae.decoder[last]).sum(1).abs().max()) < 1e-4
    assert bool((sae.encode(x).counts <= 3).all())


def test_path_holds_the_reconstructions_of_fewer_and_of_more_steps():
    for pursuit in ("mp", "omp"):
        sae, x = prepared(k=3, pursuit=pursuit), activations(2).view(4, 5, SIZE)
        with torch.no_grad():
            nothing, three, nine = sae.path(x, [0, 3, 9])
            torch.testing.assert_close(three, sae(x).output, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(nine, sae.decode(sae.encode(x, k=9)).view(x.shape), rtol=1e-4, atol=1e-4)
        assert nothing.equal((sae.bias / sae.scale).expand(4, 5, SIZE))


@pytest.mark.parametrize("options", [{}, {"stop_on_repeat": True, "k": 20}, {"dropout": 0.4}, {"pursuit": "omp"}])
def test_gradients_are_those_of_finite_differences(options):
    sae = MatchingPursuitSAE(SIZE, FEATURES, **{"k": 5, **options}).double()
    x = activations(3, 6).double()
    sae.prepare(x * 2 + 1)
    sae.train()

    def loss():
        sae._generator.manual_seed(0)
        return (sae(x).output - x).square().sum()

    loss().backward()
    analytic, step = sae.decoder.grad.clone(), 1e-6
    for place in [(0, 0), (7, 3), (21, 11), (29, 5)]:
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                sae.decoder[place] += sign * step
                slopes.append(loss())
                sae.decoder[place] -= sign * step
        torch.testing.assert_close(analytic[place], (slopes[0] - slopes[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_an_orthogonal_pursuit_explains_no_worse():
    x = activations(4)
    with torch.no_grad():
        plain, fitted = ((prepared(pursuit=kind)(x).output - x).square().sum() for kind in ("mp", "omp"))
    assert fitted <= plain


def test_a_decoder_that_changes_is_pursued_anew():
    sae, x = prepared(), activations(5)
    with torch.no_grad():
        before = sae.encode(x).to_dense()
        sae.decoder.copy_(sae.decoder.flip(0))
        assert sae.encode(x).to_dense().allclose(before.flip(1), atol=1e-4)


def test_training_is_that_of_any_other_and_keeps_directions_at_length_one():
    atoms = torch.nn.functional.normalize(activations(6, 24), dim=1)

    def batches(begin):
        while True:
            draw = torch.Generator().manual_seed(begin)
            active = torch.rand(256, 24, generator=draw).argsort(1) < 2
            yield (active * (0.5 + torch.rand(256, 24, generator=draw))) @ atoms
            begin += 1

    sae, plain = MatchingPursuitSAE(SIZE, FEATURES, k=2, bias=False), SAE(SIZE, FEATURES, TopK(2))
    wanted = TrainingSettings(steps=150, batch_size=256, learning_rate=1e-2, auxiliary="none")
    history = train({"mp": sae, "topk": plain}, batches, wanted, progress=False, log_every=149)["mp"].history
    assert history[-1]["unexplained"] < 0.5 * history[0]["unexplained"]
    assert history[-1]["active"] <= 2
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(FEATURES))
    assert not sae.bias.any()
    assert set(dict(sae.named_parameters())) == {"decoder", "bias"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="k is 0"):
        MatchingPursuitSAE(4, 8, k=0)
    with pytest.raises(ConfigurationError, match="tolerance is -1"):
        MatchingPursuitSAE(4, 8, tolerance=-1)
    with pytest.raises(ConfigurationError, match="mp or omp"):
        MatchingPursuitSAE(4, 8, pursuit="bp")
    with pytest.raises(ConfigurationError, match="only 8 features"):
        MatchingPursuitSAE(4, 8, k=9, pursuit="omp")
    with pytest.raises(ConfigurationError, match="dropout"):
        MatchingPursuitSAE(4, 8, dropout=1.0)
    with pytest.raises(ConfigurationError, match="dropout is for mp"):
        MatchingPursuitSAE(4, 8, 2, pursuit="omp", dropout=0.1)
    with pytest.raises(ConfigurationError, match="MatchingPursuitSAE"):
        SAE(4, 8, MatchingPursuit(2))(torch.ones(2, 4))
    sae = prepared()
    with pytest.raises(NonFiniteError, match="token 1"):
        sae.encode(torch.tensor([[0.0] * SIZE, [float("nan")] * SIZE]))
    with pytest.raises(ConfigurationError, match="from 0 up"):
        sae.path(activations(0), [-1])
    with torch.no_grad():
        sae.decoder[3] = 0
    with pytest.raises(ConfigurationError, match="atom 3"):
        sae.encode(activations(0))
