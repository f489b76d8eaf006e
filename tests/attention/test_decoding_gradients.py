"""Gradients of decoding: those of attention to the tokens that were chosen, as a function and in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.attention.ada_snap_kv import AdaSnapKV
from gossamer.attention.channel_order import ChannelOrder
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.attention.offloaded_decoding import OffloadedDoubleSparsity
from gossamer.attention.quest import Quest
from gossamer.attention.s2_attention import S2Attention
from gossamer.attention.snap_kv import SnapKV
from gossamer.models.attention_sites import AttentionCall

ORDER = ChannelOrder({0: torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])})
FUNCTIONS = {
    "quest": Quest(token_budget=8, page_size=4),
    "double-sparsity": DoubleSparsity(tokens=9, channels=4, dense_layers=(), channel_order=ORDER),
    "shared": DoubleSparsity(tokens=9, channels=4, dense_layers=(), channel_order=ORDER, share_tokens=True),
    "few bits": DoubleSparsity(tokens=9, channels=4, dense_layers=(), channel_order=ORDER, label_bits=4),
}
IN_MODELS = {
    "quest": lambda: Quest(token_budget=8, page_size=4),
    "snap-kv": lambda: SnapKV(token_capacity=20, approximation=8, local_window=8),
    "ada-snap-kv": lambda: AdaSnapKV(token_capacity=20, approximation=8, local_window=8),
    "double-sparsity": lambda: DoubleSparsity(tokens=8, channels=4, dense_layers=()),
    "offloaded": lambda: OffloadedDoubleSparsity(tokens=8, channels=4, dense_layers=(), dense_last=False),
    "s2-attention": lambda: S2Attention(block_size=8, local_blocks=1, vert_stride=4, dense_layers=()),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_step_has_the_gradients_of_masked_dense_attention(name, padded):
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 1, 16), (2, 2, 61, 16), (2, 2, 61, 16))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    real = torch.arange(61) >= torch.tensor([[0], [11]]) if padded else None
    method = FUNCTIONS[name]
    out = method(q, k, v, key_mask=real, layer=0)
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), method(q, k, v, key_mask=real, layer=0))
        chosen = method.decode(AttentionCall(0, q, k, v, 0.25, True, None, real))
    count = chosen.indices.shape[-1] if chosen.counts is None else chosen.counts[..., None]
    meant = (torch.arange(chosen.indices.shape[-1]) < count).expand_as(chosen.indices)
    links = torch.zeros(2, chosen.indices.shape[1], 61, dtype=torch.bool).scatter_(-1, chosen.indices, meant)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    keys, values = (part.repeat_interleave(2, 1) for part in wide[1:])
    hidden = ~links.repeat_interleave(4 // links.shape[1], 1)[:, :, None]
    dense = ((wide[0] @ keys.mT) * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ values
    weights = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, (q, k, v), weights)
    for one, right in zip(found, torch.autograd.grad(dense, wide, weights.double())):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt_too", [False, True])
@pytest.mark.parametrize("name", IN_MODELS)
def test_a_model_that_decodes_has_gradients_that_are_its_slopes(tiny_llama, name, prompt_too):
    model, method = tiny_llama.double(), IN_MODELS[name]()
    for layer in model.model.layers:  # norms are computed in float32, which is too coarse to see slopes
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    model.model.norm = nn.Identity()
    model.model.embed_tokens.weight.data.mul_(50)
    tokens = torch.randint(3, 97, (2, 62), generator=torch.Generator().manual_seed(2))
    if isinstance(method, DoubleSparsity):
        method.calibrate(model, [tokens], progress=False)
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]

    with method.active(model) as installed:
        with torch.no_grad():
            prompt = model(tokens[:, :60], use_cache=True).past_key_values

        def loss():
            cache = model(tokens[:, :60], use_cache=True).past_key_values if prompt_too else copy.deepcopy(prompt)
            return sum(model(tokens[:, n : n + 1], past_key_values=cache).logits.square().mean() for n in (60, 61))

        slopes = torch.autograd.grad(loss(), weights)
        assert 0 < installed.report().density("decode") < 1
        step = 1e-5
        for weight, slope in zip(weights, slopes):
            toward = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
            found = []
            with torch.no_grad():
                for sign in (1, -2, 1):
                    weight += sign * step * toward
                    found.append(loss())
            torch.testing.assert_close((slope * toward).sum(), (found[0] - found[1]) / (2 * step), rtol=1e-4, atol=0)
