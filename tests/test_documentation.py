"""Every Python block of README.md and docs/ runs, and every name in them is that of something real.

The blocks of a page run in order and share their names, as a reader would type them. A `text` block
right after a `python` block is what it prints. A comment before a block says what it needs:
`<!-- needs: cuda -->` or `<!-- needs: keras -->`; where that is missing, the block is skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fcrn_fused

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()
]
NAMED = [*PAGES, *(path for path in [ROOT / "CONTRIBUTING.md"] if path.exists())]

_FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>\w+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of Python: where it stands, what it needs and what it is said to print."""

    page: Path
    line: int
    source: str
    needs: str | None
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, names: dict[str, Any]) -> None:
        # as many empty lines first as make a traceback point into the page
        code = compile("\n" * self.line + self.source, str(self.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if self.output is not None:
            assert printed.getvalue().strip() == self.output.strip(), f"{self} prints otherwise"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(_FENCE.finditer(text))
    blocks = []
    for match, after in itertools.zip_longest(found, found[1:]):
        if match["language"] != "python":
            continue
        output = None
        if after and after["language"] == "text" and not text[match.end() : after.start()].strip():
            output = after["body"]
        line = text.count("\n", 0, match.start("body"))
        blocks.append(Block(page, line, match["body"], match["needs"], output))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def why_not(needs: str) -> str | None:
    if needs == "cuda":
        if torch.cuda.is_available():
            return None
        return "needs a GPU, and PyTorch sees none"
    if needs == "keras":
        if importlib.util.find_spec("keras") is None:
            return "needs Keras: pip install keras"
        os.environ.setdefault("KERAS_BACKEND", "torch")
        import keras

        backend = keras.config.backend()
        return None if backend == "torch" else f"needs Keras on torch, this is {backend}"
    raise ValueError(f"needs: must be cuda or keras, got {needs}")


@pytest.fixture
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write to, and the state of PyTorch put back afterwards."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def run_in_order(blocks: list[Block]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        block.run(names)


@pytest.mark.usefixtures("aside")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path) -> None:
    run_in_order([block for block in BLOCKS if block.page == page and block.needs is None])


@pytest.mark.usefixtures("aside")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs], ids=str)
def test_a_block_with_a_need_runs_after_those_before_it(block: Block) -> None:
    assert block.needs is not None
    reason = why_not(block.needs)
    if reason is not None:
        pytest.skip(reason)
    same = [each for each in BLOCKS if each.page == block.page and each.line <= block.line]
    run_in_order([each for each in same if each.needs in (None, block.needs)])


def test_blocks_are_found() -> None:
    assert len(BLOCKS) >= 10
    fences = sum(page.read_text().count("```python") for page in PAGES)
    assert fences == len(BLOCKS), "a block is indented or not closed, so that it is not run"


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", NAMED, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_tests_named_exist(page: Path) -> None:
    """Files and folders of the repository in backticks, `tests/test_x.py::test_name` included."""
    missing = []
    for match in re.finditer(
        r"`((?:fcrn_fused|csrc|tests|examples|benchmarks|docs)/[\w./-]*)(?:::(\w+))?`",
        page.read_text(),
    ):
        path, name = ROOT / match[1], match[2]
        made_later = match[1].startswith("docs/_build")
        if not (path.exists() or made_later):
            missing.append(match[1])
        elif name and f"def {name}(" not in path.read_text():
            missing.append(f"{match[1]}::{name}")
    assert not missing


@pytest.mark.parametrize("page", NAMED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    headings = {other: anchors_of(other) for other in NAMED}
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and other in headings and anchor not in headings[other]):
            broken.append(target)
    assert not broken


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and mkdocs give the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_has_the_measured_shares_of_a_training_step() -> None:
    results = ROOT / "benchmarks" / "results" / "train_step_cpu.json"
    rows = json.loads(results.read_text())["rows"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for is_dense, loss in itertools.product((False, True), ("eager", "ours")):
        shares = [
            100 * row["share"]
            for row in rows
            if (row["network"] == "dense") == is_dense and row["loss"] == loss
        ]
        assert f"{min(shares):.2g} to {max(shares):.2g} %" in readme, (is_dense, loss)


def test_one_version_everywhere() -> None:
    version = fcrn_fused.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    names = [name for name in fcrn_fused.__all__ if name != "__version__"]
    missing = [name for name in names if f"::: fcrn_fused.{name}" not in reference]
    assert not missing


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: pip install -r docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert (tmp_path / "benchmarks" / "index.html").exists()


# ---- types, as a user sees them -----------------------------------------------------------------


@pytest.mark.slow
def test_a_user_script_passes_mypy_strict() -> None:
    mypy = shutil.which("mypy", path=str(Path(sys.executable).parent)) or shutil.which("mypy")
    if mypy is None:
        pytest.skip("needs mypy: pip install mypy")
    # mypy's cache in the repository knows PyTorch after `make lint`: 30 s less
    command = [mypy, "--strict", "--python-executable", sys.executable]
    command += [str(Path("tests", "typing", "user_script.py"))]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
