"""What setup.py builds, and the sentence where it builds less: the compilers are played by scripts.

Each case runs `setup.py` on a copy of the sources, in a process forked from one that has imported
PyTorch. `nox -s compilers`, `installs` and `reproducible` run the compilers themselves.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from fcrn_fused import __version__

ROOT = Path(__file__).resolve().parent.parent
BUILD = """
import json, os, runpy, sys, traceback
import torch
import torch.utils.cpp_extension

def build(case, capabilities):
    os.chdir(case["folder"])
    os.environ.update(case["environment"])
    torch.__version__ = case["torch"]
    torch.version.cuda = case["torch_cuda"]
    torch.cuda._is_compiled = lambda: case["torch_cuda"] is not None
    torch.cuda.is_available = lambda: bool(capabilities)
    torch.cuda.device_count = lambda: len(capabilities)
    torch.cuda.get_device_capability = lambda index: tuple(capabilities[index])
    torch.cuda.get_arch_list = lambda: ["sm_50", "sm_90", "sm_120"]
    for name in case["missing"]:
        sys.modules[name] = None
    del sys.modules["torch.utils.cpp_extension"]
    if "torch" not in case["missing"]:
        del torch.utils.cpp_extension
    sys.argv = ["setup.py", "--quiet", *case["command"]]
    runpy.run_path("setup.py", run_name="__main__")

for case in json.load(open(sys.argv[1])):
    sys.stdout.flush()
    if os.fork() == 0:
        output = os.open(case["folder"] + "/output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 0
        try:
            build(case, case["capabilities"])
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 2
        sys.stdout.flush()
        open(case["folder"] + "/status", "w").write(str(status))
        os._exit(0)
    os.wait()
"""
# Writes an empty file where a compiler or linker would write its result.
CXX = """#!/bin/sh
echo "$0 $*" >> "{log}"
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
NVCC = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88"; exit ;;
  --dryrun*) echo "#$ TOP={toolkit}/bin/.." >&2; exit ;;
  --list-gpu-code) echo "{codes}"; exit ;;
  --list-gpu-arch) echo "{codes}" | sed s/sm_/compute_/g; exit ;;
  {complaint}
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
UNSUPPORTED_GCC = """*probe.cu*) echo "In file included from cuda_runtime.h:82:
host_config.h:143:2: error: #error -- unsupported GNU version! gcc later than 13" >&2; exit 1 ;;"""
FAILS_LATER = """*loss_cuda.cu*) echo "nvcc error: 'ptxas' died" >&2; exit 1 ;;"""


class Outcome(NamedTuple):
    status: int  # 0: built, 1: refused
    output: str
    info: dict[str, str | None]  # what the package will say; empty if nothing was built
    modules: set[str]  # "_C", "_cuda"
    commands: str  # what was called
    wheel: list[zipfile.ZipInfo]  # what it holds


class Case(NamedTuple):
    environment: Mapping[str, str] = MappingProxyType({})
    torch: str = "2.13.0"
    torch_cuda: str | None = None
    nvcc: str | None = None  # its version
    codes: str = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
    complaint: str = ""
    capabilities: tuple[tuple[int, int], ...] = ()  # of the GPUs in the machine
    missing: tuple[str, ...] = ()  # packages
    folder: str = "sources"
    command: tuple[str, ...] = ("build_ext", "--inplace")


def mode(name: str, **variables: str) -> dict[str, str]:
    return {"FCRN_FUSED_BUILD": name, **variables}


