from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch import nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.key_value_cache import RewritableLayer, crop_to, entries, keep_positions, overwrite, rewritable
from gossamer.models.sliced_feedforward import slice_gated_ffn

INDEX = torch.tensor([17, 2, 3, 9])


def hidden(width=16):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))


def by_hand(layer, x, index):
    """down[:, index] (act(gate[index] x) * up[index] x) in float64."""
    gate, up = (matrix[index].double() for matrix in layer.widening())
    middle = nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    return middle @ layer.down.matrix()[:, index].double().T


def test_a_cut_layer_computes_the_chosen_channels_and_the_model_comes_back_unchanged():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer, x = find_feed_forwards(model)[0], hidden()
    whole = layer.module(x)
    cut = slice_gated_ffn(layer, INDEX)
    assert torch.equal(layer.module(x), whole)  # nothing happens before it is applied
    with cut:
        assert layer.down.module.weight.shape == (16, 4)
        torch.testing.assert_close(layer.module(x).double(), by_hand(layer_of(model), x, INDEX), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.module(x), whole)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert layer.down.module.in_features == layer.width == 24


def layer_of(model):
    """The first feed-forward layer of a whole copy of the model."""
    return find_feed_forwards(tiny_model())[0]


class Fused(nn.Module):
    """Gate and up in one matrix, with biases."""

    def __init__(self):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(16, 48), nn.Linear(24, 16), nn.SiLU()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


def test_a_matrix_that_holds_gate_and_up_loses_the_same_channels_of_both():
    torch.manual_seed(0)
    module, x = Fused(), hidden()
    layer = find_feed_forwards(module)[0]
    gate, up = module.both(x).chunk(2, dim=-1)
    middle = (module.act(gate) * up)[..., INDEX]
    expected = middle @ module.down.weight[:, INDEX].T + module.down.bias
    with slice_gated_ffn(layer, INDEX):
        torch.testing.assert_close(module(x), expected)


def test_layers_without_a_gate_and_with_transposed_weights_are_cut_too():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 32}
    block = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).eval().transformer.h[0].mlp
    layer, x = find_feed_forwards(block)[0], hidden()
    middle = block.act(block.c_fc(x))[..., INDEX]
    expected = middle @ block.c_proj.weight[INDEX] + block.c_proj.bias
    with slice_gated_ffn(layer, INDEX):
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("index", [[], [0, 0], [-1, 3], [3, 24]])
def test_channels_that_are_not_there_are_refused(index):
    layer = find_feed_forwards(tiny_model())[0]
    with pytest.raises(ConfigurationError, match="from 0 to 23"):
        slice_gated_ffn(layer, torch.tensor(index))


def test_two_cuts_of_one_layer_do_not_overlap():
    layer = find_feed_forwards(tiny_model())[0]
    one, other = slice_gated_ffn(layer, INDEX), slice_gated_ffn(layer, INDEX + 1)
    with one, pytest.raises(ModelError, match="restore"):
        other.apply()
    with other:
        assert other.active
        assert not one.active


def test_a_streamed_layer_is_brought_in_for_whole_calls_only(monkeypatch):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook

    model, x = tiny_model(), hidden()
    layer = find_feed_forwards(model)[0]
    whole, expected = layer.module(x), by_hand(layer, x, INDEX)
    cpu_offload(layer.module, torch.device("cpu"))
    loads = []
    original = AlignDevicesHook.pre_forward

    def counting(self, module, *args, **kwargs):
        loads.append(self.offload)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counting)
    cut = slice_gated_ffn(layer, INDEX)
    with cut:
        torch.testing.assert_close(layer.module(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(loads)
    assert torch.equal(layer.module(x), whole)
    assert any(loads)
    assert layer.down.module.weight.device.type == "meta"


# ------------------------------------------------------------------------------------------ caches


def states(tokens, seed=0):
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def filled(tokens=6):
    cache = rewritable(transformers.DynamicCache())
    for layer in range(2):
        cache.update(states(tokens, layer), -states(tokens, layer), layer)
    return cache


def test_rewritten_tokens_take_the_place_of_old_ones_in_the_same_memory():
    cache = filled()
    memory = cache.layers[0].keys.data_ptr()
    crop_to(cache, 4)
    assert cache.get_seq_length() == 4
    for layer in range(2):
        cache.update(states(3, 7), states(3, 8), layer)
    assert torch.equal(cache.layers[0].keys, torch.cat([states(6)[:, :, :4], states(3, 7)], dim=2))
    assert cache.layers[0].keys.data_ptr() == memory


def test_a_cache_grows_beyond_its_first_memory():
    cache = filled()
    cache.update(states(600, 3), states(600, 4), 0)
    assert torch.equal(cache.layers[0].keys, torch.cat([states(6), states(600, 3)], dim=2))


def test_dropped_entries_are_gone_from_the_named_layers_and_new_ones_follow():
    cache, kept = filled(), torch.tensor([0, 3, 5])
    keep_positions(cache, kept, slice(0, 1))
    assert torch.equal(cache.layers[0].keys, states(6)[:, :, kept])
    assert cache.layers[1].get_seq_length() == 6
    cache.update(states(2, 9), states(2, 9), 0)
    assert torch.equal(cache.layers[0].values, torch.cat([-states(6)[:, :, kept], states(2, 9)], dim=2))


def test_entries_can_be_put_back():
    cache = filled()
    stored = entries(cache, 2, 5)
    crop_to(cache, 2)
    for layer in range(2):
        cache.update(states(4, 5), states(4, 5), layer)
    overwrite(cache, 2, stored, 2)
    assert torch.equal(cache.layers[0].keys[:, :, :4], states(6)[:, :, :4])
    assert torch.equal(cache.layers[0].keys[:, :, 4:], states(4, 5)[:, :, 2:])


def test_a_cache_with_tokens_is_taken_as_it_is():
    cache = transformers.DynamicCache()
    cache.update(states(6), states(6), 0)
    assert rewritable(cache) is cache
    assert cache.get_seq_length() == 6
    assert not isinstance(cache.layers[0], RewritableLayer)


def test_caches_that_cannot_go_back_are_refused():
    config = tiny_model("gemma3").config
    with pytest.raises(ConfigurationError, match=r"SlidingWindow.*cropped"):
        rewritable(transformers.DynamicCache(config=config))
    with pytest.raises(ConfigurationError, match="StaticLayer"):
        rewritable(transformers.StaticCache(config=tiny_model().config, max_cache_len=8))
    with pytest.raises(ConfigurationError, match="NoneType"):
        rewritable(None)
