from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.attention import link_attention as link_attention_module
from gossamer.attention.connectivity_predictor import ConnectivityPredictor
from gossamer.attention.link_attention import LinkMask, link_attention, link_count, masked_attention
from gossamer.attention.link_baselines import local_scores, oracle_scores, projected_scores, random_scores
from gossamer.attention.sparsifiner import DISTILL, RECONSTRUCT, Sparsifiner, TrainingPhase, train
from gossamer.attention.vision_sites import find_vision_sites
from gossamer.core.registry import REGISTER
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, NonFiniteError, TargetError

SIDE, PATCH, TOKENS = 16, 4, 17


@pytest.fixture
def vit():
    return hugging_face()


def hugging_face(side=SIDE, layers=3, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=side,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=5,
        initializer_range=0.2,
        **options,
    )
    return transformers.ViTForImageClassification(config).eval()


class FusedAttention(nn.Module):
    """Attention as timm builds it: one matrix for queries, keys and values."""

    def __init__(self, dim, heads, fused=True):
        super().__init__()
        self.num_heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class FusedBlock(nn.Module):
    def __init__(self, dim, heads, fused):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = FusedAttention(dim, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedTransformer(nn.Module):
    def __init__(self, dim=24, heads=3, depth=2, fused=True):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(1, dim, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, dim))
        self.blocks = nn.ModuleList(FusedBlock(dim, heads, fused) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)
        self.eval()

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def pictures(count=4, side=SIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, side, side, generator=generator), torch.randint(5, (count,), generator=generator)


def tables(count=9, d=4, e=3, batch=2, heads=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, count, width, generator=generator, dtype=dtype) for width in (d, d, e)]


def by_hand(q, k, v, allowed):
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        seen = [j for j in range(k.shape[2]) if allowed[b, h, i, j]]
        if seen:
            weights = torch.stack([q[b, h, i] @ k[b, h, j] / q.shape[-1] ** 0.5 for j in seen]).softmax(0)
            out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, seen))
    return out


class TestLinks:
    @given(
        st.integers(2, 12), st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.999, 1.0]), st.integers(0, 99), st.integers(1, 3)
    )
    @settings(max_examples=40, deadline=None)
    def test_every_row_keeps_exactly_its_count_even_if_scores_tie(self, keys, keep, seed, levels):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(levels, (2, 3, keys - 1, keys), generator=generator).double()
        mask = LinkMask.topk(scores, keep)
        dense = mask.to_dense()
        assert (dense[:, :, 1:].sum(-1) == link_count(keep, keys)).all()
        assert dense[:, :, 0].all()
        lowest = torch.where(dense[:, :, 1:], scores, math.inf).amin(-1)
        highest = torch.where(dense[:, :, 1:], -math.inf, scores).amax(-1)
        assert (lowest >= highest).all()
        assert mask.links == int(dense.sum())

    def test_the_count_is_rounded_up_in_decimal_arithmetic(self):
        assert [link_count(0.25, n) for n in (196, 197, 4, 3)] == [49, 50, 1, 1]
        assert link_count(0.29, 100) == 29

    @pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), "half"])
    def test_a_share_outside_its_range_is_refused(self, keep):
        with pytest.raises(ConfigurationError, match="keep_rate is"):
            LinkMask.topk(torch.zeros(1, 1, 3, 4), keep)
        with pytest.raises(ValueError, match="keep_rate is"):
            Sparsifiner(keep_rate=keep)

    def test_scores_that_cannot_be_ranked_are_refused(self):
        with pytest.raises(NonFiniteError):
            LinkMask.topk(torch.full((1, 1, 3, 4), math.nan), 0.5)

    def test_a_threshold_keeps_what_is_above_it(self):
        scores = torch.tensor([[[[0.5, 0.0, 1e-5, 0.2], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]]])
        mask = LinkMask.threshold(scores)
        assert torch.equal(mask.to_dense()[:, :, 1:], scores > 1e-4)
        assert mask.counts.tolist() == [[[2, 0, 4]]]

    def test_recall_is_the_share_of_attention_on_links(self):
        scores = torch.tensor([[[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]]])
        attention = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]])
        assert LinkMask.topk(scores, 0.3).recall(attention) == pytest.approx(1.3 / 2)

    @pytest.mark.parametrize("gathered", [1, 30, 1 << 18])
    def test_only_links_are_attended_to(self, gathered, monkeypatch):
        monkeypatch.setattr(link_attention_module, "_GATHERED", gathered)
        q, k, v = tables()
        for prefix in (1, 2):
            scores = torch.randn(2, 2, 9 - prefix, 9, dtype=torch.float64)
            scores[:, :, :, 3] = -math.inf
            scores[0, 1, 2] = -math.inf
            mask = LinkMask.highest(scores, 4, prefix=prefix)
            wanted = by_hand(q, k, v, mask.to_dense())
            for grad in (False, True):
                found = link_attention(q.clone().requires_grad_(grad), k, v, mask)
                torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(masked_attention(q, k, v, mask.to_dense()), wanted, rtol=0, atol=1e-12)
            assert not wanted[0, 1, 2 + prefix].any()

    def test_rows_of_dropped_tokens_give_zeros_and_finite_gradients(self):
        q, k, v = (t.requires_grad_() for t in tables())
        alive = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
        mask = LinkMask.topk(torch.randn(2, 2, 8, 9), 0.3, token_mask=alive)
        for out in (link_attention(q, k, v, mask), masked_attention(q, k, v, mask.to_dense())):
            assert not out[1, :, 6:].any()
            assert out[0].abs().amin(-1).all()
            gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
            assert all(torch.isfinite(g).all() for g in gradients)

    def test_all_links_are_dense_attention_bit_for_bit(self):
        q, k, v = tables(dtype=torch.float32)
        mask = LinkMask.topk(torch.randn(2, 2, 8, 9), 1.0)
        assert torch.equal(link_attention(q, k, v, mask), nn.functional.scaled_dot_product_attention(q, k, v))

    def test_links_of_another_size_are_refused(self):
        q, k, v = tables()
        with pytest.raises(ConfigurationError, match="select them anew"):
            link_attention(q, k, v, LinkMask.topk(torch.randn(2, 2, 7, 8), 0.5))