CUDA_13: dict[str, Any] = {"torch_cuda": "13.0", "nvcc": "13.0"}
CUDA_124: dict[str, Any] = {"torch_cuda": "12.6", "nvcc": "12.4", "codes": "sm_75 sm_80 sm_90"}
NO_COMPILER = {"CXX": "/nowhere/c++"}
WHEEL: dict[str, Any] = {"command": ("bdist_wheel",), **CUDA_13}
YEAR_2020 = {"SOURCE_DATE_EPOCH": "1577836800"}
CASES = {
    "cpu": Case(),
    "cuda": Case(**CUDA_13),
    "cuda in a path with a space": Case(**CUDA_13, folder="my sources"),
    "ccache": Case({"CXX": "ccache {cxx}"}, **CUDA_13),
    "flags": Case({"CFLAGS": "-DMINE=1", "LDFLAGS": "-Wl,-z,now"}),
    "none": Case(mode("none")),
    "none without torch": Case(mode("none"), missing=("torch",)),
    "unknown mode": Case(mode("gpu")),
    "no torch": Case(missing=("torch",)),
    "no pybind11": Case(missing=("pybind11",)),
    "old torch": Case(torch="2.10.3"),
    "old torch, cpu": Case(mode("cpu"), torch="2.10.3"),
    "no compiler": Case(NO_COMPILER),
    "no compiler, cpu": Case(mode("cpu", **NO_COMPILER)),
    "no compiler, cuda": Case(mode("cuda", **NO_COMPILER), **CUDA_13),
    "cpu of a CUDA build": Case(mode("cpu"), **CUDA_13),
    "CPU build, cuda": Case(mode("cuda")),
    "no nvcc": Case({"CUDA_HOME": "/nowhere"}, torch_cuda="13.0"),
    "no nvcc, cuda": Case(mode("cuda", CUDA_HOME="/nowhere"), torch_cuda="13.0"),
    "nvcc too old": Case(torch_cuda="13.0", nvcc="11.8"),
    "nvcc too old, cuda": Case(mode("cuda"), torch_cuda="13.0", nvcc="11.8"),
    "nvcc of another minor version": Case(torch_cuda="13.0", nvcc="13.5"),
    "unsupported gcc": Case(**CUDA_13, complaint=UNSUPPORTED_GCC),
    "nvcc fails": Case(**CUDA_13, complaint=FAILS_LATER),
    "nvcc fails, cuda": Case(mode("cuda"), **CUDA_13, complaint=FAILS_LATER),
    "nvcc without Blackwell": Case(mode("cuda"), **CUDA_124),
    "a GPU too new": Case(**CUDA_124, capabilities=((12, 0),)),
    "a GPU too old": Case(**CUDA_13, capabilities=((5, 0),)),
    "two GPUs": Case(**CUDA_13, capabilities=((8, 6), (9, 0))),
    "one entry unknown": Case({"TORCH_CUDA_ARCH_LIST": "7.0 9.0"}, **CUDA_13),
    "one entry unknown, cuda": Case(mode("cuda", TORCH_CUDA_ARCH_LIST="7.0;9.0"), **CUDA_13),
    "not an entry": Case({"TORCH_CUDA_ARCH_LIST": "sm_90"}, **CUDA_13),
    "Hopper;": Case({"TORCH_CUDA_ARCH_LIST": "Hopper;"}, **CUDA_13),
    "native": Case({"TORCH_CUDA_ARCH_LIST": "native"}, **CUDA_13, capabilities=((9, 0),)),
    "native without a GPU": Case({"TORCH_CUDA_ARCH_LIST": "native"}, **CUDA_13),
    "wheel": Case(YEAR_2020, **WHEEL),
    "wheel, local version": Case({"DIST_EXTRA_CONFIG": "local.cfg"}, **WHEEL),
}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def prepare(case: Case, home: Path) -> dict[str, Any]:
    """A copy of the sources, and a compiler and an nvcc that write down how they are called."""
    folder = home / case.folder
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(ROOT / "fcrn_fused", folder / "fcrn_fused", ignore=compiled)
    (folder / "local.cfg").write_text("[egg_info]\ntag_build = +cu130\n")
    log, toolkit = home / "commands", home / "toolkit"
    log.touch()
    cxx = script(home / "g++", CXX.format(log=log))
    script(home / "bin" / "ccache", '#!/bin/sh\nexec "$@"\n')
    if case.nvcc:
        values = {"version": case.nvcc, "codes": case.codes, "complaint": case.complaint}
        script(toolkit / "bin" / "nvcc", NVCC.format(log=log, toolkit=toolkit, **values))
    environment = {
        "FCRN_FUSED_BUILD": "auto",
        "TORCH_CUDA_ARCH_LIST": "",
        "CUDA_HOME": str(toolkit),
        "CXX": str(cxx),
        "CFLAGS": "",
        "LDFLAGS": "",
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **{name: value.format(cxx=cxx) for name, value in case.environment.items()},
    }
    return {**case._asdict(), "folder": str(folder), "environment": environment}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    if not (ROOT / "setup.py").exists() or sys.platform != "linux":
        pytest.skip("not a source checkout on Linux")
    homes = {name: tmp_path_factory.mktemp("build") for name in CASES}
    prepared = [prepare(case, homes[name]) for name, case in CASES.items()]
    listing = tmp_path_factory.mktemp("cases") / "cases.json"
    listing.write_text(json.dumps(prepared))
    run = subprocess.run(
        [sys.executable, "-c", BUILD, str(listing)],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name not in ("CC", "CUDA_PATH")},
    )
    assert run.returncode == 0, run.stderr
    return {
        name: outcome(Path(case["folder"]), homes[name] / "commands")
        for name, case in zip(CASES, prepared, strict=True)
    }


