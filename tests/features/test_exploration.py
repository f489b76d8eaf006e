"""What is shown of features against the same computed plainly, feature after feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, word_tokenizer
from torch import nn

from gossamer.errors import ConfigurationError, ModelError, UnknownNameError
from gossamer.features.activation_rules import TopK
from gossamer.features.exploration import ExplorationSettings, document_pieces, explore, token_texts
from gossamer.features.feature_neighbours import nearest_by_coactivation, nearest_by_direction
from gossamer.features.latent_capture import cache_latents
from gossamer.features.logit_effects import logit_effects
from gossamer.features.sae import SAE
from gossamer.features.steering import steer, steering


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=512).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def sae(model):
    return SAE(model.config.hidden_size, 40, TopK(4)).eval()


@pytest.fixture(scope="module")
def cache(model, sae, tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 20, (30,), generator=generator) for _ in range(12)]
    return cache_latents(model, documents, 1, sae, tmp_path_factory.mktemp("latents") / "c", "float32", progress=False)


@pytest.fixture(scope="module")
def dense(cache):
    return cache.codes(0, len(cache)).to_dense().numpy()


def test_every_feature_is_described_by_its_own_activations(model, tokenizer, sae, cache, dense):
    wanted = ExplorationSettings(contexts=3, weaker=2, before=4, after=2, tokens=3, logits=5, neighbours=4)
    found = explore(cache, sae, model, tokenizer, wanted, progress=False)
    ids = np.concatenate([cache.document(number)[1:] for number in range(12)])
    for feature in range(40):
        values = dense[:, feature]
        mass = np.bincount(ids, weights=values, minlength=20)
        shares = [share for _, share in found.tokens[feature]]
        assert shares == sorted(shares, reverse=True)
        for token, share in found.tokens[feature]:
            assert share == pytest.approx(mass[token] / values.sum(), rel=1e-4)
        if values.any():
            assert found.tokens[feature][0][1] == pytest.approx(mass.max() / values.sum(), rel=1e-4)
            strongest = found.strongest[feature][0]
            assert strongest.values[strongest.centre] == pytest.approx(values.max())
        places = [(c.document, c.begin + c.centre) for c in (*found.strongest[feature], *found.weaker[feature])]
        assert len(places) == len(set(places)), "no text is shown twice"
    assert found.effects.promoted.shape == (40, 5)


def test_neighbours_are_those_of_a_full_matrix(sae, cache, dense):
    indices, values = nearest_by_direction(sae.decoder, 5, chunk=7, progress=False)
    unit = nn.functional.normalize(sae.decoder.detach(), dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-2)
    torch.testing.assert_close(values, cosines.topk(5).values)
    torch.testing.assert_close(cosines.gather(1, indices), values)

    indices, values = nearest_by_coactivation(cache, 5, progress=False)
    active = dense > 0
    shared = (active.T.astype(int) @ active).astype(float)
    counts = active.sum(0)
    jaccard = shared / np.maximum(counts[:, None] + counts[None] - shared, 1)
    np.fill_diagonal(jaccard, -1)
    np.testing.assert_allclose(values, -np.sort(-jaccard, axis=1)[:, :5], rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(jaccard, indices.numpy(), 1), values, rtol=1e-6)
    assert not (indices == torch.arange(40)[:, None]).any()
    with pytest.raises(ConfigurationError, match="39 other features"):
        nearest_by_direction(sae.decoder, 40)


def test_logit_effects_are_the_slope_of_the_models_own_end(model, sae, cache):
    """A small push of the last block's output, compared at one token after the other."""
    text = cache.document(0)[None]
    directions = sae.decoder.detach()[:6]
    found = logit_effects(model, directions, text, count=5, progress=False)
    with torch.no_grad():
        states = model.model.layers[-1](model(text, output_hidden_states=True).hidden_states[-2], **rotary(model, text))
        states = states[0] if isinstance(states, tuple) else states
        around = states.reshape(-1, states.shape[-1])[1:][-8:].double()
        end = nn.Sequential(model.model.norm, model.lm_head).double()
        for number, direction in enumerate(directions.double()):
            slopes = [torch.autograd.functional.jvp(lambda x: end(x), state, direction)[1] for state in around]
            mean = torch.stack(slopes).mean(0)
            mean = mean - mean.mean()
            top = mean.topk(5)
            torch.testing.assert_close(found.rise[number].double(), top.values, rtol=1e-2, atol=1e-4)
            torch.testing.assert_close(
                mean[found.suppressed[number]], found.fall[number].double(), rtol=1e-2, atol=1e-4
            )
    end.float()


