"""Losses against their formulas, and training that resumes to the bit."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import FeatureChoice, JumpReLU, MutualChoice, ReLU, TopK
from gossamer.features.losses import attribution_penalty, auxiliary_loss, l1_penalty, nested_loss
from gossamer.features.resampling import resample_
from gossamer.features.sae import SAE
from gossamer.features.training import Learner, TrainingSettings, train
from gossamer.features.zipf import ZipfFit, fit_zipf, underuse

SIZE, ATOMS = 16, 24


def planted(seed, tokens=128):
    atoms = torch.nn.functional.normalize(torch.randn(ATOMS, SIZE, generator=torch.Generator().manual_seed(7)), dim=1)
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, ATOMS, generator=draw).argsort(1) < 2
    return (active * (0.5 + torch.rand(tokens, ATOMS, generator=draw))) @ atoms


def batches(begin):
    while True:
        yield planted(begin)
        begin += 1


def test_the_auxiliary_loss_is_the_residual_that_dying_features_leave():
    sae, x = SAE(SIZE, 40, TopK(2)), planted(1)
    sae.prepare(x)
    dead = torch.zeros(40)
    dead[::3] = 1
    explained = sae(x)
    found = auxiliary_loss(sae, x, explained, dead, 4)
    residual = ((x - explained.output) * sae.scale).detach()
    affinity = ((x * sae.scale - sae.bias) @ sae.encoder.T + sae.encoder_bias).relu()
    best = affinity.masked_fill(dead == 0, -1).topk(4, 1).indices
    codes = torch.zeros_like(affinity).scatter(1, best, affinity.gather(1, best))
    expected = (residual - codes @ sae.decoder).square().sum() / residual.square().sum()
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, (sae.encoder, sae.decoder))
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (sae.encoder, sae.decoder)))
    assert not ours[1][1].any(), "features that are alive are left alone"
    assert auxiliary_loss(sae, x, explained, torch.zeros(40), 4) == 0


def test_weights_decide_which_of_the_dying_take_part():
    sae, x = SAE(SIZE, 40, TopK(2)), planted(1)
    weight = torch.full((40,), 1e-3)
    weight[:4] = 1
    loss = auxiliary_loss(sae, x, sae(x), weight, 4)
    (grad,) = torch.autograd.grad(loss, sae.decoder)
    touched = (grad.abs().sum(1) > 0).float()
    assert touched[:4].mean() > touched[4:].mean()


def test_penalties_count_values_at_the_length_of_their_directions():
    sae = SAE(SIZE, 40, ReLU())
    with torch.no_grad():
        sae.decoder *= 3
    codes = sae.encode(planted(1))
    torch.testing.assert_close(l1_penalty(codes, sae.decoder), 3 * codes.to_dense().sum(1).mean())


def test_a_law_of_zipf_is_found_and_shortfall_measured():
    law = ZipfFit(1.2, 3.0, 0.8)
    density = law.at(torch.arange(1, 301)).float()
    broken = density.clone()
    broken[280:] *= 0.1
    broken[299] = 0
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    found = fit_zipf(broken[order])
    assert found.exponent == pytest.approx(1.2, rel=1e-3)
    assert found.shift == pytest.approx(3.0, rel=1e-2)
    short = underuse(broken[order], found)
    assert bool((short[order < 280] == 0).all())
    assert short[order == 299] == 1
    assert bool((short[order >= 280] > 0.5).all())
    with pytest.raises(ConfigurationError, match="at least 3"):
        fit_zipf(torch.tensor([0.1, 0.2, 0.0, 0.0]))


RULES = {
    "top-k": lambda: TopK(2),
    "mutual": lambda: MutualChoice(2),
    "feature": lambda: FeatureChoice(2),
    "relu": lambda: ReLU(),
    "jump": lambda: JumpReLU(0.1, 0.1),
}


def autoencoders():
    return {name: SAE(SIZE, 48, make(), seed=3) for name, make in RULES.items()}


def settings(**options):
    base = {"steps": 40, "batch_size": 128, "learning_rate": 1e-2, "dead_after": 1000, "auxiliary_k": 8}
    common = TrainingSettings(**{**base, **options})
    sparse = TrainingSettings(**{**base, **options, "sparsity": 0.01})
    return {name: sparse if name in ("relu", "jump") else common for name in RULES}


def test_all_rules_explain_more_with_training():
    saes = autoencoders()
    learners = train(saes, batches, settings(steps=100, auxiliary="zipf"), log_every=1, progress=False)
    for name, learner in learners.items():
        first, last = learner.history[0], learner.history[-1]
        assert last["unexplained"] < 0.5 * first["unexplained"], name
        assert not learner.sae.training
        torch.testing.assert_close(learner.sae.decoder.norm(dim=1), torch.ones(48))
    assert learners["top-k"].history[-1]["active"] <= 2


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    whole = train(autoencoders(), batches, settings(), log_every=5, progress=False)

    def interrupted(begin):
        for number, batch in enumerate(batches(begin), begin):
            if number == 27:
                raise KeyboardInterrupt
            yield batch

    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(autoencoders(), interrupted, settings(), file, every=10, log_every=5, progress=False)
    resumed = train(autoencoders(), batches, settings(), file, every=10, log_every=5, progress=False)
    for name, learner in whole.items():
        for key, value in learner.sae.state_dict().items():
            assert value.equal(resumed[name].sae.state_dict()[key]), (name, key)
        assert learner.history == resumed[name].history
        assert learner.density.equal(resumed[name].density)


def test_autoencoders_on_one_stream_are_trained_as_if_alone():
    together = train(autoencoders(), batches, settings(), progress=False)
    alone = train({"mutual": autoencoders()["mutual"]}, batches, settings()["mutual"], progress=False)
    assert together["mutual"].sae.decoder.equal(alone["mutual"].sae.decoder)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    file = tmp_path / "state.pt"
    train({"a": SAE(SIZE, 48, TopK(2))}, batches, TrainingSettings(steps=4), file, every=2, progress=False)
    with pytest.raises(CheckpointError, match="another autoencoder"):
        train({"a": SAE(SIZE, 48, TopK(3))}, batches, TrainingSettings(steps=4), file, progress=False)
    with pytest.raises(CheckpointError, match="instead of"):
        train({"b": SAE(SIZE, 48, TopK(2))}, batches, TrainingSettings(steps=4), file, progress=False)
    file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="delete it"):
        train({"a": SAE(SIZE, 48, TopK(2))}, batches, TrainingSettings(steps=4), file, progress=False)


def test_bad_settings_and_losses_are_refused():
    with pytest.raises(ConfigurationError, match="steps is 0"):
        TrainingSettings(steps=0)
    with pytest.raises(ConfigurationError, match="dead, zipf or none"):
        TrainingSettings(auxiliary="ghost")
    with pytest.raises(ConfigurationError, match="no autoencoder"):
        train({}, batches, TrainingSettings(steps=2), progress=False)
    both = {"a": SAE(SIZE, 48, TopK(2)), "b": SAE(SIZE, 48, TopK(2))}
    with pytest.raises(ConfigurationError, match="choose one"):
        train(both, batches, {"a": TrainingSettings(steps=2), "b": TrainingSettings(steps=3)}, progress=False)
    broken = SAE(SIZE, 48, TopK(2))
    with torch.no_grad():
        broken.encoder_bias[:] = 1e38
        broken.encoder_bias[0] = 3e38
    with pytest.raises(NonFiniteError):
        train({"a": broken}, batches, TrainingSettings(steps=2), progress=False)


def test_rates_rise_and_fall():
    plan = TrainingSettings(steps=100, warmup=0.1, cooldown=0.2)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(50) == 1
    assert plan.rate(99) == pytest.approx(0.05)


def test_nested_losses_are_those_of_the_first_features_alone():
    sae, x = SAE(SIZE, 40, MutualChoice(3)), planted(1)
    sae.prepare(x)
    explained = sae(x)
    dense = explained.codes.to_dense()
    expected = [
        ((dense[:, :size] @ sae.decoder[:size] + sae.bias) / sae.scale - x).square().sum(1).mean()
        for size in (5, 20, 40)
    ]
    found = nested_loss(sae, x, explained, (5, 20))
    torch.testing.assert_close(found, sum(expected) / 3)
    ours = torch.autograd.grad(found, (sae.encoder, sae.decoder), retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(sum(expected) / 3, (sae.encoder, sae.decoder)))
    with pytest.raises(ConfigurationError, match="prefix is 41"):
        nested_loss(sae, x, explained, (41,))


def test_attribution_counts_what_makes_a_difference():
    sae, x = SAE(SIZE, 40, ReLU()), planted(1)
    codes = sae.encode(x)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    change = (gradient @ sae.decoder.T).abs()
    active = codes.to_dense() > 0
    expected = (codes.to_dense() * change).sum() / change[active].mean() / len(x)
    torch.testing.assert_close(attribution_penalty(codes, sae.decoder, gradient), expected)
    settings = TrainingSettings(steps=2, batch_size=128, sparsity=1e-3, attribution=True)
    with pytest.raises(ConfigurationError, match="batches_with_gradients"):
        train({"relu": sae}, batches, settings, progress=False)
    pairs = lambda begin: ((x, x) for x in batches(begin))  # noqa: E731
    train({"relu": sae}, pairs, settings, progress=False)


def test_dead_features_begin_anew_in_what_is_left():
    sae, x = SAE(SIZE, 40, TopK(2)), planted(1)
    sae.prepare(x)
    learner = Learner.of(sae, TrainingSettings(steps=10, batch_size=128, learning_rate=1e-2))
    learner.step(0, x)
    with torch.no_grad():
        output = sae(x).output
    before, dead = sae.decoder.detach().clone(), torch.zeros(40, dtype=torch.bool)
    dead[::5] = True
    assert resample_(sae, dead, x, output, learner.optimizer) == 8
    assert sae.decoder[~dead].equal(before[~dead])
    left = torch.nn.functional.normalize(x - output, dim=1)
    assert float((sae.decoder[dead] @ left.T).amax(1).min()) > 0.999
    moments = learner.optimizer.state[sae.decoder]["exp_avg"]
    assert not moments[dead].any()
    assert bool(moments[~dead].any())
    assert resample_(sae, dead, x, x) == 0, "nothing is left"


def test_resampling_goes_on_until_the_rate_falls():
    options = {"steps": 20, "batch_size": 128, "dead_after": 128, "resample_every": 4, "auxiliary": "none"}
    sae = SAE(SIZE, 40, TopK(1))
    with torch.no_grad():
        sae.encoder_bias[:30] = -100
    learner = train({"topk": sae}, batches, TrainingSettings(**options), progress=False)["topk"]
    assert float(sae.encoder_bias[:30].min()) > -1
    assert learner.history[0]["dead"] >= 30


def test_rates_fall_to_a_share_and_gradients_are_clipped():
    settings = TrainingSettings(steps=100, warmup=0.1, cooldown=0.2, final_rate=0.1)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(50) == 1
    assert settings.rate(99) == pytest.approx(0.1 + 0.9 * 1 / 20)
    with pytest.raises(ConfigurationError, match="clip 0"):
        TrainingSettings(clip=0)
    kept = []
    for clip in (None, 1e-3):
        sae, x = SAE(SIZE, 40, TopK(2)), planted(1)
        sae.prepare(x)
        Learner.of(sae, TrainingSettings(steps=10, batch_size=128, clip=clip)).step(0, x)
        kept.append(torch.cat([p.grad.flatten() for p in sae.parameters()]).norm())
    assert float(kept[1]) == pytest.approx(1e-3, rel=1e-3)
    assert kept[0] > kept[1]
