from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, TargetError
from gossamer.pruning.abrupt_sparsification import track_checkpoints


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.Linear(20, 2))


def shrinking(share, seed):
    """Weights of which a share is tiny."""
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            tiny = torch.rand(layer.weight.shape, generator=generator) < share
            layer.weight.copy_(torch.where(tiny, 1e-5, 0.5))
    return model


def abrupt_run():
    return [shrinking(0.1 if step < 8 else 0.5, step) for step in range(12)]


def test_a_jump_of_small_weights_is_flagged_between_its_two_steps():
    track = track_checkpoints(abrupt_run(), steps=range(0, 1200, 100))
    assert track.abrupt
    assert track.abrupt_steps == (700, 800)
    assert track.below[0] == pytest.approx(0.1, abs=0.03)
    assert track.below[-1] == pytest.approx(0.5, abs=0.05)


def test_a_gradual_run_and_a_jump_downwards_are_not_flagged():
    gradual = [shrinking(0.1 + 0.04 * step, step) for step in range(12)]
    assert not track_checkpoints(gradual).abrupt
    backwards = track_checkpoints(abrupt_run()[::-1])
    assert backwards.jump.abrupt
    assert not backwards.abrupt
    assert backwards.abrupt_steps is None


def test_the_count_is_that_of_the_targets_and_layers_are_kept_apart():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].weight[:3] = 1e-4
        model[2].weight.fill_(-0.2)
        model[3].weight.zero_()  # the head is no target
    track = track_checkpoints([model], tau=1e-3)
    assert track.layers == {"0.weight": [0.1], "2.weight": [0.0]}
    assert track.below == [60 / 1200]
    assert track.jump is None
    assert not track.abrupt


def test_modules_state_dicts_files_and_directories_agree(tmp_path):
    run = abrupt_run()
    states = [{name: value for name, value in model.state_dict().items() if not name.startswith("3")} for model in run]
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
        (tmp_path / f"step{number}").mkdir()
        names = sorted(state)
        save_file({n: state[n] for n in names[:2]}, tmp_path / f"step{number}" / "a.safetensors")
        save_file({n: state[n] for n in names[2:]}, tmp_path / f"step{number}" / "b.safetensors")
    expected = track_checkpoints(run)
    for checkpoints in (
        states,
        [tmp_path / f"{n}.safetensors" for n in range(12)],
        [str(tmp_path / f"step{n}") for n in range(12)],
    ):
        assert track_checkpoints(checkpoints).layers == expected.layers


def test_a_generator_is_read_one_by_one_and_a_mapping_gives_the_steps():
    alive = []

    def stream():
        for step in range(5):
            alive.append(step)
            yield shrinking(0.1, step)

    def removable(model):
        return float(alive[-1])

    assert track_checkpoints(stream(), removable=removable).removable == [0, 1, 2, 3, 4]
    assert track_checkpoints({100: network(), 250: network()}).steps == [100, 250]


def test_embeddings_and_heads_of_stored_checkpoints_do_not_count():
    state = {
        "model.embed_tokens.weight": torch.zeros(10, 4),
        "lm_head.weight": torch.zeros(10, 4),
        "model.norm.weight": torch.zeros(4),
        "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
        "model.layers.0.mask": torch.zeros(4, 4, dtype=torch.bool),
    }
    assert track_checkpoints([state]).layers == {"model.layers.0.mlp.up_proj.weight": [0.0]}


def test_a_jump_of_what_can_be_removed_is_flagged_too():
    fractions = iter([0.2, 0.21, 0.2, 0.19, 0.2, 0.5, 0.51, 0.5, 0.5, 0.51])
    track = track_checkpoints([network()] * 10, removable=lambda model: next(fractions))
    assert track.abrupt
    assert track.abrupt_steps == (4, 5)


def test_a_track_becomes_json():
    stored = json.loads(json.dumps(track_checkpoints([network()] * 5).to_dict(), allow_nan=False))
    assert stored["abrupt"] is False
    assert stored["jump"]["size"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"checkpoints": [], "tau": 1e-3}, ConfigurationError, "no checkpoint"),
        ({"checkpoints": [network()], "tau": 0.0}, ConfigurationError, "tau is 0.0"),
        ({"checkpoints": [network()], "tau": math.nan}, ConfigurationError, "tau is nan"),
        ({"checkpoints": [network()] * 2, "steps": [5, 5]}, ConfigurationError, "2 increasing numbers"),
        ({"checkpoints": [network()] * 2, "steps": [5, float("nan")]}, ConfigurationError, "2 increasing numbers"),
        ({"checkpoints": [network()] * 2, "steps": [5]}, ConfigurationError, "2 increasing numbers"),
        ({"checkpoints": [{"norm.weight": torch.ones(3)}]}, TargetError, "no weight matrix"),
        ({"checkpoints": [{"a": torch.ones(2, 2)}, {"b": torch.ones(2, 2)}]}, TargetError, "other weights"),
        ({"checkpoints": ["nowhere"]}, CheckpointError, "nowhere holds no safetensors"),
        ({"checkpoints": [{"a": torch.full((2, 2), math.nan)}]}, NonFiniteError, "a of checkpoint 0"),
        ({"checkpoints": [network()], "removable": lambda m: math.inf}, NonFiniteError, "removable returned inf"),
    ],
)
def test_bad_input_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        track_checkpoints(**arguments)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is damaged"):
        track_checkpoints([path])
