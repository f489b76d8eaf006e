from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.papers import run_experiment
from gossamer.papers.dsnot import ABLATIONS, FULL, QUICK, compare, decide, experiment

SMALL = {**QUICK, "sequences": 2, "length": 24, "evaluation_tokens": 60, "window": 30, "swaps": {"max_rounds": 2}}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def observe(settings, model=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    windows = [
        torch.randint(64, (1, settings["length"]), generator=generator) for _ in range(2 * settings["sequences"])
    ]
    held_out = torch.randint(64, (1, settings["evaluation_tokens"]), generator=generator)
    return compare(model or llama(), windows, held_out, settings, lambda items, description: iter(items))


@pytest.mark.parametrize("budget", [QUICK, FULL])
def test_a_tiny_model_goes_through_every_way_of_a_budget(budget):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    small = {name: SMALL[name] for name in ("sequences", "length", "evaluation_tokens", "window", "swaps")}
    observed = observe({**budget, **small}, model)
    json.dumps(observed, allow_nan=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    ways = observed["ways"]
    assert len(ways) == 1 + 2 * len(budget["cases"]) + len(ABLATIONS) + 4 * budget["extras"]
    for initial, pattern, sparsity in budget["cases"]:
        name = f"{initial} {pattern if ':' in pattern and pattern[0].isdigit() else format(sparsity, 'g')}"
        start, refined = ways[name], ways[f"{name} + DSnoT"]
        assert start["sparsity"] == refined["sparsity"] == pytest.approx(sparsity, abs=0.02)
        assert "swaps_per_row" not in start
        assert refined["error_before"] > 0
    if budget["extras"]:
        swaps = ways["wanda 0.7 + exact swaps"]
        assert swaps["error_after"] < swaps["error_before"]
        assert swaps["layer_error"] < ways["wanda 0.7"]["layer_error"]
    assert observed["curves"]["wanda"]["y"] == [ways[f"wanda {s:g}"]["nll"] for s in observed["curves"]["wanda"]["x"]]


def observations(gains=(0.1, 0.5, 0.4), factor=20.0, ablated=0.05, spread=0.01):
    """Three seeds in which DSnoT lowers the log-perplexity of the three quick cases by `gains`."""
    made = []
    for seed in range(3):
        shift = spread * (seed - 1)
        ways = {}
        for case, gain in zip(("wanda 0.6", "wanda 0.7", "magnitude 0.7"), gains, strict=True):
            ways[case] = {"nll": 6.0, "layer_error": 0.3}
            ways[f"{case} + DSnoT"] = {
                "nll": 6.0 - gain + shift,
                "layer_error": 0.3,
                "error_before": 10.0,
                "error_after": 10.0 / (factor + shift),
            }
        for name in ABLATIONS:
            ways[f"wanda 0.7 + {name}"] = {"nll": 6.0 - gains[1] + ablated + 2 * shift}
        ways["wanda 0.7 + exact swaps"] = {"nll": 5.0 + shift, "layer_error": 0.2}
        made.append({"ways": ways, "cases": QUICK["cases"], "ablated": QUICK["ablated"]})
    return made


@pytest.mark.parametrize(
    ("changes", "outcome", "part"),
    [
        ({}, "holds", "lower perplexity: holds"),
        ({"gains": (0.1, 0.5, -0.4)}, "does not hold", "lower perplexity: does not hold"),
        ({"gains": (-0.1, 0.5, 0.4)}, "holds", "lower perplexity: holds"),
        ({"gains": (0.6, 0.5, 0.4)}, "does not hold", "gain grows: does not hold"),
        ({"factor": 5.0}, "does not hold", "expected error: does not hold"),
        ({"ablated": -0.1}, "does not hold", "ablations: does not hold"),
        ({"spread": 2.0}, "inconclusive", "lower perplexity: inconclusive"),
    ],
)
def test_the_rule_decides_as_stated(changes, outcome, part):
    verdict = decide(observations(**changes))
    assert part in verdict.reason
    assert verdict.outcome == outcome


def test_one_seed_decides_nothing():
    assert decide(observations()[:1]).outcome == "inconclusive"


def test_the_engine_runs_the_experiment_end_to_end(tmp_path, monkeypatch):
    import gossamer.papers.dsnot as module
    from gossamer.models.load import LoadedModel

    class Letters:
        """Tokenises text into characters."""

        bos_token_id = eos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) % 64 for letter in text]}

    monkeypatch.setattr(module, "load", lambda source: LoadedModel(llama(), Letters(), source))
    monkeypatch.setitem(experiment.budgets, "tiny", SMALL)
    result = run_experiment(experiment, "tiny", seeds=2, output=tmp_path, progress=False)
    assert result.verdict.outcome in ("holds", "does not hold", "inconclusive")
    assert (tmp_path / "dsnot.json").exists()
