from __future__ import annotations

import copy

import pytest
import torch
import transformers

from gossamer.activations.contextual import ContextualSparse
from gossamer.activations.draft_tree import DraftTree
from gossamer.activations.greedy_text import GreedyText
from gossamer.activations.sirius import Sirius, SiriusGenerator, SiriusStats, Window
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, SparsityError
from gossamer.methods import create

PROMPT = torch.tensor([[5, 9, 3, 44, 80, 13, 7, 51, 23]])
NEW = 24
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def sharp(tiny_llama):
    """A random model whose guesses differ enough that a sparse one strays from it."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return tiny_llama


def greedy(model, new=NEW, **options):
    return model.generate(input_ids=PROMPT, do_sample=False, **{**OPTIONS, "max_new_tokens": new, **options})


def generator(model, kind="griffin", **settings):
    return SiriusGenerator(model, ContextualSparse(model, kind), **{"kernel_size": 6, **settings})


@torch.no_grad()
def by_hand(model, kind, k, thr, new, exact=False):
    """The loop without a cache: the text so far is read again for every token. Prompt neurons come from the prompt."""
    sparse = ContextualSparse(model, kind)
    with sparse.observing():
        logits = model(PROMPT).logits[0]
    text, windows = [*PROMPT[0].tolist(), int(logits[-1].argmax())], []
    while len(text) < PROMPT.shape[1] + new:
        steps = min(k - 1, PROMPT.shape[1] + new - len(text) - 1)
        draft = drafted(model, sparse, text, steps)
        logits = model(torch.tensor([[*text, *draft]])).logits[0, len(text) - 1 :]
        kept = 0
        for row, token in zip(logits, draft):
            likely = (row / 0.6).softmax(-1)[token] >= thr
            if not (int(row.argmax()) == token if exact else likely):
                break
            kept += 1
        text += [*draft[:kept], int(logits[kept].argmax())]
        windows.append((steps, kept))
    sparse.remove()
    return text, windows


def drafted(model, sparse, text, steps):
    """What the sparse model says after a text that the full model has read, in which only new tokens are sparse."""
    cache = transformers.DynamicCache()
    model(torch.tensor([text[:-1]]), past_key_values=cache, use_cache=True)
    draft = [text[-1]]
    with sparse.active():
        for _ in range(steps):
            out = model(torch.tensor([draft[-1:]]), past_key_values=cache, use_cache=True)
            draft.append(int(out.logits[0, -1].argmax()))
    return draft[1:]


@pytest.mark.parametrize("kind", ["griffin", "cats"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_loop_is_draft_check_rewrite_and_roll_back(kind, exact, sharp):
    text, windows = by_hand(sharp, kind, 6, 0.1, NEW, exact)
    out = generator(sharp, kind, accept="exact" if exact else "likely").generate(input_ids=PROMPT, **OPTIONS)
    assert out.sequences[0].tolist() == text
    assert [(w.drafted, w.accepted) for w in out.stats.windows] == windows
    assert out.stats.rollbacks > 0


@pytest.mark.parametrize("settings", [{}, {"tree_width": 3}, {"kernel_size": 4}, {"kernel_size": 40}])
@pytest.mark.parametrize("kind", ["griffin", "cats"])
def test_speculative_decoding_gives_the_full_models_text(kind, settings, sharp):
    out = generator(sharp, kind, accept="exact", **settings).generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(out.sequences, greedy(sharp))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "width"), [("griffin", 1), ("griffin", 3), ("cats", 1), ("cats", 3)])
def test_positions_behind_an_image_are_those_of_the_model(kind, width, padded, picture_model, request):
    inputs = request.getfixturevalue("padded_picture_prompt" if padded else "picture_prompt")
    plain = request.getfixturevalue("picture_prompt")
    sparse = ContextualSparse(picture_model, kind)
    text = SiriusGenerator(picture_model, sparse, 4, accept="exact", tree_width=width).generate(**inputs, **OPTIONS)
    sparse.remove()
    start = 5 if padded else 0
    assert torch.equal(text.sequences[:, start:], picture_model.generate(**plain, do_sample=False, **OPTIONS))


def test_a_second_turn_behind_an_image_keeps_its_positions(picture_model, picture_prompt):
    cache = transformers.DynamicCache()
    first = picture_model.generate(**picture_prompt, past_key_values=cache, do_sample=False, **OPTIONS)
    ids = torch.cat([first, torch.tensor([[13, 17, 21]])], dim=1)
    with torch.no_grad():
        picture_model(ids[:, cache.get_seq_length() : -3], past_key_values=cache, use_cache=True)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = copy.deepcopy(cache)
    expected = picture_model.generate(**turn, past_key_values=cache, do_sample=False, **OPTIONS)
    sparse = ContextualSparse(picture_model)
    out = SiriusGenerator(picture_model, sparse, 4, accept="exact").generate(**turn, past_key_values=ours, **OPTIONS)
    sparse.remove()
    assert torch.equal(out.sequences, expected)


def test_positions_that_do_not_count_tokens_are_refused_by_compiled_graphs(picture_model, picture_prompt):
    sparse = ContextualSparse(picture_model)
    corrected = SiriusGenerator(picture_model, sparse, 4, runtime="compile", backend="eager")
    with pytest.raises(ConfigurationError, match="M-RoPE"):
        corrected.generate(**picture_prompt, **OPTIONS)
    sparse.remove()


@pytest.mark.parametrize("stop", [None, 7])
def test_a_streamer_is_told_of_every_token(stop, sharp, listener):
    text = greedy(sharp)[0].tolist()
    options = OPTIONS if stop is None else {**OPTIONS, "eos_token_id": text[-stop]}
    out = generator(sharp, accept="exact").generate(input_ids=PROMPT, streamer=listener, **options)
    assert listener.tokens == out.sequences[0].tolist()
    assert listener.ended == 1


def test_a_sparse_model_that_keeps_all_is_never_rolled_back(sharp):
    sparse = ContextualSparse(sharp, "cats", 1.0)
    out = SiriusGenerator(sharp, sparse, kernel_size=5, thr=0.0).generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(out.sequences, greedy(sharp))
    assert out.stats.rollbacks == 0
    assert out.stats.aal == 5
    assert out.stats.effective_density == 1
    assert sum(w.advance for w in out.stats.windows) == NEW - 1


def test_threshold_one_is_the_full_model_and_threshold_zero_accepts_everything(sharp):
    strict = generator(sharp, thr=1.0).generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(strict.sequences, greedy(sharp))
    lax = generator(sharp, thr=0.0).generate(input_ids=PROMPT, **OPTIONS)
    unchecked = generator(sharp, rollback=False).generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(lax.sequences, unchecked.sequences)
    assert lax.stats.rollbacks == unchecked.stats.rollbacks == 0
    assert not torch.equal(lax.sequences, greedy(sharp))


def test_without_rewriting_the_sparse_keys_and_values_stay(sharp):
    """With everything accepted and nothing rewritten, only the full model's own tokens differ from sparse decoding."""
    steps = []

    class Spy(SiriusGenerator):
        def _window(self, text):
            ended = super()._window(text)
            steps.append([layer.keys.clone() for layer in self._text.cache.layers])
            return ended

    caches = {}
    for rewrite in (True, False):
        steps.clear()
        Spy(sharp, ContextualSparse(sharp), kernel_size=6, rollback=False, rewrite=rewrite).generate(
            input_ids=PROMPT, **OPTIONS
        )
        caches[rewrite] = steps[0]
    length = PROMPT.shape[1]
    for layer, (clean, kept) in enumerate(zip(caches[True], caches[False])):
        assert torch.equal(clean[:, :, :length], kept[:, :, :length])
        # the first layer's keys do not depend on feed-forward layers; the draft's last token was never drafted from
        assert torch.allclose(clean[:, :, length:], kept[:, :, length:], atol=1e-5) == (layer == 0)
        assert torch.equal(clean[:, :, length + 5], kept[:, :, length + 5])


