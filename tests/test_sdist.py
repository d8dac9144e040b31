"""The source distribution holds all that it takes to build and to test."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_IN_IT = (".ci/", ".git", "runs/")  # what serves the repository alone


def tracked_files() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a checkout of the repository")
    return {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}


def test_it_holds_every_file_of_the_repository(tmp_path: Path) -> None:
    tracked = tracked_files()
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        [*command, "sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in tracked - held if not name.startswith(NOT_IN_IT)}
    assert not missing, f"MANIFEST.in leaves out {sorted(missing)}"
    made = (".so", ".pyc", "_build_info.py")
    built = {name for name in held if name.endswith(made) or "__pycache__" in name}
    assert not built, f"MANIFEST.in lets in {sorted(built)}"
