"""CAST: its optimiser, its factors, its teacher, and the whole run."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gossamer.core.patterns import NM
from gossamer.core.registry import REGISTER
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, NonFiniteError, PatternError
from gossamer.training.adams import AdamS
from gossamer.training.callbacks import transformers_callback
from gossamer.training.cast import CAST, quantize_
from gossamer.training.distillation import SelfDistillation, distillation_loss
from gossamer.training.parametrized import ScaledWeight


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def data(rows=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def train(model, optimizer, steps):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def cast(steps=60, **options):
    settings = {"learning_rate": 1e-2, "l1_max": 1e-2, "mask_every": 5}
    return CAST(steps=steps, **{**settings, **options})


class Words(nn.Module):
    """A language model of one layer, whose logits are a tensor."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.middle, self.head = nn.Linear(width, 16), nn.Linear(16, vocabulary)

    def forward(self, tokens):
        return self.head(torch.relu(self.middle(self.embedding(tokens))))


class TestAdamS:
    def test_without_a_pattern_it_is_adamw(self):
        ours, theirs = network(), network()
        train(ours, AdamS(ours.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.1), 10)
        train(theirs, torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.1), 10)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("adapt", ["momentum", "ast", "rms", "none"])
    def test_a_step_is_that_of_the_paper_in_float64(self, adapt):
        """Three steps, by hand, with numbers that cross zero."""
        first, second, rate, eps, l1, steps = 0.9, 0.95, 0.05, 1e-8, 3.0, 4
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 8, generator=generator, dtype=torch.float64))
        with torch.no_grad():
            weight[0, :2] *= 1e-3
        gradients = torch.randn(3, 3, 8, generator=generator, dtype=torch.float64)
        optimizer = AdamS(
            [{"params": [weight], "pattern": "2:4"}],
            rate,
            (first, second),
            eps,
            steps=steps,
            l1_max=l1,
            l1_warmup=0.5,
            adapt=adapt,
            mask_every=100,
            target_residual=0.0,
            cap=5.0,
        )
        w = weight.detach().clone()
        lost = ~NM(2, 4).select(w.abs())
        u = v = torch.zeros_like(w)
        for t, g in enumerate(gradients):
            alpha = min(1.0, t / 2)
            u = first * u + (1 - first) * g
            d, r = u, alpha * l1 * lost.double()
            if adapt == "momentum":
                d = torch.where(lost, (1 - alpha) * u, u)
            s = d + r * w.sign() if adapt in ("momentum", "ast") else g
            v = second * v + (1 - second) * s**2
            slow = (v / (1 - second ** (t + 1))).sqrt() + eps
            w = w - rate * d / (1 - first ** (t + 1)) / slow
            if adapt == "rms":
                shrink = rate * (r / slow).clamp(max=5.0)
            elif adapt == "none":
                shrink = rate * r
            else:
                shrink = rate * r / (1 - first ** (t + 1)) / slow
            w = torch.where(w.abs() > shrink, w - shrink * w.sign(), 0.0)
            weight.grad = g
            optimizer.step()
            torch.testing.assert_close(weight.detach(), w, rtol=1e-10, atol=1e-12)
        assert bool((w[lost] == 0).any())

    def test_moments_never_see_the_decay(self):
        model = network()
        optimizer = AdamS([{"params": [model[0].weight], "pattern": "2:4"}], 1e-2, l1_max=100.0, steps=4)
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        for _ in range(4):
            optimizer.step()
        assert not optimizer.state[model[0].weight]["exp_avg"].any()

    def test_kept_weights_feel_nothing(self):
        weight = nn.Parameter(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
        optimizer = AdamS([{"params": [weight], "pattern": "2:4"}], 0.1, l1_max=1.0, l1_warmup=0, adapt="none", steps=9)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([[4.0, 0.9, 3.0, 1.9]]))

    def test_without_selection_everything_is_pressed(self):
        weight = nn.Parameter(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
        options = {"l1_max": 1.0, "l1_warmup": 0, "adapt": "none", "steps": 9, "selective": False}
        optimizer = AdamS([{"params": [weight], "pattern": "2:4"}], 0.1, **options)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([[3.9, 0.9, 2.9, 1.9]]))

    def test_a_challenger_must_be_larger_by_more_than_the_hysteresis(self):
        weight = nn.Parameter(torch.tensor([[1.0, 1.005, 0.1, 2.0]]))
        optimizer = AdamS([{"params": [weight], "pattern": "2:4"}], 0.0, mask_every=1, hysteresis=0.01)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert optimizer.kept(weight).tolist() == [[False, True, False, True]]
        for challenger, kept in ((1.01, [False, True, False, True]), (1.02, [True, False, False, True])):
            with torch.no_grad():
                weight[0, 0] = challenger
            optimizer.step()
            assert optimizer.kept(weight).tolist() == [kept]

    def test_when_the_losers_are_gone_masks_are_fixed_and_the_cut_changes_next_to_nothing(self):
        model = network()
        groups = [{"params": [model[0].weight, model[2].weight], "pattern": "2:4"}, {"params": [model[4].weight]}]
        optimizer = AdamS(groups, 1e-2, steps=200, l1_max=3e-2, mask_every=1, l1_warmup=0.3, target_residual=2e-4)
        x, y = data()
        jumps = []
        while not optimizer.frozen and groups[0].get("taken", 0) < 400:
            before = nn.functional.cross_entropy(model(x), y).item()
            probe, memory = copy.deepcopy(model), optimizer.residual
            train(model, optimizer, 1)
            if optimizer.frozen:
                cut = [optimizer.kept(p) for p in groups[0]["params"]]
                with torch.no_grad():
                    for parameter, kept in zip((probe[0].weight, probe[2].weight), cut):
                        parameter.mul_(kept)
                jumps.append(abs(nn.functional.cross_entropy(probe(x), y).item() - before))
            assert memory >= 0
        assert jumps
        assert jumps[0] < 1e-3
        fixed = optimizer.kept(model[0].weight).clone()
        train(model, optimizer, 20)
        assert torch.equal(model[0].weight != 0, fixed)
        NM(2, 4).verify(optimizer.kept(model[2].weight))

    def test_decay_that_is_too_weak_is_raised(self):
        model = network()
        optimizer = AdamS(
            [{"params": [model[0].weight], "pattern": "2:4"}],
            1e-2,
            steps=100,
            l1_max=1e-4,
            adapt="rms",
            mask_every=2,
            raise_by=4.0,
        )
        train(model, optimizer, 50)
        assert optimizer.l1 == 1e-4
        train(model, optimizer, 50)
        assert optimizer.l1 > 1e-3
        assert optimizer.frozen

    def test_a_run_is_saved_and_goes_on(self):
        def begin():
            model = network()
            groups = [{"params": [model[0].weight], "pattern": "2:4"}, {"params": [model[2].weight]}]
            return model, AdamS(groups, 1e-2, steps=40, l1_max=3e-2, mask_every=3, l1_warmup=0.3)

        whole, optimizer = begin()
        train(whole, optimizer, 40)
        half, optimizer = begin()
        train(half, optimizer, 17)
        file = io.BytesIO()
        torch.save([half.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, memory = torch.load(file)
        resumed, optimizer = begin()
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(memory)
        train(resumed, optimizer, 23)
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert torch.equal(a, b)

    def test_what_is_impossible_is_refused(self):
        weight = nn.Parameter(torch.zeros(4, 8))
        for name, value in {"lr": -1, "adapt": "best", "steps": 0, "l1_warmup": 2, "cap": 0, "raise_by": 0.5}.items():
            with pytest.raises(ConfigurationError, match=name):
                AdamS([weight], **{name: value})
        with pytest.raises(ConfigurationError, match="float32"):
            AdamS([{"params": [nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))], "pattern": "2:4"}])
        with pytest.raises(PatternError, match="multiple of 7"):
            AdamS([{"params": [weight], "pattern": "3:7"}])
        with pytest.raises(ConfigurationError, match="N:M"):
            AdamS([{"params": [weight], "pattern": "16x1"}])


