"""What a direction does to predictions, against a model that is changed by hand."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.steering_effect import steering_effect


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 97, (length,), generator=generator) for length in (9, 14)]


def test_effects_are_those_of_the_model_with_the_direction_added(tiny_llama, prompts):
    directions = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * 3
    found = steering_effect(tiny_llama, 1, directions, prompts, scale=0.7, at_once=2, progress=False)
    layer, kept = tiny_llama.model.layers[1], []
    handle = layer.register_forward_hook(lambda *call: kept.append(call[2][0, 1:] if call[2].dim() == 3 else None))
    with torch.no_grad():
        plain = [tiny_llama(text[None]).logits[0, 1:] for text in prompts]
        handle.remove()
        length = torch.cat(kept).norm(dim=1).mean()
        for number, direction in enumerate(directions):
            added = direction / direction.norm() * 0.7 * length

            def add(module, args, output, added=added):
                return torch.cat([output[:, :1], output[:, 1:] + added], 1)

            handle = layer.register_forward_hook(add)
            steered = [tiny_llama(text[None]).logits[0, 1:] for text in prompts]
            handle.remove()
            before, after = torch.cat(plain), torch.cat(steered)
            divergence = torch.nn.functional.kl_div(
                after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            torch.testing.assert_close(found.divergence[number], divergence, rtol=1e-3, atol=1e-6)
            moved = after - before
            moved = moved - moved.mean(1, keepdim=True)
            torch.testing.assert_close(found.logit_change[number], moved.abs().mean(), rtol=1e-3, atol=1e-5)
    middle = float(found.divergence.median())
    assert found.share_above(middle) == pytest.approx(0.4)


def test_what_does_not_fit_is_refused(tiny_llama, prompts):
    with pytest.raises(ConfigurationError, match="12 numbers, activations 48"):
        steering_effect(tiny_llama, 1, torch.ones(1, 12), prompts, progress=False)
    with pytest.raises(ConfigurationError, match="scale is 0"):
        steering_effect(tiny_llama, 1, torch.ones(1, 48), prompts, scale=0, progress=False)
    with pytest.raises(CalibrationError, match="longer"):
        steering_effect(tiny_llama, 1, torch.ones(1, 48), [prompts[0][:1]], progress=False)
