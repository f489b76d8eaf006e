"""A language model that routes: positions, learning, and text that its strict mode writes."""

from __future__ import annotations

import pytest
import torch

from gossamer.attention.routing_transformer import RoutingTransformerLM, update_centroids_after
from gossamer.errors import ConfigurationError


def test_positions_of_a_language_model_begin_with_the_first_real_token():
    torch.manual_seed(0)
    model = RoutingTransformerLM(30, 16, 2, 4, 3, local_window=4, max_length=20).eval()
    tokens = torch.randint(30, (1, 13), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(tokens, (7, 0))
    got, _ = model(padded, torch.arange(20)[None] < 7)
    torch.testing.assert_close(got[:, 7:], model(tokens)[0])


def test_a_model_learns_to_repeat_and_its_strict_mode_generates_honestly():
    torch.manual_seed(0)
    model = RoutingTransformerLM(
        8,
        32,
        num_layers=2,
        num_heads=4,
        num_clusters=4,
        local_window=8,
        window=10,
        max_length=40,
        gated=True,
        strict_causal=True,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    update_centroids_after(optimizer, model)
    tokens = (torch.arange(40) % 5)[None] + torch.arange(4)[:, None] % 3
    losses = []
    for _ in range(30):
        logits, aux = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + aux).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    model.eval()
    torch.testing.assert_close(model(tokens)[0][:, :20], model(tokens[:, :20])[0], atol=1e-4, rtol=1e-4)


def test_longer_sequences_than_there_are_positions_are_refused():
    with pytest.raises(ConfigurationError, match="max_length is 4"):
        RoutingTransformerLM(8, 16, 1, 4, 2, max_length=4)(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize("local_layers", [-1, 2])
def test_more_local_layers_than_there_are_layers_are_refused(local_layers):
    with pytest.raises(ConfigurationError, match=f"local_layers is {local_layers}"):
        RoutingTransformerLM(8, 16, 1, 4, 2, local_layers=local_layers)