def test_the_full_model_reads_exact_states_after_a_rewrite(sharp):
    last = {}

    class Spy(SiriusGenerator):
        def _window(self, text):
            ended = super()._window(text)
            keys = [layer.keys.clone() for layer in self._text.cache.layers]
            last["keys"], last["ids"] = keys, text.ids[:, :-1]
            return ended

    for width in (1, 3):
        Spy(sharp, ContextualSparse(sharp), kernel_size=6, tree_width=width).generate(input_ids=PROMPT, **OPTIONS)
        cache = transformers.DynamicCache()
        with torch.no_grad():
            sharp(last["ids"], past_key_values=cache, use_cache=True)
        for ours, layer in zip(last["keys"], cache.layers):
            torch.testing.assert_close(ours[:, :, : layer.keys.shape[2]], layer.keys, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- end of text


def test_an_end_that_the_sparse_model_reaches_has_to_be_approved(sharp):
    """With thr=1 the check never approves what differs from the full model, so the text ends where that would end."""
    full = greedy(sharp, 60)[0, PROMPT.shape[1] :].tolist()
    sparse_text = generator(sharp, rollback=False).generate(input_ids=PROMPT, **OPTIONS).sequences[0].tolist()
    for end in {full[3], full[10], sparse_text[PROMPT.shape[1] + 2]}:
        options = {"eos_token_id": end, "max_new_tokens": 60}
        out = generator(sharp, accept="exact").generate(input_ids=PROMPT, **{**OPTIONS, **options})
        assert torch.equal(out.sequences, greedy(sharp, 60, eos_token_id=end))
        assert out.sequences[0, PROMPT.shape[1] : -1].tolist().count(end) == 0


@pytest.mark.parametrize("new", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("width", [1, 3])
def test_no_more_tokens_come_than_were_asked_for(new, width, sharp):
    out = generator(sharp, tree_width=width).generate(input_ids=PROMPT, **{**OPTIONS, "max_new_tokens": new})
    assert out.sequences.shape == (1, PROMPT.shape[1] + new)


# ----------------------------------------------------------------------------------- inside generate


def test_it_is_a_decoding_loop_of_transformers(sharp):
    ours = generator(sharp)
    inside = sharp.generate(input_ids=PROMPT, do_sample=False, custom_generate=ours.loop, **OPTIONS)
    assert torch.equal(inside, ours.generate(input_ids=PROMPT, **OPTIONS).sequences)


def test_processors_and_stopping_criteria_of_generate_are_heeded(sharp):
    rules = {"repetition_penalty": 1.7, "bad_words_ids": [[int(greedy(sharp)[0, PROMPT.shape[1] + 1])]]}
    for width in (1, 3):
        out = generator(sharp, accept="exact", tree_width=width).generate(input_ids=PROMPT, **OPTIONS, **rules)
        assert torch.equal(out.sequences, greedy(sharp, **rules))
    assert not torch.equal(out.sequences, greedy(sharp))


def test_padding_in_front_changes_nothing(sharp):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    out = generator(sharp).generate(input_ids=padded, attention_mask=mask, **OPTIONS)
    plain = generator(sharp).generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(out.sequences[:, 3:], plain.sequences)
    assert out.sequences[0, :3].tolist() == [0, 0, 0]


def test_a_conversation_goes_on_from_its_cache(sharp):
    cache = transformers.DynamicCache()
    with torch.no_grad():
        sharp(PROMPT[:, :4], past_key_values=cache, use_cache=True)
    out = generator(sharp, accept="exact").generate(input_ids=PROMPT, past_key_values=cache, **OPTIONS)
    assert torch.equal(out.sequences, greedy(sharp))


def test_what_is_not_greedy_or_not_one_sequence_is_refused(sharp):
    ours = generator(sharp)
    with pytest.raises(ConfigurationError, match="do_sample"):
        ours.generate(input_ids=PROMPT, **{**OPTIONS, "do_sample": True})
    with pytest.raises(ConfigurationError, match="2 sequences"):
        ours.generate(input_ids=PROMPT.repeat(2, 1), **OPTIONS)
    with pytest.raises(ConfigurationError, match="num_beams"):
        ours.generate(input_ids=PROMPT, num_beams=2, **OPTIONS)
    with pytest.raises(ConfigurationError, match=r"penalty_alpha is 0\.6"):
        ours.generate(input_ids=PROMPT, penalty_alpha=0.6, top_k=4, **OPTIONS)
    with pytest.raises(ConfigurationError, match="dola_layers is 'high'"):
        ours.generate(input_ids=PROMPT, dola_layers="high", **OPTIONS)
    with pytest.raises(ConfigurationError, match="prompt without tokens"):
        ours.generate(input_ids=PROMPT[:, :0], **OPTIONS)
    with pytest.raises(ConfigurationError, match="prompt without tokens"):
        ours.generate(inputs_embeds=sharp.get_input_embeddings()(PROMPT), **OPTIONS)
    with pytest.raises(CalibrationError, match="at least 2"):
        ours.generate(input_ids=PROMPT[:, :1], **OPTIONS)
    # a refusal leaves the model dense
    assert torch.equal(greedy(sharp), greedy(copy.deepcopy(sharp)))


def test_a_model_with_sliding_windows_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 64}
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **more)).eval()
    with pytest.raises(ConfigurationError, match=r"SlidingWindow.*cannot be cropped"):
        generator(gemma).generate(input_ids=PROMPT, **OPTIONS)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 0},
        {"thr": 1.5},
        {"tau": 0},
        {"tree_width": 0},
        {"accept": "always"},
        {"tree_width": 2, "rewrite": False},
    ],
)
def test_settings_out_of_range_are_refused(settings, tiny_llama):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        generator(tiny_llama, **settings)