class TestDistillation:
    @pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1 / 3), (2.0, 0.5), (1.0, 0.0), (3.0, 1.0)])
    def test_loss_and_gradient_are_those_of_the_formula(self, temperature, alpha, monkeypatch):
        monkeypatch.setattr("gossamer.training.distillation._CHUNK", 30)  # two rows at a time
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(9, 13, generator=generator).requires_grad_()
        teacher, labels = torch.randn(9, 13, generator=generator), torch.randint(0, 13, (9,), generator=generator)
        labels[[2, 8]] = -100
        distillation_loss(student, teacher, labels, temperature, alpha).mul(3).backward()
        plain = student.detach().double().requires_grad_()
        known = labels >= 0
        soft, target = plain[known] / temperature, torch.softmax(teacher[known].double() / temperature, 1)
        divergence = (target * (target.log() - torch.log_softmax(soft, 1))).sum(1).mean()
        expected = (1 - alpha) * nn.functional.cross_entropy(plain[known], labels[known])
        expected = expected + alpha * temperature**2 * divergence
        (3 * expected).backward()
        value = distillation_loss(student.detach(), teacher, labels, temperature, alpha)
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-4, atol=1e-6)

    def test_a_model_learns_nothing_new_from_itself(self):
        torch.manual_seed(0)
        model = Words()
        loss = SelfDistillation(copy.deepcopy(model), alpha=1.0)
        tokens = torch.randint(0, 11, (3, 7))
        value = loss(model, tokens)
        value.backward()
        assert abs(float(value.detach())) < 1e-6
        assert float(model.middle.weight.grad.abs().max()) < 1e-6

    def test_the_teacher_is_frozen_and_evaluates(self):
        teacher = Words().train()
        SelfDistillation(teacher)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_models_of_transformers_padding_and_hidden_states(self, tiny_llama):
        teacher = copy.deepcopy(tiny_llama)
        with torch.no_grad():
            tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(0.5)
        ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        padded = SelfDistillation(teacher, 2.0, 0.5)(tiny_llama, {"input_ids": ids, "attention_mask": mask})
        one = SelfDistillation(teacher, 2.0, 0.5)(tiny_llama, ids[:1])
        other = SelfDistillation(teacher, 2.0, 0.5)(tiny_llama, ids[1:, :6])
        torch.testing.assert_close(padded, (9 * one + 5 * other) / 14, rtol=1e-4, atol=1e-5)
        more = SelfDistillation(teacher, 2.0, 0.5, hidden=1.0)(tiny_llama, ids[:1])
        states = [m(ids[:1], output_hidden_states=True).hidden_states for m in (tiny_llama, teacher)]
        extra = torch.stack([(a - b).square().sum() / b.square().sum() for a, b in zip(*states)]).mean()
        torch.testing.assert_close(more - one, extra, rtol=1e-3, atol=1e-6)

    def test_what_is_impossible_is_refused(self):
        for options in ({"temperature": 0}, {"alpha": 1.5}, {"hidden": -1}):
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                SelfDistillation(None, **options)
        with pytest.raises(CalibrationError, match="next token"):
            SelfDistillation(None)(Words(), torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(ConfigurationError, match="same model"):
            SelfDistillation(Words(12))(Words(11), torch.zeros(2, 3, dtype=torch.int64))


class TestScaling:
    @pytest.mark.parametrize(
        ("shape", "axis", "row"), [((6, 8), 1, 0), ((8, 6), 0, 1), ((4, 8, 3, 3), 1, 0), ((2, 6, 8), 2, 1)]
    )
    def test_every_block_of_every_row_has_a_factor(self, shape, axis, row):
        weight = torch.randn(shape)
        scale = ScaledWeight(weight, axis, row, 2)
        stacked = shape[0] if len(shape) == 3 else 1
        assert scale.log_scale.numel() == 2 * shape[row] * stacked
        assert torch.equal(scale(weight), weight)
        with torch.no_grad():
            scale.log_scale.normal_()
        factor = (scale(weight) / weight).movedim((row, axis), (-2, -1))
        first, second = factor.chunk(2, -1)
        for part in (first, second):
            torch.testing.assert_close(part, part[..., :1].expand_as(part))
        assert not torch.allclose(first, second)
        assert bool((factor > 0).all())

    def test_factors_go_into_the_weights_and_no_trace_is_left(self):
        model = network()
        names, x = list(model.state_dict()), data()[0]
        training = cast(scale_rate=10.0).install(model)
        train(model, training.optimizer, 20)
        training.optimizer.project()
        before = model(x)
        assert model[0].parametrizations.weight[0].log_scale.detach().abs().max() > 1e-3
        masks = training.finalize()
        torch.testing.assert_close(model(x), before)
        assert list(model.state_dict()) == names
        assert type(model[0]) is nn.Linear
        assert not masks.violations(model)

    def test_inputs_that_do_not_divide_have_one_factor_for_a_row(self):
        model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 2))
        CAST().install(model)
        assert model[0].parametrizations.weight[0].log_scale.shape == (4, 1, 1)


