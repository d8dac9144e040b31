"""Build fcrn_fused for arm64 and run its tests there, emulated: arm64.py FOLDER [PYTEST ARG...]

Run from the repository's root. FOLDER receives an arm64 Python (Debian's), PyTorch (PyPI's) and a
copy of the tracked files. apt-get installs qemu and a cross compiler where they are missing;
nothing else on the system changes, and binfmt_misc is not needed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "2.13.0"
TESTS = ("definition", "dtypes", "masking", "layouts", "autograd", "empty", "amp", "half_gradients")
CPUINFO = (
    "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n"
)  # Neoverse N1
MIDR = "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"


def main(folder: Path, arguments: list[str]) -> None:
    if not (shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")):
        tools = ("qemu-user", "g++-aarch64-linux-gnu")
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *tools)
    shutil.rmtree(folder, ignore_errors=True)
    root, venv, copy = folder / "root", folder / "venv", folder / "repository"
    version = debian_python(folder / "apt", root)
    site = venv / "lib" / f"python{version}" / "site-packages"
    python = virtual_environment(root, venv, version)
    install(site, version)
    stand_in_for_cuda(site / "torch" / "lib")
    for name in run("git", "ls-files", capture=True).split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, copy / name)
    os.environ.update(
        # The emulated Python starts these natively: a compiler and a ninja for the machine at hand.
        CXX="aarch64-linux-gnu-g++",
        PATH=f"{site / 'bin'}:{os.environ['PATH']}",
        FCRN_FUSED_BUILD="cpu",
        OMP_NUM_THREADS="1",
    )
    os.chdir(copy)
    run(python, "setup.py", "--quiet", "build_ext", "--inplace")
    run(python, "-m", "fcrn_fused")
    files = [f"tests/test_{name}.py" for name in TESTS]
    run(python, "-m", "pytest", "-q", "--require", "fused-cpu", *(arguments or files))


def debian_python(apt: Path, root: Path) -> str:
    """Unpack Debian's arm64 Python with all it needs; apt works in a folder of its own."""
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": apt,
        "Dir::State::status": "/dev/null",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run(*get, "update")
    packages = ("python3", "libpython3-dev", "libstdc++6")
    run(*get, "install", "--yes", "--download-only", "--no-install-recommends", *packages)
    for package in (apt / "archives").glob("*.deb"):
        run("dpkg", "-x", package, root)
    (interpreter,) = (root / "usr" / "bin").glob("python3.[0-9]*[0-9]")
    return interpreter.name.removeprefix("python")


def virtual_environment(root: Path, venv: Path, version: str) -> Path:
    """`venv/bin/python` is a script that starts qemu; Python takes it for sys.executable."""
    # PyTorch reads these, and crashes on what an x86 says
    for name, text in (("proc/cpuinfo", CPUINFO), (MIDR, "0x00000000413fd0c1\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    headers = root / "usr" / "include"
    name = f"python{version}/pyconfig.h"  # Debian's only includes that of the architecture
    shutil.copy(headers / "aarch64-linux-gnu" / name, headers / name)
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    (venv / "include").symlink_to(headers / f"python{version}")
    (venv / "pyvenv.cfg").write_text(f"home = {root}/usr/bin\n")
    python.write_text(
        f'#!/bin/sh\nexec qemu-aarch64 -cpu neoverse-n1 -L {root} -0 "$0" '
        f'{root}/usr/bin/python{version} "$@"\n'
    )
    python.chmod(0o755)
    return python


def install(site: Path, version: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site]
    run(*pip, "ninja")  # for this machine
    pip += ["--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    for platform in ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17"):
        pip += ["--platform", f"{platform}_aarch64"]
    run(*pip, "--no-deps", f"torch=={TORCH}")  # without 2 GB of CUDA
    run(
        *pip,
        *["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions"],
        *["setuptools>=77", "pybind11>=2.13", "numpy", "pytest>=8", "hypothesis>=6.100"],
    )


def stand_in_for_cuda(libraries: Path) -> None:
    """PyPI's arm64 PyTorch is a CUDA build: functions that fail stand in for CUDA's libraries."""
    ours = list(libraries.glob("*.so*"))
    nm = ("aarch64-linux-gnu-nm", "--dynamic", "--format=just-symbols")
    defined = run(*nm, "--defined-only", *ours, capture=True).split()
    defined = {name.partition("@")[0] for name in defined}
    versions: dict[str, set[str]] = {}
    for symbol in run(*nm, "--undefined-only", *ours, capture=True).split():
        name, _, version = symbol.partition("@")
        if re.match("(__cuda|cu|nccl|nv)", name) and name not in defined:
            versions.setdefault(version, set()).add(name)
    names = sorted(set().union(*versions.values()))
    source, script, library = (libraries / f"stand_in.{end}" for end in ("c", "map", "so"))
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    script.write_text(
        "".join(
            f"{version} {{ {'; '.join(names)}; }};\n"
            for version, names in versions.items()
            if version
        )
    )
    run(
        "aarch64-linux-gnu-gcc",
        "-w",
        "-fno-builtin",
        "-nostdlib",
        "-shared",
        "-fPIC",
        f"-Wl,--version-script={script}",
        source,
        "-o",
        library,
    )
    needed = run("aarch64-linux-gnu-readelf", "--dynamic", *ours, capture=True)
    for name in re.findall(r"\[(lib(?:cu|nccl|nv)[^]]*)\]", needed):
        if not (libraries / name).exists():
            (libraries / name).symlink_to(library.name)


def run(*command: object, capture: bool = False) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        check=True,
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    return result.stdout or ""


main(Path(sys.argv[1]).absolute(), sys.argv[2:])