class TestPredictor:
    def test_the_guess_is_the_formula(self):
        torch.manual_seed(0)
        predictor = ConnectivityPredictor(4, 12, reduce_n=3, reduce_c=2).double()
        q, k, _ = tables(12)
        p, u = predictor.down, predictor.up
        reduced = (k @ predictor.key.weight.T + predictor.key.bias).transpose(-1, -2) @ p
        coefficients = (0.5 * (q[:, :, 1:] @ predictor.query.weight.T + predictor.query.bias) @ reduced).softmax(-1)
        torch.testing.assert_close(predictor.train()(q, k), coefficients @ u.T, rtol=1e-12, atol=1e-12)
        sparse = torch.where(u.abs() > 0.02, u.abs(), 0.0)
        torch.testing.assert_close(predictor.eval()(q, k), coefficients @ sparse.T, rtol=1e-12, atol=1e-12)

    def test_sparse_factors_have_the_promised_zeros(self):
        torch.manual_seed(0)
        predictor = ConnectivityPredictor(4, 24, reduce_n=2, reduce_c=1, coef_topk=5, basis_threshold=0.03)
        q, k, _ = tables(24, dtype=torch.float32)
        guess = predictor.guess(q, k, sparse=True)
        assert ((guess.coefficients != 0).sum(-1) == 5).all()
        kept = guess.basis != 0
        assert torch.equal(kept, predictor.up.abs() > 0.03)
        used = guess.coefficients != 0
        products = sum(
            int(used[b, h, i, m]) * int(kept[:, m].sum())
            for b, h, i, m in itertools.product(range(2), range(2), range(23), range(12))
        )
        assert guess.products() == products

    def test_a_threshold_on_coefficients_takes_the_place_of_their_number(self):
        torch.manual_seed(0)
        predictor = ConnectivityPredictor(4, 12, reduce_n=3, coef_threshold=0.25)
        q, k, _ = tables(12, dtype=torch.float32)
        dense = predictor.guess(20 * q, 20 * k, sparse=False).coefficients
        sparse = predictor.guess(20 * q, 20 * k, sparse=True).coefficients
        assert torch.equal(sparse, torch.where(dense > 0.25, dense, 0.0))
        assert (sparse == 0).any()
        assert (sparse > 0).any()

    def test_a_negative_basis_counts_only_when_factors_are_sparse(self):
        predictor = ConnectivityPredictor(4, 6, reduce_n=6)
        nn.init.constant_(predictor.up, -0.5)
        q, k, _ = tables(6, dtype=torch.float32)
        assert (predictor.train()(q, k) == -0.5).all()
        assert (predictor.eval()(q, k) == 0.5).all()

    def test_removed_tokens_and_masked_tokens_give_the_same_guess(self):
        torch.manual_seed(0)
        predictor = ConnectivityPredictor(4, 9, reduce_n=2, coef_topk=2).double()
        q, k, _ = tables(9)
        alive = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 1]]).bool()
        places = torch.stack([torch.cat([torch.zeros(1).long(), 1 + row.nonzero().flatten()]) for row in alive])
        fewer = [torch.stack([t[b, :, places[b]] for b in range(2)]) for t in (q, k)]
        for sparse in (False, True):
            masked = predictor.guess(q, k, sparse, token_mask=alive).approx
            removed = predictor.guess(*fewer, sparse, tokens=places).approx
            for b in range(2):
                rows = masked[b][:, places[b, 1:] - 1]
                torch.testing.assert_close(removed[b], rows[:, :, places[b]], rtol=1e-12, atol=1e-12)
                assert (masked[b][:, :, 1:][:, :, ~alive[b]] == -math.inf).all()

    def test_another_number_of_tokens_is_refused_with_both(self):
        predictor = ConnectivityPredictor(4, 17)
        q, k, _ = tables(26, dtype=torch.float32)
        with pytest.raises(ConfigurationError, match=r"26 tokens, but the predictor knows 17; call resize\(26\)"):
            predictor(q, k)
        assert predictor.resize(26)(q, k).shape == (2, 2, 25, 26)
        with pytest.raises(ConfigurationError, match="17 tokens cannot be resized to 1"):
            predictor.resize(1)

    def test_a_resized_basis_that_varied_linearly_still_does(self):
        predictor = ConnectivityPredictor(4, 5, reduce_n=2, prefix=1)
        with torch.no_grad():
            predictor.up[1:] = torch.tensor([[0.0], [0.0], [1.0], [1.0]])  # a 2 × 2 grid: 0 above, 1 below
        larger = predictor.resize(17)
        rows = larger.up[1:, 0].view(4, 4)
        assert torch.equal(rows, torch.tensor([0.0, 0.25, 0.75, 1.0])[:, None].expand(4, 4))
        torch.testing.assert_close(larger.down[1:].sum(0), predictor.down[1:].sum(0))
        assert torch.equal(larger.down[0], predictor.down[0])

    @pytest.mark.parametrize(
        "options", [{"reduce_n": 0}, {"reduce_n": 99}, {"reduce_c": 9}, {"coef_topk": 0}, {"prefix": 17}]
    )
    def test_impossible_sizes_are_refused(self, options):
        with pytest.raises(ConfigurationError):
            ConnectivityPredictor(4, 17, **options)