def test_trees_need_positions_that_can_be_told():
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0)
    )
    with pytest.raises(ModelError, match=r"BloomForCausalLM takes no positions .* ALiBi; a tree of drafts"):
        Sirius(tree_width=2).install(bloom)
    found = generator(bloom.eval(), accept="exact").generate(input_ids=PROMPT, **OPTIONS)
    assert torch.equal(found.sequences, greedy(bloom))


def test_the_registered_method_makes_a_generator_that_can_be_removed(sharp):
    dense = greedy(sharp)
    made = create("sirius", sparsity=0.4, kernel_size=4).install(sharp)
    assert made.sparse.keep == pytest.approx(0.6)
    made.generate(input_ids=PROMPT, **OPTIONS)
    made.remove()
    assert torch.equal(greedy(sharp), dense)
    with pytest.raises(SparsityError):
        Sirius(sparsity=1.0)
    with pytest.raises(ConfigurationError, match="another model"):
        SiriusGenerator(copy.deepcopy(sharp), ContextualSparse(sharp))


# ------------------------------------------------------------------------------------------- pieces


def test_the_papers_example_of_effective_density():
    stats = SiriusStats(16, 0.65, [Window(15, 15, 16, 16), Window(15, 13, 14, 16), Window(3, 1, 2, 4)])
    assert stats.aal == 15  # the window that the end cut short does not count
    assert stats.effective_density == pytest.approx((15 * 0.65 + 1) / 15)
    assert stats.measured_density == pytest.approx((33 * 0.65 + 3) / 32)
    assert stats.rollbacks == 2
    assert pytest.approx(0.706, abs=5e-4) == ((16 - 1) * 0.65 + 1) / 15.22


