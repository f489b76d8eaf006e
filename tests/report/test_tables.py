from __future__ import annotations

import json

import pytest

from gossamer.errors import CheckpointError
from gossamer.report.performance import (
    decode_table,
    performance_table,
    quality_table,
    training_table,
    two_four_table,
)


def test_perplexities_stand_by_model_and_method(tmp_path):
    figures = {
        "demo, dense": 50.0,
        "demo, wanda, 50 %": 99.0,
        "demo, magnitude, 50 %": 569.25,
        "demo, wanda, 2:4": 343.0,
    }
    path = tmp_path / "quality.json"
    settings = {"calibration": "16 windows", "text": "a book"}
    path.write_text(
        json.dumps({"settings": settings, "figures": {name: {"perplexity": value} for name, value in figures.items()}})
    )
    page = quality_table(path)
    assert "dense: demo 50.0" in page
    assert "| demo | wanda | 99.0 | 343.0 |" in page
    assert "| demo | magnitude | 569.2 | nan |" in page
    assert quality_table(tmp_path / "none.json") == ""


@pytest.mark.parametrize("page", [quality_table, performance_table, decode_table, training_table, two_four_table])
def test_damaged_figures_are_refused(page, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text('{"rows": 3, "figures": []}')
    with pytest.raises(CheckpointError, match=r"figures\.json is damaged"):
        page(path)


def test_decoding_says_which_points_no_file_of_llama_dominates(tmp_path):
    def point(label, megabytes, nll, speed, ours):
        return {"label": label, "megabytes": megabytes, "nll": nll, "tokens_per_second": speed, "ours": ours}

    def row(label, peer, ratio):
        return {"case": f"demo, {label}, 2 threads", "peer": peer, "ratio": ratio, "fraction_of_limit": 0.5}

    points = [
        point("W4, head int8", 90.0, 4.0, 120.0, True),
        point("bfloat16", 200.0, 4.0, 50.0, True),
        point("GGUF Q8_0", 150.0, 3.9, 60.0, False),
    ]
    rows = [row("W4, head int8", "Hugging Face, bfloat16", 7.5), row("W4, head int8", "llama.cpp, packaged GGUF", 2.0)]
    path = tmp_path / "decode.json"
    path.write_text(
        json.dumps({"date": "2026-01-31", "machine": {"cpu": "x"}, "rows": rows, "points": {"demo": points}})
    )
    page = decode_table(path).splitlines()
    assert "| W4, head int8 | 90.0 | 4.0000 | 120.0 | 7.50 | 2.00 | 50% | yes |" in page
    assert "| bfloat16 | 200.0 | 4.0000 | 50.0 |  |  |  |  |" in page
    assert "| llama.cpp: GGUF Q8_0 | 150.0 | 3.9000 | 60.0 |  |  |  |  |" in page
    assert decode_table(tmp_path / "none.json") == ""


def test_sparse_training_stands_beside_its_price(tmp_path):
    def seeds(*qualities, flops=100.0):
        return {str(i): {"quality": q, "cost": {"training_flops": flops}} for i, q in enumerate(qualities)}

    results = {
        "dense, 0": seeds(0.95, 0.96),
        "SET, 0.8": seeds(0.94, 0.94, flops=20.0),
        "SET, 0.9": seeds(0.9, 0.92, flops=10.0),
    }
    path = tmp_path / "training.json"
    settings = {"widths": [784, 300, 10], "steps": 5, "batch": 7}
    path.write_text(json.dumps({"settings": settings, "results": results}))
    page = training_table(path)
    assert "| method | 80% zero | 90% zero |" in page
    # Student's t of two values: 12.706 · s / √2
    assert "| SET | 94.00% ± 0.00%, 20% | 91.00% ± 12.71%, 10% |" in page
    assert "784 × 300 × 10, 5 steps of 7 images" in page
    assert training_table(tmp_path / "none.json") == ""