class TestBaselines:
    def test_nothing_recalls_more_than_the_oracle_and_chance_recalls_its_share(self):
        q, k, _ = tables(26, d=8)
        attention = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        generator = torch.Generator().manual_seed(0)
        recalls = {
            "oracle": LinkMask.topk(oracle_scores(q, k), 0.25).recall(attention),
            "local": LinkMask.topk(local_scores(q, k), 0.25).recall(attention),
            "projected": LinkMask.topk(projected_scores(q, k, 8, generator), 0.25).recall(attention),
        }
        chance = [LinkMask.topk(random_scores(q, k, generator), 0.25).recall(attention) for _ in range(50)]
        assert max(recalls, key=recalls.get) == "oracle"
        assert sum(chance) / 50 == pytest.approx(link_count(0.25, 26) / 26, abs=0.02)
        assert recalls["projected"] > 0.3

    def test_a_local_window_holds_the_nearest_patches(self):
        q, k, _ = tables(26)
        dense = LinkMask.highest(local_scores(q, k), 10).to_dense()
        middle = dense[0, 0, 13]
        assert middle[0]
        assert middle[1:].view(5, 5)[1:4, 1:4].all()
        assert middle.sum() == 10

    def test_patches_without_a_square_have_no_window(self):
        q, k, _ = tables(9)
        with pytest.raises(ConfigurationError, match="8 patches form no square"):
            local_scores(q, k)


