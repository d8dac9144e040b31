"""The smallest example learns, and README.md shows its code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "minimal.py"


def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    printed = [
        {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", line)}
        for line in lines
    ]
    first, last = printed[0], printed[-1]
    assert last["loss"] < first["loss"] / 4, lines
    assert last["coord"] < first["coord"] / 10, lines
    assert last["positive_conf"] < first["positive_conf"] / 2, lines
    assert first["num_positive"] == last["num_positive"] == 16
    assert names["schedule"].get_last_weight() == 1  # the weight has reached its final value


def test_the_readme_shows_its_code() -> None:
    code = EXAMPLE.read_text()
    shown = code.partition("# README: from here\n")[2].partition("\n\n# README: to here\n")[0]
    assert shown.count("\n") > 5
    assert f"```python\n{shown.strip()}\n```" in (ROOT / "README.md").read_text()
