import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.diffusion_transformer import DDIMSampler, DiffusionTransformer, diffusion_loss, schedule


def painter(size=(8, 8), text=2, seed=0, heads=2):
    """A model whose gates are open, unlike those of a new one."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(size, 2, 1, 2, 16, heads, 3, text).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


class Listener:
    def __init__(self):
        self.heard = []

    def begin(self, steps, context):
        self.heard.append(("begin", steps, context))

    def step(self, index, branch=""):
        self.heard.append((index, branch))


@pytest.mark.parametrize("size", [(8, 12), (3, 4, 8)])
def test_patches_are_put_together_again_in_raster_order(size):
    model = painter(size)
    shape = (2, *size[:-2], 1, *size[-2:])
    pictures = torch.arange(float(torch.Size(shape).numel())).view(shape)
    patches = model.patches(pictures)
    assert patches.shape == (2, model.tokens - 2, 4)
    assert torch.equal(model.unpatched(patches), pictures)
    row = size[-1]
    assert patches[0, 0].tolist() == [0, 1, row, row + 1]
    assert patches[0, 1].tolist() == [2, 3, row + 2, row + 3]


def test_a_new_model_predicts_zero():
    model = DiffusionTransformer((8, 8), 2, 1, 2, 16, 2, 3)
    assert not model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])).any()


def test_time_and_label_and_text_change_the_answer():
    model, x = painter(), torch.randn(1, 1, 8, 8)
    one = model(x, torch.tensor([0.5]), torch.tensor([0]))
    assert not torch.allclose(one, model(x, torch.tensor([0.7]), torch.tensor([0])))
    assert not torch.allclose(one, model(x, torch.tensor([0.5]), torch.tensor([1])))
    with torch.no_grad():
        model.text.weight.normal_()
    assert not torch.allclose(one, model(x, torch.tensor([0.5]), torch.tensor([0])))


def test_attention_goes_through_one_function_with_text_in_front():
    model, calls = painter(), []

    def attend(call):
        calls.append(call)
        return call.dense()

    x, time, labels = torch.randn(1, 1, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    plain = model(x, time, labels)
    model.attention = attend
    torch.testing.assert_close(model(x, time, labels), plain)
    assert [call.layer for call in calls] == [0, 1]
    assert calls[0].query.shape == (1, 2, 18, 8)
    assert not calls[0].causal


def test_a_prediction_that_is_right_brings_the_picture_back():
    """With the true velocity of one picture, every step of DDIM lies on the line between it and the noise."""
    model, target = painter(), torch.randn(1, 1, 8, 8)

    def velocity(x, time, labels):
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in schedule(time))
        return (alpha * x - target) / sigma

    model.forward = velocity
    found = DDIMSampler(model, 7).sample(torch.tensor([1]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, target, atol=0.02, rtol=0)


def test_the_schedule_keeps_variances():
    alpha, sigma = schedule(torch.linspace(0, 1, 11))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(11))
    assert (alpha.diff() < 0).all()


def test_guidance_goes_beyond_the_class():
    model, labels = painter(), torch.tensor([0, 1])

    def sampled(**options):
        return DDIMSampler(model, 4, **options).sample(labels, torch.Generator().manual_seed(0))

    torch.testing.assert_close(sampled(guidance=3.0), sampled(guidance=3.0, together=False))
    none = model.classes
    plain = DDIMSampler(model, 4, guidance=1.0).sample(torch.full((2,), none), torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled(guidance=0.0), plain)
    assert not torch.allclose(sampled(guidance=3.0), sampled(guidance=1.0), atol=1e-3)


def test_a_listener_hears_of_samples_steps_and_branches():
    model = painter()
    for options, expected in (
        ({}, [(0, ""), (1, "")]),
        ({"together": False}, [(0, "none"), (0, "class"), (1, "none"), (1, "class")]),
        ({"guidance": 1.0}, [(0, "class"), (1, "class")]),
    ):
        model.listener = Listener()
        DDIMSampler(model, 2, **options).sample(torch.tensor([0]), torch.Generator().manual_seed(0))
        assert model.listener.heard == [("begin", 2, slice(0, 2)), *expected]


def test_the_loss_of_a_new_model_is_the_size_of_the_velocity():
    model = DiffusionTransformer((8, 8), 2, 1, 1, 16, 2, 3)
    pictures = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = diffusion_loss(model, pictures, torch.zeros(64, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.0, abs=0.1)


def test_a_video_is_drawn_with_its_frames():
    found = DDIMSampler(painter((3, 4, 4)), 2).sample(torch.tensor([0, 2]), torch.Generator().manual_seed(0))
    assert found.shape == (2, 3, 1, 4, 4)


@pytest.mark.parametrize("size", [(8, 9), (8,), (2, 3, 8)])
def test_pictures_that_patches_do_not_divide_are_refused(size):
    with pytest.raises(ConfigurationError, match="multiples of patch 2"):
        DiffusionTransformer(size, 2, 1, 1, 16, 2, 3)


def test_a_sample_without_steps_is_refused():
    with pytest.raises(ConfigurationError, match="steps is 0"):
        DDIMSampler(painter(), 0)


def test_calls_say_how_to_compute_themselves():
    q = torch.randn(1, 2, 3, 4)
    call = AttentionCall(0, q, q, q, 0.5, causal=False)
    expected = torch.softmax(q @ q.mT * 0.5, -1) @ q
    torch.testing.assert_close(call.dense(), expected)
