from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from gossamer.activations.core_sets import (
    CoreNeurons,
    CoreTokens,
    expected_overlap,
    max_distance_elbow,
    overlaps,
    projection_importance,
)
from gossamer.activations.corematching import CoreMatching
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, SparsityError
from gossamer.measure.token_pruning_flops import generation_flops
from gossamer.methods import create

PROMPT = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(2))
IMAGE = slice(5, 25)
OPTIONS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def sharp(tiny_llama):
    """A random model whose guesses depend on what it has read."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return tiny_llama


def droppable():
    marks = torch.zeros(30, dtype=torch.bool)
    marks[IMAGE] = True
    return marks


# ----------------------------------------------------------------------------------------- core sets

A = torch.tensor(
    [
        [9.0, 5.0, 1.0, -2.0, 0.0],
        [8.0, -1.0, 7.0, -3.0, 0.5],
        [-1.0, -2.0, 3.0, -1.0, -4.0],
        [-1.0, -2.0, -3.0, -1.0, 0.0],
    ]
)


def test_a_tokens_core_neurons_are_the_top_share_of_its_positive_ones():
    assert CoreNeurons(rho=0.5).of_tokens(A).int().tolist() == [
        [1, 1, 0, 0, 0],  # half of 3, rounded up
        [1, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],  # zero is not active
    ]
    assert torch.equal(CoreNeurons(active="positive").of_tokens(A), A > 0)
    assert torch.equal(CoreNeurons(rho=1.0).of_tokens(A), A > 0)


def test_core_neurons_are_those_of_the_most_tokens():
    assert CoreNeurons(rho=0.5, beta=0.4).fit(A).tolist() == [0, 2]
    assert CoreNeurons(rho=0.5, beta=0.6).fit(A).tolist() == [0, 1, 2]
    assert CoreNeurons(rho=0.5, beta=0.01).fit(A[None]).tolist() == [2]  # 0 and 2 are equally frequent: the later stays


def test_tokens_are_scored_by_how_many_neurons_they_share():
    neurons = CoreNeurons(rho=0.5, beta=0.4)
    assert CoreTokens().scores(A, neurons).tolist() == [2, 2, 1, 0]
    assert CoreTokens(reference=-2).scores(A, neurons).tolist() == [1, 1, 1, 0]
    assert overlaps(A).tolist() == [[3, 2, 1, 0], [2, 3, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_the_elbow_is_the_point_farthest_from_the_line_through_the_ends():
    values = torch.tensor([10.0, 9.0, 8.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    line = torch.linspace(10, 0, 8)
    farthest = int((values - line).abs().argmax())
    assert max_distance_elbow(values[torch.randperm(8)]) == float(values[farthest]) == 2.0
    assert max_distance_elbow(torch.full((5,), 3.0)) is None
    with pytest.raises(CalibrationError, match="no values"):
        max_distance_elbow(torch.empty(0))


def test_what_stands_above_the_elbow_stays_with_text_and_first_positions():
    scores = torch.tensor([0.0, 0.0, 10.0, 9.0, 8.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    marks = torch.ones(11, dtype=torch.bool)
    marks[-1] = False
    assert CoreTokens(sinks=2).choose(scores, marks).tolist() == [0, 1, 2, 3, 4, 10]
    assert CoreTokens(keep=("text",)).choose(scores, marks).tolist() == [2, 3, 4, 10]
    assert CoreTokens(keep=("text",), elbow=False, share=0.2).choose(scores, marks).tolist() == [2, 3, 10]
    assert CoreTokens(keep=("text",), least=5).choose(scores, marks).tolist() == [2, 3, 4, 5, 6, 10]
    constant = torch.ones(11)
    assert len(CoreTokens().choose(constant, marks)) == 11  # nothing stands out, so all stay
    assert CoreTokens(sinks=20).choose(scores, marks).tolist() == list(range(11))


def test_counts_beyond_half_precision_are_exact():
    many = torch.ones(2, 5000, dtype=torch.float16)
    assert overlaps(many).tolist() == [[5000, 5000], [5000, 5000]]
    assert CoreTokens().scores(many, CoreNeurons(beta=1.0)).tolist() == [5000, 5000]


@pytest.mark.parametrize("cosine", [-1.0, -0.6, 0.0, 0.3, 0.9, 1.0])
def test_overlap_under_random_weights_is_that_of_the_formula(cosine):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    share = overlaps(tokens @ rows.T)[0, 1] / len(rows)
    # four standard errors
    assert float(share) == pytest.approx(
        float(expected_overlap(torch.tensor(cosine), 1)), abs=4 * 0.5 / len(rows) ** 0.5
    )


def test_importance_is_attention_times_the_cosine_of_outputs():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    found = projection_importance(torch.tensor([0.5, 0.2, 0.3]), outputs)
    assert found.tolist() == pytest.approx([0.5 / math.sqrt(2), 0.2 / math.sqrt(2), 0.3])


@pytest.mark.parametrize("bad", [{"rho": 0}, {"beta": 1.2}])
def test_shares_out_of_range_are_refused(bad):
    with pytest.raises(SparsityError, match=next(iter(bad))):
        CoreNeurons(**bad)


def test_settings_that_make_no_sense_are_refused():
    for bad in ({"keep": ("sink",)}, {"keep": ("text", "tail")}, {"sinks": -1}, {"active": "all"}):
        with pytest.raises(ConfigurationError):
            CoreTokens(**bad)
    with pytest.raises(ConfigurationError, match="reference"):
        CoreTokens(reference=-5).scores(A)
    with pytest.raises(ConfigurationError, match="one sequence"):
        CoreNeurons().fit(torch.ones(2, 3, 4))


# ------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def masked(model, ids, kept, layer):
    """Logits of a model in which, behind a layer, nobody sees the tokens that are not kept: by masks alone."""
    length = ids.shape[1]
    stays = torch.zeros(length, dtype=torch.bool)
    stays[kept] = True
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # a dropped token sees itself, so that its row has an end; nobody asks for it
    later = (causal & stays) | torch.eye(length, dtype=torch.bool)
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs, mask=causal if number <= layer else later: (
                args,
                {**kwargs, "attention_mask": mask[None, None]},
            ),
            with_kwargs=True,
        )
        for number, block in enumerate(model.model.layers)
    ]
    logits = model(ids).logits[0]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_dropping_a_token_is_masking_it_behind_the_layer(layer, sharp):
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 11, 12, 20, 25, 26, 27, 28, 29])
    read = CoreMatching(layer=layer).install(sharp).read(PROMPT, droppable(), kept=kept)
    torch.testing.assert_close(read.logits, masked(sharp, PROMPT, kept, layer)[-1], rtol=1e-4, atol=1e-4)
    assert {entry.keys.shape[2] for entry in read.cache.layers} == {14}


@torch.no_grad()
def test_later_tokens_see_the_kept_ones_at_their_old_positions(sharp):
    """The last layer has seen the whole prompt; what comes later sees the kept entries, far from each other."""
    kept = torch.tensor([0, 3, 7, 12, 29])
    generator = CoreMatching(layer=2).install(sharp)
    read = generator.read(PROMPT, droppable(), kept=kept, neurons=False)
    more = torch.tensor([[4, 8, 15]])
    ours = generator.extend(read, more)
    both = torch.cat([PROMPT, more], dim=1)
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    gone = torch.ones(33, dtype=torch.bool)
    gone[kept] = False
    gone[30:] = False
    mask[30:, gone] = False
    expected = sharp(both, attention_mask=mask[None, None]).logits[0, 30:]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert read.cache.get_seq_length() == 8
    again = generator.extend(read, torch.tensor([[16]]))
    assert read.added == 4
    assert torch.equal(again[-1], read.logits)


def test_the_chosen_tokens_are_those_that_match_at_the_layer(sharp):
    seen = []
    handle = sharp.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        sharp(PROMPT)
    handle.remove()
    expected = CoreTokens().select(seen[0], droppable(), CoreNeurons())
    read = CoreMatching(layer=1).install(sharp).read(PROMPT, droppable())
    assert torch.equal(read.kept, expected)
    assert 10 < len(expected) < 30


def test_keeping_everything_is_the_plain_model(sharp):
    dense = sharp.generate(input_ids=PROMPT, do_sample=False, **OPTIONS)
    everything = CoreMatching(neurons=CoreNeurons(beta=1.0), tokens=CoreTokens(elbow=False, share=1.0))
    assert torch.equal(everything.install(sharp, IMAGE).generate(input_ids=PROMPT, **OPTIONS), dense)


def test_generation_drops_entries_and_neurons_and_leaves_no_trace(sharp):
    before = {name: value.clone() for name, value in sharp.state_dict().items()}
    dense = sharp.generate(input_ids=PROMPT, do_sample=False, **OPTIONS)
    generator = create("corematching").install(sharp, IMAGE)
    widths = []
    handle = sharp.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[-1])
    )
    out = generator.generate(input_ids=PROMPT, **OPTIONS)
    handle.remove()
    assert out.shape == (1, 38)
    assert widths == [72] + [29] * 7  # the prompt in full, then ⌈0.4 · 72⌉
    kept = len(generator.prompt.kept)
    assert kept < 30
    assert {entry.keys.shape[2] for entry in generator.prompt.cache.layers} == {kept + 7}
    assert torch.equal(sharp.generate(input_ids=PROMPT, do_sample=False, **OPTIONS), dense)
    assert all(torch.equal(value, before[name]) for name, value in sharp.state_dict().items())


# ------------------------------------------------------------------------------- caches that choose for themselves


def released(**options):
    return CoreMatching(schedule="cache", layers=range(1, 3), tokens=CoreTokens(reference=-5), **options)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [range(1, 3), range(2)])
def test_layers_lose_the_entries_that_do_not_match_their_own_neurons(layers, implementation, sharp):
    """The prompt is read in full; tokens behind it do not see, in each of the layers, what that layer has dropped."""
    middles = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: middles.append(args[0][0]))
        for block in sharp.model.layers
    ]
    plain = sharp(PROMPT).logits[0, -1]
    for handle in handles:
        handle.remove()
    method = CoreMatching(schedule="cache", layers=layers, tokens=CoreTokens(reference=-5), prune_neurons=False)
    generator = method.install(sharp)
    read = generator.read(PROMPT, droppable())
    torch.testing.assert_close(read.logits, plain, rtol=1e-5, atol=1e-5)
    kept = {number: CoreTokens(reference=-5).select(middles[number], droppable()) for number in layers}
    assert {number: index.tolist() for number, index in read.own.items()} == {n: k.tolist() for n, k in kept.items()}
    counts = [len(kept[number]) if number in kept else 30 for number in range(3)]
    assert [entry.keys.shape[2] for entry in read.cache.layers] == counts
    assert len(set(counts)) > 1

    more = torch.tensor([[4, 8, 15]])
    hidden = torch.zeros(3, 33, 33, dtype=torch.bool)
    for number, index in kept.items():
        gone = torch.ones(33, dtype=torch.bool)
        gone[index] = False
        gone[30:] = False
        hidden[number, 30:, gone] = True
    causal = torch.ones(33, 33, dtype=torch.bool).tril()
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs, mask=causal & ~hidden[number]: (
                args,
                {**kwargs, "attention_mask": mask[None, None]},
            ),
            with_kwargs=True,
        )
        for number, block in enumerate(sharp.model.layers)
    ]
    expected = sharp(torch.cat([PROMPT, more], dim=1)).logits[0, 30:]
    for handle in handles:
        handle.remove()
    sharp.set_attn_implementation(implementation)
    torch.testing.assert_close(generator.extend(read, more), expected, rtol=1e-4, atol=1e-4)
    one = generator.extend(read, torch.tensor([[16]]))
    assert torch.equal(one[-1], read.logits)
    assert [entry.keys.shape[2] for entry in read.cache.layers] == [count + 4 for count in counts]
    assert not any(block._forward_pre_hooks for block in sharp.model.layers)


def test_generation_under_the_released_schedule_is_that_of_its_parts(sharp):
    generator = released().install(sharp, IMAGE)
    text = generator.generate(input_ids=PROMPT, **OPTIONS)
    read = generator.read(PROMPT, droppable())
    tokens = [int(read.logits.argmax())]
    with generator.sparse(read):
        while len(tokens) < 8:
            tokens.append(int(generator.extend(read, torch.tensor([tokens[-1:]]))[-1].argmax()))
    assert text[0, 30:].tolist() == tokens
    everything = released(neurons=CoreNeurons(beta=1.0))
    everything.tokens = CoreTokens(elbow=False, share=1.0)
    dense = sharp.generate(input_ids=PROMPT, do_sample=False, **OPTIONS)
    assert torch.equal(everything.install(sharp, IMAGE).generate(input_ids=PROMPT, **OPTIONS), dense)


def test_the_released_range_is_kept_in_proportion(sharp):
    assert CoreMatching(schedule="cache").install(sharp).own_caches == range(1)
    assert CoreMatching().install(sharp).own_caches == range(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=32))
    assert CoreMatching(schedule="cache").install(deep).own_caches == range(5, 19)  # the 6th to the 19th


def test_marks_slices_and_ids_name_the_same_tokens_also_with_padding(sharp):
    ids = PROMPT.clone()
    ids[0, IMAGE] = 96
    generator = CoreMatching().install(sharp)
    by_slice = generator.generate(IMAGE, input_ids=ids, **OPTIONS)
    assert torch.equal(generator.generate(96, input_ids=ids, **OPTIONS), by_slice)
    assert torch.equal(generator.generate(droppable(), input_ids=ids, **OPTIONS), by_slice)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(34) >= 4).long()[None]
    assert torch.equal(generator.generate(96, input_ids=padded, attention_mask=mask, **OPTIONS)[:, 4:], by_slice)
    inside = CoreMatching().install(sharp, IMAGE)
    assert torch.equal(sharp.generate(input_ids=ids, do_sample=False, custom_generate=inside.loop, **OPTIONS), by_slice)


def test_a_model_with_vision_drops_image_tokens():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=40)
    vision = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=4, projection_dim=16)
    ends = {"image_token_index": 39, "image_token_id": 39}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16, **ends)
    ).eval()
    ids = torch.tensor([[1, 5, *[39] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 16, 16)
    kept_all = CoreMatching(neurons=CoreNeurons(beta=1.0), tokens=CoreTokens(elbow=False, share=1.0))
    dense = model.generate(input_ids=ids, pixel_values=pixels, do_sample=False, **OPTIONS)
    assert torch.equal(kept_all.install(model, 39).generate(input_ids=ids, pixel_values=pixels, **OPTIONS), dense)
    generator = CoreMatching(layer=0, tokens=CoreTokens(sinks=1)).install(model, 39)
    out = generator.generate(input_ids=ids, pixel_values=pixels, **OPTIONS)
    assert out.shape == (1, 29)
    assert len(generator.prompt.kept) < 21
    assert {0, 1, 18, 19, 20} <= set(generator.prompt.kept.tolist())


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["drop", "cache"])
def test_tokens_behind_an_image_have_the_positions_that_the_model_gives_them(schedule, picture_model, picture_prompt):
    everything = CoreTokens(elbow=False, share=1.0)
    method = CoreMatching(neurons=CoreNeurons(beta=1.0), tokens=everything, schedule=schedule)
    generator = method.install(picture_model, 100)
    text = generator.generate(**picture_prompt, **OPTIONS)
    assert torch.equal(text, picture_model.generate(**picture_prompt, do_sample=False, **OPTIONS))
    ids = picture_prompt["input_ids"]
    inputs = {name: value for name, value in picture_prompt.items() if name not in ("input_ids", "attention_mask")}
    read = generator.read(ids, ids[0] == 100, **inputs)
    assert read.shift.flatten().tolist() == [-12] * 3  # 16 tokens of an image take 4 positions
    cache = transformers.DynamicCache()
    dense = picture_model(ids, past_key_values=cache, use_cache=True, **inputs)
    torch.testing.assert_close(read.logits, dense.logits[0, -1])
    more = torch.tensor([[9, 11]])
    expected = picture_model(more, past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(generator.extend(read, more), expected)


def test_padding_before_an_image_changes_nothing(picture_model, picture_prompt, padded_picture_prompt):
    generator = CoreMatching(layer=0).install(picture_model, 100)
    text = generator.generate(**picture_prompt, **OPTIONS)
    kept = generator.prompt.kept
    assert torch.equal(generator.generate(**padded_picture_prompt, **OPTIONS)[:, 5:], text)
    assert torch.equal(generator.prompt.kept, kept)
    assert len(kept) < 24


def test_a_streamer_is_told_of_every_token(sharp, listener):
    text = CoreMatching().install(sharp, IMAGE).generate(input_ids=PROMPT, streamer=listener, **OPTIONS)
    assert listener.tokens == text[0].tolist()
    assert listener.ended == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize(
    ("settings", "thinned"), [({"layer": 2}, range(3)), ({"schedule": "cache", "layers": range(1, 3)}, range(1, 3))]
)
def test_models_that_name_no_masks_and_count_their_tokens_at_the_end(family, settings, thinned):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    config = transformers.AutoConfig.for_model(family, **sizes, **({"rotary_dim": 8} if family == "gptj" else {}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    kept, more = torch.tensor([*range(6), 8, 13, *range(20, 30)]), torch.tensor([[4, 8, 15]])
    generator = CoreMatching(prune_neurons=False, **settings).install(model)
    found = generator.extend(generator.read(PROMPT, droppable(), kept=kept), more)

    gone = torch.tensor([place for place in range(30) if place not in kept])

    def hide(value):
        is_mask = isinstance(value, torch.Tensor) and value.dim() == 4
        return value.index_fill(-1, gone, torch.finfo(value.dtype).min) if is_mask else value

    cache = model(PROMPT, use_cache=True).past_key_values
    for number in thinned:
        model.transformer.h[number].register_forward_pre_hook(
            lambda module, args, kwargs: (tuple(map(hide, args)), {name: hide(v) for name, v in kwargs.items()}),
            with_kwargs=True,
        )
    expected = model(more, past_key_values=cache).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_leave_early_and_the_prompt_has_its_length_at_the_end():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = CoreMatching(layer=0).install(model, IMAGE)
    assert generator.generate(input_ids=PROMPT, **OPTIONS).shape[1] == PROMPT.shape[1] + OPTIONS["max_new_tokens"]
    assert len(generator.prompt.kept) < PROMPT.shape[1]


# ------------------------------------------------------------------------------------------ bad input


def test_prompts_that_cannot_be_thinned_out_are_refused(sharp):
    generator = CoreMatching().install(sharp)
    with pytest.raises(CalibrationError, match="may be dropped"):
        generator.generate(input_ids=PROMPT, **OPTIONS)
    with pytest.raises(CalibrationError, match="may be dropped"):
        generator.generate(slice(50, 60), input_ids=PROMPT, **OPTIONS)
    with pytest.raises(ConfigurationError, match="marks 3"):
        generator.generate(torch.ones(3), input_ids=PROMPT, **OPTIONS)
    with pytest.raises(ConfigurationError, match="2 sequences"):
        generator.generate(IMAGE, input_ids=PROMPT.repeat(2, 1), **OPTIONS)
    with pytest.raises(ConfigurationError, match="without the last"):
        generator.read(PROMPT, droppable(), kept=torch.tensor([0, 1, 2]))
    cache = transformers.DynamicCache()
    sharp(PROMPT[:, :3], past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigurationError, match="holds tokens already"):
        generator.generate(IMAGE, input_ids=PROMPT, past_key_values=cache, **OPTIONS)


def test_models_that_do_not_fit_are_refused(sharp):
    with pytest.raises(ConfigurationError, match="layers 0 to 2"):
        CoreMatching(layer=3).install(sharp)
    with pytest.raises(ConfigurationError, match="layer is 3; the model has layers 0 to 2"):
        CoreMatching(schedule="cache", layers=range(2, 4)).install(sharp)
    with pytest.raises(ConfigurationError, match="drop or cache"):
        CoreMatching(schedule="mask")
    with pytest.raises(ConfigurationError, match="names none"):
        CoreMatching(schedule="cache", layers=range(3, 3))
    with pytest.raises(ModelError, match="stack"):
        CoreMatching().install(nn.Linear(3, 3))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 64}
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **more))
    with pytest.raises(ConfigurationError, match="SlidingWindow"):
        CoreMatching().install(gemma, IMAGE)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=97, alibi=True, **sizes))
    for counting in (bloom, falcon):
        with pytest.raises(ModelError, match=r"takes no positions of tokens .* ALiBi; CoreMatching"):
            CoreMatching(schedule="cache").install(counting, IMAGE)


# ------------------------------------------------------------------------------------------ operations


def test_operations_are_counted_by_hand(tiny_llama):
    attention, forward, head = 2 * 48 * 48 + 2 * 48 * 24, 3 * 48 * 72, 97 * 48
    dense = generation_flops(tiny_llama, 10, 2)
    assert dense.prefill == 3 * (2 * (attention + forward) * 10 + 4 * 48 * 55) + 2 * head
    assert dense.decode == 2 * (3 * 2 * (attention + forward) + 2 * head) + 3 * 4 * 48 * (11 + 12)
    core = generation_flops(tiny_llama, 10, 2, kept=4, layer=0, neurons=0.5)
    one, two = (2 * (attention + forward) * n + 4 * 48 * n * (n + 1) // 2 for n in (10, 4))
    assert core.prefill == one + 2 * two + 2 * head
    assert core.decode == 2 * (3 * 2 * (attention + forward // 2) + 2 * head) + 3 * 4 * 48 * (5 + 6)
    assert core.total == core.prefill + core.decode
    released = generation_flops(tiny_llama, 10, 2, kept=4, own=range(1, 2))
    assert released.prefill == dense.prefill
    assert released.decode == dense.decode - 4 * 48 * 2 * (10 - 4)  # one block of three attends to 4 of 10, twice
    with pytest.raises(ConfigurationError, match="kept is 11"):
        generation_flops(tiny_llama, 10, 2, kept=11)
