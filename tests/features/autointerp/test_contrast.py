from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.features.activation_rules import TopK
from gossamer.features.autointerp.contrast import TopKNeurons, random_directions
from gossamer.features.latent_capture import cache_latents
from gossamer.features.sae import SAE


def test_neurons_are_the_inputs_of_the_last_layer(tiny_llama):
    layer = tiny_llama.model.layers[1].mlp
    x = torch.randn(7, 48)
    wanted = layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)
    codes = TopKNeurons(layer, 5).encode(x).to_dense()
    top = wanted.topk(5, 1)
    torch.testing.assert_close(codes, torch.zeros_like(wanted).scatter(1, top.indices, top.values.clamp_min(0)))
    every = TopKNeurons(layer, 72, rotated=3).encode(x).to_dense()
    rotated = wanted @ TopKNeurons(layer, 72, rotated=3).rotation
    torch.testing.assert_close(every, rotated.clamp_min(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rotated.norm(dim=1), wanted.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_neurons_can_be_cached_like_latents(tiny_llama, batches, tmp_path):
    block = tiny_llama.model.layers[1]
    neurons = TopKNeurons(block.mlp, 4)
    site = "model.layers.1.post_attention_layernorm"
    cache = cache_latents(tiny_llama, [b[:1] for b in batches], site, neurons, tmp_path / "neurons", progress=False)
    assert cache.width == 72
    assert cache.codes(0, len(cache)).counts.max() <= 4


def test_bad_layers_and_counts_are_refused(tiny_llama):
    layer = tiny_llama.model.layers[0].mlp
    with pytest.raises(UnknownNameError, match="down_proj"):
        TopKNeurons(layer, 4, last="down_prj")
    with pytest.raises(ConfigurationError, match="k is 73"):
        TopKNeurons(layer, 73)


def test_random_directions_share_scale_and_centre_alone():
    sae = SAE(16, 40, TopK(4), seed=1)
    sae.prepare(torch.randn(100, 16) * 3 + 1)
    drawn = random_directions(sae, 6, seed=1)
    assert (drawn.n_features, drawn.activation.k) == (40, 6)
    assert torch.equal(drawn.scale, sae.scale)
    assert torch.equal(drawn.bias, sae.bias)
    assert drawn.encode(torch.randn(5, 16)).counts.max() <= 6
