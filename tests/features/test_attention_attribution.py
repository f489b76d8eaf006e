"""Attribution of features to heads, tokens and earlier layers: all parts add up, and each says what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from gossamer.errors import CalibrationError, ConfigurationError, ModelError
from gossamer.features.activation_rules import ReLU, TopK
from gossamer.features.attention_sae import AttentionSAE, attention_quality, head_attribution, top_features
from gossamer.features.attention_trace import trace_attention
from gossamer.features.direct_attribution import attribution_by_head, constants, dfa
from gossamer.features.frozen_norm import FrozenNorm
from gossamer.features.recursive_attribution import rdfa
from gossamer.features.residual_trace import trace_residual
from gossamer.features.sae import SAE
from gossamer.features.splicing import edited
from gossamer.models.head_outputs import exposed_heads


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=24, n_layer=3, n_head=3, n_positions=64)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def gemma():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97, "head_dim": 8}
    return GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1)).eval()


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def model(request, tiny_llama):
    return {"llama": lambda: tiny_llama, "gpt2": gpt2, "gemma": gemma}[request.param]()


def heads_of(model, tokens, layer):
    """z of a layer and an autoencoder of it."""
    with exposed_heads(model) as sites:
        site, kept = sites[layer], []
        handle = dict(model.named_modules())[site.name].register_forward_hook(lambda m, a, o: kept.append(o[0]))
        with torch.no_grad():
            model(tokens[None])
        handle.remove()
    sae = AttentionSAE(site.count, site.size, 40, TopK(6), seed=1).eval()
    sae.prepare(kept[0])
    nn.init.normal_(sae.encoder_bias, std=0.1, generator=torch.Generator().manual_seed(0))
    return kept[0], sae


def preactivation(sae, z, feature):
    with torch.no_grad():
        return (z * sae.scale - sae.bias) @ sae.encoder[feature] + sae.encoder_bias[feature]


def test_parts_by_head_and_token_sum_to_the_preactivation(model, batches):
    tokens = batches[0][0]
    z, sae = heads_of(model, tokens, 1)
    trace = trace_attention(model, tokens, 1)[1]
    torch.testing.assert_close(trace.z.flatten(1), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace.pattern.sum(-1), torch.ones(trace.pattern.shape[:2]))
    for feature in (0, 7, 39):
        found = dfa(sae, trace, feature)
        expected = preactivation(sae, z, feature).double()
        scale = float(expected.abs().max())
        assert float((found.preactivation - expected).abs().max()) < 1e-4 * scale
        by_head, constant = attribution_by_head(sae, z, torch.full((len(z),), feature))
        torch.testing.assert_close(by_head.double(), found.by_head, rtol=1e-3, atol=1e-4 * scale)
        assert float(constant[0]) == pytest.approx(found.constant)
        torch.testing.assert_close(found.by_source.sum(1) + found.constant, found.preactivation)
        some = dfa(sae, trace, feature, [5, 3])
        torch.testing.assert_close(some.parts, found.parts[[5, 3]])
        torch.testing.assert_close(some.from_first, found.parts[[5, 3], :, 0].sum(1))
        assert not found.parts[3, :, 4:].any()  # nothing is read from the future


def test_all_terms_of_the_tree_add_up(model, batches):
    tokens = batches[0][0][:6]
    z, sae = heads_of(model, tokens, 2)
    root = rdfa(model, sae, tokens, 3, 4, 2, depth=3, top=1000)
    assert root.value == pytest.approx(float(preactivation(sae, z, 3)[4]), rel=1e-3, abs=1e-4)
    kinds = set()

    def check(node):
        kinds.add(node.kind)
        if node.children:
            total = sum(child.value for child in node.children)
            assert total == pytest.approx(node.value, rel=1e-3, abs=1e-4 * abs(root.value) + 1e-6)
            assert node.rest == pytest.approx(0, abs=1e-4 * abs(root.value) + 1e-6)
        for child in node.children:
            check(child)

    check(root)
    assert kinds == {"feature", "source", "embedding", "head", "feed-forward", "bias"}
    assert root.path()[0] is root
    assert "read by head 2." in root.table()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_term_of_the_embedding_is_what_that_part_of_the_stream_adds(tiny_llama, batches):
    tokens = batches[0][0][:10]
    _, sae = heads_of(tiny_llama, tokens, 1)
    root = rdfa(tiny_llama, sae, tokens, 3, 8, 1, depth=1, top=1000)
    trace = trace_residual(tiny_llama, tokens, 1)
    term = next(child for child in root.children if child.kind == "source")
    embedding = next(child for child in term.children if child.kind == "embedding")
    here = trace.layers[1]
    values = tiny_llama.model.layers[1].self_attn.v_proj.weight.view(2, 12, 48)[term.head // 2]
    gain = tiny_llama.model.layers[1].input_layernorm.weight
    stream = here.before[term.position]
    read = values @ (gain * trace.embedding[term.position] / (stream.square().mean() + 1e-6).sqrt())
    expected = read @ sae.encoder_blocks[3, term.head] * sae.scale * here.attention.pattern[term.head, 8, term.position]
    assert embedding.value == pytest.approx(expected.item(), rel=1e-4)


def test_earlier_features_take_the_place_of_heads(tiny_llama, batches):
    tokens = batches[0][0][:6]
    _, sae = heads_of(tiny_llama, tokens, 2)
    _, earlier = heads_of(tiny_llama, tokens, 1)
    heads = rdfa(tiny_llama, sae, tokens, 3, 4, 2, depth=2, top=1000)
    features = rdfa(tiny_llama, sae, tokens, 3, 4, 2, depth=2, top=1000, saes={1: earlier})
    assert features.value == pytest.approx(heads.value)
    source = next(child for child in features.children if child.kind == "source")
    kinds = [child.kind for child in source.children]
    assert kinds.count("feature") == 6  # of layer 1; heads of layer 0 stay
    assert {child.layer for child in source.children if child.kind == "head"} == {0}
    assert sum(child.value for child in source.children) == pytest.approx(source.value, rel=1e-3)
    followed = next(child for child in source.children if child.kind == "feature")
    assert followed.children
    assert sum(child.value for child in followed.children) == pytest.approx(followed.value, rel=1e-3, abs=1e-5)


def test_normalisation_is_learnt_from_what_it_does():
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) + 1
    layer = nn.LayerNorm(7)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    square = nn.RMSNorm(7)
    nn.init.normal_(square.weight)
    for norm in (layer, square):
        found = FrozenNorm.of(norm, x)
        direction = torch.randn(7, generator=torch.Generator().manual_seed(1))
        for position in range(6):
            value = direction @ norm(x)[position]
            again = found.back(direction, position) @ x[position] + direction @ found.bias
            torch.testing.assert_close(again, value.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="cannot be told apart"):
        FrozenNorm.of(nn.Tanh(), x)


def test_shares_of_heads_by_decoder_and_by_what_reaches_the_stream():
    sae = AttentionSAE(2, 3, 4, ReLU())
    with torch.no_grad():
        sae.decoder.zero_()
        sae.decoder[0, :3] = 1
        sae.decoder[1, 4] = 5
        sae.decoder[2] = 1
    assert head_attribution(sae).tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 0]]
    output = torch.stack([torch.eye(3), 3 * torch.eye(3)])
    torch.testing.assert_close(head_attribution(sae, output)[2], torch.tensor([0.25, 0.75]))
    assert top_features(head_attribution(sae), 2).tolist() == [[0, 2], [1, 2]]
    alive = torch.tensor([False, True, True, True])
    assert top_features(head_attribution(sae), 1, alive).tolist() == [[2], [1]]


def test_zero_ablation_and_densities(tiny_llama, batches):
    documents = [row for batch in batches[:2] for row in batch]
    with exposed_heads(tiny_llama) as sites:
        sae = AttentionSAE(4, 12, 30, TopK(3)).eval()
        quality = attention_quality(tiny_llama, sites[1].name, sae, documents)
        losses = []
        for text in documents:
            with torch.no_grad(), edited(tiny_llama, sites[1].name, torch.zeros_like, 1):
                logits = tiny_llama(text[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, text[1:]))
    assert quality.zero == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    gap = quality.zero - quality.splice.dense
    assert quality.recovered_from_zero == pytest.approx((quality.zero - quality.splice.spliced) / gap)
    assert float(quality.density.sum()) == pytest.approx(quality.splice.active, abs=1e-3)
    edges, counts = quality.histogram()
    assert sum(counts) == 30
    assert counts[0] == int((quality.density == 0).sum()) == round(quality.dead * 30)
    assert len(edges) == len(counts) + 1
    assert quality.to_dict()["recovered"] == quality.splice.recovered


def test_an_autoencoder_read_from_a_file_is_one_of_heads():
    plain = SAE(12, 20, TopK(2), seed=3)
    found = AttentionSAE.of(plain, 3)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert found(x).output.equal(plain(x).output)
    assert found.settings()["d_head"] == 4
    with pytest.raises(ConfigurationError, match="5 heads"):
        AttentionSAE.of(plain, 5)


def test_what_does_not_fit_is_refused(tiny_llama, batches):
    tokens = batches[0][0]
    trace = trace_attention(tiny_llama, tokens, [0, 2])[2]
    sae = AttentionSAE(4, 12, 30, TopK(3))
    with pytest.raises(ConfigurationError, match="for 3 of 16"):
        dfa(AttentionSAE(3, 16, 30, TopK(3)), trace, 0)
    with pytest.raises(ConfigurationError, match="there are 30"):
        dfa(sae, trace, 30)
    with pytest.raises(ConfigurationError, match="24 tokens"):
        dfa(sae, trace, 0, [24])
    with pytest.raises(CalibrationError, match="below 3"):
        trace_attention(tiny_llama, tokens, 3)
    with pytest.raises(ModelError, match="Hugging Face"):
        trace_attention(nn.TransformerEncoderLayer(8, 2), torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ConfigurationError, match="within range"):
        rdfa(tiny_llama, sae, tokens, 0, 24, 2)
    with pytest.raises(ConfigurationError, match="n_heads is 0"):
        AttentionSAE(0, 3, 4, ReLU())
    with pytest.raises(ConfigurationError, match="count is 31"):
        top_features(head_attribution(sae), 31)
    with pytest.raises(ConfigurationError, match="need"):
        head_attribution(sae, torch.zeros(3, 5, 12))
    assert constants(sae).shape == (30,)


def test_attention_that_does_more_is_refused(batches):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 8}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with pytest.raises(ModelError, match="softcap"):
        trace_attention(model, batches[0][0], 0)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with pytest.raises(ModelError, match="does not add"):
        trace_residual(model, batches[0][0], 1)
