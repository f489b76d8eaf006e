"""Masks that are learned: the distribution, the run, and the bank."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM
from gossamer.core.registry import REGISTER
from gossamer.errors import CheckpointError, ConfigurationError, PatternError, TargetError, UnknownNameError
from gossamer.training.callbacks import transformers_callback
from gossamer.training.mask_bank import MaskBank, codes_per_word, decode_mask, encode_mask
from gossamer.training.mask_distribution import Clock, MaskGate, Noise, candidates, chosen_probabilities
from gossamer.training.maskllm import MaskLLM


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def data(seed=1, rows=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def magnitude_masks(model, pattern="2:4", names=("0.weight", "2.weight")):
    chosen = NM(*map(int, pattern.split(":")))
    return MaskSet({name: chosen.select(dict(model.named_parameters())[name].detach().abs()) for name in names})


def train(model, optimizer, steps, batch=None):
    x, y = batch or data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


TWO_OF_FOUR = NM(2, 4)


def gate(pattern=TWO_OF_FOUR, shape=(6, 8), axis=1, dtype=torch.float32, **clock):
    made = MaskGate("layer", torch.Size(shape), pattern, axis, Clock(**{"kappa": 100.0, "tau": 0.7, **clock}), dtype)
    return made.train()


class TestDistribution:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7), (1, 1), (3, 3)])
    def test_the_candidates_are_all_masks_and_each_once(self, n, m):
        table = candidates(n, m)
        rows = {tuple(row) for row in table.int().tolist()}
        assert rows == {tuple(int(i in kept) for i in range(m)) for kept in itertools.combinations(range(m), n)}
        assert len(table) == math.comb(m, n)

    @pytest.mark.parametrize("hard", [False, True])
    @pytest.mark.parametrize(("shape", "axis"), [((6, 8), 1), ((8, 5), 0), ((4, 8, 3, 2), 1), ((2, 3, 8), 2)])
    def test_values_and_gradients_are_those_of_automatic_differentiation(self, shape, axis, hard):
        one = gate(shape=shape, axis=axis, hard=hard, norm_reg=0.01)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
        above = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        result = one(weight)
        (result * above).sum().backward()
        logits, plain = one.logits.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        groups = logits.shape[1]
        noise = one.noise().stream(torch.device("cpu"))(len(logits), groups).double()
        p = torch.softmax((100.0 * logits + noise) / 0.7, 0)
        choice = nn.functional.one_hot(p.argmax(0), len(p)).T.double() + p - p.detach() if hard else p
        mask = (choice.T @ candidates(2, 4).double()).view(plain.movedim(axis, -1).shape).movedim(-1, axis)
        expected = plain * mask
        frozen = plain.detach() * mask
        ((expected * above.double()).sum() - 0.01 * (frozen**2).sum()).backward()
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.logits.grad.double(), logits.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)

    def test_chunks_draw_what_one_pass_draws(self):
        one = gate(NM(4, 8), (16, 64))
        noise = Noise("layer", 0, 5)
        whole = torch.cat([p for _, p in chosen_probabilities(one.logits, one.clock, noise, chunk=7)], 1)
        again = torch.cat([p for _, p in chosen_probabilities(one.logits, one.clock, noise, chunk=7)], 1)
        assert torch.equal(whole, again)
        torch.testing.assert_close(whole.sum(0), torch.ones(128))

    def test_the_noise_is_gumbels(self):
        drawn = Noise("layer", 0, 1).stream(torch.device("cpu"))(1000, 1000)
        assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.01)
        assert float(drawn.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)

    def test_noise_follows_from_name_seed_and_step_alone(self):
        def first(*key):
            return Noise(*key).stream(torch.device("cpu"))(2, 3)

        assert torch.equal(first("a", 1, 2), first("a", 1, 2))
        for other in [("b", 1, 2), ("a", 2, 2), ("a", 1, 3)]:
            assert not torch.equal(first("a", 1, 2), first(*other))

    def test_masks_are_drawn_as_often_as_their_probabilities_say(self):
        one = gate(shape=(20_000, 4), tau=0.01, kappa=1.0)
        with torch.no_grad():
            one.logits.copy_(torch.tensor([0.0, 1, 2, 0, 1, 0]).unsqueeze(1).expand_as(one.logits))
        p = next(chosen_probabilities(one.logits, one.clock, one.noise()))[1]
        found = p.argmax(0).bincount(minlength=6) / 20_000
        assert (found - torch.softmax(one.logits.detach()[:, 0], 0)).abs().max() < 4 * (0.25 / 20_000) ** 0.5

    def test_cold_and_hard_masks_keep_exactly_n(self):
        for options in ({"tau": 1e-4}, {"hard": True}):
            mask = gate(NM(3, 7), (5, 14), **options)(torch.ones(5, 14)).detach()
            assert torch.allclose(mask.view(5, 2, 7).sum(2), torch.full((5, 2), 3.0), atol=1e-4)
            assert bool(((mask < 1e-3) | (mask > 1 - 1e-3)).all())

    def test_half_precision_of_weights_and_logits_is_kept(self):
        one = gate(dtype=torch.bfloat16)
        weight = torch.ones(6, 8, dtype=torch.bfloat16)
        result = one(weight)
        result.sum().backward()
        assert result.dtype == one.logits.grad.dtype == torch.bfloat16


class TestLearning:
    def test_the_best_of_all_masks_of_a_small_network_is_found(self):
        """Twelve groups of 1:2 in two layers: 4,096 masks, enumerated."""
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
        x = torch.randn(128, 4)
        wanted = model(x).detach() + 0.1 * torch.randn(128, 2)
        dense = copy.deepcopy(model)

        def loss(net):
            return nn.functional.mse_loss(net(x), wanted)

        bits = torch.arange(1 << 12).unsqueeze(1) >> torch.arange(12) & 1 == 1
        masks = torch.stack([bits, ~bits], 2).flatten(1)
        hidden = torch.einsum("koi,ni->kno", dense[0].weight.detach() * masks[:, :16].view(-1, 4, 4), x).tanh()
        outputs = torch.einsum("koi,kni->kno", dense[2].weight.detach() * masks[:, 16:].view(-1, 2, 4), hidden)
        losses = (outputs - wanted).square().mean((1, 2))
        learning = MaskLLM(pattern="1:2", steps=300, heads=True, norm_reg=0.0).install(model)
        optimizer, schedule = learning.optimizer(1e-2, 1e-3, weight_decay=0.0)
        for _ in range(300):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            schedule.step()
        learning.finalize()
        assert losses.min() - 1e-7 < loss(model) < losses.sort().values[40]

    def test_weights_are_frozen_and_come_back_trainable_and_unchanged(self):
        model = network()
        before = copy.deepcopy(model)
        model[4].bias.requires_grad_(False)
        learning = MaskLLM(steps=5).install(model)
        optimizer, _ = learning.optimizer()
        train(model, optimizer, 5)
        assert all(p.grad is None for name, p in model.named_parameters() if "logits" not in name)
        masks = learning.finalize(apply=False)
        assert set(model.state_dict()) == set(before.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
        assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
        assert type(model[0]) is nn.Linear
        for mask in masks.values():
            NM(2, 4).verify(mask)

    def test_evaluation_uses_the_likeliest_masks(self):
        model = network()
        learning = MaskLLM(steps=5).install(model)
        x, _ = data()
        soft = model(x)
        model.eval()
        sharp = model(x)
        masks = learning.finalize()
        assert masks.sparsity == 0.5
        assert torch.equal(sharp, model(x))
        assert not torch.allclose(soft, sharp)

    def test_schedules_move_with_the_optimizer(self):
        model = network()
        learning = MaskLLM(steps=10, tau=(4.0, 0.05), kappa=(100, 500), norm_reg=1e-5).install(model)
        optimizer, _ = learning.optimizer()
        seen = []
        for _ in range(10):
            seen.append((learning.clock.tau, learning.clock.kappa, learning.clock.norm_reg))
            train(model, optimizer, 1)
        assert seen[0] == (4.0, 100.0, 1e-5)
        assert seen[5] == pytest.approx((2.025, 300.0, 5e-6))
        assert (learning.clock.tau, learning.clock.kappa, learning.clock.norm_reg) == (0.05, 500.0, 0.0)

    def test_accumulated_passes_see_one_mask_and_one_regularisation(self):
        model = network()
        learning = MaskLLM(steps=10, norm_reg=0.1).install(model)
        (x, y), gate = data(), learning.gates["0.weight"]
        halves = [(x[:32], y[:32]), (x[32:], y[32:])]
        nn.functional.cross_entropy(model(x), y).backward()
        whole = gate.logits.grad.clone()
        gate.logits.grad, gate._rewarded_at = None, -1
        for a, b in halves:
            (nn.functional.cross_entropy(model(a), b) / 2).backward()
        torch.testing.assert_close(gate.logits.grad, whole, rtol=1e-4, atol=1e-7)

    def test_the_regularisation_equals_its_term_of_the_loss(self):
        found = []
        for inside in (True, False):
            model = network()
            learning = MaskLLM(steps=10, norm_reg=0.1, add_regularization=inside).install(model)
            x, y = data()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss if inside else loss + learning.loss_term()).backward()
            found.append(learning.gates["2.weight"].logits.grad)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

    def test_a_strong_prior_is_where_learning_starts(self):
        model = network()
        prior = magnitude_masks(model)
        assert MaskLLM(prior=prior, prior_strength=10).install(model).masks() == prior
        for one, other in zip(
            MaskLLM(prior="magnitude").install(network()).masks().values(),
            MaskLLM(prior=prior).install(network()).masks().values(),
        ):
            assert torch.equal(one, other)

    def test_a_prior_adds_what_the_paper_says(self):
        bare, with_prior = (MaskLLM(prior=p).install(network()).gates["0.weight"] for p in (None, "magnitude"))
        added = with_prior.logits - bare.logits
        step = 3 * bare.logits.std().item()
        kept = magnitude_masks(network())["0.weight"].view(-1, 4).float()
        torch.testing.assert_close(added, step * (candidates(2, 4) @ kept.T - 1), rtol=1e-4, atol=1e-6)
        assert {round(float(v) / step) for v in added.unique()} == {-1, 0, 1}

    def test_masks_move_to_another_domain(self):
        model = network()
        first = MaskLLM(steps=30).install(model)
        train(model, first.optimizer(0.02, 0.01)[0], 30, data(1))
        general = first.finalize(apply=False)
        second = MaskLLM(steps=30, prior=general, prior_strength=5).install(model)
        assert second.masks().distance(general) < 0.05 * general.total
        train(model, second.optimizer(0.02, 0.01)[0], 30, data(2))
        assert second.diagnostics().from_prior > 0
        assert second.masks() != general

    def test_diagnostics_count_groups(self):
        model = network()
        learning = MaskLLM(steps=10, kappa=(1.0, 1.0), include=("0",)).install(model)
        gate = learning.gates["0.weight"]
        with torch.no_grad():
            gate.logits.zero_()
            gate.logits[0] += math.log(5)
        learning._first = learning._last = {"0.weight": gate.choice()}
        with torch.no_grad():
            gate.logits[3, :8] += 10
        found = learning.diagnostics()
        expected = (24 * 5 / 10 + 8 * math.exp(10) / (math.exp(10) + 9)) / 32
        assert found.max_probability == pytest.approx(expected, rel=1e-5)
        assert found.changed == found.from_prior == 8 / 32
        again = learning.diagnostics()
        assert (again.changed, again.from_prior) == (0, 8 / 32)

    @pytest.mark.parametrize("stop", [4, 9])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, stop):
        def begin():
            model = network()
            learning = MaskLLM(steps=12, prior="magnitude").install(model)
            return model, learning, learning.optimizer(1e-2, 1e-3)[0]

        whole, run, optimizer = begin()
        train(whole, optimizer, 12)
        half, part, optimizer = begin()
        train(half, optimizer, stop)
        file = io.BytesIO()
        torch.save([half.state_dict(), optimizer.state_dict(), part.state_dict()], file)
        file.seek(0)
        weights, memory, state = torch.load(file)
        resumed, part, optimizer = begin()
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(memory)
        part.load_state_dict(state)
        train(resumed, optimizer, 12 - stop)
        assert part.diagnostics() == run.diagnostics()
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_logits_in_half_precision_learn_as_well(self):
        model = network()
        learning = MaskLLM(steps=20, dtype="bfloat16").install(model)
        optimizer, _ = learning.optimizer(1e-2, 1e-3)
        train(model, optimizer, 20)
        assert {value.dtype for value in optimizer.state[learning.gates["0.weight"].logits].values()} == {
            torch.bfloat16,
            torch.float32,  # the number of steps
        }
        assert learning.diagnostics().from_prior > 0
        assert learning.finalize().sparsity == 0.5

    def test_convolutions_and_transposed_layers_have_their_groups_along_the_input(self):
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), Conv1D(6, 16))
        learning = MaskLLM(steps=3, heads=True).install(model)
        optimizer, _ = learning.optimizer()
        model(torch.randn(2, 8, 4, 4)).sum().backward()
        optimizer.step()
        masks = learning.finalize()
        NM(2, 4, 1).verify(masks["0.weight"])
        NM(2, 4, 0).verify(masks["2.weight"])
        assert not masks.violations(model)

    def test_the_trainer_of_transformers_needs_a_callback_and_goes_on_where_it_stopped(self, tmp_path, tiny_llama):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == 2

        ids = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]

        def go(folder, *more, resume=None):
            model, method = copy.deepcopy(tiny_llama), MaskLLM(steps=4)
            learning = method.install(model)
            arguments = TrainingArguments(
                str(tmp_path / folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2,
                report_to=[], use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            callback = transformers_callback(method)
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, *more])
            trainer.train(resume_from_checkpoint=resume)
            return model, callback.masks, learning.step

        whole, masks, step = go("whole")
        assert step == 4
        assert masks.sparsity == 0.5
        for name in masks:
            dense = dict(tiny_llama.named_parameters())[name]
            assert torch.equal(dict(whole.named_parameters())[name], dense * masks[name])
        go("half", Stop())
        _, again, _ = go("half", resume=str(tmp_path / "half" / "checkpoint-2"))
        assert again == masks


class TestErrors:
    def test_what_is_impossible_is_refused(self):
        for options in ({"steps": 0}, {"tau": (0.0, 1.0)}, {"kappa": (1, -1)}, {"norm_reg": -1}, {"dtype": "int8"}):
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                MaskLLM(**options)
        with pytest.raises(ConfigurationError, match="prior"):
            MaskLLM(prior="best")
        with pytest.raises(PatternError, match="N:M"):
            MaskLLM(pattern="16x1")
        with pytest.raises(PatternError, match=r"0\.weight.*multiple of 7"):
            MaskLLM(pattern="3:7").install(network())

    def test_the_first_wrong_group_of_a_prior_is_named(self):
        model = network()
        prior = magnitude_masks(model)
        mask = prior["2.weight"]
        mask[1, 8:12] = True
        with pytest.raises(ConfigurationError, match=r"prior of 2\.weight keeps 4 of 4 in group 6 \(1 groups"):
            MaskLLM(prior=prior.with_mask("2.weight", mask)).install(model)
        assert type(model[0]) is nn.Linear  # nothing was changed
        MaskLLM().install(model)

    def test_a_prior_of_another_model_is_refused(self):
        with pytest.raises(TargetError, match=r"2\.weight"):
            MaskLLM(prior=magnitude_masks(network(), names=("0.weight",))).install(network())

    def test_a_model_has_gates_once(self):
        model = network()
        learning = MaskLLM().install(model)
        with pytest.raises(ConfigurationError, match="already"):
            MaskLLM().install(model)
        learning.finalize()
        with pytest.raises(ConfigurationError, match="finalized"):
            learning.finalize()

    def test_an_optimizer_without_the_logits_is_refused(self):
        model = network()
        learning = MaskLLM().install(model)
        with pytest.raises(ConfigurationError, match=r"logits of 0\.weight"):
            learning.follow(torch.optim.SGD([model[0].bias], 0.1))

    def test_attach_gives_an_optimizer_what_it_lacks(self):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        learning = MaskLLM(steps=2).attach(model, optimizer)
        before = learning.gates["0.weight"].logits.detach().clone()
        train(model, optimizer, 2)
        assert learning.step == 2
        assert not torch.equal(before, learning.gates["0.weight"].logits)

    def test_states_of_something_else_are_refused(self):
        learning = MaskLLM().install(network())
        with pytest.raises(CheckpointError):
            learning.load_state_dict({"method": "SET"})

    def test_many_logits_for_a_weight_are_warned_of(self):
        with pytest.warns(UserWarning, match=r"4:8 has 70 masks, 8\.75 logits"):
            MaskLLM(pattern="4:8").install(network())

    def test_the_method_is_registered(self):
        assert REGISTER["maskllm"].when == "during training"


class TestBank:
    @pytest.mark.parametrize(
        ("pattern", "shape"), [("2:4", (7, 20)), ("1:4", (3, 4)), ("4:8", (5, 16)), ("2:4@0", (8, 3))]
    )
    def test_masks_come_back_as_they_went_in(self, pattern, shape):
        from gossamer.core.patterns import Pattern

        rule = Pattern.parse(pattern)
        mask = rule.select(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(decode_mask(encode_mask(mask, rule), rule, mask.shape), mask)

    def test_a_word_holds_as_many_as_fit(self):
        assert codes_per_word(2, 4) == 24  # 6^24 < 2^64 < 6^25
        assert codes_per_word(1, 4) == 31
        mask = NM(2, 4).select(torch.rand(64, 96, generator=torch.Generator().manual_seed(0)))
        bits = 64 * len(encode_mask(mask, NM(2, 4))) / mask.numel()
        assert bits == pytest.approx(64 / 24 / 4)  # log2(6) / 4 = 0.646

    def test_one_model_serves_every_task_and_is_what_it_was(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        bank = MaskBank("2:4")
        tasks = {"large": magnitude_masks(model), "small": ~magnitude_masks(model)}
        for task, masks in tasks.items():
            bank.add(task, masks)
        bank = MaskBank.from_state_dict(bank.state_dict(), "2:4")
        for task, masks in tasks.items():
            with bank.active(model, task):
                assert MaskSet.from_model(model, list(masks)) == masks
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    def test_what_does_not_fit_is_refused(self):
        bank, masks = MaskBank(), magnitude_masks(network())
        with pytest.raises(PatternError, match="group 0"):
            bank.add("dense", MaskSet({"w": torch.ones(2, 4, dtype=torch.bool)}))
        bank.add("one", masks)
        with pytest.raises(ConfigurationError, match="other parameters"):
            bank.add("two", MaskSet({"0.weight": masks["0.weight"]}))
        with pytest.raises(UnknownNameError, match="did you mean 'one'"):
            bank["onee"]
        state = bank.state_dict()
        state["one:0.weight:words"] = state["one:0.weight:words"].clone().fill_(-1)
        with pytest.raises(CheckpointError, match="damaged"):
            MaskBank.from_state_dict(state)
        del state["one:0.weight:shape"]
        with pytest.raises(CheckpointError, match="complete"):
            MaskBank.from_state_dict(state)
