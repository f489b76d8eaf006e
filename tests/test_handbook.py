"""What the handbook shows can be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "handbook.md"


def test_every_demonstration_runs_and_says_what_it_should(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == len(re.findall(r"^## \d+\.", PAGE.read_text(), re.MULTILINE)) + 1
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # the page is ours
    said = capsys.readouterr().out
    assert "90.0% zeros in" in said
    assert "rigl is sparse training" in said
    assert "static: 0 places changed, 0 more weights" in said
    assert re.search(r"set: [1-9]\d* places changed, 0 more weights", said)
    assert "R2: RigL took 5 times the epochs of dense" in said
    assert "R4: random pruning with an Erdős–Rényi allocation is missing" in said