class TestRun:
    @pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
    @pytest.mark.parametrize("adapt", ["momentum", "rms", "none"])
    def test_exactly_n_of_every_m_remain(self, pattern, adapt):
        model = network()
        training = cast(pattern=pattern, adapt=adapt).install(model)
        train(model, training.optimizer, 60)
        masks = training.finalize()
        n, m = map(int, pattern.split(":"))
        for name, mask in masks.items():
            NM(n, m).verify(mask, name=name)
        assert not masks.violations(model)

    def test_the_same_seed_gives_the_same_model_and_a_teacher_helps_it_stay(self):
        def fit(teacher):
            torch.manual_seed(0)
            model = Words(29, 32)
            dense = copy.deepcopy(model)
            training = CAST(steps=40, learning_rate=3e-3, l1_max=1e-3, mask_every=5, alpha=1.0).install(model)
            tokens = list(torch.randint(0, 29, (6, 2, 9), generator=torch.Generator().manual_seed(2)))
            losses = training.fit(tokens, copy.deepcopy(dense) if teacher else None, progress=False)
            training.finalize()
            return model, float(SelfDistillation(dense, alpha=1.0)(model, tokens[0]).detach()), losses

        (one, far, losses), (other, same, again) = fit(True), fit(True)
        assert losses == again
        assert far == same
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
        assert len(losses) == 40
        assert far < fit(False)[1]

    def test_convolutions_and_transposed_layers(self):
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), Conv1D(6, 16))
        training = CAST(steps=2, heads=True).install(model)
        model(torch.randn(2, 8, 4, 4)).sum().backward()
        training.optimizer.step()
        masks = training.finalize()
        NM(2, 4, 1).verify(masks["0.weight"])
        NM(2, 4, 0).verify(masks["2.weight"])

    def test_the_trainer_of_transformers_goes_on_where_it_stopped(self, tmp_path, tiny_llama):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == 3

        ids = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]

        def go(folder, *more, resume=None):
            model, method = copy.deepcopy(tiny_llama), CAST(steps=6, mask_every=2, learning_rate=1e-3)
            training = method.install(model)
            distillation = training.distillation(copy.deepcopy(tiny_llama))

            class Distilling(Trainer):
                def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                    return distillation.compute_loss(model, inputs, return_outputs)

            arguments = TrainingArguments(
                str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, report_to=[],
                use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            callback = transformers_callback(method)
            options = {"callbacks": [callback, *more], "optimizers": (training.optimizer, None)}
            Distilling(model, arguments, train_dataset=rows, **options).train(resume_from_checkpoint=resume)
            return model, callback.masks

        whole, masks = go("whole")
        assert masks.sparsity == 0.5
        assert not masks.violations(whole)
        go("half", Stop())
        resumed, again = go("half", resume=str(tmp_path / "half" / "checkpoint-3"))
        assert again == masks
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))

    def test_quantising_keeps_zeros_and_rounds_the_rest(self):
        model = network()
        training = cast().install(model)
        train(model, training.optimizer, 10)
        masks = training.finalize()
        before = copy.deepcopy(model)
        quantize_(model, masks, bits=8)
        assert not masks.violations(model)
        for name in masks:
            old, new = dict(before.named_parameters())[name], dict(model.named_parameters())[name]
            step = 2 * old.abs().amax(1, keepdim=True) / 255
            assert bool(((old - new).abs() <= 0.51 * step).all())
            assert len(new[0].unique()) <= 256
        assert torch.equal(before[4].weight, model[4].weight)

    def test_errors_say_what_to_do(self):
        model = network()
        with pytest.raises(ConfigurationError, match="inside its own optimizer"):
            CAST().attach(model, torch.optim.SGD(model.parameters(), 0.1))
        training = CAST().install(model)
        with pytest.raises(ConfigurationError, match="already"):
            CAST().install(model)
        assert CAST().attach(model, training.optimizer, {"method": "CAST"}) is training
        with pytest.raises(CheckpointError):
            training.load_state_dict({"method": "RigL"})
        training.finalize()
        with pytest.raises(ConfigurationError, match="finalized"):
            training.finalize()
        model[2].weight.requires_grad_(False)
        with pytest.raises(ConfigurationError, match=r"2\.weight has requires_grad=False"):
            CAST().install(model)
        for options in ({"scale_blocks": -1}, {"adapt": "x"}, {"alpha": 2}, {"steps": 0}):
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                CAST(**options)

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        model = Words()
        with torch.no_grad():
            model.head.bias[0] = float("nan")
        with pytest.raises(NonFiniteError, match="step 1"):
            CAST(steps=2).install(model).fit([torch.zeros(1, 4, dtype=torch.int64)], progress=False)

    def test_the_method_is_registered(self):
        assert REGISTER["cast"].when == "during training"
