"""The experiments of MaskLLM and CAST: what they compare, and what their rules make of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gossamer.core.patterns import NM
from gossamer.papers import cast, maskllm
from gossamer.papers.conversion import Conversion, docstrings_of, sequences

SMALL = {
    "bytes": 400_000,
    "held_out": 8,
    "length": 32,
    "layers": 1,
    "width": 32,
    "heads": 2,
    "steps": 4,
    "batch": 2,
    "learning_rate": 3e-3,
    "tokens": 2,
    "calibration": 2,
}


@pytest.fixture(scope="module")
def language():
    return Conversion.of(SMALL, 0)


class TestConversion:
    def test_every_method_reads_the_same_pieces_of_what_it_may_read(self, language):
        first, again = (torch.stack(list(language.pieces(5))) for _ in range(2))
        assert torch.equal(first, again)
        assert first.shape == (5, 2, 32)
        more = torch.stack(list(language.pieces(7)))
        assert not torch.equal(more[0], more[1])
        assert len(language.text) + len(language.unread) == 400_000

    @pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt"])
    def test_guessed_masks_follow_the_pattern_and_leave_the_dense_model_alone(self, language, method):
        before = copy.deepcopy(language.dense.state_dict())
        model, masks = language.pruned(method, "1:4")
        for mask in masks.values():
            NM(1, 4).verify(mask)
        assert not masks.violations(model)
        assert all(torch.equal(value, before[name]) for name, value in language.dense.state_dict().items())

    def test_learned_masks_are_masks_of_the_dense_weights(self, language):
        _, prior = language.pruned("magnitude", "2:4")
        found = language.learn_masks(3, prior, 1e-2, pattern="2:4")
        assert found["loss"] == pytest.approx(language.masked(found["masks"]), abs=1e-5)
        assert found["masks"].sparsity == 0.5
        assert 0 <= found["moved"] < 1

    def test_docstrings_are_what_stands_between_quotes(self):
        text = torch.tensor(list(b'x = 1\n"""One."""\ny\n"""Two\nlines."""\n'))
        assert bytes(docstrings_of(text).tolist()) == b"One.\nTwo\nlines."
        assert sequences(torch.arange(10), 2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def observed(losses, domain):
    return {"losses": losses, "domain": domain, "seen": {}, "curves": {}}


class TestMaskLLM:
    LABELS = ("random", "magnitude", "wanda", "sparsegpt", "sparsegpt with its update")

    def observation(self, shift, **changed):
        losses = {"dense": 1.0 + shift, **{f"2:4, {name}": 1.5 + shift for name in self.LABELS}}
        losses |= {
            "2:4, learned, no prior, 9 steps": 1.4 + shift,
            "2:4, learned, no prior, 3 steps": 1.6 + shift,
            "2:4, learned, sparsegpt prior, 3 steps": 1.3 + shift,
            "2:4, learned, sparsegpt prior, 9 steps": 1.2 + shift,
            "2:4, learned, sparsegpt prior, straight-through, 9 steps": 1.25 + shift,
        }
        domain = {"masks of source code": 2.0 + shift, "moved on": 1.8 + shift, "from scratch": 1.9 + shift}
        return observed({**losses, **changed.pop("losses", {})}, {**domain, **changed.pop("domain", {})})

    def test_it_holds_when_learned_masks_are_best_throughout(self):
        verdict = maskllm.decide([self.observation(0.0), self.observation(0.001)])
        assert verdict.outcome == "holds"
        assert verdict.numbers["wanda − learned"].mean == pytest.approx(0.3)
        assert verdict.numbers["no prior − prior, short"].mean == pytest.approx(0.3)

    def test_it_does_not_hold_when_one_that_is_guessed_is_better(self):
        better = {"losses": {"2:4, wanda": 1.1}}
        verdict = maskllm.decide([self.observation(0.0, **better), self.observation(0.001, **better)])
        assert verdict.outcome == "does not hold"
        assert "wanda" in verdict.reason

    def test_it_is_open_when_seeds_disagree(self):
        other = self.observation(0.0, domain={"from scratch": 1.7})
        assert maskllm.decide([self.observation(0.0), other]).outcome == "inconclusive"
        assert maskllm.decide([other]).outcome == "inconclusive"


class TestCast:
    def observation(self, shift, jump=0.0, bend=1.0, **changed):
        budgets = (10, 20, 40, 80)
        losses = {f"CAST, {s} steps": 1.2 + shift for s in budgets}
        for steps in (20, 80):
            for other in ("magnitude and retraining", "sparsegpt and retraining", "SR-STE", "MaskLLM"):
                losses[f"{other}, {steps} steps"] = 1.3 + shift
        losses |= dict.fromkeys(cast.ABLATIONS, 1.25 + shift)
        losses |= {f"{name}, at once": 1.5 + shift for name in ("magnitude", "wanda", "sparsegpt")}
        seen = {f"CAST, {s} steps": {"jump": jump, "eight bits": 1e-4, "four bits": 0.1} for s in budgets}
        law = [
            {"n_avg": n, "tokens": 100.0 * s, "steps": s, "loss": 1 + 20 / n**0.7 + 9 / (100 * s) ** 0.6}
            for n in (1e3, 2e3, 4e3)
            for s in budgets
        ]
        for row in law:
            row["loss"] *= bend if row["steps"] == 80 else 1
        return {"losses": {**losses, **changed}, "seen": seen, "law": law, "whole": "CAST, 40 steps"}

    def test_it_holds_when_cast_is_best_and_the_law_predicts(self):
        verdict = cast.decide([self.observation(0.0), self.observation(0.001)])
        assert verdict.outcome == "holds"
        assert verdict.numbers["error of the law"] < 0.01
        assert verdict.numbers["no teacher − CAST"].mean == pytest.approx(0.05)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"jump": 0.01}, "cut"), ({"bend": 1.1}, "law"), ({"SR-STE, 20 steps": 1.1}, "SR-STE − CAST, 20 steps")],
    )
    def test_it_does_not_hold_when_one_part_fails(self, options, reason):
        verdict = cast.decide([self.observation(0.0, **options), self.observation(0.001, **options)])
        assert verdict.outcome == "does not hold"
        assert reason in verdict.reason

    def test_a_conversion_is_measured_before_and_after_the_cut_and_the_rounding(self):
        settings = {**cast.QUICK, **SMALL, "cast": {**cast.QUICK["cast"], "mask_every": 1}}
        loss, seen = cast.convert(Conversion.of(settings, 0), 6)
        assert loss > 0
        assert set(seen) == {"jump", "residual", "masks fixed at", "eight bits", "four bits"}
        assert abs(seen["eight bits"]) < 0.01

    def test_settings_are_plain(self):
        for module in (cast, maskllm):
            assert json.loads(json.dumps(module.FULL)) == module.FULL
            assert module.QUICK["steps"] < module.FULL["steps"]
