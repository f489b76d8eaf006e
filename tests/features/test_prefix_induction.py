"""Induction by length of the prefix: texts as they should be, scores against the model's own attention."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import TopK
from gossamer.features.attention_sae import AttentionSAE
from gossamer.features.feature_ablation import feature_effects, patched_effect
from gossamer.features.prefix_induction import PrefixScores, prefix_induction, prefix_induction_score, repeats
from gossamer.models.head_outputs import exposed_heads


@pytest.mark.parametrize("prefix", [1, 3, 6])
def test_stretches_are_repeated_and_destroyed(prefix):
    drawn = repeats(range(10, 97), prefix, 40, 30, 0, first=[1])
    assert (drawn.tokens[:, 0] == 1).all()
    for text, other, source, end, answer in zip(
        drawn.tokens, drawn.corrupted, drawn.source, drawn.destination, drawn.answer
    ):
        assert text[source] == answer
        stretch = text[source - prefix : source]
        assert stretch.equal(text[end - prefix + 1 : end + 1])
        assert source <= end - prefix + 1
        assert text[end + 1 :].numel() >= 1
        assert len(text.unique()) == 30 - prefix
        changed = (text != other).nonzero()[:, 0]
        assert changed.tolist() == list(range(int(end) - prefix + 1, int(end)))
        assert other[end] == stretch[-1]


def test_scores_are_the_models_own(tiny_llama):
    scores = prefix_induction(tiny_llama, (1, 2), count=5, tokens=20, first=[1], batch=2)
    assert scores.attention.shape == scores.effect.shape == (2, 12)
    tiny_llama.set_attn_implementation("eager")
    for number, length in enumerate((1, 2)):
        drawn = repeats(range(97), length, 5, 20, 0, first=[1])
        rows = torch.arange(5)
        with torch.no_grad():
            found = tiny_llama(drawn.tokens, output_attentions=True)
            other = tiny_llama(drawn.corrupted, output_attentions=True)
        for name, output in (("attention", found), ("corrupted", other)):
            expected = [layer[rows, :, drawn.destination, drawn.source].mean(0) for layer in output.attentions]
            torch.testing.assert_close(getattr(scores, name)[number], torch.cat(expected), rtol=1e-4, atol=1e-6)
    tiny_llama.set_attn_implementation("sdpa")
    one = prefix_induction_score(tiny_llama, 2, 1, (1, 2), count=5, tokens=20, first=[1])
    for name, values in one.items():
        assert values == pytest.approx(getattr(scores, name)[:, 9].tolist(), rel=1e-3, abs=1e-6)


def test_the_effect_of_a_last_head_is_what_ablating_it_changes(tiny_llama):
    """Behind the last layer's attention there is only its feed-forward part: silence that, and effects are exact."""
    torch.nn.init.zeros_(tiny_llama.model.layers[2].mlp.down_proj.weight)
    scores = prefix_induction(tiny_llama, (2,), count=1, tokens=20, first=[1])
    drawn = repeats(range(97), 2, 1, 20, 0, first=[1])
    end, answer = int(drawn.destination[0]), int(drawn.answer[0])
    norm, matrix = tiny_llama.model.norm, tiny_llama.lm_head.weight
    streams = []
    handle = norm.register_forward_pre_hook(lambda module, args: streams.append(args[0][0, end]))
    with torch.no_grad():
        tiny_llama(drawn.tokens)
        with exposed_heads(tiny_llama) as sites:
            site = sites[2]

            def silence(module, args, output):
                return torch.cat([torch.zeros_like(output[..., :12]), output[..., 12:]], -1)

            inner = dict(tiny_llama.named_modules())[site.name].register_forward_hook(silence)
            tiny_llama(drawn.tokens)
            inner.remove()
    handle.remove()
    scale = (streams[0].square().mean() + norm.variance_epsilon).rsqrt()
    expected = ((streams[0] - streams[1]) * norm.weight * scale) @ matrix[answer]
    assert float(scores.effect[0, 8]) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-6)


