"""One wheel, built once, under several versions of PyTorch.

    nox -s compat                        # all of them: some GB for each CUDA build of PyTorch
    nox -s "compat(torch='2.13.0')"      # one
    nox -s compat -- -k definition       # arguments for pytest

With `--force-venv-backend none` nothing is installed and the Python on PATH serves, which must then
have the PyTorch that the session names.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

nox.needs_version = ">=2025.2.9"  # sessions that require others

ROOT = Path(__file__).parent
WHEELS = ROOT / "build" / "compat"
TORCH_VERSIONS = ("2.13.0", "2.14.1")
BUILT_WITH = TORCH_VERSIONS[0]
TEST_REQUIREMENTS = ("numpy", "pytest>=8", "hypothesis>=6.100", "pybind11>=2.12", "ninja")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel under the oldest of the versions."""
    _install(
        session, f"torch=={BUILT_WITH}", "numpy", "ninja", "pybind11", "setuptools>=77", "wheel"
    )
    _check_torch(session, BUILT_WITH)
    shutil.rmtree(WHEELS, ignore_errors=True)
    command = ["pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    # a clean copy, so that nothing of an earlier build gets in
    source = Path(session.create_tmp()) / "source"
    _copy_tracked_files(source)
    session.run("python", "-m", *command, "--wheel-dir", str(WHEELS), str(source))


@nox.session(requires=["wheel"])
@nox.parametrize("torch", TORCH_VERSIONS)
def compat(session: nox.Session, torch: str) -> None:
    """Run the tests in a copy of the repository in which the package is what the wheel holds."""
    _install(session, f"torch=={torch}", *TEST_REQUIREMENTS)
    for requirements in ("examples/text_detection", "benchmarks"):
        _install(session, "-r", f"{requirements}/requirements.txt")
    _check_torch(session, torch)
    copy = Path(session.create_tmp()) / "repository"
    _copy_tracked_files(copy)
    shutil.rmtree(copy / "fcrn_fused")
    (built,) = WHEELS.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(copy)
    session.chdir(copy)
    session.run("python", "-m", "fcrn_fused")
    session.run("python", "-m", "pytest", "--require", "fused-cpu", *session.posargs)


def _install(session: nox.Session, *packages: str) -> None:
    if not isinstance(session.virtualenv, PassthroughEnv):
        session.install(*packages)


def _check_torch(session: nox.Session, version: str) -> None:
    code = "import sys, torch; sys.exit(torch.__version__.split('+')[0] != sys.argv[1])"
    session.run("python", "-c", code, version)


def _copy_tracked_files(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