def test_a_tree_shows_each_token_its_own_ancestors():
    tree = DraftTree([7])
    left, right = tree.add(8, 0), tree.add(9, 0)
    deep = tree.add(10, right)
    assert tree.path(deep) == [0, right, deep]
    assert tree.words(deep) == [9, 10]
    slots = {0: 0, left: 1, right: 2, deep: 3}
    ids, positions, mask = tree.inputs([0, left, right, deep], slots, 2, torch.empty(0))
    assert ids.tolist() == [[7, 8, 9, 10]]
    assert positions.tolist() == [[2, 3, 3, 4]]
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    small, leaves = tree.pruned([deep])
    assert (small.tokens, small.parents, leaves) == ([7, 9, 10], [-1, 0, 1], [2])


def test_a_wider_tree_is_accepted_at_least_as_far_at_its_first_check(sharp):
    first = [
        generator(sharp, tree_width=width, thr=0.02).generate(input_ids=PROMPT, **OPTIONS).stats.windows[0]
        for width in (1, 8)
    ]
    assert first[1].accepted >= first[0].accepted
    assert first[1].read > first[0].read


def test_a_text_stops_at_its_first_ending():
    text = GreedyText(PROMPT, None, lambda ids, scores: torch.tensor([int(ids[0, -1]) == 3]), 100)
    assert not text.append([4, 5])
    assert text.append([6, 3, 8])
    assert text.ids[0, PROMPT.shape[1] :].tolist() == [4, 5, 6, 3]
    assert text.generated == 4
