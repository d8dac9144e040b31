"""The tests once more: under several versions of PyTorch, compilers, and sanitizers.

    nox -s compat                        # one wheel, built under the oldest PyTorch, under all
    nox -s "compat(torch='2.13.0')"      # one; a CUDA build of PyTorch takes some GB
    nox -s compilers                     # every compiler that is here
    nox -s installs                      # every way to install, and what a user is told
    nox -s reproducible                  # two builds of the same sources give the same bytes
    nox -s arm64                         # built for arm64 and tested there, under emulation
    nox -s sanitize                      # CPU kernels with AddressSanitizer and UBSan
    nox -s compat -- -k definition       # arguments for pytest

With `--force-venv-backend none` nothing is installed and the Python on PATH is used, which must
then have the PyTorch that the session names.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import nox
from nox.virtualenv import PassthroughEnv

nox.needs_version = ">=2025.2.9"  # sessions that require others

ROOT = Path(__file__).parent
WHEELS = ROOT / "build" / "compat"
TORCH_VERSIONS = ("2.11.0", "2.13.0", "2.14.1")
BUILT_WITH = TORCH_VERSIONS[0]  # the oldest that is supported
COMPILERS = (
    *(f"g++-{version}" for version in (11, 12, 13, 14)),
    *(f"clang++-{version}" for version in (14, 16, 19)),
    "ccache g++",
)
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
)
# These start compilers or trainings, which say little about the CPU kernels, or weigh the process.
NOT_SANITIZED = (
    "benchmarks",
    "cuda_on_host",
    "example",
    "test_compile.py",
    "test_cuda_compiles.py",
    "test_cuda_on_host.py",
    "test_documentation.py",
    "test_export.py",
    "test_failures.py",
    "test_soak.py",
)
TEST_REQUIREMENTS = ("numpy", "pytest>=8", "hypothesis>=6.100", "pybind11>=2.13", "ninja")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the source distribution, and from it the wheel, under the oldest of the versions."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    _make_wheel(session, WHEELS)


@nox.session(requires=["wheel"])
def reproducible(session: nox.Session) -> None:
    """Build both again, without ccache, and compare them byte for byte."""
    again = Path(session.create_tmp()).absolute() / "again"
    shutil.rmtree(again, ignore_errors=True)
    _make_wheel(session, again, CCACHE_DISABLE="1")
    for first in sorted(WHEELS.iterdir()):
        if first.read_bytes() != (again / first.name).read_bytes():
            session.error(f"{first} and {again / first.name} differ")


@nox.session(requires=["wheel"])
@nox.parametrize("torch", TORCH_VERSIONS)
def compat(session: nox.Session, torch: str) -> None:
    """Run the tests in a copy of the repository in which the package is what the wheel holds."""
    _install(session, f"torch=={torch}", *TEST_REQUIREMENTS, "keras")
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


@nox.session
@nox.parametrize("compiler", COMPILERS)
def compilers(session: nox.Session, compiler: str) -> None:
    """Build with a compiler, in a folder with a space, and test what its loops compute."""
    if not shutil.which(compiler.split()[-1]) or not shutil.which(compiler.split()[0]):
        session.skip(f"there is no {compiler}")
    _install(session, f"torch=={TORCH_VERSIONS[1]}", *TEST_REQUIREMENTS, "setuptools>=77", "wheel")
    copy = Path(session.create_tmp()) / "the repository"
    _copy_tracked_files(copy)
    session.chdir(copy)
    environment = {"CXX": compiler, "FCRN_FUSED_BUILD": "cpu", "CCACHE_DISABLE": "1"}
    session.run("python", "setup.py", "--quiet", "build_ext", "--inplace", env=environment)
    files = ("definition", "dtypes", "masking", "layouts", "baseline")
    session.run(
        *("python", "-m", "pytest", "-q", "--require", "fused-cpu"),
        *(f"tests/test_{name}.py" for name in files),
        *session.posargs,
    )


@nox.session
def installs(session: nox.Session) -> None:
    """The ways to install, in the README's words and others; and what a user is told."""
    torch = f"torch=={TORCH_VERSIONS[1]}"
    _install(session, torch, "numpy", "ninja", "pybind11", "setuptools>=77", "wheel", "uv")
    clone = Path(session.create_tmp()).absolute() / "clone"
    _copy_tracked_files(clone)
    session.chdir(clone)
    pip = ("python", "-m", "pip", "--disable-pip-version-check")
    config = ("python", "-m", "fcrn_fused")

    def expect(words: str, *command: str, **options: Any) -> None:
        """Runs a command whose output must hold these words."""
        output = session.run(*command, silent=True, **options) or ""
        session.log(output.strip().splitlines()[-1])
        if words not in " ".join(output.split()):
            session.error(f"{words!r} is not in:\n{output}")

    expect("was not built; build it", *config)
    refused = {"success_codes": [1]}
    expect("this command with --no-build-isolation", *pip, "install", ".", **refused)
    # the lines of docs/installation.md, the last in the clone and outside
    session.run(*pip, "install", "--quiet", "--no-build-isolation", ".")
    expect("cpu: fused", *config)
    session.chdir("/")
    expect("cpu: fused", *config)
    session.run(*pip, "uninstall", "--quiet", "--yes", "fcrn_fused")

    session.chdir(clone)
    session.run("python", "-m", "uv", "pip", "install", "--quiet", "--python", "python", ".")
    session.chdir("/")
    expect("cpu: fused", *config)
    session.run(*pip, "uninstall", "--quiet", "--yes", "fcrn_fused")

    session.chdir(clone)
    session.run("python", "setup.py", "--quiet", "sdist")
    (sdist,) = map(str, (clone / "dist").glob("*.tar.gz"))
    expect("this command with --no-build-isolation", *pip, "install", sdist, **refused)
    session.run(*pip, "install", "--quiet", "--no-build-isolation", sdist)
    session.chdir("/")
    expect("cpu: fused", *config)
    session.run(*pip, "uninstall", "--quiet", "--yes", "fcrn_fused")

    session.chdir(clone)
    without = {"FCRN_FUSED_BUILD": "none"}
    session.run(*pip, "install", "--quiet", "--no-build-isolation", ".", env=without)
    expect("FCRN_FUSED_BUILD was none", *config)
    no_compiler = {"CXX": "no-compiler"}
    command = (*pip, "install", "--quiet", "--no-build-isolation", "--force-reinstall", "--no-deps")
    session.run(*command, ".", env=no_compiler)
    expect("there is no compiler 'no-compiler'", *config)
    session.run(*pip, "install", "--quiet", "--no-build-isolation", "--editable", ".")
    expect("cpu: fused", *config)
    session.chdir("/")
    expect("cpu: fused", *config)