@pytest.mark.parametrize("make", [hugging_face, FusedTransformer])
class TestInstalled:
    def test_all_links_leave_every_output_as_it_was(self, make):
        vit, (images, _) = make(), pictures()
        before = logits(vit, images)
        with Sparsifiner(keep_rate=1.0).install(vit):
            assert torch.equal(logits(vit, images), before)

    def test_removal_restores_the_model(self, make):
        vit, (images, _) = make(), pictures()
        before, names = logits(vit, images), list(vit.state_dict())
        installed = Sparsifiner(reduce_n=2).install(vit)
        assert not torch.equal(logits(vit, images), before)
        installed.remove()
        assert torch.equal(logits(vit, images), before)
        assert list(vit.state_dict()) == names

    def test_training_and_evaluation_read_the_same_links(self, make):
        vit, (images, _) = make(), pictures()
        installed = Sparsifiner(reduce_n=2, token_keep_rate=0.6, token_layers=(0, 1)).install(vit).phase("distill")
        sparse = logits(vit, images)
        vit.train()
        torch.testing.assert_close(logits(vit, images), sparse, rtol=1e-4, atol=1e-5)
        assert installed.places.shape == (4, 1 + math.ceil(0.36 * 16))

    def test_reconstruction_trains_predictors_only_and_leaves_attention_dense(self, make):
        vit, (images, _) = make(), pictures()
        before = logits(vit, images)
        installed = Sparsifiner(reduce_n=2, token_keep_rate=0.5, token_layers=(0,)).install(vit)
        vit.train()
        out = vit(images)
        torch.testing.assert_close(out if isinstance(out, torch.Tensor) else out.logits, before)
        teacher = installed.teacher(images)
        loss = installed.loss(out, teacher)
        by_layer = [
            (installed.guesses[i].approx - teacher.attention[i][:, :, 1:]).square().sum()
            for i in range(len(installed.sites))
        ]
        assert loss.item() == pytest.approx(0.01 * sum(by_layer).item() / len(by_layer), rel=1e-5)
        loss.backward()
        trained = {name for name, p in vit.named_parameters() if p.grad is not None and p.grad.any()}
        assert trained
        assert all(".connectivity." in name for name in trained)
        assert len(trained) >= 5 * len(installed.sites)

    def test_the_teacher_is_the_model_as_it_was_and_stays_so(self, make):
        vit, (images, _) = make(), pictures()
        before = logits(vit, images)
        installed = Sparsifiner(reduce_n=2).install(vit)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.zero_()
        teacher = installed.teacher(images)
        torch.testing.assert_close(teacher.logits, before)
        for attention in teacher.attention:
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def logits(model, images):
    with torch.no_grad():
        out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