def rotary(model, text):
    positions = torch.arange(text.shape[1])[None]
    hidden = model.model.embed_tokens(text)
    return {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": None}


def test_logit_effects_need_a_head_and_directions_of_the_stream(model, cache):
    with pytest.raises(ModelError, match="names no output head"):
        logit_effects(nn.Linear(3, 3), torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ModelError, match="directions have 7 numbers"):
        logit_effects(model, torch.zeros(1, 7), cache.document(0)[None])
    with pytest.raises(ConfigurationError, match="count is 0"):
        logit_effects(model, torch.zeros(1, model.config.hidden_size), cache.document(0)[None], count=0)


def test_steering_adds_a_direction_and_leaves_no_trace(model):
    text = torch.arange(1, 9)[None]
    direction = torch.zeros(model.config.hidden_size)
    direction[0] = 3.0
    with torch.no_grad():
        plain = model(text).logits
        seen = []
        watching = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(text)
        with steering(model, 0, direction, skip_first=2):
            moved = model(text).logits
        watching.remove()
        torch.testing.assert_close(seen[1] - seen[0], (torch.arange(8) >= 2)[None, :, None] * direction)
        torch.testing.assert_close(moved[:, :2], plain[:, :2])
        torch.testing.assert_close(model(text).logits, plain)
    with pytest.raises(ConfigurationError, match=r"direction is \(3,\)"), steering(model, 0, torch.zeros(3)):
        model(text)
    with pytest.raises(UnknownNameError), steering(model, "layers", direction):
        model(text)


def test_text_written_with_no_strength_is_the_text_of_the_model_as_it_is(model, tokenizer, sae):
    (found,) = steer(model, tokenizer, 1, sae, [3], [2.0], (0.0, 50.0), ("a b c", "whale sea"), tokens=6)
    assert [each.prompt for each in found] == ["a b c", "whale sea"]
    for each in found:
        assert each.steered[0] == each.plain
    assert any(each.steered[1] != each.plain for each in found)
    with pytest.raises(ConfigurationError, match="feature is 40"):
        next(steer(model, tokenizer, 1, sae, [40], [2.0]))
    with pytest.raises(ConfigurationError, match="0 prompts"):
        next(steer(model, tokenizer, 1, sae, [0], [2.0], prompts=()))


def test_pieces_of_a_document_add_up_to_its_text():
    class Bytes:
        """A tokenizer whose tokens are bytes, so that most characters take several."""

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": list(text.encode())}

        def decode(self, ids, **options):
            return bytes(int(i) for i in ids).decode("utf-8", "replace")

        def batch_decode(self, rows, **options):
            return [self.decode(row) for row in rows]

    texts = ["a😀b", "é", "…x"]

    class Cache:
        tokens = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)
        offsets = np.cumsum([0, *(len(text.encode()) for text in texts)])

    pieces = document_pieces(Cache(), Bytes())
    for text, first, last in zip(texts, Cache.offsets, Cache.offsets[1:]):
        assert "".join(pieces[first:last]) == text
    assert pieces[:6] == ["a", "", "", "", "😀", "b"]
    assert token_texts(Bytes(), [98]) == {98: "b"}


def test_an_autoencoder_of_another_width_is_refused(model, tokenizer, cache):
    with pytest.raises(ConfigurationError, match="the cache has 40 features and the autoencoder 41"):
        explore(cache, SAE(model.config.hidden_size, 41, TopK(4)), model, tokenizer, progress=False)
