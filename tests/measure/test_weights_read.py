from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gossamer.errors import ModelError, TargetError
from gossamer.measure.weights_read import weights_read


def network():
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def test_a_share_of_a_layer_is_a_share_of_its_weights():
    found = weights_read(network(), {"0": 0.25})
    assert (found.read, found.total, found.treated) == (50 + 100, 300, 200)
    assert found.dense_share == pytest.approx(1 / 3)
    assert found.limit(0.75) == pytest.approx(1 / (1 / 3 + 2 / 3 * 0.25))


def test_a_tied_head_is_read_although_it_is_no_layer_of_its_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.head

    assert weights_read(Tied(), {}).total == 16 + 28
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(7, 4))
    assert weights_read(untied, {}).total == 16 + 28


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(4, 6, 3)), nn.Parameter(torch.zeros(4, 3, 6))


def test_a_token_reads_the_experts_that_it_is_sent_to():
    model = nn.ModuleDict({"head": nn.Linear(3, 5), "experts": Experts()})
    model.config = SimpleNamespace(num_experts_per_tok=1)
    found = weights_read(model, {"head": 0.5})
    assert (found.read, found.total, found.treated) == (7.5 + 36, 15 + 36, 15)
    model.config = SimpleNamespace()
    with pytest.raises(ModelError, match="does not say to how many a token is sent"):
        weights_read(model, {})


def test_unknown_layers_are_refused():
    with pytest.raises(TargetError, match="there is no layer 'x'"):
        weights_read(network(), {"x": 0.5})
