"""Whole feed-forward matrices come in one layer ahead, into two buffers, and only for whole calls."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.sliced_feedforward import slice_gated_ffn
from gossamer.models.streamed_feedforward import StreamedFeedForwards

IDS = torch.tensor([[5, 9, 3, 44, 80]])
INDEX = torch.arange(0, 72, 2)


@pytest.fixture
def streamed(tiny_llama):
    """A model of three layers, and its streaming; bytes of one layer's matrices are 3 · 48 · 72 · 4."""
    layers = find_feed_forwards(tiny_llama)
    made = StreamedFeedForwards(tiny_llama, layers, "cpu")
    yield tiny_llama, layers, made
    made.remove()


LAYER = 3 * 48 * 72 * 4


@torch.no_grad()
def test_a_call_moves_every_layer_once_and_begins_with_the_first_of_the_next(tiny_llama):
    expected = tiny_llama(IDS).logits
    made = StreamedFeedForwards(tiny_llama, find_feed_forwards(tiny_llama), "cpu")
    moved = []
    for _ in range(3):
        assert torch.equal(tiny_llama(IDS).logits, expected)
        moved.append(made.bytes_moved)
    assert moved == [4 * LAYER, 7 * LAYER, 10 * LAYER]


@torch.no_grad()
def test_a_layer_computes_from_a_buffer_while_the_next_one_is_in_the_other(streamed):
    model, layers, made = streamed
    inside = []

    def look(module, args, output):
        here = {module.down_proj.weight.data_ptr(), module.up_proj.weight.data_ptr()}
        spans = [range(b.data_ptr(), b.data_ptr() + b.numel()) for b in made._buffers]
        inside.append(([all(address in span for address in here) for span in spans].index(True), list(made._holds)))

    homes = [layer.down.parameter for layer in layers]
    handles = [layer.module.register_forward_hook(look, prepend=True) for layer in layers]
    model(IDS)
    for handle in handles:
        handle.remove()
    assert inside == [(0, [0, 1]), (1, [2, 1]), (0, [2, 0])]
    assert all(layer.down.parameter is home for layer, home in zip(layers, homes))  # its home between calls
    assert made.buffer_bytes == 2 * LAYER


@torch.no_grad()
def test_cut_layers_move_nothing(streamed):
    model, layers, made = streamed
    model(IDS)
    before = made.bytes_moved
    cuts = [slice_gated_ffn(layer, INDEX, made.device) for layer in layers]
    for cut in cuts:
        cut.apply()
    thin = model(IDS).logits
    assert made.bytes_moved == before
    for cut in cuts:
        cut.restore()
    assert not torch.equal(model(IDS).logits, thin)
    assert made.bytes_moved == before + 3 * LAYER


@torch.no_grad()
def test_what_is_not_streamed_moves_to_the_device(tiny_llama):
    """With a device that keeps no values, where everything is can still be seen."""
    layers, before = find_feed_forwards(tiny_llama), dict(tiny_llama.named_parameters())
    made = StreamedFeedForwards(tiny_llama, layers, "meta")
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight  # tied as before
    places = {name: parameter.device.type for name, parameter in tiny_llama.named_parameters()}
    assert places == {name: "cpu" if ".mlp." in name else "meta" for name in places}
    assert all(buffer.device.type == "meta" for buffer in (*made._buffers, *tiny_llama.buffers()))
    with slice_gated_ffn(layers[0], INDEX, made.device):
        assert layers[0].down.parameter.device.type == "meta"
        assert layers[0].down.parameter.shape == (48, 36)
    seen = []
    layers[1].module.register_forward_hook(lambda m, a, o: seen.append(m.up_proj.weight.device.type), prepend=True)
    tiny_llama(IDS.to("meta"))
    assert seen == ["meta"]
    assert made.bytes_moved == 4 * LAYER
    made.remove()
    assert all(parameter is before[name] for name, parameter in tiny_llama.named_parameters())


class Uneven(nn.Module):
    """Layers of several widths and biases, called in an order of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)) for width in (12, 40, 20, 33)
        )

    def forward(self, x):
        for number in (2, 0, 3, 3, 1):
            x = x + self.blocks[number](x)
        return x


@torch.no_grad()
def test_layers_of_other_sizes_and_in_another_order_are_computed_right():
    torch.manual_seed(0)
    model, x = Uneven(), torch.randn(2, 3, 8)
    expected = model(x)
    made = StreamedFeedForwards(model, find_feed_forwards(model), "cpu")
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    made.remove()
    made.remove()
    assert torch.equal(model(x), expected)


def test_a_call_that_fails_leaves_the_model_as_it_is(streamed):
    _, layers, _ = streamed
    homes = [target.parameter for target in layers[0].targets]
    with pytest.raises(RuntimeError), torch.no_grad():
        layers[0].module(torch.randn(1, 5))
    assert all(target.parameter is home for target, home in zip(layers[0].targets, homes))


def test_what_cannot_be_streamed_is_refused(streamed):
    model, layers, _ = streamed
    with pytest.raises(ConfigurationError, match="already"):
        StreamedFeedForwards(model, layers, "cpu")
    with pytest.raises(ConfigurationError, match="no feed-forward"):
        StreamedFeedForwards(model, [], "cpu")
    fresh = transformers.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    with pytest.raises(ConfigurationError, match="'gpu', which is no device"):
        StreamedFeedForwards(fresh, find_feed_forwards(fresh), "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="finds no GPU"):
            StreamedFeedForwards(fresh, find_feed_forwards(fresh), "cuda")
    other = transformers.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    found = find_feed_forwards(other)
    cpu_offload(other, torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="accelerate"):
        StreamedFeedForwards(other, found, "cpu")