@nox.session(venv_backend="none")
def arm64(session: nox.Session) -> None:
    """Build for arm64 and run tests with an arm64 PyTorch, both emulated; Debian on x86-64."""
    folder = Path(session.create_tmp()) / "arm64"
    session.run("python3", "tests/arm64/emulate.py", str(folder), *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the tests in a copy whose CPU kernels are built with AddressSanitizer and UBSan."""
    _install(session, f"torch=={BUILT_WITH}", *TEST_REQUIREMENTS, "setuptools>=77", "wheel")
    copy = Path(session.create_tmp()) / "repository"
    _copy_tracked_files(copy)
    session.chdir(copy)
    compiler = {"CFLAGS": SANITIZERS, "LDFLAGS": SANITIZERS, "FCRN_FUSED_BUILD": "cpu"}
    session.run("python", "setup.py", "--quiet", "build_ext", "--inplace", env=compiler)
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),  # Python itself is not built with them
        # Python and PyTorch keep much until the end; what is too large is NULL, as elsewhere
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    session.run(
        *("python", "-m", "pytest", "--capture=no", "--require", "fused-cpu"),
        *(f"--ignore=tests/{name}" for name in NOT_SANITIZED),
        *session.posargs,
        env=environment,
    )
    session.run("python", "-m", "tests.soak", "--memory-calls", "0", env=environment)


def _install(session: nox.Session, *packages: str) -> None:
    if not isinstance(session.virtualenv, PassthroughEnv):
        session.install(*packages)


def _make_wheel(session: nox.Session, into: Path, **environment: str) -> None:
    """Run `make wheel` in a clean copy of the repository."""
    packages = ("numpy", "ninja", "pybind11", "setuptools>=77", "wheel", "twine", "auditwheel")
    _install(session, f"torch=={BUILT_WITH}", *packages)
    _check_torch(session, BUILT_WITH)
    # always the same: nvcc makes names of the path of a source
    copy = ROOT / "build" / "source"
    _copy_tracked_files(copy)
    environment |= {"SOURCE_DATE_EPOCH": "1577836800"}
    with session.chdir(copy):
        session.run("make", "wheel", "VENV=", "PYTHON=python", external=True, env=environment)
    shutil.copytree(copy / "dist", into)


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