class TestDistillation:
    def test_the_loss_is_labels_and_logits_and_surviving_tokens(self, vit):
        images, target = pictures()
        method = Sparsifiner(reduce_n=2, token_keep_rate=0.5, token_layers=(1,))
        installed = method.install(vit).phase("distill")
        vit.train()
        out, teacher = vit(images), installed.teacher(images)
        loss = installed.loss(out, teacher, target)
        p, q = teacher.logits.softmax(-1), out.logits.softmax(-1)
        kept = installed.places[:, 1:] - 1
        assert kept.shape[1] == 8
        theirs = torch.stack([tokens[rows] for tokens, rows in zip(teacher.tokens, kept)])
        tokens = vit.vit(images).last_hidden_state[:, 1:]
        wanted = (
            nn.functional.cross_entropy(out.logits, target)
            + 0.5 * (p * (p.log() - q.log())).sum(1).mean()
            + 0.5 * (tokens - theirs).square().mean()
        )
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_dropped_patches_are_those_the_class_token_looks_at_least(self, vit):
        images, _ = pictures()
        installed = Sparsifiner(keep_rate=1.0, token_keep_rate=0.5, token_layers=(0,)).install(vit)
        logits(vit, images)
        look = installed.teacher(images).attention[0][:, :, 0, 1:].mean(1)
        wanted = look.topk(8, -1).indices.sort(-1).values
        assert torch.equal(installed.places[:, 1:], 1 + wanted)

    def test_both_phases_lower_their_losses(self, vit):
        images, target = pictures(16)
        installed = Sparsifiner(reduce_n=2).install(vit)
        batches = itertools.repeat((images, target))
        first = train(installed, batches, TrainingPhase("reconstruct", 4, 1, 1e-2, 1e-3), 10)
        assert first[-1] < 0.7 * first[0]
        second = train(installed, batches, TrainingPhase("distill", 4, 1, 1e-3, 1e-4), 10)
        assert second[-1] < 0.7 * second[0]
        assert not vit.training

    def test_reconstruction_raises_the_share_of_attention_that_is_read(self, vit):
        images, target = pictures(16)
        installed = Sparsifiner(reduce_n=2).install(vit)

        def recall():
            logits(vit, images)
            attention = installed.teacher(images).attention
            return sum(installed.masks[i].recall(attention[i]) for i in range(3)) / 3

        before = recall()
        train(installed, itertools.repeat((images, target)), TrainingPhase("reconstruct", 10, 1, 1e-2, 1e-3), 10)
        assert recall() > before + 0.05

    def test_the_papers_schedules(self):
        assert RECONSTRUCT.rate(3) == 3e-4
        assert RECONSTRUCT.rate(1.5) == pytest.approx(1.5e-4)
        assert RECONSTRUCT.rate(5) == pytest.approx(2e-4)
        assert DISTILL.rate(45) == pytest.approx(2e-6)
        assert DISTILL.rate(3) == 8e-5 > DISTILL.rate(24) > DISTILL.rate(44)

    def test_a_threshold_on_links_takes_the_place_of_their_number(self, vit):
        images, _ = pictures()
        installed = Sparsifiner(reduce_n=2, link_threshold=0.01).install(vit).phase("distill")
        sparse = logits(vit, images)
        for layer in range(3):
            wanted = installed.guesses[layer].approx > 0.01
            assert torch.equal(installed.masks[layer].to_dense()[:, :, 1:], wanted)
            assert 0 < wanted.double().mean() < 1
        vit.train()
        torch.testing.assert_close(logits(vit, images), sparse, rtol=1e-4, atol=1e-5)


class TestAccounts:
    def test_operations_are_those_of_the_formulas(self, vit):
        images, _ = pictures(3)
        installed = Sparsifiner(keep_rate=0.25, reduce_n=4, reduce_c=2, coef_topk=2).install(vit)
        logits(vit, images)
        flops = installed.flops()
        n, h, d, c, m, k = TOKENS, 4, 8, 4, 4, 5
        layer = flops.layers[0]
        assert layer.dense_attention == 4 * h * n * n * d
        assert layer.links == 4 * h * d * ((n - 1) * k + n)
        assert layer.predictor == 2 * h * ((n + n - 1) * d * c + (n + n - 1) * c * m)
        assert layer.guess == pytest.approx(2 * installed.guesses[0].products() / 3)
        assert layer.projections == 8 * n * 32 * 32
        assert layer.feed_forward == 4 * n * 32 * 48
        assert flops.dense_total == 3 * (layer.dense_attention + layer.projections + layer.feed_forward)
        assert flops.total == pytest.approx(flops.multihead + 3 * layer.feed_forward)

    def test_dense_attention_costs_no_predictor_and_dropped_tokens_save_everywhere(self, vit):
        images, _ = pictures()
        installed = Sparsifiner(keep_rate=1.0, token_keep_rate=0.5, token_layers=(0,)).install(vit)
        logits(vit, images)
        flops = installed.flops()
        first, second, _ = flops.layers
        assert first.attention == first.dense_attention
        assert first.tokens == 17
        assert second.tokens == 9
        assert second.attention == 4 * 4 * 81 * 8
        assert flops.total < flops.dense_total

    def test_they_need_a_call_first(self, vit):
        with pytest.raises(CalibrationError, match="call the model"):
            Sparsifiner().install(vit).flops()