def test_long_and_short_prefixes_are_told_apart():
    attention = torch.tensor([[0.1, 0.5, 0.0], [0.7, 0.6, 0.1]])
    corrupted = torch.tensor([[0.1, 0.5, 0.0], [0.2, 0.6, 0.1]])
    scores = PrefixScores((1, 5), attention, corrupted, attention, ((0, 0), (0, 1), (1, 0)))
    assert scores.long_prefix() == [(0, 0)]
    assert scores.short_prefix() == [(0, 1)]
    assert scores.gain.tolist() == pytest.approx([0.6, 0.1, 0.1])
    assert "0.0" in scores.table()
    with pytest.raises(ConfigurationError, match="no head 3"):
        scores.of(0, 3)


def test_texts_that_are_too_short_are_refused(tiny_llama):
    with pytest.raises(ConfigurationError, match="at least 11"):
        repeats(range(97), 4, 1, 10, 0)
    with pytest.raises(ConfigurationError, match="twice as many"):
        repeats(range(20), 2, 1, 11, 0)


def test_features_are_ablated_one_by_one(tiny_llama):
    prompts = torch.randint(1, 97, (6, 9), generator=torch.Generator().manual_seed(0))
    right, wrong = torch.full((6,), 5), torch.full((6,), 7)
    sae = AttentionSAE(4, 12, 60, TopK(4), seed=1).eval()
    with exposed_heads(tiny_llama) as sites:
        name = sites[1].name
        found = feature_effects(tiny_llama, name, sae, prompts, 6, right, wrong)
        assert found.values.shape == found.effects.shape == (6, len(found.features))
        feature, place = int(found.features[0]), 0

        def without(module, args, output):
            codes = sae.encode(output[:, 6]).to_dense()
            changed = output.clone()
            changed[:, 6] -= codes[:, feature, None] * sae.decoder[feature]
            return changed

        handle = dict(tiny_llama.named_modules())[name].register_forward_hook(without)
        with torch.no_grad():
            logits = tiny_llama(prompts).logits[:, -1]
        handle.remove()
        expected = logits[:, 5] - logits[:, 7] - found.clean
        torch.testing.assert_close(found.effects[:, place], expected, rtol=1e-3, atol=1e-5)
        inactive = found.values == 0
        assert found.effects[inactive].abs().max() < 1e-6
        assert found.random[inactive].abs().max() < 1e-6
        assert len(found.largest(3)) == 3
        assert len(feature_effects(tiny_llama, name, sae, prompts, 6, right, wrong, most=2).features) == 2
        with pytest.raises(ConfigurationError, match="9 tokens"):
            feature_effects(tiny_llama, name, sae, prompts, 9, right, wrong)
    told = found.told_by({"all": torch.arange(6), "none": torch.zeros(6, dtype=torch.int64)})
    assert told["all"].min() == pytest.approx(1)
    assert told["none"].max() == pytest.approx(0)


def test_what_is_patched_everywhere_is_all_that_counts(tiny_llama):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 97, (5, 7), generator=generator)
    other = prompts.clone()
    other[:, 3] = 50
    right, wrong = torch.full((5,), 5), torch.full((5,), 7)
    with torch.no_grad():
        clean, changed = (tiny_llama(tokens).logits[:, -1] for tokens in (prompts, other))
    whole = (changed[:, 5] - changed[:, 7]) - (clean[:, 5] - clean[:, 7])
    # the last token's stream behind the last block is all that its logits are made of
    found = patched_effect(tiny_llama, ["model.layers.2"], prompts, other, 6, right, wrong)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)
    heads = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]
    found = patched_effect(tiny_llama, heads, prompts, other, 6, right, wrong)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)
    assert not patched_effect(tiny_llama, heads, prompts, other, 2, right, wrong).any()  # before the change
    with pytest.raises(ConfigurationError, match="sets alike"):
        patched_effect(tiny_llama, heads, prompts, other[1:], 2, right, wrong)