def outcome(folder: Path, log: Path) -> Outcome:
    package = folder / "fcrn_fused"
    info = package / "_build_info.py"
    wheel: list[zipfile.ZipInfo] = []
    for path in folder.glob("dist/*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extract("fcrn_fused/_build_info.py", folder)
            wheel = archive.infolist()
    return Outcome(
        int((folder / "status").read_text()),
        (folder / "output").read_text(),
        runpy.run_path(str(info))["INFO"] if info.exists() else {},
        {path.name.partition(".")[0] for path in package.glob("*.so")},
        log.read_text(),
        wheel,
    )


Outcomes = dict[str, Outcome]


@pytest.mark.parametrize("name", ["cpu", "flags"])
def test_a_cpu_build_of_pytorch_has_cpu_kernels(outcomes: Outcomes, name: str) -> None:
    status, output, info, modules, *_ = outcomes[name]
    assert status == 0, output
    assert modules == {"_C"}
    assert info["cpu_problem"] is None
    assert info["pytorch"] == "2.13.0"
    assert "is not a CUDA build" in (info["cuda_problem"] or "")


def test_flags_of_the_user_reach_the_compiler_and_the_linker(outcomes: Outcomes) -> None:
    compiled, linked = (
        [line for line in outcomes["flags"].commands.splitlines() if word in line.split()]
        for word in ("-c", "-shared")
    )
    assert len(compiled) >= 4
    assert all("-DMINE=1" in line for line in compiled[1:])  # the first is the probe
    assert len(linked) == 1
    assert "-Wl,-z,now" in linked[0]


@pytest.mark.parametrize(
    "name", ["cuda", "cuda in a path with a space", "ccache", "nvcc of another minor version"]
)
def test_a_cuda_build_of_pytorch_has_both(outcomes: Outcomes, name: str) -> None:
    status, output, info, modules, commands, _ = outcomes[name]
    assert status == 0, output
    assert modules == {"_C", "_cuda"}
    assert info["cpu_problem"] is info["cuda_problem"] is None
    assert info["architectures"] == "sm_75 sm_80 compute_90 sm_90 sm_100 compute_120 sm_120"
    (nvcc,) = [line for line in commands.splitlines() if "loss_cuda.cu" in line]
    assert "-ccbin=" in nvcc
    assert "ccache" not in nvcc.partition("-ccbin=")[2].split()[0]
    for mark in ("arch=compute_75,code=sm_75", "arch=compute_120,code=compute_120"):
        assert mark in nvcc


@pytest.mark.parametrize("name", ["none", "none without torch"])
def test_none_builds_nothing(outcomes: Outcomes, name: str) -> None:
    status, output, info, modules, commands, _ = outcomes[name]
    assert status == 0, output
    assert modules == set()
    assert commands == ""
    for device in ("cpu", "cuda"):
        assert "FCRN_FUSED_BUILD was none" in (info[f"{device}_problem"] or "")


# What keeps all kernels away: refused where they were asked for, recorded by auto.
ALL = {
    "old torch": "the kernels need PyTorch 2.11 or newer, this is 2.10.3",
    "no compiler": "there is no compiler '/nowhere/c++'; install g++ 11 or newer, or set CXX",
}


@pytest.mark.parametrize(("name", "problem"), ALL.items(), ids=list(ALL))
def test_without_cpu_kernels_auto_says_why(outcomes: Outcomes, name: str, problem: str) -> None:
    status, output, info, modules, *_ = outcomes[name]
    assert status == 0, output
    assert modules == set()
    assert info["cpu_problem"] == info["cuda_problem"] == problem
    assert problem in output


# What keeps the CUDA kernels away: auto builds the CPU kernels all the same.
CUDA = {
    "cpu of a CUDA build": "FCRN_FUSED_BUILD was cpu",
    "no nvcc": "nvcc was not found (/nowhere/bin/nvcc does not exist); install the CUDA toolkit "
    "13.0, or set CUDA_HOME to where it is",
    "nvcc too old": "nvcc is of CUDA 11.8, PyTorch of CUDA 13.0; install the CUDA toolkit 13.0, "
    "or set CUDA_HOME to where it is",
    "unsupported gcc": "unsupported GNU version! gcc later than 13",
    "nvcc fails": "they did not compile; install with `pip install -v` to see why",
    "a GPU too new": "nvcc 12.4 cannot compile for compute_120 sm_120; install another CUDA "
    "toolkit, or set TORCH_CUDA_ARCH_LIST",
    "a GPU too old": "nvcc 13.0 cannot compile for compute_50 sm_50; install another CUDA "
    "toolkit, or set TORCH_CUDA_ARCH_LIST",
    "not an entry": "TORCH_CUDA_ARCH_LIST is 'sm_90': Unknown CUDA arch (sm_90)",
}


@pytest.mark.parametrize(("name", "problem"), CUDA.items(), ids=list(CUDA))
def test_without_cuda_kernels_auto_builds_the_others(
    outcomes: Outcomes, name: str, problem: str
) -> None:
    status, output, info, modules, *_ = outcomes[name]
    assert status == 0, output
    assert modules == {"_C"}
    assert info["cpu_problem"] is None
    assert info["cuda"] is info["architectures"] is None
    assert problem in (info["cuda_problem"] or "")
    assert info["cuda_problem"] in output
    assert "\n" not in (info["cuda_problem"] or "")


REFUSED = {
    "unknown mode": "FCRN_FUSED_BUILD must be one of auto, cpu, cuda, none, got 'gpu'",
    "no torch": "cannot be built: import of torch halted; None in sys.modules. Run `pip install",
    "no pybind11": "cannot be built: import of pybind11 halted; None in sys.modules. Run `pip",
    "old torch, cpu": "FCRN_FUSED_BUILD=cpu, but the kernels need PyTorch 2.11",
    "no compiler, cpu": "FCRN_FUSED_BUILD=cpu, but there is no compiler '/nowhere/c++'",
    "no compiler, cuda": "FCRN_FUSED_BUILD=cuda, but there is no compiler '/nowhere/c++'",
    "CPU build, cuda": "FCRN_FUSED_BUILD=cuda, but PyTorch 2.13.0",
    "no nvcc, cuda": "FCRN_FUSED_BUILD=cuda, but nvcc was not found",
    "nvcc too old, cuda": "FCRN_FUSED_BUILD=cuda, but nvcc is of CUDA 11.8",
    "one entry unknown, cuda": "FCRN_FUSED_BUILD=cuda, but nvcc 13.0 cannot compile for sm_70",
    "nvcc fails, cuda": "fcrn_fused._cuda did not compile",
}


@pytest.mark.parametrize(("name", "problem"), REFUSED.items(), ids=list(REFUSED))
def test_what_was_asked_for_and_cannot_be_built_is_an_error(
    outcomes: Outcomes, name: str, problem: str
) -> None:
    status, output, info, *_ = outcomes[name]
    assert status == 1, output
    assert problem in output
    assert not info


@pytest.mark.parametrize("name", ["no torch", "no pybind11"])
def test_an_isolated_build_names_the_way_out(outcomes: Outcomes, name: str) -> None:
    assert "--no-build-isolation" in outcomes[name].output


ARCHITECTURES = {
    "nvcc without Blackwell": "sm_75 sm_80 compute_90 sm_90",
    "two GPUs": "sm_86 compute_90 sm_90",
    "one entry unknown": "sm_90",
    "Hopper;": "compute_90 sm_90",
    "native": "compute_90 sm_90",
    "native without a GPU": "sm_75 sm_80 compute_90 sm_90 sm_100 compute_120 sm_120",
}


@pytest.mark.parametrize(("name", "wanted"), ARCHITECTURES.items(), ids=list(ARCHITECTURES))
def test_architectures(outcomes: Outcomes, name: str, wanted: str) -> None:
    status, output, info, modules, *_ = outcomes[name]
    assert status == 0, output
    assert modules == {"_C", "_cuda"}
    assert info["architectures"] == wanted


def test_an_entry_that_is_left_out_is_named(outcomes: Outcomes) -> None:
    assert (
        "nvcc 13.0 cannot compile for sm_70, which is left out"
        in outcomes["one entry unknown"].output
    )


def test_a_wheel_holds_the_package_and_nothing_else(outcomes: Outcomes) -> None:
    for name, version in (("wheel", __version__), ("wheel, local version", f"{__version__}+cu130")):
        status, output, info, _, _, wheel = outcomes[name]
        assert status == 0, output
        assert info["version"] == __version__
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        package = {path.name for path in (ROOT / "fcrn_fused").glob("*.py")}
        package |= {"_build_info.py", "py.typed", f"_C{suffix}", f"_cuda{suffix}"}
        about = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
        held = [each.filename for each in wheel]
        assert sorted(held) == sorted(
            [f"fcrn_fused/{name}" for name in package]
            + [f"fcrn_fused-{version}.dist-info/{name}" for name in about]
        )


def test_a_wheel_says_neither_when_nor_where_it_was_built(outcomes: Outcomes) -> None:
    """The dates are the environment's; the compilers are told to leave out the folder."""
    *_, commands, wheel = outcomes["wheel"]
    assert {each.date_time for each in wheel} == {(2020, 1, 1, 0, 0, 0)}
    compiled = [line for line in commands.splitlines() if "csrc" in line and " -c " in line]
    assert len(compiled) >= 4
    folder = re.search(r"(\S+)/csrc/ops\.cpp", commands)[1]
    assert all(f"-ffile-prefix-map={folder}=." in line for line in compiled)


def test_a_later_build_in_place_removes_what_is_no_longer_built(
    outcomes: Outcomes, tmp_path: Path
) -> None:
    """Else a CUDA library of an earlier build would stand beside CPU kernels of this one."""
    case = prepare(Case(mode("none")), tmp_path)
    left = Path(case["folder"]) / "fcrn_fused" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    left.touch()
    environment = {**os.environ, **case["environment"]}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=case["folder"], env=environment, check=True)
    assert not left.exists()
