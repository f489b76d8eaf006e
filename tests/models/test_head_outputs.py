"""Outputs of heads as a named place: nothing changes, and what replaces them is used."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gossamer.errors import ModelError
from gossamer.features.splicing import edited
from gossamer.features.store import capture
from gossamer.models.head_outputs import exposed_heads


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=64)).eval()


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_heads_have_names_inside_and_the_model_is_as_it_was(which, tiny_llama, gpt2, batches, tmp_path):
    model = tiny_llama if which == "llama" else gpt2
    names, keys = dict(model.named_modules()).keys(), list(model.state_dict())
    with torch.no_grad():
        before = model(batches[0]).logits
        with exposed_heads(model) as sites:
            assert [site.layer for site in sites] == list(range(len(sites)))
            assert list(model.state_dict()) == keys
            assert model(batches[0]).logits.equal(before)
            site = sites[1]
            store = capture(model, [batches[0][0]], site.name, tmp_path / which, "float32", progress=False)
            assert store.facts.size == site.count * site.size
            with edited(model, site.name, torch.zeros_like):
                assert not model(batches[0]).logits.allclose(before, atol=1e-3)
        assert model(batches[0]).logits.equal(before)
    assert dict(model.named_modules()).keys() == names
    # mapped back, they are what attention puts out
    kept = []
    handle = site.heads.module.register_forward_hook(lambda m, a, o: kept.append(o[0]))
    with torch.no_grad():
        model(batches[0])
    handle.remove()
    z = store[:].unflatten(1, (site.count, site.size))
    back = torch.einsum("thv,hdv->td", z, site.heads.slices())
    torch.testing.assert_close(back + (0 if which == "llama" else site.heads.output.module.bias), kept[0][0, 1:])


def test_heads_are_exposed_once(tiny_llama):
    with exposed_heads(tiny_llama), pytest.raises(ModelError, match="exposed already"), exposed_heads(tiny_llama):
        pass
    with exposed_heads(tiny_llama) as sites:
        assert sites[0].count == 4
        assert sites[0].size == 12