class TestRefusals:
    def test_other_images_are_refused_until_the_predictors_are_resized(self, vit):
        installed = Sparsifiner(reduce_n=2).install(vit)
        larger, _ = pictures(side=24)
        with pytest.raises(ConfigurationError, match=r"37 tokens, but the predictor knows 17"):
            vit(larger, interpolate_pos_encoding=True)
        installed.resize(37)
        assert torch.isfinite(vit(larger, interpolate_pos_encoding=True).logits).all()

    def test_attention_that_is_not_torchs_function_is_refused(self):
        model = FusedTransformer(fused=False)
        Sparsifiner(reduce_n=2).install(model)
        with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
            model(pictures()[0])

    def test_a_failed_call_leaves_torchs_function_alone(self, vit):
        installed = Sparsifiner(reduce_n=2).install(vit)
        with pytest.raises(ConfigurationError):
            vit(pictures(side=24)[0], interpolate_pos_encoding=True)
        installed.remove()
        assert torch.isfinite(logits(vit, pictures()[0])).all()
        assert not torch.overrides._get_current_function_mode_stack()

    def test_dropout_in_attention_is_refused(self):
        vit = hugging_face(attention_probs_dropout_prob=0.5)
        Sparsifiner(reduce_n=2).install(vit)
        vit.train()
        with pytest.raises(ModelError, match="with dropout"):
            vit(pictures()[0])

    def test_models_without_attention_or_positions_are_refused(self):
        with pytest.raises(TargetError):
            Sparsifiner().install(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
        model = FusedTransformer()
        model.where = model.pos_embed
        del model.pos_embed
        with pytest.raises(ModelError, match="pass num_tokens"):
            Sparsifiner().install(model)

    def test_a_second_one_in_the_same_model_is_refused(self, vit):
        Sparsifiner().install(vit)
        with pytest.raises(ConfigurationError, match="remove"):
            Sparsifiner().install(vit)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"token_keep_rate": 0.0}, "token_keep_rate is 0.0"),
            ({"token_layers": (1, 1)}, "name every block once"),
            ({"prefix": 0}, "prefix is 0"),
            ({"coef_topk": 0}, "coef_topk is 0"),
            ({"reduce_n": 0}, "reduce_n 0"),
        ],
    )
    def test_bad_parameters_are_named(self, options, said):
        with pytest.raises(ConfigurationError, match=said):
            Sparsifiner(**options)

    def test_bad_calls_are_named(self, vit):
        with pytest.raises(ConfigurationError, match="blocks 0 to 2"):
            Sparsifiner(token_layers=(3,)).install(vit)
        installed = Sparsifiner(reduce_n=2).install(vit)
        with pytest.raises(ConfigurationError, match="phase is 'both'"):
            installed.phase("both")
        images, target = pictures()
        teacher = installed.teacher(images)
        with pytest.raises(CalibrationError, match="training mode"):
            installed.loss(None, teacher)
        installed.phase("distill")
        with pytest.raises(CalibrationError, match="target is missing"):
            installed.loss(vit(images), teacher)
        with pytest.raises(CalibrationError, match="takes 10 batches, but only 1 came"):
            train(installed, [(images, target)], TrainingPhase("distill", 1, 0, 1e-3, 1e-4), 10)


class TestTheModel:
    def test_predictors_are_saved_with_it(self, vit):
        images, _ = pictures()
        fresh = copy.deepcopy(vit)
        Sparsifiner(reduce_n=2).install(vit)
        other = Sparsifiner(reduce_n=2).install(fresh)
        other.model.load_state_dict(vit.state_dict())
        assert torch.equal(logits(fresh, images), logits(vit, images))

    def test_sites_know_their_sizes(self, vit):
        site = find_vision_sites(vit)[1]
        assert (site.heads, site.head_dim, site.width, site.hidden) == (4, 8, 32, 48)
        assert find_vision_sites(FusedTransformer())[1].block_name == "blocks.1"

    def test_it_is_registered(self):
        assert REGISTER["sparsifiner"].factory is Sparsifiner
