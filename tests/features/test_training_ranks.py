"""Two processes that learn from halves of the same batches, beside one that learns from all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.features.test_training import batches

from gossamer.core.ranks import own_share
from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import FeatureChoice, JumpReLU, MutualChoice, TopK
from gossamer.features.sae import SAE
from gossamer.features.training import TrainingSettings, train

STEPS = 12
PLAIN = TrainingSettings(steps=STEPS, batch_size=128, learning_rate=1e-2, auxiliary="none", clip=1.0)
HARD = TrainingSettings(steps=STEPS, batch_size=128, learning_rate=1e-2, dead_after=400, resample_every=4, sparsity=0.1)
RULES = {
    "mutual": lambda: MutualChoice(2),
    "feature": lambda: FeatureChoice(2, every=3),
    "jump": lambda: JumpReLU(0.05, 0.2),
}


def learned(seed):
    """Weights, buffers and what is known of the features after a few steps."""
    saes = {"plain": SAE(16, 40, TopK(2), seed=seed)}
    saes |= {name: SAE(16, 40, rule(), seed=seed) for name, rule in RULES.items()}
    settings = {"plain": PLAIN, **dict.fromkeys(RULES, HARD)}
    found = train(saes, batches, settings, log_every=1, progress=False)
    return {
        name: {**one.sae.state_dict(), "density": one.density, "silent": one.silent, "history": one.history}
        for name, one in found.items()
    }


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = learned(seed=rank)  # the second begins elsewhere, and follows the first
    with pytest.raises(ConfigurationError, match="7 rows cannot be divided among 2 processes"):
        own_share(torch.zeros(7, 2))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_to_the_bit_and_learn_what_one_would(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parts in first.items():
        for part, value in parts.items():
            other = second[name][part]
            same = value == other if part == "history" else torch.equal(value.nan_to_num(-1), other.nan_to_num(-1))
            assert same, (name, part)
    alone = learned(seed=0)["plain"]
    for part, value in first["plain"].items():
        if part == "history":
            assert [row["loss"] for row in value] == pytest.approx([row["loss"] for row in alone[part]], rel=1e-4)
            assert [row["active"] for row in value] == [row["active"] for row in alone[part]]
        elif part == "silent":
            assert torch.equal(value, alone[part])
        else:
            torch.testing.assert_close(value, alone[part], rtol=1e-3, atol=1e-5)
    assert int(first["mutual"]["silent"].max()) <= 128 * STEPS
    assert bool(first["feature"]["activation.thresholds"].isfinite().any())
