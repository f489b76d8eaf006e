"""A vision model whose image tokens have fewer positions than their number."""

from __future__ import annotations

import pytest
import torch
import transformers

IMAGE = 100


@pytest.fixture(scope="session")
def picture_model():
    """A random Qwen2-VL whose guesses depend on what it has read."""
    text = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    marks = {"image_token_id": IMAGE, "vision_start_token_id": 101, "vision_end_token_id": 102, "video_token_id": 103}
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **marks)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def picture_prompt():
    """A prompt with an image of sixteen tokens, which take four positions."""
    ids = torch.tensor([[3, 4, 101, *[IMAGE] * 16, 102, 5, 6, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(64, 96, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


@pytest.fixture(scope="session")
def padded_picture_prompt(picture_prompt):
    """The same behind five tokens of padding."""
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    padded = {name: torch.nn.functional.pad(picture_prompt[name], (5, 0)) for name in tokens}
    return {**picture_prompt, **padded}


class Listener:
    """A streamer that notes what it is told."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, tokens):
        assert not self.ended
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.fixture
def listener():
    """A streamer that notes what it is told."""
    return Listener()
