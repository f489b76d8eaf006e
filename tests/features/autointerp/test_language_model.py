from __future__ import annotations

import numpy as np
import pytest
import torch
from autointerp_corpus import NUMBER, THE, Scripted, WordTokenizer
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.features.activation_rules import TopK
from gossamer.features.autointerp.embedding import MeanPooledEncoder
from gossamer.features.autointerp.generation import sample
from gossamer.features.autointerp.intervention import InterventionScorer, OutputExplainer, contexts
from gossamer.features.autointerp.language_model import EndingReader, shared_beginning
from gossamer.features.autointerp.scorers import EmbeddingScorer, SurprisalScorer
from gossamer.features.autointerp.steering import Steering
from gossamer.features.sae import SAE

SITE = 1


def ids(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for _ in range(count)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_shared_beginning_is_the_longest(sequences):
    found = shared_beginning(sequences)
    assert all(sequence[:found] == sequences[0][:found] for sequence in sequences)
    longer = {tuple(sequence[: found + 1]) for sequence in sequences}
    assert len(longer) > 1 or min(map(len, sequences)) == found


def test_losses_of_endings_are_those_of_whole_texts(tiny_llama):
    reader = EndingReader(tiny_llama, batch=2)
    first = ids(1, 9)[0]
    endings = [ids(1, n, n)[0] for n in (3, 1, 5, 4)]
    # one after the other: a new beginning, a longer, a shorter one, one that parts from the last, one token
    for beginning in (first, [*first, 5, 6], first[:4], [*first[:3], 8, 9, 1], first[:1]):
        for ending, losses in zip(endings, reader.losses(beginning, endings)):
            whole = torch.tensor([[*beginning, *ending]])
            with torch.inference_mode():
                log = tiny_llama(whole).logits[0].double().log_softmax(-1)
            wanted = -log[len(beginning) - 1 : -1].gather(1, whole[0, len(beginning) :, None])[:, 0]
            torch.testing.assert_close(losses.double(), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigurationError, match="beginning has no tokens"):
        reader.losses([], endings)
    with pytest.raises(ConfigurationError, match="an ending has no tokens"):
        reader.losses(first, [[]])


def test_next_tokens_of_texts_that_share_nothing(tiny_llama):
    texts = [[1, 2, 3], [4, 5], [4, 5, 6, 7]]
    found = EndingReader(tiny_llama).next_log_probabilities(texts)
    for text, row in zip(texts, found):
        with torch.inference_mode():
            wanted = tiny_llama(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)


def test_samples_end_where_they_should_and_follow_the_probabilities(tiny_llama):
    greedy = sample(tiny_llama, ids(2, 5), 6, 0.0)
    ended = sample(tiny_llama, ids(2, 5), 6, 0.0, ends=[greedy[0][2]])
    assert ended[0] == greedy[0][: greedy[0].index(greedy[0][2])]
    generator = torch.Generator().manual_seed(0)
    drawn = sample(tiny_llama, [[1, 2]] * 2000, 1, 1.0, generator)
    with torch.inference_mode():
        p = tiny_llama(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1).numpy()
    share = np.bincount([row[0] for row in drawn], minlength=97) / 2000
    assert np.abs(share - p).max() < 0.03


def test_surprisal_is_the_drop_of_the_mean_loss(builder, tiny_llama, tokenizer):
    record = builder.build(THE)
    score = SurprisalScorer(tiny_llama, tokenizer).score(record, "the whale")
    assert 0 <= score.value <= 1
    assert score.count == 40
    assert score.balanced_accuracy is None
    same = SurprisalScorer(tiny_llama, tokenizer).score(record, "Various unrelated sentences.")
    assert same.value == 0.5
    assert same.facts["drop_of_active"] == 0.0


def test_embedding_ranks_windows_by_their_cosine(builder):
    def embed(texts):
        found = np.array([[("the" in text.split()) or "The" in text, 1.0] for text in texts], float)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    record = builder.build(THE)
    assert EmbeddingScorer(embed).score(record, "The word").value == 1.0
    assert EmbeddingScorer(embed, query="find: {explanation}").score(record, "numbers").value == 0.0
    with pytest.raises(ConfigurationError, match="query is"):
        EmbeddingScorer(embed, query="find")


def test_mean_pooling_leaves_padding_out():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(shape, add_pooling_layer=False).eval()

    def read(texts, **_):
        rows = [[ord(letter) % 30 for letter in text] for text in texts]
        longest = max(map(len, rows))
        masks = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        padded = [row + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}

    together = MeanPooledEncoder(model, read, batch=3)(["abcdef", "xy", "hello"])
    alone = np.concatenate([MeanPooledEncoder(model, read)([text]) for text in ("abcdef", "xy", "hello")])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


# ------------------------------------------------------------------------------------------------ steering


@pytest.fixture
def sae():
    return SAE(48, 64, TopK(8)).eval()


def test_steering_moves_the_last_token_by_the_direction_and_keeps_the_rest(tiny_llama, sae):
    steering = Steering(tiny_llama, SITE, sae, 3)
    x = torch.randn(2, 5, 48)
    moved = steering.edit(2.5)(x)
    torch.testing.assert_close(moved[:, :-1], x[:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(moved[:, -1], x[:, -1] + 2.5 * sae.decoder[3] / sae.scale)


def test_a_silenced_latent_is_gone_from_the_reconstruction(tiny_llama, sae):
    x = torch.randn(6, 1, 48)
    codes = sae.encode(x[:, 0])
    latent = int(codes.indices[0])
    moved = Steering(tiny_llama, SITE, sae, latent).edit(None)(x)
    dense = codes.to_dense()
    torch.testing.assert_close((x - moved)[:, 0], dense[:, latent, None] * sae.decoder[latent] / sae.scale)
    assert Steering(tiny_llama, SITE, sae, latent).silenced(ids(3, 6)).divergence >= 0


def test_predictions_of_texts_of_different_lengths_are_those_of_each_alone(tiny_llama, sae):
    texts = [ids(1, n, n)[0] for n in (4, 7, 2)]
    steering = Steering(tiny_llama, SITE, sae, 5)
    together = steering.log_probabilities(texts, 3.0)
    alone = torch.cat([steering.log_probabilities([text], 3.0) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        clean = tiny_llama(torch.tensor([texts[0]])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(steering.log_probabilities(texts)[0], clean, rtol=1e-4, atol=1e-4)
    assert (together - steering.log_probabilities(texts)).abs().max() > 1e-3


@pytest.mark.parametrize("target", [0.001, 0.005])
def test_tuning_reaches_the_divergence(tiny_llama, sae, target):
    texts = ids(4, 6)
    steering = Steering(tiny_llama, SITE, sae, 7)
    tuned = steering.tuned(texts, target, tries=10)
    assert tuned.divergence == pytest.approx(target, rel=0.1)
    clean = steering.log_probabilities(texts)
    assert steering.divergence(clean, texts, tuned.strength) == pytest.approx(tuned.divergence)
    assert tuned.tries <= 10
    unreachable = steering.tuned(texts, 1e6, tries=4)
    assert unreachable.tries == 4
    assert unreachable.divergence < 1e6


def test_bad_latents_and_targets_are_refused(tiny_llama, sae):
    with pytest.raises(UnknownNameError, match="latent"):
        Steering(tiny_llama, SITE, sae, 64)
    with pytest.raises(ConfigurationError, match="target is 0"):
        Steering(tiny_llama, SITE, sae, 0).tuned(ids(1, 4), 0)


def test_promoted_tokens_are_those_that_rise_most(tiny_llama, sae):
    texts = ids(3, 5)
    steering = Steering(tiny_llama, SITE, sae, 2)
    gain = steering.log_probabilities(texts, 4.0).exp() - steering.log_probabilities(texts).exp()
    for row, found in zip(gain, steering.promoted(texts, 4.0, 3)):
        assert [token for token, _ in found] == row.argsort(descending=True)[:3].tolist()


def test_contexts_end_with_the_first_activation(builder):
    record = builder.build(NUMBER)
    for context in contexts(record.test, 10):
        assert context[-1] in (4, 5)
        assert not {4, 5} & set(context[:-1])
        assert len(context) > 1
    with pytest.raises(CalibrationError, match="none of 20 windows"):
        contexts(record.negatives, 10)


@pytest.fixture
def scorer(tiny_llama, sae):
    return InterventionScorer(tiny_llama, WordTokenizer(), SITE, sae, contexts=6, tokens=4, divergence=0.005)


def test_intervention_score_is_the_drop_of_the_explanations_surprise(builder, scorer, tiny_llama):
    from gossamer.features.autointerp import prompts

    record = builder.build(THE)
    score = scorer.score(record, "old whale")
    assert score.metric == "nats"
    assert score.count == 6
    assert score.low <= score.value <= score.high
    assert score.facts["divergence"] == pytest.approx(0.005, rel=0.2)
    clean, steered = scorer._texts(record)
    beginning, told = scorer._ids(prompts.passage_beginning()), scorer._ids('old whale"')

    def loss(passage):
        whole = torch.tensor([[*beginning, *scorer._ids(passage), *told]])
        with torch.inference_mode():
            log = tiny_llama(whole).logits[0].log_softmax(-1)
        return -float(log[-len(told) - 1 : -1].gather(1, whole[0, -len(told) :, None]).sum())

    wanted = np.mean([loss(c) - loss(s) for c, s in zip(clean, steered)])
    assert score.value == pytest.approx(wanted, abs=1e-3)
    best, found = scorer.best(record, ["old whale", "sea", "sea"])
    assert found.value == max(scorer.score(record, text).value for text in ("old whale", "sea"))
    assert best in ("old whale", "sea")


def test_candidates_of_outputs_need_no_language_model(builder, scorer):
    record = builder.build(THE)
    found = OutputExplainer(scorer, contexts=4).explanations(record)
    assert 1 <= len(found) <= 5
    assert found == OutputExplainer(scorer, contexts=4).explanations(record)
    client = Scripted(lambda said: f"[EXPLANATION]: {said.count('More likely')} texts")
    assert OutputExplainer(scorer, client, contexts=4).explanations(record) == ["4 texts"]
    assert OutputExplainer(scorer, Scripted(lambda _: None), contexts=4).explanations(record) == []


def test_ablation_is_scored_too(builder, tiny_llama, sae):
    scorer = InterventionScorer(tiny_llama, WordTokenizer(), SITE, sae, contexts=3, tokens=3, ablate=True)
    score = scorer.score(builder.build(THE), "whale")
    assert score.facts["strength"] is None
    with pytest.raises(ConfigurationError, match="belong together"):
        InterventionScorer(tiny_llama, WordTokenizer(), SITE, sae, judge=tiny_llama)
